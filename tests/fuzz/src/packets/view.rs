//! A second reading of frames, which shares no code with the packet path: slow,
//! plain, and forgiving.

use std::net::IpAddr;

use bg_common::key::{TCP, UDP};

/// Length of both MACs.
const MACS: usize = 12;

/// A frame without its VLAN tags.
#[derive(Debug)]
pub struct View {
    /// Destination and source.
    pub macs: [[u8; 6]; 2],
    /// Outer one first, as they stand in the frame.
    pub tags: Vec<[u8; 4]>,
    /// EtherType behind the tags.
    pub ether_type: [u8; 2],
    /// What is behind the EtherType, padding included.
    pub packet: Vec<u8>,
    /// What the IP header says, if there is one.
    pub ip: Option<Ip>,
}

impl View {
    /// Takes a frame apart; `None` when it ends before its EtherType.
    pub fn new(frame: &[u8]) -> Option<Self> {
        let (macs, mut rest) = frame.split_at_checked(MACS)?;
        let mut tags = Vec::new();
        while let [a @ (0x81 | 0x88), b @ (0x00 | 0xa8), c, d, behind @ ..] = rest
            && matches!([*a, *b], [0x81, 0x00] | [0x88, 0xa8])
        {
            tags.push([*a, *b, *c, *d]);
            rest = behind;
        }
        let (ether_type, packet) = rest.split_at_checked(2)?;
        let ether_type = [ether_type[0], ether_type[1]];
        let ip = match ether_type {
            [0x08, 0x00] => Ip::v4(packet),
            [0x86, 0xdd] => Ip::v6(packet),
            _ => None,
        };
        let mac = |at: usize| std::array::from_fn(|byte| macs[at + byte]);
        Some(Self {
            macs: [mac(0), mac(6)],
            tags,
            ether_type,
            packet: packet.to_vec(),
            ip,
        })
    }
}

/// An IP header, and where the transport header lies behind it.
#[derive(Clone, Debug)]
pub struct Ip {
    /// IPv6.
    pub v6: bool,
    /// Length of the header, extension headers included.
    pub header: usize,
    /// Length of the packet as its header says.
    pub total: usize,
    /// TTL or hop limit.
    pub hops: u8,
    /// What it carries.
    pub protocol: u8,
    /// Where it comes from.
    pub source: IpAddr,
    /// Where it goes.
    pub destination: IpAddr,
    /// Routers may split it.
    pub may_fragment: bool,
    /// Offset of a fragment, bytes.
    pub offset: usize,
    /// More fragments come.
    pub more: bool,
    /// What fragments of one packet have in common.
    pub identification: u32,
}

impl Ip {
    /// The IP header at the beginning of `packet`, which may be cut off anywhere
    /// behind it.
    pub fn v4(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; 20] = packet.first_chunk()?;
        let header = usize::from(fixed[0] & 15) * 4;
        let fragment = u16::from_be_bytes([fixed[6], fixed[7]]);
        let address = |at| <[u8; 4]>::try_from(&fixed[at..at + 4]).map(IpAddr::from);
        (fixed[0] >> 4 == 4 && header >= 20 && packet.len() >= header).then_some(())?;
        Some(Self {
            v6: false,
            header,
            total: u16::from_be_bytes([fixed[2], fixed[3]]).into(),
            hops: fixed[8],
            protocol: fixed[9],
            source: address(12).ok()?,
            destination: address(16).ok()?,
            may_fragment: fragment & 0x4000 == 0,
            offset: usize::from(fragment & 0x1fff) * 8,
            more: fragment & 0x2000 != 0,
            identification: u16::from_be_bytes([fixed[4], fixed[5]]).into(),
        })
    }

    /// The same over IPv6.
    pub fn v6(packet: &[u8]) -> Option<Self> {
        let fixed: &[u8; 40] = packet.first_chunk()?;
        (fixed[0] >> 4 == 6).then_some(())?;
        let address = |at| <[u8; 16]>::try_from(&fixed[at..at + 16]).map(IpAddr::from);
        let mut ip = Self {
            v6: true,
            header: 40,
            total: 40 + usize::from(u16::from_be_bytes([fixed[4], fixed[5]])),
            hops: fixed[7],
            protocol: fixed[6],
            source: address(8).ok()?,
            destination: address(24).ok()?,
            may_fragment: false,
            offset: 0,
            more: false,
            identification: 0,
        };
        while matches!(ip.protocol, 0 | 43 | 44 | 60) && ip.offset == 0 {
            let extension = packet.get(ip.header..)?.first_chunk::<8>()?;
            if ip.protocol == 44 {
                let word = u16::from_be_bytes([extension[2], extension[3]]);
                (ip.offset, ip.more) = (usize::from(word & 0xfff8), word & 1 != 0);
                let [.., a, b, c, d] = *extension;
                ip.identification = u32::from_be_bytes([a, b, c, d]);
                ip.header += 8;
            } else {
                ip.header += (usize::from(extension[1]) + 1) * 8;
            }
            ip.protocol = extension[0];
        }
        (packet.len() >= ip.header).then_some(ip)
    }

    /// The whole packet, not a fragment of it.
    pub const fn is_whole(&self) -> bool {
        self.offset == 0 && !self.more
    }

    /// Both addresses, as bytes.
    pub fn addresses(&self) -> Vec<u8> {
        let bytes = |address| match address {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        [bytes(self.source), bytes(self.destination)].concat()
    }

    /// Where an address stands in the header.
    pub const fn address_at(&self, side: Side) -> std::ops::Range<usize> {
        match (self.v6, side) {
            (false, Side::Source) => 12..16,
            (false, Side::Destination) => 16..20,
            (true, Side::Source) => 8..24,
            (true, Side::Destination) => 24..40,
        }
    }

    /// Where a port stands in the packet.
    pub const fn port_at(&self, side: Side) -> std::ops::Range<usize> {
        match side {
            Side::Source => self.header..self.header + 2,
            Side::Destination => self.header + 2..self.header + 4,
        }
    }

    /// Source and destination port of TCP or UDP, if the packet shows them.
    pub fn ports(&self, packet: &[u8]) -> Option<[u16; 2]> {
        let known = self.protocol == TCP || self.protocol == UDP;
        (known && self.offset == 0).then_some(())?;
        let [a, b, c, d] = *packet.get(self.header..)?.first_chunk()?;
        Some([u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])])
    }

    /// Where the checksum of the transport header stands in the packet.
    pub const fn check_at(&self) -> std::ops::Range<usize> {
        let at = self.header + if self.protocol == TCP { 16 } else { 6 };
        at..at + 2
    }
}

/// One end of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

impl Side {
    /// Both ends.
    pub const BOTH: [Self; 2] = [Self::Source, Self::Destination];
}

/// The one's complement sum over `parts`, each of which begins at an even place;
/// 0 and 0xffff are one number (RFC 1071).
pub fn sum(parts: &[&[u8]]) -> u64 {
    let sum = parts.iter().map(|part| {
        // 2^16 is 1 modulo 2^16 - 1, so words of 32 bits will do.
        let (words, rest) = part.as_chunks::<4>();
        let mut last = [0; 4];
        last[..rest.len()].copy_from_slice(rest);
        let words = words.iter().chain([&last]);
        words
            .map(|word| u64::from(u32::from_be_bytes(*word)))
            .sum::<u64>()
    });
    sum.sum::<u64>() % 0xffff
}
