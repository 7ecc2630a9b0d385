//! Ports that `snat` lends, as docs/forwarding.md has them.

use std::{net::IpAddr, ops::RangeInclusive};

use bg_common::{
    abi::ticks,
    flow::{Flow, FlowKey, FlowTable, bits},
    key::{TCP, UDP},
    reason::Reason,
    service::forward,
    snat::Lease,
};
use bg_ebpf::packet::tcp_flag;
use bg_tests::world::World;

use super::{
    oracle::Judged,
    view::View,
    whose::{self, Asked, Way, address},
};

/// Lent to TCP.
const TCP_PORTS: RangeInclusive<u16> = 1_024..=16_895;
/// Lent to UDP.
const UDP_PORTS: RangeInclusive<u16> = 16_896..=32_767;

/// What a listener may have is never lent.
const RESERVED: u32 = u32::MAX;
/// A port is its flow's own for so long, whatever is remembered of the flow.
const FRESH: u32 = ticks(100_000_000);
/// A handshake that got no further for so long may lose its port.
const STUCK: u32 = ticks(300_000_000);
/// How long an answer to a datagram may be late.
const LATE: u32 = ticks(30_000_000_000);
/// A flow is refused, or takes a handshake's port, only where at least so many of the
/// other ports are somebody's: a run of neighbours that were all looked at.
const TRIED: usize = 24;

/// True for a port that can be lent.
pub(super) fn is_lent(via: u16) -> bool {
    TCP_PORTS.contains(&via) || UDP_PORTS.contains(&via)
}

/// The gateway's own address towards the backends of a block, if it is known.
pub(super) fn own_address(world: &World, block: u16, v6: bool) -> Option<IpAddr> {
    let source = world.sources.get(usize::from(block))?;
    (block != 0 && source.address != [0; 16]).then(|| address(&source.address, v6))
}

/// Who has a port.
pub(super) fn lessee(world: &World, block: u16, port: u16) -> Option<FlowKey> {
    let lease = lease(world, place(block, port)?);
    (lease.id != 0).then(|| lease.key())
}

/// True when a flow has the port that it was lent.
pub(super) fn has(world: &World, key: FlowKey, flow: &Flow) -> bool {
    let backend = world.backends.get(flow.backend as usize);
    backend.is_some_and(|backend| lessee(world, backend.block, flow.via) == Some(key))
}

/// Block and index of a port.
type Place = (u32, u32);

fn place(block: u16, port: u16) -> Option<Place> {
    is_lent(port).then(|| (u32::from(block), u32::from(port - TCP_PORTS.start())))
}

fn lease(world: &World, place: Place) -> Lease {
    world.leases.get(&place).copied().unwrap_or_default()
}

/// May a port go to another flow?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    Free,
    /// Where no other one is free.
    Stuck,
    Kept,
}

fn hold(world: &World, (block, index): Place) -> Hold {
    let lease = lease(world, (block, index));
    let ago = |then: u32| {
        let ago = world.tick.wrapping_sub(then);
        if ago > u32::MAX / 2 { 0 } else { ago }
    };
    if lease.table == RESERVED {
        return Hold::Kept;
    }
    if lease.id == 0 {
        return Hold::Free;
    }
    if ago(lease.since) <= FRESH {
        return Hold::Kept;
    }
    let port = index + u32::from(*TCP_PORTS.start());
    let flow = |table| {
        let flow = world.flows.get(&(table, lease.key()));
        flow.filter(|flow| u32::from(flow.via) == port)
    };
    if lease.table == FlowTable::Udp as u32 {
        let late = match flow(FlowTable::Udp) {
            Some(flow) => ago(flow.seen).saturating_sub(flow.proof),
            None => ago(lease.since),
        };
        return if late > LATE { Hold::Free } else { Hold::Kept };
    }
    let lives = |table| flow(table).filter(|flow| !flow.is_over(table, world.tick));
    if lives(FlowTable::Established).is_some() {
        return Hold::Kept;
    }
    match lives(FlowTable::HalfOpen) {
        None => Hold::Free,
        Some(half) if (half.from_client | half.from_backend) & bits::PROVEN != 0 => Hold::Kept,
        Some(half) if ago(half.seen) < STUCK => Hold::Kept,
        Some(_) => Hold::Stuck,
    }
}

/// How many ports of a block, of those that a protocol is lent, are at least so held.
fn held(world: &World, block: u32, ports: &RangeInclusive<u16>, holds: &[Hold]) -> usize {
    let places = world.leases.keys().filter(|(of, index)| {
        let port = *index as u16 + TCP_PORTS.start();
        *of == block && ports.contains(&port)
    });
    places
        .filter(|place| holds.contains(&hold(world, **place)))
        .count()
}

/// A packet lends one port at most, to its own flow, and takes none away that is
/// somebody's; no flow that is proven loses its own (law 7).
pub(super) fn stay(judged: &Judged<'_>) {
    let (before, after) = (judged.before, judged.after);
    let changed: Vec<_> = after
        .leases
        .iter()
        .filter(|(place, now)| {
            let then = lease(before, **place);
            Lease {
                turn: now.turn,
                ..then
            } != **now
        })
        .collect();
    assert!(
        before
            .leases
            .keys()
            .all(|place| after.leases.contains_key(place)),
        "a lease is gone"
    );
    assert!(changed.len() <= 1, "one packet, many ports: {changed:?}");
    for (place, now) in changed {
        lent(judged, *place, now);
    }
    for ((table, key), flow) in &after.flows {
        let established = *table == FlowTable::Established && !flow.is_over(*table, after.tick);
        // Worlds may begin with one whose port is somebody else's.
        let lost = before.flows.get(&(*table, *key));
        let lost = lost.is_some_and(|old| old.via == flow.via && !has(before, *key, old));
        if established && is_lent(flow.via) && !lost {
            assert!(
                has(after, *key, flow),
                "an established flow has no port: {key:?} {flow:?}"
            );
        }
    }
}

