//! Metrics: what Prometheus reads is OpenMetrics, agrees with `status`, and outlives the
//! daemon where the packet path counts.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::SocketAddr,
    time::{SystemTime, UNIX_EPOCH},
};

use bg_tests::{
    conversation::Conversation,
    lab::{Lab, Place, SERVERS, default_service, listener, listener_v6, service},
    load::{once, until},
    scrape::{Families, connect, find, request, sample, scrape},
};
use bg_userspace::time::seconds_until;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

const METRICS: &str = "127.0.0.1:9464";

fn at(address: &str) -> SocketAddr {
    address.parse().unwrap()
}

fn metrics(lab: &Lab) -> Families {
    scrape(lab, at(METRICS)).unwrap()
}

/// The usual service, with keys of `[gateway]` before it and tables behind.
fn configured(gateway: &str, tables: &str) -> String {
    format!("{gateway}\n{}{tables}", default_service())
}

fn lab(tables: &str) -> Lab {
    let lab = Lab::new().unwrap();
    let gateway = format!("metrics = \"{METRICS}\"");
    lab.served_as(&configured(&gateway, tables)).unwrap()
}

fn assert_is(families: &Families, name: &str, labels: &[(&str, &str)], expected: &Value) {
    let found = sample(families, name, labels);
    let expected = expected.as_f64().unwrap();
    assert!(
        (found - expected).abs() < f64::EPSILON,
        "{name} {labels:?}: {found}, not {expected}"
    );
}

/// What `status` and a scrape both say.
fn assert_agrees(families: &Families, status: &Value) {
    let is = |name: &str, labels: &[(&str, &str)], expected: &Value| {
        assert_is(families, name, labels, expected);
    };
    for service in status["services"].as_array().unwrap() {
        let name = service["name"].as_str().unwrap();
        is(
            "bgswitch_generation",
            &[("service", name)],
            &service["generation"],
        );
        for (colour, figures) in service["colours"].as_object().unwrap() {
            let labels = [("service", name), ("colour", colour.as_str())];
            let active = json!(u8::from(service["active"] == colour.as_str()));
            is("bgswitch_active_colour", &labels, &active);
            for (metric, figure) in [
                ("bgswitch_flows", "flows"),
                ("bgswitch_draining_flows", "draining_flows"),
                ("bgswitch_new_flows_total", "new_flows"),
            ] {
                is(metric, &labels, &figures[figure]);
            }
            for (metric, figure, label, values) in [
                (
                    "bgswitch_packets_total",
                    "packets",
                    "direction",
                    ["forward", "return"],
                ),
                (
                    "bgswitch_bytes_total",
                    "bytes",
                    "direction",
                    ["forward", "return"],
                ),
                ("bgswitch_resets_total", "resets", "cause", ["cut", "drain"]),
            ] {
                let of = |value| {
                    let labels = [labels.as_slice(), &[(label, value)]].concat();
                    sample(families, metric, &labels)
                };
                let sum: f64 = values.map(of).into_iter().sum();
                assert!((sum - figures[figure].as_f64().unwrap()).abs() < f64::EPSILON);
            }
            for backend in figures["backends"].as_array().unwrap() {
                let address = backend["address"].as_str().unwrap();
                let labels = [labels.as_slice(), &[("backend", address)]].concat();
                let healthy = json!(u8::from(backend["healthy"].as_bool().unwrap()));
                is("bgswitch_backend_healthy", &labels, &healthy);
            }
        }
        let states = &families["bgswitch_release_state"].samples;
        let of_service: f64 = states
            .iter()
            .filter(|((_, labels), _)| labels[0].1 == name)
            .map(|(_, value)| value)
            .sum();
        assert!((of_service - 1.0).abs() < f64::EPSILON, "one state");
        let state = [
            ("service", name),
            ("state", service["state"].as_str().unwrap()),
        ];
        is("bgswitch_release_state", &state, &json!(1));
    }
    for (reason, count) in status["reasons"].as_object().unwrap() {
        // The stack's own packets go on.
        if reason != "not_ours" && reason != "not_ip" {
            is("bgswitch_verdicts_total", &[("reason", reason)], count);
        }
    }
    for interface in status["interfaces"].as_array().unwrap() {
        for mode in ["native", "generic"] {
            let name = interface["name"].as_str().unwrap();
            let labels = [("interface", name), ("mode", mode)];
            let runs = json!(u8::from(interface["mode"] == mode));
            is("bgswitch_xdp_attached", &labels, &runs);
        }
    }
    let table = &status["flow_table"];
    is("bgswitch_flow_table_entries", &[], &table["entries"]);
    is("bgswitch_flow_table_capacity", &[], &table["capacity"]);
    is("bgswitch_flow_table_full_total", &[], &table["full"]);
    let version = status["daemon"]["version"].as_str().unwrap();
    is("bgswitch_build_info", &[("version", version)], &json!(1));
}

