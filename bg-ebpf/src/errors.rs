//! ICMP and ICMPv6 errors: those of others, translated by the packet that they
//! quote, and our own.
//!
//! An error quotes the packet it is about, as its sender saw it. A client's side
//! saw the listener's address where we had put it; a backend's side saw the
//! backend's. Both the outer and the quoted addresses are rewritten, and every
//! checksum on the way (RFC 5508, section 7; RFC 4443).

use bg_common::{
    flow::{FlowKey, FlowTable},
    key::{Endpoint, UDP},
    reason::Reason,
    service::NextHop,
    snat::{Source, via},
};

use crate::{
    checksum::Delta,
    flows::FlowCell,
    packet::{ETHERNET, Ethernet, Icmp, Packet, Tcp},
    parse::Segment,
    pipeline::{Exit, current, drop, end_of, leave, pass, seek_client, transmit},
    preview::{Reply, is_with, preview},
    rewrite::{self, Network, Side},
    tables::{FamilyTables, Tables},
};

/// Length of an ICMP header, bytes.
const HEADER: usize = size_of::<Icmp>();
/// What an error quotes of TCP or UDP at the least (RFC 792): the ports, and
/// TCP's sequence number or UDP's length and checksum.
const QUOTED: usize = 8;

// ---- errors of others -----------------------------------------------------

/// The packet that an error is about.
pub struct Quote<A> {
    /// Where it came from, in the eyes of the error's sender.
    pub source: A,
    /// Its port there.
    pub source_port: [u8; 2],
    /// Where it went.
    pub destination: A,
    /// Its port there.
    pub destination_port: [u8; 2],
    /// [`bg_common::key::TCP`] or [`UDP`].
    pub protocol: u8,
    /// Offset of its TCP or UDP header in the frame.
    pub transport: usize,
}

/// What becomes of an error: both addresses, the port in the quote, the way out.
struct Translation<A> {
    /// The outer end that is rewritten; in the quote it is the other one.
    side: Side,
    /// What it becomes, with the port in the quote.
    end: (A, [u8; 2]),
    /// How the backend sees the client: see [`via`].
    via: u16,
    /// The backend's block of ports.
    block: u16,
    hop: NextHop,
    reason: Reason,
}

/// Translates an ICMP error if it is about a packet of a known flow; passes every
/// other one untouched.
#[inline(never)]
pub(crate) fn translate<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
) -> Exit {
    let at = segment.offset() + HEADER;
    let end = ETHERNET + segment.length as usize;
    let Some(quote) = A::quote(packet, at).filter(|quote| quote.transport + QUOTED <= end) else {
        return pass(Reason::IcmpError);
    };
    // An error goes to whoever sent what it is about.
    if quote.source != segment.destination {
        return pass(Reason::IcmpError);
    }
    let Some(translation) = find(tables, segment, &quote) else {
        return pass(Reason::IcmpError);
    };
    if segment.hops <= 1 {
        return pass(Reason::TtlExpired);
    }
    let Some(slot) = translation.hop.slot() else {
        return drop(Reason::ReturnUnreachable);
    };
    let interface = match tables.interface(u32::from(slot)) {
        Some(interface) if interface.ifindex != 0 => interface,
        _ => return drop(Reason::Inconsistent),
    };
    let hidden = via::is_port(translation.via);
    let source = tables.source(u32::from(translation.block));
    if hidden && !source.is_some_and(Source::is_known) {
        return drop(Reason::ForwardUnreachable);
    }
    let side = translation.side;
    let edit = Edit::new(side, translation.end, Edit::<A>::ROUTED);
    if !rewrite_error(packet, segment, &edit) {
        return drop(Reason::Inconsistent);
    }
    // Sent back to where it came from, it would meet the router that made it,
    // which takes nothing from its own address: it then comes from the client.
    let back = interface.port() == packet.port() && side == Side::Destination;
    if back || hidden {
        let Some(end) = other_end(tables, &quote, &translation) else {
            return drop(Reason::Inconsistent);
        };
        let outer = if back || side == Side::Source {
            Edit::<A>::ADDRESS
        } else {
            Edit::<A>::NONE
        };
        let edit = Edit::new(side.other(), end, outer);
        if !rewrite_error(packet, segment, &edit) {
            return drop(Reason::Inconsistent);
        }
    }
    leave(
        packet,
        translation.hop,
        u32::from(slot),
        interface,
        translation.reason,
    )
}

