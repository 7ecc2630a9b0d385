//! ICMP and ICMPv6 errors, both ways, and those of our own.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use std::net::IpAddr;

use super::*;

/// What one family calls things.
#[derive(Clone, Copy)]
pub(super) struct Icmp {
    pub(super) header: usize,
    pub(super) too_big: (u8, u8, u32),
    time_exceeded: (u8, u8, u32),
    unreachable: (u8, u8, u32),
    pub(super) router: IpAddr,
}

impl Icmp {
    pub(super) fn of(f: Family) -> Self {
        let address = |text: &str| text.parse().expect("an address in a test");
        if f.client.is_ipv4() {
            Self {
                header: 20,
                too_big: (3, 4, 1400),
                time_exceeded: (11, 0, 0),
                unreachable: (3, 3, 0),
                router: address("192.0.2.77"),
            }
        } else {
            Self {
                header: 40,
                too_big: (2, 0, 1400),
                time_exceeded: (3, 0, 0),
                unreachable: (1, 4, 0),
                router: address("2001:db8:77::1"),
            }
        }
    }
}

pub(super) fn errors(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut known = world.clone();
    f.add(
        &mut known,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    f.add(&mut known, FlowTable::Udp, Family::flow(world, f.blue));
    about_replies(&known, f, cases);
    about_requests(&known, f, cases);
    nobodys(&known, f, cases);
    ours(world, f, cases);
}

/// About what we sent a client: to its backend.
fn about_replies(known: &World, f: Family, cases: &mut Vec<Case>) {
    let icmp = Icmp::of(f);
    let reply = |from| {
        Frame::tcp(TO_CLIENT, from, f.client, "PA")
            .payload(&[7; 1400])
            .hops(60)
    };
    for (name, length) in [
        (
            "a \"too big\" about a reply reaches the backend, all checksums right",
            icmp.header + 400,
        ),
        (
            "an error that quotes 8 bytes of TCP has no checksum to mend there",
            icmp.header + 8,
        ),
    ] {
        let error = |macs, to: SocketAddr, about: SocketAddr| {
            let quote = reply(about).quote(length);
            Frame::icmp(macs, icmp.router, to.ip(), icmp.too_big, &quote)
        };
        cases.push(Case {
            name,
            world: known.clone(),
            frame: error(FROM_CLIENT, f.service, f.service).bytes(),
            action: TO_BACKEND,
            reason: ForwardedError,
            out: error(to_backend(f.blue), f.blue(), f.blue())
                .hops(63)
                .bytes(),
            flow: None,
        });
    }
    // One arm: the backend is behind the router that made the error.
    let mut one_arm = known.clone();
    for id in [f.blue, f.green] {
        let hop = NextHop(one_arm.backends[id as usize].next_hop);
        one_arm.backends[id as usize].next_hop = NextHop::new(hop.mac(), CLIENTS as u16).0;
    }
    let error = |macs, from: IpAddr, to: SocketAddr| {
        let quote = reply(to).quote(icmp.header + 400);
        Frame::icmp(macs, from, to.ip(), icmp.too_big, &quote)
    };
    let to_blue = Macs {
        to: to_backend(f.blue).to,
        from: FROM_CLIENT.to,
    };
    cases.push(Case {
        name: "an error that goes back to the router it is from comes from the client",
        world: one_arm,
        frame: error(FROM_CLIENT, icmp.router, f.service).bytes(),
        action: Transmit,
        reason: ForwardedError,
        out: error(to_blue, f.client.ip(), f.blue()).hops(63).bytes(),
        flow: None,
    });
    let blue = Family::backend(f.blue, f.udp);
    let error = |macs, to: SocketAddr, about: SocketAddr| {
        let quote = Frame::udp(TO_CLIENT, about, f.client)
            .payload(b"answer")
            .bytes()
            .split_off(14);
        Frame::icmp(macs, f.client.ip(), to.ip(), icmp.unreachable, &quote)
    };
    cases.push(Case {
        name: "a client's closed UDP port is told to the backend",
        world: known.clone(),
        frame: error(FROM_CLIENT, f.udp, f.udp).bytes(),
        action: TO_BACKEND,
        reason: ForwardedError,
        out: error(to_backend(f.blue), blue, blue).hops(63).bytes(),
        flow: None,
    });
}

/// About what we sent a backend: to its client, from the listener's address.
fn about_requests(known: &World, f: Family, cases: &mut Vec<Case>) {
    let icmp = Icmp::of(f);
    let back = World {
        ingress: BACKENDS,
        ..known.clone()
    };
    let request = |to, hops| {
        Frame::tcp(TO_CLIENT, f.client, to, "PA")
            .payload(&[7; 1400])
            .hops(hops)
    };
    let quote = |to, hops| request(to, hops).quote(icmp.header + 28);
    for (name, from) in [
        (
            "a router's \"too big\" on the way to a backend is told to the client",
            icmp.router,
        ),
        (
            "a backend's error reaches the client as the listener's",
            f.blue().ip(),
        ),
    ] {
        cases.push(Case {
            name,
            world: back.clone(),
            frame: Frame::icmp(
                from_backend(f.blue),
                from,
                f.client.ip(),
                icmp.too_big,
                &quote(f.blue(), 63),
            )
            .bytes(),
            action: TO_CLIENTS,
            reason: ReturnedError,
            out: Frame::icmp(
                TO_CLIENT,
                f.service.ip(),
                f.client.ip(),
                icmp.too_big,
                &quote(f.service, 63),
            )
            .hops(63)
            .bytes(),
            flow: None,
        });
    }
    // The client has taken its old flow's tuple up again, and the word leads to green.
    let flow = Family::flow(&back, f.green);
    let mut again = back;
    f.add(&mut again, FlowTable::HalfOpen, flow);
    let error = |macs, from: IpAddr, about, hops| {
        let quote = Frame::tcp(TO_CLIENT, f.client, about, "S").hops(hops);
        let quote = quote.quote(icmp.header + 20);
        Frame::icmp(macs, from, f.client.ip(), icmp.unreachable, &quote)
    };
    cases.push(Case {
        name: "an error about the SYN that took an old flow's tuple up again is told to the client",
        world: again,
        frame: error(from_backend(f.green), icmp.router, f.green(), 63).bytes(),
        action: TO_CLIENTS,
        reason: ReturnedError,
        out: error(TO_CLIENT, f.service.ip(), f.service, 63)
            .hops(63)
            .bytes(),
        flow: None,
    });
}

fn nobodys(known: &World, f: Family, cases: &mut Vec<Case>) {
    let icmp = Icmp::of(f);
    let mut pass = |name, world: &World, frame: Frame, reason| {
        let frame = frame.bytes();
        cases.push(Case {
            name,
            world: world.clone(),
            out: frame.clone(),
            frame,
            action: Pass,
            reason,
            flow: None,
        });
    };
    let reply = Frame::tcp(TO_CLIENT, f.service, f.client, "A").quote(icmp.header + 20);
    let error =
        |to: IpAddr, quote: &[u8]| Frame::icmp(FROM_CLIENT, icmp.router, to, icmp.too_big, quote);
    let fresh = World {
        flows: Flows::new(),
        ..known.clone()
    };
    pass(
        "an error about a flow that is not known is the stack's (law 9)",
        &fresh,
        error(f.service.ip(), &reply),
        IcmpError,
    );
    let mut other = fresh.clone();
    let flow = Flow {
        service: 1,
        ..Family::flow(&other, f.blue)
    };
    f.add(&mut other, FlowTable::Established, flow);
    pass(
        "an error about a flow of another service that had this listener's id is the stack's",
        &other,
        error(f.service.ip(), &reply),
        IcmpError,
    );
    pass(
        "an error that came to somebody else than the sender of what it quotes is the stack's",
        known,
        error(f.blue().ip(), &reply),
        IcmpError,
    );
    pass(
        "an error that quotes less than the ports is the stack's",
        known,
        error(f.service.ip(), &reply[..icmp.header + 3]),
        IcmpError,
    );
    pass(
        "an error whose own TTL is used up is the stack's",
        known,
        error(f.service.ip(), &reply).hops(1),
        TtlExpired,
    );
}

fn ours(world: &World, f: Family, cases: &mut Vec<Case>) {
    let icmp = Icmp::of(f);
    let back = BACK_TO_CLIENT;
    let mut small = world.clone();
    small.interfaces[BACKENDS as usize].mtu = 1400;
    let large = Frame::tcp(FROM_CLIENT, f.client, f.service, "PA").payload(&[7; 1400]);
    cases.push(Case {
        name: "a packet larger than the egress MTU is answered with \"too big\"",
        world: small.clone(),
        frame: large.bytes(),
        action: Transmit,
        reason: SentTooBig,
        out: Frame::icmp(
            back,
            f.service.ip(),
            f.client.ip(),
            icmp.too_big,
            &large.quote(icmp.header + 8),
        )
        .bytes(),
        flow: None,
    });
    let mut narrow = World {
        ingress: BACKENDS,
        ..world.clone()
    };
    narrow.interfaces[CLIENTS as usize].mtu = 1400;
    f.add(
        &mut narrow,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    let reply = Frame::tcp(from_backend(f.blue), f.blue(), f.client, "PA").payload(&[7; 1400]);
    let to_blue = Macs {
        to: from_backend(f.blue).from,
        from: from_backend(f.blue).to,
    };
    cases.push(Case {
        name: "a reply larger than the clients' MTU is answered too",
        world: narrow,
        frame: reply.bytes(),
        action: Transmit,
        reason: SentTooBig,
        out: Frame::icmp(
            to_blue,
            f.client.ip(),
            f.blue().ip(),
            icmp.too_big,
            &reply.quote(icmp.header + 8),
        )
        .bytes(),
        flow: None,
    });
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").hops(1);
    cases.push(Case {
        name: "TTL 1 is answered with \"time exceeded\"",
        world: world.clone(),
        frame: syn.bytes(),
        action: Transmit,
        reason: SentTimeExceeded,
        out: Frame::icmp(
            back,
            f.service.ip(),
            f.client.ip(),
            icmp.time_exceeded,
            &syn.quote(icmp.header + 8),
        )
        .bytes(),
        flow: None,
    });
    if f.client.is_ipv4() {
        let divisible = large.may_fragment();
        cases.push(Case {
            name: "IPv4: what routers may split is rewritten, and the stack splits it",
            world: small,
            frame: divisible.bytes(),
            action: Pass,
            reason: ForwardedByStack,
            out: Frame::tcp(FROM_CLIENT, f.client, f.blue(), "PA")
                .payload(&[7; 1400])
                .may_fragment()
                .bytes(),
            flow: None,
        });
        let options = syn.ip_options(&[1, 1, 1, 1]).bytes();
        cases.push(Case {
            name: "IPv4: TTL 1 behind options is the stack's",
            world: world.clone(),
            out: options.clone(),
            frame: options,
            action: Pass,
            reason: TtlExpired,
            flow: None,
        });
    }
}
