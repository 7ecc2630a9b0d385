//! The commands against a running daemon: text, JSON and exit codes.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _},
    net::{TcpListener, TcpStream},
    os::unix::{fs::MetadataExt as _, net::UnixDatagram, process::CommandExt as _},
    process::{Command, Stdio},
};

use bg_tests::{
    kernel::in_namespace,
    lab::{Lab, Place, SERVICE, binary},
};
use nix::sys::signal::{Signal, kill};
use serde_json::{Value, json};

/// The service of most tests, over both families and protocols.
const LLM: &str = "[service.llm]\nlisten = [\"tcp://203.0.113.10:8000\", \"tcp://203.0.113.10:8001\", \
                   \"tcp://[2001:db8::10]:8000\", \"udp://203.0.113.10:4433\"]\n\
                   [service.llm.blue]\nversion = \"model@1\"\n\
                   backends = [\"10.0.1.10\", \"10.0.1.11\", \"fd00:1::10\"]\n\
                   [service.llm.green]\nversion = \"model@2\"\n\
                   backends = [\"10.0.2.10\", \"10.0.2.11\", \"fd00:2::10\"]\n";

/// A second one beside it.
const WEB: &str = "[service.web]\nlisten = [\"tcp://203.0.113.20:443\"]\non_flip = \"cut\"\n\
                   [service.web.blue]\nbackends = [\"10.0.1.10:8443\"]\n\
                   [service.web.green]\nbackends = [{ address = \"10.0.2.10:8443\", weight = 3 }]\n";

fn lab() -> Lab {
    let mut lab = Lab::new().unwrap();
    lab.configure(&[LLM, WEB].concat()).unwrap();
    lab.start().unwrap();
    lab
}

#[test]
fn help_explains_every_command_and_option() {
    let (code, help, _) = run(&["--help"]);
    assert_eq!(code, 0);
    let commands = [
        "run",
        "check",
        "status",
        "flip",
        "rollback",
        "canary",
        "flows",
        "history",
        "monitor",
        "explain",
        "reload",
        "detach",
        "release",
        "standby",
        "doctor",
        "completions",
        "man",
        "top",
    ];
    for command in commands {
        assert!(help.contains(&format!("\n  {command} ")), "{command}");
        let (code, help, _) = run(&[command, "--help"]);
        assert_eq!(code, 0);
        let mut lines = help.lines().peekable();
        while let Some(line) = lines.next() {
            let option = line.trim_start();
            if option.starts_with('-') {
                let next = lines.peek().copied().unwrap_or_default();
                let explained = option.contains("  ") || next.starts_with("          ");
                assert!(explained, "{command}: {line}");
            }
        }
    }
    for (option, what) in [
        ("--output", "text"),
        ("--socket", "PATH"),
        ("--timeout", "10s"),
    ] {
        assert!(help.contains(option) && help.contains(what), "{help}");
    }
    assert_eq!(
        run(&["--version"]).1,
        format!("bgswitch {}\n", env!("CARGO_PKG_VERSION"))
    );
}

#[test]
fn usage_errors_end_with_2_and_say_so_on_stderr() {
    for words in [
        &["flipp", "llm"][..],
        &["flip"],
        &["flip", "llm", "--to", "red"],
        &["flip", "llm", "--mode", "drop"],
        &["flip", "llm", "--drain", "soon"],
        &["flip", "llm", "--drain", "1500ms"],
        &["flip", "llm", "--drain", "31days"],
        &["flip", "llm", "--if-generation", "-1"],
        &["flip", "llm/../web"],
        &["rollback", ""],
        &["status", "--timeout", "never"],
        &["-o", "yaml"],
        &["canary", "llm"],
        &["canary", "llm", "-1"],
        &["canary", "llm", "NaN"],
        &["release"],
        &["release", "start", "llm", "--to", "red"],
        &["release", "promote", "llm"],
        &["release", "status", "llm/../web"],
        &["standby", "extend", "llm"],
        &["standby", "extend", "llm", "1500ms"],
        &["standby", "extend", "llm", "0s"],
        &["completions", "cmd"],
        &["history", "--since", "soon"],
        &["top", "-o", "json"],
        &["top", "--sort", "age"],
    ] {
        let (code, out, err) = run(words);
        assert_eq!((code, out.as_str()), (2, ""), "{words:?}: {err}");
        assert!(!err.is_empty(), "{words:?}");
    }
}

