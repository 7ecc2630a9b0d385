//! Announced addresses: clients find the gateway by ARP and neighbour discovery,
//! hear of a gateway that takes over, and the addresses come, stay and go as the
//! configuration and the daemon's life say.

use std::{
    fs,
    io::ErrorKind,
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    process::Stdio,
};

use bg_tests::{
    conversation::{Conversation, ping},
    kernel::in_namespace,
    lab::{Lab, Place, SERVERS, default_service},
    load::{self, PATIENCE, until},
    wire::Wire,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// In the clients' subnets: nobody routes them.
const V4: &str = "198.51.100.100";
const V6: &str = "2001:db8:c::100";
const OTHER: &str = "198.51.100.101";

/// A service of that name, at these addresses.
fn service(name: &str, addresses: &[&str], keys: &str) -> String {
    let listeners: Vec<String> = addresses
        .iter()
        .map(|address| format!("\"tcp://{}\"", at(address)))
        .collect();
    // Each service has ports of its own at the servers.
    let port = if name == "llm" { 8000 } else { 8001 };
    let backends = |[v4, _, v6]: [&str; 3]| format!("\"{v4}:{port}\", \"[{v6}]:{port}\"");
    let only_v4 = |[v4, ..]: [&str; 3]| format!("\"{v4}:{port}\"");
    let v6 = addresses.iter().any(|address| address.contains(':'));
    let [blue, green] = SERVERS.map(|servers| {
        if v6 {
            backends(servers)
        } else {
            only_v4(servers)
        }
    });
    format!(
        "[service.{name}]\nlisten = [{}]\n{keys}\n[service.{name}.blue]\nbackends = [{blue}]\n\
         [service.{name}.green]\nbackends = [{green}]\n",
        listeners.join(", ")
    )
}

fn at(address: &str) -> SocketAddr {
    SocketAddr::new(address.parse().unwrap(), 8000)
}

fn llm() -> String {
    service("llm", &[V4, V6], "announce = true")
}

/// Both colours' servers and a daemon, in a lab that is there.
fn serve(lab: &mut Lab, service: &str) {
    lab.configure(service).unwrap();
    for (place, colour) in [(Place::Blue, "blue"), (Place::Green, "green")] {
        load::serve(lab.enter(place).unwrap(), colour, &[8000, 8001], &[]).unwrap();
    }
    lab.start().unwrap();
}

fn ask(lab: &Lab, address: &str) -> String {
    load::once(lab.enter(Place::Client).unwrap(), at(address)).unwrap()
}

/// What the kernel has of an address on an interface of a place.
fn held(lab: &Lab, interface: &str, address: &str) -> Vec<Value> {
    let line = format!("ip -j addr show dev {interface}");
    let links: Value = serde_json::from_str(&lab.run(Place::Gateway, &line).unwrap()).unwrap();
    let all = links[0]["addr_info"].as_array().unwrap();
    let is_it = |info: &&Value| info["local"] == address;
    all.iter().filter(is_it).cloned().collect()
}

fn is_held(lab: &Lab, address: &str) -> bool {
    !held(lab, "clients", address).is_empty()
}

/// The MAC address that the client knows for an address.
fn known(lab: &Lab, address: &str) -> Option<String> {
    let line = format!("ip -j neigh show {address} dev eth0");
    let entries: Value = serde_json::from_str(&lab.run(Place::Client, &line).unwrap()).unwrap();
    Some(entries[0]["lladdr"].as_str()?.to_owned())
}

fn mac(lab: &Lab, place: Place, interface: &str) -> String {
    let octets = lab.mac(place, interface).unwrap();
    octets.map(|octet| format!("{octet:02x}")).join(":")
}

/// A daemon that must end by itself: the last line that it logs.
fn refused(lab: &Lab) -> String {
    let output = lab
        .bgswitch(&["run"])
        .unwrap()
        .stdin(Stdio::null())
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(11));
    let text = String::from_utf8(output.stderr).unwrap();
    text.lines().last().unwrap().to_owned()
}

