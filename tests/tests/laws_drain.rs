//! Drains and their ends: established flows stay until the deadline (law 2), the
//! word says how far its resets are (law 4), and a flip or a rollback in between
//! moves only what the laws say.

use std::{
    fs,
    io::ErrorKind,
    net::SocketAddr,
    thread::sleep,
    time::{Duration, Instant},
};

use bg_common::service::{CutoverWord, SPREADS};
use bg_tests::{
    conversation::{Conversation, Datagrams},
    flows::flow_of,
    lab::{Lab, Place, SERVERS, listener, listener_v6, service},
};
use nix::sys::signal::Signal;
use serde_json::Value;

/// The spread in the middle.
const HALF: u8 = SPREADS / 2;

/// Waits for what will be so, however slow the machine is.
fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(2);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        sleep(Duration::from_millis(20));
    }
}

fn lab(keys: &str) -> Lab {
    Lab::new()
        .unwrap()
        .served_as(&service(keys, SERVERS))
        .unwrap()
}

fn open(lab: &Lab, to: SocketAddr, colour: &str) -> Conversation {
    let namespace = lab.enter(Place::Client).unwrap();
    let mut conversation = Conversation::open(&namespace, to).unwrap();
    assert_eq!(conversation.ask().unwrap(), colour);
    conversation
}

