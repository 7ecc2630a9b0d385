//! `snat`: backends see the gateway's own address, and a port that their flow was
//! lent.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use bg_common::{
    flow::FlowKey,
    key::TCP,
    service::ReturnPath,
    snat::{Lease, RESERVED, index, port, via},
};

use super::{errors::Icmp, *};
use crate::{frame, world::wide};

/// A port that flows of these cases were lent.
pub(super) const LENT: u16 = 2000;

/// The gateway's own address with a port.
pub(super) fn own(f: Family, port: u16) -> SocketAddr {
    let own = if f.client.is_ipv4() {
        at::OWN
    } else {
        at::OWN_V6
    };
    SocketAddr::new(addr(own).ip(), port)
}

fn client(f: Family, table: FlowTable) -> FlowKey {
    key(f.client, f.listener(table))
}

/// Lends a port towards blue.
fn lend(world: &mut World, f: Family, port: u16, key: FlowKey, table: FlowTable) {
    lend_towards(f.blue, world, port, key, table);
}

pub(super) fn lend_towards(
    backend: u32,
    world: &mut World,
    port: u16,
    key: FlowKey,
    table: FlowTable,
) {
    let block = u32::from(world.backends[backend as usize].block);
    let place = (block, index(port).expect("a port that can be lent"));
    let lease = Lease {
        client: key.client,
        id: key.id,
        turn: 7,
        since: world.tick - 100,
        table: table as u32,
    };
    world.leases.insert(place, lease);
}

/// A world with a flow to blue in `table`, which was lent a port.
fn lent(world: &World, f: Family, table: FlowTable, change: impl FnOnce(&mut Flow)) -> World {
    let mut world = f.with(world, table, f.blue, |flow| {
        flow.via = LENT;
        change(flow);
    });
    lend(&mut world, f, LENT, client(f, table), table);
    world
}

/// Another client's key.
fn stranger(f: Family) -> FlowKey {
    let mut other = f.client;
    other.set_port(other.port() + 1);
    key(other, f.listener)
}

/// The first port that a new flow is lent when all are free.
fn first_port(f: Family, table: FlowTable) -> u16 {
    World::candidates(&client(f, table), table)
        .next()
        .map_or(0, port)
}

pub(super) fn snat(world: &World, f: Family, cases: &mut Vec<Case>) {
    let world = world.with_snat();
    newcomers(&world, f, cases);
    taken(&world, f, cases);
    known(&world, f, cases);
    back(&world, f, cases);
    proof(&world, f, cases);
    cut(&world, f, cases);
    unreachable(&world, f, cases);
    errors(&world, f, cases);
    fragments(&world, f, cases);
}

fn newcomers(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").tcp_options(&[2, 4, 5, 180]);
    let mut case = |name, world: World, port: u16| {
        cases.push(Case {
            name,
            world,
            frame: syn.bytes(),
            action: TO_BACKEND,
            reason: ForwardedNew,
            out: Frame::tcp(to_backend(f.blue), own(f, port), f.blue(), "S")
                .tcp_options(&[2, 4, 5, 180])
                .hops(63)
                .bytes(),
            flow: Some(f.check(
                FlowTable::HalfOpen,
                Some(|flow| via::is_port(flow.via) && flow.colour() == Colour::Blue),
            )),
        });
    };
    let first = first_port(f, FlowTable::HalfOpen);
    case(
        "snat: a SYN goes on from the gateway's own address",
        world.clone(),
        first,
    );
    case(
        "snat: a SYN that is sent again keeps its port",
        lent(world, f, FlowTable::HalfOpen, |_| ()),
        LENT,
    );
    let mut lost = lent(world, f, FlowTable::HalfOpen, |_| ());
    lend(&mut lost, f, LENT, stranger(f), FlowTable::HalfOpen);
    case(
        "snat: a SYN whose port was taken is lent another one",
        lost,
        first,
    );
    let mut green = world.clone();
    let mut flow = Family::flow(&green, f.green);
    flow.via = LENT;
    f.add(&mut green, FlowTable::HalfOpen, flow);
    let key = client(f, FlowTable::HalfOpen);
    lend_towards(f.green, &mut green, LENT, key, FlowTable::HalfOpen);
    case(
        "snat: a SYN that is sent again after a flip is lent a port towards its new backend",
        green,
        first,
    );
    case(
        "snat: a SYN of an old flow's tuple is lent a port of its own",
        lent(world, f, FlowTable::Established, |_| ()),
        first,
    );
    let datagram = |macs, from, to| Frame::udp(macs, from, to).payload(b"question");
    let blue = Family::backend(f.blue, f.udp);
    cases.push(Case {
        name: "snat: a first datagram goes on from the gateway's own address",
        world: world.clone(),
        frame: datagram(FROM_CLIENT, f.client, f.udp).bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: datagram(
            to_backend(f.blue),
            own(f, first_port(f, FlowTable::Udp)),
            blue,
        )
        .hops(63)
        .bytes(),
        flow: Some(f.check(FlowTable::Udp, Some(|flow| via::is_port(flow.via)))),
    });
}

