//! The daemon under bad conditions: a disk that hangs, a stopped process, files
//! half edited, interfaces that come and go; and what it forgets, and keeps.

use std::{
    fs,
    os::unix::fs::OpenOptionsExt as _,
    path::PathBuf,
    process::{Child, Output, Stdio},
};

use aya::maps::{Array, Map, MapData};
use bg_common::{
    abi::{LAYOUT, map},
    service::Interface,
};
use bg_tests::{
    conversation::{Conversation, Datagrams},
    lab::{Lab, Place, SERVERS, default_service, listener, service},
    load::{self, until},
};
use nix::{
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use serde_json::Value;

fn summary(lab: &Lab, name: &str) -> (String, u64) {
    let status = lab.status().unwrap();
    let services = status["services"].as_array().unwrap();
    let service = services.iter().find(|s| s["name"] == name).unwrap();
    (
        service["active"].as_str().unwrap().to_owned(),
        service["generation"].as_u64().unwrap(),
    )
}

fn is(colour: &str, generation: u64) -> (String, u64) {
    (colour.to_owned(), generation)
}

fn once(lab: &Lab, port: u16) -> String {
    load::once(lab.enter(Place::Client).unwrap(), listener(port)).unwrap()
}

fn start(lab: &Lab, words: &[&str]) -> Child {
    let mut command = lab.bgswitch(words).unwrap();
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn end(child: Child) -> (Option<i32>, String) {
    let Output {
        status,
        stdout,
        stderr,
    } = child.wait_with_output().unwrap();
    let text = [stdout, stderr].concat();
    (status.code(), String::from_utf8(text).unwrap())
}

fn pinned(lab: &Lab, name: &str) -> MapData {
    let maps = lab.bpffs().join(format!("v{LAYOUT}")).join("maps");
    MapData::from_pin(maps.join(name)).unwrap()
}

fn entries(lab: &Lab) -> Vec<Value> {
    let history = lab.ask(&["history"]).unwrap();
    history["entries"].as_array().unwrap().clone()
}

/// A FIFO in the state file's way: whoever writes it waits until it is read.
fn hang_the_disk(lab: &Lab) -> PathBuf {
    let file = format!("state/state.json.{}", lab.daemon_pid().unwrap());
    let fifo = lab.directory().join(file);
    mkfifo(&fifo, Mode::S_IRWXU).unwrap();
    fifo
}

/// Law 5: a rollback that the daemon did, but could not answer in time for a disk
/// that hangs, is not done again.
#[test]
fn a_hanging_disk_delays_no_rollback_and_doubles_none() {
    let lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let fifo = hang_the_disk(&lab);
    let words = ["--timeout", "500ms", "rollback", "llm"];
    let (code, out, err) = lab.tell(&words).unwrap();
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        out,
        "llm is at blue already, generation 2 (nothing to roll back)\n"
    );
    assert_eq!(summary(&lab, "llm"), is("blue", 2));
    assert_eq!(once(&lab, 8000), "blue");
    // With patience for the daemon, it answers all the same, and says so.
    let (code, _, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("is not written yet"), "{err}");
    assert_eq!(summary(&lab, "llm"), is("green", 3));
    // A flip whose intent cannot be journalled is none.
    let (code, _, err) = lab.tell(&["flip", "llm"]).unwrap();
    assert_eq!(code, 1, "{err}");
    assert_eq!(summary(&lab, "llm"), is("green", 3));

    let mut reader = fs::OpenOptions::new();
    let reader = reader.read(true).custom_flags(libc::O_NONBLOCK).open(&fifo);
    fs::remove_file(&fifo).unwrap();
    until("the rollbacks are in the journal", || {
        let entries = entries(&lab);
        // What the command tried beside the daemon failed, and is there as well.
        let done = |e: &&Value| {
            let failed = e["detail"].as_str().unwrap().starts_with("failed");
            e["action"] == "rollback" && e["phase"] == "result" && !failed
        };
        entries.iter().filter(done).count() == 2
    });
    // Until here, for a writer that found the FIFO and has not opened it yet.
    drop(reader);
    lab.ask(&["flip", "llm"]).unwrap();
}

/// Law 5: two operators who roll back the same flip do it once.
#[test]
fn two_rollbacks_at_once_are_one() {
    let lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let daemon = Pid::from_raw(lab.daemon_pid().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let words = ["--timeout", "1m", "rollback", "llm"];
    let operators = [start(&lab, &words), start(&lab, &words)];
    for operator in &operators {
        // They have looked at the word, and wait for the daemon.
        let has_socket = || {
            let descriptors = fs::read_dir(format!("/proc/{}/fd", operator.id())).unwrap();
            let mut targets = descriptors
                .flatten()
                .filter_map(|entry| fs::read_link(entry.path()).ok());
            targets.any(|target| target.to_string_lossy().starts_with("socket:"))
        };
        until("the command is connected", has_socket);
    }
    kill(daemon, Signal::SIGCONT).unwrap();
    let told = operators.map(end);
    assert!(told.iter().all(|(code, _)| *code == Some(0)), "{told:?}");
    let already = |(_, text): &&(_, String)| text.contains("(nothing to roll back)");
    assert_eq!(told.iter().filter(already).count(), 1, "{told:?}");
    assert_eq!(summary(&lab, "llm"), is("blue", 2));
}

/// A drain that began beside a daemon that hangs is ended by it.
#[test]
fn a_drain_beside_a_hanging_daemon_is_its_own_later() {
    let lab = Lab::serving().unwrap();
    let daemon = Pid::from_raw(lab.daemon_pid().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let words = ["--timeout", "300ms", "rollback", "llm", "--mode", "drain"];
    let (code, _, err) = lab.tell(&words).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(
        err.contains("passes unheeded until the daemon runs"),
        "{err}"
    );
    kill(daemon, Signal::SIGCONT).unwrap();
    until("the daemon knows the deadline", || {
        let status = lab.status().unwrap();
        !status["services"][0]["colours"]["blue"]["draining_until"].is_null()
    });
    assert_eq!(summary(&lab, "llm"), is("green", 1));
}

/// Law 5: neither a daemon nor a file that can be parsed is needed.
#[test]
fn a_rollback_needs_no_configuration_that_is_right() {
    let mut lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let text = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), text + "[service.embed\nlisten = [\n").unwrap();
    // The daemon is found although its socket's path is in a broken file.
    assert_eq!(lab.tell(&["status"]).unwrap().0, 0);
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let (code, out, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(out.starts_with("llm  green -> blue "), "{out}");
    assert!(err.contains("going by what the daemon noted"), "{err}");
    assert_eq!(once(&lab, 8000), "blue");
}

/// Laws 1, 2 and 4: a service is its name, whatever happens to its listeners,
/// at a reload and over a restart.
#[test]
fn a_service_keeps_its_word_when_its_ports_change() {
    let mut lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let moved = |from: &str, to: &str| default_service().replace(from, to);
    let other = moved(":8000\"", ":8002\"").replace(":8001\"", ":8003\"");
    let other = other.replace(":4433\"", ":4434\"");
    lab.configure(&other).unwrap();
    lab.ask(&["reload"]).unwrap();
    assert_eq!(summary(&lab, "llm"), is("green", 1));
    assert_eq!(once(&lab, 8002), "green");

    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    assert_eq!(summary(&lab, "llm"), is("green", 1));
    assert_eq!(once(&lab, 8000), "green");

    // Also when nothing is left in the kernel, as after a boot.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    assert_eq!(lab.tell(&["detach"]).unwrap().0, 0);
    lab.start().unwrap();
    assert_eq!(summary(&lab, "llm"), is("green", 1));
    assert_eq!(once(&lab, 8000), "green");
}

/// Laws 1 and 2: a service that takes a listener over takes neither the other
/// one's name nor its flows.
#[test]
fn a_split_service_leaves_the_rest_as_it_is() {
    let lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    let client = lab.enter(Place::Client).unwrap();
    let mut kept = Conversation::open(&client, listener(8000)).unwrap();
    assert_eq!(kept.ask().unwrap(), "green");
    lab.ask(&["flip", "llm", "--drain", "1h"]).unwrap();

    let taken = "\"tcp://203.0.113.10:8001\", ";
    let [blue, green] = SERVERS.map(|servers| servers[1]);
    let embed = format!(
        "[service.embed]\nlisten = [{}]\n[service.embed.blue]\nbackends = [\"{blue}\"]\n\
         [service.embed.green]\nbackends = [\"{green}\"]\n",
        taken.trim_end_matches(", ")
    );
    lab.configure(&(default_service().replace(taken, "") + &embed))
        .unwrap();
    let conflict = lab.tell(&["reload"]).unwrap();
    assert_eq!(conflict.0, 0, "{conflict:?}");
    assert_eq!(summary(&lab, "llm"), is("blue", 2));
    assert_eq!(summary(&lab, "embed"), is("blue", 0));
    assert_eq!(kept.ask().unwrap(), "green", "its listener is the same");
    lab.ask(&["flip", "embed"]).unwrap();
    assert_eq!(
        (once(&lab, 8000), once(&lab, 8001)),
        ("blue".into(), "green".into())
    );
    lab.ask(&["rollback", "llm"]).unwrap();
    assert_eq!(kept.ask().unwrap(), "green");
}

/// Law 10: who is silent or gone is no flow, and leaves the tables.
#[test]
fn what_is_over_is_not_counted() {
    let lab = Lab::new().unwrap();
    let lab = lab
        .served_as(&service("udp_idle = \"1s\"", SERVERS))
        .unwrap();
    let client = lab.enter(Place::Client).unwrap();
    let datagrams = Datagrams::open(&client, listener(4433)).unwrap();
    datagrams.ask().unwrap();
    let mut conversation = Conversation::open(&client, listener(8000)).unwrap();
    conversation.ask().unwrap();
    conversation.reset().unwrap();
    let flows = || {
        let status = lab.status().unwrap();
        let colours = status["services"][0]["colours"].clone();
        let count = |colour: &str| colours[colour]["flows"].as_u64().unwrap();
        count("blue") + count("green")
    };
    until("no flow is counted", || flows() == 0);
}

/// Law 5: a reload that looks for the way to a backend holds up no flip.
#[test]
fn a_flip_does_not_wait_for_a_reload() {
    let lab = Lab::serving().unwrap();
    lab.configure(&default_service().replace("\"10.0.1.11\"", "\"10.0.1.11\", \"10.0.1.99\""))
        .unwrap();
    let reload = start(&lab, &["reload"]);
    let position = |action: &str, phase: &str| {
        let entries = entries(&lab);
        let is_it = |e: &Value| e["action"] == action && e["phase"] == phase;
        entries.iter().position(is_it)
    };
    until("the reload is under way", || {
        position("reload", "intent").is_some()
    });
    lab.ask(&["flip", "llm"]).unwrap();
    let (code, text) = end(reload);
    assert_eq!(code, Some(0), "{text}");
    assert!(position("flip", "result") < position("reload", "result"));
    assert_eq!(summary(&lab, "llm"), is("green", 1));
}

/// Interfaces change and come again while the daemon runs.
#[test]
fn interfaces_are_followed() {
    let mut lab = Lab::serving().unwrap();
    let slots = |lab: &Lab| -> Vec<Interface> {
        let table = Map::Array(pinned(lab, map::INTERFACES));
        let table: Array<_, Interface> = table.try_into().unwrap();
        table.iter().flatten().filter(|i| i.ifindex != 0).collect()
    };
    let before = slots(&lab);
    assert_eq!(before.len(), 3);

    lab.ip(
        Place::Gateway,
        "link set green address 02:00:00:00:00:77 mtu 1400",
    )
    .unwrap();
    until("address and size are known", || {
        let new = [2, 0, 0, 0, 0, 0x77];
        slots(&lab).iter().any(|i| (i.mac, i.mtu) == (new, 1400))
    });

    lab.remake(Place::Green).unwrap();
    until("the program is attached again", || {
        let status = lab.status().unwrap();
        let interfaces = status["interfaces"].as_array().unwrap();
        let is_on = |i: &Value| i["mode"] == "native" && i["program_id"] != 0;
        slots(&lab) != before && interfaces.iter().all(is_on)
    });
    assert_eq!(slots(&lab).len(), 3, "the old slot is free");
    until("green is reachable", || {
        lab.tell(&["flip", "llm"]).unwrap().0 == 0
    });
    assert_eq!(once(&lab, 8000), "green");
}

/// Law 6: a host whose stack does not forward says so.
#[test]
fn a_stack_that_does_not_forward_is_named() {
    let lab = Lab::serving().unwrap();
    let log = fs::read_to_string(lab.directory().join("daemon.log")).unwrap();
    assert!(
        log.contains("net.ipv4.conf.clients.forwarding is 0"),
        "{log}"
    );
    assert!(log.contains("net.ipv6.conf.all.forwarding is 0"), "{log}");
}