/// So many connections, over both families.
fn open_many(lab: &Lab, colour: &str, count: usize) -> Vec<Conversation> {
    (0..count)
        .map(|n| [listener(8000), listener_v6(8000), listener(8001)][n % 3])
        .map(|to| open(lab, to, colour))
        .collect()
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

/// The conversations whose spread is at least `spared`, and the others.
fn split(lab: &Lab, all: Vec<Conversation>, spared: u8) -> (Vec<Conversation>, Vec<Conversation>) {
    all.into_iter()
        .partition(|one| flow_of(lab, one).unwrap().colour_spread >> 1 >= spared)
}

fn colour(lab: &Lab, colour: &str) -> Value {
    lab.status().unwrap()["services"][0]["colours"][colour].clone()
}

fn word(lab: &Lab) -> CutoverWord {
    let (words, id) = lab.words().unwrap();
    words.word(id)
}

/// Stores how far the resets are, as the daemon does.
fn spare(lab: &Lab, spared: u8) {
    let (words, id) = lab.words().unwrap();
    loop {
        let word = words.word(id);
        if words.store(id, word, word.drained(spared)).is_ok() {
            return;
        }
    }
}

fn has_ended_drain(lab: &Lab, service: &str) -> bool {
    let history = lab.ask(&["history"]).unwrap();
    let mut entries = history["entries"].as_array().unwrap().iter();
    entries.any(|entry| {
        let of = (&entry["service"], &entry["action"], &entry["phase"]);
        of == (&service.into(), &"drain_end".into(), &"result".into())
    })
}

/// Law 2: what the word spares lives, what it does not is reset with its next
/// packet, at every stage of a drain's end, over both families and UDP.
#[test]
fn a_flow_is_reset_when_the_word_no_longer_spares_its_spread() {
    let mut lab = lab("drain = \"1h\"");
    let client = lab.enter(Place::Client).unwrap();
    let mut left = open_many(&lab, "blue", 48);
    let datagrams = Datagrams::open(&client, listener(4433)).unwrap();
    assert_eq!(datagrams.ask().unwrap(), "blue");
    lab.ask(&["flip", "llm"]).unwrap();
    let mut new = open_many(&lab, "green", 6);
    // Nobody but this test moves the word.
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let mut stages = 0;
    for spared in [127, 96, 64, 32, 1, 0] {
        spare(&lab, spared);
        let (mut due, spared) = split(&lab, left, spared);
        are_reset(&mut due);
        left = spared;
        live_on(&mut left, "blue");
        stages += usize::from(!due.is_empty());
    }
    assert!(left.is_empty());
    assert!(stages >= 3, "48 flows fell in {stages} stages only");
    assert_eq!(datagrams.ask().unwrap(), "green");
    live_on(&mut new, "green");
}

/// Law 2: the resets at a deadline are spread over `reset_over`: not all of them in
/// the first step, all of them at its end, and the status counts both (law 10).
#[test]
fn resets_at_a_deadline_are_spread() {
    const OLD: u64 = 48;
    let lab = lab("reset_over = \"8s\"");
    let mut old = open_many(&lab, "blue", OLD as usize);
    let flipped = lab.ask(&["flip", "llm", "--drain", "0s"]).unwrap();
    assert_eq!(
        (&flipped["drain_end"], &flipped["reset_over_s"]),
        (&"reset".into(), &8.into())
    );
    assert_ne!(flipped["draining_until"], flipped["resets_until"]);
    let (mut before, mut both) = (OLD, 0);
    until("the last flow's reset is due", || {
        let blue = colour(&lab, "blue");
        let count = |key: &str| blue[key].as_u64().unwrap();
        let (draining, resetting) = (count("draining_flows"), count("resetting_flows"));
        assert_eq!((draining + resetting, count("flows")), (OLD, OLD));
        assert!(draining <= before, "{draining} after {before}");
        if draining < before && draining > 0 {
            both += 1;
        }
        // The drain may end between the reading of the word and that of the deadline.
        if draining > 0 && !blue["resets_until"].is_null() {
            assert_eq!(blue["resets_until"], flipped["resets_until"]);
        }
        before = draining;
        draining == 0
    });
    assert!(both >= 2, "steps that left some flows: {both}");
    until("the drain is over", || has_ended_drain(&lab, "llm"));
    assert_eq!(word(&lab).drain_spares(), 0);
    are_reset(&mut old);
    let blue = colour(&lab, "blue");
    assert_eq!(
        (&blue["flows"], &blue["drain_end"], &blue["resets_until"]),
        (&0.into(), &Value::Null, &Value::Null)
    );
    open_many(&lab, "green", 3);
}

/// Law 2: without a window, all flows are reset when the deadline passes.
#[test]
fn without_a_window_all_flows_are_reset_at_once() {
    let lab = lab("reset_over = \"0s\"");
    let mut old = open_many(&lab, "blue", 24);
    let flipped = lab.ask(&["flip", "llm", "--drain", "0s"]).unwrap();
    assert_eq!(flipped["draining_until"], flipped["resets_until"]);
    until("the floor has risen", || word(&lab).floor().is_some());
    assert_eq!(word(&lab).spared(), 0);
    are_reset(&mut old);
}

/// Law 2, `drain_end = "keep"`: no deadline passes, nothing is reset, and that is
/// what is said; but a drain that is asked for has its end.
#[test]
fn with_keep_old_flows_stay_until_they_end() {
    let keys = "drain_end = \"keep\"\ndrain = \"0s\"\nreset_over = \"0s\"";
    let embed = "[service.embed]\nlisten = [\"tcp://203.0.113.10:8002\"]\ndrain = \"0s\"\n\
                 reset_over = \"0s\"\n[service.embed.blue]\nbackends = [\"10.0.1.10\"]\n\
                 [service.embed.green]\nbackends = [\"10.0.2.10\"]\n";
    // In the status, services come by their names.
    let text = service(keys, SERVERS).replace("service.llm", "service.a") + embed;
    let lab = Lab::new().unwrap().served_as(&text).unwrap();
    let mut old = open_many(&lab, "blue", 6);
    let dry = lab.tell(&["flip", "a", "--dry-run"]).unwrap().1;
    assert!(
        dry.contains("\n6 flows would stay on blue until they end\n"),
        "{dry}"
    );
    let text = lab.tell(&["flip", "a"]).unwrap().1;
    assert!(
        text.contains("; 6 flows stay on blue until they end\n"),
        "{text}"
    );
    // The same deadline, and later: when this one has passed, the other one has.
    lab.ask(&["flip", "embed"]).unwrap();
    until("the other drain is over", || has_ended_drain(&lab, "embed"));
    live_on(&mut old, "blue");
    assert_eq!(word(&lab).floor(), None);
    let blue = colour(&lab, "blue");
    assert_eq!(
        (
            &blue["drain_end"],
            &blue["draining_until"],
            &blue["draining_flows"]
        ),
        (&"keep".into(), &Value::Null, &6.into())
    );
    let text = lab.tell(&["status", "a"]).unwrap().1;
    assert!(text.starts_with("a  draining blue  "), "{text}");
    assert!(text.contains("6 flows, until they end\n"), "{text}");

    let flipped = lab.ask(&["flip", "a", "--to", "blue"]).unwrap();
    assert_eq!(flipped["drain_end"], "keep");
    let flipped = lab.ask(&["flip", "a", "--drain", "0s"]).unwrap();
    assert_eq!(flipped["drain_end"], "reset");
    until("the drain is over", || has_ended_drain(&lab, "a"));
    are_reset(&mut old);
}

/// Law 2: flips back and forth, faster than anybody connects: every flow stays on
/// the colour it was born on, and when a drain ends it is that of the last flip.
#[test]
fn flips_back_and_forth_move_no_flow() {
    let lab = lab("reset_over = \"0s\"\ndrain = \"1h\"");
    let mut flows = [open_many(&lab, "blue", 3), Vec::new()];
    for generation in 1..=7 {
        let flipped = lab.ask(&["flip", "llm"]).unwrap();
        assert_eq!(flipped["generation"], generation);
        let to = flipped["to"].as_str().unwrap();
        flows[generation % 2].extend(open_many(&lab, to, 3));
        let [blue, green] = &mut flows;
        live_on(blue, "blue");
        live_on(green, "green");
    }
    // Blue's flows of four generations are standby; green's of three go down.
    let flipped = lab.ask(&["flip", "llm", "--drain", "0s"]).unwrap();
    assert_eq!(
        (&flipped["to"], &flipped["old_flows"]),
        (&"blue".into(), &12.into())
    );
    until("the drain is over", || has_ended_drain(&lab, "llm"));
    let [mut blue, mut green] = flows;
    are_reset(&mut green);
    live_on(&mut blue, "blue");
}

/// A lab in which blue's old flows are reset, half of them already: an hour is left
/// for the rest.
fn half_reset() -> (Lab, Vec<Conversation>, Vec<Conversation>) {
    let lab = lab("reset_over = \"1h\"");
    let old = open_many(&lab, "blue", 24);
    lab.ask(&["flip", "llm", "--drain", "0s"]).unwrap();
    until("the resets have begun", || word(&lab).floor().is_some());
    spare(&lab, HALF);
    let (due, spared) = split(&lab, old, HALF);
    assert!(!due.is_empty() && !spared.is_empty());
    (lab, due, spared)
}

/// Law 2: a flip back while old flows are reset ends that: those that are left live
/// on, also those that were due and have not sent anything since.
#[test]
fn a_flip_while_flows_are_reset_spares_those_that_are_left() {
    let (lab, mut due, mut spared) = half_reset();
    let mut silent = due.split_off(due.len() / 2);
    are_reset(&mut due);
    let mut green = open_many(&lab, "green", 6);
    let flipped = lab.ask(&["flip", "llm", "--drain", "1h"]).unwrap();
    assert_eq!(
        (&flipped["to"], &flipped["old_flows"]),
        (&"blue".into(), &6.into())
    );
    live_on(&mut spared, "blue");
    live_on(&mut silent, "blue");
    live_on(&mut green, "green");
    assert_eq!(colour(&lab, "blue")["drain_end"], Value::Null);
    assert_eq!(colour(&lab, "green")["drain_end"], "reset");
}

/// Law 2: a rollback while old flows are reset cuts the bad colour's flows, all of
/// them at once, and spares the good colour's that are left.
#[test]
fn a_rollback_while_flows_are_reset_cuts_the_bad_colour_only() {
    let (lab, mut due, mut spared) = half_reset();
    are_reset(&mut due);
    let mut bad = open_many(&lab, "green", 12);
    let back = lab.ask(&["rollback", "llm"]).unwrap();
    assert_eq!(
        (&back["to"], &back["old_flows"]),
        (&"blue".into(), &12.into())
    );
    are_reset(&mut bad);
    live_on(&mut spared, "blue");
    open_many(&lab, "blue", 3);
    let blue = colour(&lab, "blue");
    assert_eq!(
        (&blue["drain_end"], &blue["resetting_flows"]),
        (&Value::Null, &0.into())
    );
}

/// Law 4: a daemon that starts while old flows are reset goes on from where the
/// word is, whatever its file says: nobody is spared again, and not all the rest
/// is reset at once.
#[test]
fn a_restart_while_flows_are_reset_goes_on_from_the_word() {
    let (mut lab, mut due, mut spared) = half_reset();
    let file = lab.directory().join("state/state.json");
    for state in [None, Some("\0garbage {")] {
        lab.end_daemon(Signal::SIGKILL).unwrap();
        are_reset(&mut due.pop().into_iter().collect::<Vec<_>>());
        if let Some(garbage) = state {
            fs::write(&file, garbage).unwrap();
        }
        lab.start().unwrap();
        let spares = word(&lab).drain_spares();
        assert!((HALF - 2..=HALF).contains(&spares), "{spares}");
        let blue = colour(&lab, "blue");
        assert_eq!(blue["drain_end"], "reset");
        assert!(blue["resets_until"].is_string());
        assert!(blue["draining_flows"].as_u64() > Some(0), "{blue}");
    }
    are_reset(&mut due);
    spared.retain(|one| flow_of(&lab, one).unwrap().colour_spread >> 1 < HALF - 3);
    live_on(&mut spared, "blue");
    let history = lab.ask(&["history"]).unwrap();
    let mut entries = history["entries"].as_array().unwrap().iter();
    assert!(
        !entries.any(|entry| entry["action"] == "changed_outside"),
        "{history}"
    );
}

/// Law 3: the resets stand still without the daemon, and it brings them to their end
/// when it is back; a deadline that passed meanwhile begins then, in its time.
#[test]
fn resets_wait_for_the_daemon_and_come_to_their_end() {
    let window = Duration::from_secs(10);
    let mut lab = lab("reset_over = \"10s\"");
    let mut old = open_many(&lab, "blue", 12);
    lab.ask(&["flip", "llm", "--drain", "1s"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    sleep(window + Duration::from_secs(3));
    live_on(&mut old, "blue");
    assert_eq!(word(&lab).floor(), None);
    lab.start().unwrap();
    assert!(word(&lab).drain_spares() > 0, "they take {window:?}");
    until("the resets have begun", || word(&lab).floor().is_some());
    drop(lab);

    let mut lab = self::lab("reset_over = \"5s\"");
    let mut old = open_many(&lab, "blue", 12);
    lab.ask(&["flip", "llm", "--drain", "0s"]).unwrap();
    until("some are due, some are not", || {
        word(&lab).floor().is_some()
    });
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let stands = word(&lab);
    sleep(Duration::from_secs(1));
    assert_eq!(word(&lab), stands);
    lab.start().unwrap();
    until("the drain is over", || word(&lab).drain_spares() == 0);
    are_reset(&mut old);
    until("it is in the journal", || has_ended_drain(&lab, "llm"));
}
