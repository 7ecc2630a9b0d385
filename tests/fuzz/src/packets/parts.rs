//! Packets of parts that fit together.

use std::net::SocketAddr;

use bg_common::{
    service::Colour,
    snat::{FIRST_PORT, port},
};
use bg_tests::{
    frame::{Frame, Macs},
    world::{FROM_CLIENT, World, addr, at, from_backend, preview_at},
};

use crate::bytes::Bytes;

/// Flags of a segment.
pub(super) const FLAGS: [&str; 9] = ["S", "SA", "A", "PA", "FA", "R", "RA", "F", "SR"];

/// Numbers that cases know, their neighbours, or any.
pub(super) fn number(bytes: &mut Bytes<'_>) -> u32 {
    match bytes.u8() {
        any if any % 8 == 7 => bytes.u32(),
        near => [1000, 1001, 5000, 5001, 999, 4999, 0][usize::from(near % 8)],
    }
}

/// A client, or a neighbour of it.
pub(super) fn client(v6: bool, bytes: &mut Bytes<'_>) -> SocketAddr {
    let mut client = addr(if v6 { at::CLIENT_V6 } else { at::CLIENT });
    client.set_port(client.port() + u16::from(bytes.u8() / 64));
    client
}

/// The gateway's own address on the backends' side.
pub(super) fn own(v6: bool) -> SocketAddr {
    addr(if v6 { at::OWN_V6 } else { at::OWN })
}

/// What a built packet is made of.
#[expect(clippy::struct_excessive_bools, reason = "choices, each of its own")]
pub(super) struct Parts {
    v6: bool,
    udp: bool,
    pub(super) from_backend: bool,
    /// An error about a packet that came the other way.
    error: bool,
    backend: u32,
    client: SocketAddr,
    service: SocketAddr,
}

impl Parts {
    pub(super) fn choose(bytes: &mut Bytes<'_>) -> Self {
        let choice = bytes.u8();
        let (v6, udp) = (choice & 1 != 0, choice & 2 != 0);
        let service = match (v6, udp) {
            (false, false) => at::SERVICE,
            (true, false) => at::SERVICE_V6,
            (false, true) => at::SERVICE_UDP,
            (true, true) => at::SERVICE_UDP_V6,
        };
        let service = match bytes.u8() % 8 {
            6 => preview_at(Colour::Blue, addr(service)),
            7 => preview_at(Colour::Green, addr(service)),
            _ => addr(service),
        };
        Self {
            v6,
            udp,
            from_backend: choice & 4 != 0,
            error: choice & 0x18 == 0x18,
            backend: u32::from(v6) * 2 + u32::from(choice >> 5 & 1),
            client: client(v6, bytes),
            service,
        }
    }

    pub(super) fn frame(&self, world: &World, bytes: &mut Bytes<'_>) -> Vec<u8> {
        let macs = if self.from_backend {
            from_backend(self.backend)
        } else {
            FROM_CLIENT
        };
        let mut backend = addr(at::BACKENDS[self.backend as usize]);
        if backend.port() == 0 {
            backend.set_port(self.service.port());
        }
        let (from, to) = if self.from_backend {
            (backend, self.seen_client(world, bytes))
        } else {
            (self.client, self.service)
        };
        if self.error {
            // About what was sent to whoever sends the error.
            let about = self.segment(macs, to, from, bytes).quote(bytes.u8().into());
            let (kind, code) = if self.v6 {
                bytes.choose(&[(1, 0), (2, 0), (3, 0), (4, 1)])
            } else {
                bytes.choose(&[(3, 4), (3, 1), (11, 0), (12, 0)])
            };
            let rest = bytes.u16().into();
            let (from, to) = (from.ip(), to.ip());
            return Frame::icmp(macs, from, to, (kind, code, rest), &about).bytes();
        }
        self.segment(macs, from, to, bytes).bytes()
    }

    /// The client in the eyes of the backend: itself, or who has a port.
    fn seen_client(&self, world: &World, bytes: &mut Bytes<'_>) -> SocketAddr {
        let block = u32::from(world.backends[self.backend as usize].block);
        let choice = bytes.u8();
        if block == 0 || choice.is_multiple_of(4) {
            return self.client;
        }
        let leases = world.leases.keys().filter(|(of, _)| *of == block);
        let mut lent: Vec<u32> = leases.map(|(_, index)| *index).collect();
        lent.sort_unstable();
        let mut client = own(self.v6);
        client.set_port(
            match lent.get(usize::from(bytes.u8()) % lent.len().max(1)) {
                Some(index) if choice % 8 != 1 => port(*index),
                _ => FIRST_PORT.wrapping_add(bytes.u16()),
            },
        );
        client
    }

    fn segment(
        &self,
        macs: Macs,
        from: SocketAddr,
        to: SocketAddr,
        bytes: &mut Bytes<'_>,
    ) -> Frame {
        let mut frame = if self.udp {
            Frame::udp(macs, from, to)
        } else {
            let flags = bytes.choose(&FLAGS);
            let options: &[u8] = bytes.choose(&[&[], &[], &[2, 4, 5, 180], &[1; 12]]);
            Frame::tcp(macs, from, to, flags)
                .numbers(number(bytes), number(bytes))
                .tcp_options(options)
        };
        let choice = bytes.u8();
        if choice & 1 != 0 {
            frame = frame.hops(bytes.u8() % 4);
        }
        if choice & 2 != 0 {
            frame = frame.may_fragment();
        }
        if choice & 0xc == 0xc && !self.v6 {
            frame = frame.ip_options(&[1; 8]);
        }
        if choice & 0x30 == 0x30 && self.udp {
            frame = frame.without_checksum();
        }
        let payload = match choice >> 6 {
            0 => 0,
            1 => usize::from(bytes.u8()),
            2 => 1400 + usize::from(bytes.u8()),
            _ => return frame.padding(usize::from(bytes.u8() % 32)),
        };
        let filling: Vec<u8> = (0..payload).map(|n| n as u8).collect();
        frame.payload(&filling)
    }
}