/// Ports that are somebody's.
fn taken(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").bytes();
    let to = |port| {
        Frame::tcp(to_backend(f.blue), own(f, port), f.blue(), "S")
            .hops(63)
            .bytes()
    };
    let candidates: Vec<u32> =
        World::candidates(&client(f, FlowTable::HalfOpen), FlowTable::HalfOpen).collect();
    // Lent in this moment, so nobody may take them.
    let block = u32::from(world.backends[f.blue as usize].block);
    let mut full = world.clone();
    for (number, index) in candidates.iter().enumerate() {
        let key = key(f.client, 100 + number as u16);
        lend(&mut full, f, port(*index), key, FlowTable::HalfOpen);
    }
    for lease in full.leases.values_mut() {
        lease.since = world.tick + 600; // by a clock ahead: it lasts on a slow machine
    }
    cases.push(Case {
        name: "snat: without a port a SYN is dropped, and counted",
        world: full.clone(),
        frame: syn.clone(),
        action: Drop,
        reason: NoPort,
        out: syn.clone(),
        flow: Some(f.check(FlowTable::HalfOpen, None)),
    });
    // One whose handshake is stuck does not go before one that nobody has.
    let mut stuck = world.clone();
    let mut flow = Family::flow(&stuck, f.blue);
    (flow.via, flow.seen) = (port(candidates[0]), stuck.tick - 400);
    stuck.flows.insert((FlowTable::HalfOpen, stranger(f)), flow);
    let first = port(candidates[0]);
    lend(&mut stuck, f, first, stranger(f), FlowTable::HalfOpen);
    // And none is a listener's.
    let mut reserved = world.clone();
    let nobody = FlowKey::of([0; 2], 0);
    lend(&mut reserved, f, first, nobody, FlowTable::HalfOpen);
    for lease in reserved.leases.values_mut() {
        lease.table = RESERVED;
    }
    for (name, world) in [
        (
            "snat: a handshake keeps its port where others are free",
            stuck,
        ),
        ("snat: a port that is a listener's is not lent", reserved),
    ] {
        cases.push(Case {
            name,
            world,
            frame: syn.clone(),
            action: TO_BACKEND,
            reason: ForwardedNew,
            out: to(port(candidates[1])),
            flow: Some(f.check(FlowTable::HalfOpen, Some(|flow| via::is_port(flow.via)))),
        });
    }
    let chosen = candidates[5];
    let lent_to_stranger = |table, change: &dyn Fn(&mut Flow)| {
        let mut world = full.clone();
        let mut flow = Family::flow(&world, f.blue);
        (flow.via, flow.proof) = (port(chosen), UDP_IDLE);
        change(&mut flow);
        world.flows.insert((table, stranger(f)), flow);
        lend(&mut world, f, port(chosen), stranger(f), table);
        world
    };
    let mut decide = |name, world, holds: bool| {
        cases.push(Case {
            name,
            world,
            frame: syn.clone(),
            action: if holds { Drop } else { TO_BACKEND },
            reason: if holds { NoPort } else { ForwardedNew },
            out: if holds { syn.clone() } else { to(port(chosen)) },
            flow: None,
        });
    };
    let mut reserved = full.clone();
    let lease = reserved.leases.get_mut(&(block, chosen));
    *lease.expect("a lease of each candidate") = Lease {
        table: RESERVED,
        ..Lease::default()
    };
    decide("snat: a listener's port is lent to nobody", reserved, true);
    for (name, table) in [
        (
            "snat: the port that a connection has no longer is lent to the next one",
            FlowTable::Established,
        ),
        (
            "snat: the port that a datagram flow has no longer is lent to the next one",
            FlowTable::Udp,
        ),
    ] {
        let other = |flow: &mut Flow| flow.via = LENT;
        let mut elsewhere = lent_to_stranger(table, &other);
        for lease in elsewhere.leases.values_mut() {
            if lease.key() == stranger(f) {
                lease.since = world.tick - 1_000;
            }
        }
        decide(name, elsewhere, false);
    }
    decide(
        "snat: nobody takes the port of a proven flow that found no room",
        lent_to_stranger(FlowTable::HalfOpen, &|flow| {
            flow.from_client = bits::PROVEN;
            flow.seen -= 400;
        }),
        true,
    );
    decide(
        "snat: nobody takes the port of a handshake that goes on",
        lent_to_stranger(FlowTable::HalfOpen, &|flow| flow.seen += 600),
        true,
    );
    let mut case = |name, table, silent: u32, holds: bool| {
        let world = lent_to_stranger(table, &|flow| flow.seen -= silent);
        decide(name, world, holds);
    };
    case(
        "snat: the port of a flow that is over is lent to the next one",
        FlowTable::Established,
        200_000,
        false,
    );
    case(
        "snat: the port of a handshake that never ended may be taken",
        FlowTable::HalfOpen,
        400,
        false,
    );
    case(
        "snat: the port of a datagram flow that is long over is lent to the next one",
        FlowTable::Udp,
        1_000,
        false,
    );
    case(
        "snat: a datagram flow that is just over keeps its port: an answer may be late",
        FlowTable::Udp,
        500,
        true,
    );
    case(
        "snat: nobody takes the port of a datagram flow that waits for its answer",
        FlowTable::Udp,
        200,
        true,
    );
    case(
        "snat: no flood takes the port of an established flow (law 7)",
        FlowTable::Established,
        60_000,
        true,
    );
    // It would be heard of no more.
    let rst = Frame::tcp(FROM_CLIENT, f.client, f.service, "R").bytes();
    cases.push(Case {
        name: "snat: an unknown flow's RST, which nobody will remember, is lent nothing",
        world: world.clone(),
        frame: rst.clone(),
        action: Drop,
        reason: NoPort,
        out: rst,
        flow: None,
    });
    // A flow without proof whose port went to another one is no flow any more.
    let mut lost = lent(world, f, FlowTable::Udp, |_| ());
    let other = key(f.client, f.udp_listener + 1);
    lend(&mut lost, f, LENT, other, FlowTable::Udp);
    let datagram = |macs, from, to| Frame::udp(macs, from, to).payload(b"question");
    cases.push(Case {
        name: "snat: a datagram flow that lost its port does not speak in the new one's name",
        world: lost,
        frame: datagram(FROM_CLIENT, f.client, f.udp).bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: datagram(
            to_backend(f.blue),
            own(f, first_port(f, FlowTable::Udp)),
            Family::backend(f.blue, f.udp),
        )
        .hops(63)
        .bytes(),
        flow: Some(f.check(FlowTable::Udp, Some(|flow| flow.via != LENT))),
    });
}

