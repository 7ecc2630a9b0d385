//! Source ports that `snat` lends to flows.
//!
//! In `snat` a backend sees the gateway's own address and a port of it. The ports
//! towards one backend address are a *block*: an array, by port, of the flow that
//! has each of them, so that a packet that comes back finds its flow without a
//! hash, and no two flows towards one backend share a port.
//!
//! Nothing gives a port back. A port whose flow is over is lent to the next flow that
//! asks; where there is none, that of a TCP handshake that has not ended.

use crate::{abi::ticks, flow::FlowKey};

/// Values of [`crate::flow::Flow::via`].
pub mod via {
    /// The client's own address and port.
    pub const NAT: u16 = 0;
    /// The same, with the listener's address as the destination: direct server
    /// return.
    pub const DSR: u16 = 1;

    /// True for a source port of the gateway's own, host order.
    #[inline(always)]
    pub const fn is_port(via: u16) -> bool {
        super::index(via).is_some()
    }
}

/// The first port that is lent: those below are for servers.
pub const FIRST_PORT: u16 = 1024;
/// Ports in a block: up to 32 767, where Linux's own local ports begin
/// (`net.ipv4.ip_local_port_range`), so that the gateway's own connections to a
/// backend are never taken for a client's.
pub const PORTS: u32 = 32_768 - FIRST_PORT as u32;

/// TCP is lent the lower half of a block, UDP the upper one: neither can use up the
/// other's.
pub const HALF: u32 = PORTS / 2;
/// A datagram flow that is over keeps its port for this much longer, so that a late
/// answer goes to nobody and not to somebody else: 30 seconds, in ticks.
pub const LATE: u32 = ticks(30_000_000_000);

/// Index of a port (host order) in its block.
#[inline(always)]
pub const fn index(port: u16) -> Option<u32> {
    let index = (port as u32).wrapping_sub(FIRST_PORT as u32);
    if index < PORTS { Some(index) } else { None }
}

/// The port with an index, host order.
#[inline(always)]
pub const fn port(index: u32) -> u16 {
    (index + FIRST_PORT as u32) as u16
}

/// A port is its flow's own for so long after it was lent, remembered or not yet:
/// 134 ms, in ticks.
pub const GRACE: u32 = 2;
/// A handshake that got no further for so long may lose its port when no other is to be
/// had: 0.3 seconds, in ticks.
pub const STUCK: u32 = ticks(300_000_000);
/// Ports that are looked at for a flow.
pub const CANDIDATES: u32 = 96;
/// So many of them lie side by side.
pub const RUN: u32 = 24;

/// [`Lease::table`] of a port that is never lent: a listener may have it.
pub const RESERVED: u32 = u32::MAX;

/// Who has a port. 32 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Lease {
    /// [`FlowKey::client`] of the flow.
    pub client: [u64; 2],
    /// [`FlowKey::id`] of the flow; 0 = nobody had the port yet.
    pub id: u32,
    /// Counts the changes: who would change a lease that another CPU has changed
    /// meanwhile, sees it.
    pub turn: u32,
    /// When it was lent, in ticks.
    pub since: u32,
    /// [`crate::flow::FlowTable::Udp`] or another one, as a number: where the flow is.
    /// Or [`RESERVED`].
    pub table: u32,
}

impl Lease {
    /// The key of the flow.
    pub const fn key(&self) -> FlowKey {
        FlowKey::of(self.client, self.id)
    }
}

/// Towards whom a block's ports are, and what they are ports of. 16 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Source {
    /// The gateway's address in the eyes of the backend, network byte order; IPv4
    /// in the first four bytes, rest zero. All zero: not known.
    pub address: [u8; 16],
}

impl Source {
    /// True once the address is known.
    #[inline(always)]
    pub const fn is_known(&self) -> bool {
        u128::from_ne_bytes(self.address) != 0
    }
}

const _: () = assert!(ticks(100_000_000) == GRACE);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_and_indices_are_one_to_one_and_leave_linux_its_own() {
        for port_number in 0..=u16::MAX {
            match index(port_number) {
                Some(index) => {
                    assert!(index < PORTS && via::is_port(port_number));
                    assert_eq!(port(index), port_number);
                }
                None => assert!(!(1024..32_768).contains(&port_number)),
            }
        }
        assert!(!via::is_port(via::NAT) && !via::is_port(via::DSR));
    }
}
