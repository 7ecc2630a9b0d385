//! The journey of a packet: parse -> look up -> decide -> rewrite -> verdict.
//!
//! Read top to bottom. [`process`] looks at the EtherType; [`whose`] has the
//! headers parsed and finds out whether the packet is a client's ([`forward`]) or
//! a backend's ([`back`]). Each service's cut-over word is read once, and what it
//! says is passed along: no packet sees a mix.
//!
//! Functions that are `inline(never)` are functions of their own in the kernel
//! too: 512 bytes of stack are all there is, callers included. What is rare (a new
//! flow, a reset, an ICMP error, a route look-up) parses the packet again, so that
//! packets of known flows do not carry it. Such a function returns one
//! number: an enum with data in its signature becomes type information that the
//! kernel refuses, and what does not fit a register comes back by a pointer that
//! the verifier may take for the result.

use bg_common::{
    key::{Endpoint, FlowKey, UDP},
    maglev::mix,
    reason::Reason,
    service::{
        Colour, CutoverWord, FirstFlow, Flow, Interface, Listener, NextHop, PoolWord, ReturnPath,
        colour_spread, state,
    },
};

use crate::{
    errors,
    packet::{ETHERNET, Ethernet, Packet, tcp_flag},
    parse::{self, Segment},
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

/// A verdict as a BPF function can return it: reason in the low half, action in
/// the high one.
#[derive(Clone, Copy)]
#[repr(transparent)]
#[must_use]
pub(crate) struct Exit(u64);

impl Exit {
    const PASS: u32 = 0;
    const DROP: u32 = 1;
    const TRANSMIT: u32 = 2;
    /// This and higher: redirect to the slot that is so much higher.
    const REDIRECT: u32 = 3;

    #[inline(always)]
    const fn new(way: u32, reason: Reason) -> Self {
        Self((way as u64) << 32 | reason as u64)
    }

    #[inline(always)]
    const fn way(self) -> u32 {
        (self.0 >> 32) as u32
    }

    /// True when the packet is on its way to the other end, by us or by the stack.
    #[inline(always)]
    const fn is_sent(self) -> bool {
        self.way() >= Self::TRANSMIT || self.0 as u32 == Reason::ForwardedByStack as u32
    }

    #[inline(always)]
    fn verdict(self) -> Verdict {
        let action = match self.way() {
            Self::PASS => Action::Pass,
            Self::DROP => Action::Drop,
            Self::TRANSMIT => Action::Transmit,
            way => Action::Redirect(way - Self::REDIRECT),
        };
        let reason = Reason::from_index(self.0 as u32).unwrap_or(Reason::Inconsistent);
        Verdict { action, reason }
    }
}

/// To the stack.
#[inline(always)]
pub(crate) const fn pass(reason: Reason) -> Exit {
    Exit::new(Exit::PASS, reason)
}

/// Nowhere.
#[inline(always)]
pub(crate) const fn drop(reason: Reason) -> Exit {
    Exit::new(Exit::DROP, reason)
}

/// Back out of the interface it came in by.
#[inline(always)]
pub(crate) const fn transmit(reason: Reason) -> Exit {
    Exit::new(Exit::TRANSMIT, reason)
}

mod ether_type {
    pub const IPV4: [u8; 2] = [0x08, 0x00];
    pub const IPV6: [u8; 2] = [0x86, 0xdd];
    pub const VLAN: [u8; 2] = [0x81, 0x00];
    pub const QINQ: [u8; 2] = [0x88, 0xa8];
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
    let verdict = network(packet, tables).verdict();
    tables.count(verdict.reason);
    verdict
}

#[inline(always)]
fn network<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Exit {
    let Some(ethernet) = packet.header::<Ethernet>(0) else {
        return pass(Reason::Truncated);
    };
    if ethernet.destination[0] & 1 != 0 {
        return pass(Reason::NotOurs); // broadcast or multicast
    }
    match ethernet.ether_type {
        ether_type::IPV4 => family::<_, _, [u8; 4]>(packet, tables),
        ether_type::IPV6 => family::<_, _, [u8; 16]>(packet, tables),
        ether_type::VLAN | ether_type::QINQ => pass(Reason::Vlan),
        _ => pass(Reason::NotIp),
    }
}

/// An ICMP error is looked up by the packet that it quotes, everything else by its
/// own addresses.
#[inline(always)]
fn family<P: Packet, T: Tables + FamilyTables<A>, A: Network>(packet: &mut P, tables: &T) -> Exit {
    if A::carries_icmp(packet) {
        errors::translate::<P, T, A>(packet, tables)
    } else {
        whose::<P, T, A>(packet, tables)
    }
}

/// Asks both lookup tables whose packet it is.
#[inline(never)]
fn whose<P: Packet, T: Tables + FamilyTables<A>, A: Network>(packet: &mut P, tables: &T) -> Exit {
    let segment = match parse::segment::<P, A>(packet) {
        Ok(segment) => segment,
        Err(reason) => return pass(reason),
    };
    let to = Endpoint::new(
        segment.destination,
        segment.destination_port,
        segment.protocol,
    );
    if let Some(listener) = tables.listener(&to) {
        return forward(packet, tables, &segment, listener);
    }
    let from = Endpoint::new(segment.source, segment.source_port, segment.protocol);
    if let Some(path) = tables.return_path(&from) {
        return back(packet, tables, &segment, path);
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
    /// As a new flow.
    New(Reason),
}

/// A client's packet: to the backend its flow is pinned to, or to the one that
/// the word and the pool choose.
#[inline(always)]
fn forward<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    listener: Listener,
) -> Exit {
    if segment.hops <= 1 {
        return errors::expired::<P, A>(packet);
    }
    let Some(word) = tables.word(listener.service) else {
        return drop(Reason::Inconsistent);
    };
    let key = FlowKey::new(segment.source, segment.source_port, listener.id);
    let now = tables.tick();
    let decision = if segment.protocol == UDP {
        forward_udp(tables, listener, word, &key, now)
    } else {
        forward_tcp(packet, tables, segment, listener, word, &key, now)
    };
    let (backend, colour, reason) = match decision {
        Forward::To {
            backend,
            colour,
            reason,
        } => (backend, colour, reason),
        Forward::Reset { colour } => {
            return reset_sender::<P, T, A>(
                packet,
                tables,
                (listener.service, colour),
                Reason::ResetClient,
            );
        }
        Forward::New(reason) => match newcomer::<P, T, A>(packet, tables, &listener, word).get() {
            Some((backend, colour)) => (backend, colour, reason),
            None => return drop(Reason::NoBackend),
        },
    };

    // A slot that was given back, or to another service, is nobody's backend.
    let Some(backend) = tables
        .backend(backend)
        .filter(|backend| backend.service == listener.service && backend.family == A::FAMILY)
    else {
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
    let exit = send(packet, tables, segment, &out);
    if exit.is_sent() {
        tables.record(listener.service, colour, |stats| {
            stats.forward_packets += 1;
            stats.forward_bytes += u64::from(segment.length);
        });
    }
    exit
}

#[inline(always)]
fn forward_udp<T: FamilyTables<A>, A: Network>(
    tables: &T,
    listener: Listener,
    word: CutoverWord,
    key: &FlowKey<A>,
    now: u32,
) -> Forward {
    match flow_of(tables, FlowTable::Udp, key, listener.service) {
        Some(flow)
            if now.wrapping_sub(flow.seen.get()) <= listener.idle && !flow.is_reset(word) =>
        {
            touch(flow, now);
            Forward::To {
                backend: flow.backend.get(),
                colour: flow.colour(),
                reason: Reason::Forwarded,
            }
        }
        _ => Forward::New(Reason::ForwardedNew),
    }
}

#[inline(always)]
fn forward_tcp<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &P,
    tables: &T,
    segment: &Segment<A>,
    listener: Listener,
    word: CutoverWord,
    key: &FlowKey<A>,
    now: u32,
) -> Forward {
    let mut known = flow_of(tables, FlowTable::Established, key, listener.service);
    // A SYN takes the word's colour, whatever the tuple did before. An old flow
    // of the tuple stays until the new one is proven.
    if segment.opens() {
        if let Some(old) = known {
            old.set(state::CONTESTED);
        }
        return Forward::New(Reason::ForwardedNew);
    }
    // The half-open table matters to flows that are not proven yet, and to an
    // old flow whose tuple a new SYN has taken up.
    let mut reason = Reason::Forwarded;
    if known.is_none_or(|flow| flow.is(state::CONTESTED)) {
        match flow_of(tables, FlowTable::HalfOpen, key, listener.service) {
            Some(half) if proves(half, segment) => {
                if !promote(tables, key, half, now) {
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
        return Forward::New(Reason::ForwardedOrphan);
    };

    let rst = segment.has(tcp_flag::RST);
    let colour = flow.colour();
    if flow.is_reset(word) && !rst {
        // An old acknowledgement gets a RST that its client does not take, so
        // only the way back notes that the client knows.
        flow.set(state::RESET);
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
        flow.client_hop.set(sender(packet, tables).0);
    }
    Forward::To {
        backend: flow.backend.get(),
        colour,
        reason,
    }
}

/// A remembered flow of this service. One of another service is left from a
/// listener that had the same id before.
#[inline(always)]
fn flow_of<'a, T: FamilyTables<A>, A>(
    tables: &'a T,
    table: FlowTable,
    key: &FlowKey<A>,
    service: u32,
) -> Option<&'a FlowCell> {
    tables
        .flow(table, key)
        .filter(|flow| flow.service.get() == service)
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
fn promote<T: FamilyTables<A>, A: Network>(
    tables: &T,
    key: &FlowKey<A>,
    half: &FlowCell,
    now: u32,
) -> bool {
    half.seen.set(now);
    let proven = half.state.get();
    half.clear(state::ANSWERED | state::ORPHAN);
    let established = tables.remember(FlowTable::Established, key, half);
    // Where there was no room, the next packet may try again.
    half.state.set(if established {
        half.state.get() | state::MOVED
    } else {
        proven
    });
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
fn sender<P: Packet, T: Tables>(packet: &P, tables: &T) -> NextHop {
    match (tables.slot(packet.ingress()), packet.header::<Ethernet>(0)) {
        (Some(slot), Some(ethernet)) => NextHop::new(ethernet.source, slot as u16),
        _ => NextHop::NONE,
    }
}

/// Where a new flow goes, as a BPF function can return it: backend id in the low
/// half, colour above.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Chosen(u64);

impl Chosen {
    /// The pool is empty.
    const NOBODY: Self = Self(u64::MAX);

    #[inline(always)]
    const fn new(backend: u32, colour: Colour) -> Self {
        Self((colour as u64) << 32 | backend as u64)
    }

    #[inline(always)]
    const fn get(self) -> Option<(u32, Colour)> {
        if self.0 == Self::NOBODY.0 {
            return None;
        }
        Some((self.0 as u32, Colour::from_bit((self.0 >> 32) as u8)))
    }
}

/// Chooses for a new flow, the colour by the word and the backend by the pool,
/// and remembers it.
#[inline(never)]
fn newcomer<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &P,
    tables: &T,
    listener: &Listener,
    word: CutoverWord,
) -> Chosen {
    let Ok(segment) = parse::segment::<P, A>(packet) else {
        return Chosen::NOBODY;
    };
    let client = segment.source.hash();
    let colour = word.colour_for(client as u32);
    let flow_hash = mix(client ^ u64::from(u16::from_ne_bytes(segment.source_port)));
    let pool = tables.pool(PoolWord::index(listener.service, colour, A::V6));
    let slot = pool.slot((flow_hash >> 32) as u32);
    let Some(backend) = slot.and_then(|slot| tables.maglev(slot)) else {
        return Chosen::NOBODY;
    };

    let (table, state) = match segment.protocol {
        UDP => (FlowTable::Udp, 0),
        _ if segment.opens() => (FlowTable::HalfOpen, 0),
        _ => (FlowTable::HalfOpen, state::ORPHAN),
    };
    let orphan = state & state::ORPHAN != 0;
    // A segment that asks for no answer proves nothing later.
    if !segment.has(tcp_flag::RST) && (!orphan || segment.has(tcp_flag::ACK)) {
        let now = tables.tick();
        let flow = Flow {
            client_hop: sender(packet, tables).0,
            backend,
            seen: now,
            generation: word.generation(),
            colour_spread: colour_spread(colour, flow_hash),
            service: listener.service,
            client_next: segment.tcp.sequence,
            backend_next: segment.tcp.acknowledgement,
            // The first packet back looks the route up.
            routed: now.wrapping_sub(ROUTE_TICKS + 1),
            proof: 0,
            state,
        };
        let key = FlowKey::new(segment.source, segment.source_port, listener.id);
        tables.remember(table, &key, &flow.into());
    }
    if !orphan {
        begin(tables, listener.service, colour, word);
    }
    Chosen::new(backend, colour)
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
    Leave(Exit),
}

/// A packet from a backend's endpoint: back to the client it belongs to, as if
/// the listener had sent it. What belongs to no flow passes untouched.
#[inline(always)]
fn back<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    path: &ReturnPath,
) -> Exit {
    let Some(word) = tables.word(path.service) else {
        return drop(Reason::Inconsistent);
    };
    let key = FlowKey::new(segment.destination, segment.destination_port, path.listener);
    let now = tables.tick();
    let decision = if segment.protocol == UDP {
        back_udp(tables, segment, word, &key, now)
    } else {
        let ingress = packet.ingress();
        back_tcp(tables, segment, word, &key, now, ingress)
    };
    let flow = match decision {
        Back::Leave(exit) => return exit,
        Back::ResetBackend(colour) => {
            return reset_sender::<P, T, A>(
                packet,
                tables,
                (path.service, colour),
                Reason::ResetBackend,
            );
        }
        Back::ResetClient(flow) => return reset_receiver(packet, tables, segment, path, flow),
        Back::To(flow) => flow,
    };

    if segment.hops <= 1 {
        return errors::expired::<P, A>(packet);
    }
    let address = A::from_wide(&path.address);
    let mut hop = NextHop(flow.client_hop.get());
    if now.wrapping_sub(flow.routed.get()) > ROUTE_TICKS {
        flow.routed.set(now);
        let routed = tables.route(&path.address, &segment.destination, packet.ingress());
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
    let exit = send(packet, tables, segment, &out);
    if exit.is_sent() {
        tables.record(path.service, colour, |stats| {
            stats.return_packets += 1;
            stats.return_bytes += u64::from(segment.length);
        });
    }
    exit
}

#[inline(always)]
fn back_udp<'a, T: Tables + FamilyTables<A>, A: Network>(
    tables: &'a T,
    segment: &Segment<A>,
    word: CutoverWord,
    key: &FlowKey<A>,
    now: u32,
) -> Back<'a> {
    match tables.flow(FlowTable::Udp, key) {
        Some(flow) if flow.is_reset(word) => Back::Leave(drop(Reason::CutDropped)),
        Some(flow) if origin(tables, flow, segment, 0) != Origin::Other => {
            touch(flow, now);
            Back::To(flow)
        }
        Some(_) => Back::Leave(drop(Reason::ReturnStale)),
        None => Back::Leave(pass(Reason::ReturnUnknown)),
    }
}

#[inline(always)]
fn back_tcp<'a, T: Tables + FamilyTables<A>, A: Network>(
    tables: &'a T,
    segment: &Segment<A>,
    word: CutoverWord,
    key: &FlowKey<A>,
    now: u32,
    ingress: u32,
) -> Back<'a> {
    let rst = segment.has(tcp_flag::RST);
    let established = tables.flow(FlowTable::Established, key);
    if let Some(flow) = established
        && !segment.has(tcp_flag::SYN)
        && let from @ (Origin::Backend | Origin::Claimed) = origin(tables, flow, segment, ingress)
    {
        if flow.is_reset(word) && !rst {
            // The client first, if it does not know yet; the backend with its
            // next segment.
            if flow.is(state::CLIENT_CUT) {
                return Back::ResetBackend(flow.colour());
            }
            flow.set(state::CLIENT_CUT | state::RESET);
            return Back::ResetClient(flow);
        }
        if from == Origin::Claimed {
            return Back::To(flow);
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

    let Some(half) = tables.flow(FlowTable::HalfOpen, key) else {
        return Back::Leave(match established {
            Some(_) => drop(Reason::ReturnStale),
            None => pass(Reason::ReturnUnknown),
        });
    };
    match origin(tables, half, segment, ingress) {
        Origin::Backend => {}
        Origin::Claimed => return Back::To(half),
        Origin::Other => return Back::Leave(drop(Reason::ReturnStale)),
    }
    if rst {
        half.set(state::RESET);
        return Back::To(half);
    }
    if half.is_reset(word) {
        // Cut inside the handshake: the client hears nothing, sends its SYN
        // again, and that takes the word's colour.
        return Back::ResetBackend(half.colour());
    }
    half.client_next.set(segment.tcp.acknowledgement);
    if segment.has(tcp_flag::SYN) {
        let next = segment.tcp.sequence.wrapping_add(1);
        half.proof.set(next);
        half.backend_next.set(next);
        half.set(state::ANSWERED);
    } else if half.is(state::ORPHAN) || segment.tcp.taken > 0 {
        // The backend knows this flow. Its bare acknowledgement proves that
        // only of an orphan: to a second, spoofed SYN a backend answers with
        // one too (RFC 9293, section 3.10.7.4), but it never sends data or a
        // FIN before the handshake is done.
        promote(tables, key, half, now);
    }
    Back::To(half)
}

/// Who sent a segment that has a backend's address.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    /// The flow's backend.
    Backend,
    /// It says so, but came in by an interface that does not lead there: sent
    /// on, as the stack would, but nothing is learned from it.
    Claimed,
    /// Another backend.
    Other,
}

