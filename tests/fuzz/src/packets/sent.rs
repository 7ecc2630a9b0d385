//! Packets that are sent on: what may change in them, and how.

use std::ops::Range;

use bg_common::{
    key::{TCP, UDP},
    reason::Reason,
    service::{Fragment, NextHop, way},
    snat::via,
};
use bg_ebpf::{packet::tcp_flag, pipeline::Action};
use bg_tests::{
    frame::wrong_checksum,
    world::{World, wide},
};

use super::{
    oracle::Judged,
    ports,
    view::{Ip, Side, View, sum},
    whose::{self, Ends, Way, address},
};

/// Packets in and out, and their IP headers.
pub(super) struct Both {
    pub(super) came: View,
    pub(super) left: View,
    pub(super) old: Ip,
    pub(super) new: Ip,
}

impl Both {
    pub(super) fn of(judged: &Judged<'_>) -> Self {
        let read = |frame| {
            let view = View::new(frame).expect("what is sent on has a frame's header");
            let ip = view.ip.clone().expect("what is sent on is IP");
            (view, ip)
        };
        let ((came, old), (left, new)) = (read(judged.frame), read(judged.out));
        assert_eq!(came.packet.len(), left.packet.len(), "another length");
        assert_eq!(came.ether_type, left.ether_type);
        if wrong_checksum(judged.frame).is_none() {
            assert_eq!(wrong_checksum(judged.out), None, "it was right before");
        }
        Self {
            came,
            left,
            old,
            new,
        }
    }

    /// Both ends, as it came and as it left.
    fn ends(&self) -> [Ends; 2] {
        [(&self.old, &self.came), (&self.new, &self.left)]
            .map(|(ip, view)| whose::ends(ip, &view.packet).expect("ports are shown"))
    }

    /// Nothing but these bytes of the packet may differ.
    pub(super) fn same_but(&self, ranges: &[Range<usize>]) {
        let (old, new) = (&self.came.packet, &self.left.packet);
        let mut expected = old.clone();
        for range in ranges {
            expected[range.clone()].copy_from_slice(&new[range.clone()]);
        }
        if expected != *new {
            let at = expected.iter().zip(new).position(|(old, new)| old != new);
            panic!("byte {at:?} of the packet changed");
        }
    }

    /// What the hop count and the addresses take of the IP header. Which addresses they
    /// are, the tables say.
    pub(super) fn header(&self) -> Vec<Range<usize>> {
        let [hops, check] = if self.old.v6 {
            [7..8, 0..0]
        } else {
            [8..9, 10..12]
        };
        let mut ranges = vec![hops, check];
        ranges.extend(Side::BOTH.map(|side| self.old.address_at(side)));
        ranges
    }

    /// One hop less where we route, the same where the stack does.
    pub(super) fn hops(&self, routed: bool) {
        let less = u8::from(routed);
        assert_eq!(self.new.hops, self.old.hops.wrapping_sub(less), "hops");
        assert!(self.new.hops > 0, "it was to die here");
    }

    /// The IP header's checksum is as right as it was.
    pub(super) fn sums(&self) {
        if !self.old.v6 {
            let header = self.old.header;
            let [old, new] = [&self.came, &self.left].map(|v| sum(&[&v.packet[..header]]));
            assert_eq!(old, new, "the IP header's checksum");
        }
    }

    /// And the transport's. Where nothing was rewritten (`dsr`), it is what it was; TCP's
    /// may change from one zero to the other (RFC 1071).
    fn transport_sums(&self) {
        let check = self.old.check_at();
        let [old, new] = [(&self.came, &self.old), (&self.left, &self.new)].map(|(view, ip)| {
            let none = ip.protocol == UDP && view.packet[check.clone()] == [0, 0];
            let sum = sum(&[&ip.addresses(), &view.packet[ip.header..]]);
            if none { None } else { Some(sum) }
        });
        assert_eq!(old, new, "the transport's checksum");
    }

    /// Ends and hops were rewritten, and nothing else.
    fn ends_only(&self) {
        let mut ranges = self.header();
        ranges.extend(Side::BOTH.map(|side| self.old.port_at(side)));
        ranges.push(self.old.check_at());
        self.same_but(&ranges);
        self.sums();
        self.transport_sums();
    }

