//! An XDP program that passes everything.
//!
//! A veth wakes its other end for frames of `XDP_TX` only if there is an XDP
//! program at that end; without one they lie there until something else comes.

use std::{
    fs::File,
    io, mem,
    os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
};

use anyhow::{Context as _, Result};
use nix::net::if_::if_nametoindex;

use crate::kernel::in_namespace;

const PROG_LOAD: libc::c_long = 5;
const LINK_CREATE: libc::c_long = 28;
const PROG_TYPE_XDP: u32 = 6;
const ATTACH_XDP: u32 = 37;
const DRIVER_MODE: u32 = 1 << 2;

/// `r0 = XDP_PASS; exit`
const PROGRAM: [u64; 2] = [0x0000_0002_0000_00b7, 0x95];
const LICENSE: &[u8] = b"GPL\0";

/// The parts of the kernel's `union bpf_attr` that the two commands need; zero
/// for the rest.
#[repr(C)]
#[derive(Default)]
struct Load {
    kind: u32,
    instructions: u32,
    program: u64,
    license: u64,
}

#[repr(C)]
#[derive(Default)]
struct Create {
    program: u32,
    interface: u32,
    kind: u32,
    flags: u32,
}

/// Attaches the program to an interface of a namespace until what it returns is
/// dropped.
pub fn attach(namespace: &File, interface: &str) -> Result<OwnedFd> {
    let program = bpf(
        PROG_LOAD,
        &Load {
            kind: PROG_TYPE_XDP,
            instructions: PROGRAM.len() as u32,
            program: PROGRAM.as_ptr() as u64,
            license: LICENSE.as_ptr() as u64,
        },
    )
    .context("loading a program that passes everything")?;
    in_namespace(namespace, || -> io::Result<OwnedFd> {
        bpf(
            LINK_CREATE,
            &Create {
                program: program.as_raw_fd() as u32,
                interface: if_nametoindex(interface)?,
                kind: ATTACH_XDP,
                flags: DRIVER_MODE,
            },
        )
    })
    .with_context(|| format!("attaching to {interface}"))
}

fn bpf<T>(command: libc::c_long, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: the attributes are the first fields of the kernel's layout for the
    // command, in the size given, and what they point to is static; both
    // commands return a new descriptor.
    unsafe {
        let fd = libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            mem::size_of::<T>(),
        );
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(fd as i32))
    }
}
