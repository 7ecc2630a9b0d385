//! Edits of a frame, layer by layer, each beside its checksum update.
//!
//! `None` means that the frame ends before the header to be edited; callers
//! have parsed it before, so that does not happen.

use bg_common::{key::TCP, service::NextHop};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use crate::{
    checksum::{Delta, Sum},
    packet::{ETHERNET, Ethernet, Packet, Tcp, tcp_flag},
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

/// TTL or hop limit of packets that are made here (RFC 1700's default).
const HOPS: u8 = 64;

/// The IP header of one family.
pub trait Network: Address {
    /// Length of the header without options, bytes.
    const HEADER: usize;

    /// Replaces an address and, with `hop`, takes one from the TTL or hop
    /// limit. Returns what changed for the transport checksum.
    fn readdress<P: Packet>(packet: &mut P, side: Side, new: Self, hop: bool) -> Option<Delta>;

    /// Writes a whole header, without options, for `payload` bytes of TCP.
    /// Returns the sum over the pseudo header.
    fn write_header<P: Packet>(packet: &mut P, from: Self, to: Self, payload: u8) -> Option<Sum>;
}

impl Network for [u8; 4] {
    const HEADER: usize = Ipv4Hdr::LEN;

    #[inline(always)]
    fn readdress<P: Packet>(packet: &mut P, side: Side, new: Self, hop: bool) -> Option<Delta> {
        let ip = packet.header_mut::<Ipv4Hdr>(ETHERNET)?;
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
    fn write_header<P: Packet>(packet: &mut P, from: Self, to: Self, payload: u8) -> Option<Sum> {
        let ip = packet.header_mut::<Ipv4Hdr>(ETHERNET)?;
        let length = Ipv4Hdr::LEN as u8 + payload;
        ip.vihl = 0x45;
        ip.tos = 0;
        ip.tot_len = [0, length];
        ip.id = [0, 0];
        ip.frags = [0x40, 0]; // don't fragment
        ip.ttl = HOPS;
        ip.proto = TCP;
        ip.src_addr = from;
        ip.dst_addr = to;
        ip.check = Sum::new()
            .word32([0x45, 0, 0, length])
            .word32([0, 0, 0x40, 0])
            .word([HOPS, TCP])
            .word32(from)
            .word32(to)
            .finish();
        Some(pseudo(payload).word32(from).word32(to))
    }
}

impl Network for [u8; 16] {
    const HEADER: usize = Ipv6Hdr::LEN;

    #[inline(always)]
    fn readdress<P: Packet>(packet: &mut P, side: Side, new: Self, hop: bool) -> Option<Delta> {
        let ip = packet.header_mut::<Ipv6Hdr>(ETHERNET)?;
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
    fn write_header<P: Packet>(packet: &mut P, from: Self, to: Self, payload: u8) -> Option<Sum> {
        let ip = packet.header_mut::<Ipv6Hdr>(ETHERNET)?;
        ip.vcf = [0x60, 0, 0, 0];
        ip.payload_len = [0, payload];
        ip.next_hdr = TCP;
        ip.hop_limit = HOPS;
        ip.src_addr = from;
        ip.dst_addr = to;
        Some(pseudo(payload).word128(from).word128(to))
    }
}

/// Protocol and length of a pseudo header for `payload` bytes of TCP (RFC 9293,
/// section 3.1; RFC 8200, section 8.1 has the same words, further apart).
#[inline(always)]
const fn pseudo(payload: u8) -> Sum {
    Sum::new().word32([0, TCP, 0, payload])
}

/// Replaces a port of the TCP or UDP header at `offset` and updates its
/// checksum, `delta` being what changed in the IP header.
#[inline(always)]
pub fn transport<P: Packet>(
    packet: &mut P,
    offset: usize,
    protocol: u8,
    side: Side,
    port: [u8; 2],
    delta: Delta,
) -> Option<()> {
    if protocol == TCP {
        let tcp = packet.header_mut::<Tcp>(offset)?;
        let old = match side {
            Side::Source => core::mem::replace(&mut tcp.source, port),
            Side::Destination => core::mem::replace(&mut tcp.destination, port),
        };
        tcp.check = delta.word(old, port).apply(tcp.check);
    } else {
        let udp = packet.header_mut::<UdpHdr>(offset)?;
        let old = match side {
            Side::Source => core::mem::replace(&mut udp.src, port),
            Side::Destination => core::mem::replace(&mut udp.dst, port),
        };
        udp.check = delta.word(old, port).apply_udp(udp.check);
    }
    Some(())
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
    let pseudo = A::write_header(packet, reset.from.0, reset.to.0, LENGTH)?;
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
