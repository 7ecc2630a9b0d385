//! The journey of a packet: parse -> look up -> decide -> rewrite -> verdict.
//!
//! Read top to bottom. [`process`] parses Ethernet and IP; [`transport`] parses
//! TCP or UDP and finds out whether the packet is a client's ([`forward`]) or a
//! backend's ([`back`]). Each service's cut-over word is read once, and what it
//! says is passed along: no packet sees a mix.

use bg_common::{
    key::{Endpoint, FlowKey, TCP, UDP},
    maglev::mix,
    reason::Reason,
    service::{
        Colour, CutoverWord, FirstFlow, Flow, Interface, Listener, NextHop, PoolWord, ReturnPath,
        state,
    },
};
use network_types::{
    ip::{Ipv4Hdr, Ipv6Hdr},
    udp::UdpHdr,
};

use crate::{
    packet::{ETHERNET, Ethernet, Icmp, Packet, Tcp, tcp_flag},
    rewrite::{self, Network, Reset, Side},
    tables::{FamilyTables, FlowCell, FlowTable, Tables},
};

/// What becomes of a packet, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Verdict {
    /// What to do with it.
    pub action: Action,
    /// Why: counted once a packet.
    pub reason: Reason,
}

/// What the driver does with a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// To the kernel's stack.
    Pass,
    /// Nowhere.
    Drop,
    /// Out of the interface it came in by.
    Transmit,
    /// Out of the interface in this slot.
    Redirect(u32),
}

const fn pass(reason: Reason) -> Verdict {
    Verdict {
        action: Action::Pass,
        reason,
    }
}

const fn drop(reason: Reason) -> Verdict {
    Verdict {
        action: Action::Drop,
        reason,
    }
}

mod ether_type {
    pub const IPV4: [u8; 2] = [0x08, 0x00];
    pub const IPV6: [u8; 2] = [0x86, 0xdd];
    pub const VLAN: [u8; 2] = [0x81, 0x00];
    pub const QINQ: [u8; 2] = [0x88, 0xa8];
}

mod next_header {
    pub const HOP_BY_HOP: u8 = 0;
    pub const ICMP: u8 = 1;
    pub const ROUTING: u8 = 43;
    pub const FRAGMENT: u8 = 44;
    pub const AUTHENTICATION: u8 = 51;
    pub const ICMPV6: u8 = 58;
    pub const DESTINATION: u8 = 60;
    pub const MOBILITY: u8 = 135;
}

/// A flow whose next hop was looked up longer ago than this is looked up
/// again: 15 ticks, one second.
const ROUTE_TICKS: u32 = 15;
/// Traffic this long after a RST shows that nobody took the RST: one second.
const REVIVE_TICKS: u32 = 15;
/// A RST counts when its sequence number lies this far ahead of the last
/// acknowledgement of the other side: the largest window without scaling.
const RESET_WINDOW: u32 = 65_535;

/// Decides what becomes of a packet, rewrites it, and counts the reason.
#[inline(always)]
pub fn process<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Verdict {
    let verdict = network(packet, tables);
    tables.count(verdict.reason);
    verdict
}

/// What the headers say, in the units of the wire.
#[derive(Clone, Copy)]
struct Segment<A> {
    source: A,
    destination: A,
    source_port: [u8; 2],
    destination_port: [u8; 2],
    protocol: u8,
    /// Offset of the TCP or UDP header in the frame.
    offset: usize,
    /// Length of the packet from its IP header, bytes.
    length: u32,
    /// TTL or hop limit.
    hops: u8,
    /// The frame's sender.
    mac: [u8; 6],
    tcp: TcpFields,
}

/// The parts of the TCP header that decisions need; zero for UDP.
#[derive(Clone, Copy)]
struct TcpFields {
    flags: u8,
    sequence: u32,
    acknowledgement: u32,
    /// Sequence numbers the segment takes up: payload, SYN and FIN.
    taken: u32,
}

