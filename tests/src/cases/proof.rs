//! Which flows are remembered, and on what proof (law 7).

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use super::*;

pub(super) fn proof(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut half = world.clone();
    f.add(&mut half, FlowTable::HalfOpen, Family::flow(world, f.blue));
    cases.push(Case {
        name: "the backend's SYN-ACK is remembered as the proof that is asked for (law 7)",
        world: World {
            ingress: BACKENDS,
            ..half.clone()
        },
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "SA")
            .numbers(7000, 1001)
            .bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "SA")
            .numbers(7000, 1001)
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.from_backend & bits::ANSWERED != 0 && flow.proof == 7001),
        )),
    });
    let mut answered = world.clone();
    let entry = Flow {
        from_backend: bits::ANSWERED,
        proof: 7001,
        ..Family::flow(world, f.blue)
    };
    f.add(&mut answered, FlowTable::HalfOpen, entry);
    let ack = |number| Frame::tcp(FROM_CLIENT, f.client, f.service, "A").numbers(1001, number);
    let out = |number| {
        Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .numbers(1001, number)
            .hops(63)
            .bytes()
    };
    cases.push(Case {
        name: "the acknowledgement of that number makes the flow established (law 7)",
        world: answered.clone(),
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(7001),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.from_backend & bits::ANSWERED == 0),
        )),
    });
    cases.push(Case {
        name: "an acknowledgement of another number does not (law 7)",
        world: answered.clone(),
        frame: ack(7002).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(7002),
        flow: Some(f.check(FlowTable::Established, None)),
    });
    cases.push(Case {
        name: "an acknowledgement of what nobody has sent yet does not (law 7)",
        world: half.clone(),
        frame: ack(0).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(0),
        flow: Some(f.check(FlowTable::Established, None)),
    });
    cases.push(Case {
        name: "a flip inside the handshake leaves it on its colour",
        world: World {
            word: world.word.flipped(Colour::Green, false),
            ..answered.clone()
        },
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(7001),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Blue),
        )),
    });
    cases.push(Case {
        name: "with the table full a proven flow is sent on, counted, and not remembered",
        world: World {
            full: true,
            ..answered
        },
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: ForwardedTableFull,
        out: out(7001),
        flow: Some(f.check(FlowTable::Established, None)),
    });
    let mut contested = flipped(world, false);
    let old = Flow {
        from_client: bits::CONTESTED,
        ..Family::flow(world, f.blue)
    };
    f.add(&mut contested, FlowTable::Established, old);
    let new = Flow {
        from_backend: bits::ANSWERED,
        proof: 7001,
        generation: 1,
        ..Family::flow(world, f.green)
    };
    f.add(&mut contested, FlowTable::HalfOpen, new);
    cases.push(Case {
        name: "a proven SYN takes an old flow's tuple over",
        world: contested.clone(),
        frame: ack(7001).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.green), f.client, f.green(), "A")
            .numbers(1001, 7001)
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Green),
        )),
    });
    cases.push(Case {
        name: "an unproven SYN leaves the old flow where it is (law 7)",
        world: contested,
        frame: ack(4242).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(4242),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Blue),
        )),
    });
    backend_proof(world, f, cases);
    spoofed(world, f, cases);
    let mut orphan = world.clone();
    f.add(
        &mut orphan,
        FlowTable::HalfOpen,
        Flow {
            from_client: bits::ORPHAN,
            ..Family::flow(world, f.blue)
        },
    );
    cases.push(Case {
        name: "a backend that answers an orphan's packet proves the flow",
        world: World {
            ingress: BACKENDS,
            ..orphan.clone()
        },
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "A").bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "A")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.from_client & bits::ORPHAN == 0),
        )),
    });
    cases.push(Case {
        name: "a backend's RST for an orphan reaches the client and proves nothing",
        world: World {
            ingress: BACKENDS,
            ..orphan
        },
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "R").bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "R")
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::Established, None)),
    });
}

fn backend_proof(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut half = World {
        ingress: BACKENDS,
        ..world.clone()
    };
    f.add(
        &mut half,
        FlowTable::HalfOpen,
        Flow {
            from_backend: bits::ANSWERED,
            proof: 7001,
            ..Family::flow(world, f.blue)
        },
    );
    for (name, flags, payload, table) in [
        (
            "a backend's bare ACK to a second SYN proves nothing (law 7)",
            "A",
            b"".as_slice(),
            FlowTable::HalfOpen,
        ),
        (
            "a backend's data proves the flow: it has the client's acknowledgement",
            "PA",
            b"220 ready",
            FlowTable::Established,
        ),
        (
            "a backend's FIN proves the flow",
            "FA",
            b"",
            FlowTable::Established,
        ),
    ] {
        let from = |macs, from| Frame::tcp(macs, from, f.client, flags).payload(payload);
        cases.push(Case {
            name,
            world: half.clone(),
            frame: from(from_backend(f.blue), f.blue()).bytes(),
            action: TO_CLIENTS,
            reason: Returned,
            out: from(TO_CLIENT, f.service).hops(63).bytes(),
            flow: Some(f.check(
                FlowTable::Established,
                (table == FlowTable::Established).then_some(|_| true),
            )),
        });
    }
}

fn spoofed(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut half = world.clone();
    f.add(&mut half, FlowTable::HalfOpen, Family::flow(world, f.blue));
    let claim = |macs, from, flags| {
        Frame::tcp(macs, from, f.client, flags)
            .numbers(7000, 1001)
            .payload(b"x")
    };
    let sent_on = |name, world: &World, flags, flow| Case {
        name,
        world: world.clone(),
        frame: claim(FROM_CLIENT, f.blue(), flags).bytes(),
        action: Transmit,
        reason: Returned,
        out: claim(TO_CLIENT, f.service, flags).hops(63).bytes(),
        flow: Some(flow),
    };
    let unproven: fn(&Flow) -> bool = |flow| sides(flow) == (0, 0) && flow.proof == 0;
    cases.push(sent_on(
        "a SYN-ACK from the clients' side asks for no proof (law 7)",
        &half,
        "SA",
        f.check(FlowTable::HalfOpen, Some(unproven)),
    ));
    cases.push(sent_on(
        "data with a backend's address from the clients' side proves nothing (law 7)",
        &half,
        "PA",
        f.check(FlowTable::Established, None),
    ));
    let mut known = world.clone();
    f.add(
        &mut known,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    cases.push(sent_on(
        "a FIN with a backend's address from the clients' side closes nothing",
        &known,
        "FA",
        f.check(FlowTable::Established, Some(|flow| sides(flow) == (0, 0))),
    ));
    cases.push(Case {
        name: "a mid-stream segment without ACK is sent on and not remembered (law 7)",
        world: world.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "P")
            .payload(b"x")
            .bytes(),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "P")
            .payload(b"x")
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::HalfOpen, None)),
    });
}
