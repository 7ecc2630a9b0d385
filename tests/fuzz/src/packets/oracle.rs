//! What must be true of every packet, whatever it is and whatever it meets.

use std::collections::BTreeMap;

use bg_common::{
    abi::FRAGMENT_TICKS,
    flow::{Flow, FlowKey, FlowTable, bits},
    key::TCP,
    reason::Reason,
    service::{Backend, NextHop, PoolWord, way},
};
use bg_ebpf::{
    packet::tcp_flag,
    pipeline::{Action, Verdict},
};
use bg_tests::world::World;

use super::{
    answers, errors, ports, sent,
    view::{Side, View},
    whose,
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
    /// Sent on: what was for a listener to a backend, what was from one to a client.
    Sent(Side),
    /// A later fragment sent on likewise.
    SentFragment(Side),
    /// Passed with its ends rewritten.
    ByStack,
    /// An ICMP error sent on.
    SentError,
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
        Reason::ForwardedError | Reason::ReturnedError => Fate::SentError,
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
        Fate::SentError => errors::sent(&judged),
        Fate::Reset => answers::reset(&judged),
        Fate::Told => answers::told(&judged),
    }
    flows_stay(&judged);
    ports::stay(&judged);
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
    if judged.verdict.reason == Reason::IcmpError {
        errors::nobodys(judged);
    }
    let Some(view) = View::new(judged.frame) else {
        return;
    };
    let Some((ip, ends)) = view
        .ip
        .as_ref()
        .and_then(|ip| Some((ip, whose::ends(ip, &view.packet)?)))
    else {
        return;
    };
    let plain = view.tags.is_empty() && view.macs[0][0] & 1 == 0 && ip.is_whole();
    let asked = whose::asked(judged.before, ends, ip.protocol);
    let owed = whose::owed(judged.before, ends, ip.protocol);
    match judged.verdict.reason {
        Reason::NotOurs => assert!(
            !plain || asked.is_none() && owed.is_none(),
            "for a listener or from a backend, and not ours"
        ),
        Reason::ReturnUnknown => {
            let owed = owed.expect("what is returned is a backend's");
            assert!(owed.flows(judged.before).is_empty(), "of a flow of ours");
        }
        _ => {}
    }
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
    let view = View::new(judged.frame).expect("a frame's header");
    let ip = view.ip.as_ref().expect("an IP header");
    let ends = whose::ends(ip, &view.packet);
    match judged.verdict.reason {
        Reason::Inconsistent => assert!(
            !is_consistent(judged.before),
            "the tables do not contradict each other"
        ),
        Reason::NoPort => {
            ports::refused(judged, &view);
            assert_eq!(
                calm(judged.before),
                calm(judged.after),
                "refused, and a flow changed"
            );
        }
        Reason::ForwardUnreachable => ports::unreachable(judged, &view),
        Reason::NoBackend => {
            let asked = ends.and_then(|ends| whose::asked(judged.before, ends, ip.protocol));
            let pools = asked.expect("a client's packet").pools(judged.before);
            assert!(pools.iter().any(|pool| pool.slots() == 0), "{pools:?}");
        }
        Reason::CutDropped => assert!(
            ends.is_none_or(|ends| whose::is_cut(judged.before, ends, ip.protocol)),
            "dropped as cut, and it is not"
        ),
        Reason::ReturnStale => {
            let flags = view.packet.get(ip.header + 13).copied().unwrap_or(0);
            let syn = ip.protocol == TCP && flags & tcp_flag::SYN != 0;
            let owed = ends.and_then(|ends| whose::owed(judged.before, ends, ip.protocol));
            let mut own = owed.expect("a backend's packet").own(judged.before);
            own.retain(|(table, _)| !syn || *table != FlowTable::Established);
            assert!(own.is_empty(), "its own backend's: {own:?}");
        }
        _ => {}
    }
}

/// Flows that are not over, without the note that a SYN of the same tuple came.
fn calm(world: &World) -> BTreeMap<(FlowTable, FlowKey), Flow> {
    let mut flows = living(world);
    for flow in flows.values_mut() {
        flow.from_client &= !bits::CONTESTED;
    }
    flows
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
                let of = |flow: &Flow| (flow.backend, flow.via, flow.generation, flow.colour());
                let stays = of(now) == of(flow);
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
        if leads {
            sent::leads_on(judged, entry);
        }
    }
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
