//! Server-sent events: what happened, in order, with nothing missing for whoever was
//! away for a while.

use std::{
    io::{BufRead as _, BufReader},
    os::unix::net::UnixStream,
};

use bg_tests::{
    api::{call, send, try_call},
    lab::{Lab, Place, default_service, listener},
    load::{once, until},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

fn lab(tables: &str) -> Lab {
    Lab::new()
        .unwrap()
        .served_as(&(default_service() + tables))
        .unwrap()
}

/// An event, as it came.
#[derive(Debug, PartialEq)]
struct Event {
    id: String,
    name: String,
    data: Value,
}

/// Somebody who listens.
struct Listener(BufReader<UnixStream>);

impl Listener {
    /// Listens from now on, or from behind an event.
    fn open(lab: &Lab, path: &str, last: Option<&str>) -> Self {
        let last = last.map(|id| format!("Last-Event-ID: {id}\r\n"));
        let headers = format!("Connection: close\r\n{}", last.unwrap_or_default());
        let stream = send(lab, "GET", path, &headers, "").unwrap();
        let mut listener = Self(BufReader::new(stream));
        let mut head = String::new();
        while listener.line().is_some_and(|line| {
            head += &line;
            line != "\r\n"
        }) {}
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        let kind = "content-type: text/event-stream\r\n";
        assert!(head.to_lowercase().contains(kind), "{head}");
        listener
    }

    fn line(&mut self) -> Option<String> {
        let mut line = String::new();
        (self.0.read_line(&mut line).unwrap() > 0).then_some(line)
    }

    /// The next event; `None` behind the last one.
    fn next(&mut self) -> Option<Event> {
        let mut event = Event {
            id: String::new(),
            name: String::new(),
            data: Value::Null,
        };
        loop {
            let line = self.line()?;
            let line = line.trim_end_matches(['\r', '\n']);
            if let Some(id) = line.strip_prefix("id: ") {
                id.clone_into(&mut event.id);
            } else if let Some(name) = line.strip_prefix("event: ") {
                name.clone_into(&mut event.name);
            } else if let Some(data) = line.strip_prefix("data: ") {
                event.data = serde_json::from_str(data).unwrap();
            } else if line.is_empty() && !event.name.is_empty() {
                return Some(event);
            }
            // Else it is about the size of a chunk, or a comment.
        }
    }

    /// Events until one that is like this.
    fn until(&mut self, is_last: impl Fn(&Event) -> bool) -> Vec<Event> {
        let mut events = Vec::new();
        loop {
            let event = self.next().expect("another event");
            let last = is_last(&event);
            events.push(event);
            if last {
                return events;
            }
        }
    }
}

fn names(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.name.as_str()).collect()
}

fn number(event: &Event) -> u64 {
    event.id.split_once('-').unwrap().1.parse().unwrap()
}

#[test]
fn a_flip_and_a_release_are_heard_in_order() {
    let lab = lab(
        "[[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/\"\n\
         [service.llm.bake]\nduration = \"0s\"\nsettle = \"0s\"\n[service.llm.standby]\nhold = \"1h\"\n",
    );
    let mut all = Listener::open(&lab, "/v1/events", None);
    let mut watched = lab
        .bgswitch(&["-o", "json", "monitor", "--reason", "not_ip"])
        .unwrap();
    let mut watched = watched
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watched.stdout.take().unwrap()).lines();
    let begin: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(begin["type"], "begin");

    let flipped = lab.ask(&["flip", "llm", "-m", "by hand"]).unwrap();
    lab.ask(&["rollback", "llm"]).unwrap();
    lab.ask(&["canary", "llm", "5"]).unwrap();
    lab.ask(&["release", "start", "llm", "--wait"]).unwrap();
    let events = all.until(|event| {
        event.data["detail"]
            .as_str()
            .unwrap_or_default()
            .contains(" STANDBY: ")
    });
    assert_eq!(names(&events)[..3], ["flip", "rollback", "canary"]);
    let behind = names(&events[3..]);
    let flip = behind.iter().position(|name| *name == "flip").unwrap();
    assert!(
        behind[..flip].iter().all(|name| *name == "release") && flip > 2,
        "{behind:?}"
    );
    assert!(
        behind[flip + 1..].iter().all(|name| *name == "release"),
        "{behind:?}"
    );
    let numbers: Vec<u64> = events.iter().map(number).collect();
    let first = numbers[0];
    assert_eq!(
        numbers,
        (first..first + numbers.len() as u64).collect::<Vec<_>>()
    );
    let flip = &events[0].data;
    assert_eq!(
        (&flip["schema"], &flip["type"]),
        (&json!(1), &json!("event"))
    );
    assert_eq!(
        (&flip["why"], &flip["actor"]),
        (&json!("by hand"), &json!("root(0)"))
    );
    assert_eq!(flip["at_ns"], flipped["at_ns"]);
    assert_eq!(
        (&flip["service"], &flip["generation"]),
        (&json!("llm"), &json!(1))
    );

    // `monitor` has the same objects.
    let events_of_monitor: Vec<Value> = lines
        .map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap())
        .filter(|line| line["type"] == "event")
        .take(events.len())
        .collect();
    watched.kill().unwrap();
    watched.wait().unwrap();
    let data: Vec<Value> = events.into_iter().map(|event| event.data).collect();
    let sorted = |mut all: Vec<Value>| {
        all.sort_by_key(|event| (event["at_ns"].as_u64(), event["detail"].to_string()));
        all
    };
    assert_eq!(sorted(events_of_monitor), sorted(data));
}