/// Which flow the quoted packet belongs to, and so where the error goes.
#[inline(always)]
fn find<T: Tables + FamilyTables<A>, A: Network>(
    tables: &T,
    segment: &Segment<A>,
    quote: &Quote<A>,
) -> Option<Translation<A>> {
    let (source_port, destination_port) = (quote.source_port, quote.destination_port);
    // About a packet that we sent a client: to the backend it was from.
    let sender = Endpoint::new(quote.source, source_port, quote.protocol);
    if let Some(listener) = tables.listener(&sender) {
        let key = FlowKey::new(quote.destination.client(), destination_port, listener.id);
        tables.seek(&key);
        // One of another service is left from a listener that had the same id before.
        let flow = remembered(tables, quote.protocol, |flow| {
            u32::from(flow.service.get()) == listener.service
        })?;
        let backend = tables.backend(flow.backend.get())?;
        if u32::from(backend.service) != listener.service || backend.family != A::FAMILY {
            return None;
        }
        let via = flow.via.get();
        return Some(Translation {
            side: Side::Destination,
            end: end_of(backend, via, (quote.source, source_port)),
            via,
            block: backend.block,
            hop: NextHop(backend.next_hop),
            reason: Reason::ForwardedError,
        });
    }
    // About a packet that we sent a backend: to the client it was from. Its
    // sender becomes the listener: a router's private address would tell the
    // client nothing, and its own routers might refuse it.
    let reply = Reply {
        backend: quote.destination,
        to: segment.destination,
        backend_port: destination_port,
        port: source_port,
        protocol: quote.protocol,
    };
    let path = tables.return_path(&reply.from())?;
    let path = preview(tables, &reply, path).unwrap_or(path);
    let via = seek_client(tables, (reply.to, reply.port), path);
    // A tuple that was taken up again has two flows, which may have two backends.
    let flow = remembered(tables, quote.protocol, |flow| {
        is_with(tables, flow, quote.destination, via)
    })?;
    Some(Translation {
        side: Side::Source,
        end: (A::from_wide(&path.address), path.port),
        via,
        block: path.block,
        hop: NextHop(flow.client_hop.get()),
        reason: Reason::ReturnedError,
    })
}

/// The sought flow, if it `fits`: an established one before one that is none yet.
#[inline(always)]
fn remembered<T: Tables>(
    tables: &T,
    protocol: u8,
    fits: impl Fn(&FlowCell) -> bool,
) -> Option<&FlowCell> {
    let now = tables.tick();
    let known = |table| current(tables, table, now).filter(|flow| fits(flow));
    if protocol == UDP {
        return known(FlowTable::Udp);
    }
    known(FlowTable::Established).or_else(|| known(FlowTable::HalfOpen))
}

/// The end of the quote that is the client: itself, or in `snat` the gateway's own
/// address and port where the backend's side looks, and the client where its own does.
#[inline(always)]
fn other_end<T: Tables, A: Network>(
    tables: &T,
    quote: &Quote<A>,
    to: &Translation<A>,
) -> Option<(A, [u8; 2])> {
    if !via::is_port(to.via) {
        return Some((quote.destination, quote.destination_port));
    }
    if to.side == Side::Source {
        let client = tables.sought();
        return Some((A::from_client(client.client), client.port()));
    }
    let source = tables.source(u32::from(to.block))?;
    Some((A::from_wide(&source.address), to.via.to_be_bytes()))
}

/// What is rewritten of an error. Aligned like the stores that the compiler makes of
/// an address, two words at a time.
#[repr(C, align(8))]
struct Edit<A> {
    /// What the end becomes.
    address: A,
    /// And its port, in the quote.
    port: [u8; 2],
    /// The outer end; in the quote it is the other one.
    side: Side,
    /// What of the outer header is rewritten.
    outer: u32,
}

impl<A> Edit<A> {
    const NONE: u32 = 0;
    const ADDRESS: u32 = 1;
    /// That, and the TTL or hop limit.
    const ROUTED: u32 = 2;

    #[inline(always)]
    fn new(side: Side, (address, port): (A, [u8; 2]), outer: u32) -> Self {
        Self {
            address,
            port,
            side,
            outer,
        }
    }
}

/// Rewrites one end of an error, outside and in the quote, and its checksums.
#[inline(never)]
fn rewrite_error<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    edit: &Edit<A>,
) -> bool {
    requote(packet, segment, edit)
        .and_then(|quote| readdress(packet, segment, edit, quote))
        .is_some()
}

