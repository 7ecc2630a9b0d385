//! Packets that are sent on: what may change in them, and how.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use bg_common::{
    key::{TCP, UDP},
    reason::Reason,
    service::{NextHop, PoolWord},
};
use bg_ebpf::{packet::tcp_flag, pipeline::Action};
use bg_tests::{
    frame::wrong_checksum,
    world::{World, key, wide},
};

use super::{
    oracle::{Judged, entries, listener, return_path},
    view::{Ip, Side, View, sum},
};

/// Packets in and out, and their IP headers.
struct Both {
    came: View,
    left: View,
    old: Ip,
    new: Ip,
}

impl Both {
    fn of(judged: &Judged<'_>) -> Self {
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

    /// Nothing but these bytes of the packet may differ.
    fn same_but(&self, ranges: &[Range<usize>]) {
        let both = self.came.packet.iter().zip(&self.left.packet).enumerate();
        for (at, (old, new)) in both {
            let allowed = ranges.iter().any(|range| range.contains(&at));
            assert!(allowed || old == new, "byte {at} of the packet changed");
        }
    }

    /// What one side's address and the hop count take of the IP header.
    fn header(&self, side: Side) -> Vec<Range<usize>> {
        let [hops, check] = if self.old.v6 {
            [7..8, 0..0]
        } else {
            [8..9, 10..12]
        };
        vec![hops, check, self.old.address_at(side)]
    }

    /// One hop less where we route, the same where the stack does.
    fn hops(&self, routed: bool) {
        let less = u8::from(routed);
        assert_eq!(self.new.hops, self.old.hops.wrapping_sub(less), "hops");
        assert!(self.new.hops > 0, "it was to die here");
    }

    /// Header and transport checksums are as right as they were.
    fn sums(&self) {
        if !self.old.v6 {
            let header = self.old.header;
            let [old, new] = [&self.came, &self.left].map(|v| sum(&[&v.packet[..header]]));
            assert_eq!(old, new, "the IP header's checksum");
        }
    }

    fn transport_sums(&self) {
        let check = self.old.check_at();
        let [old, new] = [(&self.came, &self.old), (&self.left, &self.new)].map(|(view, ip)| {
            let none = ip.protocol == UDP && view.packet[check.clone()] == [0, 0];
            let sum = sum(&[&ip.addresses(), &view.packet[ip.header..]]);
            if none { None } else { Some(sum) }
        });
        assert_eq!(old, new, "the transport's checksum");
    }

    /// One end was rewritten, and nothing else.
    fn one_end(&self, side: Side) {
        let port = self.old.header + if side == Side::Source { 0 } else { 2 };
        let mut ranges = self.header(side);
        ranges.extend([port..port + 2, self.old.check_at()]);
        self.same_but(&ranges);
        self.sums();
        self.transport_sums();
    }
}

fn ports(of: &View, ip: &Ip) -> [u16; 2] {
    ip.ports(&of.packet).expect("ports are shown")
}

/// A packet with its transport header.
pub(super) fn whole(judged: &Judged<'_>, side: Side) {
    let both = Both::of(judged);
    both.one_end(side);
    both.hops(true);
    match side {
        Side::Destination => {
            let hop = to_backend(judged, &both);
            leaves(judged, &both, &[hop]);
        }
        Side::Source => leaves(judged, &both, &to_client(judged, &both)),
    }
}

/// Where no next hop is known, or routers may split what is too large.
pub(super) fn by_stack(judged: &Judged<'_>) {
    assert_eq!(judged.verdict.action, Action::Pass);
    let both = Both::of(judged);
    assert_eq!(both.came.tags, both.left.tags);
    assert_eq!(both.came.macs, both.left.macs);
    both.hops(false);
    if both.old.offset != 0 {
        let side = if both.old.source == both.new.source {
            Side::Destination
        } else {
            Side::Source
        };
        return address_only(&both, side);
    }
    let (ip, packet) = (&both.old, &both.came.packet);
    if listener(judged.before, ip, packet, Side::Destination).is_some() {
        both.one_end(Side::Destination);
        to_backend(judged, &both);
    } else {
        both.one_end(Side::Source);
        to_client(judged, &both);
    }
}

/// A later fragment.
pub(super) fn fragment(judged: &Judged<'_>, side: Side) {
    let both = Both::of(judged);
    assert!(both.old.offset != 0, "a first one has ports");
    address_only(&both, side);
    both.hops(true);
    let known = judged.before.fragments_v4.values();
    let known = known.chain(judged.before.fragments_v6.values());
    let hops: Vec<_> = known.map(|f| NextHop(f.next_hop)).collect();
    leaves(judged, &both, &hops);
}

fn address_only(both: &Both, side: Side) {
    both.same_but(&both.header(side));
    both.sums();
}

/// A client's packet went to a backend of the right colour; the way there.
fn to_backend(judged: &Judged<'_>, both: &Both) -> NextHop {
    let before = judged.before;
    let (ip, packet) = (&both.old, &both.came.packet);
    let listener =
        listener(before, ip, packet, Side::Destination).expect("what is forwarded is a listener's");
    let [port, listens] = ports(&both.came, ip);
    let [_, new_port] = ports(&both.left, &both.new);
    let target = wide(SocketAddr::new(both.new.destination, 0));
    let serves = |id: &u32| {
        let Some(backend) = before.backends.get(*id as usize) else {
            return false;
        };
        let own = u16::from_be_bytes(backend.port);
        let expected = if own == 0 { listens } else { own };
        backend.address == target && new_port == expected && (backend.family == 6) == ip.v6
    };
    let ids: Vec<u32> = (0..before.backends.len() as u32).filter(serves).collect();
    assert!(
        !ids.is_empty(),
        "to {}, which is no backend",
        both.new.destination
    );

    let flow = key(SocketAddr::new(ip.source, port), listener.id);
    let known = entries(before, flow, ip.protocol);
    let rst = ip.protocol == TCP && flags(both) & tcp_flag::RST != 0;
    let stays = known.iter().any(|flow| {
        let cut = before.word.resets(flow.colour_spread, flow.generation);
        ids.contains(&flow.backend) && (rst || !cut)
    });
    let active = before.word.active();
    let standby = (before.word.canary() > 0).then(|| active.other());
    let chosen = [Some(active), standby].into_iter().flatten().any(|colour| {
        let pool = before.pools[PoolWord::index(0, colour, ip.v6) as usize];
        let slots = pool.base()..pool.base() + pool.slots();
        ids.iter().any(|id| slots.contains(id))
    });
    match judged.verdict.reason {
        Reason::ForwardedNew | Reason::ForwardedOrphan => {
            assert!(chosen, "a new flow takes the word's colour");
        }
        Reason::Forwarded | Reason::ForwardedTableFull => {
            assert!(stays, "a known flow stays where it is, until it is cut");
        }
        _ => assert!(
            chosen || stays,
            "neither a new flow's way nor a known one's"
        ),
    }
    NextHop(before.backends[ids[0] as usize].next_hop)
}

fn flags(both: &Both) -> u8 {
    both.came
        .packet
        .get(both.old.header + 13)
        .copied()
        .unwrap_or(0)
}

/// A backend's packet went to its client; the ways there.
fn to_client(judged: &Judged<'_>, both: &Both) -> Vec<NextHop> {
    let (ip, packet) = (&both.old, &both.came.packet);
    let path = return_path(judged.before, ip, packet, Side::Source)
        .expect("what is returned is a backend's");
    let [source, _] = ports(&both.left, &both.new);
    let from = wide(SocketAddr::new(both.new.source, 0));
    assert_eq!((from, source.to_be_bytes()), (path.address, path.port));
    let [_, port] = ports(&both.came, ip);
    let client = key(SocketAddr::new(ip.destination, port), path.listener);
    let backend = wide(SocketAddr::new(ip.source, 0));
    let is_its = |world: &World, id: u32| {
        let found = world.backends.get(id as usize);
        found.is_some_and(|b| b.address == backend)
    };
    let flows = entries(judged.after, client, ip.protocol);
    let own: Vec<_> = flows
        .iter()
        .filter(|f| is_its(judged.before, f.backend))
        .collect();
    assert!(!own.is_empty(), "another backend's flow");
    own.iter().map(|flow| flow.hop()).collect()
}

/// An ICMP error: what it quotes, and one or both outer addresses.
pub(super) fn error(judged: &Judged<'_>, quoted: Side) {
    let both = Both::of(judged);
    both.hops(true);
    let at = both.old.header + 8;
    let inner = |view: &View| {
        let quote = &view.packet[at..both.old.total];
        let ip = if both.old.v6 {
            Ip::v6(quote)
        } else {
            Ip::v4(quote)
        };
        (quote.to_vec(), ip.expect("a quoted header"))
    };
    let ((old_quote, old), (new_quote, new)) = (inner(&both.came), inner(&both.left));
    let whole = old.protocol == UDP || old_quote.len() >= old.header + 20;
    let outer = quoted.other();

    let port = at + old.header + if quoted == Side::Source { 0 } else { 2 };
    let shift = |range: Range<usize>| range.start + at..range.end + at;
    let mut ranges = both.header(outer);
    ranges.extend([
        both.old.header + 2..both.old.header + 4,
        shift(old.address_at(quoted)),
        port..port + 2,
    ]);
    if !old.v6 {
        ranges.push(at + 10..at + 12);
    }
    if whole {
        ranges.push(shift(old.check_at()));
    }
    let other = match outer {
        Side::Source => (both.old.destination, both.new.destination),
        Side::Destination => (both.old.source, both.new.source),
    };
    if other.0 != other.1 {
        // With one arm an error to a backend comes from the client.
        assert_eq!((outer, other.1), (Side::Destination, old.destination));
        ranges.push(both.old.address_at(Side::Source));
    }
    both.same_but(&ranges);

    both.sums();
    let icmp = |view: &View, ip: &Ip| {
        let message = sum(&[&view.packet[ip.header..ip.total]]);
        let pseudo = if ip.v6 { sum(&[&ip.addresses()]) } else { 0 };
        (message + pseudo) % 0xffff
    };
    assert_eq!(
        icmp(&both.came, &both.old),
        icmp(&both.left, &both.new),
        "ICMP's checksum"
    );
    if !old.v6 {
        let header = |quote: &[u8]| sum(&[&quote[..old.header]]);
        assert_eq!(
            header(&old_quote),
            header(&new_quote),
            "the quoted header's checksum"
        );
    }
    if whole && !(old.protocol == UDP && old_quote[old.check_at()] == [0, 0]) {
        let transport = |quote: &[u8], ip: &Ip| sum(&[&ip.addresses(), &quote[ip.header..]]);
        assert_eq!(
            transport(&old_quote, &old),
            transport(&new_quote, &new),
            "the quoted transport's checksum"
        );
    }
    // Its receiver sent the quoted packet.
    let reader: IpAddr = new.source;
    assert_eq!(
        both.new.destination, reader,
        "the error's receiver sent what it quotes"
    );
    let hops = judged.before.backends.iter().map(|b| NextHop(b.next_hop));
    let flows = judged.before.flows.values().map(bg_common::flow::Flow::hop);
    leaves(judged, &both, &hops.chain(flows).collect::<Vec<_>>());
}

/// The frame leaves by one of these next hops, with that interface's address and
/// tags.
fn leaves(judged: &Judged<'_>, both: &Both, hops: &[NextHop]) {
    let way = |hop: &NextHop| {
        let slot = u32::from(hop.slot()?);
        let interface = judged.before.interfaces.get(slot as usize)?;
        Some((slot, hop.mac(), interface))
    };
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
            && both.old.total <= interface.mtu as usize
    });
    // A translated error is small, or its router's own trouble.
    let error = matches!(
        judged.verdict.reason,
        Reason::ForwardedError | Reason::ReturnedError
    );
    assert!(fits || error, "{:?} by none of {hops:?}", both.left);
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