#[test]
fn clients_find_an_announced_address_by_themselves() {
    let mut lab = Lab::new().unwrap();
    serve(&mut lab, &llm());
    let gateway = mac(&lab, Place::Gateway, "clients");
    for address in [V4, V6] {
        assert!(ping(&lab.enter(Place::Client).unwrap(), address.parse().unwrap()).unwrap());
        assert_eq!(ask(&lab, address), "blue");
        assert_eq!(known(&lab, address), Some(gateway.clone()));
    }
    lab.ask(&["flip", "llm"]).unwrap();
    assert_eq!([V4, V6].map(|address| ask(&lab, address)), ["green"; 2]);

    let status = lab.status().unwrap();
    assert_eq!(
        status["services"][0]["announced"],
        json!({"tcp://198.51.100.100:8000": "clients", "tcp://[2001:db8:c::100]:8000": "clients"})
    );
    let (_, text, _) = lab.tell(&["status"]).unwrap();
    assert!(
        text.contains(&format!(
            "\n  announced  {V4} on clients, {V6} on clients\n"
        )),
        "{text}"
    );
}

/// The host does not speak from the address, however the interface's other
/// addresses come and go.
#[test]
fn an_announced_address_is_no_source_of_the_hosts_own() {
    let mut lab = Lab::new().unwrap();
    serve(&mut lab, &llm());
    let [v4] = &held(&lab, "clients", V4)[..] else {
        panic!("{V4} once");
    };
    assert_eq!(
        (&v4["prefixlen"], &v4["scope"]),
        (&json!(32), &json!("host"))
    );
    let [v6] = &held(&lab, "clients", V6)[..] else {
        panic!("{V6} once");
    };
    assert_eq!(v6["prefixlen"], 128);
    for flag in ["nodad", "deprecated", "noprefixroute"] {
        assert_eq!(v6[flag], true, "{v6}");
    }
    assert_eq!(v4["protocol"], v6["protocol"]);

    // The others are made anew: ours is the oldest now.
    let ip = |line: &str| lab.ip(Place::Gateway, line).unwrap();
    for (own, length) in [("198.51.100.1", 24), ("2001:db8:c::1", 64)] {
        ip(&format!("addr del {own}/{length} dev clients"));
        ip(&format!("addr add {own}/{length} dev clients nodad"));
    }
    ip("route add default via 198.51.100.10");
    ip("-6 route add default via 2001:db8:c::10");
    for (to, from) in [
        ("192.0.2.1", "198.51.100.1"),
        ("198.51.100.10", "198.51.100.1"),
        ("2001:db8:ffff::1", "2001:db8:c::1"),
    ] {
        let route = lab
            .run(Place::Gateway, &format!("ip route get {to}"))
            .unwrap();
        assert!(route.contains(&format!(" src {from} ")), "{route}");
    }
}

/// Ports that no listener has are the stack's: it refuses, or serves what
/// listens on all of the host's addresses.
#[test]
fn other_ports_of_an_announced_address_are_the_stacks() {
    let mut lab = Lab::new().unwrap();
    serve(&mut lab, &llm());
    let of_the_host = in_namespace(&lab.enter(Place::Gateway).unwrap(), || {
        TcpListener::bind("[::]:22")
    });
    let of_the_host = of_the_host.unwrap();
    let client = lab.enter(Place::Client).unwrap();
    for address in [V4, V6] {
        let connect = |port| {
            let to = SocketAddr::new(address.parse().unwrap(), port);
            in_namespace(&client, || TcpStream::connect_timeout(&to, PATIENCE))
        };
        connect(22).unwrap();
        let closed = connect(9).unwrap_err();
        assert_eq!(closed.kind(), ErrorKind::ConnectionRefused, "{address}");
        assert_eq!(ask(&lab, address), "blue");
    }
    drop(of_the_host);
}

