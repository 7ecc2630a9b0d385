//! What must be true of every packet, whatever it is and whatever it meets.

use std::collections::BTreeMap;

use bg_common::{
    abi::FRAGMENT_TICKS,
    flow::{Flow, FlowKey, FlowTable},
    key::{Endpoint, TCP, UDP},
    reason::Reason,
    service::{Backend, Listener, NextHop, PoolWord, ReturnPath, way},
};
use bg_ebpf::pipeline::{Action, Verdict};
use bg_tests::world::World;

use super::{
    answers, sent,
    view::{Ip, Side, View},
};

/// A packet and what became of it.
pub(super) struct Judged<'a> {
    pub(super) before: &'a World,
    pub(super) after: &'a World,
    pub(super) frame: &'a [u8],
    pub(super) verdict: Verdict,
    pub(super) out: &'a [u8],
}

/// What a reason says that became of a packet.
enum Fate {
    /// Passed, byte for byte.
    Untouched,
    Dropped,
    /// Sent on, with one end rewritten.
    Sent(Side),
    /// A later fragment sent on, with one address rewritten.
    SentFragment(Side),
    /// Passed with one end rewritten.
    ByStack,
    /// An ICMP error sent on, with this end of what it quotes rewritten.
    SentError(Side),
    /// Answered, or turned into an answer, by a RST.
    Reset,
    /// Answered by an ICMP error.
    Told,
}

const fn fate(reason: Reason) -> Fate {
    match reason {
        Reason::NotOurs
        | Reason::ReturnUnknown
        | Reason::NotIp
        | Reason::Truncated
        | Reason::BadHeader
        | Reason::Vlan
        | Reason::Fragment
        | Reason::ExtensionHeader
        | Reason::IcmpError
        | Reason::TtlExpired
        | Reason::TooBig => Fate::Untouched,
        Reason::CutDropped
        | Reason::ReturnStale
        | Reason::ReturnUnreachable
        | Reason::NoBackend
        | Reason::NoPort
        | Reason::ForwardUnreachable
        | Reason::FragmentDropped
        | Reason::Inconsistent => Fate::Dropped,
        Reason::Forwarded
        | Reason::ForwardedNew
        | Reason::ForwardedOrphan
        | Reason::ForwardedTableFull => Fate::Sent(Side::Destination),
        Reason::Returned => Fate::Sent(Side::Source),
        Reason::ForwardedFragment => Fate::SentFragment(Side::Destination),
        Reason::ReturnedFragment => Fate::SentFragment(Side::Source),
        Reason::ForwardedByStack => Fate::ByStack,
        Reason::ForwardedError => Fate::SentError(Side::Source),
        Reason::ReturnedError => Fate::SentError(Side::Destination),
        Reason::ResetClient | Reason::ResetBackend => Fate::Reset,
        Reason::SentTimeExceeded | Reason::SentTooBig => Fate::Told,
    }
}

/// Holds a packet and what became of it against the laws. (That its verdict has one
/// reason is the world's own assertion.)
pub(super) fn judge(before: &World, frame: &[u8], after: &World, verdict: Verdict, out: &[u8]) {
    let judged = Judged {
        before,
        after,
        frame,
        verdict,
        out,
    };
    match fate(verdict.reason) {
        Fate::Untouched => untouched(&judged),
        Fate::Dropped => dropped(&judged),
        Fate::Sent(side) => sent::whole(&judged, side),
        Fate::SentFragment(side) => sent::fragment(&judged, side),
        Fate::ByStack => sent::by_stack(&judged),
        Fate::SentError(side) => sent::error(&judged, side),
        Fate::Reset => answers::reset(&judged),
        Fate::Told => answers::told(&judged),
    }
    flows_stay(&judged);
    fragments_follow(&judged);
}

/// Law 9.
fn untouched(judged: &Judged<'_>) {
    assert_eq!(judged.verdict.action, Action::Pass);
    assert_eq!(judged.out, judged.frame, "not ours, and not as it came");
    // By then it was known whose it is.
    let known = matches!(judged.verdict.reason, Reason::TtlExpired | Reason::TooBig);
    if !known {
        let [before, after] = [judged.before, judged.after].map(living);
        assert_eq!(before, after, "not ours, and a flow changed");
    }
    let ours = View::new(judged.frame).is_some_and(|view| {
        view.tags.is_empty()
            && view.macs[0][0] & 1 == 0
            && view.ip.is_some_and(|ip| {
                ip.is_whole()
                    && listener(judged.before, &ip, &view.packet, Side::Destination).is_some()
            })
    });
    assert!(
        !ours || judged.verdict.reason != Reason::NotOurs,
        "for a listener, and not ours"
    );
}

/// Flows that are not over: the lines of others are anybody's.
fn living(world: &World) -> BTreeMap<(FlowTable, FlowKey), Flow> {
    let flows = world.flows.iter().map(|(key, flow)| (*key, *flow));
    flows
        .filter(|((table, _), flow)| !flow.is_over(*table, world.tick))
        .collect()
}

fn dropped(judged: &Judged<'_>) {
    assert_eq!(judged.verdict.action, Action::Drop);
    assert!(
        judged.verdict.reason != Reason::Inconsistent || !is_consistent(judged.before),
        "the tables do not contradict each other"
    );
}

