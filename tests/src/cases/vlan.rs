//! VLAN tags: off at the entry, on again at the exit.

#![allow(clippy::wildcard_imports, reason = "a chapter of one table")]

use bg_common::{port::Tags, service::Interface};

use super::{errors::Icmp, *};
use crate::{frame::tagged, world::plain};

/// The slot of VLAN 100 on the clients' interface.
const CLIENTS_VLAN: u32 = 2;
/// The slot of VLAN 200 on the backends' interface.
const BACKENDS_VLAN: u32 = 3;
/// The slot of VLAN 400 in service VLAN 300 on the backends' interface.
const BACKENDS_QINQ: u32 = 4;
/// The slot of VLAN 200 on the clients' interface: one arm.
const ONE_ARM: u32 = 5;

/// MAC of the gateway's devices above both interfaces.
const DEVICE_MAC: [u8; 6] = [2, 0, 0, 0, 0, 9];

const VLAN_100: [u8; 4] = [0x81, 0, 0, 100];
const VLAN_200: [u8; 4] = [0x81, 0, 0, 200];
/// VLAN 100 with priority 5 and drop-eligible.
const VLAN_100_URGENT: [u8; 4] = [0x81, 0, 0xb0, 100];
const VLAN_200_URGENT: [u8; 4] = [0x81, 0, 0xb0, 200];
/// Priority 3, and no VLAN.
const PRIORITY: [u8; 4] = [0x81, 0, 0x60, 0];
const QINQ: [[u8; 4]; 2] = [[0x88, 0xa8, 1, 44], [0x81, 0, 1, 144]];

/// The world, with VLANs on both interfaces.
fn vlans(world: &World) -> World {
    let mut world = world.clone();
    let [clients, backends] = [CLIENTS, BACKENDS].map(|slot| world.interfaces[slot as usize]);
    let qinq = Tags::new(Tags::S, 300).with_inner(Tags::C, 400);
    for (below, tags, device) in [
        (clients, Tags::new(Tags::C, 100), 102),
        (backends, Tags::new(Tags::C, 200), 103),
        (backends, qinq.expect("two tags"), 104),
        (clients, Tags::new(Tags::C, 200), 105),
    ] {
        world.interfaces.push(Interface {
            tags,
            device,
            ..plain(below.ifindex, DEVICE_MAC)
        });
    }
    world
}

/// The backends are reached by this slot.
fn behind(mut world: World, slot: u32) -> World {
    for (id, backend) in world.backends.iter_mut().enumerate() {
        backend.next_hop = NextHop::new(to_backend(id as u32).to, slot as u16).0;
    }
    world
}

/// From a device above an interface to a backend.
fn device_to_backend(id: u32) -> Macs {
    Macs {
        from: DEVICE_MAC,
        ..to_backend(id)
    }
}

pub(super) fn vlan(world: &World, f: Family, cases: &mut Vec<Case>) {
    let world = vlans(world);
    to_backends(&world, f, cases);
    to_clients(&world, f, cases);
    back_by_the_same_vlan(&world, f, cases);
    error_by_another_vlan(&world, f, cases);
    to_the_stack(&world, f, cases);
    claimed(&world, f, cases);
}

