//! Packets in fragments.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use bg_common::{
    key::{FragmentKey, UDP},
    port::Tags,
    service::{Fragment as FragmentEntry, Interface, way},
    snat::via,
};

use super::*;
use crate::{frame, world::wide};

/// Bytes in a fragment.
const SIZE: usize = 1200;

/// A client's datagram that takes three fragments, and what its backend gets.
fn request(f: Family) -> (Frame, Frame) {
    let blue = Family::backend(f.blue, f.udp);
    let payload: Vec<u8> = (0..3000).map(|at| (at * 7) as u8).collect();
    (
        Frame::udp(FROM_CLIENT, f.client, f.udp).payload(&payload),
        Frame::udp(to_backend(f.blue), f.client, blue)
            .payload(&payload)
            .hops(63),
    )
}

/// A backend's datagram, and what its client gets.
fn answer(f: Family) -> (Frame, Frame) {
    let blue = Family::backend(f.blue, f.udp);
    let payload: Vec<u8> = (0..3000).map(|at| (at * 11) as u8).collect();
    (
        Frame::udp(from_backend(f.blue), blue, f.client).payload(&payload),
        Frame::udp(TO_CLIENT, f.udp, f.client)
            .payload(&payload)
            .hops(63),
    )
}

fn nth((before, after): &(Frame, Frame), n: usize) -> (Vec<u8>, Vec<u8>) {
    let of = |frame: &Frame| frame::fragments(&frame.bytes(), SIZE)[n].clone();
    (of(before), of(after))
}

/// The world after a first fragment that went there.
fn remembered(
    world: &World,
    (from, to): (SocketAddr, SocketAddr),
    fragment: FragmentEntry,
) -> World {
    let mut world = world.clone();
    let (source, destination) = (wide(from), wide(to));
    if from.is_ipv4() {
        let [a, b, c, d, ..] = source;
        let [p, q, r, s, ..] = destination;
        let key = FragmentKey {
            vlan: Tags::NONE,
            identification: 0xb1e5,
            protocol: u32::from(UDP),
            source: [a, b, c, d],
            destination: [p, q, r, s],
        };
        world.fragments_v4.insert(key, fragment);
    } else {
        let key = FragmentKey {
            vlan: Tags::NONE,
            identification: 0xb1e5,
            protocol: 0,
            source,
            destination,
        };
        world.fragments_v6.insert(key, fragment);
    }
    world
}

/// A first fragment that went to blue.
fn forwarded(world: &World, f: Family) -> FragmentEntry {
    FragmentEntry {
        next_hop: NextHop::new(to_backend(f.blue).to, BACKENDS as u16).0,
        address: world.backends[f.blue as usize].address,
        seen: world.tick,
        way: way::FORWARD,
        ..FragmentEntry::default()
    }
}

