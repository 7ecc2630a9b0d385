//! Frames in and out of an interface, below the stack.

use std::{
    fs::File,
    io, mem,
    os::fd::{AsFd as _, AsRawFd as _, OwnedFd},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use nix::{
    net::if_::if_nametoindex,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{self, AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType},
};

use crate::kernel::in_namespace;

/// A packet socket on one interface.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    /// Opens an interface of a namespace.
    pub fn open(namespace: &File, interface: &str) -> Result<Self> {
        let socket = in_namespace(namespace, || -> io::Result<OwnedFd> {
            let socket = socket::socket(
                AddressFamily::Packet,
                SockType::Raw,
                SockFlag::SOCK_CLOEXEC,
                SockProtocol::EthAll,
            )?;
            let address = libc::sockaddr_ll {
                sll_family: libc::AF_PACKET as u16,
                sll_protocol: (libc::ETH_P_ALL as u16).to_be(),
                sll_ifindex: if_nametoindex(interface)? as i32,
                sll_hatype: 0,
                sll_pkttype: 0,
                sll_halen: 0,
                sll_addr: [0; 8],
            };
            // SAFETY: the address is one of AF_PACKET, of the length given, and
            // outlives the call.
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
        })
        .with_context(|| format!("opening {interface}"))?;
        Ok(Self { socket })
    }

    /// Sends a frame, as it is.
    pub fn send(&self, frame: &[u8]) -> io::Result<()> {
        loop {
            match socket::send(self.socket.as_raw_fd(), frame, MsgFlags::empty()) {
                // The interface's queue is full.
                Err(nix::Error::ENOBUFS) => std::thread::yield_now(),
                result => return result.map(drop).map_err(io::Error::from),
            }
        }
    }

    /// True when `frame` comes by, byte for byte, within `limit`.
    pub fn sees(&self, frame: &[u8], limit: Duration) -> io::Result<bool> {
        let deadline = Instant::now() + limit;
        let mut buffer = [0; 2048];
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(false);
            }
            let wait = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            let mut ready = [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)];
            if poll(&mut ready, wait)? == 0 {
                continue;
            }
            let received = socket::recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty());
            let length = match received {
                // Told once; when the interface is up again, so is the socket.
                Err(nix::Error::ENETDOWN) => continue,
                received => received?,
            };
            if buffer[..length] == *frame {
                return Ok(true);
            }
        }
    }
}
