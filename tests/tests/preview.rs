//! Previews: addresses that always reach one colour, whatever is active.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use bg_tests::{
    conversation::{Conversation, Datagrams},
    kernel::in_namespace,
    lab::{
        Lab, Place, SERVERS, SERVICE, SERVICE_V6, default_service, listener, listener_v6, service,
    },
    load::PATIENCE,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// The previews of blue and of green.
const PREVIEWS: [[&str; 2]; 2] = [
    ["203.0.113.11", "2001:db8::11"],
    ["203.0.113.12", "2001:db8::12"],
];

/// The same service, with previews.
fn previewed(service: &str) -> String {
    let mut text = service.to_owned();
    for (colour, [v4, v6]) in ["blue", "green"].iter().zip(PREVIEWS) {
        let table = format!("[service.llm.{colour}]\n");
        text = text.replace(&table, &format!("{table}preview = [\"{v4}\", \"{v6}\"]\n"));
    }
    text
}

/// The previews of a colour at a port.
fn preview(colour: usize, port: u16) -> [SocketAddr; 2] {
    PREVIEWS[colour].map(|address| SocketAddr::new(address.parse().unwrap(), port))
}

fn open(lab: &Lab, to: SocketAddr) -> Conversation {
    Conversation::open(&lab.enter(Place::Client).unwrap(), to).unwrap()
}

fn who(lab: &Lab, to: SocketAddr) -> String {
    open(lab, to).ask().unwrap()
}

fn colour(lab: &Lab, name: &str) -> Value {
    lab.status().unwrap()["services"][0]["colours"][name].clone()
}

fn new_flows(lab: &Lab, name: &str) -> u64 {
    colour(lab, name)["new_flows"].as_u64().unwrap()
}

#[test]
fn a_preview_reaches_its_colour_whatever_is_active() {
    let mut lab = Lab::new()
        .unwrap()
        .served_as(&previewed(&default_service()))
        .unwrap();
    let shown = json!([
        "tcp://203.0.113.12:8000",
        "tcp://203.0.113.12:8001",
        "tcp://[2001:db8::12]:8000",
        "tcp://[2001:db8::12]:8001",
        "udp://203.0.113.12:4433",
        "udp://[2001:db8::12]:4433",
    ]);
    let mut told = colour(&lab, "green")["preview"].clone();
    told.as_array_mut().unwrap().sort_by_key(Value::to_string);
    assert_eq!(told, shown);
    let text = lab.tell(&["status"]).unwrap().1;
    assert!(text.contains("preview tcp://203.0.113.11:8000"), "{text}");

    let mut kept = Vec::new();
    for (number, name) in ["blue", "green"].into_iter().enumerate() {
        let flows = new_flows(&lab, name);
        for to in preview(number, 8000)
            .into_iter()
            .chain(preview(number, 8001))
        {
            let mut conversation = open(&lab, to);
            let (answered, peer) = conversation.ask_for_peer().unwrap();
            assert_eq!(answered, name, "{to}");
            assert_eq!(
                peer,
                conversation.local().unwrap(),
                "the server sees its client"
            );
            kept.push((conversation, name));
        }
        for to in preview(number, 4433) {
            let client = lab.enter(Place::Client).unwrap();
            assert_eq!(Datagrams::open(&client, to).unwrap().ask().unwrap(), name);
        }
        assert_eq!(new_flows(&lab, name), flows, "they are no new flows of it");
        assert!(colour(&lab, name)["flows"].as_u64().unwrap() >= 4);
    }
    assert_eq!(who(&lab, listener(8000)), "blue");

    flows_say_by_what_they_came(&lab, &kept[4].0, preview(1, 8000)[0]);
    let to = preview(1, 8001)[1].to_string();
    let stranger = ["tcp", "[2001:db8:c::10]:5", &to];
    let explained = lab.ask(&[&["explain"], &stranger[..]].concat()).unwrap();
    assert_eq!(explained["preview"], "green");
    assert_eq!(explained["packets"][0]["colour"], "green");
    let (_, text, _) = lab.tell(&[&["explain"], &stranger[..]].concat()).unwrap();
    let line = "preview   its flows go to green, whatever the word says\n";
    assert!(text.contains(line), "{text}");

    lab.ask(&["flip", "llm"]).unwrap();
    assert_eq!(who(&lab, listener(8000)), "green");
    let old = new_flows(&lab, "blue");
    for (number, name) in ["blue", "green"].into_iter().enumerate() {
        for to in preview(number, 8000) {
            assert_eq!(who(&lab, to), name, "after the flip: {to}");
        }
    }
    assert_eq!(
        new_flows(&lab, "blue"),
        old,
        "no new flow to the old colour (law 1)"
    );

    // The packet path outlives the daemon (law 3), and the next one adopts it.
    lab.end_daemon(Signal::SIGKILL).unwrap();
    for (conversation, name) in &mut kept {
        assert_eq!(conversation.ask().unwrap(), *name);
    }
    assert_eq!(who(&lab, preview(0, 8000)[0]), "blue");
    lab.start().unwrap();
    for (conversation, name) in &mut kept {
        assert_eq!(
            conversation.ask().unwrap(),
            *name,
            "flows stay over a flip (law 2)"
        );
    }
    assert_eq!(who(&lab, preview(0, 8000)[1]), "blue");
}

