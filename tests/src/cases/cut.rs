//! Cut, rollback, and resets.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use super::*;

/// The end of a drain: what the word spares, and what it does not any more.
pub(super) fn drain(world: &World, f: Family, cases: &mut Vec<Case>) {
    let drain = flipped(world, false);
    let ends = World {
        word: drain.word.drained(64),
        ..drain
    };
    let with = |table, spread: u64, generation| {
        let mut world = ends.clone();
        let flow = Flow {
            colour_spread: colour_spread(Colour::Blue, spread),
            generation,
            ..Family::flow(&ends, f.blue)
        };
        f.add(&mut world, table, flow);
        world
    };
    let to = BACK_TO_CLIENT;
    let segment = Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes();
    let forwarded = Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
        .hops(63)
        .bytes();
    for (name, spread, generation) in [
        ("an old flow that is still spared stays (law 2)", 63, 0),
        ("a canary's flow is no old one (law 2)", 127, 1),
    ] {
        cases.push(Case {
            name,
            world: with(FlowTable::Established, spread, generation),
            frame: segment.clone(),
            action: TO_BACKEND,
            reason: Forwarded,
            out: forwarded.clone(),
            flow: None,
        });
    }
    cases.push(Case {
        name: "an old flow that is spared no longer is reset",
        world: with(FlowTable::Established, 64, 0),
        frame: segment,
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(to, f.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    for (name, spread, backend, reason) in [
        ("UDP that is still spared stays", 63, f.blue, Forwarded),
        (
            "UDP that is spared no longer takes the word's colour",
            64,
            f.green,
            ForwardedNew,
        ),
    ] {
        let [frame, out] = f.datagram(backend);
        cases.push(Case {
            name,
            world: with(FlowTable::Udp, spread, 0),
            frame,
            action: TO_BACKEND,
            reason,
            out,
            flow: None,
        });
    }
}

pub(super) fn cut(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut was_cut = flipped(world, true);
    f.add(
        &mut was_cut,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    let back = BACK_TO_CLIENT;
    // A request with padding behind it, as a short frame has it: the length of
    // the packet is the IP header's.
    cases.push(Case {
        name: "a client of a cut flow gets a RST with the number it waits for",
        world: was_cut.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "PA")
            .payload(b"GET")
            .padding(9)
            .bytes(),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(back, f.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            // An old acknowledgement may have been answered: the way back makes sure.
            Some(|flow| sides(flow) == (bits::RST, 0)),
        )),
    });
    cases.push(Case {
        name: "a segment without ACK gets a RST that acknowledges it (RFC 9293)",
        world: was_cut.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "F")
            .payload(b"1234")
            .padding(2)
            .bytes(),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(back, f.service, f.client, "RA")
            .numbers(0, 1005)
            .window(0)
            .bytes(),
        flow: None,
    });
    cases.push(Case {
        name: "a client's own RST of a cut flow closes the backend's side",
        world: was_cut.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "R").bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "R")
            .hops(63)
            .bytes(),
        flow: None,
    });
    let from_blue = World {
        ingress: BACKENDS,
        ..was_cut.clone()
    };
    let data = Frame::tcp(from_backend(f.blue), f.blue(), f.client, "PA").numbers(5000, 1000);
    cases.push(Case {
        name: "a backend's data of a cut flow becomes the RST that its client waits for",
        world: from_blue.clone(),
        frame: data.clone().payload(b"token token").bytes(),
        action: TO_CLIENTS,
        reason: ResetClient,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "RA")
            .numbers(5000, 1000)
            .window(0)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| sides(flow) == (0, bits::CLIENT_CUT | bits::RST)),
        )),
    });
    cases.push(Case {
        name: "a keep-alive probe of a cut flow becomes a RST that its client takes (RFC 5961)",
        world: from_blue.clone(),
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "A")
            .numbers(4999, 1000)
            .bytes(),
        action: TO_CLIENTS,
        reason: ResetClient,
        out: Frame::tcp(TO_CLIENT, f.service, f.client, "RA")
            .numbers(5000, 1000)
            .window(0)
            .bytes(),
        flow: None,
    });
    let mut told = from_blue.clone();
    let entry = Flow {
        from_backend: bits::CLIENT_CUT | bits::RST,
        ..Family::flow(world, f.blue)
    };
    f.add(&mut told, FlowTable::Established, entry);
    let to_blue = Macs {
        to: from_backend(f.blue).from,
        from: from_backend(f.blue).to,
    };
    cases.push(Case {
        name: "the backend's next segment of a cut flow is answered with a RST",
        world: told,
        frame: data.payload(b"more").bytes(),
        action: Transmit,
        reason: ResetBackend,
        out: Frame::tcp(to_blue, f.client, f.blue(), "R")
            .numbers(1000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    let mut handshake = World {
        ingress: BACKENDS,
        ..flipped(world, true)
    };
    f.add(
        &mut handshake,
        FlowTable::HalfOpen,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "cut inside the handshake: the backend is reset, the client's SYN will come again",
        world: handshake,
        frame: Frame::tcp(from_backend(f.blue), f.blue(), f.client, "SA")
            .numbers(7000, 1001)
            .bytes(),
        action: Transmit,
        reason: ResetBackend,
        out: Frame::tcp(to_blue, f.client, f.blue(), "R")
            .numbers(1001, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    let mut rolled_back = World {
        word: flipped(world, false).word.flipped(Colour::Blue, true),
        ..world.clone()
    };
    f.add(
        &mut rolled_back,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "a rollback cuts the bad colour only (law 5)",
        world: rolled_back.clone(),
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .hops(63)
            .bytes(),
        flow: None,
    });
    let again = World {
        word: rolled_back.word.flipped(Colour::Green, false),
        ..rolled_back.clone()
    };
    cases.push(Case {
        name: "a drain flip after a rollback leaves old flows alone (law 2)",
        world: again,
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: Frame::tcp(to_backend(f.blue), f.client, f.blue(), "A")
            .hops(63)
            .bytes(),
        flow: None,
    });
    f.add(
        &mut rolled_back,
        FlowTable::Established,
        Flow {
            generation: 1,
            ..Family::flow(world, f.green)
        },
    );
    cases.push(Case {
        name: "a rollback cuts the bad colour's flows",
        world: rolled_back,
        frame: Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes(),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(back, f.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
}
