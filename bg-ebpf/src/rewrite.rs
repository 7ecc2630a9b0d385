//! Edits of a frame, layer by layer, each beside its checksum update.
//!
//! `None` means that the frame ends before the header to be edited; callers
//! have parsed it before, so that does not happen.

use bg_common::{
    key::{TCP, UDP},
    reason::Reason,
    service::NextHop,
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use crate::{
    checksum::{Delta, Sum},
    errors::Quote,
    packet::{ETHERNET, Ethernet, Packet, Tcp, tcp_flag},
    parse::{self, Ip, Segment},
    tables::Address,
};

/// Which end of a packet is rewritten.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Where it comes from.
    Source,
    /// Where it goes.
    Destination,
}

impl Side {
    /// The other end.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Destination,
            Self::Destination => Self::Source,
        }
    }
}

/// TTL or hop limit of packets that are made here (RFC 1700's default).
const HOPS: u8 = 64;

/// The IP header of one family, and its ICMP.
pub trait Network: Address {
    /// Length of the header without options, bytes.
    const HEADER: usize;
    /// Protocol number of ICMP.
    const ICMP: u8;
    /// Type and code of a "too big".
    const TOO_BIG: (u8, u8);
    /// Type and code of a "time exceeded in transit".
    const TIME_EXCEEDED: (u8, u8);

    /// True for the ICMP types that tell the sender of a packet what became of it.
    fn is_error(kind: u8) -> bool;

    /// Parses the header behind Ethernet's.
    fn parse<P: Packet>(packet: &P) -> Result<Ip<Self>, Reason>;

    /// Replaces an address of the header at `at` and, with `hop`, takes one from
    /// the TTL or hop limit. Returns what changed for the transport checksum.
    fn readdress<P: Packet>(
        packet: &mut P,
        at: usize,
        side: Side,
        new: Self,
        hop: bool,
    ) -> Option<Delta>;

    /// Writes a whole header, without options, for `payload` bytes of
    /// `protocol`. Returns the sum over the pseudo header.
    fn write_header<P: Packet>(
        packet: &mut P,
        from: Self,
        to: Self,
        protocol: u8,
        payload: u8,
    ) -> Option<Sum>;

    /// The checksum of the header at `at`; zero where there is none.
    fn header_check<P: Packet>(packet: &P, at: usize) -> Option<[u8; 2]>;

    /// True when routers may split the packet.
    fn may_fragment<P: Packet>(packet: &P) -> bool;

    /// The protocol in the key of a packet's fragments.
    fn fragments_of(protocol: u8) -> u32;

    /// The packet quoted at `at`, if it is TCP or UDP and shows the ports.
    fn quote<P: Packet>(packet: &P, at: usize) -> Option<Quote<Self>>;

    /// The sum over a header without options and 8 bytes more, at `at`.
    fn quoted_sum<P: Packet>(packet: &P, at: usize) -> Option<Sum>;
}

impl Network for [u8; 4] {
    const HEADER: usize = Ipv4Hdr::LEN;
    const ICMP: u8 = 1;
    const TOO_BIG: (u8, u8) = (3, 4);
    const TIME_EXCEEDED: (u8, u8) = (11, 0);

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        // Unreachable, time exceeded, parameter problem (RFC 792). Source quench
        // and redirect are for hosts.
        matches!(kind, 3 | 11 | 12)
    }

    #[inline(always)]
    fn parse<P: Packet>(packet: &P) -> Result<Ip<Self>, Reason> {
        parse::ipv4(packet)
    }

    #[inline(always)]
    fn readdress<P: Packet>(
        packet: &mut P,
        at: usize,
        side: Side,
        new: Self,
        hop: bool,
    ) -> Option<Delta> {
        let ip = packet.header_mut::<Ipv4Hdr>(at)?;
        let old = match side {
            Side::Source => core::mem::replace(&mut ip.src_addr, new),
            Side::Destination => core::mem::replace(&mut ip.dst_addr, new),
        };
        let address = Delta::new().word32(old, new);
        let mut header = address;
        if hop {
            let ttl = ip.ttl;
            ip.ttl = ttl.wrapping_sub(1);
            header = header.word([ttl, ip.proto], [ip.ttl, ip.proto]);
        }
        ip.check = header.apply(ip.check);
        Some(address)
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &mut P,
        from: Self,
        to: Self,
        protocol: u8,
        payload: u8,
    ) -> Option<Sum> {
        let ip = packet.header_mut::<Ipv4Hdr>(ETHERNET)?;
        let length = Ipv4Hdr::LEN as u8 + payload;
        ip.vihl = 0x45;
        ip.tos = 0;
        ip.tot_len = [0, length];
        ip.id = [0, 0];
        ip.frags = [0x40, 0]; // don't fragment
        ip.ttl = HOPS;
        ip.proto = protocol;
        ip.src_addr = from;
        ip.dst_addr = to;
        ip.check = Sum::new()
            .word32([0x45, 0, 0, length])
            .word32([0, 0, 0x40, 0])
            .word([HOPS, protocol])
            .word32(from)
            .word32(to)
            .finish();
        Some(pseudo(protocol, payload).word32(from).word32(to))
    }

    #[inline(always)]
    fn header_check<P: Packet>(packet: &P, at: usize) -> Option<[u8; 2]> {
        Some(packet.header::<Ipv4Hdr>(at)?.check)
    }

    #[inline(always)]
    fn may_fragment<P: Packet>(packet: &P) -> bool {
        // Bit 1 of the flags: don't fragment.
        packet
            .header::<Ipv4Hdr>(ETHERNET)
            .is_some_and(|ip| ip.frags[0] & 0x40 == 0)
    }

    #[inline(always)]
    fn fragments_of(protocol: u8) -> u32 {
        u32::from(protocol)
    }

    #[inline(always)]
    fn quote<P: Packet>(packet: &P, at: usize) -> Option<Quote<Self>> {
        let ip = packet.header::<Ipv4Hdr>(at)?;
        let header = usize::from(ip.vihl & 0xf) * 4;
        let first = u16::from_be_bytes(ip.frags) << 3 == 0; // no offset, whatever the flags
        let known = ip.proto == TCP || ip.proto == UDP;
        if ip.vihl >> 4 != 4 || header < Ipv4Hdr::LEN || !first || !known {
            return None;
        }
        let (source, destination, protocol) = (ip.src_addr, ip.dst_addr, ip.proto);
        quoted(packet, source, destination, protocol, at + header)
    }

    #[inline(always)]
    fn quoted_sum<P: Packet>(packet: &P, at: usize) -> Option<Sum> {
        let words = packet.header::<[[u8; 4]; 7]>(at)?;
        Some(words.iter().fold(Sum::new(), |sum, word| sum.word32(*word)))
    }
}

