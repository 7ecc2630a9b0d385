//! Packets in fragments: the first one has the ports, and is looked up like a whole
//! packet; the later ones follow it.
//!
//! Only addresses and ports change, and both are in what the first fragment shows:
//! the checksum over the whole packet, which lies there too, stays right (RFC 1624).

use bg_common::{
    abi::FRAGMENT_TICKS,
    key::FragmentKey,
    reason::Reason,
    service::{Colour, Fragment, NextHop, way},
    snat::via,
};

use crate::{
    packet::{ETHERNET, Packet},
    parse::Segment,
    pipeline::{Exit, Out, by_stack, drop, leave, pass},
    rewrite::{Network, Side},
    tables::{FamilyTables, Tables},
};

/// Before a first fragment is looked up: as long as nobody sends it on, the later
/// ones go nowhere.
#[inline(never)]
pub(crate) fn begin<T: Tables>(tables: &T) {
    tables.plan(Fragment {
        seen: tables.tick(),
        ..Fragment::default()
    });
}

/// A first fragment is sent on: the later ones go the same way.
#[inline(never)]
pub(crate) fn plan<T: Tables, A: Network>(
    tables: &T,
    out: &Out<A>,
    seen: u32,
    (service, colour): (u32, Colour),
) {
    let forward = out.side == Side::Destination;
    let other = if !via::is_port(out.via) {
        [0; 16]
    } else if forward {
        tables.source(out.block).map_or([0; 16], |s| s.address)
    } else {
        A::from_client(tables.sought().client).wide()
    };
    tables.plan(Fragment {
        next_hop: out.hop.0,
        address: out.address.wide(),
        other,
        seen,
        service,
        colour: colour as u32,
        way: if forward { way::FORWARD } else { way::BACK },
        via: out.via,
    });
}

/// After a first fragment was looked up: remembers what it was planned that the later
/// ones do. Those of a packet that the stack got as it came have nobody to follow.
#[inline(never)]
pub(crate) fn remember<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &P,
    tables: &T,
    segment: &Segment<A>,
    exit: Exit,
) -> Exit {
    let key = key(packet, segment);
    if exit.is_untouched() {
        if tables.fragment(&key).is_some() {
            // Of an older packet with the same identification: nobody's any more.
            tables.plan(Fragment {
                seen: tables.tick().wrapping_sub(FRAGMENT_TICKS + 1),
                ..Fragment::default()
            });
            tables.remember_fragment(&key, tables.planned());
        }
        return exit;
    }
    if exit.is_cut() {
        tables.plan(Fragment {
            seen: tables.tick(),
            way: way::CUT,
            ..Fragment::default()
        });
    }
    tables.remember_fragment(&key, tables.planned());
    exit
}

#[inline(always)]
fn key<P: Packet, A: Network>(packet: &P, segment: &Segment<A>) -> FragmentKey<A> {
    FragmentKey {
        vlan: packet.port().vlan,
        identification: segment.identification,
        protocol: A::fragments_of(segment.protocol),
        source: segment.source,
        destination: segment.destination,
    }
}

/// A later fragment: where the first one went. Nobody is told of one that cannot go
/// there (RFC 1122, section 3.2.2).
#[inline(never)]
pub(crate) fn follow<P: Packet, T: Tables + FamilyTables<A>, A: Network>(
    packet: &mut P,
    tables: &T,
    segment: &Segment<A>,
) -> Exit {
    let now = tables.tick();
    let Some(first) = tables
        .fragment(&key(packet, segment))
        .filter(|first| now.wrapping_sub(first.seen) <= FRAGMENT_TICKS)
    else {
        return pass(Reason::Fragment);
    };
    let (side, reason) = match first.way {
        way::NOWHERE => return drop(Reason::FragmentDropped),
        way::CUT => return drop(Reason::CutDropped),
        way::FORWARD => (Side::Destination, Reason::ForwardedFragment),
        _ => (Side::Source, Reason::ReturnedFragment),
    };
    if segment.hops <= 1 {
        return pass(Reason::TtlExpired);
    }
    let hop = NextHop(first.next_hop);
    let slot = hop.slot().map(u32::from);
    let mut interface = match slot.map(|slot| tables.interface(slot)) {
        Some(Some(interface)) if interface.ifindex != 0 => Some(interface),
        Some(_) => return drop(Reason::Inconsistent),
        None => None,
    };
    let by_stack = by_stack(first.via, side);
    if interface.is_none() && !by_stack {
        return drop(Reason::FragmentDropped);
    }
    if interface.is_some_and(|interface| segment.length > interface.mtu) {
        if !by_stack || !A::may_fragment(packet) {
            return drop(Reason::FragmentDropped);
        }
        interface = None;
    }
    let address = A::from_wide(&first.address);
    if A::readdress(packet, ETHERNET, side, address, interface.is_some()).is_none() {
        return drop(Reason::Inconsistent);
    }
    if via::is_port(first.via) {
        let other = A::from_wide(&first.other);
        if A::readdress(packet, ETHERNET, side.other(), other, false).is_none() {
            return drop(Reason::Inconsistent);
        }
    }
    let bytes = u64::from(segment.length);
    tables.record(
        first.service,
        Colour::from_bit(first.colour as u8),
        |stats| {
            if side == Side::Destination {
                stats.forward_packets += 1;
                stats.forward_bytes += bytes;
            } else {
                stats.return_packets += 1;
                stats.return_bytes += bytes;
            }
        },
    );
    match interface {
        Some(interface) => leave(packet, hop, slot.unwrap_or(0), interface, reason),
        None => pass(Reason::ForwardedByStack),
    }
}
