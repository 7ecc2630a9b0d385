//! The journey of a packet: parse -> look up -> decide -> rewrite -> verdict.
//!
//! Read top to bottom. [`process`] looks at the EtherType; [`read`] parses the
//! headers, and [`whose`] finds out whether the packet is a client's ([`forward`])
//! or a backend's ([`back`]). Each service's cut-over word is read once, and what
//! it says is passed along: no packet sees a mix.
//!
//! The parsed packet lies in memory of the CPU's own ([`FamilyTables::keep`]), not
//! on the stack: 512 bytes of stack are all there is, callers included, and what
//! is read back from there is any number to the kernel's verifier, so that it need
//! not follow every way through the parser to every end.
//!
//! Functions that are `inline(never)` are functions of their own in the kernel
//! too: what is rare (a new flow, a reset, an ICMP error, a route look-up) takes no
//! stack from packets of known flows. Such a function returns one number: an enum
//! with data in its signature becomes type information that the kernel refuses,
//! and what does not fit a register comes back by a pointer that the verifier may
//! take for the result.

use core::cell::Cell;

use bg_common::{
    flow::{CLOSING, Flow, FlowKey, FlowTable, bits},
    key::{Endpoint, UDP},
    maglev::mix,
    port::{Port, Tags},
    reason::Reason,
    service::{
        Backend, Colour, CutoverWord, FirstFlow, Interface, Listener, NextHop, PoolWord,
        ReturnPath, colour_spread, forward as mode,
    },
    snat::{self, via},
};