impl Network for [u8; 16] {
    const HEADER: usize = Ipv6Hdr::LEN;
    const ICMP: u8 = 58;
    const TOO_BIG: (u8, u8) = (2, 0);
    const TIME_EXCEEDED: (u8, u8) = (3, 0);

    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        kind < 128 // RFC 4443, section 2.1
    }

    #[inline(always)]
    fn parse<P: Packet>(packet: &P) -> Result<Ip<Self>, Reason> {
        parse::ipv6(packet)
    }

    #[inline(always)]
    fn readdress<P: Packet>(
        packet: &mut P,
        at: usize,
        side: Side,
        new: Self,
        hop: bool,
    ) -> Option<Delta> {
        let ip = packet.header_mut::<Ipv6Hdr>(at)?;
        let old = match side {
            Side::Source => core::mem::replace(&mut ip.src_addr, new),
            Side::Destination => core::mem::replace(&mut ip.dst_addr, new),
        };
        if hop {
            ip.hop_limit = ip.hop_limit.wrapping_sub(1);
        }
        Some(Delta::new().word128(old, new))
    }

    #[inline(always)]
    fn write_header<P: Packet>(
        packet: &mut P,
        from: Self,
        to: Self,
        protocol: u8,
        payload: u8,
    ) -> Option<Sum> {
        let ip = packet.header_mut::<Ipv6Hdr>(ETHERNET)?;
        ip.vcf = [0x60, 0, 0, 0];
        ip.payload_len = [0, payload];
        ip.next_hdr = protocol;
        ip.hop_limit = HOPS;
        ip.src_addr = from;
        ip.dst_addr = to;
        Some(pseudo(protocol, payload).word128(from).word128(to))
    }

    #[inline(always)]
    fn header_check<P: Packet>(_packet: &P, _at: usize) -> Option<[u8; 2]> {
        Some([0, 0])
    }

    #[inline(always)]
    fn may_fragment<P: Packet>(_packet: &P) -> bool {
        false
    }

    #[inline(always)]
    fn fragments_of(_protocol: u8) -> u32 {
        0
    }

    #[inline(always)]
    fn quote<P: Packet>(packet: &P, at: usize) -> Option<Quote<Self>> {
        let ip = packet.header::<Ipv6Hdr>(at)?;
        let (mut protocol, mut transport) = (ip.next_hdr, at + Ipv6Hdr::LEN);
        if protocol == parse::next_header::FRAGMENT {
            let [next, _, high, low] = *packet.header::<[u8; 4]>(transport)?;
            if u16::from_be_bytes([high, low]) >> 3 != 0 {
                return None; // not the first one
            }
            protocol = next;
            transport += 8;
        }
        if ip.vcf[0] >> 4 != 6 || protocol != TCP && protocol != UDP {
            return None;
        }
        let (source, destination) = (ip.src_addr, ip.dst_addr);
        quoted(packet, source, destination, protocol, transport)
    }

    #[inline(always)]
    fn quoted_sum<P: Packet>(packet: &P, at: usize) -> Option<Sum> {
        let words = packet.header::<[[u8; 4]; 12]>(at)?;
        Some(words.iter().fold(Sum::new(), |sum, word| sum.word32(*word)))
    }
}

