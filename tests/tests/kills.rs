//! A daemon that is killed at any moment of a release: the release goes on, or ends as it
//! may, and what the journal says is what the kernel does.

use std::{collections::BTreeMap, fs, time::Duration};

use bg_tests::{
    lab::{Lab, Place, default_service, listener},
    load::{self, now_ns, until},
};
use nix::sys::signal::Signal;
use serde_json::Value;

const KILLS: u32 = 50;

/// A gate that takes a moment, a flip, a bake and a hold: all of it in a second and a third or
/// so.
const TABLES: &str = r#"
[[service.llm.gate]]
name = "moment"
kind = "exec"
command = ["/bin/sleep", "0.2"]
[[service.llm.gate]]
name = "smoke"
kind = "http"
path = "/"
[service.llm.bake]
settle = "0s"
duration = "1s"
signals = false
[service.llm.standby]
hold = "0s"
"#;

fn service(lab: &Lab) -> Value {
    lab.status().unwrap()["services"][0].clone()
}

/// Whether the journal has each line of a release's story.
fn steps_are_told(lab: &Lab, release: &Value) -> bool {
    let history = lab.ask(&["history", "llm", "--limit", "100"]).unwrap();
    let entries = history["entries"].as_array().unwrap().iter();
    let id = release["id"].as_str().unwrap();
    let detail = |note: &Value| {
        let [state, text] = ["state", "text"].map(|key| note[key].as_str().unwrap());
        format!("{id} {state}: {text}")
    };
    let notes = release["notes"].as_array().unwrap().iter();
    let mut untold: Vec<String> = notes.map(detail).collect();
    for told in entries.map(|entry| entry["detail"].as_str().unwrap()) {
        if told.starts_with(&format!("{id} ")) {
            let note = untold.iter().position(|note| note == told);
            untold.swap_remove(note.unwrap_or_else(|| panic!("{told} is told too often")));
        }
    }
    untold.is_empty()
}

/// Numbers without a pattern (xorshift).
fn next(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn a_daemon_killed_at_any_moment_of_a_release_leaves_no_wrong_colour() {
    let mut seed = now_ns() | 1;
    println!("seed {seed}");
    let mut lab = Lab::new()
        .unwrap()
        .served_as(&(default_service() + TABLES))
        .unwrap();
    let mut ends = BTreeMap::new();
    for number in 0..KILLS {
        let before = service(&lab);
        let (from, generation) = (before["active"].clone(), before["generation"].clone());
        lab.ask(&["release", "start", "llm"]).unwrap();
        std::thread::sleep(Duration::from_micros(next(&mut seed) % 1_350_000));
        lab.end_daemon(Signal::SIGKILL).unwrap();
        lab.start().unwrap();
        let over = ["STEADY", "ABORTED", "FAILED", "ROLLED_BACK", "SUPERSEDED"];
        until("the release is over", || {
            over.contains(&service(&lab)["state"].as_str().unwrap())
        });
        let after = service(&lab);
        let release = &lab.ask(&["release", "status", "llm"]).unwrap()["release"];
        let (state, code) = (after["state"].as_str().unwrap(), &release["code"]);
        let was_flipped = after["generation"] != generation;
        assert_eq!(
            (state == "STEADY", *code == 0, after["active"] != from),
            (was_flipped, was_flipped, was_flipped),
            "kill {number}: {after} {release}"
        );
        let answered = load::once(lab.enter(Place::Client).unwrap(), listener(8000)).unwrap();
        assert_eq!(after["active"], answered.as_str(), "kill {number}");
        until("each step of the release is in the journal", || {
            steps_are_told(&lab, release)
        });
        *ends.entry(state.to_owned()).or_insert(0) += 1;
    }
    println!("{ends:?}");

    // Each line of the journal is whole, and each flip that the kernel made is in there.
    let text = fs::read_to_string(lab.directory().join("state/journal.jsonl")).unwrap();
    let entries: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap_or_else(|_| panic!("torn: {line}")))
        .collect();
    let last = service(&lab)["generation"].as_u64().unwrap();
    for generation in 1..=last {
        let told = entries.iter().any(|entry| {
            let is_flip = entry["action"] == "flip" && entry["phase"] == "intent";
            is_flip && entry["generation"] == generation - 1
        });
        assert!(told, "no intent to flip to generation {generation}");
    }
    assert!(last > u64::from(KILLS) / 2, "few flips: {last}");
}