use crate::{
    errors, exchange,
    flows::{Bits as _, FlowCell},
    fragments,
    packet::{Ethernet, Packet, tcp_flag},
    parse::{self, Segment, part},
    preview::{Reply, preview},
    resets,
    rewrite::{self, Network, Side},
    tables::{FamilyTables, Tables},
    vlan,
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

/// A verdict as a BPF function can return it.
///
/// | bits | field |
/// | --- | --- |
/// | 0..14 | reason |
/// | 14 | it is of no client's flow: nobody hears it |
/// | 15 | the slot it leaves by puts VLAN tags on |
/// | 16..32 | the slot it leaves by, and 1; 0 when it goes where it came from |
/// | 32..64 | way: `PASS`, `DROP`, `TRANSMIT`, or `REDIRECT` and the slot |
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

    /// No verdict yet: the packet is to be looked up.
    pub(crate) const GO_ON: Self = Self(u64::MAX);
    const UNHEARD: u64 = 1 << 14;
    const TAGGED: u64 = 1 << 15;

    #[inline(always)]
    const fn new(way: u32, reason: Reason) -> Self {
        Self((way as u64) << 32 | reason as u64)
    }

    #[inline(always)]
    const fn way(self) -> u32 {
        (self.0 >> 32) as u32
    }

    #[inline(always)]
    pub(crate) const fn reason(self) -> u32 {
        (self.0 & (Self::UNHEARD - 1)) as u32
    }

    /// The same, of a packet that came by a preview or did not. Without a branch, by which
    /// the compiler would make all that was decided before twice.
    #[inline(always)]
    const fn unheard_if(self, preview: bool) -> Self {
        Self(self.0 | (preview as u64 * Self::UNHEARD))
    }

    /// True when it says something of how clients fare.
    #[inline(always)]
    pub(crate) const fn is_heard(self) -> bool {
        self.0 & Self::UNHEARD == 0
    }

    /// The slot that the packet leaves by; `None` when it does not, or goes back
    /// where it came from.
    #[inline(always)]
    pub(crate) const fn slot(self) -> Option<u32> {
        match self.0 >> 16 & 0xffff {
            0 => None,
            slot => Some(slot as u32 - 1),
        }
    }

    /// True when the packet goes to the stack as it came.
    #[inline(always)]
    pub(crate) const fn is_untouched(self) -> bool {
        self.way() == Self::PASS && !self.is_sent()
    }

    /// True when the packet was one of a cut flow.
    #[inline(always)]
    pub(crate) const fn is_cut(self) -> bool {
        let reason = self.reason();
        reason == Reason::ResetClient as u32
            || reason == Reason::ResetBackend as u32
            || reason == Reason::CutDropped as u32
    }

    /// True when the packet ends here.
    #[inline(always)]
    pub(crate) const fn is_drop(self) -> bool {
        self.way() == Self::DROP
    }

    /// True when the packet is on its way to the other end, by us or by the stack.
    #[inline(always)]
    pub(crate) const fn is_sent(self) -> bool {
        self.slot().is_some() || self.reason() == Reason::ForwardedByStack as u32
    }

    #[inline(always)]
    fn verdict(self) -> Verdict {
        let action = match self.way() {
            Self::PASS => Action::Pass,
            Self::DROP => Action::Drop,
            Self::TRANSMIT => Action::Transmit,
            way => Action::Redirect(way - Self::REDIRECT),
        };
        let reason = Reason::from_index(self.reason()).unwrap_or(Reason::Inconsistent);
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
}

/// A flow whose next hop was looked up longer ago than this is looked up
/// again: 15 ticks, one second.
const ROUTE_TICKS: u16 = 15;
/// Traffic this long after a RST shows that nobody took the RST: one second.
const REVIVE_TICKS: u32 = 15;
/// A RST counts when its sequence number lies this far ahead of the last
/// acknowledgement of the other side: the largest window without scaling.
const RESET_WINDOW: u32 = 65_535;

/// Decides what becomes of a packet, rewrites it, and counts the reason.
#[inline(always)]
pub fn process<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Verdict {
    let verdict = frame(packet, tables).verdict();
    tables.count(verdict.reason);
    verdict
}

#[inline(always)]
fn frame<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Exit {
    let Some(ethernet) = packet.header::<Ethernet>(0) else {
        return pass(Reason::Truncated);
    };
    if ethernet.destination[0] & 1 != 0 {
        return pass(Reason::NotOurs); // broadcast or multicast
    }
    if Tags::is_tag(ethernet.ether_type) {
        let exit = vlan::enter(packet, tables);
        if exit.0 != Exit::GO_ON.0 {
            return exit;
        }
    } else {
        packet.tag(Tags::NONE);
    }
    let exit = network(packet, tables);
    if exit.0 & Exit::TAGGED == 0 && packet.tags() == Tags::NONE {
        return exit;
    }
    vlan::exit(packet, tables, exit)
}

#[inline(always)]
fn network<P: Packet, T: Tables>(packet: &mut P, tables: &T) -> Exit {
    let Some(ethernet) = packet.header::<Ethernet>(0) else {
        return pass(Reason::Truncated);
    };
    match ethernet.ether_type {
        ether_type::IPV4 => family::<_, _, [u8; 4]>(packet, tables),
        ether_type::IPV6 => family::<_, _, [u8; 16]>(packet, tables),
        _ => pass(Reason::NotIp),
    }
}

/// An ICMP error is looked up by the packet that it quotes, everything else by its
/// own addresses.
#[inline(always)]
fn family<P: Packet, T: Tables + FamilyTables<A>, A: Network>(packet: &mut P, tables: &T) -> Exit {
    let exit = read::<P, T, A>(packet, tables);
    if exit.0 != Exit::GO_ON.0 {
        return exit;
    }
    let segment: &Segment<A> = tables.kept();
    if segment.protocol == A::ICMP && segment.part == part::WHOLE {
        return errors::translate::<P, T, A>(packet, tables, segment);
    }
    match segment.part {
        part::WHOLE => {}
        part::FIRST => fragments::begin(tables),
        _ => return fragments::follow(packet, tables, segment),
    }
    let exit = whose::<P, T, A>(packet, tables, segment);
    if tables.listens() {
        exchange::overhear(packet, tables, segment, exit);
    }
    if segment.part == part::FIRST {
        return fragments::remember(packet, tables, segment, exit);
    }
    exit
}

/// Parses the packet, and keeps what it says.
#[inline(never)]
fn read<P: Packet, T: FamilyTables<A>, A: Network>(packet: &P, tables: &T) -> Exit {
    match parse::segment::<P, A>(packet) {
        Ok(segment) => {
            tables.keep(segment);
            Exit::GO_ON
        }
        Err(reason) => pass(reason),
    }
}

/// Asks both lookup tables whose packet it is.
#[inline(never)]
fn whose<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
) -> Exit {
    let to = Endpoint::new(
        segment.destination,
        segment.destination_port,
        segment.protocol,
    );
    if let Some(listener) = tables.listener(&to) {
        return forward(packet, tables, segment, listener).unheard_if(listener.is_preview());
    }
    let reply = Reply::of(segment);
    let Some(path) = tables.return_path(&reply.from()) else {
        return pass(Reason::NotOurs);
    };
    let preview = preview(tables, &reply, path);
    let exit = back(packet, tables, segment, preview.unwrap_or(path));
    exit.unheard_if(preview.is_some())
}