impl<A> Segment<A> {
    #[inline(always)]
    const fn has(&self, flag: u8) -> bool {
        self.tcp.flags & flag != 0
    }
}

#[inline(always)]
fn network<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Verdict {
    let Some(ethernet) = packet.header::<Ethernet>(0) else {
        return pass(Reason::Truncated);
    };
    if ethernet.destination[0] & 1 != 0 {
        return pass(Reason::NotOurs); // broadcast or multicast
    }
    let mac = ethernet.source;
    match ethernet.ether_type {
        ether_type::IPV4 => ipv4(packet, tables, mac),
        ether_type::IPV6 => ipv6(packet, tables, mac),
        ether_type::VLAN | ether_type::QINQ => pass(Reason::Vlan),
        _ => pass(Reason::NotIp),
    }
}

#[inline(always)]
fn ipv4<P: Packet, T: Tables>(packet: &mut P, tables: &T, mac: [u8; 6]) -> Verdict {
    let Some(ip) = packet.header::<Ipv4Hdr>(ETHERNET) else {
        return pass(Reason::Truncated);
    };
    let header = usize::from(ip.vihl & 0xf) * 4;
    let length = u32::from(u16::from_be_bytes(ip.tot_len));
    if ip.vihl >> 4 != 4 || header < Ipv4Hdr::LEN || length < header as u32 {
        return pass(Reason::BadHeader);
    }
    if ETHERNET + length as usize > packet.length() {
        return pass(Reason::Truncated);
    }
    let (source, destination) = (ip.src_addr, ip.dst_addr);
    let (protocol, hops) = (ip.proto, ip.ttl);
    // More-fragments flag or an offset.
    if ip.frags[0] & 0x3f != 0 || ip.frags[1] != 0 {
        return pass(Reason::Fragment);
    }
    if protocol == next_header::ICMP {
        return icmp(packet, ETHERNET + header, |kind| {
            matches!(kind, 3 | 4 | 5 | 11 | 12)
        });
    }
    let offset = ETHERNET + header;
    transport(
        packet,
        tables,
        tables.v4(),
        source,
        destination,
        protocol,
        offset,
        length,
        header,
        hops,
        mac,
    )
}

#[inline(always)]
fn ipv6<P: Packet, T: Tables>(packet: &mut P, tables: &T, mac: [u8; 6]) -> Verdict {
    let Some(ip) = packet.header::<Ipv6Hdr>(ETHERNET) else {
        return pass(Reason::Truncated);
    };
    if ip.vcf[0] >> 4 != 6 {
        return pass(Reason::BadHeader);
    }
    let length = u32::from(u16::from_be_bytes(ip.payload_len)) + Ipv6Hdr::LEN as u32;
    if ETHERNET + length as usize > packet.length() {
        return pass(Reason::Truncated);
    }
    let (source, destination) = (ip.src_addr, ip.dst_addr);
    let (protocol, hops) = (ip.next_hdr, ip.hop_limit);
    let offset = ETHERNET + Ipv6Hdr::LEN;
    match protocol {
        next_header::FRAGMENT => return pass(Reason::Fragment),
        next_header::HOP_BY_HOP
        | next_header::ROUTING
        | next_header::AUTHENTICATION
        | next_header::DESTINATION
        | next_header::MOBILITY => return pass(Reason::ExtensionHeader),
        // RFC 4443, section 2.1: errors have the high bit clear.
        next_header::ICMPV6 => return icmp(packet, offset, |kind| kind < 128),
        _ => {}
    }
    transport(
        packet,
        tables,
        tables.v6(),
        source,
        destination,
        protocol,
        offset,
        length,
        Ipv6Hdr::LEN,
        hops,
        mac,
    )
}

#[inline(always)]
fn icmp<P: Packet>(packet: &P, offset: usize, is_error: impl FnOnce(u8) -> bool) -> Verdict {
    match packet.header::<Icmp>(offset) {
        Some(icmp) if is_error(icmp.kind) => pass(Reason::IcmpError),
        Some(_) => pass(Reason::NotOurs),
        None => pass(Reason::Truncated),
    }
}

