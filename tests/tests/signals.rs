//! What the packet path hears of servers, and what a release makes of it: there are no
//! health checks here.

use std::{
    fs::File,
    net::{Shutdown, TcpListener, TcpStream},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use bg_common::service::Colour;
use bg_tests::{
    kernel::in_namespace,
    lab::{Lab, Place, default_service, listener},
    load::{self, Mood, until},
};
use nix::sys::signal::Signal;
use serde_json::Value;

const SMOKE: &str = r#"
[[service.llm.gate]]
name = "smoke"
kind = "exec"
command = ["/bin/true"]
"#;

/// The usual service with a bake, and green servers of a mood.
fn lab(bake: &str) -> (Lab, Arc<Mood>) {
    let mood = Arc::default();
    let service = default_service() + SMOKE + "[service.llm.bake]\n" + bake;
    let lab = Lab::new().unwrap().served_in(&service, &mood).unwrap();
    (lab, mood)
}

fn client(lab: &Lab) -> File {
    lab.enter(Place::Client).unwrap()
}

fn colour(lab: &Lab, name: &str) -> Value {
    lab.status().unwrap()["services"][0]["colours"][name].clone()
}

fn active(lab: &Lab) -> String {
    let active = &lab.status().unwrap()["services"][0]["active"];
    active.as_str().unwrap().to_owned()
}

/// The usual bake settles for a minute, and listens.
#[test]
fn a_version_that_fails_a_tenth_of_its_requests_is_rolled_back_at_once() {
    let (lab, mood) = lab("");
    let load = lab.load().unwrap();
    mood.fail(100);
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 10, "{out}{err}");
    assert!(
        err.contains("ROLLED_BACK: green fails: ") && err.contains("answers have a status of 5xx"),
        "{err}"
    );
    assert_eq!(active(&lab), "blue");
    let history = lab.ask(&["history", "llm"]).unwrap();
    let mut entries = history["entries"].as_array().unwrap().iter();
    let told = |entry: &Value| {
        entry["action"] == "rollback"
            && entry["actor"] == "bgswitch"
            && entry["why"].as_str().is_some_and(|why| {
                why.starts_with("r-1: green fails: ") && why.contains("have a status of 5xx")
            })
    };
    assert!(entries.any(told), "{history}");
    let answers = load.finish().unwrap();
    let hurt = answers.iter().filter(|answer| answer.result.is_err());
    let first = mood.failed_ns.load(Ordering::Relaxed);
    let hurt: Vec<_> = hurt.collect();
    assert!(!hurt.is_empty() && first > 0);
    let last = hurt.iter().map(|answer| answer.done_ns).max();
    println!(
        "{} of {} requests were hurt, the last {} ms after the first bad answer",
        hurt.len(),
        answers.len(),
        last.map_or(0, |last| (last - first) / 1_000_000)
    );
}

#[test]
fn a_version_that_is_slow_behind_the_settling_is_rolled_back() {
    let (lab, mood) = lab("settle = \"3s\"\n");
    let load = lab.load().unwrap();
    mood.slow_down(Duration::from_millis(150));
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 10, "{out}{err}");
    assert!(err.contains("9 of 10 answers began within "), "{err}");
    assert_eq!(active(&lab), "blue");
    // Flows of the colour that was left are reset.
    drop(load);
}

#[test]
fn a_good_version_bakes_by_what_is_heard_also_over_a_restart() {
    let (mut lab, _) = lab("settle = \"1s\"\nduration = \"5s\"\n");
    let load = lab.load().unwrap();
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it bakes", || {
        lab.status().unwrap()["services"][0]["state"] == "BAKING"
    });
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.start().unwrap();
    let (code, out, err) = lab.tell(&["release", "status", "llm", "--wait"]).unwrap();
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("the bake is over, green is well"), "{out}");
    assert_eq!(active(&lab), "green");
    load::assert_flawless(&load.finish().unwrap());
}