// ---- client -> service ----------------------------------------------------

/// What is decided about a client's packet.
enum Forward {
    /// To this backend.
    To {
        backend: u32,
        colour: Colour,
        reason: Reason,
        via: u16,
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
        return errors::expired(packet, segment);
    }
    let Some(word) = tables.word(listener.service) else {
        return drop(Reason::Inconsistent);
    };
    tables.seek(&FlowKey::new(
        segment.source.client(),
        segment.source_port,
        listener.id,
    ));
    let now = tables.tick();
    let decision = if segment.protocol == UDP {
        forward_udp(tables, listener, word, now)
    } else {
        forward_tcp(packet, tables, segment, listener, word, now)
    };
    let (backend, colour, reason, via) = match decision {
        Forward::To {
            backend,
            colour,
            reason,
            via,
        } => (backend, colour, reason, via),
        Forward::Reset { colour } => {
            let of = (listener.service, colour, word);
            return resets::sender(packet, tables, segment, of, Reason::ResetClient);
        }
        Forward::New(reason) => match newcomer(packet, tables, segment, &listener, word).get() {
            Some((backend, colour, remember)) => {
                let table = if segment.protocol == UDP {
                    FlowTable::Udp
                } else {
                    FlowTable::HalfOpen
                };
                let via = match listener.forward {
                    // Without an entry nothing would come back.
                    mode::SNAT
                        if !remember || !borrow(tables, table, now) || !tables.remember(table) =>
                    {
                        return drop(Reason::NoPort);
                    }
                    mode::SNAT => tables.pending().via.get(),
                    mode::DSR => via::DSR,
                    _ => via::NAT,
                };
                if remember && listener.forward != mode::SNAT {
                    tables.remember(table);
                }
                (backend, colour, reason, via)
            }
            None => return drop(Reason::NoBackend),
        },
    };

    // A slot that was given back, or to another service, is nobody's backend.
    let Some(backend) = tables.backend(backend).filter(|backend| {
        u32::from(backend.service) == listener.service && backend.family == A::FAMILY
    }) else {
        return drop(Reason::Inconsistent);
    };
    let listener_end = (segment.destination, segment.destination_port);
    let (address, port) = end_of(backend, via, listener_end);
    let out = Out {
        hop: NextHop(backend.next_hop),
        side: Side::Destination,
        address,
        port,
        block: u32::from(backend.block),
        via,
        reason,
    };
    let exit = send(packet, tables, segment, &out);
    if exit.is_sent() {
        tables.record(listener.service, colour, |stats| {
            stats.forward_packets += 1;
            stats.forward_bytes += u64::from(segment.length);
        });
        if segment.part == part::FIRST {
            fragments::plan(tables, &out, now, (listener.service, colour));
        }
    }
    exit
}

#[inline(always)]
fn forward_udp<T: Tables>(tables: &T, listener: Listener, word: CutoverWord, now: u32) -> Forward {
    match flow_of(tables, FlowTable::Udp, listener.service, now) {
        Some(flow) if !flow.is_reset(word) => {
            if flow.proof.get() != listener.idle {
                flow.proof.set(listener.idle); // as the configuration says now
            }
            touch(flow, &flow.from_client, now);
            Forward::To {
                backend: flow.backend.get(),
                colour: flow.colour(),
                reason: Reason::Forwarded,
                via: flow.via.get(),
            }
        }
        _ => Forward::New(Reason::ForwardedNew),
    }
}

