//! Canaries: a share of new flows, by the client's address, goes to the standby; no
//! established flow moves (law 2), what is said of it is true (law 10), and taking
//! it back is never gated and needs no daemon (law 5).

use std::{
    collections::BTreeMap,
    fs,
    io::ErrorKind,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread::sleep,
    time::{Duration, Instant},
};

use bg_tests::{
    conversation::Conversation,
    lab::{Lab, Place, default_service, listener, listener_v6},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// Clients of each address family.
const CLIENTS: u32 = 600;

/// Waits for what will be so, however slow the machine is.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(2);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(20));
    }
}

/// A lab whose client has two networks of addresses more.
fn lab() -> Lab {
    let lab = Lab::serving().unwrap();
    lab.sysctl(Place::Client, "net.ipv6.ip_nonlocal_bind=1")
        .unwrap();
    for (network, via) in [
        ("198.18.0.0/16", "198.51.100.10"),
        ("2001:db8:d::/64", "2001:db8:c::10"),
    ] {
        let family = if via.contains(':') { "-6" } else { "-4" };
        let ip = |place, line: &str| lab.ip(place, &format!("{family} {line}")).unwrap();
        ip(Place::Client, &format!("route add local {network} dev lo"));
        ip(
            Place::Gateway,
            &format!("route add {network} via {via} dev clients"),
        );
    }
    lab
}

/// Addresses of both families, in order.
fn clients(count: u32) -> impl Iterator<Item = IpAddr> {
    let v4 = (0..count).map(|n| IpAddr::V4(Ipv4Addr::from(0xc612_0001 + n)));
    let first = 0x2001_0db8_000d_0000_0000_0000_0000_0001_u128;
    let v6 = (0..count).map(move |n| IpAddr::V6(Ipv6Addr::from(first + u128::from(n))));
    v4.chain(v6)
}

fn open(lab: &Lab, from: IpAddr, port: u16) -> Conversation {
    let to = match from {
        IpAddr::V4(_) => listener(port),
        IpAddr::V6(_) => listener_v6(port),
    };
    let namespace = lab.enter(Place::Client).unwrap();
    Conversation::open_from(&namespace, SocketAddr::new(from, 0), to).unwrap()
}

/// What a new connection from each client gets.
fn colours(lab: &Lab, count: u32, port: u16) -> BTreeMap<IpAddr, String> {
    clients(count)
        .map(|from| {
            let mut conversation = open(lab, from, port);
            let colour = conversation.ask().unwrap();
            conversation.reset().unwrap();
            (from, colour)
        })
        .collect()
}

fn green(colours: &BTreeMap<IpAddr, String>, v6: bool) -> u32 {
    let of_family = colours.iter().filter(|(from, _)| from.is_ipv6() == v6);
    of_family.filter(|(_, colour)| *colour == "green").count() as u32
}

/// Connections from many clients, by their colour: blue, green.
fn open_many(lab: &Lab, count: u32) -> [Vec<Conversation>; 2] {
    let mut flows = [Vec::new(), Vec::new()];
    for from in clients(count) {
        let mut conversation = open(lab, from, 8000);
        let colour = conversation.ask().unwrap();
        flows[usize::from(colour == "green")].push(conversation);
    }
    assert!(flows.iter().all(|flows| flows.len() > 2), "{flows:?}");
    flows
}

fn live_on(conversations: &mut [Conversation], colour: &str) {
    for conversation in conversations {
        assert_eq!(conversation.ask().unwrap(), colour);
    }
}

fn are_reset(conversations: &mut [Conversation]) {
    for conversation in conversations {
        let error = conversation.ask().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    }
}

fn service(lab: &Lab) -> Value {
    lab.status().unwrap()["services"][0].clone()
}

/// The share is what was asked for, for both families; a client gets the same colour
/// each time and on every port, also on the larger share, and none is moved.
#[test]
fn a_share_of_the_clients_goes_to_the_standby_and_stays_there() {
    let lab = lab();
    let set = lab
        .ask(&["canary", "llm", "25", "-m", "a quarter"])
        .unwrap();
    assert_eq!(
        (&set["canary_percent"], &set["share"], &set["generation"]),
        (&25.0.into(), &16_384.into(), &0.into())
    );
    let quarter = colours(&lab, CLIENTS, 8000);
    // Five standard deviations of a binomial distribution.
    let spread = 5.0 * (f64::from(CLIENTS) * 0.25 * 0.75).sqrt();
    for v6 in [false, true] {
        let off = f64::from(green(&quarter, v6)) - f64::from(CLIENTS) * 0.25;
        assert!(off.abs() < spread, "IPv6 {v6}: {off} clients off");
    }
    let again = colours(&lab, CLIENTS / 2, 8001);
    for (from, colour) in &again {
        assert_eq!(colour, &quarter[from], "{from}");
    }

    let [mut blue, mut old_green] = open_many(&lab, 24);
    lab.ask(&["canary", "llm", "60"]).unwrap();
    let more = colours(&lab, CLIENTS / 2, 8000);
    let stay = |from: &IpAddr| quarter[from] == "blue" || more[from] == "green";
    assert!(more.keys().all(stay));
    assert!(green(&more, false) > green(&again, false));
    live_on(&mut blue, "blue");
    live_on(&mut old_green, "green");

    lab.ask(&["canary", "llm", "0"]).unwrap();
    let none = colours(&lab, CLIENTS / 10, 8000);
    assert!(none.values().all(|colour| colour == "blue"));
    live_on(&mut blue, "blue");
    live_on(&mut old_green, "green");
}