#[test]
fn status_tells_what_the_contract_says() {
    let lab = lab();
    let status = lab.ask(&["status"]).unwrap();
    assert_eq!(status["schema"], 1);
    assert_eq!(status["daemon"]["pid"], lab.daemon_pid().unwrap());
    assert_eq!(status["daemon"]["version"], env!("CARGO_PKG_VERSION"));
    assert!(status["daemon"]["uptime_s"].is_u64());
    assert_eq!(status["interfaces"].as_array().unwrap().len(), 3);
    assert!(status["reasons"]["forwarded"].is_u64() && status["reasons"]["truncated"].is_u64());
    assert_eq!(
        status["flow_table"],
        json!({"entries": 0, "capacity": 100_000, "full": 0, "evicted_half_open": 0, "evicted_udp": 0})
    );
    let [llm, web] = &status["services"].as_array().unwrap()[..] else {
        panic!("two services: {status}");
    };
    assert_eq!(
        llm["listeners"],
        json!([
            "tcp://203.0.113.10:8000",
            "tcp://203.0.113.10:8001",
            "tcp://[2001:db8::10]:8000",
            "udp://203.0.113.10:4433"
        ])
    );
    // Three ports over IPv4: the address alone. One over IPv6: with its port.
    let addresses = |service: &Value, colour: &str| -> Vec<Value> {
        let backends = service["colours"][colour]["backends"].as_array().unwrap();
        backends.iter().map(|b| b["address"].clone()).collect()
    };
    assert_eq!(
        addresses(llm, "blue"),
        ["10.0.1.10", "10.0.1.11", "[fd00:1::10]:8000"]
    );
    assert_eq!(
        web,
        &json!({
            "name": "web", "active": "blue", "generation": 0, "state": "STEADY", "canary_percent": 0.0,
            "listeners": ["tcp://203.0.113.20:443"], "forward": "nat", "announced": {},
            "colours": {
                "blue": {
                    "version": null, "flows": 0, "packets": 0, "bytes": 0, "new_flows": 0, "resets": 0,
                    "draining_until": null, "resets_until": null, "drain_end": null,
                    "draining_flows": 0, "resetting_flows": 0, "all_down": false, "signals": null, "preview": [],
                    "backends": [{"address": "10.0.1.10:8443", "weight": 1, "healthy": true,
                        "reachable": true, "in_pool": true, "health": null, "flows": 0}],
                },
                "green": {
                    "version": null, "flows": 0, "packets": 0, "bytes": 0, "new_flows": 0, "resets": 0,
                    "draining_until": null, "resets_until": null, "drain_end": null,
                    "draining_flows": 0, "resetting_flows": 0, "all_down": false, "signals": null, "preview": [],
                    "backends": [{"address": "10.0.2.10:8443", "weight": 3, "healthy": true,
                        "reachable": true, "in_pool": true, "health": null, "flows": 0}],
                },
            },
        })
    );

    // Without a word it is status, too.
    let (code, text, err) = lab.tell(&[]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(!text.contains('\x1b'), "colours are for terminals");
    for part in [
        "llm  STEADY  new flows: blue 100 %  generation 0\n",
        "  blue       active   model@1       0 flows\n",
        "  green      standby  model@2       0 flows\n",
        "10.0.2.10:8443           0 flows  weight 3\n",
        "\nflow table  0 of 100000 entries\n",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
    let one = lab.ask(&["status", "web"]).unwrap();
    assert_eq!(one["services"], json!([web]));
}

#[test]
fn a_flip_says_what_is_true() {
    let lab = lab();
    let held = connections(&lab, 3);
    let before = lab.ask(&["status", "llm"]).unwrap();
    assert_eq!(before["services"][0]["colours"]["blue"]["flows"], 3);

    let (code, text, err) = lab.tell(&["flip", "llm", "--dry-run"]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""));
    assert_eq!(
        text,
        "llm  blue -> green   generation 0 -> 1\n3 flows would stay on blue for up to 20m, \
         then be reset over 30s\n\
         nothing was changed (dry run)\n"
    );
    assert_eq!(
        lab.ask(&["status", "llm"]).unwrap()["services"],
        before["services"]
    );
    assert!(entries(&lab, "flip").is_empty());

    let text = tell_in_tokyo(&lab, &["flip", "llm", "-m", "model@2 is good"]);
    let status = lab.ask(&["status", "llm"]).unwrap();
    let service = &status["services"][0];
    assert_eq!(
        (&service["active"], &service["generation"]),
        (&json!("green"), &json!(1))
    );
    assert_eq!(service["state"], "STEADY");
    let until = service["colours"]["blue"]["draining_until"]
        .as_str()
        .unwrap();
    let resets_until = service["colours"]["blue"]["resets_until"].as_str().unwrap();
    let last = in_tokyo(resets_until);
    let last = last.rsplit(' ').next().unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let stored = lines[0].strip_prefix("llm  blue -> green   generation 0 -> 1   stored in ");
    assert!(is_measured(stored.unwrap_or_default()), "{text}");
    let stay = "no new flow yet; the next one goes to green; 3 flows stay on blue until ";
    let shown = lines[1]
        .strip_prefix(stay)
        .unwrap_or_else(|| panic!("{text}"));
    let shown = shown
        .strip_suffix(" (drain 20m, resets over 30s)")
        .unwrap_or_else(|| panic!("{text}"));
    assert!(
        in_tokyo(until).ends_with(shown),
        "{shown} is {until} in Tokyo"
    );
    assert_eq!(lines[2..], ["undo: bgswitch rollback llm"]);
    let text = tell_in_tokyo(&lab, &["status", "llm"]);
    assert!(
        text.contains(&format!("model@1       3 flows, reset from {shown} to "))
            && text.contains(&format!("{last}\n")),
        "{text}"
    );

    // Another day has its date.
    let json = lab
        .ask(&["flip", "llm", "--to", "blue", "--drain", "2days"])
        .unwrap();
    let until = json["draining_until"].as_str().unwrap();
    assert_eq!(json["drain_s"], 2 * 86_400);
    let text = tell_in_tokyo(&lab, &["flip", "llm", "--drain", "2days"]);
    assert!(
        text.contains(&format!(
            " until {} (drain 2days, resets over 30s)\n",
            &in_tokyo(until)[..10]
        )) || text.contains(&in_tokyo(until)[..11]),
        "{text}"
    );

    // Cut: the flows are gone with their next packet.
    let text = lab.tell(&["flip", "llm", "--mode", "cut"]).unwrap().1;
    assert!(text.contains("; no flow was on green\n"), "{text}");
    let text = lab.tell(&["flip", "llm", "--mode", "cut"]).unwrap().1;
    assert!(
        text.contains("; 3 flows of blue are reset with their next packet\n"),
        "{text}"
    );
    drop(held);
}

#[test]
fn the_first_new_flow_is_timed() {
    let lab = lab();
    let _held = connections(&lab, 1);
    let namespace = lab.enter(Place::Client).unwrap();
    // A client that never stops connecting, whatever comes of it.
    let client = std::thread::spawn(move || {
        in_namespace(&namespace, || {
            let address = format!("{SERVICE}:8000").parse().unwrap();
            for _ in 0..500 {
                let wait = std::time::Duration::from_millis(5);
                drop(TcpStream::connect_timeout(&address, wait));
            }
        });
    });
    let mut seen = false;
    while !seen && !client.is_finished() {
        let (code, text, err) = lab.tell(&["flip", "llm"]).unwrap();
        assert_eq!(code, 0, "{err}");
        let line = text.lines().nth(1).unwrap();
        if let Some(rest) = line.strip_prefix("first new flow on ") {
            let (colour, rest) = rest.split_once(" after ").unwrap();
            assert!(["blue", "green"].contains(&colour), "{line}");
            assert!(is_measured(rest.split(';').next().unwrap()), "{line}");
            seen = true;
        }
    }
    client.join().unwrap();
    assert!(seen, "no flip saw a new flow");
}

#[test]
fn a_flip_in_json_loses_nothing() {
    let lab = lab();
    let flipped = lab.ask(&["flip", "llm", "--mode", "drain"]).unwrap();
    let drain = &flipped["draining_until"];
    assert!(drain.as_str().unwrap().ends_with('Z'), "{drain}");
    let mut rest = flipped.clone();
    for key in ["at_ns", "store_ns"] {
        assert!(rest[key].is_u64(), "{key}");
        rest[key] = Value::Null;
    }
    assert_eq!(
        rest,
        json!({
            "schema": 1, "service": "llm", "from": "blue", "to": "green", "generation_before": 0,
            "generation": 1, "mode": "drain", "canary_percent_before": 0.0, "canary_rollback": false,
            "drain_s": 1200, "drain_end": "reset", "reset_over_s": 30,
            "resets_until": flipped["resets_until"], "at_ns": null, "store_ns": null,
            "first_new_flow_us": null, "old_flows": 0, "draining_until": drain, "dry_run": false,
            "already": false, "warnings": [],
        })
    );
    let cut = lab.ask(&["flip", "web"]).unwrap();
    assert_eq!(cut["mode"], "cut", "the service's on_flip");
    assert_eq!(
        (&cut["drain_s"], &cut["draining_until"]),
        (&Value::Null, &Value::Null)
    );
}

#[test]
fn unknown_services_are_2_and_the_known_ones_are_listed() {
    let lab = lab();
    for words in [
        &["status", "lmm"][..],
        &["status", "lmm", "--watch"],
        &["flip", "lmm"],
        &["rollback", "lmm"],
        &["flows", "lmm"],
        &["history", "lmm"],
    ] {
        let (code, out, err) = lab.tell(words).unwrap();
        let expected = "bgswitch: there is no service `lmm`, only: llm, web\n";
        assert_eq!(
            (code, out.as_str(), err.as_str()),
            (2, "", expected),
            "{words:?}"
        );
    }
}

#[test]
fn conflicts_are_5_and_change_nothing() {
    let lab = lab();
    lab.ask(&["flip", "llm"]).unwrap();
    for (words, expected) in [
        (
            &["flip", "llm", "--if-generation", "0"][..],
            "llm is at generation 1, not 0: somebody flipped it meanwhile. Look at `bgswitch status llm` and \
             decide again",
        ),
        (
            &["flip", "llm", "--if-generation", "0", "--force"],
            "llm is at generation 1, not 0: somebody flipped it meanwhile. Look at `bgswitch status llm` and \
             decide again",
        ),
        (
            &["flip", "llm", "--to", "green"],
            "llm is green already: nothing was changed",
        ),
    ] {
        let (code, out, err) = lab.tell(words).unwrap();
        assert_eq!((code, out.as_str()), (5, ""), "{words:?}");
        assert_eq!(err, format!("bgswitch: {expected}\n"));
    }
    let (code, _, err) = lab.tell(&["flip", "web", "--drain", "1m"]).unwrap();
    assert_eq!(
        (code, err.as_str()),
        (
            2,
            "bgswitch: a drain is only of use with mode drain: this flip would cut all old flows at once\n"
        )
    );
    let status = lab.ask(&["status"]).unwrap();
    assert_eq!(status["services"][0]["generation"], 1);
    assert_eq!(status["services"][1]["generation"], 0);
    assert_eq!(
        lab.ask(&["flip", "llm", "--if-generation", "1"]).unwrap()["generation"],
        2
    );
}

#[test]
fn an_unreachable_colour_is_8_unless_forced() {
    let mut lab = Lab::new().unwrap();
    // Nobody answers for the first, and no route leads to the second.
    let service = LLM.replace(
        "\"10.0.2.10\", \"10.0.2.11\"",
        "\"10.0.2.99\", \"192.0.2.1\"",
    );
    lab.configure(&service).unwrap();
    lab.start().unwrap();
    lab.ip(Place::Gateway, "route add unreachable 192.0.2.0/24")
        .unwrap();
    for words in [&["flip", "llm"][..], &["flip", "llm", "--dry-run"]] {
        let (code, out, err) = lab.tell(words).unwrap();
        assert_eq!((code, out.as_str()), (8, ""));
        assert_eq!(
            err,
            "bgswitch: llm was not flipped: no next hop is known for 10.0.2.99, 192.0.2.1 of green (no route \
             through a gateway interface, or the neighbour does not answer). `bgswitch flip --force` flips all \
             the same\n"
        );
    }
    let status = lab.ask(&["status"]).unwrap();
    assert_eq!(status["services"][0]["generation"], 0);
    let healthy: Vec<bool> = status["services"][0]["colours"]["green"]["backends"]
        .as_array()
        .unwrap()
        .iter()
        .map(|backend| backend["healthy"].as_bool().unwrap())
        .collect();
    assert_eq!(healthy, [false, false, true]);
    let (_, text, _) = lab.tell(&["status"]).unwrap();
    assert!(
        text.contains("10.0.2.99                0 flows  no next hop known\n"),
        "{text}"
    );
    assert_eq!(lab.ask(&["flip", "llm", "--force"]).unwrap()["to"], "green");
    // Back is never gated.
    assert_eq!(lab.ask(&["rollback", "llm"]).unwrap()["to"], "blue");
    assert_eq!(lab.ask(&["rollback", "llm"]).unwrap()["to"], "green");
}

#[test]
fn flows_are_one_document() {
    let lab = lab();
    let held = connections(&lab, 2);
    let flows = lab.ask(&["flows"]).unwrap();
    assert_eq!((&flows["schema"], &flows["total"]), (&json!(1), &json!(2)));
    let lines = flows["flows"].as_array().unwrap();
    assert_eq!(lines.len(), 2);
    for line in lines {
        assert_eq!(line["service"], "llm");
        assert_eq!(
            (&line["colour"], &line["table"]),
            (&json!("blue"), &json!("established"))
        );
        assert_eq!(
            (&line["generation"], &line["closing"]),
            (&json!(0), &json!(false))
        );
        assert!(
            line["client"]
                .as_str()
                .unwrap()
                .starts_with("198.51.100.10:"),
            "{line}"
        );
        assert!(
            line["backend"].as_str().unwrap().starts_with("10.0.1.1"),
            "{line}"
        );
        assert!(line["idle_ms"].is_u64());
    }
    assert_eq!(
        lab.ask(&["flows", "--colour", "green"]).unwrap()["total"],
        0
    );
    assert_eq!(lab.ask(&["flows", "web"]).unwrap()["total"], 0);
    let limited = lab.ask(&["flows", "llm", "--limit", "1"]).unwrap();
    assert_eq!(
        (
            limited["flows"].as_array().unwrap().len(),
            &limited["total"]
        ),
        (1, &json!(2))
    );
    let (_, text, _) = lab.tell(&["flows", "--limit", "1"]).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(
        (lines[0], lines[2], lines[3]),
        ("llm: 2 flows", "  and 1 more (--limit)", "web: 0 flows")
    );
    assert!(lines[1].starts_with("  198.51.100.10:"), "{text}");
    assert!(
        lines[1].contains("established generation 0  idle "),
        "{text}"
    );
    drop(held);
}

#[test]
fn history_tells_who_did_what_and_why() {
    let mut lab = lab();
    lab.ask(&["flip", "llm", "-m", "model@2"]).unwrap();
    lab.ask(&["rollback", "llm", "-m", "wrong answers"])
        .unwrap();
    lab.tell(&["flip", "llm", "--to", "blue"]).unwrap();
    let history = lab.ask(&["history", "llm"]).unwrap();
    assert_eq!(history["schema"], 1);
    let told: Vec<Value> = history["entries"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|entry| entry["service"] == "llm")
        .map(|e| {
            json!([
                e["actor"],
                e["action"],
                e["phase"],
                e["generation"],
                e["detail"],
                e["why"]
            ])
        })
        .collect();
    assert_eq!(
        told,
        [
            json!([
                "root(0)",
                "flip",
                "intent",
                0,
                "blue -> green, drain",
                "model@2"
            ]),
            json!([
                "root(0)",
                "flip",
                "result",
                1,
                "blue -> green, drain",
                "model@2"
            ]),
            json!([
                "root(0)",
                "rollback",
                "intent",
                1,
                "green -> blue, cut",
                "wrong answers"
            ]),
            json!([
                "root(0)",
                "rollback",
                "result",
                2,
                "green -> blue, cut",
                "wrong answers"
            ]),
        ],
        "what was refused is no change"
    );
    let actions = entries(&lab, "start");
    assert_eq!(actions.len(), 2, "intent and result: {actions:?}");
    let text = tell_in_tokyo(&lab, &["history", "llm"]);
    let line = text.lines().find(|line| line.contains("rollback")).unwrap();
    let first = history["entries"].as_array().unwrap();
    let done = |e: &&Value| e["action"] == "rollback" && e["phase"] == "result";
    let time = first.iter().find(done).unwrap()["time"].as_str().unwrap();
    assert!(line.starts_with(&in_tokyo(time)), "{line}");
    assert!(
        line.ends_with("result  generation 2     green -> blue, cut  (wrong answers)"),
        "{line}"
    );

    // The journal can be read without the daemon; then it says that.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    let (code, out, err) = lab.tell(&["history", "llm"]).unwrap();
    assert_eq!(
        (code, out.lines().count()),
        (0, text.lines().count() + 1),
        "{out}"
    );
    assert_eq!(
        err,
        "bgswitch: warning: the daemon does not run: this is what the journal says\n"
    );
}

#[test]
fn watch_prints_a_document_a_line_until_nobody_reads() {
    let lab = lab();
    let mut watch = lab
        .bgswitch(&["status", "llm", "--watch", "-o", "json"])
        .unwrap()
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(watch.stdout.take().unwrap()).lines();
    for _ in 0..2 {
        let line = lines.next().unwrap().unwrap();
        let status: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(status["services"].as_array().unwrap().len(), 1);
    }
    drop(lines);
    let status = watch.wait().unwrap();
    let mut err = String::new();
    watch
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut err)
        .unwrap();
    assert_eq!(
        (status.code(), err.as_str()),
        (Some(0), ""),
        "a closed pipe is no error"
    );
}