/// Parses TCP or UDP, and asks both lookup tables whose packet it is.
#[inline(always)]
#[expect(
    clippy::too_many_arguments,
    reason = "what two IP headers have in common, inlined twice"
)]
fn transport<P: Packet, T: Tables, A: Network, F: FamilyTables<A>>(
    packet: &mut P,
    tables: &T,
    family: &F,
    source: A,
    destination: A,
    protocol: u8,
    offset: usize,
    length: u32,
    header: usize,
    hops: u8,
    mac: [u8; 6],
) -> Verdict {
    let payload = length - header as u32;
    let (source_port, destination_port, tcp) = match protocol {
        TCP => {
            if payload < size_of::<Tcp>() as u32 {
                return pass(Reason::Truncated);
            }
            let Some(tcp) = packet.header::<Tcp>(offset) else {
                return pass(Reason::Truncated);
            };
            let own = u32::from(tcp.offset >> 4) * 4;
            if own < size_of::<Tcp>() as u32 || own > payload {
                return pass(Reason::BadHeader);
            }
            let syn = u32::from(tcp.flags & tcp_flag::SYN != 0);
            let fin = u32::from(tcp.flags & tcp_flag::FIN != 0);
            let fields = TcpFields {
                flags: tcp.flags,
                sequence: u32::from_be_bytes(tcp.sequence),
                acknowledgement: u32::from_be_bytes(tcp.acknowledgement),
                taken: payload - own + syn + fin,
            };
            (tcp.source, tcp.destination, fields)
        }
        UDP => {
            if payload < UdpHdr::LEN as u32 {
                return pass(Reason::Truncated);
            }
            let Some(udp) = packet.header::<UdpHdr>(offset) else {
                return pass(Reason::Truncated);
            };
            let own = u32::from(u16::from_be_bytes(udp.len));
            if own < UdpHdr::LEN as u32 || own > payload {
                return pass(Reason::BadHeader);
            }
            let fields = TcpFields {
                flags: 0,
                sequence: 0,
                acknowledgement: 0,
                taken: 0,
            };
            (udp.src, udp.dst, fields)
        }
        _ => return pass(Reason::NotOurs),
    };
    let segment = Segment {
        source,
        destination,
        source_port,
        destination_port,
        protocol,
        offset,
        length,
        hops,
        mac,
        tcp,
    };

    if let Some(listener) = family.listener(&Endpoint::new(destination, destination_port, protocol))
    {
        return forward(packet, tables, family, &segment, listener);
    }
    if let Some(path) = family.return_path(&Endpoint::new(source, source_port, protocol)) {
        return back(packet, tables, family, &segment, path);
    }
    pass(Reason::NotOurs)
}

// ---- client -> service ----------------------------------------------------

/// What is decided about a client's packet.
enum Forward {
    /// To this backend.
    To {
        backend: u32,
        colour: Colour,
        reason: Reason,
    },
    /// To nobody: its flow was cut.
    Reset { colour: Colour },
    /// As a new flow, to be remembered in this table with this state.
    New {
        table: FlowTable,
        state: u8,
        reason: Reason,
    },
}