#[inline(always)]
fn forward_tcp<P: Packet, T: Tables, A>(
    packet: &P,
    tables: &T,
    segment: &Segment<A>,
    listener: Listener,
    word: CutoverWord,
    now: u32,
) -> Forward {
    if segment.opens() {
        tables.expect_half_open();
    }
    let mut known = flow_of(tables, FlowTable::Established, listener.service, now);
    // A SYN takes the word's colour, whatever the tuple did before. An old flow
    // of the tuple stays until the new one is proven.
    if segment.opens() {
        if let Some(old) = known {
            old.from_client.add(bits::CONTESTED);
        }
        return Forward::New(Reason::ForwardedNew);
    }
    // The half-open table matters to flows that are not proven yet, and to an
    // old flow whose tuple a new SYN has taken up.
    let mut reason = Reason::Forwarded;
    if known.is_none_or(|flow| flow.from_client.has(bits::CONTESTED)) {
        match flow_of(tables, FlowTable::HalfOpen, listener.service, now) {
            Some(half) if proves(half, segment) => {
                half.seen.set(now);
                if !keeps_its_port(tables, half) {
                    return Forward::New(Reason::ForwardedOrphan);
                }
                if promote(tables, half) {
                    half.from_client.add(bits::MOVED);
                } else {
                    half.from_client.add(bits::PROVEN);
                    reason = Reason::ForwardedTableFull;
                }
                known = Some(half);
            }
            Some(half) => known = known.or(Some(half)),
            None => {
                if let Some(flow) = known {
                    flow.from_client.remove(bits::CONTESTED);
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
        flow.from_client.add(bits::RST);
        return Forward::Reset { colour };
    }
    if rst {
        // Out of the backend's window it closes nothing, there or here.
        if segment.tcp.sequence.wrapping_sub(flow.client_next.get()) <= RESET_WINDOW {
            flow.from_client.add(bits::RST);
        }
    } else {
        if segment.has(tcp_flag::ACK) && flow.backend_next.get() != segment.tcp.acknowledgement {
            flow.backend_next.set(segment.tcp.acknowledgement);
        }
        if segment.has(tcp_flag::FIN) {
            flow.from_client.add(bits::FIN);
        }
        if flow.via.get() == via::DSR {
            unheard(flow, segment);
        }
        touch(flow, &flow.from_client, now);
    }
    if flow.from_backend.has(bits::LEARNED) {
        flow.client_hop.set(sender(packet, tables).0);
    }
    Forward::To {
        backend: flow.backend.get(),
        colour,
        reason,
        via: flow.via.get(),
    }
}

/// Where packets for a listener go: to the backend, on the listener's port unless it
/// has one of its own, and in `dsr` to the listener's own address.
#[inline(always)]
pub(crate) fn end_of<A: Network>(
    backend: &Backend,
    via: u16,
    (address, port): (A, [u8; 2]),
) -> (A, [u8; 2]) {
    if via == via::DSR {
        (address, port)
    } else if backend.port == [0, 0] {
        (A::from_wide(&backend.address), port)
    } else {
        (A::from_wide(&backend.address), backend.port)
    }
}

/// Notes of a flow whose backend is never heard here what its client's segment says
/// of both: the client answers a SYN-ACK, and would not go on after both FINs.
#[inline(always)]
fn unheard<A>(flow: &FlowCell, segment: &Segment<A>) {
    flow.client_next.set(segment.tcp.sequence);
    if segment.has(tcp_flag::ACK) {
        flow.from_client.add(bits::PROVEN);
    }
    if segment.has(tcp_flag::FIN) {
        flow.from_backend.add(bits::FIN);
    }
}

/// Lends the pending flow, which `table` is to hold, a port of the gateway's own;
/// false when none is to be had. A SYN that is sent again keeps its port.
#[inline(always)]
fn borrow<T: Tables>(tables: &T, table: FlowTable, now: u32) -> bool {
    let pending = tables.pending();
    let Some(backend) = tables.backend(pending.backend.get()) else {
        return false;
    };
    let block = u32::from(backend.block);
    let held = current(tables, table, now)
        .filter(|flow| flow.backend.get() == pending.backend.get())
        .map_or(via::NAT, |flow| flow.via.get());
    let port = if via::is_port(held) {
        held
    } else if block == 0 {
        return false;
    } else {
        tables.lend(block, table)
    };
    pending.via.set(port);
    port != 0
}

/// A remembered flow of this service that is not over. One of another service is
/// left from a listener that had the same id before.
#[inline(always)]
fn flow_of<T: Tables>(tables: &T, table: FlowTable, service: u32, now: u32) -> Option<&FlowCell> {
    current(tables, table, now).filter(|flow| u32::from(flow.service.get()) == service)
}

/// A remembered flow that is not over. One without proof may have lost its port to
/// another one: it is over, too.
#[inline(always)]
pub(crate) fn current<T: Tables>(tables: &T, table: FlowTable, now: u32) -> Option<&FlowCell> {
    // TCP's shortest patience is known without a look at the flow.
    let fresh = match table {
        FlowTable::Established => CLOSING,
        FlowTable::HalfOpen | FlowTable::Udp => 0,
    };
    tables.flow(table).filter(|flow| {
        let moved = (flow.from_client.get() | flow.from_backend.get()) & bits::MOVED != 0;
        if table == FlowTable::HalfOpen && moved {
            return false;
        }
        let over = now.wrapping_sub(flow.seen.get()) > fresh && flow.is_over(table, now);
        !over && (table == FlowTable::Established || has_its_port(tables, flow))
    })
}

/// True unless the flow has a port of the gateway's own no longer.
#[inline(always)]
fn has_its_port<T: Tables>(tables: &T, flow: &FlowCell) -> bool {
    let Some(index) = snat::index(flow.via.get()) else {
        return true;
    };
    tables
        .backend(flow.backend.get())
        .is_some_and(|backend| tables.has_port(u32::from(backend.block), index))
}

/// True for the acknowledgement that only a host which got the backend's
/// SYN-ACK can send.
#[inline(always)]
fn proves<A>(half: &FlowCell, segment: &Segment<A>) -> bool {
    half.from_backend.has(bits::ANSWERED)
        && segment.has(tcp_flag::ACK)
        && !segment.has(tcp_flag::RST)
        && segment.tcp.acknowledgement == half.proof.get()
}

/// Keeps the port that a flow was lent, now that the flow is proven; false when it went
/// to another flow in this moment.
#[inline(always)]
fn keeps_its_port<T: Tables>(tables: &T, half: &FlowCell) -> bool {
    let Some(index) = snat::index(half.via.get()) else {
        return true;
    };
    // First proven, then kept: who takes ports away looks at both the other way round.
    half.from_client.add(bits::PROVEN);
    let block = tables.backend(half.backend.get()).map_or(0, |b| b.block);
    tables.keep_port(u32::from(block), index)
}

/// Copies a proven flow into the established table. Its half-open entry is left to
/// whoever needs the line, marked by the caller: no flow is ever without an entry.
/// False when the table is full.
#[inline(always)]
fn promote<T: Tables>(tables: &T, half: &FlowCell) -> bool {
    let flow = tables.pending();
    flow.copy(half);
    flow.from_client.remove(bits::ORPHAN | bits::PROVEN);
    flow.from_backend.remove(bits::ANSWERED | bits::PROVEN);
    tables.remember(FlowTable::Established)
}

/// Notes that a flow lives, by a packet of the side whose bits these are; after a
/// RST only once that has had its time.
#[inline(always)]
fn touch(flow: &FlowCell, side: &Cell<u8>, now: u32) {
    let seen = flow.seen.get();
    if seen == now {
        return;
    }
    if (flow.from_client.get() | flow.from_backend.get()) & bits::RST != 0 {
        if now.wrapping_sub(seen) <= REVIVE_TICKS {
            return;
        }
        side.remove(bits::RST);
    }
    flow.seen.set(now);
}

/// The next hop that the packet came from.
#[inline(always)]
fn sender<P: Packet, T: Tables>(packet: &P, tables: &T) -> NextHop {
    match (tables.slot(&packet.port()), packet.header::<Ethernet>(0)) {
        (Some(slot), Some(ethernet)) => NextHop::new(ethernet.source, slot as u16),
        _ => NextHop::NONE,
    }
}

/// Where a new flow goes, as a BPF function can return it: backend id in the low
/// half, above it the colour and whether the pending flow is to be remembered.
#[derive(Clone, Copy)]
#[repr(transparent)]
struct Chosen(u64);

impl Chosen {
    /// The pool is empty.
    const NOBODY: Self = Self(u64::MAX);

    #[inline(always)]
    const fn new(backend: u32, colour: Colour, remember: bool) -> Self {
        Self((remember as u64) << 33 | (colour as u64) << 32 | backend as u64)
    }

    #[inline(always)]
    const fn get(self) -> Option<(u32, Colour, bool)> {
        if self.0 == Self::NOBODY.0 {
            return None;
        }
        let colour = Colour::from_bit((self.0 >> 32) as u8);
        Some((self.0 as u32, colour, self.0 >> 33 & 1 != 0))
    }
}

/// Chooses for a new flow, the colour by the word and the backend by the pool, and
/// writes down what the caller is to remember: this stack and that of remembering do
/// not fit together.
#[inline(never)]
fn newcomer<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &P,
    tables: &T,
    segment: &Segment<A>,
    listener: &Listener,
    word: CutoverWord,
) -> Chosen {
    let client = segment.source.hash();
    let colour = listener.colour_for(word, client as u32);
    let flow_hash = mix(client ^ u64::from(u16::from_ne_bytes(segment.source_port)));
    let pool = tables.pool(PoolWord::index(listener.service, colour, A::V6));
    let slot = pool.slot((flow_hash >> 32) as u32);
    let Some(backend) = slot.and_then(|slot| tables.maglev(slot)) else {
        return Chosen::NOBODY;
    };

    let orphan = segment.protocol != UDP && !segment.opens();
    // A segment that asks for no answer proves nothing later.
    let remember = !segment.has(tcp_flag::RST) && (!orphan || segment.has(tcp_flag::ACK));
    if remember {
        let now = tables.tick();
        tables.pending().set(&Flow {
            client_hop: sender(packet, tables).0,
            backend,
            seen: now,
            proof: if segment.protocol == UDP {
                listener.idle
            } else {
                0
            },
            service: listener.service as u16,
            via: if listener.forward == mode::DSR {
                via::DSR
            } else {
                via::NAT
            },
            client_next: segment.tcp.sequence,
            backend_next: segment.tcp.acknowledgement,
            generation: word.generation(),
            // The first packet back looks the route up.
            routed: (now as u16).wrapping_sub(ROUTE_TICKS + 1),
            colour_spread: colour_spread(colour, flow_hash),
            from_client: if orphan { bits::ORPHAN } else { 0 },
            from_backend: 0,
            zero: 0,
        });
    }
    if !orphan && !listener.is_preview() {
        begin(tables, listener.service, colour, word);
    }
    Chosen::new(backend, colour, remember)
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

/// The device that the packet came in by, in the eyes of the routes.
#[inline(always)]
fn device<P: Packet, T: Tables>(packet: &P, tables: &T) -> u32 {
    if packet.tags() == Tags::NONE {
        return packet.ingress();
    }
    let slot = tables.slot(&packet.port());
    slot.and_then(|slot| tables.interface(slot))
        .map_or(packet.ingress(), |interface| interface.device)
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
    let service = u32::from(path.service);
    let Some(word) = tables.word(service) else {
        return drop(Reason::Inconsistent);
    };
    let own = (segment.destination, segment.destination_port);
    let via = seek_client(tables, own, path);
    let now = tables.tick();
    let decision = if segment.protocol == UDP {
        back_udp(tables, segment, word, now, via)
    } else {
        back_tcp(tables, segment, word, (now, via), packet.port())
    };
    let flow = match decision {
        Back::Leave(exit) => return exit,
        Back::ResetBackend(colour) => {
            let of = (service, colour, word);
            return resets::sender(packet, tables, segment, of, Reason::ResetBackend);
        }
        Back::ResetClient(flow) => {
            return resets::receiver(packet, tables, segment, (path, word), flow);
        }
        Back::To(flow) => flow,
    };

    if segment.hops <= 1 {
        return errors::expired(packet, segment);
    }
    let address = A::from_wide(&path.address);
    let mut hop = NextHop(flow.client_hop.get());
    if (now as u16).wrapping_sub(flow.routed.get()) > ROUTE_TICKS {
        flow.routed.set(now as u16);
        let client = A::from_client(tables.sought().client);
        let routed = tables.route(&path.address, &client, device(packet, tables));
        if routed == NextHop::NONE {
            flow.from_backend.add(bits::LEARNED);
        } else {
            flow.from_backend.remove(bits::LEARNED);
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
        block: u32::from(path.block),
        via,
        reason: Reason::Returned,
    };
    let exit = send(packet, tables, segment, &out);
    if exit.is_sent() {
        tables.record(service, colour, |stats| {
            stats.return_packets += 1;
            stats.return_bytes += u64::from(segment.length);
        });
        if segment.part == part::FIRST {
            fragments::plan(tables, &out, now, (service, colour));
        }
    }
    exit
}

/// Seeks the flow that a backend's packet may belong to: by the port that its client
/// was lent, and where it was lent none, by the client that the packet is for.
/// Returns what [`Flow::via`] must then be.
#[inline(always)]
pub(crate) fn seek_client<T: Tables, A: Network>(
    tables: &T,
    (address, port): (A, [u8; 2]),
    path: &ReturnPath,
) -> u16 {
    let via = u16::from_be_bytes(port);
    if path.block != 0
        && let Some(index) = snat::index(via)
        && let Some(source) = tables.source(u32::from(path.block))
        && source.is_known()
        && A::from_wide(&source.address) == address
        && tables.seek_lessee(u32::from(path.block), index, path.listener)
    {
        return via;
    }
    tables.seek(&FlowKey::new(address.client(), port, path.listener));
    via::NAT
}

#[inline(always)]
fn back_udp<'a, T: Tables, A: Network>(
    tables: &'a T,
    segment: &Segment<A>,
    word: CutoverWord,
    now: u32,
    via: u16,
) -> Back<'a> {
    match current(tables, FlowTable::Udp, now).filter(|flow| flow.via.get() == via) {
        Some(flow) if flow.is_reset(word) => Back::Leave(drop(Reason::CutDropped)),
        Some(flow) if origin(tables, flow, segment, Port::default()) != Origin::Other => {
            touch(flow, &flow.from_backend, now);
            Back::To(flow)
        }
        Some(_) => Back::Leave(drop(Reason::ReturnStale)),
        None => Back::Leave(pass(Reason::ReturnUnknown)),
    }
}

#[inline(always)]
fn back_tcp<'a, T: Tables, A: Network>(
    tables: &'a T,
    segment: &Segment<A>,
    word: CutoverWord,
    (now, via): (u32, u16),
    ingress: Port,
) -> Back<'a> {
    let rst = segment.has(tcp_flag::RST);
    let known = |table| current(tables, table, now).filter(|flow| flow.via.get() == via);
    let established = known(FlowTable::Established);
    if let Some(flow) = established
        && !segment.has(tcp_flag::SYN)
        && let from @ (Origin::Backend | Origin::Claimed) = origin(tables, flow, segment, ingress)
    {
        if flow.is_reset(word) && !rst {
            // The client first, if it does not know yet; the backend with its
            // next segment.
            if flow.from_backend.has(bits::CLIENT_CUT) {
                return Back::ResetBackend(flow.colour());
            }
            flow.from_backend.add(bits::CLIENT_CUT | bits::RST);
            return Back::ResetClient(flow);
        }
        if from == Origin::Claimed {
            return Back::To(flow);
        }
        if rst {
            if segment.tcp.sequence.wrapping_sub(flow.backend_next.get()) <= RESET_WINDOW {
                flow.from_backend.add(bits::RST);
            }
        } else {
            if segment.has(tcp_flag::ACK) && flow.client_next.get() != segment.tcp.acknowledgement {
                flow.client_next.set(segment.tcp.acknowledgement);
            }
            if segment.has(tcp_flag::FIN) {
                flow.from_backend.add(bits::FIN);
            }
            touch(flow, &flow.from_backend, now);
        }
        return Back::To(flow);
    }

    let Some(half) = known(FlowTable::HalfOpen) else {
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
        half.from_backend.add(bits::RST);
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
        half.from_backend.add(bits::ANSWERED);
    } else if half.from_client.has(bits::ORPHAN) || segment.tcp.taken > 0 {
        // The backend knows this flow. Its bare acknowledgement proves that
        // only of an orphan: to a second, spoofed SYN a backend answers with
        // one too (RFC 9293, section 3.10.7.4), but it never sends data or a
        // FIN before the handshake is done.
        half.seen.set(now);
        if !keeps_its_port(tables, half) {
            return Back::Leave(drop(Reason::ReturnStale));
        }
        let noted = if promote(tables, half) {
            bits::MOVED
        } else {
            bits::PROVEN
        };
        half.from_backend.add(noted);
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
    ingress: Port,
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
        Some(interface) if interface.port() != ingress => Origin::Claimed,
        _ => Origin::Backend,
    }
}