/// Rewrites an error's outer end, `quote` being what changed in its quote.
#[inline(always)]
fn readdress<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    edit: &Edit<A>,
    quote: Delta,
) -> Option<()> {
    let mut changed = quote;
    if edit.outer != Edit::<A>::NONE {
        let hop = edit.outer == Edit::<A>::ROUTED;
        let outer = A::readdress(packet, ETHERNET, edit.side, edit.address, hop)?;
        if A::V6 {
            changed = changed.and(outer);
        }
    }
    let icmp = packet.header_mut::<Icmp>(segment.offset())?;
    icmp.check = changed.apply(icmp.check);
    Some(())
}

/// Rewrites address and port of one end of the quote. Returns what changed for the
/// checksum over it.
#[inline(always)]
fn requote<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    edit: &Edit<A>,
) -> Option<Delta> {
    let (side, address, port) = (edit.side.other(), edit.address, edit.port);
    let at = segment.offset() + HEADER;
    let end = ETHERNET + segment.length as usize;
    let Quote {
        transport,
        protocol,
        ..
    } = A::quote(packet, at)?;
    let before = A::header_check(packet, at)?;
    let delta = A::readdress(packet, at, side, address, false)?;
    let after = A::header_check(packet, at)?;
    let ports = if protocol == UDP || transport + size_of::<Tcp>() <= end {
        rewrite::transport(packet, transport, protocol, side, port, delta)?
    } else {
        // TCP without its checksum.
        rewrite::port(packet, transport, side, port)?
    };
    Some(delta.and(ports).word(before, after))
}

// ---- our own --------------------------------------------------------------

/// Answers a packet that is too big for the interface it would leave by. `None`
/// where routers may split it: the stack does, if it can.
#[inline(always)]
pub(crate) fn too_big<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    mtu: u32,
    by_stack: bool,
) -> Option<Exit> {
    if by_stack && A::may_fragment(packet) {
        return None;
    }
    let (sent, passed) = (Reason::SentTooBig, Reason::TooBig);
    Some(answer(packet, segment, mtu, sent, passed))
}

/// Answers a packet whose TTL or hop limit is used up.
#[inline(always)]
pub(crate) fn expired<P: Packet, A: Network>(packet: &mut P, segment: &Segment<A>) -> Exit {
    let (sent, passed) = (Reason::SentTimeExceeded, Reason::TtlExpired);
    answer(packet, segment, 0, sent, passed)
}

#[inline(always)]
fn answer<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    mtu: u32,
    sent: Reason,
    passed: Reason,
) -> Exit {
    if make(packet, segment, mtu) {
        transmit(sent)
    } else {
        pass(passed)
    }
}

/// Puts an error in front of the packet and cuts off what it does not quote:
/// "too big" with the MTU, or "time exceeded" where that is 0. It comes from the
/// address that the packet was for. False, and the packet is as it was, where
/// options are in the way: the quote would have another length.
#[inline(never)]
fn make<P: Packet, A: Network>(packet: &mut P, segment: &Segment<A>, mtu: u32) -> bool {
    let Some(ethernet) = packet.header::<Ethernet>(0).copied() else {
        return false;
    };
    let front = A::HEADER + HEADER;
    if segment.offset() != ETHERNET + A::HEADER || !packet.grow(front) {
        return false;
    }
    write(packet, &ethernet, segment, mtu).is_some()
}

#[inline(always)]
fn write<P: Packet, A: Network>(
    packet: &mut P,
    ethernet: &Ethernet,
    segment: &Segment<A>,
    mtu: u32,
) -> Option<()> {
    let at = ETHERNET + A::HEADER + HEADER;
    let quoted = A::HEADER + QUOTED;
    if !packet.truncate(at + quoted) {
        return None;
    }
    *packet.header_mut::<Ethernet>(0)? = Ethernet {
        destination: ethernet.source,
        source: ethernet.destination,
        ether_type: ethernet.ether_type,
    };
    let length = (HEADER + quoted) as u8;
    let pseudo = A::write_header(packet, segment.destination, segment.source, A::ICMP, length)?;
    let (kind, code) = if mtu == 0 {
        A::TIME_EXCEEDED
    } else {
        A::TOO_BIG
    };
    let rest = mtu.to_be_bytes();
    let quote = A::quoted_sum(packet, at)?;
    let sum = if A::V6 { quote.and(pseudo) } else { quote };
    let check = sum.word([kind, code]).word32(rest).finish();
    *packet.header_mut::<Icmp>(ETHERNET + A::HEADER)? = Icmp {
        kind,
        code,
        check,
        rest,
    };
    Some(())
}