fn to_backends(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").bytes();
    let to = |macs| Frame::tcp(macs, f.client, f.blue(), "S").hops(63).bytes();
    let (plain, device) = (to(to_backend(f.blue)), to(device_to_backend(f.blue)));
    let mut case = |name, slot, ingress: &[[u8; 4]], action, out| {
        cases.push(Case {
            name,
            world: behind(world.clone(), slot),
            frame: tagged(&syn, ingress),
            action,
            reason: ForwardedNew,
            out,
            flow: None,
        });
    };
    case(
        "from a VLAN to a backend without one the tag stays behind",
        BACKENDS,
        &[VLAN_100],
        TO_BACKEND,
        plain.clone(),
    );
    case(
        "to a backend in a VLAN the tag is put on",
        BACKENDS_VLAN,
        &[],
        Redirect(BACKENDS_VLAN),
        tagged(&device, &[VLAN_200]),
    );
    case(
        "from one VLAN to another the priority is kept",
        BACKENDS_VLAN,
        &[VLAN_100_URGENT],
        Redirect(BACKENDS_VLAN),
        tagged(&device, &[VLAN_200_URGENT]),
    );
    case(
        "802.1ad: both tags are put on, the outer one with the priority that came",
        BACKENDS_QINQ,
        &[VLAN_100_URGENT],
        Redirect(BACKENDS_QINQ),
        tagged(&device, &[[0x88, 0xa8, 0xb1, 44], QINQ[1]]),
    );
    case(
        "with one arm a packet leaves by its interface in another VLAN",
        ONE_ARM,
        &[VLAN_100],
        Transmit,
        tagged(&device, &[VLAN_200]),
    );
    case(
        "from a VLAN to no VLAN of the same interface the tag stays behind",
        CLIENTS,
        &[VLAN_100],
        Transmit,
        to(Macs {
            from: FROM_CLIENT.to,
            ..to_backend(f.blue)
        }),
    );
    case(
        "a tag of priority alone is no VLAN",
        BACKENDS,
        &[PRIORITY],
        TO_BACKEND,
        plain,
    );
    case(
        "a tag of priority alone gives its priority to a VLAN",
        BACKENDS_VLAN,
        &[PRIORITY],
        Redirect(BACKENDS_VLAN),
        tagged(&device, &[[0x81, 0, 0x60, 200]]),
    );
    // 1500 bytes from the IP header: tags do not count.
    let header = if f.client.is_ipv4() { 40 } else { 60 };
    let full = |macs, to| Frame::tcp(macs, f.client, to, "PA").payload(&vec![7; 1500 - header]);
    cases.push(Case {
        name: "the MTU counts from the IP header, tags do not count",
        world: behind(world.clone(), BACKENDS_QINQ),
        frame: tagged(&full(FROM_CLIENT, f.service).bytes(), &[VLAN_100]),
        action: Redirect(BACKENDS_QINQ),
        reason: ForwardedOrphan,
        out: tagged(
            &full(device_to_backend(f.blue), f.blue()).hops(63).bytes(),
            &QINQ,
        ),
        flow: Some(f.check(
            FlowTable::HalfOpen,
            Some(|flow| flow.client_hop == NextHop::new(FROM_CLIENT.from, CLIENTS_VLAN as u16).0),
        )),
    });
}

fn to_clients(world: &World, f: Family, cases: &mut Vec<Case>) {
    let to_vlan = Macs {
        to: TO_CLIENT.to,
        from: DEVICE_MAC,
    };
    let mut known = World {
        ingress: BACKENDS,
        ..behind(world.clone(), BACKENDS_QINQ)
    };
    let flow = Flow {
        client_hop: NextHop::new(TO_CLIENT.to, CLIENTS_VLAN as u16).0,
        ..Family::flow(world, f.blue)
    };
    f.add(&mut known, FlowTable::Established, flow);
    let reply = |macs, from| Frame::tcp(macs, from, f.client, "PA").payload(b"HTTP/1.1 200 OK");
    cases.push(Case {
        name: "802.1ad: a reply comes in with two tags and leaves with its client's one",
        world: known.clone(),
        frame: tagged(&reply(from_backend(f.blue), f.blue()).bytes(), &QINQ),
        action: Redirect(CLIENTS_VLAN),
        reason: Returned,
        out: tagged(&reply(to_vlan, f.service).hops(63).bytes(), &[VLAN_100]),
        flow: Some(f.check(
            FlowTable::Established,
            // Learned: it came by the VLAN that leads to the backend.
            Some(|flow| flow.client_next == 5000),
        )),
    });
    let was_cut = World {
        word: known.word.flipped(Colour::Green, true),
        ..known
    };
    cases.push(Case {
        name: "the RST for a cut flow's client leaves in the client's VLAN",
        world: was_cut,
        frame: tagged(&reply(from_backend(f.blue), f.blue()).bytes(), &QINQ),
        action: Redirect(CLIENTS_VLAN),
        reason: ResetClient,
        out: tagged(
            &Frame::tcp(to_vlan, f.service, f.client, "RA")
                .numbers(5000, 5000)
                .window(0)
                .bytes(),
            &[VLAN_100],
        ),
        flow: None,
    });
}

