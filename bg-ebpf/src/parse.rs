//! From a frame to what decisions need of it.

use bg_common::{
    key::{TCP, UDP},
    reason::Reason,
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use crate::{
    packet::{ETHERNET, Packet, Tcp, tcp_flag},
    rewrite::Network,
};

/// What the headers say, in the units of the wire.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Segment<A> {
    /// Where it comes from.
    pub source: A,
    /// Where it goes.
    pub destination: A,
    /// Network byte order; zero for ICMP.
    pub source_port: [u8; 2],
    /// Network byte order; zero for ICMP.
    pub destination_port: [u8; 2],
    /// TCP, UDP, or an error of ICMP.
    pub protocol: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// Length of the packet from its IP header, bytes.
    pub length: u32,
    /// Zero for UDP and ICMP.
    pub tcp: TcpFields,
    /// `part::*`.
    pub part: u32,
    /// What fragments of one packet have in common; zero for whole packets.
    pub identification: u32,
    /// See [`Segment::offset`].
    offset: u32,
}

/// Values of [`Segment::part`].
pub mod part {
    /// A whole packet.
    pub const WHOLE: u32 = 0;
    /// The first fragment, with the whole TCP or UDP header.
    pub const FIRST: u32 = 1;
    /// A later fragment, without ports.
    pub const LATER: u32 = 2;
}

/// A later fragment begins behind a TCP header without options; one that begins
/// before would write over flags or ports (RFC 1858; RFC 3128). No link has an MTU
/// that small (RFC 791: 68 bytes).
const FIRST_END: u32 = 24;

/// What a fragment at byte `at` with `payload` bytes is, if `more` come.
#[inline(always)]
const fn part_of(at: u32, more: bool, payload: u32) -> Result<u32, Reason> {
    match (at, more) {
        (0, false) => Ok(part::WHOLE),
        (0, true) => Ok(part::FIRST),
        _ if at < FIRST_END || at + payload > 65_535 => Err(Reason::Fragment),
        _ => Ok(part::LATER),
    }
}

/// The parts of the TCP header that decisions need.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct TcpFields {
    /// Host byte order.
    pub sequence: u32,
    /// Host byte order.
    pub acknowledgement: u32,
    /// Sequence numbers the segment takes up: payload, SYN and FIN.
    pub taken: u32,
    /// `tcp_flag::*` bits.
    pub flags: u32,
}

/// Headers end before this offset: a mask, so that the kernel's verifier knows it
/// of a number that was read back from memory. An IPv6 header and
/// [`EXTENSIONS`] headers behind it take 8 246 bytes at most.
const OFFSETS: u32 = 0x3fff;

impl<A> Segment<A> {
    /// Offset of the TCP, UDP or ICMP header in the frame.
    #[inline(always)]
    pub const fn offset(&self) -> usize {
        (self.offset & OFFSETS) as usize
    }

    /// True when one of the flags is set.
    #[inline(always)]
    pub const fn has(&self, flags: u8) -> bool {
        self.tcp.flags & flags as u32 != 0
    }

    /// True for the first segment of a TCP connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.has(tcp_flag::SYN) && !self.has(tcp_flag::ACK | tcp_flag::RST)
    }
}

/// An IP header: what both families have in common.
#[derive(Clone, Copy)]
pub struct Ip<A> {
    /// Where it comes from.
    pub source: A,
    /// Where it goes.
    pub destination: A,
    /// What it carries.
    pub protocol: u8,
    /// TTL or hop limit.
    pub hops: u8,
    /// Length of the packet from its IP header, bytes; inside the frame.
    pub length: u32,
    /// Length of the header, bytes.
    pub header: usize,
    /// See [`Segment::part`].
    pub part: u32,
    /// See [`Segment::identification`].
    pub identification: u32,
}

/// Parses IP and TCP, UDP or an ICMP error; otherwise the reason why the packet
/// is left to the stack.
#[inline(always)]
pub fn segment<P: Packet, A: Network>(packet: &P) -> Result<Segment<A>, Reason> {
    let ip = A::parse(packet)?;
    let offset = ETHERNET + ip.header;
    let payload = ip.length - ip.header as u32;
    // A first fragment without its whole header is nobody's, and no fault.
    let whole = ip.part == part::WHOLE;
    let (short, bad) = if whole {
        (Reason::Truncated, Reason::BadHeader)
    } else {
        (Reason::Fragment, Reason::Fragment)
    };
    let (source_port, destination_port, tcp) = match ip.protocol {
        _ if ip.part == part::LATER => ([0; 2], [0; 2], TcpFields::default()),
        TCP => {
            if payload < size_of::<Tcp>() as u32 {
                return Err(short);
            }
            let tcp = packet.header::<Tcp>(offset).ok_or(Reason::Truncated)?;
            let own = u32::from(tcp.offset >> 4) * 4;
            if own < size_of::<Tcp>() as u32 || own > payload {
                return Err(bad);
            }
            let syn = u32::from(tcp.flags & tcp_flag::SYN != 0);
            let fin = u32::from(tcp.flags & tcp_flag::FIN != 0);
            let fields = TcpFields {
                flags: u32::from(tcp.flags),
                sequence: u32::from_be_bytes(tcp.sequence),
                acknowledgement: u32::from_be_bytes(tcp.acknowledgement),
                taken: payload - own + syn + fin,
            };
            (tcp.source, tcp.destination, fields)
        }
        UDP => {
            if payload < UdpHdr::LEN as u32 {
                return Err(short);
            }
            let udp = packet.header::<UdpHdr>(offset).ok_or(Reason::Truncated)?;
            let own = u32::from(u16::from_be_bytes(udp.len));
            if own < UdpHdr::LEN as u32 || whole && own > payload {
                return Err(Reason::BadHeader);
            }
            (udp.src, udp.dst, TcpFields::default())
        }
        other if other == A::ICMP => {
            let [kind, ..] = packet.header::<[u8; 4]>(offset).ok_or(Reason::Truncated)?;
            if !A::is_error(*kind) {
                return Err(Reason::NotOurs);
            }
            if !whole {
                return Err(Reason::Fragment);
            }
            ([0; 2], [0; 2], TcpFields::default())
        }
        _ => return Err(Reason::NotOurs),
    };
    Ok(Segment {
        source: ip.source,
        destination: ip.destination,
        source_port,
        destination_port,
        protocol: ip.protocol,
        hops: ip.hops,
        length: ip.length,
        tcp,
        part: ip.part,
        identification: ip.identification,
        offset: offset as u32,
    })
}