pub(super) fn fragments(world: &World, f: Family, cases: &mut Vec<Case>) {
    let to = forwarded(world, f);
    let ends = (f.client, f.udp);
    let request = request(f);
    let (first, first_out) = nth(&request, 0);
    let (later, later_out) = nth(&request, 2);
    let mut case = |name, world: World, frame: &[u8], action, reason, out: &[u8]| {
        cases.push(Case {
            name,
            world,
            frame: frame.to_vec(),
            action,
            reason,
            out: out.to_vec(),
            flow: None,
        });
    };
    case(
        "a first fragment is looked up like a whole packet",
        world.clone(),
        &first,
        TO_BACKEND,
        ForwardedNew,
        &first_out,
    );
    let known = remembered(world, ends, to);
    case(
        "a later fragment goes where the first one went",
        known.clone(),
        &later,
        TO_BACKEND,
        ForwardedFragment,
        &later_out,
    );
    case(
        "a later fragment follows the first one also when the word has changed (law 2)",
        flipped(&known, true),
        &later,
        TO_BACKEND,
        ForwardedFragment,
        &later_out,
    );
    case(
        "a later fragment without a first one is the stack's (law 9)",
        world.clone(),
        &later,
        Pass,
        Fragment,
        &later,
    );
    let old = FragmentEntry {
        seen: world.tick.wrapping_sub(460),
        ..to
    };
    case(
        "a first fragment of half a minute ago is forgotten",
        remembered(world, ends, old),
        &later,
        Pass,
        Fragment,
        &later,
    );
    let recent = FragmentEntry {
        seen: world.tick.wrapping_sub(300),
        ..to
    };
    case(
        "a first fragment of twenty seconds ago is not",
        remembered(world, ends, recent),
        &later,
        TO_BACKEND,
        ForwardedFragment,
        &later_out,
    );
    // The last offset there is, in 8 bytes.
    let (mut beyond, at) = (later.clone(), if f.client.is_ipv4() { 20 } else { 56 });
    let offset = if f.client.is_ipv4() { 8191 } else { 8191 << 3 };
    beyond[at..at + 2].copy_from_slice(&u16::to_be_bytes(offset));
    case(
        "a later fragment that ends behind byte 65 535 is the stack's",
        known.clone(),
        &beyond,
        Pass,
        Fragment,
        &beyond,
    );
    let early = frame::fragments(&request.0.bytes(), 16)[1].clone();
    case(
        "a later fragment that begins before byte 24 is the stack's, whoever came first",
        known.clone(),
        &early,
        Pass,
        Fragment,
        &early,
    );
    let mut in_vlan = known.clone();
    in_vlan.interfaces.push(Interface {
        tags: Tags::new(Tags::C, 100),
        device: 102,
        ..known.interfaces[CLIENTS as usize]
    });
    let elsewhere = frame::tagged(&later, &[[0x81, 0, 0, 100]]);
    case(
        "a later fragment of another VLAN has nobody to follow",
        in_vlan,
        &elsewhere,
        Pass,
        Fragment,
        &elsewhere,
    );
    for (name, way, reason) in [
        (
            "later fragments of a packet that was not sent on are dropped",
            way::NOWHERE,
            FragmentDropped,
        ),
        (
            "later fragments of a cut flow's packet are dropped",
            way::CUT,
            CutDropped,
        ),
    ] {
        let nowhere = remembered(world, ends, FragmentEntry { way, ..to });
        case(name, nowhere, &later, Drop, reason, &later);
    }
    let (mut ends_here, hops) = (later.clone(), if f.client.is_ipv4() { 22 } else { 21 });
    ends_here[hops] = 1;
    case(
        "nobody is told that a later fragment's TTL is used up (RFC 1122)",
        known.clone(),
        &ends_here,
        Pass,
        TtlExpired,
        &ends_here,
    );
    let mut narrow = known.clone();
    narrow.interfaces[BACKENDS as usize].mtu = 300;
    case(
        "a later fragment that is too large and must stay whole is dropped",
        narrow,
        &later,
        Drop,
        FragmentDropped,
        &later,
    );
    let alone = FragmentEntry {
        next_hop: 0,
        via: via::DSR,
        ..to
    };
    case(
        "dsr: without a next hop a later fragment is dropped, too",
        remembered(world, ends, alone),
        &later,
        Drop,
        FragmentDropped,
        &later,
    );
    let unresolved = remembered(world, ends, FragmentEntry { next_hop: 0, ..to });
    let stack = Frame::udp(FROM_CLIENT, f.client, Family::backend(f.blue, f.udp))
        .payload(&(0..3000).map(|at| (at * 7) as u8).collect::<Vec<u8>>());
    case(
        "without a next hop the stack takes the rewritten fragment",
        unresolved,
        &later,
        Pass,
        ForwardedByStack,
        &frame::fragments(&stack.bytes(), SIZE)[2],
    );
    let answer = answer(f);
    let back = FragmentEntry {
        next_hop: NextHop::new(TO_CLIENT.to, CLIENTS as u16).0,
        address: wide(f.udp),
        way: way::BACK,
        ..to
    };
    let from = Family::backend(f.blue, f.udp);
    let returned = World {
        ingress: BACKENDS,
        ..remembered(world, (from, f.client), back)
    };
    let (frame, out) = nth(&answer, 1);
    case(
        "a later fragment of an answer follows its first one",
        returned,
        &frame,
        TO_CLIENTS,
        ReturnedFragment,
        &out,
    );
    tcp(world, f, cases);
}

