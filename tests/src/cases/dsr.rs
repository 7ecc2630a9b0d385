//! `dsr`: nothing but the Ethernet header and the TTL changes, and replies are never
//! heard.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use bg_common::snat::via;

use super::{errors::Icmp, *};
use crate::frame;

/// A world with a flow to blue in `table`.
fn with(world: &World, f: Family, table: FlowTable, change: impl FnOnce(&mut Flow)) -> World {
    f.with(world, table, f.blue, |flow| {
        flow.via = via::DSR;
        change(flow);
    })
}

pub(super) fn dsr(world: &World, f: Family, cases: &mut Vec<Case>) {
    let world = world.with_dsr();
    forward(&world, f, cases);
    life(&world, f, cases);
    rest(&world, f, cases);
}

fn forward(world: &World, f: Family, cases: &mut Vec<Case>) {
    for (name, flags, world, backend, reason, check) in [
        (
            "dsr: a SYN goes on as it is, to the backend's MAC",
            "S",
            world.clone(),
            f.blue,
            ForwardedNew,
            f.check(FlowTable::HalfOpen, Some(|flow| flow.via == via::DSR)),
        ),
        (
            "dsr: after a flip a SYN goes to the other colour (law 1)",
            "S",
            flipped(world, false),
            f.green,
            ForwardedNew,
            f.check(FlowTable::HalfOpen, Some(|flow| flow.generation == 1)),
        ),
        (
            "dsr: a known flow stays over a flip, and its client's ACK is its proof (law 2)",
            "A",
            flipped(&with(world, f, FlowTable::HalfOpen, |_| ()), false),
            f.blue,
            Forwarded,
            f.check(
                FlowTable::HalfOpen,
                Some(|flow| flow.from_client == bits::PROVEN),
            ),
        ),
        (
            "dsr: an unknown flow goes where a new one would",
            "A",
            world.clone(),
            f.blue,
            ForwardedOrphan,
            f.check(FlowTable::HalfOpen, Some(|flow| flow.via == via::DSR)),
        ),
    ] {
        let segment = |macs| Frame::tcp(macs, f.client, f.service, flags).numbers(1000, 5000);
        cases.push(Case {
            name,
            world,
            frame: segment(FROM_CLIENT).bytes(),
            action: TO_BACKEND,
            reason,
            out: segment(to_backend(backend)).hops(63).bytes(),
            flow: Some(check),
        });
    }
    let datagram = |macs| Frame::udp(macs, f.client, f.udp).payload(b"question");
    for (name, world, reason) in [
        ("dsr: a first datagram", world.clone(), ForwardedNew),
        (
            "dsr: a known flow's datagram",
            flipped(&with(world, f, FlowTable::Udp, |_| ()), false),
            Forwarded,
        ),
    ] {
        cases.push(Case {
            name,
            world,
            frame: datagram(FROM_CLIENT).bytes(),
            action: TO_BACKEND,
            reason,
            out: datagram(to_backend(f.blue)).hops(63).bytes(),
            flow: Some(f.check(FlowTable::Udp, Some(|flow| flow.via == via::DSR))),
        });
    }
}

/// The client's segments say all there is to know.
fn life(world: &World, f: Family, cases: &mut Vec<Case>) {
    let proven = with(world, f, FlowTable::HalfOpen, |flow| {
        flow.from_client = bits::PROVEN;
    });
    let mut silent = proven.clone();
    for flow in silent.flows.values_mut() {
        flow.seen -= 60_000; // more than an hour
    }
    let mut case = |name, world: &World, flags, reason, holds: fn(&Flow) -> bool| {
        let segment = |macs| Frame::tcp(macs, f.client, f.service, flags).numbers(2000, 5000);
        cases.push(Case {
            name,
            world: world.clone(),
            frame: segment(FROM_CLIENT).bytes(),
            action: TO_BACKEND,
            reason,
            out: segment(to_backend(f.blue)).hops(63).bytes(),
            flow: Some(f.check(FlowTable::HalfOpen, Some(holds))),
        });
    };
    case(
        "dsr: a flow that its client has proven may be silent for long",
        &silent,
        "A",
        Forwarded,
        // What it says is where its window is.
        |flow| (flow.from_client, flow.client_next) == (bits::PROVEN, 2000),
    );
    case(
        "dsr: the client's FIN closes the flow",
        &proven,
        "FA",
        Forwarded,
        Flow::is_closing,
    );
    case(
        "dsr: the client's RST closes the flow",
        &proven,
        "R",
        Forwarded,
        Flow::is_closing,
    );
}

