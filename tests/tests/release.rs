//! Releases, as operators see them: gates against real servers, real flips, and a
//! daemon that is killed in every state.

use std::{
    fs::{self, Permissions},
    os::unix::{
        fs::{PermissionsExt as _, chown},
        process::CommandExt as _,
    },
    process::Command,
};

use bg_tests::{
    lab::{Lab, Place, default_service, listener},
    load::{self, until},
    terminal::Terminal,
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// A user, and a group, of nobody's.
const NOBODY: u32 = 65_534;

/// The usual service with tables about releases; `DIR` is the lab's directory.
fn lab(tables: &str) -> Lab {
    let lab = Lab::new().unwrap();
    let tables = tables.replace("DIR", lab.directory().to_str().unwrap());
    lab.served_as(&(default_service() + &tables)).unwrap()
}

/// Another configuration for the same service.
fn reconfigure(lab: &Lab, tables: &str) {
    lab.configure(&(default_service() + tables)).unwrap();
    lab.ask(&["reload"]).unwrap();
}

fn state(lab: &Lab) -> String {
    let status = lab.status().unwrap();
    status["services"][0]["state"].as_str().unwrap().to_owned()
}

fn release(lab: &Lab) -> Value {
    lab.ask(&["release", "status", "llm"]).unwrap()["release"].clone()
}

/// The active colour and the generation.
fn word(lab: &Lab) -> (String, u64) {
    let service = &lab.status().unwrap()["services"][0];
    let active = service["active"].as_str().unwrap().to_owned();
    (active, service["generation"].as_u64().unwrap())
}

fn at(active: &str, generation: u64) -> (String, u64) {
    (active.to_owned(), generation)
}

fn new_flow(lab: &Lab) -> String {
    load::once(lab.enter(Place::Client).unwrap(), listener(8000)).unwrap()
}

fn notes(lab: &Lab) -> Vec<String> {
    let release = release(lab);
    let notes = release["notes"].as_array().unwrap().iter();
    notes
        .map(|note| note["text"].as_str().unwrap().to_owned())
        .collect()
}

fn killed_and_started(lab: &mut Lab) {
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.start().unwrap();
}

/// What is kept of a release.
fn kept(lab: &Lab) -> Value {
    let file = lab.directory().join("state/releases/llm.json");
    serde_json::from_slice(&fs::read(file).unwrap()).unwrap()
}

/// When its wait ends, milliseconds since the boot.
fn deadline(lab: &Lab) -> u64 {
    kept(lab)["machine"]["release"]["until_ms"]
        .as_u64()
        .unwrap()
}

/// As if the daemon had been killed in another phase.
fn killed_in(lab: &mut Lab, phase: Value) {
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let mut kept = kept(lab);
    kept["machine"]["release"]["phase"] = phase;
    let file = lab.directory().join("state/releases/llm.json");
    fs::write(file, serde_json::to_vec(&kept).unwrap()).unwrap();
    lab.start().unwrap();
}

const SMOKE: &str = r#"
[[service.llm.gate]]
name = "smoke"
kind = "http"
path = "/"
body = "green"
"#;

#[test]
fn one_command_takes_a_good_release_from_gates_to_the_held_standby() {
    let lab = lab(&format!(
        r#"{SMOKE}
[[service.llm.gate]]
name = "script"
kind = "exec"
command = ["/bin/sh", "-c", "echo $BGSWITCH_SERVICE $BGSWITCH_RELEASE $BGSWITCH_COLOUR $BGSWITCH_VERSION $BGSWITCH_BACKENDS"]
[service.llm.bake]
signals = false
duration = "1s"
settle = "0s"
[service.llm.standby]
hold = "1h"
"#
    ));
    assert_eq!(state(&lab), "STEADY");
    let wrong = ["release", "start", "llm", "--version", "model@9"];
    let (code, _, err) = lab.tell(&wrong).unwrap();
    assert_eq!(code, 2);
    assert!(
        err.contains("llm's green is configured as model@2, not model@9"),
        "{err}"
    );

    let good = [
        "release",
        "start",
        "llm",
        "--version",
        "model@2",
        "--wait",
        "-m",
        "monday",
    ];
    let (code, out, err) = lab.tell(&good).unwrap();
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let mut lines = out.lines();
    for expected in [
        "  VALIDATING   r-1 to green (model@2)  by root(0)  (monday)",
        "  VALIDATING   gate smoke runs",
        "  VALIDATING   gate smoke: pass, 10.0.2.10:8000 answered 200 ",
        "  VALIDATING   gate script runs",
        "  VALIDATING   gate script: pass, exit code 0: llm r-1 green model@2 10.0.2.10:8000 10.0.2.11:8000 [fd00:2::10]:8000",
        "  SWITCHING    all gates are passed",
        "  BAKING       new flows go to green",
        "  STANDBY      the bake is over; neither health checks nor signals: nothing was looked at",
        "llm  STANDBY  since ",
        "  why     the bake is over; ",
        "  next    the release is done at ",
    ] {
        let line = lines.next().unwrap_or_default();
        assert!(
            line.contains(expected),
            "{expected} is not in {line}: {out}"
        );
    }
    assert_eq!(
        (word(&lab), new_flow(&lab)),
        (at("green", 1), "green".to_owned())
    );
    let history = lab.ask(&["history", "llm"]).unwrap();
    let entries = history["entries"].as_array().unwrap();
    let flip = entries
        .iter()
        .find(|e| e["action"] == "flip" && e["phase"] == "result");
    assert_eq!(flip.unwrap()["why"], "release r-1 (model@2)");
    let last = entries.iter().rfind(|e| e["action"] == "release").unwrap();
    assert!(
        last["detail"]
            .as_str()
            .unwrap()
            .starts_with("r-1 STANDBY: ")
    );

    // The old colour is held, until somebody says otherwise.
    let before = release(&lab)["until"].clone();
    let extended = lab.ask(&["standby", "extend", "llm", "2h"]).unwrap();
    assert!(extended["release"]["until"].as_str() > before.as_str());
    let retired = lab.ask(&["standby", "retire", "llm"]).unwrap();
    assert_eq!(
        (&retired["state"], &retired["release"]["code"]),
        (&json!("STEADY"), &json!(0))
    );
    assert_eq!(lab.tell(&["standby", "retire", "llm"]).unwrap().0, 5);
    assert_eq!(
        lab.tell(&["release", "status", "llm", "--wait"]).unwrap().0,
        0
    );
}

#[test]
fn the_end_of_a_release_that_gives_way_to_another_is_in_the_journal() {
    let lab = lab(
        "[service.llm.bake]\nsignals = false\nduration = \"0s\"\nsettle = \"0s\"\n\
         [service.llm.standby]\nhold = \"1h\"\n",
    );
    let start = ["release", "start", "llm", "--force", "--wait"];
    for _ in 0..2 {
        let (code, out, err) = lab.tell(&start).unwrap();
        assert_eq!(code, 0, "{out}{err}");
    }
    let history = lab.ask(&["history", "llm"]).unwrap();
    let mut entries = history["entries"].as_array().unwrap().iter();
    let told = "r-1 SUPERSEDED: another release was started";
    assert!(entries.any(|entry| entry["detail"] == told), "{history}");
}

#[test]
fn a_hold_ends_by_itself_and_its_hook_changes_nothing() {
    let lab = lab(&format!(
        "{SMOKE}[service.llm.bake]\nsignals = false\nduration = \"0s\"\nsettle = \"0s\"\n[service.llm.standby]\nhold = \"1s\"\n\
         [[service.llm.hook]]\nname = \"scale-down\"\nwhen = \"after-standby\"\nkind = \"exec\"\n\
         command = [\"/bin/sh\", \"-c\", \"echo $BGSWITCH_OLD_COLOUR is down; exit 3\"]\n"
    ));
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("the release is done", || state(&lab) == "STEADY");
    assert_eq!(word(&lab), at("green", 1));
    until("its hook is heard", || {
        notes(&lab).last().unwrap() == "hook scale-down: fail, exit code 3: blue is down"
    });
    assert_eq!(
        (state(&lab), word(&lab)),
        ("STEADY".to_owned(), at("green", 1))
    );
    assert!(
        notes(&lab)
            .contains(&"blue was held for its time, and need not stay up any more".to_owned())
    );
}

#[test]
fn a_gate_that_fails_or_cannot_say_keeps_the_word_where_it_is() {
    let gate = |script: &str| {
        format!(
            "{SMOKE}[[service.llm.gate]]\nname = \"last\"\nkind = \"exec\"\ncommand = [\"/bin/sh\", \"-c\", \"{script}\"]\n"
        )
    };
    let lab = lab(&gate("echo bad answers; exit 1"));
    let start = ["release", "start", "llm", "--wait"];
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 6, "{out}");
    assert_eq!(
        err,
        "bgswitch: r-1 of llm is FAILED: gate last: fail, exit code 1: bad answers\n"
    );
    assert_eq!(
        (state(&lab), word(&lab)),
        ("FAILED".to_owned(), at("blue", 0))
    );
    let gates = release(&lab)["gates"].clone();
    assert_eq!(
        (
            &gates[0]["result"],
            &gates[1]["result"],
            &gates[1]["evidence"]
        ),
        (
            &json!("pass"),
            &json!("fail"),
            &json!("exit code 1: bad answers")
        )
    );

    // Nothing that answers, and something that answers wrongly.
    for (tables, said) in [
        ("port = 9\n", "10.0.2.10:9 cannot be reached: "),
        ("status = 204\n", "10.0.2.10:8000 answered 200, not 204"),
        (
            "json = \"/state\"\n",
            "10.0.2.10:8000 answered 200, but no JSON",
        ),
    ] {
        reconfigure(&lab, &format!("{SMOKE}{tables}"));
        let (code, _, err) = lab.tell(&start).unwrap();
        assert_eq!(code, 6, "{err}");
        assert!(err.contains(said), "{err}");
        assert_eq!(word(&lab), at("blue", 0));
    }

    // A gate that cannot say pauses; a human may let it go on, and it is written down.
    reconfigure(&lab, &gate("exit 75"));
    let (code, _, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 7, "{err}");
    assert_eq!(
        (state(&lab), word(&lab)),
        ("PAUSED".to_owned(), at("blue", 0))
    );
    let (code, _, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 5);
    assert!(err.contains("another release runs: r-5 is PAUSED"), "{err}");
    assert_eq!(
        lab.tell(&["release", "resume", "llm", "--wait"]).unwrap().0,
        7
    );
    lab.ask(&["release", "resume", "llm", "--force", "-m", "known flake"])
        .unwrap();
    until("it is flipped", || state(&lab) == "BAKING");
    assert_eq!(word(&lab), at("green", 1));
    let release = release(&lab);
    assert_eq!(release["gates"][1]["forced_by"], "root(0)");
    let history = lab.ask(&["history", "llm"]).unwrap();
    let mut entries = history["entries"].as_array().unwrap().iter();
    let forced = entries.find(|e| e["detail"] == "r-5 PAUSED: gate last was passed over");
    assert_eq!(forced.unwrap()["why"], "known flake");
}

