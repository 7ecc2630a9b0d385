//! Frames out of an interface, below the stack.

use std::{
    io, mem,
    os::fd::{AsRawFd as _, OwnedFd},
};

use nix::sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockType};

/// Sends a whole Ethernet frame by an interface. Needs `CAP_NET_RAW`.
pub fn send(ifindex: u32, frame: &[u8]) -> io::Result<()> {
    let socket = open(ifindex)?;
    socket::send(socket.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT)?;
    Ok(())
}

/// A packet socket that sends by one interface, and receives nothing: it is
/// bound to no protocol.
fn open(ifindex: u32) -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: 0,
        sll_ifindex: ifindex as i32,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the address is one of AF_PACKET, of the length given, and outlives
    // the call.
    let bound = unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            mem::size_of_val(&address) as u32,
        )
    };
    if bound == 0 {
        Ok(socket)
    } else {
        Err(io::Error::last_os_error())
    }
}