#[test]
fn reload_shows_the_difference_and_applies_it() {
    let lab = lab();
    lab.ask(&["flip", "llm"]).unwrap();
    let unchanged = lab.tell(&["reload"]).unwrap();
    assert_eq!(
        unchanged,
        (0, "nothing to change\n".to_owned(), String::new())
    );
    assert!(entries(&lab, "reload").is_empty());

    let service = LLM
        .replace("model@2", "model@3")
        .replace("\"10.0.2.11\", ", "");
    lab.configure(&service).unwrap();
    let lines = "  - service web\n  - llm green backend 10.0.2.11 weight 1\n  - llm green version model@2\n  \
                 + llm green version model@3\n";
    let before = lab.ask(&["status"]).unwrap();
    let dry = lab.tell(&["reload", "--dry-run"]).unwrap();
    assert_eq!(
        dry,
        (
            0,
            format!("would change (dry run):\n{lines}"),
            String::new()
        )
    );
    assert_eq!(
        lab.ask(&["status"]).unwrap()["services"],
        before["services"]
    );
    assert!(entries(&lab, "reload").is_empty());

    let done = lab.tell(&["reload"]).unwrap();
    assert_eq!(done, (0, format!("changed:\n{lines}"), String::new()));
    let status = lab.ask(&["status"]).unwrap();
    let [llm] = &status["services"].as_array().unwrap()[..] else {
        panic!("web is gone: {status}");
    };
    assert_eq!(
        (&llm["generation"], &llm["active"]),
        (&json!(1), &json!("green"))
    );
    assert_eq!(llm["colours"]["green"]["version"], "model@3");
    let told = entries(&lab, "reload");
    let phases: Vec<&str> = told.iter().map(|e| e["phase"].as_str().unwrap()).collect();
    assert_eq!(phases, ["intent", "result"]);
    assert_eq!(
        (&told[1]["actor"], &told[1]["service"]),
        (&json!("root(0)"), &json!("*"))
    );
    assert!(
        told[1]["detail"]
            .as_str()
            .unwrap()
            .starts_with("- service web; "),
        "{told:?}"
    );

    // A service that comes back is a new one, and nobody has tampered with it.
    lab.configure(&(service + WEB)).unwrap();
    let json = lab.ask(&["reload"]).unwrap();
    assert_eq!(
        json,
        json!({"schema": 1, "changes": ["+ service web"], "warnings": [], "dry_run": false})
    );
    lab.ask(&["flip", "web"]).unwrap();
    assert!(entries(&lab, "changed_outside").is_empty());
}