#[test]
fn a_flip_waits_for_an_approval_and_not_for_ever() {
    let approval = |more: &str| format!("{SMOKE}[service.llm.approval]\nrequired = true\n{more}");
    let lab = lab(&approval("expires = \"8s\"\n"));
    let start = ["release", "start", "llm", "--wait=ready"];
    let (code, _, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 7, "{err}");
    assert!(
        err.contains("Approve it: bgswitch release approve llm"),
        "{err}"
    );
    assert_eq!(word(&lab), at("blue", 0));
    until("nobody has approved it", || state(&lab) == "ABORTED");
    let (code, _, err) = lab.tell(&["release", "status", "llm", "--wait"]).unwrap();
    assert_eq!(code, 9);
    assert!(err.contains("nobody approved it within 8s"), "{err}");
    assert_eq!(word(&lab), at("blue", 0));
    // One command waits for it, and says who is asked.
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 9, "{out}{err}");
    let asked = "  Approve it: bgswitch release approve llm\n";
    assert_eq!(out.matches(asked).count(), 1, "{out}");
    let never = ["release", "start", "llm", "--wait=never"];
    assert_eq!(lab.tell(&never).unwrap().0, 2);

    reconfigure(&lab, &approval(""));
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it waits", || state(&lab) == "READY");
    lab.ask(&["release", "reject", "llm", "-m", "not on a friday"])
        .unwrap();
    assert_eq!(
        (state(&lab), word(&lab)),
        ("ABORTED".to_owned(), at("blue", 0))
    );
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it waits", || state(&lab) == "READY");
    let approved = lab.ask(&["release", "approve", "llm"]).unwrap();
    assert_eq!(
        (&approved["state"], &approved["release"]["approved_by"]),
        (&json!("BAKING"), &json!("root(0)"))
    );
    assert_eq!(
        (word(&lab), new_flow(&lab)),
        (at("green", 1), "green".to_owned())
    );
}