    /// True when the packet is a RST.
    fn is_rst(&self) -> bool {
        let flags = self.came.packet.get(self.old.header + 13).copied();
        self.old.protocol == TCP && flags.unwrap_or(0) & tcp_flag::RST != 0
    }
}

/// A packet with its transport header.
pub(super) fn whole(judged: &Judged<'_>, side: Side) {
    let both = Both::of(judged);
    both.ends_only();
    both.hops(true);
    let hops: Vec<_> = match side {
        Side::Destination => to_backend(judged, &both)
            .iter()
            .map(|way| NextHop(way.backend.next_hop))
            .collect(),
        Side::Source => to_client(judged, &both),
    };
    leaves(judged, &both, &hops);
}

/// Where no next hop is known, or routers may split what is too large.
pub(super) fn by_stack(judged: &Judged<'_>) {
    assert_eq!(judged.verdict.action, Action::Pass);
    let both = Both::of(judged);
    assert_eq!(both.came.tags, both.left.tags);
    assert_eq!(both.came.macs, both.left.macs);
    both.hops(false);
    if both.old.offset != 0 {
        let first = followed(judged, &both);
        return assert!(stack_takes(first.way, first.via), "{first:?}");
    }
    both.ends_only();
    if whose::listener(judged.before, both.ends()[0][1], both.old.protocol).is_some() {
        let ways = to_backend(judged, &both);
        let takes = ways.iter().any(|to| stack_takes(way::FORWARD, to.via));
        assert!(takes, "{ways:?}");
    } else {
        to_client(judged, &both);
    }
}

/// The stack sends on no packet that is from an address of its own, or for one.
const fn stack_takes(way: u16, via: u16) -> bool {
    way == way::BACK || via == via::NAT
}

/// A later fragment.
pub(super) fn fragment(judged: &Judged<'_>, side: Side) {
    let both = Both::of(judged);
    assert!(both.old.offset != 0, "a first one has ports");
    let first = followed(judged, &both);
    assert_eq!(first.way == way::FORWARD, side == Side::Destination);
    both.hops(true);
    leaves(judged, &both, &[NextHop(first.next_hop)]);
}

/// The first fragment that a later one followed: to the same addresses.
fn followed(judged: &Judged<'_>, both: &Both) -> Fragment {
    both.same_but(&both.header());
    both.sums();
    let old = [both.old.source, both.old.destination];
    let new = [both.new.source, both.new.destination];
    let leads = |first: &&Fragment| {
        let [own, other] = [first.address, first.other].map(|a| address(&a, both.old.v6));
        let hidden = ports::is_lent(first.via);
        let expected = match first.way {
            way::FORWARD => [if hidden { other } else { old[0] }, own],
            way::BACK => [own, if hidden { other } else { old[1] }],
            _ => return false,
        };
        new == expected
    };
    let firsts = firsts(judged.before, &both.old);
    let first = firsts.iter().find(leads);
    *first.unwrap_or_else(|| panic!("{old:?} became {new:?}, as no first one: {firsts:?}"))
}

/// What is remembered of first fragments of this packet.
fn firsts(world: &World, ip: &Ip) -> Vec<Fragment> {
    let [source, destination] =
        [ip.source, ip.destination].map(|ip| wide(std::net::SocketAddr::new(ip, 0)));
    let v4 = world.fragments_v4.iter().filter(|(key, _)| {
        let same =
            key.identification == ip.identification && u32::from(ip.protocol) == key.protocol;
        !ip.v6
            && same
            && source.starts_with(&key.source)
            && destination.starts_with(&key.destination)
    });
    let v6 = world.fragments_v6.iter().filter(|(key, _)| {
        let same = key.identification == ip.identification;
        ip.v6 && same && key.source == source && key.destination == destination
    });
    let v4 = v4.map(|(_, first)| *first);
    v4.chain(v6.map(|(_, first)| *first)).collect()
}

/// A first fragment was sent on: what is remembered of it sends the later ones to the
/// same addresses, by the same way.
pub(super) fn leads_on(judged: &Judged<'_>, first: &Fragment) {
    let both = Both::of(judged);
    let [own, other] = match first.way {
        way::FORWARD => [both.new.destination, both.new.source],
        _ => [both.new.source, both.new.destination],
    };
    let v6 = both.old.v6;
    assert_eq!(address(&first.address, v6), own, "{first:?}");
    if ports::is_lent(first.via) {
        assert_eq!(address(&first.other, v6), other, "{first:?}");
    }
    if judged.verdict.reason != Reason::ForwardedByStack {
        assert_eq!(
            NextHop(first.next_hop).mac(),
            both.left.macs[0],
            "{first:?}"
        );
    }
}