fn known(world: &World, f: Family, cases: &mut Vec<Case>) {
    let request = |macs, from, to| Frame::tcp(macs, from, to, "PA").payload(b"GET /");
    let mut old = lent(world, f, FlowTable::Established, |_| ());
    old.word = old.word.flipped(Colour::Green, false);
    cases.push(Case {
        name: "snat: an established flow keeps its backend and its port over a flip (law 2)",
        world: old,
        frame: request(FROM_CLIENT, f.client, f.service).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: request(to_backend(f.blue), own(f, LENT), f.blue())
            .hops(63)
            .bytes(),
        flow: Some(f.check(FlowTable::Established, Some(|flow| flow.via == LENT))),
    });
    let mut nat = world.clone();
    f.add(
        &mut nat,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "snat: a flow that began without it goes on without it",
        world: nat.clone(),
        frame: request(FROM_CLIENT, f.client, f.service).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: request(to_backend(f.blue), f.client, f.blue())
            .hops(63)
            .bytes(),
        flow: None,
    });
    nat.ingress = BACKENDS;
    cases.push(Case {
        name: "snat: and its replies find their client",
        world: nat,
        frame: request(from_backend(f.blue), f.blue(), f.client).bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: request(TO_CLIENT, f.service, f.client).hops(63).bytes(),
        flow: None,
    });
    let datagram = |macs, from, to| Frame::udp(macs, from, to).payload(b"question");
    let blue = Family::backend(f.blue, f.udp);
    cases.push(Case {
        name: "snat: a known datagram flow keeps its port",
        world: lent(world, f, FlowTable::Udp, |_| ()),
        frame: datagram(FROM_CLIENT, f.client, f.udp).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: datagram(to_backend(f.blue), own(f, LENT), blue)
            .hops(63)
            .bytes(),
        flow: None,
    });
}

