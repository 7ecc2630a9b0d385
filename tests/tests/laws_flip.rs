//! Flips: one word decides (law 1), established flows stay (law 2), and what is
//! said of them is true (law 10).

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::sleep,
    time::{Duration, Instant},
};

use bg_common::service::Colour;
use bg_tests::{
    conversation::{Conversation, Datagrams},
    flipper::Flipper,
    lab::{Lab, Place, SERVERS, listener, listener_v6, service},
    load::{Load, Reuse, assert_flawless, mix, now_ns, stream},
};
use serde_json::Value;

/// What one new connection got, and when its SYN was under way.
struct Chosen {
    begun: u64,
    done: u64,
    colour: String,
}

/// Law 1: whatever the word said while a connection was made is what answered
/// it, on every port and over both families, a thousand flips a second.
#[test]
fn every_port_of_a_service_switches_in_the_same_store() {
    let lab = Lab::serving().unwrap();
    let load = Load::start(
        lab.enter(Place::Client).unwrap(),
        mix(12),
        Duration::from_millis(5),
    );
    let (words, service) = lab.words().unwrap();
    let flipper = Flipper::start(words, service, Some(Duration::from_micros(900)));
    let ports = [listener(8000), listener(8001), listener_v6(8000)];
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..2)
        .map(|_| {
            let namespace = lab.enter(Place::Client).unwrap();
            let stop = Arc::clone(&stop);
            std::thread::spawn(move || {
                let mut rounds = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    rounds.push(ports.map(|to| {
                        let begun = now_ns();
                        let mut conversation = Conversation::open(&namespace, to).unwrap();
                        let done = now_ns();
                        let colour = conversation.ask().unwrap();
                        conversation.reset().unwrap();
                        Chosen {
                            begun,
                            done,
                            colour,
                        }
                    }));
                }
                rounds
            })
        })
        .collect();
    sleep(Duration::from_secs(3));
    stop.store(true, Ordering::Relaxed);
    let rounds: Vec<_> = clients
        .into_iter()
        .flat_map(|client| client.join().unwrap())
        .collect();
    let story = flipper.finish();
    assert_flawless(&load.finish().unwrap());

    let mut certain = [[0; 2]; 3];
    let mut alike = 0;
    for round in &rounds {
        for (port, chosen) in round.iter().enumerate() {
            let Chosen {
                begun,
                done,
                colour,
            } = chosen;
            assert!(
                story.allows(colour, *begun, *done),
                "{} answered {colour} to a connection made from {begun} to {done} ns",
                ports[port]
            );
            if let Some(only) = story.only(*begun, *done) {
                certain[port][only as usize] += 1;
            }
        }
        if story.only(round[0].begun, round[2].done).is_some() {
            assert!(round.iter().all(|chosen| chosen.colour == round[0].colour));
            alike += 1;
        }
    }
    println!(
        "{} flips, {} rounds, certain {certain:?}, alike {alike}",
        story.flips(),
        rounds.len()
    );
    assert!(
        certain.iter().flatten().all(|n| *n > 20) && alike > 0,
        "too few connections fell between two flips: {certain:?}, {alike}"
    );
}

/// Law 1: the colour and the generation of a flow come from one reading of the
/// word, however fast it changes.
#[test]
fn no_flow_is_born_of_two_words() {
    let lab = Lab::serving().unwrap();
    let (words, service) = lab.words().unwrap();
    let flipper = Flipper::start(words, service, None);
    let clients = mix(24)
        .into_iter()
        .map(|(to, _)| (to, Reuse::Never))
        .collect();
    let load = Load::start(lab.enter(Place::Client).unwrap(), clients, Duration::ZERO);
    sleep(Duration::from_millis(1500));
    assert_flawless(&load.finish().unwrap());
    let story = flipper.finish();
    // Blue began with generation 0, and every flip took the other colour.
    let flows = lab.ask(&["flows", "llm", "--all"]).unwrap();
    let flows = flows["flows"].as_array().unwrap();
    println!("{} flips, {} flows looked at", story.flips(), flows.len());
    assert!(flows.len() > 100 && story.flips() > 10_000);
    for flow in flows {
        let even = flow["generation"].as_u64().unwrap() % 2 == 0;
        assert_eq!(
            flow["colour"],
            if even { "blue" } else { "green" },
            "{flow}"
        );
    }
}