/// A gateway that takes an address over tells clients whose entry is stale.
#[test]
fn a_takeover_reaches_clients_that_know_the_old_gateway() {
    let mut lab = Lab::switched().unwrap();
    // The old gateway: the switch itself.
    for line in [
        "addr add 198.51.100.100/32 dev switch",
        "addr add 2001:db8:c::100/128 dev switch nodad",
        "addr add 2001:db8:c::200/64 dev switch nodad",
        "route add 198.51.100.0/24 dev switch",
    ] {
        lab.ip(Place::Router, line).unwrap();
    }
    let client = lab.enter(Place::Client).unwrap();
    let old = mac(&lab, Place::Router, "switch");
    for address in [V4, V6] {
        assert!(ping(&client, address.parse().unwrap()).unwrap());
        assert_eq!(known(&lab, address), Some(old.clone()));
    }
    for address in ["198.51.100.100/32", "2001:db8:c::100/128"] {
        let line = format!("addr del {address} dev switch");
        lab.ip(Place::Router, &line).unwrap();
    }

    // Nobody asks: the client only listens.
    serve(&mut lab, &llm());
    let new = mac(&lab, Place::Gateway, "clients");
    for address in [V4, V6] {
        until("the client knows the new gateway", || {
            known(&lab, address) == Some(new.clone())
        });
        assert_eq!(ask(&lab, address), "blue");
    }
}

/// At the start, when the link comes up again, when its MAC address changes, and
/// when a reload adds one; each time more than once.
#[test]
fn an_address_is_announced_whenever_it_may_be_news() {
    let mut lab = Lab::new().unwrap();
    let wire = Wire::open(&lab.enter(Place::Client).unwrap(), "eth0").unwrap();
    let announcements = |address: &str, mac: [u8; 6]| {
        let IpAddr::V4(ip) = address.parse().unwrap() else {
            panic!("an IPv4 address")
        };
        let ip = ip.octets();
        let frame = [
            &[0xff; 6][..],
            &mac,
            &[8, 6, 0, 1, 8, 0, 6, 4, 0, 1],
            &mac,
            &ip,
            &[0; 6],
            &ip,
        ]
        .concat();
        for time in 1..=2 {
            assert!(
                wire.sees(&frame, PATIENCE).unwrap(),
                "{address}, time {time}"
            );
        }
    };
    serve(&mut lab, &llm());
    let mac = lab.mac(Place::Gateway, "clients").unwrap();
    announcements(V4, mac);

    // The far end loses its carrier.
    lab.ip(Place::Client, "link set eth0 down").unwrap();
    until("the daemon noticed", || {
        lab.status().unwrap()["interfaces"][0]["running"] == false
    });
    let (_, text, _) = lab.tell(&["status"]).unwrap();
    assert!(text.contains(", LINK DOWN)"), "{text}");
    lab.ip(Place::Client, "link set eth0 up").unwrap();
    announcements(V4, mac);

    let changed = [2, 0, 0, 0, 0, 0x77];
    lab.ip(Place::Gateway, "link set clients address 02:00:00:00:00:77")
        .unwrap();
    announcements(V4, changed);

    lab.configure(&(llm() + &service("web", &[OTHER], "announce = true")))
        .unwrap();
    lab.ask(&["reload"]).unwrap();
    announcements(OTHER, changed);
}

/// The kernel takes IPv6 addresses from a link that goes down, and all of them
/// from one that is deleted: while the daemon runs, ours come back.
#[test]
fn what_an_interface_loses_is_put_back() {
    let mut lab = Lab::new().unwrap();
    serve(&mut lab, &llm());
    lab.ip(Place::Gateway, "link set clients down").unwrap();
    until("the kernel took it", || !is_held(&lab, V6));
    lab.ip(Place::Gateway, "link set clients up").unwrap();
    lab.ip(
        Place::Gateway,
        "addr replace 2001:db8:c::1/64 dev clients nodad",
    )
    .unwrap();
    until("it is back", || is_held(&lab, V6));
    assert_eq!([V4, V6].map(|address| ask(&lab, address)), ["blue"; 2]);

    lab.remake(Place::Client).unwrap();
    until("both are on the new interface", || {
        is_held(&lab, V4) && is_held(&lab, V6)
    });
    until("the program is, too", || {
        lab.status().unwrap()["interfaces"][0]["mode"] == "native"
    });
    assert_eq!([V4, V6].map(|address| ask(&lab, address)), ["blue"; 2]);
}