fn back(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut tcp = lent(world, f, FlowTable::Established, |_| ());
    tcp.ingress = BACKENDS;
    let reply = |macs, from, to| Frame::tcp(macs, from, to, "PA").payload(b"200 OK");
    cases.push(Case {
        name: "snat: a reply to the lent port goes to its client, from the listener",
        world: tcp.clone(),
        frame: reply(from_backend(f.blue), f.blue(), own(f, LENT)).bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: reply(TO_CLIENT, f.service, f.client).hops(63).bytes(),
        flow: None,
    });
    let mut half = lent(world, f, FlowTable::HalfOpen, |_| ());
    half.ingress = BACKENDS;
    let answer = |macs, from, to| Frame::tcp(macs, from, to, "SA").numbers(9000, 1001);
    cases.push(Case {
        name: "snat: a SYN-ACK goes to its client, and arms the proof",
        world: half,
        frame: answer(from_backend(f.blue), f.blue(), own(f, LENT)).bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: answer(TO_CLIENT, f.service, f.client).hops(63).bytes(),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.proof == 9001 && flow.from_backend & bits::ANSWERED != 0),
        )),
    });
    let mut udp = lent(world, f, FlowTable::Udp, |_| ());
    udp.ingress = BACKENDS;
    let blue = Family::backend(f.blue, f.udp);
    let datagram = |macs, from, to| Frame::udp(macs, from, to).payload(b"answer");
    cases.push(Case {
        name: "snat: an answering datagram goes to its client, from the listener",
        world: udp,
        frame: datagram(from_backend(f.blue), blue, own(f, LENT)).bytes(),
        action: TO_CLIENTS,
        reason: Returned,
        out: datagram(TO_CLIENT, f.udp, f.client).hops(63).bytes(),
        flow: None,
    });
    // Blue serves another listener, too.
    let mut second = f.blue();
    second.set_port(second.port() + 1);
    let mut other = tcp.clone();
    other.answers(
        second,
        TCP,
        ReturnPath {
            address: wide(f.service),
            port: second.port().to_be_bytes(),
            listener: 9,
            service: 0,
            block: other.backends[f.blue as usize].block,
            previewed: 0,
        },
    );
    let stray = reply(from_backend(f.blue), second, own(f, LENT)).bytes();
    cases.push(Case {
        name: "snat: a reply of another listener's server to a lent port is not its flow's",
        world: other,
        frame: stray.clone(),
        action: Pass,
        reason: ReturnUnknown,
        out: stray,
        flow: None,
    });
    for (name, table) in [
        (
            "snat: a reply to a port that its connection has no longer passes untouched",
            FlowTable::Established,
        ),
        (
            "snat: an answer to a port that its flow has no longer passes untouched",
            FlowTable::Udp,
        ),
    ] {
        // Lent another one since: both leases name the flow, and it names one.
        let mut world = lent(world, f, table, |flow| flow.via = LENT + 1);
        lend(&mut world, f, LENT + 1, client(f, table), table);
        world.ingress = BACKENDS;
        for to in [own(f, LENT), f.client] {
            let frame = match table {
                FlowTable::Udp => datagram(from_backend(f.blue), blue, to),
                _ => reply(from_backend(f.blue), f.blue(), to),
            }
            .bytes();
            cases.push(Case {
                name,
                world: world.clone(),
                frame: frame.clone(),
                action: Pass,
                reason: ReturnUnknown,
                out: frame,
                flow: None,
            });
        }
    }
    let elsewhere = SocketAddr::new(f.client.ip(), LENT);
    for (name, to) in [
        (
            "snat: a reply to a port that nobody has passes untouched",
            own(f, LENT + 1),
        ),
        (
            "snat: a reply to the gateway's own connection passes untouched",
            own(f, 40_000),
        ),
        (
            "snat: a reply to another address with a lent port passes untouched (law 9)",
            elsewhere,
        ),
    ] {
        let frame = reply(from_backend(f.blue), f.blue(), to).bytes();
        cases.push(Case {
            name,
            world: tcp.clone(),
            frame: frame.clone(),
            action: Pass,
            reason: ReturnUnknown,
            out: frame,
            flow: None,
        });
    }
}