fn tcp(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut was_cut = flipped(world, true);
    f.add(
        &mut was_cut,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    let segment = |flags| {
        Frame::tcp(FROM_CLIENT, f.client, f.service, flags)
            .payload(&[7; 100])
            .bytes()
    };
    let first = |flags, size| frame::fragments(&segment(flags), size)[0].clone();
    let back = BACK_TO_CLIENT;
    cases.push(Case {
        name: "the first fragment of a cut flow's segment is answered with a RST",
        world: was_cut.clone(),
        frame: first("PA", 64),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(back, f.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    cases.push(Case {
        name: "a first fragment without ACK does not say what a RST has to acknowledge",
        world: was_cut,
        frame: first("F", 64),
        action: Drop,
        reason: CutDropped,
        out: first("F", 64),
        flow: None,
    });
    for (name, frame) in [
        (
            "a first fragment that hides TCP's flags is the stack's (RFC 1858)",
            first("S", 8),
        ),
        (
            "a later fragment that would write over TCP's flags is the stack's (RFC 1858)",
            frame::fragments(&segment("S"), 8)[1].clone(),
        ),
    ] {
        cases.push(Case {
            name,
            world: world.clone(),
            out: frame.clone(),
            frame,
            action: Pass,
            reason: Fragment,
            flow: Some(f.check(FlowTable::HalfOpen, None)),
        });
    }
}

/// Large datagrams both ways: new, drained, cut, and of nobody.
pub(super) fn large(world: &World, f: Family) -> Vec<(Case, Vec<u8>)> {
    let mut drained = flipped(world, false);
    f.add(&mut drained, FlowTable::Udp, Family::flow(world, f.blue));
    let case = |name, world: &World, action, reason, (frame, out): (Frame, Frame)| {
        let case = Case {
            name,
            world: world.clone(),
            frame: frame.bytes(),
            action,
            reason,
            out: Vec::new(),
            flow: None,
        };
        (case, out.bytes())
    };
    let back = World {
        ingress: BACKENDS,
        ..drained.clone()
    };
    let mut empty = world.clone();
    empty.pools = [PoolWord::default(); 4];
    let was_cut = World {
        word: back
            .word
            .flipped(Colour::Blue, true)
            .flipped(Colour::Green, true),
        ..back.clone()
    };
    let (to_service, _) = request(f);
    let (from_server, _) = answer(f);
    let mut elsewhere = remembered(world, (f.client, f.udp), forwarded(world, f));
    elsewhere.listeners_v4.clear();
    elsewhere.listeners_v6.clear();
    vec![
        case(
            "the host's own datagram, with the identification of one that was sent on",
            &elsewhere,
            Pass,
            NotOurs,
            (to_service.clone(), to_service.clone()),
        ),
        case(
            "a datagram that finds no backend",
            &empty,
            Drop,
            NoBackend,
            (to_service.clone(), to_service),
        ),
        case(
            "a cut flow's answer",
            &was_cut,
            Drop,
            CutDropped,
            (from_server.clone(), from_server),
        ),
        case(
            "a new flow's datagram",
            world,
            TO_BACKEND,
            ForwardedNew,
            request(f),
        ),
        case(
            "a drained flow's datagram",
            &drained,
            TO_BACKEND,
            Forwarded,
            request(f),
        ),
        case(
            "a drained flow's answer",
            &back,
            TO_CLIENTS,
            Returned,
            answer(f),
        ),
    ]
}