/// The flow of a conversation to green's preview at `to`, and one to a listener.
fn flows_say_by_what_they_came(lab: &Lab, conversation: &Conversation, to: SocketAddr) {
    let mut other = open(lab, listener(8000));
    assert_eq!(other.ask().unwrap(), "blue");
    let flows = lab.ask(&["flows", "llm", "--limit", "100"]).unwrap();
    let by = |conversation: &Conversation| {
        let client = conversation.local().unwrap().to_string();
        let flows = flows["flows"].as_array().unwrap().iter();
        let mut of_client = flows.filter(|flow| flow["client"] == client);
        let flow = of_client.next().unwrap();
        json!([flow["listener"], flow["preview"], flow["colour"]])
    };
    assert_eq!(
        by(conversation),
        json!([format!("tcp://{to}"), true, "green"])
    );
    let listener = format!("tcp://{}", listener(8000));
    assert_eq!(by(&other), json!([listener, false, "blue"]));
    let (_, text, _) = lab.tell(&["flows", "llm", "--limit", "100"]).unwrap();
    let line = format!("  by its preview tcp://{to}");
    assert!(text.contains(&line), "{text}");
    assert!(!text.contains(&listener), "{text}");
}

#[test]
fn one_end_of_a_client_talks_to_both() {
    let lab = Lab::new()
        .unwrap()
        .served_as(&previewed(&default_service()))
        .unwrap();
    let client = lab.enter(Place::Client).unwrap();
    // Datagrams of one socket, to the active colour and to both previews.
    for (family, active) in [listener(4433), listener_v6(4433)].into_iter().enumerate() {
        let any = if family == 0 { "0.0.0.0:0" } else { "[::]:0" };
        let socket = in_namespace(&client, || UdpSocket::bind(any)).unwrap();
        socket.set_read_timeout(Some(PATIENCE / 4)).unwrap();
        let green = preview(1, 4433)[family];
        for _ in 0..3 {
            for (to, name) in [(active, "blue"), (green, "green")] {
                socket.send_to(b"who", to).unwrap();
                let mut buffer = [0; 64];
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                assert_eq!((&buffer[..length], from), (name.as_bytes(), to));
            }
        }
    }
    // Connections from one address and port.
    for (family, active) in [listener(8000), listener_v6(8000)].into_iter().enumerate() {
        let mut from = open(&lab, active).local().unwrap();
        from.set_port(40_000);
        let open = |to| Conversation::open_from(&client, from, to).unwrap();
        let (mut first, mut second) = (open(active), open(preview(1, 8000)[family]));
        for _ in 0..3 {
            assert_eq!(first.ask().unwrap(), "blue");
            assert_eq!(second.ask().unwrap(), "green");
        }
    }
}