/// Law 3: addresses outlive the daemon, too. A later one knows which are ours,
/// `detach` removes those, and an operator's own is never touched.
#[test]
fn addresses_outlive_the_daemon_and_an_operators_own_is_left_alone() {
    let mut lab = Lab::new().unwrap();
    // As long a prefix as ours have: nothing but the mark tells them apart.
    lab.ip(Place::Gateway, &format!("addr add {OTHER}/32 dev clients"))
        .unwrap();
    let own = held(&lab, "clients", OTHER);
    let web = service("web", &[OTHER], "announce = true");
    serve(&mut lab, &(llm() + &web));
    assert_eq!(held(&lab, "clients", OTHER), own, "it is used as it is");
    let both = [V4, V6, OTHER].map(|address| ask(&lab, address));
    assert_eq!(both, ["blue"; 3]);

    for signal in [Signal::SIGKILL, Signal::SIGTERM] {
        let client = lab.enter(Place::Client).unwrap();
        let mut old = Conversation::open(&client, at(V4)).unwrap();
        let before = [V4, V6].map(|address| held(&lab, "clients", address));
        lab.end_daemon(signal).unwrap();
        assert_eq!(
            before,
            [V4, V6].map(|address| held(&lab, "clients", address))
        );
        assert_eq!(old.ask().unwrap(), "blue");
        assert_eq!([V4, V6].map(|address| ask(&lab, address)), ["blue"; 2]);
        lab.start().unwrap();
        assert_eq!(
            before,
            [V4, V6].map(|address| held(&lab, "clients", address))
        );
    }

    // A reload may drop what an operator put there, and take it up again.
    for service in [llm(), llm() + &web] {
        lab.configure(&service).unwrap();
        lab.ask(&["reload"]).unwrap();
        assert_eq!(held(&lab, "clients", OTHER), own);
    }

    // What left the file while nobody ran goes at the next start.
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.configure(&(service("llm", &[V4], "announce = true") + &web))
        .unwrap();
    lab.start().unwrap();
    assert!(is_held(&lab, V4) && !is_held(&lab, V6));
    assert_eq!(held(&lab, "clients", OTHER), own);

    lab.end_daemon(Signal::SIGTERM).unwrap();
    let (code, out, err) = lab.tell(&["detach"]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(
        out.ends_with(&format!("\n{V4} is announced no more\n")),
        "{out}"
    );
    assert!(!is_held(&lab, V4));
    assert_eq!(held(&lab, "clients", OTHER), own);
}

/// An interface that leaves the configuration gives its addresses back.
#[test]
fn an_interface_that_is_let_go_keeps_none_of_our_addresses() {
    let mut lab = Lab::new().unwrap();
    let elsewhere = "10.0.2.100";
    serve(
        &mut lab,
        &(llm() + &service("web", &[elsewhere], "announce = true")),
    );
    assert_eq!(held(&lab, "green", elsewhere).len(), 1);
    lab.end_daemon(Signal::SIGTERM).unwrap();
    lab.configure(&llm()).unwrap();
    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text.replace(", \"green\"]", "]")).unwrap();
    lab.start().unwrap();
    assert!(held(&lab, "green", elsewhere).is_empty());
    assert!(is_held(&lab, V4));
}

#[test]
fn a_reload_adds_and_removes() {
    let mut lab = Lab::new().unwrap();
    serve(&mut lab, &service("llm", &[V4, V6], ""));
    assert!(!is_held(&lab, V4) && !is_held(&lab, V6));
    lab.configure(&llm()).unwrap();
    let reloaded = lab.ask(&["reload"]).unwrap();
    assert_eq!(reloaded["changes"], json!(["+ llm announce"]));
    assert_eq!([V4, V6].map(|address| ask(&lab, address)), ["blue"; 2]);

    lab.configure(&service("web", &[OTHER], "announce = true"))
        .unwrap();
    lab.ask(&["reload"]).unwrap();
    assert!(!is_held(&lab, V4) && !is_held(&lab, V6));
    assert_eq!(ask(&lab, OTHER), "blue");
    lab.configure(&service("web", &[OTHER], "")).unwrap();
    lab.ask(&["reload"]).unwrap();
    assert!(!is_held(&lab, OTHER));
}