/// Waits until nobody's packets are on their way, and compares.
fn agreed(lab: &Lab) -> Families {
    let figures = |status: &Value| {
        let mut status = status.clone();
        status["daemon"] = Value::Null;
        for busy in ["not_ours", "not_ip"] {
            status["reasons"][busy] = Value::Null;
        }
        status
    };
    let mut found = None;
    until("nothing changes around a scrape", || {
        let before = lab.status().unwrap();
        let families = metrics(lab);
        // What was read for somebody else just before is told for a second.
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let again = metrics(lab);
        let after = lab.status().unwrap();
        let still = figures(&before) == figures(&after);
        found = still.then_some((again, after, families));
        still
    });
    let (families, status, _) = found.unwrap();
    assert_agrees(&families, &status);
    families
}

#[test]
fn what_is_scraped_is_openmetrics_and_agrees_with_status_also_after_a_restart() {
    let mut lab = lab("");
    let client = lab.enter(Place::Client).unwrap();
    let mut old =
        [listener(8000), listener_v6(8001)].map(|to| Conversation::open(&client, to).unwrap());
    for conversation in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    lab.ask(&["flip", "llm"]).unwrap();
    let mut new = Conversation::open(&client, listener(8000)).unwrap();
    assert_eq!(new.ask().unwrap(), "green");
    let before = agreed(&lab);
    let blue = [("service", "llm"), ("colour", "blue")];
    assert_is(&before, "bgswitch_draining_flows", &blue, &json!(2));
    let done = [
        ("service", "llm"),
        ("to", "green"),
        ("trigger", "manual"),
        ("result", "done"),
    ];
    assert_is(&before, "bgswitch_flips_total", &done, &json!(1));
    for histogram in ["flip_store_seconds", "flip_first_flow_seconds"] {
        let count = format!("bgswitch_{histogram}_count");
        assert_is(&before, &count, &[], &json!(1));
        assert!(sample(&before, &format!("bgswitch_{histogram}_sum"), &[]) > 0.0);
    }

    // What the packet path counts goes on; what the daemon counted begins anew.
    lab.end_daemon(Signal::SIGKILL).unwrap();
    for conversation in &mut old {
        assert_eq!(conversation.ask().unwrap(), "blue");
    }
    lab.start().unwrap();
    let after = agreed(&lab);
    for name in [
        "packets",
        "bytes",
        "new_flows",
        "resets",
        "verdicts",
        "flows_evicted",
    ] {
        let of = |families: &Families| families[&format!("bgswitch_{name}")].samples.clone();
        let (before, after) = (of(&before), of(&after));
        assert_eq!(before.len(), after.len());
        for (key, value) in before {
            assert!(after[&key] >= value, "{key:?}: {} < {value}", after[&key]);
        }
    }
    assert_eq!(find(&after, "bgswitch_flips_total", &done), None);
}

#[test]
fn resets_say_what_caused_them() {
    let text = format!(
        "metrics = \"{METRICS}\"\n{}",
        service("reset_over = \"0s\"", SERVERS)
    );
    let lab = Lab::new().unwrap().served_as(&text).unwrap();
    let client = lab.enter(Place::Client).unwrap();
    let resets = |colour: &str, cause: &str| {
        let labels = [("service", "llm"), ("colour", colour), ("cause", cause)];
        sample(&metrics(&lab), "bgswitch_resets_total", &labels)
    };
    let reset = |how: &[&str]| {
        let mut old = Conversation::open(&client, listener(8000)).unwrap();
        old.ask().unwrap();
        lab.ask(&[&["flip", "llm"], how].concat()).unwrap();
        until("it is reset", || old.ask().is_err());
    };
    reset(&["--mode", "cut"]);
    until("a cut's reset is counted", || resets("blue", "cut") >= 1.0);
    reset(&["--mode", "drain", "--drain", "1s"]);
    until("a drain's reset is counted", || {
        resets("green", "drain") >= 1.0
    });
    assert!(resets("blue", "drain") + resets("green", "cut") < f64::EPSILON);
}

