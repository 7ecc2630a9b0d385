//! Packets that are made here: read by etherparse, to the letter.

use bg_common::{key::TCP, reason::Reason, snat::via};
use bg_ebpf::{packet::tcp_flag, pipeline::Action};
use bg_tests::frame::wrong_checksum;
use etherparse::{
    Icmpv4Type, Icmpv6Type, NetHeaders, PacketHeaders, PayloadSlice, TcpHeader, TransportHeader,
    icmpv4::{DestUnreachableHeader, TimeExceededCode as TimeExceededV4},
    icmpv6::TimeExceededCode,
};

use super::{
    oracle::Judged,
    sent::tags,
    view::{Ip, View},
    whose,
};

/// What came, and what was made of it.
struct Answer<'a> {
    view: View,
    ip: Ip,
    made: View,
    new: Ip,
    parsed: PacketHeaders<'a>,
}

impl<'a> Answer<'a> {
    fn of(judged: &Judged<'a>) -> Self {
        let read = |frame| {
            let view = View::new(frame).expect("a frame's header");
            let ip = view.ip.clone().expect("an IP header");
            (view, ip)
        };
        let (view, ip) = read(judged.frame);
        let (made, new) = read(judged.out);
        let parsed = PacketHeaders::from_ethernet_slice(judged.out).expect("a packet");
        assert_eq!(wrong_checksum(judged.out), None);
        if let Some(NetHeaders::Ipv4(ip, _)) = &parsed.net {
            assert_eq!(ip.header_checksum, ip.calc_header_checksum());
        }
        assert_eq!(new.total, made.packet.len(), "nothing behind it");
        assert!(new.hops > 1 && new.is_whole());
        let result = Self {
            view,
            ip,
            made,
            new,
            parsed,
        };
        if judged.verdict.action == Action::Transmit && result.goes_back() {
            let [to, from] = result.view.macs;
            assert_eq!(result.made.macs, [from, to]);
            assert_eq!(result.made.tags, result.view.tags);
        }
        result
    }

    /// True when it goes to who sent the packet.
    fn goes_back(&self) -> bool {
        self.new.destination == self.ip.source && self.new.source == self.ip.destination
    }
}

/// A TCP reset (RFC 9293, section 3.10.7).
pub(super) fn reset(judged: &Judged<'_>) {
    let answer = Answer::of(judged);
    let ip = &answer.ip;
    assert_eq!(ip.protocol, TCP, "only TCP is reset");
    let Some(TransportHeader::Tcp(rst)) = &answer.parsed.transport else {
        panic!("no TCP: {:?}", answer.parsed);
    };
    assert!(rst.rst && !rst.syn && !rst.fin, "a RST and nothing else");
    assert!(rst.options.is_empty());
    assert!(matches!(answer.parsed.payload, PayloadSlice::Tcp([])));
    let segment = &answer.view.packet[ip.header..ip.total];
    let (tcp, rest) = TcpHeader::from_slice(segment).expect("TCP");
    assert!(!tcp.rst, "a RST is not answered");

    let ends = whose::ends(ip, &answer.view.packet).expect("ports");
    assert!(
        whose::is_cut(judged.before, ends, TCP),
        "its flow is not cut"
    );
    if answer.goes_back() {
        assert_eq!(judged.verdict.action, Action::Transmit);
        assert_eq!(
            [rst.destination_port, rst.source_port],
            ends.map(|end| end.port())
        );
        if tcp.ack {
            assert_eq!(
                (rst.sequence_number, rst.ack),
                (tcp.acknowledgment_number, false)
            );
        } else {
            let taken = rest.len() as u32 + u32::from(tcp.syn) + u32::from(tcp.fin);
            let next = tcp.sequence_number.wrapping_add(taken);
            assert_eq!((rst.sequence_number, rst.ack), (0, true));
            assert_eq!(rst.acknowledgment_number, next);
        }
        return;
    }
    // For the client, made of what its backend sent.
    assert_eq!(judged.verdict.reason, Reason::ResetClient);
    let owed = whose::owed(judged.before, ends, TCP).expect("a backend's");
    let made = whose::ends(&answer.new, &answer.made.packet).expect("ports");
    assert_eq!(made, owed.ends(), "from the listener to the flow's client");
    let flows = owed.own(judged.before);
    let waits = |number| number == rst.sequence_number;
    assert!(
        waits(tcp.sequence_number) || flows.iter().any(|(_, flow)| waits(flow.backend_next)),
        "a number that the client does not wait for"
    );
    assert_eq!(rst.ack, tcp.ack);
    let interfaces = &judged.before.interfaces;
    let leaves = flows.iter().any(|(_, flow)| {
        let slot = flow.hop().slot().unwrap_or(0);
        let interface = &interfaces[usize::from(slot)];
        answer.made.macs == [flow.hop().mac(), interface.mac]
            && answer.made.tags == tags(interface.tags.0, &answer.view.tags)
    });
    assert!(leaves, "by another way than its flow's");
    let flags = answer.view.packet[ip.header + 13];
    assert_eq!(flags & tcp_flag::RST, 0);
}

