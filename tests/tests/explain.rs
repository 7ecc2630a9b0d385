//! `bgswitch explain`: what it says is what then happens, and asking changes nothing.

use std::{
    collections::BTreeMap,
    net::{SocketAddr, UdpSocket},
};

use aya::maps::{Array, ArrayOfMaps, Map, MapData};
use bg_common::{
    abi::map,
    flow::{Flow, FlowKey, FlowTable},
    snat::Lease,
};
use bg_tests::{
    conversation::Conversation,
    flow_table::FlowTables,
    kernel::in_namespace,
    lab::{Lab, Place, SERVERS, default_service, listener, listener_v6, service},
    load::{PATIENCE, until},
};
use serde_json::{Value, json};

/// All that a dry run could have changed: remembered flows, counters of what is ours,
/// the first flow's stamp.
#[derive(Debug, PartialEq)]
struct Tables {
    flows: BTreeMap<(u32, FlowKey), Flow>,
    services: Value,
    reasons: Value,
    flow_table: Value,
    first_flow: u64,
}

fn tables(lab: &Lab) -> Tables {
    let maps = lab.pinned_map(map::FLOWS);
    let tables = FlowTables::pinned(maps.parent().unwrap()).unwrap();
    let all = FlowTable::ALL.into_iter();
    let flows = all
        .flat_map(|table| {
            let flows = tables.flows(table);
            flows.map(move |(key, flow)| ((table as u32, key), flow))
        })
        .collect();
    let mut status = lab.status().unwrap();
    // What the host itself sends and hears goes on meanwhile.
    let reasons = status["reasons"].as_object_mut().unwrap();
    reasons.retain(|reason, _| !["not_ip", "not_ours"].contains(&reason.as_str()));
    let (words, id) = lab.words().unwrap();
    Tables {
        flows,
        services: status["services"].take(),
        reasons: status["reasons"].take(),
        flow_table: status["flow_table"].take(),
        first_flow: words.first_flow(id).0,
    }
}

fn explain(lab: &Lab, protocol: &str, client: SocketAddr, to: SocketAddr) -> Value {
    lab.ask(&["explain", protocol, &client.to_string(), &to.to_string()])
        .unwrap()
}

/// What would become of a packet: reason, colour, backend's address.
fn fate(explained: &Value, packet: &str) -> (String, String, String) {
    let packets = explained["packets"].as_array().unwrap();
    let packet = packets.iter().find(|of| of["packet"] == packet).unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let backend = text(&packet["backend"]);
    let address = backend.parse::<SocketAddr>();
    (
        text(&packet["reason"]),
        text(&packet["colour"]),
        address.map_or(backend, |address| address.ip().to_string()),
    )
}

/// Colour, backend and table of the client's flow, as `flows` has it.
fn flow_of(lab: &Lab, client: SocketAddr) -> (String, String, String) {
    let flows = lab.ask(&["flows", "--all"]).unwrap();
    let flows = flows["flows"].as_array().unwrap();
    let found = flows
        .iter()
        .find(|flow| flow["client"] == client.to_string() && flow["table"] != "half_open");
    let flow = found.unwrap_or_else(|| panic!("{client} has no flow"));
    let text = |key: &str| flow[key].as_str().unwrap().to_owned();
    (text("colour"), text("backend"), text("table"))
}

/// Clients, and the listeners that they talk to, over both families.
fn pairs(first_port: u16) -> Vec<(SocketAddr, SocketAddr)> {
    let mut pairs = Vec::new();
    for port in first_port..first_port + 12 {
        for address in ["198.51.100.10", "198.51.100.11"] {
            let client = SocketAddr::new(address.parse().unwrap(), port);
            pairs.push((client, listener(8000)));
        }
        let client = SocketAddr::new("2001:db8:c::10".parse().unwrap(), port);
        pairs.push((client, listener_v6(8000)));
    }
    pairs
}