/// Our own answers carry the tags of the packet that they answer.
fn back_by_the_same_vlan(world: &World, f: Family, cases: &mut Vec<Case>) {
    let back = BACK_TO_CLIENT;
    let mut was_cut = flipped(world, true);
    f.add(
        &mut was_cut,
        FlowTable::Established,
        Family::flow(world, f.blue),
    );
    cases.push(Case {
        name: "the RST that answers a client goes back in its VLAN",
        world: was_cut,
        frame: tagged(
            &Frame::tcp(FROM_CLIENT, f.client, f.service, "A").bytes(),
            &[VLAN_100_URGENT],
        ),
        action: Transmit,
        reason: ResetClient,
        out: tagged(
            &Frame::tcp(back, f.service, f.client, "R")
                .numbers(5000, 0)
                .window(0)
                .bytes(),
            &[VLAN_100_URGENT],
        ),
        flow: None,
    });
    let (header, error) = if f.client.is_ipv4() {
        (20, (11, 0, 0))
    } else {
        (40, (3, 0, 0))
    };
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").hops(1);
    let quote = syn.quote(header + 8);
    cases.push(Case {
        name: "\"time exceeded\" goes back in the VLAN of what it is about",
        world: behind(world.clone(), BACKENDS_VLAN),
        frame: tagged(&syn.bytes(), &[VLAN_100]),
        action: Transmit,
        reason: SentTimeExceeded,
        out: tagged(
            &Frame::icmp(back, f.service.ip(), f.client.ip(), error, &quote).bytes(),
            &[VLAN_100],
        ),
        flow: None,
    });
}

/// An error goes to a backend that is reached by the interface it came in by, but not
/// by the router that made it: that one is in another VLAN.
fn error_by_another_vlan(world: &World, f: Family, cases: &mut Vec<Case>) {
    let Icmp {
        header,
        too_big,
        router,
        ..
    } = Icmp::of(f);
    let mut known = behind(world.clone(), ONE_ARM);
    let flow = Family::flow(world, f.blue);
    f.add(&mut known, FlowTable::Established, flow);
    let error = |macs, to: SocketAddr| {
        let reply = Frame::tcp(TO_CLIENT, to, f.client, "PA").payload(&[7; 1400]);
        Frame::icmp(macs, router, to.ip(), too_big, &reply.quote(header + 400))
    };
    cases.push(Case {
        name: "an error that goes back into another VLAN comes from the router that made it",
        world: known,
        frame: tagged(&error(FROM_CLIENT, f.service).bytes(), &[VLAN_100]),
        action: Transmit,
        reason: ForwardedError,
        out: tagged(
            &error(device_to_backend(f.blue), f.blue()).hops(63).bytes(),
            &[VLAN_200],
        ),
        flow: None,
    });
}