#[test]
fn a_reload_that_cannot_be_changes_nothing() {
    let lab = lab();
    let before = lab.ask(&["status"]).unwrap();
    lab.configure(&LLM.replace("10.0.2.11", "10.0.2")).unwrap();
    let (code, out, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!((code, out.as_str()), (2, ""));
    let file = lab.config().display().to_string();
    let expected =
        format!("bgswitch: {file}:14: service.llm.green.backends: `10.0.2` is no address, like ");
    assert!(err.starts_with(&expected), "{err}");
    assert!(err.ends_with(". Nothing was applied\n"), "{err}");

    // Right by itself, but with what the packet path holds already it is too much.
    let many = |first: u16| {
        let listeners: Vec<String> = (first..first + 12_000)
            .map(|port| format!("\"tcp://203.0.113.99:{port}\""))
            .collect();
        format!(
            "[service.many]\nlisten = [{}]\n[service.many.blue]\nbackends = [\"10.0.1.10\"]\n\
             [service.many.green]\nbackends = [\"10.0.2.10\"]\n",
            listeners.join(", ")
        )
    };
    lab.configure(&many(10_000)).unwrap();
    let first = lab.ask(&["reload"]).unwrap();
    assert_eq!(
        first["changes"],
        json!(["- service llm", "- service web", "+ service many"])
    );
    lab.configure(&many(30_000)).unwrap();
    for words in [&["reload", "--dry-run"][..], &["reload"]] {
        let (code, out, err) = lab.tell(words).unwrap();
        assert_eq!((code, out.as_str()), (11, ""), "{err}");
        assert_eq!(
            err,
            "bgswitch: endpoints of listeners and of their backends, with those that leave: 72000 are needed, 65536 fit. Nothing was applied\n"
        );
    }
    let status = lab.ask(&["status"]).unwrap();
    assert_eq!(
        status["services"][0]["listeners"][0],
        "tcp://203.0.113.99:10000"
    );
    assert_ne!(status["services"], before["services"]);
    assert_eq!(
        entries(&lab, "reload").len(),
        2,
        "only the one that was applied"
    );
}

#[test]
fn systemd_hears_of_start_reload_and_stop() {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    let notify = lab.directory().join("notify");
    let systemd = UnixDatagram::bind(&notify).unwrap();
    systemd
        .set_read_timeout(Some(std::time::Duration::from_secs(30)))
        .unwrap();
    let script = script(&lab, &format!("export NOTIFY_SOCKET={}", notify.display()));
    lab.start_binary(&script).unwrap();
    let hear = || {
        let mut buffer = [0; 256];
        let length = systemd.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length])
            .trim_end()
            .to_owned()
    };
    assert_eq!(hear(), "READY=1");
    let daemon = nix::unistd::Pid::from_raw(lab.daemon_pid().unwrap() as i32);
    kill(daemon, Signal::SIGHUP).unwrap();
    let reloading = hear();
    assert!(
        reloading.starts_with("RELOADING=1\nMONOTONIC_USEC="),
        "{reloading}"
    );
    assert_eq!(hear(), "READY=1");
    lab.end_daemon(Signal::SIGTERM).unwrap();
    assert_eq!(hear(), "STOPPING=1");
}