/// A client's packet went to a backend of the right colour, as the flow's mode says; the
/// ways there.
fn to_backend(judged: &Judged<'_>, both: &Both) -> Vec<Way> {
    let before = judged.before;
    let [old, new] = both.ends();
    let asked =
        whose::asked(before, old, both.old.protocol).expect("what is forwarded is a listener's");
    let known = asked.known_ways(before, both.is_rst());
    let fits = |ways: Vec<Way>| -> Vec<Way> {
        let fits = |way: &Way| way.ends(before, old) == Some(new);
        ways.into_iter().filter(fits).collect()
    };
    let is_new = match judged.verdict.reason {
        Reason::ForwardedNew | Reason::ForwardedOrphan => true,
        Reason::Forwarded | Reason::ForwardedTableFull => false,
        _ => fits(known.clone()).is_empty(),
    };
    if !is_new {
        let ways = fits(known);
        assert!(
            !ways.is_empty(),
            "a known flow stays where it is, until it is cut: to {new:?}"
        );
        return ways;
    }
    if judged.verdict.reason == Reason::ForwardedOrphan || both.old.protocol == UDP {
        assert!(known.is_empty(), "a known flow, taken for a new one");
    }
    let mut ways = fits(asked.new_ways(judged));
    assert!(
        !ways.is_empty(),
        "a new flow takes the word's colour: to {new:?}"
    );
    ports::newcomer(judged, &asked, &mut ways);
    ways
}

/// A backend's packet went to its client; the ways there.
fn to_client(judged: &Judged<'_>, both: &Both) -> Vec<NextHop> {
    let [old, new] = both.ends();
    let owed = whose::owed(judged.before, old, both.old.protocol)
        .expect("what is returned is a backend's");
    assert_eq!(new, owed.ends(), "from the listener to the flow's client");
    let flows = owed.own(judged.before);
    assert!(!flows.is_empty(), "another backend's flow, or none");
    // A route that was looked up counts at once, and a flow may end with its last packet.
    let after = &judged.after.flows;
    let hops = flows
        .iter()
        .filter_map(|(table, _)| after.get(&(*table, owed.key)));
    hops.map(bg_common::flow::Flow::hop).collect()
}

/// The frame leaves by one of these next hops, with that interface's address and
/// tags.
pub(super) fn leaves(judged: &Judged<'_>, both: &Both, hops: &[NextHop]) {
    let way = |hop: &NextHop| {
        let slot = u32::from(hop.slot()?);
        let interface = judged.before.interfaces.get(slot as usize)?;
        Some((slot, hop.mac(), interface))
    };
    // A translated error is small, or its router's own trouble.
    let error = matches!(
        judged.verdict.reason,
        Reason::ForwardedError | Reason::ReturnedError
    );
    let ingress = judged.before.interfaces[judged.before.ingress as usize].ifindex;
    let fits = hops.iter().filter_map(way).any(|(slot, mac, interface)| {
        let action = if interface.ifindex == ingress {
            Action::Transmit
        } else {
            Action::Redirect(slot)
        };
        judged.verdict.action == action
            && both.left.macs == [mac, interface.mac]
            && both.left.tags == tags(interface.tags.0, &both.came.tags)
            && (error || both.old.total <= interface.mtu as usize)
    });
    assert!(fits, "{:?} by none of {hops:?}", both.left);
}

/// The tags of an interface, with the priorities of those that a frame came with.
pub(super) fn tags(own: u64, came: &[[u8; 4]]) -> Vec<[u8; 4]> {
    let bytes = own.to_be_bytes();
    let own = bytes
        .as_chunks::<4>()
        .0
        .iter()
        .filter(|tag| **tag != [0; 4]);
    own.enumerate()
        .map(|(at, [p, q, a, b])| {
            let priority = came.get(at).map_or(0, |tag| tag[2] & 0xf0);
            [*p, *q, *a | priority, *b]
        })
        .collect()
}