#[test]
fn who_was_away_hears_everything_or_how_much_is_missing() {
    let mut lab = lab("");
    let mut first = Listener::open(&lab, "/v1/events?service=llm", None);
    lab.ask(&["flip", "llm"]).unwrap();
    let seen = first.next().unwrap();
    drop(first);
    // Meanwhile.
    for _ in 0..3 {
        lab.ask(&["flip", "llm"]).unwrap();
    }
    let mut again = Listener::open(&lab, "/v1/events?service=llm", Some(&seen.id));
    let missed: Vec<Event> = (0..3).map(|_| again.next().unwrap()).collect();
    assert_eq!(names(&missed), ["flip"; 3]);
    let generations: Vec<u64> = missed
        .iter()
        .map(|event| event.data["generation"].as_u64().unwrap())
        .collect();
    assert_eq!(generations, [2, 3, 4]);
    assert_eq!(number(&missed[0]), number(&seen) + 1);

    // Another daemon's numbers say nothing to this one.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    assert_eq!(again.next(), None, "it ends with the daemon");
    lab.start().unwrap();
    let mut other = Listener::open(&lab, "/v1/events", Some(&seen.id));
    let lost = other.next().unwrap();
    assert_eq!(
        (lost.name.as_str(), &lost.data),
        ("lost", &json!({"schema": 1, "missed": null}))
    );
    // And on from there.
    lab.ask(&["flip", "llm"]).unwrap();
    let flip = other.until(|event| event.name == "flip").pop().unwrap();
    assert!(number(&flip) > number(&lost));
    let mut from_lost = Listener::open(&lab, "/v1/events", Some(&lost.id));
    assert_eq!(
        from_lost.until(|event| event.name == "flip").pop().unwrap(),
        flip
    );

    let wrong = call(&lab, "GET", "/v1/events?service=lmm", "", "");
    assert_eq!(
        (wrong.status, &wrong.body["kind"]),
        (404, &json!("not_found"))
    );
}

/// A listener who does not read keeps nobody waiting, and hears that he was cut.
#[test]
fn a_slow_listener_is_cut_and_slows_nobody() {
    let lab = lab("");
    let mut slow = Listener::open(&lab, "/v1/events", None);
    let canary = |number: u32| {
        // Long enough to fill what a socket takes.
        let why = format!("{number} {}", "x".repeat(4000));
        let body = json!({"percent": number % 50, "force": true, "why": why}).to_string();
        let set = try_call(&lab, "POST", "/v1/services/llm/canary", "", &body).unwrap();
        assert_eq!(set.status, 200, "{}", set.body);
    };
    for number in 0..1400 {
        canary(number);
    }
    assert_eq!(
        once(lab.enter(Place::Client).unwrap(), listener(8000)).unwrap(),
        "blue"
    );
    let mut heard = Vec::new();
    while let Some(event) = slow.next() {
        heard.push(event);
    }
    let lost = heard.pop().unwrap();
    assert_eq!(lost.name, "lost", "and then the end");
    let missed = lost.data["missed"].as_u64().unwrap();
    assert!(missed > 0);
    let last = heard.last().map_or(0, number);
    assert_eq!(
        last + missed,
        number(&lost),
        "every number is accounted for"
    );
    let mut again = Listener::open(&lab, "/v1/events", Some(&lost.id));
    assert_eq!(number(&again.next().unwrap()), number(&lost) + 1);

    // So many, and no more; who goes makes room.
    let mut all = vec![again];
    for _ in 1..64 {
        all.push(Listener::open(&lab, "/v1/events", None));
    }
    let refused = try_call(&lab, "GET", "/v1/events", "", "").unwrap();
    assert_eq!((refused.status, &refused.body["code"]), (409, &json!(5)));
    drop(all);
    until("there is room", || listens(&lab));
}

/// Whether one more may listen.
fn listens(lab: &Lab) -> bool {
    send(lab, "GET", "/v1/events", "", "").is_ok_and(|stream| {
        let mut line = String::new();
        let read = BufReader::new(stream).read_line(&mut line);
        read.is_ok() && line.starts_with("HTTP/1.1 200 ")
    })
}

/// Whoever stops to read, while nothing happens, too, leaves its place to others.
#[test]
fn a_reader_that_stops_is_cut_and_makes_room() {
    let lab = lab("");
    let stopped: Vec<Listener> = (0..64)
        .map(|_| Listener::open(&lab, "/v1/events", None))
        .collect();
    let refused = try_call(&lab, "GET", "/v1/events", "", "").unwrap();
    assert_eq!(refused.status, 409);
    until("those who do not read are cut", || listens(&lab));
    // Others are not: this one reads, and hears of what happens.
    let mut reads = Listener::open(&lab, "/v1/events", None);
    lab.ask(&["flip", "llm"]).unwrap();
    assert_eq!(names(&reads.until(|event| event.name == "flip")), ["flip"]);
    drop(stopped);
}