/// What a quote says, its TCP or UDP header being at `transport`.
#[inline(always)]
fn quoted<P: Packet, A>(
    packet: &P,
    source: A,
    destination: A,
    protocol: u8,
    transport: usize,
) -> Option<Quote<A>> {
    let [a, b, c, d] = *packet.header::<[u8; 4]>(transport)?;
    Some(Quote {
        source,
        source_port: [a, b],
        destination,
        destination_port: [c, d],
        protocol,
        transport,
    })
}

/// Protocol and length of a pseudo header (RFC 9293, section 3.1; RFC 8200,
/// section 8.1 has the same words, further apart).
#[inline(always)]
const fn pseudo(protocol: u8, payload: u8) -> Sum {
    Sum::new().word32([0, protocol, 0, payload])
}

/// Replaces a port of the TCP or UDP header at `offset` and updates its
/// checksum, `delta` being what changed in the IP header. Returns what changed in
/// the transport header.
#[inline(always)]
pub fn transport<P: Packet>(
    packet: &mut P,
    offset: usize,
    protocol: u8,
    side: Side,
    port: [u8; 2],
    delta: Delta,
) -> Option<Delta> {
    let (old, before, after);
    if protocol == TCP {
        let tcp = packet.header_mut::<Tcp>(offset)?;
        old = match side {
            Side::Source => core::mem::replace(&mut tcp.source, port),
            Side::Destination => core::mem::replace(&mut tcp.destination, port),
        };
        before = tcp.check;
        after = delta.word(old, port).apply(before);
        tcp.check = after;
    } else {
        let udp = packet.header_mut::<UdpHdr>(offset)?;
        old = match side {
            Side::Source => core::mem::replace(&mut udp.src, port),
            Side::Destination => core::mem::replace(&mut udp.dst, port),
        };
        before = udp.check;
        after = delta.word(old, port).apply_udp(before);
        udp.check = after;
    }
    Some(Delta::new().word(old, port).word(before, after))
}

/// Replaces address and port of one end of a packet and, with `hop`, takes one from
/// its TTL or hop limit.
#[inline(always)]
pub fn end<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    side: Side,
    (address, port): (A, [u8; 2]),
    hop: bool,
) -> Option<()> {
    let delta = A::readdress(packet, ETHERNET, side, address, hop)?;
    let (at, protocol) = (segment.offset(), segment.protocol);
    transport(packet, at, protocol, side, port, delta)?;
    Some(())
}

/// Replaces a port of the TCP or UDP header at `offset` that ends before its
/// checksum. Returns what changed.
#[inline(always)]
pub fn port<P: Packet>(packet: &mut P, offset: usize, side: Side, port: [u8; 2]) -> Option<Delta> {
    let ports = packet.header_mut::<[u8; 4]>(offset)?;
    let at = match side {
        Side::Source => 0,
        Side::Destination => 2,
    };
    let old = [ports[at], ports[at + 1]];
    [ports[at], ports[at + 1]] = port;
    Some(Delta::new().word(old, port))
}

/// Addresses the frame to the next hop, from the interface's own address.
#[inline(always)]
pub fn ethernet<P: Packet>(packet: &mut P, hop: NextHop, source: [u8; 6]) -> Option<()> {
    let ethernet = packet.header_mut::<Ethernet>(0)?;
    ethernet.destination = hop.mac();
    ethernet.source = source;
    Some(())
}

/// A TCP reset to be made out of the packet at hand.
#[derive(Clone, Copy, Debug)]
pub struct Reset<A> {
    /// Who it says it is from.
    pub from: (A, [u8; 2]),
    /// Who it is for.
    pub to: (A, [u8; 2]),
    /// Sequence number, network byte order.
    pub sequence: [u8; 4],
    /// Acknowledgement number, network byte order, if the ACK flag is to be set.
    pub acknowledgement: Option<[u8; 4]>,
}

/// Turns the frame into a TCP reset without payload or options (RFC 9293,
/// section 3.10.7.1); the Ethernet header is left to the caller.
#[inline(always)]
pub fn reset<P: Packet, A: Network>(packet: &mut P, reset: &Reset<A>) -> Option<()> {
    const LENGTH: u8 = size_of::<Tcp>() as u8;
    if !packet.truncate(ETHERNET + A::HEADER + LENGTH as usize) {
        return None;
    }
    let pseudo = A::write_header(packet, reset.from.0, reset.to.0, TCP, LENGTH)?;
    let (acknowledgement, flags) = match reset.acknowledgement {
        Some(number) => (number, tcp_flag::RST | tcp_flag::ACK),
        None => ([0; 4], tcp_flag::RST),
    };
    let offset = (LENGTH / 4) << 4;
    let tcp = packet.header_mut::<Tcp>(ETHERNET + A::HEADER)?;
    tcp.source = reset.from.1;
    tcp.destination = reset.to.1;
    tcp.sequence = reset.sequence;
    tcp.acknowledgement = acknowledgement;
    tcp.offset = offset;
    tcp.flags = flags;
    tcp.window = [0, 0];
    tcp.urgent = [0, 0];
    tcp.check = pseudo
        .word(reset.from.1)
        .word(reset.to.1)
        .word32(reset.sequence)
        .word32(acknowledgement)
        .word([offset, flags])
        .finish();
    Some(())
}
