//! Previews: what always reaches one colour, and answers as itself.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use super::{
    errors::Icmp,
    snat::{LENT, lend_towards, own},
    *,
};
use crate::world::preview_at;

/// A family whose listeners are the previews of a colour.
fn of(f: Family, colour: Colour) -> Family {
    Family {
        service: preview_at(colour, f.service),
        udp: preview_at(colour, f.udp),
        listener: World::preview_id(colour, f.listener),
        udp_listener: World::preview_id(colour, f.udp_listener),
        ..f
    }
}

fn id(f: Family, colour: Colour) -> u32 {
    [f.blue, f.green][colour as usize]
}

/// A world with a flow to a colour, by its preview or by the listener.
fn with(world: &World, f: Family, colour: Colour, table: FlowTable) -> World {
    f.with(world, table, id(f, colour), |_| ())
}

pub(super) fn preview(world: &World, f: Family, cases: &mut Vec<Case>) {
    let world = world.with_previews();
    newcomers(&world, f, cases);
    forward(&world, f, cases);
    back(&world, f, cases);
    errors(&world, f, cases);
    snat(&world.with_snat(), f, cases);
}

/// Whatever the word says.
fn newcomers(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut canary = world.clone();
    canary.word = canary.word.with_canary(u16::MAX);
    for (name, world, colour) in [
        (
            "preview: a SYN reaches the standby",
            world.clone(),
            Colour::Green,
        ),
        (
            "preview: a SYN reaches the active colour",
            world.clone(),
            Colour::Blue,
        ),
        (
            "preview: a canary's share takes none of its SYNs",
            canary,
            Colour::Blue,
        ),
        (
            "preview: after a flip a SYN still reaches the old colour",
            flipped(world, false),
            Colour::Blue,
        ),
    ] {
        let at = of(f, colour);
        let backend = id(f, colour);
        let holds: fn(&Flow) -> bool = match colour {
            Colour::Blue => |flow| flow.colour() == Colour::Blue,
            Colour::Green => |flow| flow.colour() == Colour::Green,
        };
        cases.push(Case {
            name,
            world: world.clone(),
            frame: Frame::tcp(FROM_CLIENT, f.client, at.service, "S").bytes(),
            action: TO_BACKEND,
            reason: ForwardedNew,
            out: Frame::tcp(
                to_backend(backend),
                f.client,
                Family::backend(backend, f.service),
                "S",
            )
            .hops(63)
            .bytes(),
            flow: Some(at.check(FlowTable::HalfOpen, Some(holds))),
        });
        let [frame, out] = at.datagram(backend);
        cases.push(Case {
            name: "preview: and so does a datagram",
            world,
            frame,
            action: TO_BACKEND,
            reason: ForwardedNew,
            out,
            flow: Some(at.check(FlowTable::Udp, Some(holds))),
        });
    }
    let mut empty = world.clone();
    let pool = PoolWord::index(0, Colour::Green, f.client.is_ipv6());
    empty.pools[pool as usize] = PoolWord::default();
    let syn = Frame::tcp(FROM_CLIENT, f.client, of(f, Colour::Green).service, "S").bytes();
    cases.push(Case {
        name: "preview: with no backend there, nobody else answers",
        world: empty,
        frame: syn.clone(),
        action: Drop,
        reason: NoBackend,
        out: syn,
        flow: None,
    });
}

