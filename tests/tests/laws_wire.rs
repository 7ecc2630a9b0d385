//! What the packet path does with packets of every kind: each has one reason
//! (law 6), a flood evicts nobody (law 7), what is not ours passes untouched
//! (law 9); and the same service behind one arm.

use std::{
    collections::BTreeMap,
    io,
    net::{Ipv4Addr, SocketAddr},
    thread::sleep,
    time::{Duration, Instant},
};

use bg_tests::{
    conversation::{Conversation, Datagrams, ping},
    frame::{Frame, Macs},
    lab::{Lab, Place, default_service, listener, listener_v6},
    load::{self, Load, PATIENCE, Reuse, assert_flawless, mix},
    wire::Wire,
};

const SIDES: [&str; 3] = ["clients", "blue", "green"];

/// Packets by reason.
fn reasons(lab: &Lab) -> BTreeMap<String, u64> {
    let reasons = lab.status().unwrap()["reasons"].clone();
    serde_json::from_value(reasons).unwrap()
}

/// Sum of the counters of an interface's receive queues that end in `name`, as
/// its driver has them.
fn driver_counts(lab: &Lab, interface: &str, name: &str) -> u64 {
    let text = lab
        .run(Place::Gateway, &format!("ethtool -S {interface}"))
        .unwrap();
    let counts = text.lines().filter_map(|line| {
        let (key, value) = line.trim().split_once(": ")?;
        let part = key.strip_prefix("rx_queue_")?.split_once('_')?.1;
        (part == name).then(|| value.parse::<u64>().unwrap())
    });
    counts.sum()
}

/// Packets that the interfaces got, and packets with a reason, once both stand
/// still.
fn when_quiet(lab: &Lab) -> (u64, u64) {
    let counts = || {
        let got = SIDES
            .iter()
            .map(|side| driver_counts(lab, side, "xdp_packets"));
        (got.sum::<u64>(), reasons(lab).values().sum::<u64>())
    };
    let begun = Instant::now();
    let mut last = counts();
    loop {
        sleep(Duration::from_millis(100));
        let now = counts();
        if now == last {
            return now;
        }
        assert!(begun.elapsed() < PATIENCE, "packets keep coming");
        last = now;
    }
}

/// Frames, and the side that they come in by.
struct Sender {
    clients: Wire,
    blue: Wire,
    clients_macs: Macs,
    blue_macs: Macs,
}

impl Sender {
    fn new(lab: &Lab) -> Self {
        let wire = |place| Wire::open(&lab.enter(place).unwrap(), "eth0").unwrap();
        let macs = |place, link| Macs {
            to: lab.mac(Place::Gateway, link).unwrap(),
            from: lab.mac(place, "eth0").unwrap(),
        };
        Self {
            clients: wire(Place::Client),
            blue: wire(Place::Blue),
            clients_macs: macs(Place::Client, "clients"),
            blue_macs: macs(Place::Blue, "blue"),
        }
    }
}

/// A frame that is none of our business, and why.
struct Foreign {
    reason: &'static str,
    from_blue: bool,
    bytes: Vec<u8>,
}