/// With the usual bake a version without anything to compare with fails by half of its
/// requests, not by a tenth.
#[test]
fn what_the_old_colour_was_like_outlives_a_kill_right_behind_the_flip() {
    let (mut lab, mood) = lab("settle = \"0s\"\n");
    let load = lab.load().unwrap();
    until("blue is heard", || {
        let heard = &colour(&lab, "blue")["signals"];
        heard["answers"].as_u64() >= Some(100)
    });
    // Without new flows a flip waits for one, and its result is written behind that.
    load::assert_flawless(&load.finish().unwrap());
    mood.fail(100);
    let (words, service) = lab.words().unwrap();
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it is flipped", || {
        words.word(service).active() == Colour::Green
    });
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let kept = lab.directory().join("state/releases/llm.json");
    let kept = std::fs::read_to_string(kept).unwrap();
    let kept: Value = serde_json::from_str(&kept).unwrap();
    let baseline = &kept["machine"]["release"]["baseline"];
    assert!(baseline["answers"].as_u64() >= Some(100), "{kept}");

    lab.start().unwrap();
    let load = lab.load().unwrap();
    let (code, out, err) = lab.tell(&["release", "status", "llm", "--wait"]).unwrap();
    assert_eq!(code, 10, "{out}{err}");
    assert_eq!(active(&lab), "blue");
    drop(load);
}

#[test]
fn a_release_is_watched_while_somebody_asks_all_the_time() {
    let (lab, mood) = lab("settle = \"0s\"\nduration = \"20s\"\n");
    let load = lab.load().unwrap();
    mood.fail(100);
    lab.ask(&["release", "start", "llm"]).unwrap();
    let state = || {
        // Refused, or too late.
        let (code, ..) = lab.tell(&["standby", "retire", "llm"]).unwrap();
        assert_eq!(code, 5);
        lab.status().unwrap()["services"][0]["state"].clone()
    };
    until("it has flipped", || state() == "BAKING");
    until("it is over", || state() != "BAKING");
    until("it is back", || state() != "SWITCHING");
    assert_eq!(state(), "ROLLED_BACK");
    assert_eq!(active(&lab), "blue");
    drop(load);
}

#[test]
fn a_bake_in_which_nothing_is_heard_is_no_pass() {
    let (lab, _) = lab("settle = \"0s\"\nduration = \"2s\"\n");
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 7, "{out}{err}");
    assert!(err.contains("too little is known of green"), "{err}");
    assert_eq!(active(&lab), "green");
}

#[test]
fn each_connection_and_each_answer_is_heard_once() {
    let (lab, mood) = lab("");
    lab.ask(&["flip", "llm"]).unwrap();
    for fails in [false, true, false] {
        mood.fail(if fails { 1000 } else { 0 });
        let answer = load::once(client(&lab), listener(8000));
        assert_eq!(answer.is_err(), fails);
    }
    let heard = &colour(&lab, "green")["signals"];
    for (what, count) in [
        ("opened", 3),
        ("opened_again", 0),
        ("accepted", 3),
        ("refused", 0),
        ("reset", 0),
        ("answers", 3),
    ] {
        assert_eq!(heard[what], count, "{what} of {heard}");
    }
    assert_eq!(
        heard["status"],
        serde_json::json!([0, 2, 0, 0, 1]),
        "{heard}"
    );
    assert!(heard["answer"]["p50_us"].as_u64() > Some(0), "{heard}");
    assert_eq!(colour(&lab, "blue")["signals"]["opened"], 0);
    let text = lab.tell(&["status", "llm"]).unwrap().1;
    assert!(
        text.contains(
            "heard: 3 connections, 0 not taken, 0 reset; 3 answers, 1 of 5xx, 9 of 10 within "
        ),
        "{text}"
    );
}

/// Nobody listens at 8001 here; at 8000 somebody takes a connection, and resets it.
#[test]
fn refusals_and_resets_of_servers_are_heard() {
    let service = default_service() + "[service.llm.bake]\n";
    let mut lab = Lab::new().unwrap();
    lab.configure(&service).unwrap();
    let rude = in_namespace(&lab.enter(Place::Blue).unwrap(), || {
        TcpListener::bind(("::", 8000)).unwrap()
    });
    let server = std::thread::spawn(move || {
        let (stream, _) = rude.accept().unwrap();
        // What was not read is answered with a reset at the end.
        let mut byte = [0];
        stream.peek(&mut byte).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
    });
    lab.start().unwrap();
    in_namespace(&client(&lab), || {
        use std::io::{Read as _, Write as _};
        let refused = TcpStream::connect(listener(8001));
        assert_eq!(
            refused.unwrap_err().kind(),
            std::io::ErrorKind::ConnectionRefused
        );
        let mut stream = TcpStream::connect(listener(8000)).unwrap();
        stream.write_all(b"who is there?").unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
    });
    server.join().unwrap();
    until("the reset is heard", || {
        colour(&lab, "blue")["signals"]["reset"] == 1
    });
    let heard = &colour(&lab, "blue")["signals"];
    assert_eq!(
        (&heard["opened"], &heard["refused"]),
        (&2.into(), &1.into()),
        "{heard}"
    );
}