fn forward(world: &World, f: Family, cases: &mut Vec<Case>) {
    let at = of(f, Colour::Blue);
    let known = with(world, at, Colour::Blue, FlowTable::Established);
    let segment = |to| Frame::tcp(FROM_CLIENT, f.client, to, "A").bytes();
    let out = |backend| {
        let end = Family::backend(backend, f.service);
        Frame::tcp(to_backend(backend), f.client, end, "A")
            .hops(63)
            .bytes()
    };
    cases.push(Case {
        name: "preview: a known flow stays over a flip (law 2)",
        world: flipped(&known, false),
        frame: segment(at.service),
        action: TO_BACKEND,
        reason: Forwarded,
        out: out(f.blue),
        flow: None,
    });
    cases.push(Case {
        name: "preview: its flow is none of the listener's",
        world: flipped(&known, false),
        frame: segment(f.service),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: out(f.green),
        flow: None,
    });
    cases.push(Case {
        name: "preview: a flip that cuts resets what came before it",
        world: flipped(&known, true),
        frame: segment(at.service),
        action: Transmit,
        reason: ResetClient,
        out: Frame::tcp(BACK_TO_CLIENT, at.service, f.client, "R")
            .numbers(5000, 0)
            .window(0)
            .bytes(),
        flow: None,
    });
    let cut = flipped(world, true);
    let mut drained = flipped(world, false);
    drained.word = drained.word.drained(0);
    for (name, world) in [
        (
            "preview: a flow to the old colour that came after the cut is left alone",
            cut,
        ),
        (
            "preview: a flow to the old colour that came after the flip outlives the drain",
            drained,
        ),
    ] {
        cases.push(Case {
            name,
            world: with(&world, at, Colour::Blue, FlowTable::Established),
            frame: segment(at.service),
            action: TO_BACKEND,
            reason: Forwarded,
            out: out(f.blue),
            flow: None,
        });
    }
}

fn back(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut world = world.clone();
    world.ingress = BACKENDS;
    let at = of(f, Colour::Green);
    let known = with(&world, at, Colour::Green, FlowTable::Established);
    let both = |of: &World, colour| with(of, f, colour, FlowTable::Established);
    let mut silent = both(&world, Colour::Green);
    for flow in silent.flows.values_mut() {
        flow.seen -= 200_000;
    }
    let silent = with(&silent, at, Colour::Green, FlowTable::Established);
    for (name, world, backend, from) in [
        (
            "preview: a reply comes from where the client asked",
            known.clone(),
            f.green,
            at.service,
        ),
        (
            "preview: a reply to a client's SYN, too",
            with(&world, at, Colour::Green, FlowTable::HalfOpen),
            f.green,
            at.service,
        ),
        (
            "preview: a reply to the listener's client is the listener's",
            both(&world, Colour::Green),
            f.green,
            f.service,
        ),
        (
            "preview: one client's end may have a flow to each colour: green's reply",
            both(&known, Colour::Blue),
            f.green,
            at.service,
        ),
        (
            "preview: one client's end may have a flow to each colour: blue's reply",
            both(&known, Colour::Blue),
            f.blue,
            f.service,
        ),
        (
            "preview: two flows of one client's end to one server are one to the server",
            both(&known, Colour::Green),
            f.green,
            f.service,
        ),
        (
            "preview: a SYN to the listener takes no replies of a proven flow (law 7)",
            with(&known, f, Colour::Green, FlowTable::HalfOpen),
            f.green,
            at.service,
        ),
        (
            "preview: a flow that is over does not take its replies",
            silent,
            f.green,
            at.service,
        ),
    ] {
        let reply = |macs, from| Frame::tcp(macs, from, f.client, "A").numbers(5000, 1000);
        cases.push(Case {
            name,
            world,
            frame: reply(from_backend(backend), Family::backend(backend, f.service)).bytes(),
            action: TO_CLIENTS,
            reason: Returned,
            out: reply(TO_CLIENT, from).hops(63).bytes(),
            flow: None,
        });
    }
    let green = Family::backend(f.green, f.udp);
    for (name, world, from) in [
        (
            "preview: an answering datagram comes from where the client asked",
            with(&world, at, Colour::Green, FlowTable::Udp),
            at.udp,
        ),
        (
            "preview: an answering datagram to the listener's client is the listener's",
            with(&world, f, Colour::Green, FlowTable::Udp),
            f.udp,
        ),
    ] {
        let datagram = |macs, from| Frame::udp(macs, from, f.client).payload(b"answer");
        cases.push(Case {
            name,
            world,
            frame: datagram(from_backend(f.green), green).bytes(),
            action: TO_CLIENTS,
            reason: Returned,
            out: datagram(TO_CLIENT, from).hops(63).bytes(),
            flow: None,
        });
    }
    let stray = Frame::tcp(from_backend(f.green), f.green(), f.client, "A").bytes();
    cases.push(Case {
        name: "preview: a reply of no flow passes untouched",
        world: world.clone(),
        frame: stray.clone(),
        action: Pass,
        reason: ReturnUnknown,
        out: stray,
        flow: None,
    });
    let mut cut = with(
        &world,
        of(f, Colour::Blue),
        Colour::Blue,
        FlowTable::Established,
    );
    cut.word = cut.word.flipped(Colour::Green, true);
    let reply = |macs, from, flags| Frame::tcp(macs, from, f.client, flags);
    cases.push(Case {
        name: "preview: the client of a cut flow is told by the preview",
        world: cut,
        frame: reply(from_backend(f.blue), f.blue(), "A")
            .numbers(5000, 1000)
            .bytes(),
        action: TO_CLIENTS,
        reason: ResetClient,
        out: reply(TO_CLIENT, of(f, Colour::Blue).service, "RA")
            .numbers(5000, 1000)
            .window(0)
            .bytes(),
        flow: None,
    });
}

