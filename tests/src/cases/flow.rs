//! New flows, known flows, and the way back.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use super::*;

pub(super) fn forward_tcp(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").tcp_options(&[2, 4, 5, 180]);
    let to = |id, backend| {
        Frame::tcp(to_backend(id), f.client, backend, "S")
            .tcp_options(&[2, 4, 5, 180])
            .hops(63)
            .bytes()
    };
    cases.push(Case {
        name: "a SYN goes to the active colour, on the listener's port",
        world: world.clone(),
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.blue, f.blue()),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.colour() == Colour::Blue && flow.generation == 0),
        )),
    });
    cases.push(Case {
        name: "after a flip a SYN goes to the other colour, on the backend's own port (law 1)",
        world: flipped(world, false),
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green, f.green()),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.colour() == Colour::Green && flow.generation == 1),
        )),
    });
    let mut old = flipped(world, false);
    f.add(
        &mut old,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "a SYN of an old flow's tuple takes the word's colour (law 2)",
        world: old.clone(),
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green, f.green()),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.from_client & bits::CONTESTED != 0),
        )),
    });
    cases.push(Case {
        name: "an established flow stays on its backend after a flip (law 2)",
        world: old.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "PA")
            .payload(b"GET /")
            .bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "PA")
            .payload(b"GET /")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.colour() == Colour::Blue),
        )),
    });
    cases.push(Case {
        name: "a FIN is noted",
        world: old.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "FA").bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "FA")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| sides(flow) == (bits::FIN, 0)),
        )),
    });
    cases.push(Case {
        name: "a RST in the window closes the flow",
        world: old.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R")
            .numbers(1200, 0)
            .bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .numbers(1200, 0)
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| sides(flow) == (bits::RST, 0)),
        )),
    });
    cases.push(Case {
        name: "a RST out of the window closes nothing",
        world: old,
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R")
            .numbers(999, 0)
            .bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .numbers(999, 0)
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::Established, Some(|flow| sides(flow) == (0, 0)))),
    });
    let orphan = Frame::tcp(FROM_CLIENT, f.client, f.service, "A");
    cases.push(Case {
        name: "a mid-stream packet of an unknown flow goes where the word says, without proof",
        world: world.clone(),
        frame: orphan.bytes(),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| sides(flow) == (bits::ORPHAN, 0)),
        )),
    });
    cases.push(Case {
        name: "a RST of an unknown flow leaves no entry",
        world: world.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R").bytes(),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::HalfOpen, None)),
    });
}

pub(super) fn back_tcp(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut known = World {
        ingress: BACKENDS,
        ..world.clone()
    };
    f.add(
        &mut known,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    let data = |macs, from| Frame::tcp(macs, from, f.client, "PA").payload(b"HTTP/1.1 200 OK\r\n");
    cases.push(Case {
        name: "a reply leaves as the listener's",
        world: known.clone(),
        frame: data(from_backend(f.blue), f.blue()).bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: data(TO_CLIENT, f.service).hops(63).bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.client_next == 5000),
        )),
    });
    cases.push(Case {
        name: "a reply of a backend that lost the flow is dropped",
        world: known.clone(),
        frame: data(from_backend(f.green), f.green()).bytes(),
        action: Drop,
        reason: ReturnStale,
        out: data(from_backend(f.green), f.green()).bytes(),
        flow: None,
    });
    let mut unreachable = known;
    f.add(
        &mut unreachable,
        FlowTable::Established,
        Flow {
            client_hop: 0,
            ..Family::flow(world, f.blue)
        },
    );
    cases.push(Case {
        name: "a reply whose client's next hop is unknown is dropped, and says so (law 6)",
        world: unreachable,
        frame: data(from_backend(f.blue), f.blue()).bytes(),
        action: Drop,
        reason: ReturnUnreachable,
        out: data(from_backend(f.blue), f.blue()).bytes(),
        flow: None,
    });
    let elsewhere = World {
        ingress: BACKENDS,
        ..world.clone()
    };
    cases.push(Case {
        name: "a reply that belongs to no flow passes untouched (law 9)",
        world: elsewhere,
        frame: data(from_backend(f.blue), f.blue()).bytes(),
        action: Pass,
        reason: ReturnUnknown,
        out: data(from_backend(f.blue), f.blue()).bytes(),
        flow: None,
    });
    let mut one_arm = world.clone();
    one_arm.backends[f.blue as usize].next_hop = NextHop::new([2, 9, 9, 9, 9, 9], CLIENTS as u16).0;
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S");
    let macs = Macs {
        to: [2, 9, 9, 9, 9, 9],
        from: FROM_CLIENT.to,
    };
    cases.push(Case {
        name: "with one arm a packet leaves where it came in",
        world: one_arm,
        frame: syn.bytes(),
        action: Transmit,
        reason: ForwardedNew,
        out: Frame::tcp(macs, f.client, f.blue(), "S").hops(63).bytes(),
        flow: None,
    });
}