/// A UDP socket with an address of its own.
fn datagrams(lab: &Lab, from: SocketAddr, to: SocketAddr) -> UdpSocket {
    let client = lab.enter(Place::Client).unwrap();
    let socket = in_namespace(&client, || UdpSocket::bind(from)).unwrap();
    socket.connect(to).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

fn ask(socket: &UdpSocket) -> String {
    let mut buffer = [0; 64];
    socket.send(b"who").unwrap();
    let length = socket.recv(&mut buffer).unwrap();
    String::from_utf8_lossy(&buffer[..length]).into_owned()
}

/// The same asked twice changes nothing, and what it says of a new connection is what
/// a new connection then does.
#[test]
fn a_new_connection_goes_where_it_was_said() {
    let lab = Lab::serving().unwrap();
    let client = lab.enter(Place::Client).unwrap();
    for (round, colour) in ["blue", "green", "blue"].into_iter().enumerate() {
        if round > 0 {
            lab.tell(&["flip", "llm"]).unwrap();
        }
        let before = tables(&lab);
        let pairs = pairs(20_000 + 100 * round as u16);
        let said: Vec<Value> = pairs
            .iter()
            .map(|(from, to)| explain(&lab, "tcp", *from, *to))
            .collect();
        assert_eq!(tables(&lab), before);
        let mut open = Vec::new();
        for ((from, to), said) in pairs.iter().zip(&said) {
            assert_eq!(
                (&said["service"], &said["flow"], &said["interface"]),
                (&json!("llm"), &Value::Null, &json!("clients"))
            );
            assert_eq!(said["word"]["active"], colour);
            assert_eq!(said["word"]["generation"], round);
            let (reason, of, backend) = fate(said, "syn");
            assert_eq!((reason.as_str(), of.as_str()), ("forwarded_new", colour));
            let orphan = fate(said, "ack");
            assert_eq!(
                orphan,
                ("forwarded_orphan".into(), of.clone(), backend.clone())
            );

            let mut conversation = Conversation::open_from(&client, *from, *to).unwrap();
            assert_eq!(conversation.ask().unwrap(), colour);
            let flow = flow_of(&lab, *from);
            assert_eq!(flow, (of, backend, "established".into()), "{said}");
            open.push(conversation);
        }
        // One backend would prove nothing.
        let backends: std::collections::BTreeSet<String> =
            said.iter().map(|said| fate(said, "syn").2).collect();
        assert_eq!(backends.len(), 3, "{backends:?}");
    }
}

#[test]
fn a_known_connection_stays_where_it_was_said_until_it_is_cut() {
    let lab = Lab::serving().unwrap();
    let client = lab.enter(Place::Client).unwrap();
    let pairs = pairs(21_000);
    let mut open: Vec<Conversation> = pairs
        .iter()
        .map(|(from, to)| Conversation::open_from(&client, *from, *to).unwrap())
        .collect();
    for conversation in &mut open {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    lab.tell(&["flip", "llm", "--drain", "10m"]).unwrap();
    let before = tables(&lab);
    for (from, to) in &pairs {
        let said = explain(&lab, "tcp", *from, *to);
        let (colour, backend, table) = flow_of(&lab, *from);
        let flow = &said["flow"];
        assert_eq!(
            (
                &flow["table"],
                &flow["colour"],
                &flow["state"],
                &flow["generation"]
            ),
            (&json!(table), &json!(colour), &json!("open"), &json!(0))
        );
        assert!(
            flow["backend"].as_str().unwrap().contains(&backend),
            "{said}"
        );
        assert_eq!(
            fate(&said, "ack"),
            ("forwarded".into(), "blue".into(), backend)
        );
        let (reason, colour, _) = fate(&said, "syn");
        assert_eq!(
            (reason.as_str(), colour.as_str()),
            ("forwarded_new", "green")
        );
        assert!(said["word"]["draining_until"].is_string(), "{said}");
    }
    assert_eq!(tables(&lab), before);
    for conversation in &mut open {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }

    lab.tell(&["flip", "llm", "--mode", "drain"]).unwrap();
    lab.tell(&["flip", "llm", "--mode", "cut"]).unwrap();
    let before = tables(&lab);
    for (from, to) in &pairs {
        let said = explain(&lab, "tcp", *from, *to);
        assert_eq!(said["flow"]["state"], "resetting", "{said}");
        assert_eq!(said["word"]["resets_before"], 3);
        assert_eq!(fate(&said, "ack").0, "reset_client");
        assert_eq!(fate(&said, "syn").1, "green");
    }
    assert_eq!(tables(&lab), before);
    for conversation in &mut open {
        assert!(conversation.ask().is_err());
    }
}

#[test]
fn datagrams_go_where_it_was_said() {
    let lab = Lab::serving().unwrap();
    let pairs: Vec<(SocketAddr, SocketAddr)> = pairs(22_000)
        .into_iter()
        .map(|(from, to)| (from, SocketAddr::new(to.ip(), 4433)))
        .collect();
    let mut sockets = Vec::new();
    for (from, to) in &pairs {
        let said = explain(&lab, "udp", *from, *to);
        let (reason, colour, backend) = fate(&said, "datagram");
        assert_eq!(
            (reason.as_str(), colour.as_str()),
            ("forwarded_new", "blue")
        );
        let socket = datagrams(&lab, *from, *to);
        assert_eq!(ask(&socket), "blue");
        assert_eq!(flow_of(&lab, *from), (colour, backend, "udp".into()));
        sockets.push(socket);
    }
    lab.tell(&["flip", "llm", "--drain", "10m"]).unwrap();
    let before = tables(&lab);
    for (from, to) in &pairs {
        let said = explain(&lab, "udp", *from, *to);
        let (colour, backend, _) = flow_of(&lab, *from);
        // By the listener's own idle time, which may have passed on a slow machine.
        let (reason, of, to) = fate(&said, "datagram");
        if reason == "forwarded" {
            assert_eq!((of, to), (colour.clone(), backend));
            assert_eq!(said["flow"]["table"], "udp");
        }
    }
    assert_eq!(tables(&lab), before);
    drop(sockets);
}

/// The source ports that are lent, by block and index.
fn leases(lab: &Lab) -> BTreeMap<(u32, u32), Lease> {
    let blocks = MapData::from_pin(lab.pinned_map(map::LEASES)).unwrap();
    let blocks: ArrayOfMaps<_, Array<MapData, Lease>> =
        Map::ArrayOfMaps(blocks).try_into().unwrap();
    let mut leases = BTreeMap::new();
    for number in 0..=2 * SERVERS[0].len() as u32 {
        let Ok(block) = blocks.get(&number, 0) else {
            continue;
        };
        let lent = (0..).zip(block.iter().map(Result::unwrap));
        leases.extend(
            lent.filter(|(_, lease)| lease.id != 0)
                .map(|(index, lease)| ((number, index), lease)),
        );
    }
    leases
}

/// With `snat` a new flow is lent a port, and a proven one keeps it: not in a dry run.
#[test]
fn with_snat_asking_lends_no_port() {
    let service = service("forward = \"snat\"", SERVERS);
    let lab = Lab::new().unwrap().served_as(&service).unwrap();
    let client = lab.enter(Place::Client).unwrap();
    let pairs = pairs(24_000);
    let (known, new) = pairs.split_at(6);
    let mut open: Vec<Conversation> = known
        .iter()
        .map(|(from, to)| Conversation::open_from(&client, *from, *to).unwrap())
        .collect();
    for conversation in &mut open {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    let (before, lent) = (tables(&lab), leases(&lab));
    assert_eq!(lent.len(), known.len());
    for (from, to) in new.iter().chain(known) {
        let (reason, colour, _) = fate(&explain(&lab, "tcp", *from, *to), "syn");
        let said = (reason.as_str(), colour.as_str());
        assert_eq!(said, ("forwarded_new", "blue"));
        let to = SocketAddr::new(to.ip(), 4433);
        let (reason, ..) = fate(&explain(&lab, "udp", *from, to), "datagram");
        assert_eq!(reason, "forwarded_new");
    }
    assert_eq!(leases(&lab), lent);
    assert_eq!(tables(&lab), before);
    for conversation in &mut open {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
}

/// Law 2 in a dry run: a canary's share is the client's, and a connection that is
/// still opening is found.
#[test]
fn a_canary_is_explained_as_it_then_is() {
    let lab = Lab::serving().unwrap();
    let client = lab.enter(Place::Client).unwrap();
    lab.tell(&["canary", "llm", "100"]).unwrap();
    for (from, to) in pairs(23_000).into_iter().take(6) {
        let said = explain(&lab, "tcp", from, to);
        assert!(said["word"]["canary_percent"].as_f64().unwrap() > 99.0);
        let (_, colour, backend) = fate(&said, "syn");
        let mut conversation = Conversation::open_from(&client, from, to).unwrap();
        assert_eq!(conversation.ask().unwrap(), colour);
        assert_eq!(flow_of(&lab, from), (colour, backend, "established".into()));
    }
}

#[test]
fn what_is_no_listener_passes_and_a_silent_backend_is_named() {
    let mut lab = Lab::new().unwrap();
    let silent = default_service().replace("10.0.1.10", "10.0.1.99");
    lab.configure(&silent.replace("10.0.1.11", "10.0.1.98"))
        .unwrap();
    lab.start().unwrap();
    let client: SocketAddr = "198.51.100.10:5000".parse().unwrap();
    let other: SocketAddr = "203.0.113.10:9".parse().unwrap();
    let said = explain(&lab, "tcp", client, other);
    assert_eq!(
        (&said["service"], &said["word"]),
        (&Value::Null, &Value::Null)
    );
    for packet in ["syn", "ack"] {
        assert_eq!(fate(&said, packet).0, "not_ours");
    }
    let (code, text, _) = lab
        .tell(&[
            "explain",
            "tcp",
            "198.51.100.10:5000",
            "tcp://203.0.113.10:9",
        ])
        .unwrap();
    assert_eq!(code, 0);
    assert!(
        text.contains("not_ours -> passes untouched to the host's stack"),
        "{text}"
    );

    until("nobody answers", || {
        fate(&explain(&lab, "tcp", client, listener(8000)), "syn").0 == "forwarded_by_stack"
    });
    let (_, text, _) = lab
        .tell(&["explain", "tcp", "198.51.100.10:5000", "203.0.113.10:8000"])
        .unwrap();
    assert!(text.contains("flow      not known"), "{text}");
    assert!(text.contains(", whose next hop is not resolved"), "{text}");
}

#[test]
fn people_read_where_it_goes() {
    let lab = Lab::serving().unwrap();
    let (code, text, err) = lab
        .tell(&[
            "explain",
            "udp",
            "[2001:db8:c::10]:5000",
            "[2001:db8::10]:4433",
        ])
        .unwrap();
    assert_eq!(code, 0, "{err}");
    let mac = lab.mac(Place::Blue, "eth0").unwrap();
    let mac = mac.map(|octet| format!("{octet:02x}")).join(":");
    let first = "llm  udp://[2001:db8::10]:4433   client [2001:db8:c::10]:5000, by clients\n\
                 word      blue is active, generation 0\n\
                 flow      not known\n";
    assert!(text.starts_with(first), "{text}");
    let line =
        format!("datagram  forwarded_new -> blue [fd00:1::10]:4433 by blue to {mac}, MTU 1500\n");
    assert!(text.contains(&line), "{text}");
}

#[test]
fn what_no_client_could_send_is_refused() {
    let lab = Lab::serving().unwrap();
    for (words, said) in [
        (
            ["tcp", "198.51.100.10", "203.0.113.10:8000"],
            "is no client with its port",
        ),
        (
            ["tcp", "198.51.100.10:1", "203.0.113.10"],
            "is no listener, like",
        ),
        (
            ["tcp", "198.51.100.10:1", "udp://203.0.113.10:4433"],
            "is no listener for tcp",
        ),
        (
            ["tcp", "198.51.100.10:1", "[2001:db8::10]:8000"],
            "no packet has both",
        ),
        (
            ["tcp", "198.51.100.10:0", "203.0.113.10:8000"],
            "has no port",
        ),
        (
            ["tcp", "0.0.0.0:1", "203.0.113.10:8000"],
            "is no client's address",
        ),
        (
            ["udp", "[fe80::1%2]:1", "[2001:db8::10]:4433"],
            "is no client with its port",
        ),
        (
            ["sctp", "198.51.100.10:1", "203.0.113.10:8000"],
            "invalid value 'sctp'",
        ),
    ] {
        let (code, out, err) = lab.tell(&[&["explain"][..], &words].concat()).unwrap();
        assert_eq!((code, out.as_str()), (2, ""), "{words:?}: {err}");
        assert!(err.contains(said), "{err}");
    }
}