#[test]
fn the_socket_is_for_root_and_the_group() {
    let mut lab = lab();
    let meta = fs::metadata(lab.directory().join("sock")).unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.uid(), meta.gid()),
        (0o660, 0, 0),
        "no such group here"
    );
    lab.end_daemon(Signal::SIGTERM).unwrap();
    assert!(!lab.directory().join("sock").exists());

    // A host with the group, of which only the daemon's mounts know.
    let group = lab.directory().join("group");
    fs::write(&group, "root:x:0:\nbgswitch:x:4242:\n").unwrap();
    let script = script(
        &lab,
        &format!("umask 0\nmount --bind {} /etc/group", group.display()),
    );
    let outer = lab.directory().join("outer");
    fs::write(
        &outer,
        format!("#!/bin/sh\nexec unshare -m {} \"$@\"\n", script.display()),
    )
    .unwrap();
    executable(&outer);
    lab.start_binary(&outer).unwrap();
    let meta = fs::metadata(lab.directory().join("sock")).unwrap();
    assert_eq!(
        (meta.mode() & 0o7777, meta.uid(), meta.gid()),
        (0o660, 0, 4242)
    );
    let mut member = Command::new(binary().unwrap());
    member
        .arg("--config")
        .arg(lab.config())
        .args(["flip", "llm"]);
    let output = member.uid(65534).gid(4242).output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(entries(&lab, "flip")[1]["actor"], "nobody(65534)");
}

