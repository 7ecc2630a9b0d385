//! What a card does with frames before XDP sees them, by the ioctl of ethtool.

use std::{ffi::c_char, io, os::fd::AsRawFd as _};

use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

/// `ETHTOOL_GFLAGS`, and its bits.
const GET_FLAGS: u32 = 0x25;
const RECEIVE_VLAN: u32 = 1 << 8;
const LARGE_RECEIVE: u32 = 1 << 15;

/// Offloads of a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads {
    /// Frames are joined to larger ones (LRO).
    pub large_receive: bool,
    /// VLAN tags are taken out of the frames.
    pub receive_vlan: bool,
}

/// `struct ethtool_value`.
#[repr(C)]
struct Value {
    command: u32,
    data: u32,
}

mod kernel {
    #![allow(missing_docs, reason = "the macro writes them")]
    nix::ioctl_readwrite_bad!(ethtool, nix::libc::SIOCETHTOOL, nix::libc::ifreq);
}

/// The offloads of an interface, whose name has 15 bytes at most.
pub fn offloads(interface: &str) -> io::Result<Offloads> {
    let socket = socket(
        AddressFamily::Inet,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    let mut value = Value {
        command: GET_FLAGS,
        data: 0,
    };
    let mut name = [0 as c_char; libc::IFNAMSIZ];
    for (to, from) in name[..libc::IFNAMSIZ - 1].iter_mut().zip(interface.bytes()) {
        *to = from as c_char;
    }
    let mut request = libc::ifreq {
        ifr_name: name,
        ifr_ifru: libc::__c_anonymous_ifr_ifru {
            ifru_data: (&raw mut value).cast(),
        },
    };
    // SAFETY: `request` is a whole `ifreq` whose name ends with a zero; the kernel reads
    // and writes it, and the `ethtool_value` that it points to, which outlives the call.
    unsafe { kernel::ethtool(socket.as_raw_fd(), &raw mut request) }?;
    Ok(Offloads {
        large_receive: value.data & LARGE_RECEIVE != 0,
        receive_vlan: value.data & RECEIVE_VLAN != 0,
    })
}