/// A client's packet: to the backend its flow is pinned to, or to the one that
/// the word and the pool choose.
#[inline(always)]
fn forward<P: Packet, T: Tables, A: Network, F: FamilyTables<A>>(
    packet: &mut P,
    tables: &T,
    family: &F,
    segment: &Segment<A>,
    listener: Listener,
) -> Verdict {
    if segment.hops <= 1 {
        return pass(Reason::TtlExpired);
    }
    // No TCP takes such a segment (RFC 9293, section 3.10.7.4), but one in a
    // handshake answers it, which would look like proof.
    if segment.protocol == TCP && !segment.has(tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST) {
        return pass(Reason::BadHeader);
    }
    let Some(word) = tables.word(listener.service) else {
        return drop(Reason::Inconsistent);
    };
    let key = FlowKey::new(segment.source, segment.source_port, listener.id);
    let now = tables.tick();
    let decision = if segment.protocol == UDP {
        forward_udp(family, listener, word, &key, now)
    } else {
        forward_tcp(packet, tables, family, segment, word, &key, now)
    };
    let (backend, colour, reason) = match decision {
        Forward::To {
            backend,
            colour,
            reason,
        } => (backend, colour, reason),
        Forward::Reset { colour } => {
            return reset_sender(
                packet,
                tables,
                segment,
                listener.service,
                colour,
                Reason::ResetClient,
            );
        }
        Forward::New {
            table,
            state,
            reason,
        } => {
            let Some(mut flow) = choose(packet, tables, segment, listener, word, now) else {
                return drop(Reason::NoBackend);
            };
            flow.state = state;
            if !segment.has(tcp_flag::RST) {
                family.remember(table, &key, &flow.into());
            }
            if state & state::ORPHAN == 0 {
                begin(tables, listener.service, flow.colour(), word);
            }
            (flow.backend, flow.colour(), reason)
        }
    };

    let Some(backend) = tables.backend(backend) else {
        return drop(Reason::Inconsistent);
    };
    let out = Out {
        hop: NextHop(backend.next_hop),
        side: Side::Destination,
        address: A::from_wide(&backend.address),
        port: if backend.port == [0, 0] {
            segment.destination_port
        } else {
            backend.port
        },
        reason,
    };
    let verdict = send(packet, tables, segment, &out);
    if matches!(verdict.action, Action::Transmit | Action::Redirect(_)) {
        tables.record(listener.service, colour, |stats| {
            stats.forward_packets += 1;
            stats.forward_bytes += u64::from(segment.length);
        });
    }
    verdict
}

#[inline(always)]
fn forward_udp<A: Network, F: FamilyTables<A>>(
    family: &F,
    listener: Listener,
    word: CutoverWord,
    key: &FlowKey<A>,
    now: u32,
) -> Forward {
    match family.flow(FlowTable::Udp, key) {
        Some(flow)
            if now.wrapping_sub(flow.seen.get()) <= listener.idle
                && !word.resets(flow.colour(), flow.generation.get()) =>
        {
            touch(flow, now);
            Forward::To {
                backend: flow.backend.get(),
                colour: flow.colour(),
                reason: Reason::Forwarded,
            }
        }
        _ => Forward::New {
            table: FlowTable::Udp,
            state: 0,
            reason: Reason::ForwardedNew,
        },
    }
}

