//! Commands of `bpf(2)` that aya has no function for: reading a hash table in batches
//! (`BPF_MAP_LOOKUP_BATCH`, kernel 5.6; a thousand entries a syscall, and an end also
//! while packets change the table), and taking a map out of an array of maps.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd as _},
};

use aya::Pod;

const LOOKUP_BATCH: libc::c_long = 24;

/// The part of the kernel's `union bpf_attr` for batch commands.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

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

/// Calls `visit` for every entry of the hash table behind `fd`, whose keys and
/// values must be `K` and `V` (checked when the pins were).
pub fn for_each<K: Pod, V: Pod>(fd: impl AsFd, mut visit: impl FnMut(&K, &V)) -> io::Result<()> {
    let mut room = 1024usize;
    let mut position = 0u32;
    let mut first = true;
    loop {
        let mut keys: Vec<MaybeUninit<K>> = Vec::with_capacity(room);
        let mut values: Vec<MaybeUninit<V>> = Vec::with_capacity(room);
        let mut next = 0u32;
        let mut attributes = Attributes {
            in_batch: if first { 0 } else { &raw const position as u64 },
            out_batch: &raw mut next as u64,
            keys: keys.as_mut_ptr() as u64,
            values: values.as_mut_ptr() as u64,
            count: room as u32,
            map_fd: fd.as_fd().as_raw_fd() as u32,
            ..Attributes::default()
        };
        // SAFETY: the attributes are the kernel's layout; both buffers have room
        // for `count` entries of the map's sizes, and the positions are the four
        // bytes that hash tables use.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                LOOKUP_BATCH,
                &raw mut attributes,
                size_of::<Attributes>(),
            )
        };
        let error = (result < 0).then(io::Error::last_os_error);
        let ended = match error.as_ref().and_then(io::Error::raw_os_error) {
            None => false,
            Some(libc::ENOENT) => true,
            Some(libc::ENOSPC) => {
                // One bucket holds more than the buffers: again, with more room.
                room *= 2;
                continue;
            }
            Some(_) => return Err(error.unwrap_or_else(|| io::ErrorKind::Other.into())),
        };
        for index in 0..attributes.count as usize {
            // SAFETY: the kernel has written `count` entries of both.
            let (key, value) = unsafe {
                (
                    &*keys.as_ptr().add(index).cast::<K>(),
                    &*values.as_ptr().add(index).cast::<V>(),
                )
            };
            visit(key, value);
        }
        if ended {
            return Ok(());
        }
        position = next;
        first = false;
    }
}