#[test]
fn on_a_terminal_one_line_says_how_far_it_is_from_gates_to_the_held_standby() {
    const COLUMNS: u16 = 60;
    let lab = lab(&format!(
        "{SMOKE}[[service.llm.gate]]\nname = \"load\"\nkind = \"load\"\npath = \"/\"\nrate = 20\n\
         duration = \"10s\"\n[service.llm.approval]\nrequired = true\n\
         [service.llm.bake]\nsignals = false\nduration = \"10s\"\nsettle = \"0s\"\n"
    ));
    let start = ["release", "start", "llm", "--wait"];
    let mut shown = Terminal::start(&lab, &start, COLUMNS).unwrap();
    shown.until_seen("llm  VALIDATING  gate load runs: ");
    shown.until_seen(" of 200 requests sent");
    shown.until_seen("llm  READY  all gates are passed; it waits for an approval");
    lab.ask(&["release", "approve", "llm"]).unwrap();
    shown.until_seen("llm  BAKING  new flows go to green; ");
    assert_eq!(shown.end().unwrap(), 0);
    // What was written over fitted in its line, and nothing of it is left.
    let seen = shown.seen().to_owned();
    let lines = seen.split("\r\n").skip(1);
    let mut left = Vec::new();
    for line in lines {
        let (over, kept) = line.rsplit_once("\r\x1b[K").unwrap_or(("", line));
        for over in over.split("\r\x1b[K") {
            assert!(over.chars().count() < usize::from(COLUMNS), "{over}");
        }
        left.push(kept);
    }
    let mut left = left.into_iter();
    for expected in [
        "VALIDATING   r-1 to green (model@2)",
        "VALIDATING   gate smoke: pass, ",
        "VALIDATING   gate load: pass, sent ",
        "READY        all gates are passed; it waits for an approval",
        "   Approve it: bgswitch release approve llm",
        "it is approved  by root(0)",
        "BAKING       new flows go to green",
        "STANDBY      the bake is over; ",
        "llm  STANDBY  since ",
    ] {
        assert!(
            left.any(|line| line.contains(expected)),
            "{expected}: {seen}"
        );
    }
}