/// Law 2: clients that keep their connection stay on blue, a long answer
/// outlives the flip, and every connection made after the store is green's.
#[test]
fn established_flows_outlive_a_drain_flip_and_new_ones_take_green() {
    let lab = Lab::serving().unwrap();
    let client = || lab.enter(Place::Client).unwrap();
    let load = Load::start(client(), mix(48), Duration::from_millis(5));
    let streams = [listener(8001), listener_v6(8000)].map(|to| stream(client(), to, 3));
    load.advance(960);
    let flipped = lab.ask(&["flip", "llm"]).unwrap();
    load.advance(960);
    let answers = load.finish().unwrap();
    assert_flawless(&answers);

    let before = flipped["at_ns"].as_u64().unwrap();
    let after = before + flipped["store_ns"].as_u64().unwrap();
    let (mut stayed, mut new) = (0, 0);
    for answer in &answers {
        let colour = answer.result.as_deref().unwrap();
        if answer.connected_ns > after {
            assert_eq!(colour, "green", "{answer:?}");
            new += 1;
        } else if answer.done_ns < before || !answer.first {
            assert_eq!(colour, "blue", "{answer:?}");
            stayed += usize::from(answer.done_ns > after);
        }
    }
    println!("{stayed} answers by old flows, {new} by new ones");
    assert!(stayed > 20 && new > 20);
    for stream in streams {
        let lines = stream.join().unwrap().unwrap();
        assert_eq!(lines, vec!["blue"; 60]);
    }
}

/// How a conversation ends.
type Ending = fn(Conversation) -> std::io::Result<()>;

/// Law 2: a SYN takes the word's colour also when an old flow, closed or only
/// silent, had the same tuple; and what it begins stays there.
#[test]
fn a_syn_on_the_tuple_of_an_old_flow_takes_the_words_colour() {
    let lab = Lab::serving().unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    let endings: [Ending; 2] = [Conversation::reset, Conversation::vanish];
    let tuples = [
        ("198.51.100.11", listener(8000)),
        ("2001:db8:c::10", listener_v6(8000)),
    ];
    let mut old = Vec::new();
    for (n, ending) in endings.into_iter().enumerate() {
        for (from, to) in tuples {
            let from = (from.parse::<std::net::IpAddr>().unwrap(), 40_000 + n as u16).into();
            let mut conversation = Conversation::open_from(&namespace, from, to).unwrap();
            assert_eq!(conversation.ask().unwrap(), "blue");
            old.push((conversation, ending, from, to));
        }
    }
    lab.ask(&["flip", "llm"]).unwrap();
    for (mut conversation, ending, from, to) in old {
        assert_eq!(conversation.ask().unwrap(), "blue");
        ending(conversation).unwrap();
        let mut again = Conversation::open_from(&namespace, from, to).unwrap();
        for _ in 0..3 {
            assert_eq!(again.ask().unwrap(), "green", "{from} to {to}");
        }
    }
}

/// Law 2: a UDP flow that talks stays on blue; one that was silent for longer
/// than `udp_idle` is new, and takes the word's colour; so does a new socket.
#[test]
fn a_udp_flow_that_talks_stays_and_one_that_was_silent_is_new() {
    let idle = Duration::from_secs(2);
    let lab = Lab::new()
        .unwrap()
        .served_as(&service("udp_idle = \"2s\"", SERVERS));
    let lab = lab.unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    for to in [listener(4433), listener_v6(4433)] {
        let begun = lab.status().unwrap()["services"][0]["active"].clone();
        let [talks, silent] = [(); 2].map(|()| Datagrams::open(&namespace, to).unwrap());
        assert_eq!(talks.ask().unwrap(), begun);
        assert_eq!(silent.ask().unwrap(), begun);
        let flipped = lab.ask(&["flip", "llm"]).unwrap()["to"].clone();
        let new = Datagrams::open(&namespace, to).unwrap();
        assert_eq!(new.ask().unwrap(), flipped);

        let deadline = Instant::now() + idle + Duration::from_millis(700);
        let (mut last, mut steady) = (Instant::now(), true);
        while Instant::now() < deadline {
            // On a machine that is busy elsewhere even this one falls silent.
            steady &= last.elapsed() < idle / 2;
            last = Instant::now();
            let colour = talks.ask().unwrap();
            assert!(colour == begun || !steady, "{colour} for a flow that talks");
            sleep(Duration::from_millis(50));
        }
        assert_eq!(silent.ask().unwrap(), flipped, "after {idle:?} of silence");
    }
}