/// True when the stack would take the packet, had it been rewritten.
fn by_stack(judged: &Judged<'_>, answer: &Answer<'_>) -> bool {
    let ends = whose::ends(&answer.ip, &answer.view.packet).expect("ports");
    let Some(asked) = whose::asked(judged.before, ends, answer.ip.protocol) else {
        return true;
    };
    let known = asked.known_ways(judged.before, true);
    let mut ways = known
        .iter()
        .chain(&asked.new_ways(judged))
        .copied()
        .collect::<Vec<_>>();
    ways.retain(|way| way.via != via::NAT);
    ways.is_empty()
}

/// An ICMP error of ours (RFC 792, RFC 4443).
pub(super) fn told(judged: &Judged<'_>) {
    assert_eq!(judged.verdict.action, Action::Transmit);
    let answer = Answer::of(judged);
    let ip = &answer.ip;
    assert!(answer.goes_back(), "told to somebody else");
    assert_eq!(ip.offset, 0, "nobody is told of a later fragment");
    let too_big = judged.verdict.reason == Reason::SentTooBig;
    let mtu = match (&answer.parsed.transport, &answer.parsed.net) {
        (Some(TransportHeader::Icmpv4(icmp)), Some(NetHeaders::Ipv4(..))) => match icmp.icmp_type {
            Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::FragmentationNeeded {
                next_hop_mtu,
            }) => Some(u32::from(next_hop_mtu)),
            Icmpv4Type::TimeExceeded(TimeExceededV4::TtlExceededInTransit) => None,
            ref other => panic!("told {other:?}"),
        },
        (Some(TransportHeader::Icmpv6(icmp)), Some(NetHeaders::Ipv6(..))) => match icmp.icmp_type {
            Icmpv6Type::PacketTooBig { mtu } => Some(mtu),
            Icmpv6Type::TimeExceeded(TimeExceededCode::HopLimitExceeded) => None,
            ref other => panic!("told {other:?}"),
        },
        other => panic!("no ICMP: {other:?}"),
    };
    if too_big {
        let mtu = mtu.expect("an MTU");
        assert!(ip.total > mtu as usize, "it would have fitted");
        assert!(
            !ip.may_fragment || !by_stack(judged, &answer),
            "routers split it"
        );
        let real = judged.before.interfaces.iter().any(|i| i.mtu == mtu);
        assert!(real, "an MTU of {mtu}");
    } else {
        assert_eq!(mtu, None);
        assert!(ip.hops <= 1, "it had hops left");
    }
    let (PayloadSlice::Icmpv4(quote) | PayloadSlice::Icmpv6(quote)) = answer.parsed.payload else {
        panic!("no quote");
    };
    assert_eq!(
        quote,
        &answer.view.packet[..ip.header + 8],
        "what it is about"
    );
}