#[inline(always)]
fn forward_tcp<P: Packet, T: Tables, A: Network, F: FamilyTables<A>>(
    packet: &P,
    tables: &T,
    family: &F,
    segment: &Segment<A>,
    word: CutoverWord,
    key: &FlowKey<A>,
    now: u32,
) -> Forward {
    let mut known = family.flow(FlowTable::Established, key);
    // A SYN takes the word's colour, whatever the tuple did before. An old flow
    // of the tuple stays until the new one is proven.
    if segment.has(tcp_flag::SYN) && !segment.has(tcp_flag::ACK | tcp_flag::RST) {
        if let Some(old) = known {
            old.set(state::CONTESTED);
        }
        return Forward::New {
            table: FlowTable::HalfOpen,
            state: 0,
            reason: Reason::ForwardedNew,
        };
    }
    // The half-open table matters to flows that are not proven yet, and to an
    // old flow whose tuple a new SYN has taken up.
    let mut reason = Reason::Forwarded;
    if known.is_none_or(|flow| flow.is(state::CONTESTED)) {
        match family.flow(FlowTable::HalfOpen, key) {
            Some(half) if proves(half, segment) => {
                if !promote(family, key, half, now) {
                    reason = Reason::ForwardedTableFull;
                }
                known = Some(half);
            }
            Some(half) => known = known.or(Some(half)),
            None => {
                if let Some(flow) = known {
                    flow.clear(state::CONTESTED);
                }
            }
        }
    }
    // A mid-stream packet of a flow that is not known here (another gateway's,
    // or one that was lost) goes where a new flow would; only the backend's
    // answer can make it a flow.
    let Some(flow) = known else {
        return Forward::New {
            table: FlowTable::HalfOpen,
            state: state::ORPHAN,
            reason: Reason::ForwardedOrphan,
        };
    };

    let rst = segment.has(tcp_flag::RST);
    let colour = flow.colour();
    if word.resets(colour, flow.generation.get()) && !rst {
        flow.set(state::CLIENT_CUT | state::RESET);
        return Forward::Reset { colour };
    }
    if rst {
        // Out of the backend's window it closes nothing, there or here.
        if segment.tcp.sequence.wrapping_sub(flow.client_next.get()) <= RESET_WINDOW {
            flow.set(state::RESET);
        }
    } else {
        if segment.has(tcp_flag::ACK) && flow.backend_next.get() != segment.tcp.acknowledgement {
            flow.backend_next.set(segment.tcp.acknowledgement);
        }
        if segment.has(tcp_flag::FIN) {
            flow.set(state::CLIENT_FIN);
        }
        touch(flow, now);
    }
    if flow.is(state::LEARNED) {
        flow.client_hop.set(sender(packet, tables, segment).0);
    }
    Forward::To {
        backend: flow.backend.get(),
        colour,
        reason,
    }
}

/// True for the acknowledgement that only a host which got the backend's
/// SYN-ACK can send.
#[inline(always)]
fn proves<A>(half: &FlowCell, segment: &Segment<A>) -> bool {
    half.is(state::ANSWERED)
        && segment.has(tcp_flag::ACK)
        && !segment.has(tcp_flag::RST)
        && segment.tcp.acknowledgement == half.proof.get()
}

/// Copies a proven flow into the established table. Its half-open entry is left
/// to age out, marked: no flow is ever without an entry. False when the table is
/// full.
#[inline(always)]
fn promote<A: Network, F: FamilyTables<A>>(
    family: &F,
    key: &FlowKey<A>,
    half: &FlowCell,
    now: u32,
) -> bool {
    half.seen.set(now);
    half.clear(state::ANSWERED | state::ORPHAN);
    let established = family.remember(FlowTable::Established, key, half);
    if established {
        half.set(state::MOVED);
    }
    established
}

/// Notes that a flow lives; after a RST only once that has had its time.
#[inline(always)]
fn touch(flow: &FlowCell, now: u32) {
    let seen = flow.seen.get();
    if seen == now {
        return;
    }
    if flow.is(state::RESET) {
        if now.wrapping_sub(seen) <= REVIVE_TICKS {
            return;
        }
        flow.clear(state::RESET);
    }
    flow.seen.set(now);
}

/// The next hop that the packet came from.
#[inline(always)]
fn sender<P: Packet, T: Tables, A>(packet: &P, tables: &T, segment: &Segment<A>) -> NextHop {
    match tables.slot(packet.ingress()) {
        Some(slot) => NextHop::new(segment.mac, slot as u16),
        None => NextHop::NONE,
    }
}

/// The colour by the word, the backend by the pool.
#[inline(always)]
fn choose<P: Packet, T: Tables, A: Network>(
    packet: &P,
    tables: &T,
    segment: &Segment<A>,
    listener: Listener,
    word: CutoverWord,
    now: u32,
) -> Option<Flow> {
    let client = segment.source.hash();
    let colour = word.colour_for(client as u32);
    let flow_hash = mix(client ^ u64::from(u16::from_ne_bytes(segment.source_port)));
    let pool = tables.pool(PoolWord::index(listener.service, colour, A::V6));
    let backend = tables.maglev(pool.slot((flow_hash >> 32) as u32)?)?;
    Some(Flow {
        client_hop: sender(packet, tables, segment).0,
        backend,
        seen: now,
        generation: word.generation(),
        colour: colour as u8,
        service: listener.service,
        client_next: segment.tcp.sequence,
        backend_next: segment.tcp.acknowledgement,
        // The first packet back looks the route up.
        routed: now.wrapping_sub(ROUTE_TICKS + 1),
        proof: 0,
        state: 0,
    })
}

