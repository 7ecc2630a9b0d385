//! `bgswitch monitor`: what it shows is what happened, to everybody who watches, and it
//! asks the packet path for nothing when nobody does.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr},
    process::{Child, ChildStdout, Stdio},
    sync::{Arc, Mutex},
    thread::JoinHandle,
    time::Duration,
};

use aya::{
    maps::{Array, Map, MapData, MapInfo},
    programs::loaded_programs,
};
use bg_common::{
    abi::{capacity, map},
    monitor::{EVERY_REASON, Watch},
    reason::Reason,
};
use bg_tests::{
    conversation::{Conversation, Datagrams},
    frame::{Frame, Macs},
    generator::{self, Client, Generator},
    lab::{Lab, Place, SERVERS, default_service, listener, listener_v6},
    load::{Load, Reuse, assert_flawless, until},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

/// A second service beside the usual one.
const WEB: &str = "[service.web]\nlisten = [\"tcp://203.0.113.20:8002\"]\n\
                   [service.web.blue]\nbackends = [\"10.0.1.10\"]\n\
                   [service.web.green]\nbackends = [\"10.0.2.10\"]\n";

/// `bgswitch monitor` at work.
struct Monitor {
    child: Child,
    lines: Arc<Mutex<Vec<Value>>>,
    reader: Option<JoinHandle<()>>,
}

impl Monitor {
    /// Starts it, and waits until it watches.
    fn start(lab: &Lab, words: &[&str]) -> Self {
        let mut child = lab
            .bgswitch(&[&["-o", "json", "monitor"], words].concat())
            .unwrap()
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = Arc::new(Mutex::new(Vec::new()));
        let out = BufReader::new(child.stdout.take().unwrap());
        let reader = read(out, Arc::clone(&lines));
        let monitor = Self {
            child,
            lines,
            reader: Some(reader),
        };
        until("it watches", || !monitor.of("begin").is_empty());
        monitor
    }

    /// The lines of a kind so far.
    fn of(&self, kind: &str) -> Vec<Value> {
        let lines = self.lines.lock().unwrap();
        let of_kind = lines.iter().filter(|line| line["type"] == kind);
        of_kind.cloned().collect()
    }

    fn packets(&self) -> Vec<Value> {
        self.of("packet")
    }

    /// Packets shown and not shown so far.
    fn told(&self) -> (u64, u64) {
        let missed = self
            .of("alive")
            .last()
            .map_or(0, |line| line["missed"].as_u64().unwrap());
        (self.packets().len() as u64, missed)
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Waits for its end: exit code, stderr.
    fn ended(&mut self) -> (Option<i32>, String) {
        let err = BufReader::new(self.child.stderr.take().unwrap());
        let err: Vec<String> = err.lines().map_while(Result::ok).collect();
        let status = self.child.wait().unwrap();
        self.reader.take().unwrap().join().unwrap();
        (status.code(), err.join("\n"))
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read(out: BufReader<ChildStdout>, lines: Arc<Mutex<Vec<Value>>>) -> JoinHandle<()> {
    std::thread::spawn(move || {
        for line in out.lines().map_while(Result::ok) {
            lines
                .lock()
                .unwrap()
                .push(serde_json::from_str(&line).unwrap());
        }
    })
}

fn lab() -> Lab {
    let service = default_service() + WEB;
    Lab::new().unwrap().served_as(&service).unwrap()
}

/// What the attached program is asked to tell.
fn watched(lab: &Lab) -> Watch {
    let id = lab.status().unwrap()["interfaces"][0]["program_id"].clone();
    watched_by(id.as_u64().unwrap() as u32)
}

fn watched_by(program: u32) -> Watch {
    let program = loaded_programs()
        .flatten()
        .find(|of| of.id() == program)
        .unwrap();
    let maps = program.map_ids().unwrap().unwrap();
    let monitor = maps
        .into_iter()
        .find(|id| MapInfo::from_id(*id).unwrap().name_as_str() == Some(map::MONITOR))
        .unwrap();
    let monitor = Map::Array(MapData::from_id(monitor).unwrap());
    let monitor: Array<_, [u64; 2]> = monitor.try_into().unwrap();
    let [reasons, rest] = monitor.get(&0, 0).unwrap();
    Watch {
        reasons,
        sample: rest as u32,
        service: (rest >> 32) as u32,
    }
}

fn bit(reason: Reason) -> u64 {
    1 << reason as u32
}

fn counted(lab: &Lab) -> BTreeMap<String, u64> {
    let status = lab.status().unwrap();
    let reasons = status["reasons"].as_object().unwrap();
    let counts = reasons.iter();
    counts
        .map(|(reason, count)| (reason.clone(), count.as_u64().unwrap()))
        .collect()
}

/// Asks over TCP and UDP, over both families. Returns the clients.
fn traffic(lab: &Lab) -> Vec<SocketAddr> {
    let client = lab.enter(Place::Client).unwrap();
    let mut clients = Vec::new();
    for _ in 0..5 {
        for to in [listener(8000), listener(8001), listener_v6(8000)] {
            let mut conversation = Conversation::open(&client, to).unwrap();
            clients.push(conversation.local().unwrap());
            conversation.ask().unwrap();
        }
        for to in [listener(4433), listener_v6(4433)] {
            Datagrams::open(&client, to).unwrap().ask().unwrap();
        }
    }
    clients
}

fn datagrams(lab: &Lab, count: u32) {
    let client = lab.enter(Place::Client).unwrap();
    let socket = Datagrams::open(&client, listener(4433)).unwrap();
    for _ in 0..count {
        socket.ask().unwrap();
    }
}

#[test]
fn packets_are_shown_as_they_were_counted() {
    let lab = lab();
    let before = counted(&lab);
    let mut monitor = Monitor::start(&lab, &["--service", "llm"]);
    let clients = traffic(&lab);
    let reasons = ["forwarded", "forwarded_new", "returned"];
    until("all are shown", || {
        let after = counted(&lab);
        let shown = monitor.packets();
        reasons.iter().all(|reason| {
            let shown = shown.iter().filter(|packet| packet["reason"] == *reason);
            shown.count() as u64 == after[*reason] - before[*reason]
        })
    });
    let packets = monitor.packets();
    assert_eq!(monitor.told().1, 0);
    for packet in &packets {
        assert_eq!(
            (&packet["schema"], &packet["service"], &packet["colour"]),
            (&json!(1), &json!("llm"), &json!("blue")),
            "{packet}"
        );
        let forward = packet["direction"] == "forward";
        let (near, far) = if forward {
            ("source", "destination")
        } else {
            ("destination", "source")
        };
        assert_eq!(packet["client"], packet[near], "{packet}");
        let listener = packet["listener"].as_str().unwrap();
        let (protocol, address) = listener.split_once("://").unwrap();
        assert_eq!(packet["protocol"], protocol);
        let backend = packet["backend"].as_str().unwrap();
        if forward {
            assert_eq!(packet["destination"], address);
            assert_eq!(
                (&packet["interface"], &packet["egress"]),
                (&json!("clients"), &json!("blue"))
            );
        } else {
            assert_eq!(packet[far], backend);
            assert_eq!(
                (&packet["interface"], &packet["egress"]),
                (&json!("blue"), &json!("clients"))
            );
        }
        let server = backend.parse::<SocketAddr>().unwrap().ip().to_string();
        assert!(SERVERS[0].contains(&server.as_str()), "{packet}");
        assert_eq!(packet["generation"], 0);
    }
    for client in clients {
        let of_client: Vec<&Value> = packets
            .iter()
            .filter(|packet| packet["client"] == client.to_string())
            .collect();
        let first = of_client[0];
        assert_eq!(
            (&first["reason"], &first["flags"], &first["flow"]),
            (
                &json!("forwarded_new"),
                &json!(["SYN"]),
                &json!("half_open")
            )
        );
        assert!(
            of_client
                .iter()
                .any(|packet| packet["flow"] == "established")
        );
        let at = |packet: &Value| packet["at_ns"].as_u64().unwrap();
        assert!(of_client.is_sorted_by_key(|packet| at(packet)));
    }

    monitor.signal(Signal::SIGINT);
    let (code, err) = monitor.ended();
    assert_eq!(code, Some(0), "{err}");
    let summary = format!("{} packets (", packets.len());
    assert!(
        err.contains(&summary) && err.contains("; 0 not shown"),
        "{err}"
    );
    assert_eq!(watched(&lab), Watch::default());
}

#[test]
fn what_is_no_flow_is_shown_as_far_as_it_was_looked_at() {
    let lab = lab();
    let monitor = Monitor::start(&lab, &["--reason", "not_ip", "--reason", "not_ours"]);
    let macs = Macs {
        to: lab.mac(Place::Gateway, "clients").unwrap(),
        from: lab.mac(Place::Client, "eth0").unwrap(),
    };
    let client: SocketAddr = "198.51.100.10:5000".parse().unwrap();
    let other: SocketAddr = "198.51.100.1:9".parse().unwrap();
    let wire = bg_tests::wire::Wire::open(&lab.enter(Place::Client).unwrap(), "eth0").unwrap();
    wire.send(&Frame::udp(macs, client, other).bytes()).unwrap();
    let mut strange = Frame::udp(macs, client, other).bytes();
    strange[12..14].copy_from_slice(&[0x88, 0xb5]); // for experiments (IEEE 802)
    wire.send(&strange).unwrap();
    // Servers' kernels may send something of their own meanwhile (router solicitations).
    let is = |packet: &Value, reason: &str, source: Value| {
        packet["reason"] == reason
            && packet["source"] == source
            && packet["action"] == "pass"
            && packet["interface"] == "clients"
    };
    let seen = |reason: &str, source: Value| {
        let packets = monitor.packets();
        packets
            .iter()
            .any(|packet| is(packet, reason, source.clone()))
    };
    until("the datagram is shown", || {
        seen("not_ours", json!(client.to_string()))
    });
    until("the other frame is shown", || seen("not_ip", Value::Null));
    for packet in monitor.packets() {
        assert_eq!(packet["service"], Value::Null, "{packet}");
    }
}

#[test]
fn each_viewer_sees_what_it_asked_for_and_the_last_one_leaves_nothing_on() {
    let lab = lab();
    assert_eq!(watched(&lab), Watch::default());
    let web = Monitor::start(&lab, &["--service", "web"]);
    let id = watched(&lab).service;
    assert_eq!((watched(&lab).reasons, id > 0), (EVERY_REASON, true));
    let new = Monitor::start(&lab, &["--reason", "forwarded_new", "--service", "llm"]);
    assert_eq!(
        (watched(&lab).reasons, watched(&lab).service),
        (EVERY_REASON, 0)
    );

    traffic(&lab);
    let client = lab.enter(Place::Client).unwrap();
    let to = "203.0.113.20:8002".parse().unwrap();
    let mut conversation = Conversation::open(&client, to).unwrap();
    conversation.ask().unwrap();
    until("both have seen theirs", || {
        let returned = |packet: &Value| packet["reason"] == "returned";
        new.packets().len() == 25 && web.packets().iter().any(returned)
    });
    for packet in new.packets() {
        let what = (&packet["reason"], &packet["service"]);
        assert_eq!(what, (&json!("forwarded_new"), &json!("llm")));
    }
    for packet in web.packets() {
        assert_eq!(packet["service"], "web");
        assert_eq!(packet["client"], conversation.local().unwrap().to_string());
    }

    // One is killed, and the other one's reader goes, with no packet on its way.
    web.signal(Signal::SIGKILL);
    until("the packet path is asked for less", || {
        watched(&lab).reasons == bit(Reason::ForwardedNew)
    });
    drop(new);
    until("nothing is asked for", || watched(&lab) == Watch::default());
}

#[test]
fn a_monitor_ends_with_its_count_or_with_who_reads_it() {
    let lab = lab();
    let mut monitor = Monitor::start(&lab, &["--count", "3", "--reason", "returned"]);
    datagrams(&lab, 5);
    let (code, err) = monitor.ended();
    assert_eq!((code, monitor.packets().len()), (Some(0), 3), "{err}");
    assert!(err.contains("3 packets (returned 3)"), "{err}");

    let mut child = lab
        .bgswitch(&["monitor", "--reason", "inconsistent"])
        .unwrap()
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    until("it watches", || watched(&lab).reasons != 0);
    drop(child.stdout.take());
    assert_eq!(child.wait().unwrap().code(), Some(0));
    until("nothing is asked for", || watched(&lab) == Watch::default());
}

#[test]
fn lines_for_people_say_who_talks_to_whom() {
    let lab = lab();
    let child = lab
        .bgswitch(&["monitor", "--service", "llm", "--count", "2"])
        .unwrap()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    until("it watches", || watched(&lab).reasons != 0);
    let client = lab.enter(Place::Client).unwrap();
    let mut conversation = Conversation::open(&client, listener(8000)).unwrap();
    conversation.ask().unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let local = conversation.local().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let [first, second] = lines[..] else {
        panic!("two lines: {text}");
    };
    assert!(first.contains("  forwarded_new        tcp   "), "{text}");
    let ends = format!("{local:<21} -> 203.0.113.10:8000     -> 10.0.1.1");
    assert!(first.contains(&ends), "{text}");
    assert!(
        first.contains("  llm blue       clients    SYN 60 B"),
        "{text}"
    );
    let ends = format!("{local:<21} <- 203.0.113.10:8000     <- 10.0.1.1");
    assert!(second.contains(&ends), "{text}");
    assert!(second.contains("SYN,ACK"), "{text}");
}

/// One packet of ten, at random: of 6000, 600, and 7 standard deviations at most more
/// or fewer. A second viewer that wants more of them does not change it.
#[test]
fn a_sample_is_the_share_that_was_asked_for() {
    let lab = lab();
    let new = ["--reason", "forwarded", "--reason", "returned"];
    let start = |sample| Monitor::start(&lab, &[&new[..], &["--sample", sample]].concat());
    let (all, tenth, fortieth) = (start("1"), start("10"), start("40"));
    drop(all);
    until("one of ten is asked for", || watched(&lab).sample == 10);
    datagrams(&lab, 3000);
    let count = |monitor: &Monitor| monitor.packets().len();
    until("all are passed on", || {
        let before = count(&tenth) + count(&fortieth);
        std::thread::sleep(Duration::from_millis(300));
        before == count(&tenth) + count(&fortieth)
    });
    assert!(
        (600 - 163..600 + 163).contains(&count(&tenth)),
        "{}",
        count(&tenth)
    );
    assert!(
        (150 - 85..150 + 85).contains(&count(&fortieth)),
        "{}",
        count(&fortieth)
    );
}

/// What is not shown is said: each of a flood's packets is shown or counted.
#[test]
fn a_flood_is_shown_in_part_and_the_rest_is_counted() {
    let lab = lab();
    let monitor = Monitor::start(
        &lab,
        &["--reason", "forwarded", "--reason", "forwarded_new"],
    );
    let before = counted(&lab);
    flood(&lab, datagram, 300_000, 1000);
    let flooded = || {
        let after = counted(&lab);
        let of = |reason: &str| after[reason] - before[reason];
        of("forwarded") + of("forwarded_new")
    };
    until("each is shown or counted", || {
        let (shown, missed) = monitor.told();
        shown + missed == flooded()
    });
    let (shown, missed) = monitor.told();
    assert!(
        shown >= 1024 && missed > shown,
        "{shown} shown, {missed} not"
    );
}

/// A frame of anybody's.
type Anyones = fn(Macs, SocketAddr) -> Frame;

fn datagram(macs: Macs, from: SocketAddr) -> Frame {
    Frame::udp(macs, from, listener(4433)).payload(&[0; 22])
}

fn syn(macs: Macs, from: SocketAddr) -> Frame {
    Frame::tcp(macs, from, listener(8000), "S").padding(10)
}

/// Frames of so many clients.
fn flood(lab: &Lab, frame: Anyones, frames: u32, clients: u32) {
    let macs = Macs {
        to: lab.mac(Place::Gateway, "clients").unwrap(),
        from: lab.mac(Place::Client, "eth0").unwrap(),
    };
    let anyone = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let frame = frame(macs, anyone).bytes();
    let first = Ipv4Addr::new(198, 18, 0, 0).to_bits();
    let stream = generator::stream(&frame, Client::Source, clients, first).unwrap();
    let mut generator = Generator::load().unwrap();
    generator.set(&stream).unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    let cpus = std::thread::available_parallelism().unwrap().get();
    generator.run(&namespace, "eth0", frames, cpus - 1).unwrap();
}

/// A table without proof that is full gives the lines of old flows to new ones, and
/// says so: first that of datagrams, then that of handshakes.
#[test]
fn flows_that_give_way_are_an_event_and_counted() {
    let lab = lab();
    let evicted = || {
        let table = lab.status().unwrap()["flow_table"].clone();
        assert_eq!(table["full"], 0, "{table}");
        ["evicted_udp", "evicted_half_open"].map(|key| table[key].as_u64().unwrap())
    };
    assert_eq!(evicted(), [0, 0]);
    let monitor = Monitor::start(&lab, &["--reason", "inconsistent"]);
    let told = |table: &str| {
        let events = monitor.of("event").into_iter();
        let evicted = events.filter(|event| event["event"] == "evicted");
        let numbers = evicted.filter_map(|event| {
            let detail = event["detail"].as_str()?.strip_prefix(table)?;
            let number = detail.strip_suffix(" flows gave way to newer ones")?;
            number.parse::<u64>().ok()
        });
        numbers.sum::<u64>()
    };
    let clients = 2 * capacity::UDP.max(capacity::HALF_OPEN) as u32;
    flood(&lab, datagram, clients, clients);
    until("each datagram flow's end is told", || {
        let [udp, _] = evicted();
        udp > 10_000 && told("udp: ") == udp
    });
    assert_eq!((evicted()[1], told("half_open: ")), (0, 0));
    flood(&lab, syn, clients, clients);
    until("each handshake's end is told", || {
        let [_, half_open] = evicted();
        half_open > 10_000 && told("half_open: ") == half_open
    });
}

/// Law 1, as seen by a watcher: in the stream, new flows before the flip go to blue,
/// and those behind it to green. Resets are verdicts.
#[test]
fn changes_of_the_word_stand_between_the_packets() {
    let lab = lab();
    let client = lab.enter(Place::Client).unwrap();
    let monitor = Monitor::start(&lab, &["--service", "llm"]);
    let load = Load::start(
        lab.enter(Place::Client).unwrap(),
        vec![(listener(8000), Reuse::Never); 4],
        Duration::from_millis(5),
    );
    load.advance(100);
    lab.tell(&["flip", "llm", "-m", "because"]).unwrap();
    load.advance(100);
    assert_flawless(&load.finish().unwrap());

    let mut old = Conversation::open(&client, listener(8001)).unwrap();
    assert_eq!(old.ask().unwrap(), "green");
    lab.tell(&["canary", "llm", "5"]).unwrap();
    lab.tell(&["canary", "llm", "0"]).unwrap();
    lab.tell(&["flip", "llm"]).unwrap();
    lab.tell(&["flip", "llm", "--drain", "1s"]).unwrap();
    lab.tell(&["rollback", "llm"]).unwrap();
    assert!(old.ask().is_err());
    // Somebody else, without the daemon.
    let (words, id) = lab.words().unwrap();
    let word = words.word(id);
    words
        .store(id, word, word.flipped(word.active().other(), false))
        .unwrap();
    let named = |event: &str| {
        let events = monitor.of("event");
        events
            .into_iter()
            .filter(|line| line["event"] == event)
            .collect::<Vec<_>>()
    };
    until("all are shown", || {
        let count = |event| named(event).len();
        count("changed_outside") == 1 && count("rollback") == 1
    });
    lab.configure(&(default_service() + WEB).replace("model@2", "model@3"))
        .unwrap();
    lab.tell(&["reload"]).unwrap();
    until("the reload is shown", || !named("reload").is_empty());
    until("the reset is shown", || {
        monitor.packets().iter().any(|packet| {
            packet["reason"] == "reset_client"
                && packet["client"] == old.local().unwrap().to_string()
        })
    });
    assert_eq!(named("canary").len(), 2);
    let flips = named("flip");
    assert_eq!(flips.len(), 3);
    let first = &flips[0];
    assert_eq!(
        (&first["service"], &first["generation"], &first["why"]),
        (&json!("llm"), &json!(1), &json!("because"))
    );
    assert!(first["actor"].as_str().unwrap().starts_with("root(0)"));

    let lines = monitor.lines.lock().unwrap();
    let at = lines
        .iter()
        .position(|line| line["event"] == "flip")
        .unwrap();
    let colours = |lines: &[Value]| {
        let mut colours: BTreeMap<String, u32> = BTreeMap::new();
        for line in lines
            .iter()
            .filter(|line| line["reason"] == "forwarded_new")
        {
            let colour = line["colour"].as_str().unwrap().to_owned();
            *colours.entry(colour).or_default() += 1;
        }
        colours
    };
    // Packets of the store's own time may have seen either word, and one of each CPU
    // may have been on its way still.
    let flip = &lines[at];
    let stored = flip["at_ns"].as_u64().unwrap() + flip["store_ns"].as_u64().unwrap();
    let before = colours(&lines[..at]);
    let next = lines[at + 1..]
        .iter()
        .position(|line| line["type"] == "event")
        .unwrap();
    let behind = lines[at + 1..at + 1 + next].iter();
    let behind: Vec<Value> = behind
        .filter(|line| line["at_ns"].as_u64().unwrap_or(0) > stored)
        .cloned()
        .collect();
    let after = colours(&behind);
    let cpus = std::thread::available_parallelism().unwrap().get() as u32;
    assert!(before.contains_key("blue") && after.contains_key("green"));
    assert_eq!(before.len(), 1, "{before:?}");
    assert!(
        after.get("blue").is_none_or(|late| *late <= cpus),
        "{after:?}"
    );
}

/// Law 3: who watches loses its view with the daemon, and nobody loses a packet. What
/// the killed daemon left on goes with its program.
#[test]
fn a_killed_daemon_leaves_forwarding_as_it_is_and_the_next_one_watches_nothing() {
    let mut lab = lab();
    let mut monitor = Monitor::start(&lab, &[]);
    let orphan = lab.status().unwrap()["interfaces"][0]["program_id"].clone();
    let load = Load::start(
        lab.enter(Place::Client).unwrap(),
        vec![(listener(8000), Reuse::Never); 2],
        Duration::from_millis(5),
    );
    load.advance(20);
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let (code, err) = monitor.ended();
    assert_eq!(code, Some(3), "{err}");
    assert!(err.contains("forwarding goes on as it is"), "{err}");
    load.advance(100);
    let orphan = watched_by(orphan.as_u64().unwrap() as u32);
    assert_eq!(orphan.reasons, EVERY_REASON);
    lab.start().unwrap();
    assert_eq!(watched(&lab), Watch::default());
    load.advance(20);
    assert_flawless(&load.finish().unwrap());

    // A daemon that is told to stop leaves nothing on.
    let mut monitor = Monitor::start(&lab, &[]);
    let program = lab.status().unwrap()["interfaces"][0]["program_id"].clone();
    lab.end_daemon(Signal::SIGTERM).unwrap();
    assert_eq!(monitor.ended().0, Some(3));
    let program = program.as_u64().unwrap() as u32;
    assert_eq!(watched_by(program), Watch::default());
}

#[test]
fn what_cannot_be_watched_is_refused() {
    let lab = lab();
    for (words, said) in [
        (&["--reason", "lost"][..], "invalid value 'lost'"),
        (
            &["--service", "mail"],
            "there is no service `mail`, only: llm, web",
        ),
        (&["--service", "a/b"], "`a/b` is no service's name"),
        (&["--sample", "0"], "0 is not in 1.."),
        (&["--count", "0"], "0 is not in 1.."),
    ] {
        let (code, out, err) = lab.tell(&[&["monitor"], words].concat()).unwrap();
        assert_eq!((code, out.as_str()), (2, ""), "{words:?}: {err}");
        assert!(err.contains(said), "{err}");
    }
    assert_eq!(watched(&lab), Watch::default());
}
