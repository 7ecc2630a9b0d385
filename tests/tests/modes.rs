//! Forwarding modes: `snat`, with servers that know no way to the clients, and `dsr`,
//! with servers that answer them past the gateway.

use std::{
    collections::BTreeSet,
    io,
    net::{IpAddr, SocketAddr, UdpSocket},
};

use bg_tests::{
    conversation::{Conversation, Datagrams},
    kernel::in_namespace,
    lab::{Lab, Place, SERVERS, SERVICE, SERVICE_V6, listener, listener_v6, service},
};
use nix::sys::signal::Signal;

/// The ports that are lent.
const LENT: std::ops::Range<u16> = 1024..32_768;

fn open(lab: &Lab, to: SocketAddr) -> Conversation {
    Conversation::open(&lab.enter(Place::Client).unwrap(), to).unwrap()
}

/// Opens a connection: the colour that answers, and whom its server sees.
fn ask(lab: &Lab, to: SocketAddr) -> (Conversation, String, SocketAddr) {
    let mut conversation = open(lab, to);
    let (colour, peer) = conversation.ask_for_peer().unwrap();
    (conversation, colour, peer)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

// ---- snat -----------------------------------------------------------------

/// Servers without a route to anybody but the gateway.
fn hidden_clients() -> Lab {
    let lab = Lab::new()
        .unwrap()
        .served_as(&service("forward = \"snat\"", SERVERS))
        .unwrap();
    for place in [Place::Blue, Place::Green] {
        lab.ip(place, "route del default").unwrap();
        lab.ip(place, "-6 route del default").unwrap();
    }
    lab
}

/// The gateway's own addresses, by colour and family.
const OWN: [[&str; 2]; 2] = [["10.0.1.1", "fd00:1::1"], ["10.0.2.1", "fd00:2::1"]];

#[test]
fn with_snat_servers_need_no_way_to_the_clients() {
    let mut lab = hidden_clients();
    assert_eq!(lab.status().unwrap()["services"][0]["forward"], "snat");
    let mut old = Vec::new();
    for (family, to) in [listener(8000), listener_v6(8000)].into_iter().enumerate() {
        let (conversation, colour, peer) = ask(&lab, to);
        assert_eq!((colour.as_str(), peer.ip()), ("blue", ip(OWN[0][family])));
        assert!(LENT.contains(&peer.port()), "{peer}");
        let flows = lab.ask(&["flows", "llm"]).unwrap();
        let client = conversation.local().unwrap().to_string();
        let flows = flows["flows"].as_array().unwrap();
        let flow = flows.iter().find(|flow| flow["client"] == client).unwrap();
        assert_eq!(flow["source_port"], peer.port());
        old.push((conversation, peer));
    }
    lab.ask(&["flip", "llm"]).unwrap();
    for (family, to) in [listener(8000), listener_v6(8000)].into_iter().enumerate() {
        let (_, colour, peer) = ask(&lab, to);
        assert_eq!((colour.as_str(), peer.ip()), ("green", ip(OWN[1][family])));
    }
    for (conversation, peer) in &mut old {
        let now = conversation.ask_for_peer().unwrap();
        assert_eq!(
            now,
            ("blue".to_owned(), *peer),
            "established flows stay (law 2)"
        );
    }
    // The packet path outlives the daemon (law 3), and the next one adopts it.
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert_eq!(ask(&lab, listener(8000)).1, "green");
    lab.start().unwrap();
    for (conversation, peer) in &mut old {
        let now = conversation.ask_for_peer().unwrap();
        assert_eq!(now, ("blue".to_owned(), *peer));
    }
    assert_eq!(ask(&lab, listener_v6(8000)).1, "green");
    // Rollback cuts green's flows, and blue's live on.
    let (mut green, ..) = ask(&lab, listener(8000));
    lab.ask(&["rollback", "llm"]).unwrap();
    let error = green.ask().unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    for (conversation, _) in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
}

#[test]
fn with_snat_no_two_connections_to_a_server_share_a_port() {
    let lab = hidden_clients();
    let mut seen = BTreeSet::new();
    let mut conversations = Vec::new();
    for number in 0..300 {
        let to = if number % 2 == 0 {
            listener(8000)
        } else {
            listener_v6(8001)
        };
        let (conversation, _, peer) = ask(&lab, to);
        let server = {
            let flows = lab.ask(&["flows", "llm", "--limit", "1000"]).unwrap();
            let client = conversation.local().unwrap().to_string();
            let flows = flows["flows"].as_array().unwrap();
            let flow = flows.iter().find(|flow| flow["client"] == client).unwrap();
            flow["backend"].to_string()
        };
        assert!(seen.insert((server, peer)), "{peer} twice");
        conversations.push(conversation);
    }
    for conversation in &mut conversations {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
}

#[test]
fn with_snat_datagrams_come_back() {
    let lab = hidden_clients();
    let client = lab.enter(Place::Client).unwrap();
    let to = [listener(4433), listener_v6(4433)];
    let old = to.map(|to| Datagrams::open(&client, to).unwrap());
    for socket in &old {
        assert_eq!(socket.ask().unwrap(), "blue");
    }
    lab.ask(&["flip", "llm"]).unwrap();
    for (socket, to) in old.iter().zip(to) {
        assert_eq!(socket.ask().unwrap(), "blue", "a drained flow stays");
        assert_eq!(
            Datagrams::open(&client, to).unwrap().ask().unwrap(),
            "green"
        );
    }
}

#[test]
fn a_reload_to_and_from_snat_keeps_established_flows() {
    let lab = Lab::serving().unwrap();
    let (mut nat, _, peer) = ask(&lab, listener(8000));
    assert_eq!(peer, nat.local().unwrap());
    lab.configure(&service("forward = \"snat\"", SERVERS))
        .unwrap();
    lab.ask(&["reload"]).unwrap();
    let (mut snat, _, peer) = ask(&lab, listener(8000));
    assert_eq!(peer.ip(), ip(OWN[0][0]));
    assert_eq!(nat.ask_for_peer().unwrap().1, nat.local().unwrap());
    lab.configure_default().unwrap();
    lab.ask(&["reload"]).unwrap();
    let (mut again, ..) = ask(&lab, listener(8000));
    assert_eq!(again.ask_for_peer().unwrap().1, again.local().unwrap());
    assert_eq!(snat.ask_for_peer().unwrap().1, peer);
    assert_eq!(nat.ask().unwrap(), "blue");
}

#[test]
fn the_gateways_own_connections_to_a_server_are_its_own() {
    let lab = hidden_clients();
    let (_held, ..) = ask(&lab, listener(8000));
    let gateway = lab.enter(Place::Gateway).unwrap();
    for server in [SERVERS[0][0], SERVERS[0][2]] {
        let to = SocketAddr::new(ip(server), 8000);
        for _ in 0..20 {
            let mut own = Conversation::open(&gateway, to).unwrap();
            let (colour, peer) = own.ask_for_peer().unwrap();
            assert_eq!((colour.as_str(), peer), ("blue", own.local().unwrap()));
        }
    }
}

// ---- dsr ------------------------------------------------------------------

/// Servers that have the service's addresses, and a link of their own to the clients.
fn direct() -> Lab {
    let mut lab = Lab::switched().unwrap();
    lab.beside(Place::Blue, "port3", 20).unwrap();
    lab.beside(Place::Green, "port4", 21).unwrap();
    for (place, letter) in [(Place::Blue, b'b'), (Place::Green, b'g')] {
        for address in [format!("{SERVICE}/32"), format!("{SERVICE_V6}/128")] {
            lab.ip(place, &format!("addr add {address} dev lo"))
                .unwrap();
        }
        for key in ["arp_ignore=1", "arp_announce=2"] {
            lab.sysctl(place, &format!("net.ipv4.conf.all.{key}"))
                .unwrap();
        }
        for to in [listener(4433), listener_v6(4433)] {
            let server = lab.enter(place).unwrap();
            let socket = in_namespace(&server, || UdpSocket::bind(to)).unwrap();
            std::thread::spawn(move || {
                let mut buffer = [0; 64];
                while let Ok((_, client)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&[letter], client);
                }
            });
        }
    }
    lab.served_as(&service("forward = \"dsr\"", SERVERS))
        .unwrap()
}

fn counted(lab: &Lab, reason: &str) -> u64 {
    lab.status().unwrap()["reasons"][reason].as_u64().unwrap()
}

#[test]
fn with_dsr_servers_answer_past_the_gateway() {
    let mut lab = direct();
    assert_eq!(lab.status().unwrap()["services"][0]["forward"], "dsr");
    let to = [listener(8000), listener_v6(8000)];
    let mut old = to.map(|to| {
        let (conversation, colour, peer) = ask(&lab, to);
        assert_eq!(
            (colour.as_str(), peer),
            ("blue", conversation.local().unwrap())
        );
        conversation
    });
    lab.ask(&["flip", "llm"]).unwrap();
    for (conversation, to) in old.iter_mut().zip(to) {
        assert_eq!(ask(&lab, to).1, "green");
        assert_eq!(
            conversation.ask().unwrap(),
            "blue",
            "a drained flow stays (law 2)"
        );
    }
    lab.end_daemon(Signal::SIGKILL).unwrap();
    for (conversation, to) in old.iter_mut().zip(to) {
        assert_eq!(ask(&lab, to).1, "green", "{to}: (law 3)");
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    lab.start().unwrap();
    let mut green = to.map(|to| ask(&lab, to).0);
    lab.ask(&["rollback", "llm"]).unwrap();
    for (new, conversation) in green.iter_mut().zip(&mut old) {
        let error = new.ask().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "cut");
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    assert_eq!(counted(&lab, "returned"), 0, "no reply came by here");
    assert_eq!(counted(&lab, "forward_unreachable"), 0);
}

#[test]
fn with_dsr_datagrams_are_answered_past_the_gateway() {
    let lab = direct();
    let client = lab.enter(Place::Client).unwrap();
    let to = [listener(4433), listener_v6(4433)];
    let old = to.map(|to| Datagrams::open(&client, to).unwrap());
    for socket in &old {
        assert_eq!(socket.ask().unwrap(), "b");
    }
    lab.ask(&["flip", "llm"]).unwrap();
    for (socket, to) in old.iter().zip(to) {
        assert_eq!(socket.ask().unwrap(), "b", "a drained flow stays (law 2)");
        assert_eq!(Datagrams::open(&client, to).unwrap().ask().unwrap(), "g");
    }
    assert_eq!(counted(&lab, "returned"), 0);
}

#[test]
fn with_dsr_a_server_behind_a_router_gets_nothing_and_the_log_says_why() {
    let mut lab = Lab::new().unwrap();
    let far = [["10.9.0.10"], ["10.0.2.10"]];
    let text = format!(
        "[service.llm]\nlisten = [\"tcp://{SERVICE}:8000\"]\nforward = \"dsr\"\n\
         [service.llm.blue]\nbackends = [\"{}\"]\n[service.llm.green]\nbackends = [\"{}\"]\n",
        far[0][0], far[1][0]
    );
    lab.ip(Place::Gateway, "route add 10.9.0.0/24 via 10.0.1.10")
        .unwrap();
    lab.configure(&text).unwrap();
    lab.start().unwrap();
    let status = lab.status().unwrap();
    let healthy = |colour: &str| {
        status["services"][0]["colours"][colour]["backends"][0]["healthy"]
            .as_bool()
            .unwrap()
    };
    assert!(!healthy("blue") && healthy("green"));
    let log = std::fs::read_to_string(lab.directory().join("daemon.log")).unwrap();
    assert!(
        log.contains("10.9.0.10 is behind the router 10.0.1.10"),
        "{log}"
    );
}
