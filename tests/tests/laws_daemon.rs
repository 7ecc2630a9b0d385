//! The daemon comes and goes, and its file changes: forwarding outlives it (law
//! 3), the kernel's word wins (law 4), a rollback needs nobody (law 5), and a
//! configuration is applied whole or not at all (law 8).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr},
    os::unix::net::{UnixListener, UnixStream},
    process::Stdio,
    sync::Arc,
    thread::{JoinHandle, sleep},
    time::{Duration, Instant},
};

use aya::{
    maps::{Array, Map, MapData, MapInfo},
    programs::links::{FdLink, PinnedLink},
};
use bg_common::{
    abi::{LAYOUT, map},
    service::{Backend, Colour},
};
use bg_tests::{
    conversation::{Conversation, Datagrams},
    flows::flow_of,
    lab::{Lab, Place, SERVERS, binary, default_service, listener, listener_v6, service},
    load::{self, Answer, Load, PATIENCE, assert_flawless, mix},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// TCP over both families, and UDP, where nobody sends a lost packet again.
struct Traffic {
    tcp: Load,
    udp: JoinHandle<usize>,
    /// The UDP clients end when it is dropped.
    running: Arc<()>,
}

impl Traffic {
    fn start(lab: &Lab) -> Self {
        let client = || lab.enter(Place::Client).unwrap();
        let running = Arc::new(());
        let alive = Arc::downgrade(&running);
        let flows =
            [listener(4433), listener_v6(4433)].map(|to| Datagrams::open(&client(), to).unwrap());
        let traffic = Self {
            tcp: Load::start(client(), mix(24), Duration::from_millis(3)),
            udp: std::thread::spawn(move || {
                let mut asked = 0;
                while alive.strong_count() > 0 {
                    for flow in &flows {
                        flow.ask().expect("a datagram was lost");
                        asked += 1;
                    }
                    sleep(Duration::from_micros(500));
                }
                asked
            }),
            running,
        };
        traffic.goes_on();
        traffic
    }

    /// Waits for answers to requests that are made from now on.
    fn goes_on(&self) {
        self.tcp.advance(240);
    }

    /// Ends, and asserts that nothing was lost.
    fn end(self) -> Vec<Answer> {
        drop(self.running);
        let answers = self.tcp.finish().unwrap();
        assert_flawless(&answers);
        assert!(self.udp.join().unwrap() > 0);
        answers
    }
}

/// Kernel ids of what is pinned.
#[derive(Debug, PartialEq, Eq)]
struct Pinned {
    links: BTreeMap<String, u32>,
    maps: BTreeMap<&'static str, u32>,
    programs: BTreeSet<u32>,
}

impl Pinned {
    fn of(lab: &Lab) -> Self {
        let root = lab.bpffs().join(format!("v{LAYOUT}"));
        let (mut links, mut programs) = (BTreeMap::new(), BTreeSet::new());
        for entry in fs::read_dir(root.join("links")).unwrap() {
            let path = entry.unwrap().path();
            let link = FdLink::from(PinnedLink::from_pin(&path).unwrap());
            let info = link.info().unwrap();
            programs.insert(info.program_id());
            let name = path.file_name().unwrap().to_str().unwrap();
            links.insert(name.to_owned(), info.id());
        }
        let id = |name: &str| {
            MapInfo::from_pin(root.join("maps").join(name))
                .unwrap()
                .id()
        };
        Self {
            links,
            maps: map::ALL.iter().map(|name| (*name, id(name))).collect(),
            programs,
        }
    }
}

fn summary(lab: &Lab) -> (Value, Value) {
    let status = lab.status().unwrap();
    let service = &status["services"][0];
    (service["active"].clone(), service["generation"].clone())
}

fn ask(lab: &Lab, to: SocketAddr) -> String {
    load::once(lab.enter(Place::Client).unwrap(), to).unwrap()
}

/// The daemon ends by `signal` and starts again, from `again` if given, all of
/// it under load.
fn outlives(signal: Signal, again: Option<&str>) {
    let mut lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let traffic = Traffic::start(&lab);
    let before = Pinned::of(&lab);
    assert_eq!(before.links.len(), 3);

    lab.end_daemon(signal).unwrap();
    traffic.goes_on();
    assert_eq!(Pinned::of(&lab), before);
    assert_eq!(lab.tell(&["status"]).unwrap().0, 3);
    for to in [listener(8000), listener(8001), listener_v6(8000)] {
        assert_eq!(ask(&lab, to), "green");
    }

    if let Some(name) = again {
        let copy = lab.directory().join(name);
        fs::copy(binary().unwrap(), &copy).unwrap();
        lab.start_binary(&copy).unwrap();
        let exe = fs::read_link(format!("/proc/{}/exe", lab.daemon_pid().unwrap()));
        assert_eq!(exe.unwrap(), copy);
    } else {
        lab.start().unwrap();
    }
    traffic.goes_on();
    let after = Pinned::of(&lab);
    assert_eq!((&after.links, &after.maps), (&before.links, &before.maps));
    assert!(after.programs.is_disjoint(&before.programs), "{after:?}");
    assert_eq!(summary(&lab), ("green".into(), 1.into()));
    let answers = traffic.end();
    assert!(answers.iter().all(|a| a.result.as_deref() == Ok("green")));

    lab.ask(&["flip", "llm", "--if-generation", "1"]).unwrap();
    assert_eq!(ask(&lab, listener(8000)), "blue");
}

/// Law 3: kill -9 under load loses nothing; the next daemon adopts what the
/// kernel does.
#[test]
fn forwarding_outlives_a_killed_daemon() {
    outlives(Signal::SIGKILL, None);
}

/// Law 3: an upgrade under load loses nothing: it stops, another binary starts,
/// and its program takes the old one's place behind the same links.
#[test]
fn forwarding_outlives_an_upgrade() {
    outlives(Signal::SIGTERM, Some("bgswitch-next"));
}

/// Law 3: a second daemon is refused, and changes nothing.
#[test]
fn a_second_daemon_is_refused() {
    let lab = Lab::serving().unwrap();
    let before = Pinned::of(&lab);
    let mut second = lab.bgswitch(&["run"]).unwrap();
    let mut second = second.stderr(Stdio::null()).spawn().unwrap();
    let begun = Instant::now();
    let code = loop {
        if let Some(status) = second.try_wait().unwrap() {
            break status.code();
        }
        if begun.elapsed() > PATIENCE {
            second.kill().unwrap();
        }
        sleep(Duration::from_millis(20));
    };
    assert_eq!(code, Some(11));
    assert_eq!(Pinned::of(&lab), before);
    assert_eq!(ask(&lab, listener(8000)), "blue");
    lab.ask(&["flip", "llm"]).unwrap();
}

/// Law 4: what was stored while the daemon was away is believed and journalled,
/// whatever the state file says: the truth of before, lies, or nothing a
/// machine can read.
#[test]
fn the_kernels_word_wins_over_the_state_file() {
    let mut lab = Lab::serving().unwrap();
    let file = lab.directory().join("state/state.json");
    lab.ask(&["flip", "llm"]).unwrap();
    let true_before = fs::read_to_string(&file).unwrap();
    let mut lies: Value = serde_json::from_str(&true_before).unwrap();
    lies["services"]["llm"]["word"] = (7u64 << 32 | 1).into();
    lies["services"]["llm"]["drains"] = json!([{"generation": 7, "until_ms": 1}]);
    let lies = lies.to_string();
    for (n, state) in [true_before.as_str(), &lies, "\0garbage {"]
        .into_iter()
        .enumerate()
    {
        let stored = n as u64 + 2;
        lab.end_daemon(Signal::SIGKILL).unwrap();
        let (words, id) = lab.words().unwrap();
        let word = words.word(id);
        let other = word.active().other();
        words.store(id, word, word.flipped(other, false)).unwrap();
        assert_eq!(ask(&lab, listener(8000)), other.as_str());
        fs::write(&file, state).unwrap();
        lab.start().unwrap();
        assert_eq!(
            summary(&lab),
            (other.as_str().into(), stored.into()),
            "{state}"
        );
        assert_eq!(ask(&lab, listener_v6(8000)), other.as_str());
        assert_eq!(words.word(id), word.flipped(other, false));
        let written = fs::read_to_string(&file).unwrap();
        assert!(written.contains(&words.word(id).0.to_string()), "{written}");
    }
    let history = lab.ask(&["history"]).unwrap();
    let outside: Vec<&Value> = history["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["action"] == "changed_outside")
        .map(|entry| &entry["generation"])
        .collect();
    // Garbage says nothing that the word could differ from.
    assert_eq!(outside, [2, 3]);
}

fn rollbacks(lab: &Lab) -> Vec<Value> {
    let history = lab.ask(&["history"]).unwrap();
    let entries = history["entries"].as_array().unwrap();
    entries
        .iter()
        .filter(|entry| entry["action"] == "rollback")
        .cloned()
        .collect()
}

/// Law 5: a rollback with the daemon dead is one store, journalled with its
/// actor, and new connections go back.
#[test]
fn a_rollback_needs_no_daemon() {
    let mut lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    assert_eq!(ask(&lab, listener(8000)), "green");
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let back = lab.ask(&["rollback", "llm", "-m", "it burns"]).unwrap();
    assert_eq!(
        (&back["from"], &back["to"], &back["generation"]),
        (&"green".into(), &"blue".into(), &2.into())
    );
    for to in [listener(8000), listener(8001), listener_v6(8000)] {
        assert_eq!(ask(&lab, to), "blue");
    }
    let entries = rollbacks(&lab);
    let phases: Vec<_> = entries.iter().map(|entry| &entry["phase"]).collect();
    assert_eq!(phases, ["intent", "result"]);
    for entry in &entries {
        assert_eq!(
            (&entry["actor"], &entry["why"]),
            (&"root(0)".into(), &"it burns".into())
        );
    }
    lab.start().unwrap();
    assert_eq!(summary(&lab), ("blue".into(), 2.into()));
}

/// Law 5: a rollback does not wait for a daemon that hangs; and when that one
/// goes on, it rolls nothing back a second time.
#[test]
fn a_rollback_does_not_wait_for_a_daemon_that_hangs() {
    let lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let daemon = Pid::from_raw(lab.daemon_pid().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let back = lab.ask(&["rollback", "llm", "--timeout", "1s"]);
    let colour = ask(&lab, listener(8000));
    kill(daemon, Signal::SIGCONT).unwrap();
    let back = back.unwrap();
    assert_eq!(
        (&back["to"], &back["generation"]),
        (&"blue".into(), &2.into())
    );
    assert_eq!(colour, "blue");

    // It reads what was sent to it meanwhile, and looks at its words.
    for _ in 0..20 {
        assert_eq!(summary(&lab), ("blue".into(), 2.into()));
        sleep(Duration::from_millis(100));
    }
    let history = lab.ask(&["history"]).unwrap();
    let entries = history["entries"].as_array().unwrap();
    assert!(
        entries
            .iter()
            .any(|entry| entry["action"] == "changed_outside")
    );
    assert_eq!(rollbacks(&lab).len(), 2);
}

/// Law 5: what was asked of a daemon that hangs, and then done without it, is
/// refused by that daemon when it gets to it.
#[test]
fn a_rollback_is_not_done_twice() {
    let mut lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    // In its place: somebody who takes the question down, and never answers.
    let path = socket(&lab);
    fs::remove_file(&path).unwrap();
    let listener = UnixListener::bind(&path).unwrap();
    let hanging = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = Vec::new();
        stream.read_to_end(&mut request).unwrap();
        request
    });
    let back = lab.ask(&["rollback", "llm", "--timeout", "500ms"]).unwrap();
    let now = (Value::from("blue"), Value::from(2));
    assert_eq!((&back["to"], &back["generation"]), (&now.0, &now.1));
    let request = hanging.join().unwrap();
    lab.start().unwrap();

    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(&request).unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    // It was asked for at generation 1.
    assert_eq!(&status, b"HTTP/1.1 409");
    assert_eq!(summary(&lab), now);
}

/// Law 10: a flip that its operator has given up on, because the daemon hung, is
/// not done later.
#[test]
fn a_flip_that_was_given_up_is_not_done_later() {
    let lab = Lab::serving().unwrap();
    let daemon = Pid::from_raw(lab.daemon_pid().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let (code, _, err) = lab.tell(&["flip", "llm", "--timeout", "1s"]).unwrap();
    kill(daemon, Signal::SIGCONT).unwrap();
    assert_eq!(code, 9, "{err}");
    for _ in 0..10 {
        assert_eq!(summary(&lab), ("blue".into(), 0.into()));
        sleep(Duration::from_millis(50));
    }
    lab.ask(&["flip", "llm"]).unwrap();
}

/// Law 5: a flip to backends without a next hop is refused, a rollback to them
/// is not.
#[test]
fn a_rollback_is_not_gated_by_next_hops() {
    let lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    lab.ip(Place::Gateway, "link set blue down").unwrap();
    let begun = Instant::now();
    loop {
        let status = lab.status().unwrap();
        let backends = status["services"][0]["colours"]["blue"]["backends"].clone();
        let mut backends = backends.as_array().unwrap().iter();
        if backends.all(|backend| backend["healthy"] == false) {
            break;
        }
        assert!(begun.elapsed() < PATIENCE, "{status}");
        sleep(Duration::from_millis(50));
    }
    let (code, _, err) = lab.tell(&["flip", "llm"]).unwrap();
    assert_eq!(code, 8, "{err}");
    assert!(
        err.contains("10.0.1.10") && err.contains("--force"),
        "{err}"
    );
    assert_eq!(summary(&lab), ("green".into(), 1.into()));
    let back = lab.ask(&["rollback", "llm"]).unwrap();
    assert_eq!(back["to"], "blue");
    assert_eq!(summary(&lab), ("blue".into(), 2.into()));
}

/// Law 8: a file that is wrong anywhere changes nothing anywhere, and the
/// message names the key and the line.
#[test]
fn a_reload_of_a_bad_file_changes_nothing() {
    let lab = Lab::serving().unwrap();
    let traffic = Traffic::start(&lab);
    let steady = |lab: &Lab| {
        let status = lab.ask(&["--socket", &socket(lab), "status"]).unwrap();
        let mut service = status["services"][0].clone();
        for colour in ["blue", "green"] {
            let colour = service["colours"][colour].as_object_mut().unwrap();
            colour.retain(|key, _| ["version", "backends"].contains(&key.as_str()));
            for backend in colour["backends"].as_array_mut().unwrap() {
                backend["flows"] = Value::Null;
            }
        }
        service
    };
    let before = (steady(&lab), Pinned::of(&lab));
    let good = fs::read_to_string(lab.config()).unwrap();
    let line_of = |text: &str, part: &str| {
        let at = text.find(part).unwrap();
        text[..at].matches('\n').count() + 1
    };
    // Each of them also has a change that is right.
    let right = good
        .replace("model@2", "model@3")
        .replace("10.0.2.11", "10.0.2.12");
    for (from, to, key) in [
        (
            "[service.llm]\n",
            "[service.llm]\ncolour = \"red\"\n",
            "colour",
        ),
        (":8001\"", ":0\"", "service.llm.listen"),
        (
            "\"10.0.1.11\"",
            "\"10.0.1.300\"",
            "service.llm.blue.backends",
        ),
        (
            "[service.llm.green]",
            "[service.other]\n[service.llm.green]",
            "service.other.listen",
        ),
    ] {
        let bad = right.replace(from, to);
        assert_ne!(bad, right);
        fs::write(lab.config(), &bad).unwrap();
        for dry in [true, false] {
            let words: &[&str] = if dry {
                &["reload", "--dry-run"]
            } else {
                &["reload"]
            };
            let (code, out, err) = lab
                .tell(&[&["--socket", &socket(&lab)], words].concat())
                .unwrap();
            assert_eq!((code, out.as_str()), (2, ""), "{err}");
            let line = line_of(&bad, to.trim_start_matches("[service.llm]\n"));
            let place = format!("bgswitch.toml:{line}: ");
            assert!(err.contains(key), "`{key}` is not in {err}");
            assert!(err.contains(&place), "`{place}` is not in {err}");
        }
        assert_eq!((steady(&lab), Pinned::of(&lab)), before);
    }
    for (key, value) in [
        ("max_flows", "2000"),
        ("max_services", "2000\nmax_flows = 100000"),
    ] {
        fs::write(
            lab.config(),
            good.replace("max_flows = 100000", &format!("{key} = {value}")),
        )
        .unwrap();
        let (code, _, err) = lab.tell(&["reload"]).unwrap();
        assert_eq!(code, 2);
        assert!(err.contains(&format!("gateway.{key} changed")), "{err}");
    }
    assert_eq!((steady(&lab), Pinned::of(&lab)), before);
    traffic.goes_on();
    traffic.end();
}

/// The socket, for when the file does not say it.
fn socket(lab: &Lab) -> String {
    lab.directory().join("sock").display().to_string()
}

/// The backend of a conversation's flow (IPv4), as the packet path has it.
fn backend_of(lab: &Lab, conversation: &Conversation) -> IpAddr {
    let flow = flow_of(lab, conversation).unwrap();
    let backends = Map::Array(MapData::from_pin(lab.pinned_map(map::BACKENDS)).unwrap());
    let backends: Array<_, Backend> = backends.try_into().unwrap();
    let [a, b, c, d, ..] = backends.get(&flow.backend, 0).unwrap().address;
    [a, b, c, d].into()
}

/// Law 8: a reload that adds a listener and a backend, and takes one away, fails
/// no request under load; every flow stays where it is, on the backend that
/// left too, until it ends.
#[test]
fn a_reload_moves_no_flow() {
    let lab = Lab::serving().unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    lab.ip(Place::Blue, "addr add 10.0.1.12/24 dev eth0")
        .unwrap();
    let traffic = Traffic::start(&lab);
    let mut old: Vec<_> = (0..16)
        .map(|_| {
            let mut conversation = Conversation::open(&namespace, listener(8000)).unwrap();
            assert_eq!(conversation.ask().unwrap(), "blue");
            let backend = backend_of(&lab, &conversation);
            (conversation, backend)
        })
        .collect();
    let [stays, leaves, comes] =
        ["10.0.1.10", "10.0.1.11", "10.0.1.12"].map(|ip| ip.parse::<IpAddr>().unwrap());
    for backend in [stays, leaves] {
        assert!(old.iter().any(|(_, of)| *of == backend));
    }

    let mut servers = SERVERS;
    servers[Colour::Blue as usize][1] = "10.0.1.12";
    let text =
        service("", servers).replace("listen = [", "listen = [\"tcp://203.0.113.10:8002\", ");
    lab.configure(&text).unwrap();
    let mut expected = [
        "- llm blue backend 10.0.1.11 weight 1",
        "+ llm blue backend 10.0.1.12 weight 1",
        "+ llm listener tcp://203.0.113.10:8002",
    ]
    .map(Value::from)
    .to_vec();
    expected.sort_by_key(Value::to_string);
    let changes = |words: &[&str]| {
        let mut changes = lab.ask(words).unwrap()["changes"]
            .as_array()
            .unwrap()
            .clone();
        changes.sort_by_key(Value::to_string);
        changes
    };
    let listeners = |lab: &Lab| {
        lab.status().unwrap()["services"][0]["listeners"]
            .as_array()
            .unwrap()
            .len()
    };
    let before = listeners(&lab);
    assert_eq!(changes(&["reload", "--dry-run"]), expected);
    assert_eq!(listeners(&lab), before);
    assert_eq!(changes(&["reload"]), expected);
    assert_eq!(listeners(&lab), before + 1);
    for (conversation, backend) in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
        assert_eq!(backend_of(&lab, conversation), *backend);
    }
    let mut found = BTreeSet::new();
    for n in 0..32 {
        let to = listener([8000, 8002][n % 2]);
        let mut conversation = Conversation::open(&namespace, to).unwrap();
        assert_eq!(conversation.ask().unwrap(), "blue");
        found.insert(backend_of(&lab, &conversation));
    }
    assert_eq!(found, [stays, comes].into());
    traffic.goes_on();
    traffic.end();
    // Nothing was sent to a backend before the way to it was known.
    assert_eq!(lab.status().unwrap()["reasons"]["forwarded_by_stack"], 0);
    for (conversation, _) in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    assert!(changes(&["reload"]).is_empty());
    // And all of it back, as if nothing had been.
    lab.configure(&default_service()).unwrap();
    lab.ask(&["reload"]).unwrap();
    assert_eq!(listeners(&lab), before);
    for (conversation, backend) in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
        assert_eq!(backend_of(&lab, conversation), *backend);
    }
}
