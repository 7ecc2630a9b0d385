//! Limits, packets that are not ours, and headers that lie.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use super::*;

pub(super) fn limits(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S");
    let mut empty = world.clone();
    empty.pools = [PoolWord::default(); 4];
    cases.push(Case {
        name: "an empty pool drops, and says so (law 6)",
        world: empty,
        frame: syn.bytes(),
        action: Drop,
        reason: NoBackend,
        out: syn.bytes(),
        flow: None,
    });
    let mut given_away = world.clone();
    given_away.backends[f.blue as usize].service = 1;
    let mut no_device = world.clone();
    no_device.interfaces[BACKENDS as usize].ifindex = 0;
    for (name, world) in [
        (
            "a backend's slot that another service has now is nobody's",
            given_away,
        ),
        ("a next hop through a slot without a device", no_device),
    ] {
        cases.push(Case {
            name,
            world,
            frame: syn.bytes(),
            action: Drop,
            reason: Inconsistent,
            out: syn.bytes(),
            flow: None,
        });
    }
    let mut unresolved = world.clone();
    unresolved.backends[f.blue as usize].next_hop = 0;
    cases.push(Case {
        name: "without a next hop the stack forwards the rewritten packet and takes the hop",
        world: unresolved,
        frame: syn.bytes(),
        action: Pass,
        reason: ForwardedByStack,
        out: Frame::tcp(FROM_CLIENT, f.client, f.blue(), "S").bytes(),
        flow: None,
    });
    let canary = World {
        word: CutoverWord::new(Colour::Blue).with_canary(u16::MAX),
        ..world.clone()
    };
    cases.push(Case {
        name: "a canary share of all but nothing goes to the standby",
        world: canary,
        frame: syn.bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: Frame::tcp(to_backend(f.green), f.client, f.green(), "S")
            .hops(63)
            .bytes(),
        flow: None,
    });
}

