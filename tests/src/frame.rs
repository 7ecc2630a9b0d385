//! Frames for tests, written and checksummed by a library that shares no code
//! with the packet path.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    IpNumber, Ipv4Extensions, Ipv4Header, Ipv4Options, Ipv6Extensions, Ipv6FlowLabel, Ipv6Header,
    PacketBuilder, TransportHeader,
};

/// MAC addresses of the frame, destination first.
#[derive(Clone, Copy, Debug)]
pub struct Macs {
    /// Destination.
    pub to: [u8; 6],
    /// Source.
    pub from: [u8; 6],
}

/// What a frame carries, in words; [`Frame::bytes`] writes it.
#[derive(Clone, Debug)]
pub struct Frame {
    macs: Macs,
    from: SocketAddr,
    to: SocketAddr,
    hops: u8,
    dont_fragment: bool,
    transport: Transport,
    options: Vec<u8>,
    payload: Vec<u8>,
    padding: usize,
}

#[derive(Clone, Debug)]
enum Transport {
    Tcp {
        flags: String,
        sequence: u32,
        acknowledgement: u32,
        window: u16,
        options: Vec<u8>,
    },
    Udp {
        checksum: bool,
    },
    Icmp {
        kind: u8,
        code: u8,
        rest: u32,
    },
}

impl Frame {
    /// A TCP segment; `flags` out of `S A F R P`, as tcpdump writes them.
    pub fn tcp(macs: Macs, from: SocketAddr, to: SocketAddr, flags: &str) -> Self {
        let transport = Transport::Tcp {
            flags: flags.to_owned(),
            sequence: 1000,
            acknowledgement: if flags.contains('A') { 5000 } else { 0 },
            window: 64_240,
            options: Vec::new(),
        };
        Self::new(macs, from, to, transport)
    }

    /// A UDP datagram with a checksum.
    pub fn udp(macs: Macs, from: SocketAddr, to: SocketAddr) -> Self {
        Self::new(macs, from, to, Transport::Udp { checksum: true })
    }

    /// An ICMP or ICMPv6 error with its type, code and second word, about `quote`,
    /// an IP packet or the beginning of one.
    pub fn icmp(
        macs: Macs,
        from: IpAddr,
        to: IpAddr,
        (kind, code, rest): (u8, u8, u32),
        quote: &[u8],
    ) -> Self {
        let transport = Transport::Icmp { kind, code, rest };
        let (from, to) = (SocketAddr::new(from, 0), SocketAddr::new(to, 0));
        Self::new(macs, from, to, transport).payload(quote)
    }

    fn new(macs: Macs, from: SocketAddr, to: SocketAddr, transport: Transport) -> Self {
        Self {
            macs,
            from,
            to,
            hops: 64,
            dont_fragment: true,
            transport,
            options: Vec::new(),
            payload: Vec::new(),
            padding: 0,
        }
    }

    /// Sequence and acknowledgement numbers (TCP).
    #[must_use]
    pub fn numbers(mut self, sequence: u32, acknowledgement: u32) -> Self {
        if let Transport::Tcp {
            sequence: s,
            acknowledgement: a,
            ..
        } = &mut self.transport
        {
            (*s, *a) = (sequence, acknowledgement);
        }
        self
    }

    /// The TCP window.
    #[must_use]
    pub fn window(mut self, size: u16) -> Self {
        if let Transport::Tcp { window, .. } = &mut self.transport {
            *window = size;
        }
        self
    }

    /// TCP options, padded by the library to whole words.
    #[must_use]
    pub fn tcp_options(mut self, bytes: &[u8]) -> Self {
        if let Transport::Tcp { options, .. } = &mut self.transport {
            *options = bytes.to_vec();
        }
        self
    }

    /// IPv4 options; a multiple of four bytes.
    #[must_use]
    pub fn ip_options(mut self, bytes: &[u8]) -> Self {
        self.options = bytes.to_vec();
        self
    }

    /// IPv4 without "don't fragment".
    #[must_use]
    pub const fn may_fragment(mut self) -> Self {
        self.dont_fragment = false;
        self
    }