#[test]
fn who_asked_for_it_does_not_approve_it() {
    let approval = "[service.llm.approval]\nrequired = true\nnot_requester = true\n";
    let lab = lab(&(SMOKE.to_owned() + approval));
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it waits", || state(&lab) == "READY");
    let approve = ["release", "approve", "llm"];
    let (code, _, err) = lab.tell(&approve).unwrap();
    assert_eq!(code, 4, "{err}");
    assert_eq!(
        (state(&lab), word(&lab)),
        ("READY".to_owned(), at("blue", 0))
    );

    // Somebody else, of the group that may open the socket.
    let group = Some(NOBODY);
    chown(lab.directory().join("sock"), None, group).unwrap();
    chown(lab.directory(), None, group).unwrap();
    let mode = Permissions::from_mode(0o750);
    fs::set_permissions(lab.directory(), mode).unwrap();
    let asked = lab.bgswitch(&approve).unwrap();
    // Where the checkout is, nobody else may look.
    let program = lab.directory().join("bgswitch");
    fs::copy(asked.get_program(), &program).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    let mut other = Command::new(program);
    other.args(asked.get_args()).uid(NOBODY).gid(NOBODY);
    let approved = other.output().unwrap();
    let err = String::from_utf8_lossy(&approved.stderr).into_owned();
    assert_eq!(approved.status.code(), Some(0), "{err}");
    until("it is flipped", || word(&lab) == at("green", 1));
    let release = release(&lab);
    assert_eq!(release["requester"], "root(0)");
    assert_eq!(release["approved_by"], format!("nobody({NOBODY})"));
    let history = lab.ask(&["history", "llm"]).unwrap();
    let mut entries = history["entries"].as_array().unwrap().iter();
    let flip = entries.find(|entry| entry["action"] == "flip").unwrap();
    assert_eq!(flip["actor"], release["approved_by"]);
}