/// Counts a new flow, and stamps the first one of a generation.
#[inline(always)]
fn begin<T: Tables>(tables: &T, service: u32, colour: Colour, word: CutoverWord) {
    tables.record(service, colour, |stats| stats.new_flows += 1);
    let newest = tables.first_flow(service).generation();
    // Serial comparison: a CPU that still works with the old word must not
    // take the stamp back.
    if (word.generation().wrapping_sub(newest) as i16) > 0 && colour == word.active() {
        tables.set_first_flow(service, FirstFlow::new(word.generation(), tables.now_ns()));
    }
}

// ---- backend -> client ----------------------------------------------------

/// What is decided about a backend's packet.
enum Back<'a> {
    /// To the flow's client.
    To(&'a FlowCell),
    /// To nobody: the flow was cut. Its client is told with this segment.
    ResetClient(&'a FlowCell),
    /// To nobody: the flow was cut, and its client knows.
    ResetBackend(Colour),
    /// Not our business, or nobody's.
    Leave(Verdict),
}

/// A packet from a backend's endpoint: back to the client it belongs to, as if
/// the listener had sent it. What belongs to no flow passes untouched.
#[inline(always)]
fn back<P: Packet, T: Tables, A: Network, F: FamilyTables<A>>(
    packet: &mut P,
    tables: &T,
    family: &F,
    segment: &Segment<A>,
    path: &ReturnPath,
) -> Verdict {
    let Some(word) = tables.word(path.service) else {
        return drop(Reason::Inconsistent);
    };
    let key = FlowKey::new(segment.destination, segment.destination_port, path.listener);
    let now = tables.tick();
    let decision = if segment.protocol == UDP {
        back_udp(tables, family, segment, &key, now)
    } else {
        back_tcp(tables, family, segment, word, &key, now)
    };
    let flow = match decision {
        Back::Leave(verdict) => return verdict,
        Back::ResetBackend(colour) => {
            return reset_sender(
                packet,
                tables,
                segment,
                path.service,
                colour,
                Reason::ResetBackend,
            );
        }
        Back::ResetClient(flow) => return reset_receiver(packet, tables, segment, path, flow),
        Back::To(flow) => flow,
    };

    if segment.hops <= 1 {
        return pass(Reason::TtlExpired);
    }
    let address = A::from_wide(&path.address);
    let mut hop = NextHop(flow.client_hop.get());
    if now.wrapping_sub(flow.routed.get()) > ROUTE_TICKS {
        flow.routed.set(now);
        let routed = family.route(&address, &segment.destination, packet.ingress());
        if routed == NextHop::NONE {
            flow.set(state::LEARNED);
        } else {
            flow.clear(state::LEARNED);
            flow.client_hop.set(routed.0);
            hop = routed;
        }
    }
    if hop == NextHop::NONE {
        return drop(Reason::ReturnUnreachable);
    }
    let colour = flow.colour();
    let out = Out {
        hop,
        side: Side::Source,
        address,
        port: path.port,
        reason: Reason::Returned,
    };
    let verdict = send(packet, tables, segment, &out);
    if matches!(verdict.action, Action::Transmit | Action::Redirect(_)) {
        tables.record(path.service, colour, |stats| {
            stats.return_packets += 1;
            stats.return_bytes += u64::from(segment.length);
        });
    }
    verdict
}

#[inline(always)]
fn back_udp<'a, T: Tables, A: Network, F: FamilyTables<A>>(
    tables: &T,
    family: &'a F,
    segment: &Segment<A>,
    key: &FlowKey<A>,
    now: u32,
) -> Back<'a> {
    match family.flow(FlowTable::Udp, key) {
        Some(flow) if is_from(tables, flow, segment) => {
            touch(flow, now);
            Back::To(flow)
        }
        Some(_) => Back::Leave(drop(Reason::ReturnStale)),
        None => Back::Leave(pass(Reason::ReturnUnknown)),
    }
}

