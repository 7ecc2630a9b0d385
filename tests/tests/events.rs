//! What happens to a gateway while it works: links go down and come up, interfaces
//! are made again, servers move to other MAC addresses and routes, sizes change.
//! Each under real traffic, which goes on, or goes on again, by itself.

use std::{fs, net::SocketAddr, time::Duration};

use bg_tests::{
    conversation::Conversation,
    lab::{Lab, Place, SERVERS, listener, listener_v6, service},
    load::{self, Load, Reuse, assert_flawless, until},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// One server a colour: where it goes is where everything goes.
fn lab() -> Lab {
    let servers = SERVERS.map(|[v4, _, v6]| [v4, v6]);
    let lab = Lab::new().unwrap();
    // Down and up again, both ends keep their IPv6 addresses.
    for place in [Place::Client, Place::Gateway, Place::Blue, Place::Green] {
        lab.sysctl(place, "net.ipv6.conf.all.keep_addr_on_down=1")
            .unwrap();
    }
    lab.served_as(&service("", servers)).unwrap()
}

fn try_ask(lab: &Lab, to: SocketAddr) -> Option<String> {
    load::once(lab.enter(Place::Client).unwrap(), to).ok()
}

fn ask(lab: &Lab, to: SocketAddr) -> String {
    load::once(lab.enter(Place::Client).unwrap(), to).unwrap()
}

fn reason(lab: &Lab, name: &str) -> u64 {
    lab.status().unwrap()["reasons"][name].as_u64().unwrap()
}

/// Whether each of blue's servers can be reached, as `status` has it.
fn healthy(lab: &Lab) -> Vec<bool> {
    let status = lab.status().unwrap();
    let backends = &status["services"][0]["colours"]["blue"]["backends"];
    let is_healthy = |backend: &Value| backend["healthy"].as_bool().unwrap();
    backends
        .as_array()
        .unwrap()
        .iter()
        .map(is_healthy)
        .collect()
}

fn log(lab: &Lab) -> String {
    fs::read_to_string(lab.directory().join("daemon.log")).unwrap()
}

/// State and MAC address of a server's entry in the gateway's neighbour table.
fn neighbour(lab: &Lab, server: &str) -> (String, Option<String>) {
    let line = format!("ip -j neigh show {server}");
    let json: Value = serde_json::from_str(&lab.run(Place::Gateway, &line).unwrap()).unwrap();
    let state = json[0]["state"][0].as_str().unwrap_or("NONE");
    (
        state.to_owned(),
        json[0]["lladdr"].as_str().map(str::to_owned),
    )
}

/// Entries of blue's neighbours age in a second, and are asked for at once.
fn age_fast(lab: &Lab) {
    for family in ["ipv4", "ipv6"] {
        for setting in [
            "base_reachable_time_ms=1000",
            "delay_first_probe_time=1",
            "retrans_time_ms=100",
        ] {
            lab.sysctl(
                Place::Gateway,
                &format!("net.{family}.neigh.blue.{setting}"),
            )
            .unwrap();
        }
    }
}

const BOTH: [fn(u16) -> SocketAddr; 2] = [listener, listener_v6];

#[test]
fn a_link_that_goes_down_and_comes_up_carries_its_flows_again() {
    let lab = lab();
    let client = lab.enter(Place::Client).unwrap();
    for (side, place, index) in [("blue", Place::Blue, 1), ("clients", Place::Client, 0)] {
        let mut old = BOTH.map(|to| Conversation::open(&client, to(8000)).unwrap());
        for conversation in &mut old {
            assert_eq!(conversation.ask().unwrap(), "blue");
        }
        // By the gateway's own hand, then by the far end's.
        for (place, link) in [(Place::Gateway, side), (place, "eth0")] {
            let running = || lab.status().unwrap()["interfaces"][index]["running"].clone();
            lab.ip(place, &format!("link set {link} down")).unwrap();
            until("the daemon noticed", || running() == false);
            lab.ip(place, &format!("link set {link} up")).unwrap();
            if place != Place::Gateway {
                lab.route(place).unwrap();
            }
            for (to, conversation) in BOTH.iter().zip(&mut old) {
                until("new flows pass", || try_ask(&lab, to(8001)).is_some());
                assert_eq!(conversation.ask().unwrap(), "blue");
            }
            until("status says so", || running() == true);
        }
    }
}

#[test]
fn an_interface_that_is_deleted_and_made_again_is_attached_again() {
    let mut lab = lab();
    for (place, index, name) in [(Place::Blue, 1, "blue"), (Place::Client, 0, "clients")] {
        let before = lab.status().unwrap()["interfaces"][index].clone();
        assert_eq!(
            (&before["name"], &before["mode"]),
            (&name.into(), &"native".into())
        );
        lab.ip(Place::Gateway, &format!("link del {name}")).unwrap();
        until("status says that it is gone", || {
            lab.status().unwrap()["interfaces"][index]["mode"] == "absent"
        });
        let (_, text, _) = lab.tell(&["status"]).unwrap();
        let absent = format!("{name} (ABSENT: nothing is forwarded there)");
        assert!(text.contains(&absent), "{text}");
        let gone = format!("interface {name} is gone: nothing is forwarded there");
        assert!(log(&lab).contains(&gone), "{}", log(&lab));

        lab.make_again(place).unwrap();
        until("it is attached again", || {
            let interface = &lab.status().unwrap()["interfaces"][index];
            interface["mode"] == "native" && interface["program_id"] != 0
        });
        let again = format!("interface {name} came again: it runs XDP in native mode");
        assert!(log(&lab).contains(&again), "{}", log(&lab));
        for to in BOTH {
            until("flows pass", || try_ask(&lab, to(8000)).is_some());
        }
    }
}

/// A server that tells its neighbours of its new MAC address loses nothing.
#[test]
fn a_server_with_a_new_mac_address_is_found() {
    let lab = lab();
    let client = || lab.enter(Place::Client).unwrap();
    let mut old = Conversation::open(&client(), listener(8000)).unwrap();
    assert_eq!(old.ask().unwrap(), "blue");
    for key in [
        "ipv4.conf.eth0.arp_notify=1",
        "ipv6.conf.eth0.ndisc_notify=1",
    ] {
        lab.sysctl(Place::Blue, &format!("net.{key}")).unwrap();
    }
    lab.ip(Place::Blue, "link set eth0 address 02:00:00:00:00:55")
        .unwrap();
    for to in BOTH {
        until("new flows find it", || try_ask(&lab, to(8000)).is_some());
    }
    assert_eq!(old.ask().unwrap(), "blue");
}

/// One that says nothing is found when its entry has aged: XDP carries packets
/// past the stack, so the daemon has it confirmed.
#[test]
fn a_server_whose_mac_address_changes_in_silence_is_found() {
    let lab = lab();
    age_fast(&lab);
    assert_eq!(ask(&lab, listener(8000)), "blue");
    lab.ip(Place::Blue, "link set eth0 address 02:00:00:00:00:56")
        .unwrap();
    let moved = || neighbour(&lab, SERVERS[0][0]).1.as_deref() == Some("02:00:00:00:00:56");
    until("the kernel has found it", moved);
    until("new flows find it", || {
        try_ask(&lab, listener(8000)).is_some()
    });
}

#[test]
fn a_servers_neighbour_entry_is_kept_alive_under_traffic() {
    let lab = lab();
    age_fast(&lab);
    let client = lab.enter(Place::Client).unwrap();
    let by_stack = reason(&lab, "forwarded_by_stack");
    let clients = vec![
        (listener(8000), Reuse::KeepAlive),
        (listener_v6(8000), Reuse::Never),
    ];
    let load = Load::start(client, clients, Duration::from_millis(5));
    for server in [SERVERS[0][0], SERVERS[0][2]] {
        for _ in 0..3 {
            until("it ages", || neighbour(&lab, server).0 != "REACHABLE");
            until("it is confirmed", || {
                neighbour(&lab, server).0 == "REACHABLE"
            });
        }
    }
    assert_flawless(&load.finish().unwrap());
    assert_eq!(reason(&lab, "forwarded_by_stack"), by_stack);
    assert_eq!(healthy(&lab), [true, true]);
}

/// A server that does not answer any more loses its next hop, is named, and is
/// back when it answers.
#[test]
fn a_server_that_does_not_answer_is_named_until_it_does() {
    let lab = lab();
    lab.forward(Place::Gateway).unwrap();
    age_fast(&lab);
    assert_eq!(healthy(&lab), [true, true]);
    lab.ip(Place::Blue, "addr del 10.0.1.10/24 dev eth0")
        .unwrap();
    until("its next hop is gone", || healthy(&lab) == [false, true]);
    assert_eq!(ask(&lab, listener_v6(8000)), "blue");
    let (_, text, _) = lab.tell(&["status"]).unwrap();
    assert!(text.contains("10.0.1.10"), "{text}");
    assert!(text.contains("no next hop known"), "{text}");

    // Its packets are the stack's, which asks for it, and sends what waits then.
    let before = reason(&lab, "forwarded_by_stack");
    let client = lab.enter(Place::Client).unwrap();
    let waiting = std::thread::spawn(move || Conversation::open(&client, listener(8000)));
    until("the stack has a packet", || {
        reason(&lab, "forwarded_by_stack") > before
    });
    lab.ip(Place::Blue, "addr add 10.0.1.10/24 dev eth0")
        .unwrap();
    lab.route(Place::Blue).unwrap();
    assert_eq!(waiting.join().unwrap().unwrap().ask().unwrap(), "blue");
    until("its next hop is back", || healthy(&lab) == [true, true]);
    let by_stack = reason(&lab, "forwarded_by_stack");
    assert_eq!(ask(&lab, listener(8000)), "blue");
    assert_eq!(reason(&lab, "forwarded_by_stack"), by_stack);
}

/// Nobody waits for a daemon: where no next hop is known, the stack resolves it,
/// and the packet that made it do so is not lost.
#[test]
fn a_neighbour_that_is_not_known_yet_is_the_stacks_to_find() {
    let mut lab = lab();
    lab.forward(Place::Gateway).unwrap();
    age_fast(&lab);
    lab.ip(Place::Blue, "addr del 10.0.1.10/24 dev eth0")
        .unwrap();
    until("its next hop is gone", || !healthy(&lab)[0]);
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.ip(Place::Blue, "addr add 10.0.1.10/24 dev eth0")
        .unwrap();
    lab.route(Place::Blue).unwrap();
    lab.ip(Place::Gateway, "neigh flush dev blue").unwrap();
    let client = lab.enter(Place::Client).unwrap();
    let mut conversations = [(); 3].map(|()| Conversation::open(&client, listener(8000)).unwrap());
    for conversation in &mut conversations {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    lab.start().unwrap();
    assert!(reason(&lab, "forwarded_by_stack") >= 6);
}

/// A server moves: its packets take the new way, those of old flows, too.
#[test]
fn a_route_that_changes_is_taken() {
    let lab = lab();
    assert_eq!(ask(&lab, listener(8000)), "blue");
    // Green's host has blue's address now.
    lab.ip(Place::Green, "addr add 10.0.1.10/32 dev eth0")
        .unwrap();
    lab.ip(
        Place::Gateway,
        "route add 10.0.1.10/32 via 10.0.2.10 dev green",
    )
    .unwrap();
    until("packets go there", || {
        try_ask(&lab, listener(8000)).as_deref() == Some("green")
    });
    lab.ip(Place::Gateway, "route del 10.0.1.10/32").unwrap();
    until("and come back", || {
        try_ask(&lab, listener(8000)).as_deref() == Some("blue")
    });
    // Nowhere at all: the packets are the stack's, and status says so.
    lab.ip(Place::Gateway, "route add unreachable 10.0.1.10/32")
        .unwrap();
    until("it cannot be reached", || !healthy(&lab)[0]);
    lab.ip(Place::Gateway, "route del unreachable 10.0.1.10/32")
        .unwrap();
    until("and can again", || healthy(&lab)[0]);
    assert_eq!(ask(&lab, listener(8000)), "blue");
}