/// Compares a segment that came in by `ingress` with the flow's backend.
#[inline(always)]
fn origin<T: Tables, A: Network>(
    tables: &T,
    flow: &FlowCell,
    segment: &Segment<A>,
    ingress: u32,
) -> Origin {
    let Some(backend) = tables.backend(flow.backend.get()) else {
        return Origin::Other;
    };
    if A::from_wide(&backend.address) != segment.source {
        return Origin::Other;
    }
    let way = NextHop(backend.next_hop)
        .slot()
        .and_then(|slot| tables.interface(u32::from(slot)));
    match way {
        Some(interface) if interface.ifindex != ingress => Origin::Claimed,
        _ => Origin::Backend,
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
) -> Exit {
    // Without a next hop the stack routes the rewritten packet, finds the
    // neighbour, and takes the hop off the TTL itself.
    let slot = out.hop.slot().map(u32::from);
    let mut interface = match slot.map(|slot| tables.interface(slot)) {
        Some(Some(interface)) if interface.ifindex != 0 => Some(interface),
        Some(_) => return drop(Reason::Inconsistent),
        None => None,
    };
    if let Some(small) = interface.filter(|interface| segment.length > interface.mtu) {
        match errors::too_big::<P, A>(packet, small.mtu) {
            Some(exit) => return exit,
            None => interface = None,
        }
    }
    let Some(delta) = A::readdress(packet, ETHERNET, out.side, out.address, interface.is_some())
    else {
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
pub(crate) fn leave<P: Packet>(
    packet: &mut P,
    hop: NextHop,
    slot: u32,
    interface: &Interface,
    reason: Reason,
) -> Exit {
    if rewrite::ethernet(packet, hop, interface.mac).is_none() {
        return drop(Reason::Inconsistent);
    }
    let way = if interface.ifindex == packet.ingress() {
        Exit::TRANSMIT
    } else {
        slot + Exit::REDIRECT
    };
    Exit::new(way, reason)
}

/// Answers a segment of a cut flow with a RST, out of where it came in.
#[inline(always)]
fn reset_sender<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    (service, colour): (u32, Colour),
    reason: Reason,
) -> Exit {
    if !turn_round::<P, A>(packet) {
        return drop(Reason::CutDropped);
    }
    tables.record(service, colour, |stats| stats.resets += 1);
    transmit(reason)
}

/// Makes a segment the RST that its sender accepts: the sequence number is what
/// it acknowledged (RFC 9293, section 3.10.7.1).
#[inline(never)]
fn turn_round<P: Packet, A: Network>(packet: &mut P) -> bool {
    let (Some(ethernet), Ok(segment)) =
        (packet.header::<Ethernet>(0), parse::segment::<P, A>(packet))
    else {
        return false;
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
    rewrite::reset(packet, &reset).is_some()
        && rewrite::ethernet(packet, NextHop::new(them, 0), us).is_some()
}

/// Turns a backend's segment of a cut flow into a RST for the client, at the
/// sequence number that the client waits for: the segment's, or, where that is
/// old (a retransmission, a keep-alive probe), the one it acknowledged last.
#[inline(always)]
fn reset_receiver<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    path: &ReturnPath,
    flow: &FlowCell,
) -> Exit {
    let hop = NextHop(flow.client_hop.get());
    let Some(slot) = hop.slot() else {
        return drop(Reason::ReturnUnreachable);
    };
    let Some(interface) = tables.interface(u32::from(slot)) else {
        return drop(Reason::Inconsistent);
    };
    let sequence = later(segment.tcp.sequence, flow.backend_next.get());
    if !tell_client::<P, A>(packet, path, sequence) {
        return drop(Reason::CutDropped);
    }
    tables.record(path.service, flow.colour(), |stats| stats.resets += 1);
    leave(packet, hop, u32::from(slot), interface, Reason::ResetClient)
}

/// Makes a backend's segment a RST from the listener to the client.
#[inline(never)]
fn tell_client<P: Packet, A: Network>(packet: &mut P, path: &ReturnPath, sequence: u32) -> bool {
    let Ok(segment) = parse::segment::<P, A>(packet) else {
        return false;
    };
    let reset = Reset {
        from: (A::from_wide(&path.address), path.port),
        to: (segment.destination, segment.destination_port),
        sequence: sequence.to_be_bytes(),
        acknowledgement: segment
            .has(tcp_flag::ACK)
            .then(|| segment.tcp.acknowledgement.to_be_bytes()),
    };
    rewrite::reset(packet, &reset).is_some()
}

/// The later of two sequence numbers (RFC 1982).
#[inline(always)]
const fn later(a: u32, b: u32) -> u32 {
    if (a.wrapping_sub(b) as i32) < 0 { b } else { a }
}