#[inline(always)]
fn back_tcp<'a, T: Tables, A: Network, F: FamilyTables<A>>(
    tables: &T,
    family: &'a F,
    segment: &Segment<A>,
    word: CutoverWord,
    key: &FlowKey<A>,
    now: u32,
) -> Back<'a> {
    let rst = segment.has(tcp_flag::RST);
    let established = family.flow(FlowTable::Established, key);
    if let Some(flow) = established
        && !segment.has(tcp_flag::SYN)
        && is_from(tables, flow, segment)
    {
        if word.resets(flow.colour(), flow.generation.get()) && !rst {
            // The client first, if it does not know yet: this segment carries
            // the sequence number it waits for. The backend with the next one.
            if flow.is(state::CLIENT_CUT) {
                return Back::ResetBackend(flow.colour());
            }
            flow.set(state::CLIENT_CUT | state::RESET);
            return Back::ResetClient(flow);
        }
        if rst {
            if segment.tcp.sequence.wrapping_sub(flow.backend_next.get()) <= RESET_WINDOW {
                flow.set(state::RESET);
            }
        } else {
            if segment.has(tcp_flag::ACK) && flow.client_next.get() != segment.tcp.acknowledgement {
                flow.client_next.set(segment.tcp.acknowledgement);
            }
            if segment.has(tcp_flag::FIN) {
                flow.set(state::BACKEND_FIN);
            }
            touch(flow, now);
        }
        return Back::To(flow);
    }

    let half = match family.flow(FlowTable::HalfOpen, key) {
        Some(half) if is_from(tables, half, segment) => half,
        None if established.is_none() => return Back::Leave(pass(Reason::ReturnUnknown)),
        _ => return Back::Leave(drop(Reason::ReturnStale)),
    };
    if rst {
        half.set(state::RESET);
        return Back::To(half);
    }
    if word.resets(half.colour(), half.generation.get()) {
        // Cut inside the handshake: the client hears nothing, sends its SYN
        // again, and that takes the word's colour.
        return Back::ResetBackend(half.colour());
    }
    half.client_next.set(segment.tcp.acknowledgement);
    if segment.has(tcp_flag::SYN) {
        half.proof.set(segment.tcp.sequence.wrapping_add(1));
        half.set(state::ANSWERED);
    } else if half.is(state::ORPHAN) || segment.tcp.taken > 0 {
        // Data, or any answer to a flow from before our time: the backend knows
        // it. To a forged second SYN it answers with a bare acknowledgement,
        // which proves nothing.
        promote(family, key, half, now);
    }
    Back::To(half)
}

/// True when the segment's sender is the flow's backend.
#[inline(always)]
fn is_from<T: Tables, A: Network>(tables: &T, flow: &FlowCell, segment: &Segment<A>) -> bool {
    match tables.backend(flow.backend.get()) {
        Some(backend) => A::from_wide(&backend.address) == segment.source,
        None => false,
    }
}

// ---- out ------------------------------------------------------------------

/// How a packet leaves: what its one end becomes, and where it goes.
struct Out<A> {
    hop: NextHop,
    side: Side,
    address: A,
    port: [u8; 2],
    reason: Reason,
}

