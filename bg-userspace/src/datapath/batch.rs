//! A command of `bpf(2)` that aya has no function for: taking a map out of an array of
//! maps.

use std::{
    io,
    os::fd::{AsFd, AsRawFd as _},
};

const DELETE: libc::c_long = 3;

/// The part of the kernel's `union bpf_attr` for commands about one element.
#[repr(C)]
struct Element {
    map_fd: u32,
    zero: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// Takes the map at `index` out of the array of maps behind `fd`; none is there: fine.
pub fn remove_map(fd: impl AsFd, index: u32) -> io::Result<()> {
    let element = Element {
        map_fd: fd.as_fd().as_raw_fd() as u32,
        zero: 0,
        key: &raw const index as u64,
        value: 0,
        flags: 0,
    };
    // SAFETY: the attributes are the kernel's layout, and the key is the four bytes
    // that arrays use.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            DELETE,
            &raw const element,
            size_of::<Element>(),
        )
    };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        error => Err(error),
    }
}