fn flips(families: &Families, to: &str, trigger: &str, result: &str) -> f64 {
    let labels = [
        ("service", "llm"),
        ("to", to),
        ("trigger", trigger),
        ("result", result),
    ];
    find(families, "bgswitch_flips_total", &labels).unwrap_or(0.0)
}

fn rollbacks(families: &Families, trigger: &str) -> f64 {
    sample(
        families,
        "bgswitch_rollbacks_total",
        &[("trigger", trigger)],
    )
}

fn until_scraped(lab: &Lab, what: &str, is_so: impl Fn(&Families) -> bool) {
    until(what, || is_so(&metrics(lab)));
}

#[test]
#[allow(clippy::float_cmp, reason = "they are counts")]
fn flips_are_counted_by_who_made_them_and_what_came_of_it() {
    let mut lab = lab(
        "[[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/\"\nbody = \"green\"\n\
         [service.llm.bake]\nduration = \"0s\"\nsettle = \"0s\"\n[service.llm.standby]\nhold = \"1h\"\n",
    );
    let fresh = metrics(&lab);
    for trigger in ["manual", "automatic", "offline"] {
        assert_eq!(rollbacks(&fresh, trigger), 0.0, "there before it happens");
    }
    // Refused ones, and what is no flip at all.
    assert_eq!(
        lab.tell(&["flip", "llm", "--if-generation", "9"])
            .unwrap()
            .0,
        5
    );
    assert_eq!(lab.tell(&["flip", "llm", "--dry-run"]).unwrap().0, 0);
    assert_eq!(lab.tell(&["flip", "nobody"]).unwrap().0, 2);
    // By hand, there and back.
    lab.ask(&["flip", "llm"]).unwrap();
    lab.ask(&["rollback", "llm"]).unwrap();
    // A canary that is rolled back is no flip.
    lab.ask(&["canary", "llm", "10"]).unwrap();
    lab.ask(&["rollback", "llm"]).unwrap();
    // A release, which then holds the standby.
    lab.ask(&["release", "start", "llm", "--wait"]).unwrap();
    until_scraped(&lab, "all of it", |families| {
        flips(families, "green", "manual", "refused") == 1.0
            && flips(families, "green", "manual", "done") == 1.0
            && flips(families, "blue", "manual", "done") == 1.0
            && flips(families, "green", "release", "done") == 1.0
            && rollbacks(families, "manual") == 2.0
    });
    let families = metrics(&lab);
    assert_eq!(families["bgswitch_flips"].samples.len(), 4, "and no other");
    let gate = [("service", "llm"), ("gate", "smoke"), ("result", "pass")];
    assert_eq!(
        sample(&families, "bgswitch_gate_duration_seconds_count", &gate),
        1.0
    );
    assert_eq!(
        sample(&families, "bgswitch_flip_store_seconds_count", &[]),
        4.0
    );
    let expiry = "bgswitch_standby_expiry_timestamp_seconds";
    let until_s = sample(&families, expiry, &[("service", "llm")]);
    let release = lab.ask(&["release", "status", "llm"]).unwrap();
    let says = release["release"]["until"].as_str().unwrap();
    let left = seconds_until(says).unwrap() as f64;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    assert!(
        (until_s - now.as_secs_f64() - left).abs() < 5.0,
        "{until_s} {says}"
    );

    // One that rolls back by itself: decided, killed, carried out by the next daemon.
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let file = lab.directory().join("state/releases/llm.json");
    let mut kept: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
    kept["machine"]["release"]["phase"] = json!("switching_back");
    fs::write(&file, serde_json::to_vec(&kept).unwrap()).unwrap();
    lab.start().unwrap();
    until_scraped(&lab, "the rollback by itself", |families| {
        flips(families, "blue", "automatic", "done") == 1.0
            && rollbacks(families, "automatic") == 1.0
            && find(families, expiry, &[("service", "llm")]).is_none()
    });

    // One beside a daemon that hangs, which then finds it.
    lab.ask(&["flip", "llm"]).unwrap();
    let daemon = Pid::from_raw(lab.daemon_pid().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    let beside = ["--timeout", "300ms", "rollback", "llm"];
    assert_eq!(lab.tell(&beside).unwrap().0, 0);
    kill(daemon, Signal::SIGCONT).unwrap();
    let offline = |times: f64| {
        move |families: &Families| {
            flips(families, "blue", "offline", "done") == times
                && rollbacks(families, "offline") == times
        }
    };
    until_scraped(&lab, "the rollback beside the daemon", offline(1.0));
    // One without any, which the next daemon reads in the journal, behind the one before;
    // the one behind that has nothing to count.
    lab.ask(&["flip", "llm"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert_eq!(lab.tell(&["rollback", "llm"]).unwrap().0, 0);
    lab.start().unwrap();
    until_scraped(&lab, "the rollback without a daemon", offline(2.0));
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.start().unwrap();
    assert_eq!(rollbacks(&metrics(&lab), "offline"), 0.0);
}

/// Law 8: an address that cannot be had is an error, and the one before stays.
#[test]
fn a_port_that_is_taken_is_refused_and_loses_nothing() {
    let mut lab = lab("");
    let reload = |gateway: &str| {
        lab.configure(&configured(gateway, "")).unwrap();
        lab.tell(&["reload"]).unwrap()
    };
    let namespace = lab.enter(Place::Gateway).unwrap();
    let other = at("127.0.0.1:9465");
    let taken = bg_tests::kernel::in_namespace(&namespace, || std::net::TcpListener::bind(other));
    let taken = taken.unwrap();
    let message = "gateway.metrics: listening on 127.0.0.1:9465: Address already in use (os error 98): \
                   stop what listens there, or name another port";
    let (code, _, err) = reload("metrics = \"127.0.0.1:9465\"");
    assert_eq!(
        (code, err),
        (2, format!("bgswitch: {message}. Nothing was applied\n"))
    );
    metrics(&lab);
    drop(taken);

    // A free one is moved to, and left without the key.
    let (code, out, err) = reload("metrics = \"127.0.0.1:9465\"");
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    assert!(out.contains("- gateway metrics 127.0.0.1:9464\n"), "{out}");
    assert!(out.contains("+ gateway metrics 127.0.0.1:9465\n"), "{out}");
    scrape(&lab, other).unwrap();
    until("the old one is closed", || {
        connect(&lab, at(METRICS)).is_err()
    });
    assert_eq!(reload("").0, 0);
    until("nobody listens", || connect(&lab, other).is_err());

    // At a start, the kernel goes on as it is, and the error says what to do.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    let taken = bg_tests::kernel::in_namespace(&namespace, || std::net::TcpListener::bind(other));
    lab.configure(&configured("metrics = \"127.0.0.1:9465\"", ""))
        .unwrap();
    let (code, _, err) = lab.tell(&["run"]).unwrap();
    assert_eq!(code, 1);
    assert!(err.ends_with(&format!("bgswitch: {message}\n")), "{err}");
    let client = lab.enter(Place::Client).unwrap();
    assert_eq!(once(client, listener(8000)).unwrap(), "blue");
    drop(taken);
    lab.start().unwrap();
    scrape(&lab, other).unwrap();
}

#[test]
fn only_metrics_are_told_and_nobody_keeps_others_waiting() {
    let lab = lab("");
    for (head, status) in [
        ("GET /metrics", "200"),
        ("HEAD /metrics", "200"),
        ("GET /metrics?name=bgswitch", "200"),
        ("POST /metrics", "405"),
        ("GET /", "404"),
        ("GET /v1/status", "404"),
        ("POST /v1/services/llm/flip", "404"),
    ] {
        let (answer, body) = request(&lab, at(METRICS), head).unwrap();
        assert!(
            answer.starts_with(&format!("HTTP/1.1 {status} ")),
            "{head}: {answer}"
        );
        assert_eq!(body.is_empty(), head.starts_with("HEAD"), "{head}");
    }
    assert_eq!(lab.status().unwrap()["services"][0]["generation"], 0);
    // Whoever sends more than is read may be reset before the answer comes.
    let long = format!("GET /{}", "x".repeat(20_000));
    if let Ok((answer, _)) = request(&lab, at(METRICS), &long) {
        assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
    }

    // More of them than are served at once say nothing, or half a word.
    let mut silent: Vec<_> = (0..20)
        .map(|_| connect(&lab, at(METRICS)).unwrap())
        .collect();
    for stream in silent.iter_mut().skip(10) {
        stream.write_all(b"GET /metr").unwrap();
    }
    metrics(&lab);
    for mut stream in silent {
        let mut text = Vec::new();
        // Reset or closed: what is certain is that it ends.
        let ended = stream.read_to_end(&mut text);
        assert!(
            ended.is_ok()
                || ended.is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock)
        );
    }
    // Many at once share what was read.
    std::thread::scope(|scope| {
        let scrapes: Vec<_> = (0..20).map(|_| scope.spawn(|| metrics(&lab))).collect();
        for one in scrapes {
            one.join().unwrap();
        }
    });
}