#[test]
fn with_snat_a_preview_answers_as_itself() {
    let text = previewed(&service("forward = \"snat\"", SERVERS));
    let lab = Lab::new().unwrap().served_as(&text).unwrap();
    for place in [Place::Blue, Place::Green] {
        lab.ip(place, "route del default").unwrap();
        lab.ip(place, "-6 route del default").unwrap();
    }
    let client = lab.enter(Place::Client).unwrap();
    for (number, name) in ["blue", "green"].into_iter().enumerate() {
        for to in preview(number, 8000) {
            let mut conversation = open(&lab, to);
            let (answered, peer) = conversation.ask_for_peer().unwrap();
            assert_eq!(answered, name, "{to}");
            assert_ne!(peer, conversation.local().unwrap());
            assert_eq!(
                conversation.ask().unwrap(),
                name,
                "it is proven, and goes on"
            );
        }
        for to in preview(number, 4433) {
            assert_eq!(Datagrams::open(&client, to).unwrap().ask().unwrap(), name);
        }
    }
    assert_eq!(who(&lab, listener(8000)), "blue");
}

#[test]
fn with_dsr_servers_have_the_previews_addresses() {
    let mut lab = Lab::switched().unwrap();
    lab.beside(Place::Blue, "port3", 20).unwrap();
    lab.beside(Place::Green, "port4", 21).unwrap();
    for (place, [v4, v6]) in [Place::Blue, Place::Green].into_iter().zip(PREVIEWS) {
        for address in [
            format!("{SERVICE}/32"),
            format!("{SERVICE_V6}/128"),
            format!("{v4}/32"),
            format!("{v6}/128"),
        ] {
            lab.ip(place, &format!("addr add {address} dev lo"))
                .unwrap();
        }
        for key in ["arp_ignore=1", "arp_announce=2"] {
            lab.sysctl(place, &format!("net.ipv4.conf.all.{key}"))
                .unwrap();
        }
    }
    let text = previewed(&service("forward = \"dsr\"", SERVERS));
    let lab = lab.served_as(&text).unwrap();
    for (number, name) in ["blue", "green"].into_iter().enumerate() {
        for to in preview(number, 8000) {
            assert_eq!(who(&lab, to), name, "{to}");
        }
    }
}

#[test]
fn a_reload_brings_a_preview_and_takes_it_away() {
    let lab = Lab::serving().unwrap();
    let mut active = open(&lab, listener(8000));
    assert_eq!(active.ask().unwrap(), "blue");
    lab.configure(&previewed(&default_service())).unwrap();
    let reload = lab.ask(&["reload"]).unwrap();
    let changes = reload["changes"].to_string();
    assert!(
        changes.contains("+ llm green preview 203.0.113.12"),
        "{changes}"
    );
    let mut green = open(&lab, preview(1, 8000)[0]);
    assert_eq!(green.ask().unwrap(), "green");
    assert_eq!(active.ask().unwrap(), "blue");

    // Another one for green, none for blue.
    let moved = previewed(&default_service())
        .replace("preview = [\"203.0.113.11\", \"2001:db8::11\"]\n", "")
        .replace("203.0.113.12", "203.0.113.13");
    lab.configure(&moved).unwrap();
    lab.ask(&["reload"]).unwrap();
    let moved = SocketAddr::new("203.0.113.13".parse::<IpAddr>().unwrap(), 8000);
    let mut kept = open(&lab, moved);
    assert_eq!(kept.ask().unwrap(), "green");
    assert_eq!(who(&lab, preview(1, 8000)[1]), "green");
    assert_eq!(colour(&lab, "blue")["preview"], json!([]));
    assert_eq!(active.ask().unwrap(), "blue");

    // The same one, of blue now: who came before stays with green (law 2).
    let other = default_service().replace(
        "[service.llm.blue]\n",
        "[service.llm.blue]\npreview = [\"203.0.113.13\"]\n",
    );
    lab.configure(&other).unwrap();
    lab.ask(&["reload"]).unwrap();
    assert_eq!(who(&lab, moved), "blue");
    assert_eq!(kept.ask().unwrap(), "green");
    assert_eq!(active.ask().unwrap(), "blue");
}