fn foreign(sender: &Sender) -> Vec<Foreign> {
    let client: SocketAddr = "198.51.100.10:5555".parse().unwrap();
    let client_v6: SocketAddr = "[2001:db8:c::10]:5555".parse().unwrap();
    let macs = sender.clients_macs;
    let syn = Frame::tcp(macs, client, listener(8000), "S").bytes();
    let syn_v6 = Frame::tcp(macs, client_v6, listener_v6(8000), "S").bytes();
    let change = |frame: &[u8], at: usize, bytes: &[u8]| {
        let mut frame = frame.to_vec();
        frame[at..at + bytes.len()].copy_from_slice(bytes);
        frame
    };
    let tagged = [&syn[..12], &[0x81, 0, 0, 7], &syn[12..]].concat();
    let frames = [
        (
            "not_ours",
            Frame::tcp(macs, client, listener(9999), "S").bytes(),
        ),
        (
            "not_ours",
            Frame::udp(macs, client_v6, listener_v6(8000)).bytes(),
        ),
        ("not_ip", change(&syn, 12, &[0x88, 0xb5])),
        ("truncated", syn[..30].to_vec()),
        ("truncated", syn_v6[..50].to_vec()),
        ("bad_header", change(&syn, 14, &[0x44])),
        ("bad_header", change(&syn, 46, &[0x40])),
        ("vlan", tagged),
        ("fragment", change(&syn, 20, &[0x20, 9])),
        ("fragment", change(&syn, 20, &[0, 9])),
        ("extension_header", change(&syn_v6, 20, &[51])),
        ("icmp_error", change(&change(&syn, 23, &[1]), 34, &[3, 1])),
        (
            "icmp_error",
            change(&change(&syn_v6, 20, &[58]), 54, &[1, 0]),
        ),
        (
            "ttl_expired",
            Frame::tcp(macs, client, listener(8000), "S")
                .ip_options(&[1; 4])
                .hops(1)
                .bytes(),
        ),
        (
            "too_big",
            Frame::udp(macs, client, listener(4433))
                .ip_options(&[1; 4])
                .payload(&[7; 1400])
                .bytes(),
        ),
    ];
    let mut all: Vec<_> = frames
        .into_iter()
        .map(|(reason, bytes)| Foreign {
            reason,
            from_blue: false,
            bytes,
        })
        .collect();
    let backend: SocketAddr = "10.0.1.10:8000".parse().unwrap();
    for flags in ["SA", "A", "R"] {
        all.push(Foreign {
            reason: "return_unknown",
            from_blue: true,
            bytes: Frame::tcp(sender.blue_macs, backend, client, flags)
                .payload(flags.as_bytes())
                .bytes(),
        });
    }
    all
}

/// Law 6: after traffic of every kind, through flips, a cut and a rollback, as
/// many packets have a reason as the interfaces got.
#[test]
fn every_packet_has_one_reason() {
    let lab = Lab::serving().unwrap();
    let client = || lab.enter(Place::Client).unwrap();
    let before = when_quiet(&lab);

    let load = Load::start(client(), mix(24), Duration::from_millis(3));
    let datagrams = Datagrams::open(&client(), listener_v6(4433)).unwrap();
    let sender = Sender::new(&lab);
    for verb in [
        &["flip", "llm"][..],
        &["flip", "llm", "--mode", "cut"],
        &["flip", "llm"],
        &["rollback", "llm"],
    ] {
        load.advance(240);
        datagrams.ask().unwrap();
        lab.ask(verb).unwrap();
        for frame in foreign(&sender) {
            let wire = if frame.from_blue {
                &sender.blue
            } else {
                &sender.clients
            };
            wire.send(&frame.bytes).unwrap();
        }
        // A client that comes from nowhere, and closed ports.
        let lost = "198.51.100.10:6666".parse().unwrap();
        let frame = Frame::tcp(sender.clients_macs, lost, listener(8000), "PA");
        sender.clients.send(&frame.bytes()).unwrap();
        assert!(Conversation::open(&client(), "198.51.100.1:1".parse().unwrap()).is_err());
    }
    load.finish().unwrap();

    let after = when_quiet(&lab);
    println!("{} packets: {:?}", after.0 - before.0, reasons(&lab));
    assert!(after.0 - before.0 > 2000);
    assert_eq!(after.1 - before.1, after.0 - before.0);
    for reason in [
        "forwarded",
        "forwarded_new",
        "forwarded_orphan",
        "returned",
        "reset_client",
    ] {
        assert!(reasons(&lab)[reason] > 0, "{reason}");
    }
}