/// Parses an IPv4 header.
#[inline(always)]
pub(crate) fn ipv4<P: Packet>(packet: &P) -> Result<Ip<[u8; 4]>, Reason> {
    let ip = packet
        .header::<Ipv4Hdr>(ETHERNET)
        .ok_or(Reason::Truncated)?;
    let header = usize::from(ip.vihl & 0xf) * 4;
    let length = u32::from(u16::from_be_bytes(ip.tot_len));
    if ip.vihl >> 4 != 4 || header < Ipv4Hdr::LEN || length < header as u32 {
        return Err(Reason::BadHeader);
    }
    if !packet.holds(ETHERNET + length as usize) {
        return Err(Reason::Truncated);
    }
    // Flags in the high three bits, more-fragments the lowest of them; then an
    // offset in 8 bytes.
    let fragment = u32::from(u16::from_be_bytes(ip.frags));
    let at = (fragment & 0x1fff) * 8;
    let part = part_of(at, fragment & 0x2000 != 0, length - header as u32)?;
    if part == part::LATER && ip.proto != TCP && ip.proto != UDP {
        return Err(Reason::Fragment);
    }
    Ok(Ip {
        source: ip.src_addr,
        destination: ip.dst_addr,
        protocol: ip.proto,
        hops: ip.ttl,
        length,
        header,
        part,
        identification: u32::from(u16::from_be_bytes(ip.id)),
    })
}

pub(crate) mod next_header {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const DESTINATION: u8 = 60;
    pub const MOBILITY: u8 = 135;
}

/// Extension headers that are walked over, at most.
const EXTENSIONS: usize = 4;

/// Parses an IPv6 header and the extension headers behind it (RFC 8200, section
/// 4). They are kept as they are.
#[inline(always)]
pub(crate) fn ipv6<P: Packet>(packet: &P) -> Result<Ip<[u8; 16]>, Reason> {
    let ip = packet
        .header::<Ipv6Hdr>(ETHERNET)
        .ok_or(Reason::Truncated)?;
    if ip.vcf[0] >> 4 != 6 {
        return Err(Reason::BadHeader);
    }
    let length = u32::from(u16::from_be_bytes(ip.payload_len)) + Ipv6Hdr::LEN as u32;
    if !packet.holds(ETHERNET + length as usize) {
        return Err(Reason::Truncated);
    }
    let mut protocol = ip.next_hdr;
    let mut header = Ipv6Hdr::LEN;
    // Offset and flags of a fragment header, and the packet's identification.
    let mut fragment = None;
    for _ in 0..EXTENSIONS {
        match protocol {
            next_header::HOP_BY_HOP | next_header::ROUTING | next_header::DESTINATION => {}
            next_header::FRAGMENT if fragment.is_none() => {}
            _ => break,
        }
        // Next header, the length in 8 bytes beyond the first 8, and in a routing
        // header its kind and how many hops are left.
        let [next, more, high, left] = *packet
            .header::<[u8; 4]>(ETHERNET + header)
            .ok_or(Reason::Truncated)?;
        if protocol == next_header::ROUTING && left != 0 {
            // Checksums are about another destination than the one in the header.
            return Err(Reason::ExtensionHeader);
        }
        if protocol == next_header::FRAGMENT {
            let identification = packet
                .header::<[u8; 4]>(ETHERNET + header + 4)
                .ok_or(Reason::Truncated)?;
            let word = u32::from(u16::from_be_bytes([high, left]));
            fragment = Some((word, u32::from_be_bytes(*identification)));
            protocol = next;
            header += 8;
            if word >> 3 != 0 {
                break; // what comes next is no header
            }
            continue;
        }
        protocol = next;
        header += (usize::from(more) + 1) * 8;
    }
    if header as u32 > length {
        return Err(Reason::BadHeader);
    }
    let (word, identification) = fragment.unwrap_or((0, 0));
    let part = part_of(word & 0xfff8, word & 1 != 0, length - header as u32)?;
    match protocol {
        _ if part == part::LATER => {}
        next_header::FRAGMENT => return Err(Reason::Fragment),
        next_header::HOP_BY_HOP
        | next_header::ROUTING
        | next_header::AUTHENTICATION
        | next_header::DESTINATION
        | next_header::MOBILITY => return Err(Reason::ExtensionHeader),
        _ => {}
    }
    Ok(Ip {
        source: ip.src_addr,
        destination: ip.dst_addr,
        protocol,
        hops: ip.hop_limit,
        length,
        header,
        part,
        identification,
    })
}