    /// TTL or hop limit.
    #[must_use]
    pub const fn hops(mut self, hops: u8) -> Self {
        self.hops = hops;
        self
    }

    /// Payload of the segment or datagram.
    #[must_use]
    pub fn payload(mut self, bytes: &[u8]) -> Self {
        self.payload = bytes.to_vec();
        self
    }

    /// UDP without a checksum.
    #[must_use]
    pub fn without_checksum(mut self) -> Self {
        self.transport = Transport::Udp { checksum: false };
        self
    }

    /// Bytes behind the IP packet, as short Ethernet frames have them.
    #[must_use]
    pub const fn padding(mut self, bytes: usize) -> Self {
        self.padding = bytes;
        self
    }

    /// The IP packet, cut to `length` bytes as an ICMP error quotes it.
    pub fn quote(&self, length: usize) -> Vec<u8> {
        let mut packet = self.bytes().split_off(14);
        packet.truncate(length);
        packet
    }

    /// The frame on the wire.
    ///
    /// # Panics
    /// When the parts do not fit together: a mistake in the test.
    pub fn bytes(&self) -> Vec<u8> {
        let builder = PacketBuilder::ethernet2(self.macs.from, self.macs.to);
        let length = u16::try_from(self.payload.len()).expect("payload fits");
        let builder = match (self.from.ip(), self.to.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut ip =
                    Ipv4Header::new(length, self.hops, IpNumber::TCP, from.octets(), to.octets())
                        .expect("an IPv4 header");
                ip.dont_fragment = self.dont_fragment;
                ip.options = Ipv4Options::try_from(self.options.as_slice()).expect("IPv4 options");
                builder.ip(etherparse::IpHeaders::Ipv4(ip, Ipv4Extensions::default()))
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let ip = Ipv6Header {
                    traffic_class: 0,
                    flow_label: Ipv6FlowLabel::ZERO,
                    payload_length: 0,
                    next_header: IpNumber::TCP,
                    hop_limit: self.hops,
                    source: from.octets(),
                    destination: to.octets(),
                };
                builder.ip(etherparse::IpHeaders::Ipv6(ip, Ipv6Extensions::default()))
            }
            _ => panic!("one frame, one address family"),
        };
        let mut bytes = Vec::new();
        match &self.transport {
            Transport::Tcp {
                flags,
                sequence,
                acknowledgement,
                window,
                options,
            } => {
                let mut tcp = builder.tcp(self.from.port(), self.to.port(), *sequence, *window);
                for flag in flags.chars() {
                    tcp = match flag {
                        'S' => tcp.syn(),
                        'A' => tcp.ack(*acknowledgement),
                        'F' => tcp.fin(),
                        'R' => tcp.rst(),
                        'P' => tcp.psh(),
                        other => panic!("no TCP flag {other}"),
                    };
                }
                let tcp = tcp.options_raw(options).expect("TCP options");
                tcp.write(&mut bytes, &self.payload)
                    .expect("writing to memory");
            }
            Transport::Udp { checksum } => {
                let udp = builder.udp(self.from.port(), self.to.port());
                udp.write(&mut bytes, &self.payload)
                    .expect("writing to memory");
                if !checksum {
                    let at = bytes.len() - self.payload.len() - 2;
                    bytes[at..at + 2].fill(0);
                }
            }
            Transport::Icmp { kind, code, rest } => {
                let rest = rest.to_be_bytes();
                let written = if self.from.is_ipv4() {
                    let icmp = builder.icmpv4_raw(*kind, *code, rest);
                    icmp.write(&mut bytes, &self.payload)
                } else {
                    let icmp = builder.icmpv6_raw(*kind, *code, rest);
                    icmp.write(&mut bytes, &self.payload)
                };
                written.expect("writing to memory");
            }
        }
        bytes.resize(bytes.len() + self.padding, 0);
        bytes
    }
}

/// A frame with VLAN tags, outer one first.
pub fn tagged(frame: &[u8], tags: &[[u8; 4]]) -> Vec<u8> {
    let (macs, rest) = frame.split_at(12);
    [macs, &tags.concat(), rest].concat()
}

