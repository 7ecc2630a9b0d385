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
    service::{NextHop, ReturnPath},
};

use crate::{
    flows::FlowCell,
    packet::{ETHERNET, Ethernet, Icmp, Packet, Tcp},
    parse::Segment,
    pipeline::{Exit, current, drop, leave, pass, transmit},
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
    /// Where it went.
    pub destination: A,
    /// [`bg_common::key::TCP`] or [`UDP`].
    pub protocol: u8,
    /// Offset of its TCP or UDP header in the frame.
    pub transport: usize,
}

/// What becomes of an error: both addresses, the port in the quote, the way out.
struct Translation<A> {
    /// The outer end that is rewritten; in the quote it is the other one.
    side: Side,
    address: A,
    port: [u8; 2],
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
    let Some(translation) = find(packet, tables, segment, &quote) else {
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
    // Sent back to where it came from, it would meet the router that made it,
    // which takes nothing from its own address: it then comes from the client.
    let back = interface.port() == packet.port() && translation.side == Side::Destination;
    if rewrite_error(packet, segment, at, end, &quote, &translation, back).is_none() {
        return drop(Reason::Inconsistent);
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
fn find<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &P,
    tables: &T,
    segment: &Segment<A>,
    quote: &Quote<A>,
) -> Option<Translation<A>> {
    let [a, b, c, d] = *packet.header::<[u8; 4]>(quote.transport)?;
    let (source_port, destination_port) = ([a, b], [c, d]);
    // About a packet that we sent a client: to the backend it was from.
    let sender = Endpoint::new(quote.source, source_port, quote.protocol);
    if let Some(listener) = tables.listener(&sender) {
        let key = FlowKey::new(quote.destination.client(), destination_port, listener.id);
        tables.seek(&key);
        let flow = remembered(tables, quote.protocol)?;
        let backend = tables.backend(flow.backend.get())?;
        if backend.service != listener.service || backend.family != A::FAMILY {
            return None;
        }
        let port = if backend.port == [0, 0] {
            source_port
        } else {
            backend.port
        };
        return Some(Translation {
            side: Side::Destination,
            address: A::from_wide(&backend.address),
            port,
            hop: NextHop(backend.next_hop),
            reason: Reason::ForwardedError,
        });
    }
    // About a packet that we sent a backend: to the client it was from. Its
    // sender becomes the listener: a router's private address would tell the
    // client nothing, and its own routers might refuse it.
    let receiver = Endpoint::new(quote.destination, destination_port, quote.protocol);
    let path: &ReturnPath = tables.return_path(&receiver)?;
    let key = FlowKey::new(segment.destination.client(), source_port, path.listener);
    tables.seek(&key);
    let flow = remembered(tables, quote.protocol)?;
    let backend = tables.backend(flow.backend.get())?;
    if A::from_wide(&backend.address) != quote.destination {
        return None;
    }
    Some(Translation {
        side: Side::Source,
        address: A::from_wide(&path.address),
        port: path.port,
        hop: NextHop(flow.client_hop.get()),
        reason: Reason::ReturnedError,
    })
}

#[inline(always)]
fn remembered<T: Tables>(tables: &T, protocol: u8) -> Option<&FlowCell> {
    let now = tables.tick();
    if protocol == UDP {
        return current(tables, FlowTable::Udp, now);
    }
    match current(tables, FlowTable::Established, now) {
        None => current(tables, FlowTable::HalfOpen, now),
        known => known,
    }
}

/// Rewrites the outer address, with `back` the other one too, and address and port
/// of the quote at `at`; the packet ends at `end`.
#[inline(always)]
fn rewrite_error<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    at: usize,
    end: usize,
    quote: &Quote<A>,
    to: &Translation<A>,
    back: bool,
) -> Option<()> {
    let mut outer = A::readdress(packet, ETHERNET, to.side, to.address, true)?;
    if back {
        let source = A::readdress(packet, ETHERNET, Side::Source, quote.destination, false)?;
        outer = outer.and(source);
    }
    let before = A::header_check(packet, at)?;
    let address = A::readdress(packet, at, to.side.other(), to.address, false)?;
    let after = A::header_check(packet, at)?;
    let whole = quote.protocol == UDP || quote.transport + size_of::<Tcp>() <= end;
    let transport = if whole {
        rewrite::transport(
            packet,
            quote.transport,
            quote.protocol,
            to.side.other(),
            to.port,
            address,
        )?
    } else {
        // TCP without its checksum.
        rewrite::port(packet, quote.transport, to.side.other(), to.port)?
    };
    let mut changed = address.and(transport).word(before, after);
    if A::V6 {
        changed = changed.and(outer);
    }
    let icmp = packet.header_mut::<Icmp>(segment.offset())?;
    icmp.check = changed.apply(icmp.check);
    Some(())
}

// ---- our own --------------------------------------------------------------

/// Answers a packet that is too big for the interface it would leave by. `None`
/// where routers may split it: the stack does.
#[inline(always)]
pub(crate) fn too_big<P: Packet, A: Network>(
    packet: &mut P,
    segment: &Segment<A>,
    mtu: u32,
) -> Option<Exit> {
    if A::may_fragment(packet) {
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
