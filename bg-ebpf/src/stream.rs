//! Streams of frames for measurements: one template, and what differs from frame
//! to frame. The generator's half of it is the `bgswitch-bench-ebpf` binary.

use crate::checksum::Delta;

/// Bytes of a template, in words.
pub const WORDS: usize = 10;
/// Words of a template that short frames have: 64 bytes.
pub const SHORT_WORDS: usize = 8;

/// What a generator sends: the value of its only map entry.
///
/// Offsets are in bytes from the start of the frame; 0 where the frame has no
/// such field.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stream {
    /// The frame, in memory order. Client's address (its last four bytes), port
    /// and running number are zero, and so is the other end's port where there are
    /// several; the checksums are right for that.
    pub template: [u64; WORDS],
    /// Not 0: the frame has all [`WORDS`], else [`SHORT_WORDS`].
    pub long: u32,
    /// Last four bytes of the first client's address, host order.
    pub first: u32,
    /// The number of the first flow, ...
    pub from: u32,
    /// ... and the one behind the last.
    pub flows: u32,
    /// Number of the next frame's flow.
    pub next: u32,
    /// Number of frames so far, modulo 2^32.
    pub sent: u32,
    /// Where the last four bytes of the client's address are.
    pub address_at: u32,
    /// Where the client's port is.
    pub port_at: u32,
    /// Where the running number goes: the acknowledgement number (TCP).
    pub number_at: u32,
    /// Where the IPv4 header's checksum is.
    pub header_check_at: u32,
    /// Where the checksum of TCP or UDP is.
    pub check_at: u32,
    /// How many ports the other end has, which flows take in turn; 0: one.
    pub ports: u32,
    /// The first of them, host order.
    pub first_port: u32,
    /// Where it is.
    pub other_at: u32,
}

/// What is written over a template.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// Last four bytes of the client's address.
    pub address: [u8; 4],
    /// The client's port, network byte order.
    pub port: [u8; 2],
    /// The other end's port, network byte order; 0 where there is only one.
    pub other: [u8; 2],
    /// The running number.
    pub number: [u8; 4],
}

impl Change {
    /// What the IPv4 header's checksum has to follow.
    #[inline(always)]
    pub const fn header(&self) -> Delta {
        Delta::new().word32([0; 4], self.address)
    }

    /// What the checksum of TCP or UDP has to follow.
    #[inline(always)]
    pub const fn transport(&self, numbered: bool) -> Delta {
        let delta = self.header().word([0; 2], self.port);
        let delta = delta.word([0; 2], self.other);
        if numbered {
            delta.word32([0; 4], self.number)
        } else {
            delta
        }
    }
}

impl Stream {
    /// The next frame's change.
    #[inline(always)]
    pub const fn advance(&mut self) -> Change {
        let (offset, port) = client(self.next);
        let other = match self.next.checked_rem(self.ports) {
            Some(number) => (self.first_port + number) as u16,
            None => 0,
        };
        let change = Change {
            address: self.first.wrapping_add(offset).to_be_bytes(),
            port: port.to_be_bytes(),
            other: other.to_be_bytes(),
            number: self.sent.to_be_bytes(),
        };
        self.sent = self.sent.wrapping_add(1);
        self.next += 1;
        if self.next >= self.flows {
            self.next = self.from;
        }
        change
    }
}

/// The client of a flow: how far its address lies behind the first one, and its
/// port. 16 384 flows a client.
#[inline(always)]
pub const fn client(flow: u32) -> (u32, u16) {
    (flow >> 14, 1024 + (flow & 0x3fff) as u16)
}

/// What came in at the far end of a link: the value of `arrive`'s first map.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Arrivals {
    /// Frames for this network and port, over IPv4 without options.
    pub intended: u64,
    /// Frames for anybody else.
    pub others: u64,
    /// Where intended frames go: a network of 24 bits, ...
    pub network: [u8; 3],
    /// Not 0: the time of each intended frame is written down.
    pub timed: u8,
    /// ... and a port, network byte order.
    pub port: [u8; 2],
    /// Zero.
    pub reserved: u16,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flows_come_round() {
        let mut stream = Stream {
            flows: 2,
            first: 7,
            ..Stream::default()
        };
        let ports = [(); 3].map(|()| u16::from_be_bytes(stream.advance().port));
        assert_eq!(ports, [1024, 1025, 1024]);
        let change = stream.advance();
        assert_eq!(change.number, 3u32.to_be_bytes());
        assert_eq!(change.other, [0; 2]);
    }

    #[test]
    fn a_part_of_the_flows_comes_round_over_all_ports() {
        let mut stream = Stream {
            from: 4,
            next: 4,
            flows: 7,
            ports: 2,
            first_port: 9000,
            ..Stream::default()
        };
        let ports = [(); 4].map(|()| {
            let change = stream.advance();
            (
                u16::from_be_bytes(change.port),
                u16::from_be_bytes(change.other),
            )
        });
        assert_eq!(
            ports,
            [(1028, 9000), (1029, 9001), (1030, 9000), (1028, 9000)]
        );
    }

    #[test]
    fn no_two_flows_have_one_client() {
        assert_eq!(client(0x3fff), (0, 17_407));
        assert_eq!(client(0x4000), (1, 1024));
    }
}