/// Rewrites one end of the packet and sends it to the next hop.
#[inline(always)]
fn send<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    out: &Out<A>,
) -> Verdict {
    // Without a next hop the stack routes the rewritten packet, finds the
    // neighbour, and takes the hop off the TTL itself.
    let slot = out.hop.slot().map(u32::from);
    let interface = match slot.map(|slot| tables.interface(slot)) {
        Some(Some(interface)) => Some(interface),
        Some(None) => return drop(Reason::Inconsistent),
        None => None,
    };
    if interface.is_some_and(|interface| segment.length > interface.mtu) {
        return pass(Reason::TooBig);
    }
    let Some(delta) = A::readdress(packet, out.side, out.address, interface.is_some()) else {
        return drop(Reason::Inconsistent);
    };
    if rewrite::transport(
        packet,
        segment.offset,
        segment.protocol,
        out.side,
        out.port,
        delta,
    )
    .is_none()
    {
        return drop(Reason::Inconsistent);
    }
    match interface {
        Some(interface) => leave(packet, out.hop, slot.unwrap_or(0), interface, out.reason),
        None => pass(Reason::ForwardedByStack),
    }
}

#[inline(always)]
fn leave<P: Packet>(
    packet: &mut P,
    hop: NextHop,
    slot: u32,
    interface: &Interface,
    reason: Reason,
) -> Verdict {
    if rewrite::ethernet(packet, hop, interface.mac).is_none() {
        return drop(Reason::Inconsistent);
    }
    let action = if interface.ifindex == packet.ingress() {
        Action::Transmit
    } else {
        Action::Redirect(slot)
    };
    Verdict { action, reason }
}

/// Answers a segment of a cut flow with a RST its sender accepts: the sequence
/// number is what the sender acknowledged (RFC 9293, section 3.10.7.1).
#[inline(always)]
fn reset_sender<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    service: u32,
    colour: Colour,
    reason: Reason,
) -> Verdict {
    let Some(ethernet) = packet.header::<Ethernet>(0) else {
        return drop(Reason::Inconsistent);
    };
    let (us, them) = (ethernet.destination, ethernet.source);
    let (sequence, acknowledgement) = if segment.has(tcp_flag::ACK) {
        (segment.tcp.acknowledgement.to_be_bytes(), None)
    } else {
        let next = segment.tcp.sequence.wrapping_add(segment.tcp.taken);
        ([0; 4], Some(next.to_be_bytes()))
    };
    let reset = Reset {
        from: (segment.destination, segment.destination_port),
        to: (segment.source, segment.source_port),
        sequence,
        acknowledgement,
    };
    if rewrite::reset(packet, &reset).is_none() {
        return drop(Reason::CutDropped);
    }
    if rewrite::ethernet(packet, NextHop::new(them, 0), us).is_none() {
        return drop(Reason::Inconsistent);
    }
    tables.record(service, colour, |stats| stats.resets += 1);
    Verdict {
        action: Action::Transmit,
        reason,
    }
}

/// Turns a backend's segment of a cut flow into a RST for the client: the
/// segment's sequence number is the one the client waits for.
#[inline(always)]
fn reset_receiver<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    path: &ReturnPath,
    flow: &FlowCell,
) -> Verdict {
    let hop = NextHop(flow.client_hop.get());
    let Some(slot) = hop.slot() else {
        return drop(Reason::ReturnUnreachable);
    };
    let Some(interface) = tables.interface(u32::from(slot)) else {
        return drop(Reason::Inconsistent);
    };
    let reset = Reset {
        from: (A::from_wide(&path.address), path.port),
        to: (segment.destination, segment.destination_port),
        sequence: segment.tcp.sequence.to_be_bytes(),
        acknowledgement: segment
            .has(tcp_flag::ACK)
            .then(|| segment.tcp.acknowledgement.to_be_bytes()),
    };
    if rewrite::reset(packet, &reset).is_none() {
        return drop(Reason::CutDropped);
    }
    tables.record(path.service, flow.colour(), |stats| stats.resets += 1);
    leave(packet, hop, u32::from(slot), interface, Reason::ResetClient)
}
