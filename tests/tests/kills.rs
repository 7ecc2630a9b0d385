//! A daemon that is killed at any moment of a release: the release goes on, or ends as it
//! may, and what the journal says is what the kernel does.

use std::{collections::BTreeMap, fs, sync::Arc, time::Duration};

use bg_tests::{
    lab::{Lab, Place, default_service, listener},
    load::{self, Mood, now_ns, until},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const KILLS: u32 = 50;
/// Each takes longer: what goes wrong must be heard anew.
const BAD_KILLS: u32 = 12;

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

/// Begins a release, kills the daemon within so many microseconds, starts it again, and
/// waits until the release is over and told. Returns the service and the release, and the
/// colour that answered a new flow.
fn survived(lab: &mut Lab, seed: &mut u64, within_us: u64) -> (Value, Value, String) {
    lab.ask(&["release", "start", "llm"]).unwrap();
    std::thread::sleep(Duration::from_micros(next(seed) % within_us));
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.start().unwrap();
    let over = ["STEADY", "ABORTED", "FAILED", "ROLLED_BACK", "SUPERSEDED"];
    until("the release is over", || {
        over.contains(&service(lab)["state"].as_str().unwrap())
    });
    let release = lab.ask(&["release", "status", "llm"]).unwrap()["release"].take();
    let answered = load::once(lab.enter(Place::Client).unwrap(), listener(8000)).unwrap();
    until("each step of the release is in the journal", || {
        steps_are_told(lab, &release)
    });
    (service(lab), release, answered)
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
        let (after, release, answered) = survived(&mut lab, &mut seed, 1_350_000);
        let (state, code) = (after["state"].as_str().unwrap(), &release["code"]);
        let was_flipped = after["generation"] != generation;
        assert_eq!(
            (state == "STEADY", *code == 0, after["active"] != from),
            (was_flipped, was_flipped, was_flipped),
            "kill {number}: {after} {release}"
        );
        assert_eq!(after["active"], answered.as_str(), "kill {number}");
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

/// Whenever it is killed, also between what goes wrong, the rollback, and its end: the old
/// colour serves in the end.
#[test]
fn a_daemon_killed_at_any_moment_of_a_bad_release_leaves_the_old_colour_active() {
    let mut seed = now_ns() | 1;
    println!("seed {seed}");
    let mood = Arc::new(Mood::default());
    // A readiness check that lies.
    let tables = TABLES
        .replace("path = \"/\"", "path = \"/ready\"")
        .replace("signals = false", "cooldown = \"0s\"")
        .replace("duration = \"1s\"", "duration = \"1h\"");
    let lab = Lab::new().unwrap();
    let mut lab = lab
        .served_in(&(default_service() + &tables), &mood)
        .unwrap();
    let load = lab.load().unwrap();
    mood.fail(1000);
    for number in 1..=BAD_KILLS {
        let (after, release, answered) = survived(&mut lab, &mut seed, 4_000_000);
        assert_eq!(
            (&after["state"], &release["code"], &after["active"]),
            (&json!("ROLLED_BACK"), &json!(10), &json!("blue")),
            "kill {number}: {after} {release}"
        );
        // There, and back.
        assert_eq!(after["generation"], 2 * number, "kill {number}");
        assert_eq!(answered, "blue", "kill {number}");
    }
    drop(load);
}