// ---- out ------------------------------------------------------------------

/// How a packet leaves: what its one end becomes, and where it goes.
pub(crate) struct Out<A> {
    pub(crate) hop: NextHop,
    pub(crate) side: Side,
    pub(crate) address: A,
    pub(crate) port: [u8; 2],
    /// The backend's block of ports.
    pub(crate) block: u32,
    /// How the backend sees the client: [`Flow::via`].
    pub(crate) via: u16,
    reason: Reason,
}

impl<A> Out<A> {
    #[inline(always)]
    fn by_stack(&self) -> bool {
        by_stack(self.via, self.side)
    }
}

/// False when the stack could not send on what was rewritten: it takes no packet that
/// is from an address of its own, or for one.
#[inline(always)]
pub(crate) fn by_stack(via: u16, side: Side) -> bool {
    via == via::NAT || side == Side::Source
}

/// Rewrites one end of the packet, in `snat` both, and sends it to the next hop.
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
        None if out.by_stack() => None,
        None => return drop(Reason::ForwardUnreachable),
    };
    if let Some(small) = interface.filter(|interface| segment.length > interface.mtu) {
        match errors::too_big(packet, segment, small.mtu, out.by_stack()) {
            Some(exit) => return exit,
            None => interface = None,
        }
    }
    if via::is_port(out.via) {
        let done = match out.side {
            Side::Destination => hide_client(packet, tables, segment, out.block, out.via),
            Side::Source => reveal_client(packet, tables, segment),
        };
        if !done {
            return drop(Reason::ForwardUnreachable);
        }
    }
    let end = (out.address, out.port);
    if rewrite::end(packet, segment, out.side, end, interface.is_some()).is_none() {
        return drop(Reason::Inconsistent);
    }
    match interface {
        Some(interface) => leave(packet, out.hop, slot.unwrap_or(0), interface, out.reason),
        None => pass(Reason::ForwardedByStack),
    }
}

/// Puts the gateway's own address and a port of it in the client's place; false when
/// the address is not known.
#[inline(never)]
fn hide_client<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
    block: u32,
    via: u16,
) -> bool {
    let Some(source) = tables.source(block).filter(|source| source.is_known()) else {
        return false;
    };
    let end = (A::from_wide(&source.address), via.to_be_bytes());
    rewrite::end(packet, segment, Side::Source, end, false).is_some()
}

/// Puts the client back, whose flow was sought last.
#[inline(never)]
fn reveal_client<P: Packet, T: Tables, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
) -> bool {
    let key = tables.sought();
    let end = (A::from_client(key.client), key.port());
    rewrite::end(packet, segment, Side::Destination, end, false).is_some()
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
    let tagged = if interface.tags == Tags::NONE {
        0
    } else {
        Exit::TAGGED
    };
    let slot = u64::from(slot & 0x7fff) + 1;
    Exit(Exit::new(way, reason).0 | tagged | slot << 16)
}