/// Law 8: an address that cannot be added undoes what came before it.
#[test]
fn a_reload_whose_address_fails_changes_nothing() {
    let mut lab = Lab::new().unwrap();
    serve(&mut lab, &service("web", &[OTHER], "announce = true"));
    // A server that does not answer gives time between plan and change.
    let silent = llm().replace(
        "\"10.0.1.10:8000\"",
        "\"10.0.1.10:8000\", \"10.0.1.99:8000\"",
    );
    lab.configure(&silent).unwrap();
    let mut command = lab.bgswitch(&["reload"]).unwrap();
    let reload = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("the reload is under way", || {
        let history = lab.ask(&["history"]).unwrap();
        let entries = history["entries"].as_array().unwrap().clone();
        entries.iter().any(|entry| entry["action"] == "reload")
    });
    lab.sysctl(Place::Gateway, "net.ipv6.conf.clients.disable_ipv6=1")
        .unwrap();
    let output = reload.wait_with_output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(11), "{text}");
    let named = format!("bgswitch: {V6} could not be put on clients: ");
    assert!(text.starts_with(&named), "{text}");
    assert!(is_held(&lab, OTHER) && !is_held(&lab, V4));
    let status = lab.status().unwrap();
    let services = status["services"].as_array().unwrap();
    assert_eq!((services.len(), &services[0]["name"]), (1, &json!("web")));
    assert_eq!(ask(&lab, OTHER), "blue");
}

/// The interface is the one whose subnet has the address, or that leads to it;
/// where neither can be told, nothing is guessed.
#[test]
fn an_address_that_belongs_nowhere_is_refused() {
    let mut lab = Lab::new().unwrap();
    let announced = default_service().replacen("listen", "announce = true\nlisten", 1);
    lab.configure(&announced).unwrap();
    let refusal = |cause: &str| {
        format!(
            "bgswitch: service.llm.announce: 203.0.113.10 belongs on none of gateway.interfaces: {cause}. Put it \
             on the clients' interface yourself (`ip addr add 203.0.113.10 dev IF`): there it is left alone, \
             and announced; or set announce = false"
        )
    };
    assert_eq!(
        refused(&lab),
        refusal("no interface has its subnet or a route to it")
    );
    assert!(!lab.bpffs().exists(), "nothing is left behind");

    lab.ip(Place::Gateway, "addr add 203.0.113.10/32 dev lo")
        .unwrap();
    assert_eq!(refused(&lab), refusal("it is on lo already"));
    lab.ip(Place::Gateway, "addr del 203.0.113.10/32 dev lo")
        .unwrap();

    lab.ip(Place::Gateway, "link add other type veth peer name far")
        .unwrap();
    lab.ip(Place::Gateway, "link set other up").unwrap();
    lab.ip(Place::Gateway, "link set far up").unwrap();
    lab.ip(Place::Gateway, "addr add 203.0.113.1/24 dev other")
        .unwrap();
    assert_eq!(refused(&lab), refusal("it leads to other"));
    lab.ip(Place::Gateway, "link del other").unwrap();

    for side in ["clients", "green"] {
        lab.ip(
            Place::Gateway,
            &format!("addr add 203.0.113.1/24 dev {side}"),
        )
        .unwrap();
    }
    let both = refused(&lab);
    let ours = |one, other| refusal(&format!("{one} and {other} both have its subnet"));
    assert!(
        [ours("clients", "green"), ours("green", "clients")].contains(&both),
        "{both}"
    );
    for side in ["clients", "green"] {
        lab.ip(
            Place::Gateway,
            &format!("addr del 203.0.113.1/24 dev {side}"),
        )
        .unwrap();
    }

    lab.ip(Place::Gateway, "route add default via 198.51.100.10")
        .unwrap();
    lab.ip(Place::Gateway, "-6 route add default via 2001:db8:c::10")
        .unwrap();
    serve(&mut lab, &announced);
    assert!(is_held(&lab, "203.0.113.10") && is_held(&lab, "2001:db8::10"));
    assert_eq!(ask(&lab, "203.0.113.10"), "blue");
}