/// Law 10: what is told of a canary is what the word says.
#[test]
fn a_canary_is_told_as_it_is() {
    let lab = Lab::serving().unwrap();
    let (code, text, _) = lab.tell(&["canary", "llm", "5", "--dry-run"]).unwrap();
    assert_eq!(code, 0);
    assert_eq!(
        text,
        "llm  canary on green 0 % -> 5.0003 %   generation 0\n\
         new flows of 3277 in 65536 client addresses go to green, the rest to blue\n\
         nothing was changed (dry run)\n"
    );
    assert_eq!(service(&lab)["canary_percent"], 0.0);
    let text = lab
        .tell(&["canary", "llm", "0.1%", "-m", "first"])
        .unwrap()
        .1;
    assert!(text.starts_with("llm  canary on green 0 % -> 0.1007 %   generation 0   stored in "));
    assert!(text.ends_with("\ngo over: bgswitch flip llm   undo: bgswitch rollback llm\n"));
    let text = lab.tell(&["status", "llm"]).unwrap().1;
    let line = "llm  STEADY  new flows: blue 99.8993 %, green 0.1007 % (canary)  generation 0\n";
    assert!(text.starts_with(line), "{text}");
    let all = lab.ask(&["canary", "llm", "100"]).unwrap();
    assert_eq!(all["share"], 65_535);
    assert_eq!(service(&lab)["canary_percent"], all["canary_percent"]);
    assert_eq!(service(&lab)["active"], "blue");
    let text = lab.tell(&["canary", "llm", "0"]).unwrap().1;
    assert!(
        text.ends_with("\nall new flows go to blue; none is on green\n"),
        "{text}"
    );

    let history = lab.ask(&["history"]).unwrap();
    let first: Vec<_> = history["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["why"] == "first")
        .collect();
    let phases: Vec<_> = first.iter().map(|entry| &entry["phase"]).collect();
    assert_eq!(phases, ["intent", "result"]);
    for entry in first {
        assert_eq!(
            (&entry["action"], &entry["actor"], &entry["detail"]),
            (
                &"canary".into(),
                &"root(0)".into(),
                &"green's share of new flows 0.0000 % -> 0.1007 %".into()
            )
        );
    }
}

/// A canary changes no word that it should not, and says why.
#[test]
fn a_canary_that_is_refused_changes_nothing() {
    let mut lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    lab.ask(&["canary", "llm", "10", "--if-generation", "1"])
        .unwrap();
    for (words, code, part) in [
        (
            vec!["llm", "20", "--if-generation", "0"],
            5,
            "at generation 1, not 0",
        ),
        (vec!["llm", "101"], 2, "no percentage from 0 to 100"),
        (vec!["llm", "few"], 2, "no percentage from 0 to 100"),
        (vec!["llm", "0.0001"], 2, "the smallest share"),
        (vec!["lmm", "5"], 2, "there is no service `lmm`"),
    ] {
        let (got, out, err) = lab.tell(&[&["canary"], &words[..]].concat()).unwrap();
        assert_eq!((got, out.as_str()), (code, ""), "{words:?}: {err}");
        assert!(err.contains(part), "{err}");
    }
    // More for a standby that cannot be reached is refused; less never is.
    lab.ip(Place::Gateway, "link set blue down").unwrap();
    until("blue is not reachable", || {
        let backends = service(&lab)["colours"]["blue"]["backends"].clone();
        let mut backends = backends.as_array().unwrap().iter();
        backends.all(|backend| backend["healthy"] == false)
    });
    let (code, _, err) = lab.tell(&["canary", "llm", "20"]).unwrap();
    assert_eq!(code, 8, "{err}");
    assert!(
        err.contains("10.0.1.10") && err.contains("--force"),
        "{err}"
    );
    let ten = service(&lab)["canary_percent"].as_f64().unwrap();
    assert!((ten - 10.0).abs() < 0.001, "{ten}");
    lab.ask(&["canary", "llm", "20", "--force"]).unwrap();
    lab.ask(&["canary", "llm", "5"]).unwrap();
    lab.ask(&["canary", "llm", "0"]).unwrap();
    lab.end_daemon(Signal::SIGTERM).unwrap();
    assert_eq!(lab.tell(&["canary", "llm", "5"]).unwrap().0, 3);
}

/// Laws 2 and 5: a rollback while a canary runs takes it back: no new flow goes to
/// the standby, the flows there are reset, and no other is; it never flips. With
/// the daemon, and without it.
#[test]
fn a_rollback_takes_a_canary_back_and_cuts_its_flows() {
    let mut lab = lab();
    for generation in [1, 2] {
        lab.ask(&["canary", "llm", "50"]).unwrap();
        let [mut blue, mut green] = open_many(&lab, 16);
        if generation == 2 {
            lab.end_daemon(Signal::SIGKILL).unwrap();
        }
        let back = lab
            .ask(&["rollback", "llm", "-m", "wrong answers"])
            .unwrap();
        assert_eq!(
            (
                &back["from"],
                &back["to"],
                &back["generation"],
                &back["mode"]
            ),
            (
                &"green".into(),
                &"blue".into(),
                &generation.into(),
                &"cut".into()
            )
        );
        assert_eq!(
            (&back["canary_rollback"], &back["canary_percent_before"]),
            (&true.into(), &50.0.into())
        );
        if generation == 1 {
            assert_eq!(back["old_flows"], green.len());
        }
        are_reset(&mut green);
        live_on(&mut blue, "blue");
        let now = colours(&lab, 16, 8000);
        assert!(now.values().all(|colour| colour == "blue"));
    }
    lab.start().unwrap();
    let service = service(&lab);
    assert_eq!(
        (
            &service["active"],
            &service["generation"],
            &service["canary_percent"]
        ),
        (&"blue".into(), &2.into(), &0.0.into())
    );
    let history = lab.ask(&["history"]).unwrap();
    let entries = history["entries"].as_array().unwrap();
    let rollbacks = entries.iter().filter(|entry| entry["action"] == "rollback");
    assert_eq!(rollbacks.count(), 4);
    assert!(
        !entries
            .iter()
            .any(|entry| entry["action"] == "changed_outside")
    );
}

/// Law 2: a flip to the canary's colour ends the canary; its flows are the active
/// colour's, and the others drain.
#[test]
fn a_flip_makes_the_canary_the_release() {
    let lab = lab();
    lab.ask(&["canary", "llm", "50"]).unwrap();
    let [mut blue, mut green] = open_many(&lab, 16);
    let flipped = lab.ask(&["flip", "llm", "--mode", "cut"]).unwrap();
    assert_eq!(
        (
            &flipped["to"],
            &flipped["canary_rollback"],
            &flipped["canary_percent_before"]
        ),
        (&"green".into(), &false.into(), &50.0.into())
    );
    assert_eq!(service(&lab)["canary_percent"], 0.0);
    are_reset(&mut blue);
    live_on(&mut green, "green");
    let now = colours(&lab, 16, 8000);
    assert!(now.values().all(|colour| colour == "green"));
}

/// Law 2: a canary leaves a drain alone, and the drain's end the canary: the old
/// flows of the standby are reset, those that were born of the canary live.
#[test]
fn a_canary_and_a_drain_do_not_touch_each_other() {
    let lab = lab();
    lab.configure(&bg_tests::lab::service(
        "reset_over = \"0s\"",
        bg_tests::lab::SERVERS,
    ))
    .unwrap();
    lab.ask(&["reload"]).unwrap();
    let mut old: Vec<_> = clients(6).map(|from| open(&lab, from, 8000)).collect();
    live_on(&mut old, "blue");
    let flipped = lab.ask(&["flip", "llm", "--drain", "6s"]).unwrap();
    lab.ask(&["canary", "llm", "50"]).unwrap();
    let colours = |lab: &Lab| service(lab)["colours"].clone();
    assert_eq!(
        colours(&lab)["blue"]["draining_until"],
        flipped["draining_until"]
    );
    let [mut canary, mut green] = open_many(&lab, 16);
    until("the drain is over", || {
        colours(&lab)["blue"]["drain_end"].is_null()
    });
    are_reset(&mut old);
    live_on(&mut canary, "blue");
    live_on(&mut green, "green");
    let service = service(&lab);
    let blue = &service["colours"]["blue"];
    assert_eq!(service["canary_percent"], 50.0);
    assert_eq!(
        (
            &blue["flows"],
            &blue["draining_flows"],
            &blue["resetting_flows"]
        ),
        (&canary.len().into(), &0.into(), &0.into())
    );
}

/// Laws 4 and 8: a reload and a restart leave a canary as it is.
#[test]
fn a_canary_outlives_a_reload_and_the_daemon() {
    let mut lab = lab();
    lab.ask(&["canary", "llm", "12.5"]).unwrap();
    let before = colours(&lab, 40, 8000);
    lab.configure(&default_service().replace("model@2", "model@3"))
        .unwrap();
    lab.ask(&["reload"]).unwrap();
    assert_eq!(service(&lab)["canary_percent"], 12.5);
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert_eq!(colours(&lab, 40, 8000), before);
    fs::write(lab.directory().join("state/state.json"), "\0garbage").unwrap();
    lab.start().unwrap();
    assert_eq!(service(&lab)["canary_percent"], 12.5);
    assert_eq!(colours(&lab, 40, 8001), before);
}