/// About what we sent a backend: to its client, from the preview.
fn errors(world: &World, f: Family, cases: &mut Vec<Case>) {
    let icmp = Icmp::of(f);
    let at = of(f, Colour::Green);
    let mut world = with(world, at, Colour::Green, FlowTable::Established);
    let quote = |to, hops| {
        Frame::tcp(TO_CLIENT, f.client, to, "PA")
            .payload(&[7; 1400])
            .hops(hops)
            .quote(icmp.header + 28)
    };
    let error =
        |macs, from, quote: &[u8]| Frame::icmp(macs, from, f.client.ip(), icmp.too_big, quote);
    let reply = |macs, to: SocketAddr, about| {
        let quote = Frame::tcp(TO_CLIENT, about, f.client, "PA")
            .payload(&[7; 1400])
            .quote(icmp.header + 28);
        Frame::icmp(macs, icmp.router, to.ip(), icmp.too_big, &quote)
    };
    cases.push(Case {
        name: "preview: an error about its reply reaches the backend",
        world: world.clone(),
        frame: reply(FROM_CLIENT, at.service, at.service).bytes(),
        action: TO_BACKEND,
        reason: ForwardedError,
        out: reply(to_backend(f.green), f.green(), f.green())
            .hops(63)
            .bytes(),
        flow: None,
    });
    world.ingress = BACKENDS;
    cases.push(Case {
        name: "preview: an error on the way to its backend reaches the client as the preview's",
        world,
        frame: error(from_backend(f.green), icmp.router, &quote(f.green(), 63)).bytes(),
        action: TO_CLIENTS,
        reason: ReturnedError,
        out: error(TO_CLIENT, at.service.ip(), &quote(at.service, 63))
            .hops(63)
            .bytes(),
        flow: None,
    });
}

/// A port that a preview's flow was lent.
fn snat(world: &World, f: Family, cases: &mut Vec<Case>) {
    let at = of(f, Colour::Green);
    let table = FlowTable::Established;
    let mut world = at.with(world, table, f.green, |flow| flow.via = LENT);
    let key = key(f.client, at.listener);
    lend_towards(f.green, &mut world, LENT, key, table);
    world.ingress = BACKENDS;
    let reply = |macs, from, to| Frame::tcp(macs, from, to, "A").numbers(5000, 1000);
    cases.push(Case {
        name: "preview: with snat, a reply goes to who has the port, from the preview",
        world,
        frame: reply(from_backend(f.green), f.green(), own(f, LENT)).bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: reply(TO_CLIENT, at.service, f.client).hops(63).bytes(),
        flow: None,
    });
}