fn proof(world: &World, f: Family, cases: &mut Vec<Case>) {
    let answered = |flow: &mut Flow| {
        flow.from_backend = bits::ANSWERED;
        flow.proof = 9001;
    };
    let ack = |macs, from, to| Frame::tcp(macs, from, to, "A").numbers(1001, 9001);
    let half = lent(world, f, FlowTable::HalfOpen, answered);
    cases.push(Case {
        name: "snat: the handshake's ACK makes it an established flow, with its port",
        world: half.clone(),
        frame: ack(FROM_CLIENT, f.client, f.service).bytes(),
        action: TO_BACKEND,
        reason: Forwarded,
        out: ack(to_backend(f.blue), own(f, LENT), f.blue())
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::Established,
            Some(|flow| flow.via == LENT && sides(flow) == (0, 0)),
        )),
    });
    let mut lost = half.clone();
    lend(&mut lost, f, LENT, stranger(f), FlowTable::HalfOpen);
    cases.push(Case {
        name: "snat: whose port was taken before that is no flow any more",
        world: lost,
        frame: ack(FROM_CLIENT, f.client, f.service).bytes(),
        action: TO_BACKEND,
        reason: ForwardedOrphan,
        out: ack(
            to_backend(f.blue),
            own(f, first_port(f, FlowTable::HalfOpen)),
            f.blue(),
        )
        .hops(63)
        .bytes(),
        flow: Some(f.check(FlowTable::Established, None)),
    });
    let mut full = half;
    full.full = true;
    cases.push(Case {
        name: "snat: with a full table the proven flow lives on in the half-open one",
        world: full,
        frame: ack(FROM_CLIENT, f.client, f.service).bytes(),
        action: TO_BACKEND,
        reason: ForwardedTableFull,
        out: ack(to_backend(f.blue), own(f, LENT), f.blue())
            .hops(63)
            .bytes(),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.via == LENT && flow.from_client & bits::PROVEN != 0),
        )),
    });
}