/// Law 2: a drain lasts as long as was asked; then old flows are reset, talking
/// or listening, and new connections are green's.
#[test]
fn when_the_drain_deadline_passes_old_flows_are_reset() {
    let lab = Lab::new().unwrap();
    let lab = lab
        .served_as(&service("reset_over = \"1s\"", SERVERS))
        .unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    let mut talking: Vec<_> = [listener(8000), listener_v6(8000)]
        .map(|to| Conversation::open(&namespace, to).unwrap())
        .into();
    let mut listening = Conversation::open(&namespace, listener(8001)).unwrap();
    for conversation in &mut talking {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    assert_eq!(listening.listen(60).unwrap(), "blue");
    let drain = Duration::from_secs(1);
    let flipped = lab.ask(&["flip", "llm", "--drain", "1s"]).unwrap();
    assert!(flipped["draining_until"].is_string());
    assert_eq!(lab.status().unwrap()["services"][0]["state"], "STEADY");

    let error = listening.to_its_end().unwrap_err();
    let lasted = now_ns() - flipped["at_ns"].as_u64().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    assert!(
        Duration::from_nanos(lasted) >= drain,
        "reset {lasted} ns after a flip with a drain of {drain:?}"
    );
    for mut conversation in talking {
        let error = loop {
            match conversation.ask() {
                Ok(colour) => assert_eq!(colour, "blue"),
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
    let mut new = Conversation::open(&namespace, listener(8000)).unwrap();
    assert_eq!(new.ask().unwrap(), "green");
    assert_eq!(lab.status().unwrap()["services"][0]["state"], "STEADY");
    let history = lab.ask(&["history"]).unwrap();
    let entries = history["entries"].as_array().unwrap();
    assert!(entries.iter().any(|entry| entry["action"] == "drain_end"));
}

/// Law 10: a flip says how many flows stay where they are, `flows` and `status`
/// say the same, and none of them calls it done before it is.
#[test]
fn a_flip_says_what_is_true() {
    const OLD: usize = 7;
    let lab = Lab::serving().unwrap();
    let namespace = lab.enter(Place::Client).unwrap();
    let mut old: Vec<_> = (0..OLD)
        .map(|n| [listener(8000), listener(8001), listener_v6(8000)][n % 3])
        .map(|to| Conversation::open(&namespace, to).unwrap())
        .collect();
    for conversation in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    let service = |status: &Value| status["services"][0].clone();
    let before = service(&lab.status().unwrap());
    let dry = lab.ask(&["flip", "llm", "--dry-run"]).unwrap();
    assert_eq!(
        (&dry["dry_run"], &dry["to"]),
        (&true.into(), &"green".into())
    );
    assert!(dry["at_ns"].is_null() && dry["draining_until"].is_null());
    let after = service(&lab.status().unwrap());
    for part in ["active", "generation", "state"] {
        assert_eq!(after[part], before[part], "{part}");
    }

    let (code, text, _) = lab.tell(&["flip", "llm", "-m", "model@2"]).unwrap();
    assert_eq!(code, 0);
    assert!(
        text.starts_with("llm  blue -> green   generation 0 -> 1   stored in "),
        "{text}"
    );
    for part in [
        "no new flow yet; the next one goes to green",
        &format!("; {OLD} flows stay on blue until "),
        "undo: bgswitch rollback llm",
    ] {
        assert!(text.contains(part), "no `{part}` in {text}");
    }
    let status = service(&lab.status().unwrap());
    assert_eq!(
        (&status["active"], &status["state"]),
        (&"green".into(), &"STEADY".into())
    );
    assert_eq!(status["colours"]["blue"]["flows"], OLD);
    assert_eq!(status["colours"]["green"]["flows"], 0);
    let flows = lab.ask(&["flows", "llm", "--colour", "blue"]).unwrap();
    let listed = flows["flows"].as_array().unwrap();
    assert_eq!((&flows["total"], listed.len()), (&OLD.into(), OLD));
    for conversation in &old {
        let client = conversation.local().unwrap().to_string();
        let line = listed.iter().find(|flow| flow["client"] == *client);
        let line = line.unwrap_or_else(|| panic!("{client} is not in {flows}"));
        assert_eq!(
            (&line["colour"], &line["generation"]),
            (&"blue".into(), &0.into())
        );
        assert!(SERVERS[Colour::Blue as usize].contains(&line["backend"].as_str().unwrap()));
    }

    // Back, with somebody new on the way: the old flows of green are none.
    let back = lab.ask(&["flip", "llm"]).unwrap();
    assert_eq!(
        (&back["to"], &back["generation"]),
        (&"blue".into(), &2.into())
    );
    assert_eq!(
        (&back["old_flows"], &back["first_new_flow_us"]),
        (&0.into(), &Value::Null)
    );
    let load = Load::start(namespace, mix(6), Duration::from_millis(2));
    load.advance(20);
    let (_, text, _) = lab.tell(&["flip", "llm"]).unwrap();
    assert!(text.contains("\nfirst new flow on green after "), "{text}");
    assert_flawless(&load.finish().unwrap());
}

/// Law 10: what was not done has its own exit code, and changed nothing.
#[test]
fn what_was_not_done_has_its_own_exit_code() {
    let mut lab = Lab::serving().unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    for (words, code) in [
        (vec!["flip", "llm", "--if-generation", "0"], 5),
        (vec!["flip", "llm", "--to", "green"], 5),
        (vec!["flip", "nobody"], 2),
        (vec!["flip", "llm", "--to", "red"], 2),
        (vec!["flows", "nobody"], 2),
        (vec!["status", "nobody"], 2),
    ] {
        let (got, out, err) = lab.tell(&words).unwrap();
        assert_eq!(got, code, "{words:?}: {err}");
        assert!(out.is_empty() && !err.is_empty(), "{words:?}: {out}");
    }
    let status = lab.status().unwrap();
    assert_eq!(status["services"][0]["active"], "green");
    assert_eq!(status["services"][0]["generation"], 1);

    lab.end_daemon(nix::sys::signal::Signal::SIGTERM).unwrap();
    for words in [vec!["flip", "llm"], vec!["status"], vec!["flows", "llm"]] {
        let (code, _, err) = lab.tell(&words).unwrap();
        assert_eq!(code, 3, "{words:?}: {err}");
    }
}