/// A script that does something, then becomes `bgswitch`.
fn script(lab: &Lab, before: &str) -> std::path::PathBuf {
    let path = lab.directory().join("script");
    let binary = binary().unwrap();
    fs::write(
        &path,
        format!("#!/bin/sh\n{before}\nexec {} \"$@\"\n", binary.display()),
    )
    .unwrap();
    executable(&path);
    path
}

fn executable(path: &std::path::Path) {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

fn run(words: &[&str]) -> (i32, String, String) {
    let output = Command::new(binary().unwrap())
        .args(words)
        .output()
        .unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let code = output.status.code().unwrap_or(-1);
    (code, text(output.stdout), text(output.stderr))
}

/// Connections from the client to `llm` that stay open with what is returned.
fn connections(lab: &Lab, count: usize) -> (Vec<TcpListener>, Vec<TcpStream>) {
    let servers: Vec<TcpListener> = [Place::Blue, Place::Green]
        .into_iter()
        .map(|place| {
            let namespace = lab.enter(place).unwrap();
            in_namespace(&namespace, || TcpListener::bind("0.0.0.0:8000").unwrap())
        })
        .collect();
    let namespace = lab.enter(Place::Client).unwrap();
    let streams = in_namespace(&namespace, || {
        (0..count)
            .map(|_| TcpStream::connect((SERVICE, 8000)).unwrap())
            .collect()
    });
    (servers, streams)
}

fn entries(lab: &Lab, action: &str) -> Vec<Value> {
    let history = lab.ask(&["history"]).unwrap();
    let all = history["entries"].as_array().unwrap().iter();
    all.filter(|entry| entry["action"] == action)
        .cloned()
        .collect()
}

fn tell_in_tokyo(lab: &Lab, words: &[&str]) -> String {
    let output = lab
        .bgswitch(words)
        .unwrap()
        .env("TZ", "Asia/Tokyo")
        .output()
        .unwrap();
    assert_eq!(
        output.status.code(),
        Some(0),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// `2026-11-21T15:02:10Z`, as a clock in Tokyo shows it, by the C library.
fn in_tokyo(utc: &str) -> String {
    let output = Command::new("date")
        .args(["-d", utc, "+%Y-%m-%d %H:%M:%S"])
        .env("TZ", "Asia/Tokyo")
        .output()
        .unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .trim_end()
        .to_owned()
}

/// True for a number and a unit: `85 ns`, `0.9 µs`, `38 µs`.
fn is_measured(text: &str) -> bool {
    text.split_once(' ').is_some_and(|(value, unit)| {
        value.parse::<f64>().is_ok() && ["ns", "µs", "ms", "s"].contains(&unit)
    })
}

/// Law 10: a reload that gives the live colour a server nobody can reach says so,
/// and so does a rollback to one.
#[test]
fn what_cannot_be_reached_is_said() {
    let lab = lab();
    let lost = LLM.replace("\"10.0.1.11\"", "\"172.31.9.9\"");
    assert_ne!(lost, LLM);
    lab.configure(&lost).unwrap();
    let (code, _, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!(code, 0);
    assert_eq!(
        err,
        "bgswitch: warning: no next hop is known for 172.31.9.9 of llm blue, the ACTIVE colour: its share of \
         new flows may go nowhere\n"
    );
    lab.ask(&["flip", "llm"]).unwrap();
    let (code, _, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 0);
    assert_eq!(
        err,
        "bgswitch: warning: no next hop is known for 172.31.9.9 of blue: their share of new flows may go \
         nowhere\n"
    );
}
