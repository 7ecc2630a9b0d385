//! Gates of a release against real servers: what passes, what does not, and what
//! nobody can say.

use bg_tests::{
    lab::{Lab, default_service},
    load::until,
};
use serde_json::Value;

/// The usual service with gates; `DIR` is the lab's directory.
fn lab(tables: &str) -> Lab {
    let lab = Lab::new().unwrap();
    let tables = tables.replace("DIR", lab.directory().to_str().unwrap());
    lab.served_as(&(default_service() + &tables)).unwrap()
}

/// Another configuration for the same service.
fn reconfigure(lab: &Lab, tables: &str) {
    let tables = tables.replace("DIR", lab.directory().to_str().unwrap());
    lab.configure(&(default_service() + &tables)).unwrap();
    lab.ask(&["reload"]).unwrap();
}

/// Where a release goes to that nobody approves: `READY` is behind the gates.
const STOPS: &str = "[service.llm.approval]\nrequired = true\n";

fn release(lab: &Lab) -> Value {
    lab.ask(&["release", "status", "llm"]).unwrap()["release"].clone()
}

/// Begins a release and waits for its gates; returns the exit code and the evidence of
/// each gate, and ends it.
fn gates_of(lab: &Lab) -> (i32, Vec<String>) {
    let (code, _, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    let release = release(lab);
    let gates = release["gates"].as_array().unwrap().iter();
    let said = gates.map(|gate| {
        let (result, evidence) = (&gate["result"], &gate["evidence"]);
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        format!("{}: {}", text(result), text(evidence))
    });
    let said = said.collect();
    if release["over"] == false {
        lab.ask(&["release", "abort", "llm"]).unwrap();
    }
    assert!(matches!(code, 6 | 7), "{err}");
    (code, said)
}

fn state(lab: &Lab) -> String {
    let status = lab.status().unwrap();
    status["services"][0]["state"].as_str().unwrap().to_owned()
}

fn load(keys: &str) -> String {
    format!("[[service.llm.gate]]\nname = \"load\"\nkind = \"load\"\n{keys}\n{STOPS}")
}

#[test]
fn a_load_passes_servers_that_bear_it_and_no_others() {
    let lab = lab(&load(
        "path = \"/\"\nrate = 100\nduration = \"1s\"\np99 = \"10s\"",
    ));
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 7, "{said:?}");
    assert!(said[0].starts_with("pass: sent 100 of 100"), "{said:?}");
    assert!(said[0].contains("answered 100, errors 0, p50 "), "{said:?}");
    for (keys, wanted, evidence) in [
        (
            "status = 204",
            6,
            "fail: more errors than 0 %: sent 20 of 20",
        ),
        ("port = 9", 6, "(20 not reached)"),
        // A second for each answer.
        (
            "path = \"/stream/1\"\np99 = \"500ms\"",
            6,
            "fail: p99 is above 500ms",
        ),
        // Nobody could say: of 40 that were asked for, each of two slots sent a few.
        (
            "path = \"/stream/1\"\np99 = \"1m\"\nconcurrency = 2",
            7,
            "inconclusive: less was sent than asked for, requests had to wait for others to end",
        ),
    ] {
        let path = if keys.contains("path") {
            ""
        } else {
            "path = \"/\"\n"
        };
        reconfigure(
            &lab,
            &load(&format!("{path}rate = 20\nduration = \"1s\"\n{keys}")),
        );
        let (code, said) = gates_of(&lab);
        assert_eq!(code, wanted, "{said:?}");
        assert!(said[0].contains(evidence), "{said:?}");
    }
}

#[test]
fn a_load_says_how_far_it_is() {
    let lab = lab(&load("path = \"/\"\nrate = 20\nduration = \"1h\""));
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it says how far it is", || {
        let progress = release(&lab)["progress"].clone();
        progress
            .as_str()
            .is_some_and(|said| said.contains(" of 72000 requests sent, 0 errors"))
    });
    let (_, out, _) = lab.tell(&["release", "status", "llm"]).unwrap();
    assert!(out.contains("\n  so far  "), "{out}");
    // It is ended with its release.
    lab.ask(&["release", "abort", "llm"]).unwrap();
    assert_eq!(state(&lab), "ABORTED");
    assert_eq!(release(&lab)["progress"], Value::Null);
}