fn rest(world: &World, f: Family, cases: &mut Vec<Case>) {
    let proven = with(world, f, FlowTable::HalfOpen, |flow| {
        flow.from_client = bits::PROVEN;
    });
    cases.push(Case {
        name: "dsr: a cut flow's client gets a RST from the listener",
        world: flipped(&proven, true),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "A")
            .numbers(1000, 5000)
            .bytes(),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(BACK_TO_CLIENT, f.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    // The client has no such connection any more: the old backend hears it.
    let rst = |macs| Frame::tcp(macs, f.client, f.service, "R").numbers(1000, 0);
    cases.push(Case {
        name: "dsr: the client's RST reaches the backend of a cut flow",
        world: flipped(&proven, true),
        frame: rst(FROM_CLIENT).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: rst(to_backend(f.blue)).hops(63).bytes(),
        flow: None,
    });
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").bytes();
    let mut no_hop = world.clone();
    no_hop.backends[f.blue as usize].next_hop = 0;
    cases.push(Case {
        name: "dsr: without a next hop a packet is dropped: the stack would answer it itself",
        world: no_hop,
        frame: syn.clone(),
        action: Drop,
        reason: ForwardUnreachable,
        out: syn,
        flow: None,
    });
    let Icmp {
        header,
        too_big,
        router,
        ..
    } = Icmp::of(f);
    let quote = Frame::tcp(TO_CLIENT, f.service, f.client, "PA")
        .payload(&[7; 1400])
        .quote(header + 400);
    let error = |macs| Frame::icmp(macs, router, f.service.ip(), too_big, &quote);
    cases.push(Case {
        name: "dsr: an error about a reply reaches the backend as it is",
        world: proven,
        frame: error(FROM_CLIENT).bytes(),
        action: TO_BACKEND,
        reason: ForwardedError,
        out: error(to_backend(f.blue)).hops(63).bytes(),
        flow: None,
    });
    let own = Frame::tcp(from_backend(f.blue), f.blue(), f.client, "PA").bytes();
    cases.push(Case {
        name: "dsr: what a backend sends in its own name is not ours (law 9)",
        world: World {
            ingress: BACKENDS,
            ..world.clone()
        },
        frame: own.clone(),
        action: Pass,
        reason: NotOurs,
        out: own,
        flow: None,
    });
    let payload: Vec<u8> = (0..3000).map(|at| (at * 7) as u8).collect();
    let datagram = |macs| Frame::udp(macs, f.client, f.udp).payload(&payload);
    let first = |frame: &Frame| frame::fragments(&frame.bytes(), 1200)[0].clone();
    cases.push(Case {
        name: "dsr: a first fragment goes on as it is",
        world: world.clone(),
        frame: first(&datagram(FROM_CLIENT)),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: first(&datagram(to_backend(f.blue)).hops(63)),
        flow: None,
    });
}

/// A large datagram that leaves in fragments.
pub(super) fn large(world: &World, f: Family) -> Vec<(Case, Vec<u8>)> {
    let payload: Vec<u8> = (0..6000).map(|at| (at * 13) as u8).collect();
    let datagram = |macs| Frame::udp(macs, f.client, f.udp).payload(&payload);
    let case = Case {
        name: "dsr: a request in fragments",
        world: world.with_dsr(),
        frame: datagram(FROM_CLIENT).bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: Vec::new(),
        flow: None,
    };
    vec![(case, datagram(to_backend(f.blue)).hops(63).bytes())]
}