#[test]
fn nobody_who_decides_in_time_agrees_where_that_is_configured() {
    let approval =
        "[service.llm.approval]\nrequired = true\nexpires = \"1s\"\non_expiry = \"flip\"\n";
    let lab = lab(&(SMOKE.to_owned() + approval));
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it is flipped", || word(&lab) == at("green", 1));
    let notes = release(&lab)["notes"].to_string();
    assert!(notes.contains("READY"), "{notes}");
}

/// Law 5: a release stands in nobody's way, and a flip by hand ends it.
#[test]
fn a_rollback_in_the_bake_is_one_step() {
    let lab = lab(SMOKE);
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it bakes", || state(&lab) == "BAKING");
    assert_eq!(lab.tell(&["release", "abort", "llm"]).unwrap().0, 5);
    let back = lab
        .ask(&["rollback", "llm", "-m", "wrong answers"])
        .unwrap();
    assert_eq!(
        (&back["to"], &back["already"]),
        (&json!("blue"), &json!(false))
    );
    assert_eq!(new_flow(&lab), "blue");
    until("the release hears of it", || state(&lab) == "ROLLED_BACK");
    let release = release(&lab);
    assert_eq!(
        (&release["code"], &release["over"]),
        (&json!(1), &json!(true))
    );
    let last = release["notes"].as_array().unwrap().last().unwrap().clone();
    assert_eq!(
        (&last["actor"], &last["text"]),
        (
            &json!("root(0)"),
            &json!("rolled back by hand: new flows go to blue")
        )
    );

    // And a flip by hand ends one that waits.
    reconfigure(
        &lab,
        &format!("{SMOKE}[service.llm.approval]\nrequired = true\n"),
    );
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it waits", || state(&lab) == "READY");
    lab.ask(&["flip", "llm"]).unwrap();
    until("the release hears of it", || state(&lab) == "SUPERSEDED");
    assert_eq!(
        lab.tell(&["release", "status", "llm", "--wait"]).unwrap().0,
        5
    );
    assert_eq!(word(&lab), at("green", 3));
}

/// A gate that counts its runs, and waits for a word.
const WAITS: &str = r#"
[[service.llm.gate]]
name = "waits"
kind = "exec"
command = ["/bin/sh", "-c", "echo run >> DIR/runs; for i in $(seq 1200); do test -e DIR/go && exit 0; sleep 0.05; done; exit 1"]
timeout = "60s"
[service.llm.approval]
required = true
[service.llm.bake]
signals = false
duration = "1h"
"#;