/// Laws 2 and 7: a packet changes one flow at most, and takes no line of an
/// established one.
fn flows_stay(judged: &Judged<'_>) {
    let (before, after) = (living(judged.before), &judged.after.flows);
    let mut changed: Vec<FlowKey> = Vec::new();
    for ((table, key), flow) in &before {
        match after.get(&(*table, *key)) {
            None => assert!(
                table.evicts(),
                "an established flow is gone: {key:?} {flow:?}"
            ),
            Some(now) if now == flow => {}
            Some(now) => {
                let contested = before.contains_key(&(FlowTable::HalfOpen, *key));
                let stays = (now.backend, now.generation, now.colour())
                    == (flow.backend, flow.generation, flow.colour());
                let established = *table == FlowTable::Established;
                assert!(
                    !established || contested || stays,
                    "an established flow moved: {flow:?}, {now:?}"
                );
                changed.push(*key);
            }
        }
    }
    let new = after
        .keys()
        .filter(|key| !judged.before.flows.contains_key(key));
    changed.extend(new.map(|(_, key)| *key));
    changed.sort();
    changed.dedup();
    assert!(changed.len() <= 1, "one packet, many flows: {changed:?}");
}

/// Later fragments are sent on only where the first one was.
fn fragments_follow(judged: &Judged<'_>) {
    let sent = matches!(fate(judged.verdict.reason), Fate::Sent(_) | Fate::ByStack);
    let (before, after) = (judged.before, judged.after);
    let v4 = after.fragments_v4.iter();
    let v4 = v4.filter(|(key, entry)| before.fragments_v4.get(key) != Some(entry));
    let v6 = after.fragments_v6.iter();
    let v6 = v6.filter(|(key, entry)| before.fragments_v6.get(key) != Some(entry));
    for entry in v4.map(|(_, entry)| entry).chain(v6.map(|(_, entry)| entry)) {
        let leads = entry.way == way::FORWARD || entry.way == way::BACK;
        let is_over = before.tick.wrapping_sub(entry.seen) > FRAGMENT_TICKS;
        assert!(sent && leads || !sent && (!leads || is_over), "{entry:?}");
        let cut = matches!(
            judged.verdict.reason,
            Reason::ResetClient | Reason::ResetBackend | Reason::CutDropped
        );
        assert_eq!(cut, entry.way == way::CUT, "{entry:?}");
    }
}

/// The listener at one end of a packet.
pub(super) fn listener(world: &World, ip: &Ip, packet: &[u8], side: Side) -> Option<Listener> {
    end(ip, packet, side).and_then(|end| match end {
        End::V4(endpoint) => world.listeners_v4.get(&endpoint).copied(),
        End::V6(endpoint) => world.listeners_v6.get(&endpoint).copied(),
    })
}

/// The way back from the backend at one end of a packet.
pub(super) fn return_path<'a>(
    world: &'a World,
    ip: &Ip,
    packet: &[u8],
    side: Side,
) -> Option<&'a ReturnPath> {
    end(ip, packet, side).and_then(|end| match end {
        End::V4(endpoint) => world.returns_v4.get(&endpoint),
        End::V6(endpoint) => world.returns_v6.get(&endpoint),
    })
}

enum End {
    V4(Endpoint<[u8; 4]>),
    V6(Endpoint<[u8; 16]>),
}

fn end(ip: &Ip, packet: &[u8], side: Side) -> Option<End> {
    let [source, destination] = ip.ports(packet)?;
    let (address, port) = match side {
        Side::Source => (ip.source, source),
        Side::Destination => (ip.destination, destination),
    };
    let port = port.to_be_bytes();
    Some(match address {
        std::net::IpAddr::V4(v4) => End::V4(Endpoint::new(v4.octets(), port, ip.protocol)),
        std::net::IpAddr::V6(v6) => End::V6(Endpoint::new(v6.octets(), port, ip.protocol)),
    })
}

/// A flow's entries, in each table that has one.
pub(super) fn entries(world: &World, key: FlowKey, protocol: u8) -> Vec<Flow> {
    let tables: &[FlowTable] = match protocol {
        UDP => &[FlowTable::Udp],
        TCP => &[FlowTable::Established, FlowTable::HalfOpen],
        _ => &[],
    };
    let found = tables.iter().filter_map(|t| world.flows.get(&(*t, key)));
    found.copied().collect()
}

/// No table names what another one does not have.
fn is_consistent(world: &World) -> bool {
    let leads = |hop: u64| {
        NextHop(hop).slot().is_none_or(|slot| {
            let interface = world.interfaces.get(usize::from(slot));
            interface.is_some_and(|interface| interface.ifindex != 0)
        })
    };
    let family = |id: u32| world.backends.get(id as usize).map(|b: &Backend| b.family);
    let pools = (0..2u8).all(|colour| {
        [false, true].into_iter().all(|v6| {
            let colour = bg_common::service::Colour::from_bit(colour);
            let pool = world.pools[PoolWord::index(0, colour, v6) as usize];
            let mut ids = pool.base()..pool.base().saturating_add(pool.slots());
            ids.all(|id| family(id) == Some(if v6 { 6 } else { 4 }))
        })
    });
    let flows = world.flows.iter().all(|((_, key), flow)| {
        let v4 = key
            .address()
            .starts_with(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
        leads(flow.client_hop) && family(flow.backend) == Some(if v4 { 4 } else { 6 })
    });
    pools
        && flows
        && world
            .backends
            .iter()
            .all(|b| leads(b.next_hop) && b.service == 0)
        && world
            .listeners_v4
            .values()
            .all(|listener| listener.service == 0)
        && world
            .listeners_v6
            .values()
            .all(|listener| listener.service == 0)
        && world.fragments_v4.values().all(|f| leads(f.next_hop))
        && world.fragments_v6.values().all(|f| leads(f.next_hop))
}