/// A frame's IP packet in fragments, `size` bytes of what the IP header carries in
/// each but the last; a multiple of 8.
///
/// # Panics
/// When the frame is no IP packet: a mistake in the test.
pub fn fragments(frame: &[u8], size: usize) -> Vec<Vec<u8>> {
    /// What fragments of one packet have in common.
    const IDENTIFICATION: u16 = 0xb1e5;
    let v4 = frame[12..14] == [8, 0];
    let (headers, payload) = frame.split_at(if v4 { 34 } else { 54 });
    let pieces: Vec<&[u8]> = payload.chunks(size).collect();
    let mut at = 0;
    let mut fragments = Vec::new();
    for (index, piece) in pieces.iter().enumerate() {
        let more = index + 1 < pieces.len();
        let mut fragment = headers.to_vec();
        if v4 {
            let mut ip = Ipv4Header::from_slice(&headers[14..]).expect("IPv4").0;
            ip.identification = IDENTIFICATION;
            ip.more_fragments = more;
            ip.fragment_offset = etherparse::IpFragOffset::try_new(at / 8).expect("an offset");
            ip.set_payload_len(piece.len()).expect("a length");
            ip.header_checksum = ip.calc_header_checksum();
            fragment[14..].copy_from_slice(&ip.to_bytes());
        } else {
            let length = piece.len() as u16 + 8;
            fragment[18..20].copy_from_slice(&length.to_be_bytes());
            let [high, low] = (at | u16::from(more)).to_be_bytes();
            let next = std::mem::replace(&mut fragment[20], 44);
            fragment.extend([next, 0, high, low, 0, 0]);
            fragment.extend(IDENTIFICATION.to_be_bytes());
        }
        fragment.extend(*piece);
        fragments.push(fragment);
        at += piece.len() as u16;
    }
    fragments
}

/// What is wrong with the checksums of a frame, as the library computes them;
/// `None` when all are right or there are none.
pub fn wrong_checksum(frame: &[u8]) -> Option<String> {
    let parsed = etherparse::PacketHeaders::from_ethernet_slice(frame).ok()?;
    let net = parsed.net?;
    let (etherparse::PayloadSlice::Udp(payload)
    | etherparse::PayloadSlice::Tcp(payload)
    | etherparse::PayloadSlice::Icmpv4(payload)
    | etherparse::PayloadSlice::Icmpv6(payload)) = parsed.payload
    else {
        return None;
    };
    let (is, should) = match (&net, parsed.transport?) {
        (_, TransportHeader::Icmpv4(icmp)) => {
            (icmp.checksum, icmp.icmp_type.calc_checksum(payload))
        }
        (etherparse::NetHeaders::Ipv6(ip, _), TransportHeader::Icmpv6(icmp)) => {
            let sum = icmp
                .icmp_type
                .calc_checksum(ip.source, ip.destination, payload);
            (icmp.checksum, sum.ok()?)
        }
        (etherparse::NetHeaders::Ipv4(ip, _), TransportHeader::Tcp(tcp)) => {
            if ip.header_checksum != ip.calc_header_checksum() {
                return Some("IPv4 header".to_owned());
            }
            (tcp.checksum, tcp.calc_checksum_ipv4(ip, payload).ok()?)
        }
        (etherparse::NetHeaders::Ipv4(ip, _), TransportHeader::Udp(udp)) => {
            if ip.header_checksum != ip.calc_header_checksum() {
                return Some("IPv4 header".to_owned());
            }
            if udp.checksum == 0 {
                return None;
            }
            (udp.checksum, udp.calc_checksum_ipv4(ip, payload).ok()?)
        }
        (etherparse::NetHeaders::Ipv6(ip, _), TransportHeader::Tcp(tcp)) => {
            (tcp.checksum, tcp.calc_checksum_ipv6(ip, payload).ok()?)
        }
        (etherparse::NetHeaders::Ipv6(ip, _), TransportHeader::Udp(udp)) => {
            (udp.checksum, udp.calc_checksum_ipv6(ip, payload).ok()?)
        }
        _ => return None,
    };
    (is != should).then(|| format!("transport: is {is:#06x}, should be {should:#06x}"))
}