fn to_the_stack(world: &World, f: Family, cases: &mut Vec<Case>) {
    let syn = Frame::tcp(FROM_CLIENT, f.client, f.service, "S").bytes();
    let ssh = SocketAddr::new(f.service.ip(), 22);
    let other = Frame::tcp(FROM_CLIENT, f.client, ssh, "S").bytes();
    let mut pass = |name, ingress, frame: Vec<u8>, reason| {
        cases.push(Case {
            name,
            world: World {
                ingress,
                ..world.clone()
            },
            out: frame.clone(),
            frame,
            action: Pass,
            reason,
            flow: None,
        });
    };
    pass(
        "what is not ours keeps its tag (law 9)",
        CLIENTS,
        tagged(&other, &[VLAN_100_URGENT]),
        NotOurs,
    );
    pass(
        "what is not ours keeps both tags (law 9)",
        BACKENDS,
        tagged(&other, &QINQ),
        NotOurs,
    );
    pass(
        "what is not ours keeps a tag of priority alone (law 9)",
        CLIENTS,
        tagged(&other, &[PRIORITY]),
        NotOurs,
    );
    pass(
        "three tags",
        CLIENTS,
        tagged(&syn, &[VLAN_100, VLAN_100, VLAN_100]),
        Vlan,
    );
    pass(
        "three tags, two of which the host has a device for",
        BACKENDS,
        tagged(&syn, &[QINQ[0], QINQ[1], VLAN_100]),
        Vlan,
    );
    pass(
        "a VLAN that the host has no device for",
        CLIENTS,
        tagged(&syn, &[[0x81, 0, 0, 101]]),
        Vlan,
    );
    pass(
        "a VLAN of the other interface",
        CLIENTS,
        tagged(&syn, &QINQ),
        Vlan,
    );
    pass(
        "an 802.1ad tag where the host has an 802.1Q device",
        CLIENTS,
        tagged(&syn, &[[0x88, 0xa8, 0, 100]]),
        Vlan,
    );
    pass(
        "ends inside the tags",
        CLIENTS,
        tagged(&syn, &[VLAN_100, VLAN_100])[..23].to_vec(),
        Truncated,
    );
    pass(
        "ends behind the tag",
        CLIENTS,
        tagged(&syn, &[VLAN_100])[..22].to_vec(),
        Truncated,
    );
    let mut arp = tagged(&syn, &[VLAN_100]);
    arp[16..18].copy_from_slice(&[8, 6]);
    pass("ARP in a VLAN", CLIENTS, arp, NotIp);
    let mut unresolved = world.clone();
    unresolved.backends[f.blue as usize].next_hop = 0;
    cases.push(Case {
        name: "what the stack forwards goes there in the VLAN it came by",
        world: unresolved,
        frame: tagged(&syn, &[VLAN_100_URGENT]),
        action: Pass,
        reason: ForwardedByStack,
        out: tagged(
            &Frame::tcp(FROM_CLIENT, f.client, f.blue(), "S").bytes(),
            &[VLAN_100_URGENT],
        ),
        flow: None,
    });
}

/// A backend's address from another VLAN of the interface that leads there.
fn claimed(world: &World, f: Family, cases: &mut Vec<Case>) {
    let mut half = World {
        ingress: BACKENDS,
        ..behind(world.clone(), BACKENDS_VLAN)
    };
    f.add(&mut half, FlowTable::HalfOpen, Family::flow(world, f.blue));
    let claim = |macs, from| {
        Frame::tcp(macs, from, f.client, "SA")
            .numbers(7000, 1001)
            .payload(b"x")
    };
    for (name, tags, holds) in [
        (
            "a SYN-ACK with a backend's address from another VLAN asks for no proof (law 7)",
            &QINQ[..],
            (|flow| sides(flow) == (0, 0)) as fn(&Flow) -> bool,
        ),
        (
            "a SYN-ACK from the backend's VLAN is the proof that is asked for (law 7)",
            &[VLAN_200],
            |flow| flow.proof == 7001,
        ),
    ] {
        cases.push(Case {
            name,
            world: half.clone(),
            frame: tagged(&claim(from_backend(f.blue), f.blue()).bytes(), tags),
            action: TO_CLIENTS,
            reason: Returned,
            out: claim(TO_CLIENT, f.service).hops(63).bytes(),
            flow: Some(f.check(FlowTable::HalfOpen, Some(holds))),
        });
    }
}