pub(super) fn untouched(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").bytes();
    let other_port = SocketAddr::new(f.service.ip(), 22);
    let header = if f.client.is_ipv4() { 20 } else { 40 };
    let protocol_at = if f.client.is_ipv4() { 23 } else { 20 };
    let mut pass = |name, frame: Vec<u8>, reason| {
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
    pass(
        "another port of the address",
        Frame::tcp(FROM_CLIENT, f.client, other_port, "S").bytes(),
        NotOurs,
    );
    pass(
        "UDP to the TCP listener",
        Frame::udp(FROM_CLIENT, f.client, f.service).bytes(),
        NotOurs,
    );
    pass(
        "ends inside the IP header",
        syn[..14 + header - 1].to_vec(),
        Truncated,
    );
    pass(
        "ends before the length the IP header says",
        syn[..syn.len() - 1].to_vec(),
        Truncated,
    );
    pass("broadcast", [&[0xff; 6], &syn[6..]].concat(), NotOurs);
    let group = [1, 0, 0x5e, 0, 0, 1];
    pass("multicast", [&group, &syn[6..]].concat(), NotOurs);
    let datagram = Frame::udp(FROM_CLIENT, f.client, f.udp).payload(b"x");
    for (name, length) in [
        ("a UDP header that says less than itself", 7),
        ("a UDP header that says more than the packet has", 10),
    ] {
        let mut frame = datagram.bytes();
        frame[14 + header + 5] = length;
        pass(name, frame, BadHeader);
    }
    let with = |at: usize, byte: u8| {
        let mut frame = syn.clone();
        frame[at] = byte;
        frame
    };
    pass("another IP version", with(14, 0x15), BadHeader);
    pass("another protocol", with(protocol_at, 132), NotOurs);
    pass(
        "a TCP header shorter than it can be",
        with(14 + header + 12, 0x40),
        BadHeader,
    );
    pass(
        "a TCP header longer than the packet",
        with(14 + header + 12, 0xf0),
        BadHeader,
    );
    let mut tagged = syn.clone();
    tagged.splice(12..12, [0x81, 0, 0, 7]);
    pass("a VLAN tag", tagged, Vlan);
}

pub(super) fn headers(world: &World, cases: &mut Vec<Case>) {
    let (client, service) = (addr(at::CLIENT), addr(at::SERVICE));
    let syn = Frame::tcp(FROM_CLIENT, client, service, "S");
    cases.push(Case {
        name: "IPv4 options are kept",
        world: world.clone(),
        frame: syn.clone().ip_options(&[1, 1, 1, 0]).payload(b"x").bytes(),
        action: TO_BACKEND,
        reason: ForwardedNew,
        out: Frame::tcp(to_backend(0), client, addr("10.0.1.10:8000"), "S")
            .ip_options(&[1, 1, 1, 0])
            .payload(b"x")
            .hops(63)
            .bytes(),
        flow: None,
    });
    let syn6 = Frame::tcp(FROM_CLIENT, addr(at::CLIENT_V6), addr(at::SERVICE_V6), "S").bytes();
    let syn = syn.bytes();
    let mut pass = |name, frame: Vec<u8>, reason| {
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
    let with = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    pass("ARP", with(&syn, 12, &[8, 6]), NotIp);
    pass(
        "IPv4: a header length below five words",
        with(&syn, 14, &[0x44]),
        BadHeader,
    );
    pass(
        "IPv4: a later fragment without a first one",
        with(&syn, 20, &[0, 185]),
        Fragment,
    );
    pass(
        "IPv4: an ICMP error",
        with(&with(&syn, 23, &[1]), 34, &[3, 4]),
        IcmpError,
    );
    pass(
        "IPv4: an echo request",
        with(&with(&syn, 23, &[1]), 34, &[8, 0]),
        NotOurs,
    );
    pass("IPv6: a fragment header", with(&syn6, 20, &[44]), Fragment);
    pass(
        "IPv6: an authentication header covers what would be rewritten",
        with(&syn6, 20, &[51]),
        ExtensionHeader,
    );
    pass(
        "IPv6: a mobility header",
        with(&syn6, 20, &[135]),
        ExtensionHeader,
    );
    let routed = with(&extended(&syn6, &[43]), 57, &[1]);
    pass(
        "IPv6: a routing header with hops left",
        routed,
        ExtensionHeader,
    );
    pass(
        "IPv6: more extension headers than are walked over",
        extended(&syn6, &[0, 43, 60, 60, 60]),
        ExtensionHeader,
    );
    pass(
        "IPv6: a fragment header behind another one",
        extended(&syn6, &[0, 44]),
        Fragment,
    );
    pass(
        "IPv6: an extension header that ends behind the packet",
        with(&extended(&syn6, &[60]), 55, &[200]),
        BadHeader,
    );
    pass(
        "IPv6: an ICMPv6 error",
        with(&with(&syn6, 20, &[58]), 54, &[2, 0]),
        IcmpError,
    );
    pass(
        "IPv6: a neighbour solicitation",
        with(&with(&syn6, 20, &[58]), 54, &[135, 0]),
        NotOurs,
    );
}

/// IPv6 with extension headers of 8 bytes each, of these kinds, before TCP.
fn extended(frame: &[u8], kinds: &[u8]) -> Vec<u8> {
    let mut frame = frame.to_vec();
    for kind in kinds.iter().rev() {
        // Next header, length, and 6 bytes of padding as an option (RFC 8200, 4.2).
        let next = frame[20];
        frame.splice(54..54, [next, 0, 1, 0, 0, 0, 0, 0]);
        frame[20] = *kind;
        frame[19] += 8;
    }
    frame
}

/// IPv6 with extension headers is TCP or UDP all the same.
pub(super) fn extensions(world: &World, cases: &mut Vec<Case>) {
    let [_, f] = Family::both();
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S");
    let to = Frame::tcp(to_backend(f.blue), f.client, f.blue(), "S").hops(63);
    for (name, kinds) in [
        ("IPv6: a hop-by-hop header", &[0][..]),
        (
            "IPv6: every extension header that may be walked over",
            &[0, 60, 43, 60],
        ),
    ] {
        cases.push(Case {
            name,
            world: world.clone(),
            frame: extended(&syn.bytes(), kinds),
            action: TO_BACKEND,
            reason: ForwardedNew,
            out: extended(&to.bytes(), kinds),
            flow: Some(f.check(FlowTable::HalfOpen, Some(|_| true))),
        });
    }
}