#[test]
fn a_release_goes_on_after_kill_9_in_every_state() {
    let mut lab = lab(WAITS);
    let runs = lab.directory().join("runs");
    let count = || {
        fs::read_to_string(&runs)
            .unwrap_or_default()
            .lines()
            .count()
    };

    lab.ask(&["release", "start", "llm"]).unwrap();
    until("the gate runs", || count() == 1);
    killed_and_started(&mut lab);
    assert_eq!(state(&lab), "VALIDATING");
    until("the gate runs again", || count() == 2);
    fs::write(lab.directory().join("go"), "").unwrap();
    until("it waits", || state(&lab) == "READY");

    let expires = deadline(&lab);
    killed_and_started(&mut lab);
    assert_eq!((state(&lab), deadline(&lab)), ("READY".to_owned(), expires));
    assert_eq!((count(), word(&lab)), (2, at("blue", 0)));

    // Between the file and the store: it goes on.
    killed_in(&mut lab, json!("switching"));
    until("it bakes", || state(&lab) == "BAKING");
    assert_eq!(
        (word(&lab), new_flow(&lab)),
        (at("green", 1), "green".to_owned())
    );
    // Between the store and the file: the word says that it was done.
    killed_in(&mut lab, json!("switching"));
    until("it bakes", || state(&lab) == "BAKING");
    assert_eq!(word(&lab), at("green", 1));

    killed_and_started(&mut lab);
    until("it bakes anew", || {
        notes(&lab).last().unwrap() == "the daemon was restarted, so it bakes from the beginning"
    });
    assert_eq!(
        (state(&lab), word(&lab)),
        ("BAKING".to_owned(), at("green", 1))
    );

    lab.ask(&["release", "pause", "llm"]).unwrap();
    killed_and_started(&mut lab);
    assert_eq!(state(&lab), "PAUSED");
    lab.ask(&["release", "resume", "llm", "--force"]).unwrap();
    let held = deadline(&lab);
    killed_and_started(&mut lab);
    assert_eq!((state(&lab), deadline(&lab)), ("STANDBY".to_owned(), held));
    lab.ask(&["standby", "retire", "llm"]).unwrap();
    killed_and_started(&mut lab);
    assert_eq!(
        (state(&lab), word(&lab)),
        ("STEADY".to_owned(), at("green", 1))
    );
    assert_eq!(release(&lab)["id"], "r-1");
}

/// A rollback by itself that was decided is carried out by the next daemon.
#[test]
fn a_rollback_by_itself_goes_on_after_kill_9() {
    let mut lab = lab(SMOKE);
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it bakes", || state(&lab) == "BAKING");
    killed_in(&mut lab, json!("switching_back"));
    until("it is back", || state(&lab) == "ROLLED_BACK");
    assert_eq!(
        (word(&lab), new_flow(&lab)),
        (at("blue", 2), "blue".to_owned())
    );
    assert_eq!(
        lab.tell(&["release", "status", "llm", "--wait"]).unwrap().0,
        10
    );
}

/// Law 4: what somebody stored without the daemon is believed.
#[test]
fn a_rollback_without_the_daemon_ends_the_release() {
    let mut lab = lab(SMOKE);
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it bakes", || state(&lab) == "BAKING");
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert_eq!(lab.tell(&["rollback", "llm"]).unwrap().0, 0);
    assert_eq!(new_flow(&lab), "blue");
    lab.start().unwrap();
    until("the release hears of it", || state(&lab) == "ROLLED_BACK");
    assert_eq!(word(&lab), at("blue", 2));
}

#[test]
fn nothing_is_released_unlooked_at_unless_forced() {
    let lab = lab("");
    let (code, _, err) = lab.tell(&["release", "start", "llm"]).unwrap();
    assert_eq!(code, 2);
    assert!(err.contains("nothing would be looked at"), "{err}");
    assert_eq!(word(&lab), at("blue", 0));
    assert_eq!(lab.tell(&["release", "approve", "llm"]).unwrap().0, 5);
    assert_eq!(lab.tell(&["release", "status", "web"]).unwrap().0, 2);
    lab.ask(&["release", "start", "llm", "--force", "-m", "it burns"])
        .unwrap();
    until("it bakes", || state(&lab) == "BAKING");
    assert_eq!(notes(&lab)[0], "r-1 to green (model@2), gates passed over");
}