fn cut(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut cut = lent(world, f, FlowTable::Established, |_| ());
    cut.word = cut.word.flipped(Colour::Green, true);
    cases.push(Case {
        name: "snat: a cut flow's client gets its RST from the listener",
        world: cut.clone(),
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
    cut.ingress = BACKENDS;
    let segment = |world: World, name, action, reason, out: Frame| Case {
        name,
        world,
        frame: Frame::tcp(from_backend(f.blue), f.blue(), own(f, LENT), "A")
            .numbers(5000, 1000)
            .bytes(),
        action,
        reason,
        out: out.window(0).bytes(),
        flow: None,
    };
    cases.push(segment(
        cut.clone(),
        "snat: a cut flow's backend tells its client",
        TO_CLIENTS,
        ResetClient,
        Frame::tcp(TO_CLIENT, f.service, f.client, "RA").numbers(5000, 1000),
    ));
    let told = (FlowTable::Established, client(f, FlowTable::Established));
    if let Some(flow) = cut.flows.get_mut(&told) {
        flow.from_backend = bits::CLIENT_CUT;
    }
    let back_to_blue = Macs {
        to: from_backend(f.blue).from,
        from: from_backend(f.blue).to,
    };
    cases.push(segment(
        cut,
        "snat: then the backend gets its own RST, from the lent port",
        Transmit,
        ResetBackend,
        Frame::tcp(back_to_blue, own(f, LENT), f.blue(), "R").numbers(1000, 0),
    ));
}

/// What the stack could not send on: it takes no packet from an address of its own.
fn unreachable(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").bytes();
    let mut no_hop = world.clone();
    no_hop.backends[f.blue as usize].next_hop = 0;
    let mut no_source = world.clone();
    let block = no_source.backends[f.blue as usize].block;
    no_source.sources[usize::from(block)] = bg_common::snat::Source::default();
    for (name, world) in [
        ("snat: without a next hop a packet is dropped", no_hop),
        (
            "snat: without an own address a packet is dropped",
            no_source,
        ),
    ] {
        cases.push(Case {
            name,
            world,
            frame: syn.clone(),
            action: Drop,
            reason: ForwardUnreachable,
            out: syn.clone(),
            flow: None,
        });
    }
}

fn errors(world: &World, f: Family, cases: &mut Vec<Case>) {
    let known = lent(world, f, FlowTable::Established, |_| ());
    let Icmp {
        header,
        too_big,
        router,
        ..
    } = Icmp::of(f);
    let about = |from, to, length| {
        Frame::tcp(TO_CLIENT, from, to, "PA")
            .payload(&[7; 1400])
            .hops(60)
            .quote(length)
    };
    for (reply, request, length) in [
        (
            "snat: an error about a reply quotes to the backend what it sent",
            "snat: an error about a request quotes to the client what it sent",
            header + 400,
        ),
        (
            "snat: an error about a reply that quotes 8 bytes",
            "snat: an error about a request that quotes 8 bytes",
            header + 8,
        ),
    ] {
        let error = |macs, from, to: SocketAddr, quote: &[u8]| {
            Frame::icmp(macs, from, to.ip(), too_big, quote)
        };
        let quote = about(f.service, f.client, length);
        let quoted = about(f.blue(), own(f, LENT), length);
        cases.push(Case {
            name: reply,
            world: known.clone(),
            frame: error(FROM_CLIENT, router, f.service, &quote).bytes(),
            action: TO_BACKEND,
            reason: ForwardedError,
            out: error(to_backend(f.blue), router, f.blue(), &quoted)
                .hops(63)
                .bytes(),
            flow: None,
        });
        let quote = about(own(f, LENT), f.blue(), length);
        let quoted = about(f.client, f.service, length);
        cases.push(Case {
            name: request,
            world: World {
                ingress: BACKENDS,
                ..known.clone()
            },
            frame: error(from_backend(f.blue), router, own(f, LENT), &quote).bytes(),
            action: TO_CLIENTS,
            reason: ReturnedError,
            out: error(TO_CLIENT, f.service.ip(), f.client, &quoted)
                .hops(63)
                .bytes(),
            flow: None,
        });
    }
    // It would quote to the backend what it never sent.
    let mut no_source = known.clone();
    let block = no_source.backends[f.blue as usize].block;
    no_source.sources[usize::from(block)] = bg_common::snat::Source::default();
    let quote = about(f.service, f.client, header + 400);
    let error = Frame::icmp(FROM_CLIENT, router, f.service.ip(), too_big, &quote).bytes();
    cases.push(Case {
        name: "snat: without an own address an error about a reply is dropped",
        world: no_source,
        frame: error.clone(),
        action: Drop,
        reason: ForwardUnreachable,
        out: error,
        flow: None,
    });
    let mut moved = lent(world, f, FlowTable::Established, |flow| flow.via = LENT + 1);
    lend(
        &mut moved,
        f,
        LENT + 1,
        client(f, FlowTable::Established),
        FlowTable::Established,
    );
    moved.ingress = BACKENDS;
    let quote = about(own(f, LENT), f.blue(), header + 8);
    let late = Frame::icmp(
        from_backend(f.blue),
        router,
        own(f, LENT).ip(),
        too_big,
        &quote,
    )
    .bytes();
    cases.push(Case {
        name: "snat: an error about a port that its flow has no longer passes untouched",
        world: moved,
        frame: late.clone(),
        action: Pass,
        reason: IcmpError,
        out: late,
        flow: None,
    });
    // Ours: too big for the way out, in the client's own words.
    let mut small = known;
    small.interfaces[BACKENDS as usize].mtu = 1280;
    let large = Frame::tcp(FROM_CLIENT, f.client, f.service, "PA").payload(&[7; 1400]);
    cases.push(Case {
        name: "snat: a packet too big for the way out is answered, quoted as it came",
        world: small,
        frame: large.bytes(),
        action: Transmit,
        reason: SentTooBig,
        out: Frame::icmp(
            BACK_TO_CLIENT,
            f.service.ip(),
            f.client.ip(),
            (too_big.0, too_big.1, 1280),
            &large.quote(header + 8),
        )
        .bytes(),
        flow: None,
    });
}

fn fragments(world: &World, f: Family, cases: &mut Vec<Case>) {
    let payload: Vec<u8> = (0..3000).map(|at| (at * 7) as u8).collect();
    let blue = Family::backend(f.blue, f.udp);
    let known = lent(world, f, FlowTable::Udp, |_| ());
    let datagram = |macs, from, to| Frame::udp(macs, from, to).payload(&payload);
    let first = |frame: &Frame| frame::fragments(&frame.bytes(), 1200)[0].clone();
    cases.push(Case {
        name: "snat: a first fragment goes on from the lent port",
        world: known.clone(),
        frame: first(&datagram(FROM_CLIENT, f.client, f.udp)),
        action: TO_BACKEND,
        reason: Forwarded,
        out: first(&datagram(to_backend(f.blue), own(f, LENT), blue).hops(63)),
        flow: None,
    });
    cases.push(Case {
        name: "snat: a first fragment of an answer finds its client",
        world: World {
            ingress: BACKENDS,
            ..known
        },
        frame: first(&datagram(from_backend(f.blue), blue, own(f, LENT))),
        action: TO_CLIENTS,
        reason: Returned,
        out: first(&datagram(TO_CLIENT, f.udp, f.client).hops(63)),
        flow: None,
    });
}

/// Large datagrams that leave in fragments, both ways.
pub(super) fn large(world: &World, f: Family) -> Vec<(Case, Vec<u8>)> {
    let known = lent(&world.with_snat(), f, FlowTable::Udp, |_| ());
    let payload: Vec<u8> = (0..6000).map(|at| (at * 13) as u8).collect();
    let blue = Family::backend(f.blue, f.udp);
    let datagram = |macs, from, to| Frame::udp(macs, from, to).payload(&payload);
    let case = |name, world, frame: Frame, action, reason, out: Frame| {
        let case = Case {
            name,
            world,
            frame: frame.bytes(),
            action,
            reason,
            out: Vec::new(),
            flow: None,
        };
        (case, out.hops(63).bytes())
    };
    vec![
        case(
            "snat: a request in fragments",
            known.clone(),
            datagram(FROM_CLIENT, f.client, f.udp),
            TO_BACKEND,
            Forwarded,
            datagram(to_backend(f.blue), own(f, LENT), blue),
        ),
        case(
            "snat: an answer in fragments",
            World {
                ingress: BACKENDS,
                ..known
            },
            datagram(from_backend(f.blue), blue, own(f, LENT)),
            TO_CLIENTS,
            Returned,
            datagram(TO_CLIENT, f.udp, f.client),
        ),
    ]
}