/// Law 9: what is not ours reaches the stack byte for byte, and is counted under
/// the reason why.
#[test]
fn what_is_not_ours_reaches_the_stack_byte_for_byte() {
    let lab = Lab::new().unwrap();
    for colour in ["blue", "green"] {
        lab.ip(Place::Gateway, &format!("link set {colour} mtu 1400"))
            .unwrap();
    }
    let lab = lab.served().unwrap();
    let sender = Sender::new(&lab);
    let gateway = lab.enter(Place::Gateway).unwrap();
    let before = reasons(&lab);
    let mut counts = BTreeMap::<&str, u64>::new();
    for Foreign {
        reason,
        from_blue,
        bytes,
    } in foreign(&sender)
    {
        let (wire, side) = if from_blue {
            (&sender.blue, "blue")
        } else {
            (&sender.clients, "clients")
        };
        let stack = Wire::open(&gateway, side).unwrap();
        wire.send(&bytes).unwrap();
        // The stack keeps a VLAN tag beside the frame.
        let expected = if reason == "vlan" {
            [&bytes[..12], &bytes[16..]].concat()
        } else {
            bytes
        };
        assert!(stack.sees(&expected, PATIENCE).unwrap(), "{reason}");
        *counts.entry(reason).or_default() += 1;
    }
    let after = reasons(&lab);
    for (reason, count) in counts {
        let counted = after[reason] - before[reason];
        assert!(counted >= count, "{counted} of {count} counted as {reason}");
    }
    for reason in ["forwarded", "forwarded_orphan", "returned", "inconsistent"] {
        assert_eq!(after[reason], before[reason], "{reason}");
    }
}

/// Law 9: the gateway answers pings, serves what it serves itself, and forwards
/// what goes from clients to servers directly, as if we were not there.
#[test]
fn the_gateways_own_traffic_is_not_touched() {
    let lab = Lab::serving().unwrap();
    lab.forward(Place::Gateway).unwrap();
    let gateway = lab.enter(Place::Gateway).unwrap();
    load::serve(gateway, "gateway", &[8000, 9000], &[]).unwrap();
    let before = reasons(&lab);

    for to in [
        "198.51.100.1",
        "10.0.1.1",
        "2001:db8:c::1",
        "10.0.2.11",
        "fd00:1::10",
    ] {
        assert!(
            ping(&lab.enter(Place::Client).unwrap(), to.parse().unwrap()).unwrap(),
            "{to}"
        );
    }
    for (to, answer) in [
        ("198.51.100.1:8000", "gateway"),
        ("198.51.100.1:9000", "gateway"),
        ("[2001:db8:c::1]:8000", "gateway"),
        ("10.0.1.10:8000", "blue"),
        ("10.0.2.11:8001", "green"),
        ("[fd00:2::10]:8000", "green"),
    ] {
        let client = lab.enter(Place::Client).unwrap();
        assert_eq!(
            load::once(client, to.parse().unwrap()).unwrap(),
            answer,
            "{to}"
        );
    }
    let client = lab.enter(Place::Client).unwrap();
    let direct = Datagrams::open(&client, "10.0.1.10:4433".parse().unwrap()).unwrap();
    assert_eq!(direct.ask().unwrap(), "blue");

    let after = reasons(&lab);
    for (reason, least) in [("not_ours", 30), ("return_unknown", 12)] {
        assert!(
            after[reason] - before[reason] >= least,
            "{reason}: {after:?}"
        );
    }
    for reason in ["forwarded", "forwarded_new", "returned"] {
        assert_eq!(after[reason], before[reason], "{reason}");
    }
    assert_eq!(lab.ask(&["flows", "llm"]).unwrap()["total"], 0);
}