/// What gates have tested is what serves.
#[test]
fn a_release_does_not_flip_to_backends_that_its_gates_have_not_seen() {
    let lab = lab(&format!("{SMOKE}[service.llm.approval]\nrequired = true\n"));
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it waits", || state(&lab) == "READY");
    let file = fs::read_to_string(lab.config()).unwrap();
    fs::write(lab.config(), file.replace("\"10.0.2.11\", ", "")).unwrap();
    lab.ask(&["reload"]).unwrap();
    let (code, _, err) = lab.tell(&["release", "approve", "llm", "--wait"]).unwrap();
    assert_eq!(code, 5);
    assert!(
        err.contains("green's backends have changed since the release began"),
        "{err}"
    );
    assert_eq!(
        (state(&lab), word(&lab)),
        ("ABORTED".to_owned(), at("blue", 0))
    );
}

/// Kept before each step, or no step: what cannot be written down is not flipped.
#[test]
fn a_release_that_cannot_be_kept_does_not_flip() {
    let lab = lab(SMOKE);
    // A directory where the file should be.
    let file = lab.directory().join("state/releases/llm.json");
    fs::create_dir_all(file.join("in the way")).unwrap();
    let (code, _, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("it was not flipped: "), "{err}");
    assert!(err.contains("llm.json was not written: "), "{err}");
    assert_eq!(word(&lab), at("blue", 0));
    fs::remove_dir_all(file).unwrap();
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it bakes", || state(&lab) == "BAKING");
}

/// The API says the same as the command, and says what is wrong with a request.
#[test]
fn the_api_has_releases_too() {
    let lab = lab(SMOKE);
    let path = |rest: &str| format!("http://localhost/v1/services/{rest}");
    let socket = lab.directory().join("sock");
    let call = |method: &str, rest: &str, body: &str| -> Value {
        let output = lab
            .command(Place::Gateway, "curl")
            .unwrap()
            .args(["-s", "--unix-socket"])
            .arg(&socket)
            .args(["-X", method, "-d", body, &path(rest)])
            .output()
            .unwrap();
        serde_json::from_slice(&output.stdout).unwrap()
    };
    let none = call("GET", "llm/release", "");
    assert_eq!(
        none,
        json!({"schema": 1, "service": "llm", "active": "blue", "generation": 0, "state": "STEADY", "release": null})
    );
    for (rest, body, kind) in [
        ("llm/release/start", r#"{"colour": "blue"}"#, "usage"),
        ("llm/release/start", r#"{"to": "red"}"#, "usage"),
        ("llm/release/start", r#"{"to": "blue"}"#, "conflict"),
        (
            "llm/release/start",
            r#"{"if_generation": 1}"#,
            "stale_generation",
        ),
        ("llm/release/approve", r#"{"force": true}"#, "usage"),
        ("llm/release/begin", "{}", "not_found"),
        ("web/release/approve", "{}", "not_found"),
        ("llm/standby/extend", "{}", "usage"),
        ("llm/standby/retire", "{}", "conflict"),
        ("llm/release/abort", r#"{"force": true}"#, "usage"),
        ("llm/flip", r#"{"if_share": 655}"#, "stale_generation"),
        (
            "llm/canary",
            r#"{"percent": 5, "if_share": 655}"#,
            "stale_generation",
        ),
    ] {
        assert_eq!(call("POST", rest, body)["kind"], kind, "{rest} {body}");
    }
    assert_eq!(word(&lab), at("blue", 0));
    let began = call("POST", "llm/release/start", r#"{"why": "monday"}"#);
    assert_eq!(
        (&began["schema"], &began["release"]["id"]),
        (&json!(1), &json!("r-1"))
    );
    until("it bakes", || state(&lab) == "BAKING");
    let now = call("GET", "llm/release", "");
    assert_eq!(now["release"]["notes"][0]["why"], "monday");
}
