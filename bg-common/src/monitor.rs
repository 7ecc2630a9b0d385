//! What the packet path tells a watcher: which packets, and what of each.

use crate::{flow::FlowKey, key, reason::REASONS};

/// What is watched: the one value of the `MONITOR` map. All zero: nothing.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Watch {
    /// A bit for each [`crate::reason::Reason`], the first one lowest, and [`LISTENS`]: one
    /// word, so that a packet has one look at it.
    pub reasons: u64,
    /// One packet of so many, at random; 0 and 1: every one.
    pub sample: u32,
    /// Only of the service with this id, less 1; 0: of all, and of none.
    pub service: u32,
}

/// Bit of [`Watch::reasons`]: servers are listened to ([`crate::signals`]).
pub const LISTENS: u64 = 1 << 63;

/// Bits of [`Watch::reasons`] that stand for a reason.
pub const EVERY_REASON: u64 = u64::MAX >> (64 - REASONS);

/// What a CPU tells in one [tick](crate::abi::TICK_SHIFT), at most: some 15 000
/// packets a second. What goes beyond is counted as lost, and costs next to nothing.
pub const TELLS: u32 = 1024;

/// Bytes of the ring that sightings wait in for the daemon.
pub const RING: usize = 2 << 20;

/// Nobody: no service, no backend.
pub const NONE: u32 = u32::MAX;

/// One packet and its verdict, with what is remembered of its flow right after it.
/// 136 bytes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// `CLOCK_MONOTONIC`, ns.
    pub at_ns: u64,
    /// [`crate::port::Tags`] that it came with.
    pub tags: u64,
    /// The flow that was sought, id 0 if none was.
    pub key: FlowKey,
    /// As it came, as in [`crate::service::Backend::address`]; zero without a
    /// [`Sighting::family`].
    pub source: [u8; 16],
    /// The same of the destination.
    pub destination: [u8; 16],
    /// Network byte order; zero for ICMP and later fragments.
    pub source_port: [u8; 2],
    /// Network byte order.
    pub destination_port: [u8; 2],
    /// Length of the packet from its IP header, bytes.
    pub length: u32,
    /// TCP's sequence number, host byte order.
    pub sequence: u32,
    /// TCP's acknowledgement, host byte order.
    pub acknowledgement: u32,
    /// TCP's flags.
    pub flags: u32,
    /// Kernel index of the interface it came in by.
    pub ingress: u32,
    /// Slot of the interface that it was redirected to, with [`action::REDIRECT`].
    pub slot: u32,
    /// The CPU that had it.
    pub cpu: u32,
    /// It stands for so many packets: [`Watch::sample`] at that time.
    pub sample: u32,
    /// Service id, or [`NONE`].
    pub service: u32,
    /// Backend id of the flow, or [`NONE`].
    pub backend: u32,
    /// When the flow was seen last, in ticks, this packet included.
    pub seen: u32,
    /// Generation that the flow was born in.
    pub generation: u16,
    /// [`crate::reason::Reason`].
    pub reason: u8,
    /// `action::*`.
    pub action: u8,
    /// 4 or 6: addresses and what follows is known. 0: the packet was not parsed.
    pub family: u8,
    /// IP protocol.
    pub protocol: u8,
    /// `part::*` of the packet path: 0 whole, 1 first fragment, 2 a later one.
    pub part: u8,
    /// Colour that it was counted for, plus 1; 0 if for none.
    pub colour: u8,
    /// [`crate::flow::FlowTable`] that remembers the flow, plus 1; 0 if none does.
    pub table: u8,
    /// [`crate::flow::Flow::from_client`].
    pub from_client: u8,
    /// [`crate::flow::Flow::from_backend`].
    pub from_backend: u8,
    /// TTL or hop limit, as it came.
    pub hops: u8,
    /// [`crate::service::colour_spread`] of the flow.
    pub colour_spread: u8,
    /// Zero.
    pub zero: [u8; 3],
}

/// Values of [`Sighting::action`].
pub mod action {
    /// To the kernel's stack.
    pub const PASS: u8 = 0;
    /// Nowhere.
    pub const DROP: u8 = 1;
    /// Out of the interface it came in by.
    pub const TRANSMIT: u8 = 2;
    /// Out of another one.
    pub const REDIRECT: u8 = 3;
}

/// Which way a packet went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From a client.
    Forward,
    /// From a backend.
    Return,
}

impl Sighting {
    /// Which way it went, where that can be told.
    pub fn direction(&self) -> Option<Direction> {
        if self.key.id == 0 || !matches!(self.protocol, key::TCP | key::UDP) {
            return None;
        }
        let client = |address: [u8; 16], port| {
            let [a, b, c, d, ..] = address;
            let client = match self.family {
                4 => FlowKey::client_v4([a, b, c, d]),
                _ => FlowKey::client_v6(address),
            };
            client == self.key.client && port == self.key.port()
        };
        if client(self.source, self.source_port) {
            Some(Direction::Forward)
        } else if client(self.destination, self.destination_port) {
            Some(Direction::Return)
        } else {
            None
        }
    }
}

/// What befell a flow table: the `PRESSURE` map, per CPU; index:
/// [`crate::flow::FlowTable`].
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Pressure {
    /// Flows that were not over, and gave their line to a new one.
    pub evicted: u64,
    /// Flows that found no room.
    pub full: u64,
}

const _: () = {
    assert!(REASONS <= 64);
    assert!(size_of::<Watch>() == 16);
    assert!(size_of::<Sighting>() == 136);
};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reason::Reason;

    #[test]
    fn every_reason_has_a_bit() {
        for reason in Reason::ALL {
            assert!(EVERY_REASON & 1 << *reason as u32 != 0);
        }
        assert_eq!(EVERY_REASON.count_ones(), REASONS);
    }
}