/// Law 7: more forged SYNs and segments than the half-open table holds, while
/// the established table has room for few: every established flow keeps its
/// entry, and so its backend through a flip.
#[test]
fn a_flood_evicts_no_established_flow() {
    const FLOOD: u32 = 200_000;
    const FLOWS: usize = 200;
    let mut lab = Lab::new().unwrap();
    lab.configure_for(1024, &default_service()).unwrap();
    for (place, colour) in [(Place::Blue, "blue"), (Place::Green, "green")] {
        load::serve(lab.enter(place).unwrap(), colour, &[8000, 8001], &[]).unwrap();
    }
    lab.start().unwrap();
    let client = || lab.enter(Place::Client).unwrap();
    let mut old: Vec<_> = (0..FLOWS)
        .map(|n| [listener(8000), listener(8001), listener_v6(8000)][n % 3])
        .map(|to| Conversation::open(&client(), to).unwrap())
        .collect();
    for conversation in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    let clients = mix(12).into_iter().map(|(to, _)| (to, Reuse::KeepAlive));
    let load = Load::start(client(), clients.collect(), Duration::from_millis(20));
    let entries = |lab: &Lab| {
        lab.status().unwrap()["flow_table"]["entries"]
            .as_u64()
            .unwrap()
    };
    load.advance(48);
    let before = (entries(&lab), reasons(&lab));
    assert_eq!(before.0, FLOWS as u64 + 12);

    let sender = Sender::new(&lab);
    let forge = |n: u32, flags, sequence| {
        let host = Ipv4Addr::new(198, 51, 100, 100 + (n % 100) as u8);
        let from = SocketAddr::new(host.into(), 1024 + (n / 100) as u16);
        let frame = Frame::tcp(sender.clients_macs, from, listener(8000), flags);
        let frame = frame.numbers(sequence, 5000).bytes();
        sender.clients.send(&frame).unwrap();
    };
    for n in 0..FLOOD {
        forge(n, "S", 1000);
        // What the server has answered by now they have not seen: they guess,
        // or make it say something more.
        if let Some(earlier) = n.checked_sub(100) {
            match earlier % 4 {
                0 => forge(earlier, "PA", 1001),
                1 => forge(earlier, "P", 2_000_000),
                2 => forge(earlier, "S", 3_000_000),
                _ => {}
            }
        }
        if n == FLOOD / 2 {
            lab.ask(&["flip", "llm"]).unwrap();
        }
    }
    let after = reasons(&lab);
    let arrived = |reason: &str| after[reason] - before.1[reason];
    println!("{} forged SYNs", arrived("forwarded_new"));
    assert!(arrived("forwarded_new") > 131_072 + 10_000);
    assert_eq!(arrived("forwarded_table_full"), 0);
    assert_eq!(entries(&lab), before.0);
    for conversation in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    let answers = load.finish().unwrap();
    assert_flawless(&answers);
    assert!(answers.iter().all(|a| a.result.as_deref() == Ok("blue")));
    assert_eq!(load::once(client(), listener(8000)).unwrap(), "green");
}

/// Laws 1, 2 and 6 behind one arm: everything comes and goes by the same
/// interface, and the driver is told to transmit, never to redirect.
#[test]
fn a_gateway_with_one_arm_does_all_of_it() {
    let lab = Lab::one_arm().unwrap().served().unwrap();
    let client = || lab.enter(Place::Client).unwrap();
    let load = Load::start(client(), mix(24), Duration::from_millis(5));
    let datagrams = Datagrams::open(&client(), listener(4433)).unwrap();
    assert_eq!(datagrams.ask().unwrap(), "blue");
    let mut old =
        [listener(8000), listener_v6(8000)].map(|to| Conversation::open(&client(), to).unwrap());
    for conversation in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    load.advance(480);
    let flipped = lab.ask(&["flip", "llm"]).unwrap();
    load.advance(480);
    let answers = load.finish().unwrap();
    assert_flawless(&answers);
    let before = flipped["at_ns"].as_u64().unwrap();
    let after = before + flipped["store_ns"].as_u64().unwrap();
    for answer in &answers {
        let colour = answer.result.as_deref().unwrap();
        if answer.connected_ns > after {
            assert_eq!(colour, "green", "{answer:?}");
        } else if answer.done_ns < before || !answer.first {
            assert_eq!(colour, "blue", "{answer:?}");
        }
    }
    assert_eq!(datagrams.ask().unwrap(), "blue");
    for conversation in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    for to in [listener(8001), listener_v6(8000)] {
        assert_eq!(load::once(client(), to).unwrap(), "green");
    }
    lab.ask(&["flip", "llm", "--to", "blue"]).unwrap();
    lab.ask(&["flip", "llm", "--mode", "cut"]).unwrap();
    for conversation in &mut old {
        let error = conversation.ask().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }
    assert_eq!(datagrams.ask().unwrap(), "green");

    let reasons = reasons(&lab);
    let sent: u64 = ["forwarded", "forwarded_new", "returned", "reset_client"]
        .iter()
        .map(|reason| reasons[*reason])
        .sum();
    let transmitted = driver_counts(&lab, "eth0", "xdp_tx");
    println!("{transmitted} of {sent} transmitted");
    assert!(transmitted >= sent && sent > 1000);
    assert_eq!(driver_counts(&lab, "eth0", "xdp_redirect"), 0);
    assert_eq!(driver_counts(&lab, "eth0", "xdp_tx_errors"), 0);
}