pub(super) fn left_over(world: &World, f: Family, cases: &mut Vec<Case>) {
    let ack = Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes();
    let mut strange = world.clone();
    f.add(
        &mut strange,
        FlowTable::Established,
        Flow {
            service: 7,
            ..Family::flow(world, f.green)
        },
    );
    cases.push(Case {
        name: "a flow of another service that had this listener's id is none of this one's",
        world: strange,
        frame: ack.clone(),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .hops(63)
            .bytes(),
        flow: None,
    });
    let mut gone = world.clone();
    f.add(
        &mut gone,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    gone.backends[f.blue as usize] = Backend::default();
    cases.push(Case {
        name: "a flow whose backend's slot was given back is dropped, not sent to nowhere",
        world: gone,
        out: ack.clone(),
        frame: ack,
        action: Drop,
        reason: Inconsistent,
        flow: None,
    });
}

pub(super) fn udp(world: &World, f: Family, cases: &mut Vec<Case>) {
    let query = Frame::udp(FROM_CLIENT, f.client, f.udp).payload(b"query");
    let to = |id: u32| {
        Frame::udp(to_backend(id), f.client, Family::backend(id, f.udp))
            .payload(b"query")
            .hops(63)
            .bytes()
    };
    cases.push(Case {
        name: "UDP: the first packet takes the word's colour",
        world: flipped(world, false),
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green),
        flow: Some(f.check(FlowTable::Udp, Some(|flow| flow.colour() == Colour::Green))),
    });
    let mut known = flipped(world, false);
    f.add(&mut known, FlowTable::Udp, Family::flow(world, f.blue));
    cases.push(Case {
        name: "UDP: a flow sticks to its backend after a flip (law 2)",
        world: known.clone(),
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: to(f.blue),
        flow: Some(f.check(FlowTable::Udp, Some(|flow| flow.colour() == Colour::Blue))),
    });
    let mut idle = known.clone();
    let old = Flow {
        seen: world.tick.wrapping_sub(460),
        ..Family::flow(world, f.blue)
    };
    f.add(&mut idle, FlowTable::Udp, old);
    cases.push(Case {
        name: "UDP: a flow silent for longer than udp_idle is new",
        world: idle,
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green),
        flow: None,
    });
    let mut was_cut = flipped(world, true);
    f.add(&mut was_cut, FlowTable::Udp, Family::flow(world, f.blue));
    cases.push(Case {
        name: "UDP: a cut flow moves at once",
        world: was_cut,
        frame: query.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: to(f.green),
        flow: None,
    });
    let blue = Family::backend(f.blue, f.udp);
    let mut pushed = World {
        ingress: BACKENDS,
        ..flipped(world, true)
    };
    f.add(&mut pushed, FlowTable::Udp, Family::flow(world, f.blue));
    let push = Frame::udp(from_backend(f.blue), blue, f.client)
        .payload(b"frame 1")
        .bytes();
    cases.push(Case {
        name: "UDP: what a cut backend still pushes is dropped",
        world: pushed,
        out: push.clone(),
        frame: push,
        action: Drop,
        reason: CutDropped,
        flow: None,
    });
    let back = World {
        ingress: BACKENDS,
        ..known
    };
    cases.push(Case {
        name: "UDP: a reply leaves as the listener's",
        world: back,
        frame: Frame::udp(from_backend(f.blue), blue, f.client)
            .payload(b"answer")
            .bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: Frame::udp(TO_CLIENT, f.udp, f.client)
            .payload(b"answer")
            .hops(63)
            .bytes(),
        flow: None,
    });
    if f.client.is_ipv4() {
        cases.push(Case {
            name: "UDP over IPv4: no checksum stays no checksum (RFC 768)",
            world: world.clone(),
            frame: Frame::udp(FROM_CLIENT, f.client, f.udp)
                .payload(b"query")
                .without_checksum()
                .bytes(),
            action: TO_BACKEND,
            reason: ForwardedNew,
            out: Frame::udp(to_backend(f.blue), f.client, blue)
                .payload(b"query")
                .without_checksum()
                .hops(63)
                .bytes(),
            flow: None,
        });
    }
}