/// A port that was lent just now.
fn lent(judged: &Judged<'_>, place: Place, now: &Lease) {
    let before = judged.before;
    let asked = asked(judged).expect("only a client's packet is lent a port");
    assert_eq!(now.key(), asked.key, "a port for somebody else");
    assert_eq!(now.since, before.tick);
    let (ports, table) = if asked.protocol() == UDP {
        (UDP_PORTS, FlowTable::Udp)
    } else {
        (TCP_PORTS, FlowTable::HalfOpen)
    };
    let port = u16::try_from(place.1).map(|index| index + TCP_PORTS.start());
    assert!(
        port.is_ok_and(|port| ports.contains(&port)),
        "a port of another protocol: {port:?}"
    );
    assert_eq!(now.table, table as u32);
    match hold(before, place) {
        Hold::Free => {}
        Hold::Stuck => assert!(
            held(before, place.0, &ports, &[Hold::Stuck, Hold::Kept]) >= TRIED,
            "a handshake's port, and others are free"
        ),
        Hold::Kept => panic!("somebody's port: {:?}", lease(before, place)),
    }
    let flow = judged.after.flows.get(&(table, asked.key));
    assert!(
        flow.is_some_and(|flow| Ok(flow.via) == port),
        "lent, and not remembered: {flow:?}"
    );
}

/// The client's packet that is judged.
fn asked(judged: &Judged<'_>) -> Option<Asked> {
    let view = View::new(judged.frame)?;
    let ip = view.ip?;
    let ends = whose::ends(&ip, &view.packet)?;
    whose::asked(judged.before, ends, ip.protocol)
}

/// A new flow is remembered as it went, by one of these ways, which is left; in `snat` it
/// has a port, and keeps the one that it had.
pub(super) fn newcomer(judged: &Judged<'_>, asked: &Asked, ways: &mut Vec<Way>) {
    let mut now = whose::current(judged.after, asked.key, asked.protocol());
    now.retain(|(table, _)| *table != FlowTable::Established);
    let remembers =
        judged.verdict.reason == Reason::ForwardedNew || asked.listener.forward == forward::SNAT;
    let Some((table, flow)) = now.first().copied() else {
        return assert!(!remembers, "new, and not remembered");
    };
    let backend = judged.before.backends.get(flow.backend as usize);
    ways.retain(|way| (flow.via, backend) == (way.via, Some(&way.backend)));
    assert!(
        !ways.is_empty(),
        "remembered otherwise than it went: {flow:?}"
    );
    if asked.listener.forward != forward::SNAT {
        return;
    }
    assert!(is_lent(flow.via), "from port {}", flow.via);
    assert!(has(judged.after, asked.key, &flow), "somebody else's port");
    let mut had = whose::current(judged.before, asked.key, asked.protocol());
    had.retain(|(of, old)| *of == table && old.backend == flow.backend && is_lent(old.via));
    for (_, old) in had {
        assert_eq!(old.via, flow.via, "a flow that had a port got another one");
    }
}

/// A packet that was refused for want of a port.
pub(super) fn refused(judged: &Judged<'_>, view: &View) {
    let (before, after) = (judged.before, judged.after);
    let asked = asked(judged).expect("only a client's packet wants a port");
    assert_eq!(asked.listener.forward, forward::SNAT);
    assert_eq!(before.leases, after.leases, "refused, and lent");
    let ip = view.ip.as_ref().expect("an IP header");
    let flags = view.packet.get(ip.header + 13).copied().unwrap_or(0);
    let flows = asked.protocol() != TCP
        || flags & tcp_flag::RST == 0 && flags & (tcp_flag::SYN | tcp_flag::ACK) != 0;
    let ports = if asked.protocol() == UDP {
        UDP_PORTS
    } else {
        TCP_PORTS
    };
    let none_left = asked.chosen(before).iter().any(|id| {
        let block = before.backends.get(*id as usize).map_or(0, |b| b.block);
        block == 0 || held(before, u32::from(block), &ports, &[Hold::Kept]) >= TRIED
    });
    assert!(!flows || none_left, "refused, and ports are free");
}

/// A packet that was dropped because there is no way to its backend.
pub(super) fn unreachable(judged: &Judged<'_>, view: &View) {
    assert_eq!(judged.verdict.reason, Reason::ForwardUnreachable);
    let world = judged.before;
    let Some(asked) = asked(judged) else {
        // An ICMP error about an answer.
        let unknown = world.sources.iter().skip(1).any(|s| s.address == [0; 16]);
        assert!(view.ip.is_some() && unknown, "every address is known");
        return;
    };
    let known = asked.known_ways(world, true);
    let ways = known.into_iter().chain(asked.new_ways(judged));
    let barred = ways.into_iter().any(|way| {
        let nowhere = way.backend.next_hop == 0 || way.ends(world, asked.ends).is_none();
        way.via != bg_common::snat::via::NAT && nowhere
    });
    assert!(barred, "the way is known, or the stack's");
}
