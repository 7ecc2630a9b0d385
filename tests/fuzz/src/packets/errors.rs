//! ICMP errors that are sent on: outside and in what they quote, both ends become what
//! their reader saw.

use std::{
    net::{IpAddr, SocketAddr},
    ops::Range,
};

use bg_common::{key::UDP, reason::Reason, service::NextHop};
use bg_ebpf::pipeline::Action;
use bg_tests::world::World;

use super::{
    oracle::Judged,
    sent::{Both, leaves},
    view::{Ip, Side, View, sum},
    whose::{self, Ends},
};

/// Length of an ICMP header, bytes.
const HEADER: usize = 8;

/// What an error quotes.
struct Quote {
    /// Where it begins in the packet.
    at: usize,
    bytes: Vec<u8>,
    ip: Ip,
    ends: Ends,
}

impl Quote {
    fn of(view: &View, outer: &Ip) -> Option<Self> {
        let at = outer.header + HEADER;
        let bytes = view.packet.get(at..outer.total)?.to_vec();
        let ip = if outer.v6 {
            Ip::v6(&bytes)
        } else {
            Ip::v4(&bytes)
        }?;
        let ends = whose::ends(&ip, &bytes)?;
        Some(Self {
            at,
            bytes,
            ip,
            ends,
        })
    }

    /// True when the quote shows the transport's checksum.
    fn shows_check(&self) -> bool {
        self.ip.protocol == UDP || self.bytes.len() >= self.ip.header + 20
    }
}

/// What an error becomes.
#[derive(Debug)]
struct Translated {
    /// The ends in the quote.
    quoted: Ends,
    hop: NextHop,
    reason: Reason,
}

/// What the tables make of an error about a packet with these ends, for `reader`; it may
/// be about more than one flow of the same addresses and ports.
fn translations(world: &World, ends: Ends, protocol: u8, reader: IpAddr) -> Vec<Translated> {
    let [from, to] = ends;
    if let Some(asked) = whose::asked(world, [to, from], protocol) {
        // About an answer: its backend sent it.
        let ways = asked.known_ways(world, true);
        let translated = ways.iter().filter_map(|way| {
            let [client, backend] = way.ends(world, asked.ends)?;
            Some(Translated {
                quoted: [backend, client],
                hop: NextHop(way.backend.next_hop),
                reason: Reason::ForwardedError,
            })
        });
        return translated.collect();
    }
    let own = SocketAddr::new(reader, from.port());
    let Some(owed) = whose::owed(world, [to, own], protocol) else {
        return Vec::new();
    };
    let [listener, client] = owed.ends();
    let flows = owed.own(world);
    let translated = flows.iter().map(|(_, flow)| Translated {
        quoted: [client, listener],
        hop: flow.hop(),
        reason: Reason::ReturnedError,
    });
    translated.collect()
}

/// An error that is sent on.
pub(super) fn sent(judged: &Judged<'_>) {
    let both = Both::of(judged);
    both.hops(true);
    let old = Quote::of(&both.came, &both.old).expect("a quote");
    let new = Quote::of(&both.left, &both.new).expect("a quote");
    assert_eq!(
        old.ip.source, both.old.destination,
        "for who sent what it is about"
    );
    let mut fits = translations(
        judged.before,
        old.ends,
        old.ip.protocol,
        both.old.destination,
    );
    fits.retain(|to| to.reason == judged.verdict.reason && to.quoted == new.ends);
    assert!(
        !fits.is_empty(),
        "{:?} became {:?}, as no flow",
        old.ends,
        new.ends
    );
    let [sender, reader] = new.ends.map(|end| end.ip());
    assert_eq!(
        both.new.destination, sender,
        "its reader sent what it quotes"
    );
    if judged.verdict.reason == Reason::ReturnedError {
        assert_eq!(both.new.source, reader, "to a client it is the listener's");
    } else {
        // With one arm it comes from the client.
        let router = both.new.source == both.old.source;
        let client = both.new.source == reader;
        let may_turn = judged.verdict.action == Action::Transmit;
        let turns = may_turn && both.left.tags == both.came.tags;
        assert!(
            if turns {
                client
            } else {
                router || may_turn && client
            },
            "from {}",
            both.new.source
        );
    }
    may_differ(&both, &old);
    sums(&both, &old, &new);
    let hops: Vec<_> = fits.iter().map(|to| to.hop).collect();
    leaves(judged, &both, &hops);
}

/// Ends, hops and checksums, and nothing else.
fn may_differ(both: &Both, old: &Quote) {
    let in_quote = |range: Range<usize>| range.start + old.at..range.end + old.at;
    let mut ranges = both.header();
    ranges.push(both.old.header + 2..both.old.header + 4);
    for side in Side::BOTH {
        ranges.push(in_quote(old.ip.address_at(side)));
        ranges.push(in_quote(old.ip.port_at(side)));
    }
    if !old.ip.v6 {
        ranges.push(in_quote(10..12));
    }
    if old.shows_check() {
        ranges.push(in_quote(old.ip.check_at()));
    }
    both.same_but(&ranges);
}

/// All checksums are as right as they were.
fn sums(both: &Both, old: &Quote, new: &Quote) {
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
    if !old.ip.v6 {
        let header = |quote: &Quote| sum(&[&quote.bytes[..quote.ip.header]]);
        assert_eq!(header(old), header(new), "the quoted header's checksum");
    }
    let none = old.ip.protocol == UDP && old.bytes[old.ip.check_at()] == [0, 0];
    if old.shows_check() && !none {
        let transport =
            |quote: &Quote| sum(&[&quote.ip.addresses(), &quote.bytes[quote.ip.header..]]);
        assert_eq!(
            transport(old),
            transport(new),
            "the quoted transport's checksum"
        );
    }
}

/// An error that was left to the stack is about no flow of ours.
pub(super) fn nobodys(judged: &Judged<'_>) {
    let Some(view) = View::new(judged.frame) else {
        return;
    };
    let Some(ip) = &view.ip else {
        return;
    };
    // Headers in front of the quoted transport header are not walked over.
    let Some(quote) = Quote::of(&view, ip).filter(|quote| {
        let plain = !quote.ip.v6 || quote.ip.header == 40;
        plain && quote.bytes.len() >= quote.ip.header + 8 && quote.ip.source == ip.destination
    }) else {
        return;
    };
    let known = translations(judged.before, quote.ends, quote.ip.protocol, ip.destination);
    assert!(known.is_empty(), "about a flow of ours: {known:?}");
}
