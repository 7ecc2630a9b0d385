//! When the daemon is dead, hangs, or cannot write: what still works, what does
//! not, and what it says. Laws 3, 4 and 5.

use std::{fs, os::unix::process::CommandExt as _, process::Command};

use bg_tests::lab::{Lab, binary, default_service};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::{Value, json};

fn lab() -> Lab {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    lab
}

#[test]
fn without_a_daemon_it_is_3_and_says_what_to_do() {
    let lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    let socket = lab.directory().join("sock").display().to_string();
    for words in [
        &["status"][..],
        &["flip", "llm"],
        &["flows"],
        &["reload"],
        &[],
    ] {
        let (code, out, err) = lab.tell(words).unwrap();
        assert_eq!((code, out.as_str()), (3, ""), "{words:?}");
        assert_eq!(
            err,
            format!(
                "bgswitch: the daemon is not running (nobody listens on {socket}). Nothing forwards here \
                 either; `bgswitch run` begins it\n"
            )
        );
    }
    // Nothing to roll back where nothing forwards.
    let (code, _, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 11);
    assert_eq!(
        err,
        format!(
            "bgswitch: the daemon does not run, and without it: opening the pinned state in {}: there is none: \
             nothing forwards here\n",
            lab.bpffs().display()
        )
    );
    // A socket that is named is the one that counts.
    let (_, _, err) = lab.tell(&["status", "--socket", "/nowhere"]).unwrap();
    assert!(err.contains("(nobody listens on /nowhere)"), "{err}");
}

#[test]
fn a_rollback_needs_no_daemon_and_the_next_one_knows_of_it() {
    let mut lab = lab();
    lab.ask(&["flip", "llm"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let (code, out, err) = lab
        .tell(&["rollback", "llm", "-m", "the daemon died"])
        .unwrap();
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        err,
        "bgswitch: warning: the daemon does not run: the word was stored without it\n"
    );
    assert!(
        out.starts_with("llm  green -> blue   generation 1 -> 2   stored in "),
        "{out}"
    );
    assert!(out.ends_with("undo: bgswitch rollback llm\n"), "{out}");
    let (code, _, err) = lab.tell(&["rollback", "lmm"]).unwrap();
    assert_eq!(code, 2);
    assert!(
        err.ends_with("there is no service `lmm`, only: llm\n"),
        "{err}"
    );

    lab.start().unwrap();
    assert_eq!(active(&lab), (json!("blue"), json!(2)));
    let told: Vec<Value> = entries(&lab)
        .iter()
        .filter(|e| e["action"] == "rollback")
        .map(|e| {
            json!([
                e["actor"],
                e["phase"],
                e["generation"],
                e["detail"],
                e["why"]
            ])
        })
        .collect();
    let detail = "green -> blue, cut, without the daemon";
    assert_eq!(
        told,
        [
            json!(["root(0)", "intent", 1, detail, "the daemon died"]),
            json!(["root(0)", "result", 2, detail, "the daemon died"]),
        ]
    );
    assert!(
        !entries(&lab)
            .iter()
            .any(|e| e["action"] == "changed_outside")
    );
}

#[test]
fn a_drain_outlives_the_daemon() {
    let mut lab = lab();
    let flipped = lab.ask(&["flip", "llm", "--drain", "1h"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.start().unwrap();
    let until = |lab: &Lab, colour: &str| {
        lab.ask(&["status"]).unwrap()["services"][0]["colours"][colour]["draining_until"].clone()
    };
    assert_eq!(until(&lab, "blue"), flipped["draining_until"]);
    assert_eq!(until(&lab, "green"), Value::Null);

    // Also one that began without the daemon.
    lab.end_daemon(Signal::SIGTERM).unwrap();
    let (code, out, err) = lab
        .tell(&["-o", "json", "rollback", "llm", "--mode", "drain"])
        .unwrap();
    assert_eq!(code, 0);
    assert_eq!(
        err,
        "bgswitch: warning: the daemon does not run: the word was stored without it\n\
         bgswitch: warning: the deadline of the drain passes unheeded until the daemon runs\n"
    );
    let flipped: Value = serde_json::from_str(&out).unwrap();
    assert!(flipped["draining_until"].is_string() && flipped["store_ns"].is_u64());
    lab.start().unwrap();
    assert_eq!(until(&lab, "green"), flipped["draining_until"]);
    assert_eq!(until(&lab, "blue"), Value::Null);
}

#[test]
fn a_rollback_works_while_the_configuration_is_half_edited() {
    let mut lab = lab();
    lab.ask(&["flip", "llm"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    let service = default_service();
    let edited = service.replace("tcp://", "tpc://");
    lab.configure(&edited).unwrap();
    let (code, out, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(
        out.starts_with("llm  green -> blue   generation 1 -> 2 "),
        "{out}"
    );
    assert!(
        err.contains("must begin with tcp:// or udp://; going by what the daemon noted\n"),
        "{err}"
    );
    lab.configure(&service).unwrap();
    lab.start().unwrap();
    assert_eq!(active(&lab), (json!("blue"), json!(2)));
}

#[test]
fn the_kernel_is_believed_over_the_file() {
    let mut lab = lab();
    let state = lab.directory().join("state/state.json");
    let before = fs::read(&state).unwrap();
    lab.ask(&["flip", "llm"]).unwrap();
    lab.end_daemon(Signal::SIGKILL).unwrap();
    // The file of an earlier time, then no file, then garbage.
    for (file, generation) in [(Some(before), 1), (None, 2), (Some(b"{".to_vec()), 3)] {
        match file {
            Some(bytes) => fs::write(&state, bytes).unwrap(),
            None => fs::remove_file(&state).unwrap(),
        }
        lab.start().unwrap();
        assert_eq!(active(&lab).1, generation);
        lab.ask(&["flip", "llm"]).unwrap();
        lab.end_daemon(Signal::SIGKILL).unwrap();
    }
    lab.start().unwrap();
    let outside: Vec<Value> = entries(&lab)
        .into_iter()
        .filter(|e| e["action"] == "changed_outside")
        .map(|e| e["detail"].clone())
        .collect();
    assert_eq!(
        outside,
        ["blue generation 0 -> green generation 1: not by this daemon, believed"]
    );
}

#[test]
fn a_daemon_that_hangs_is_9_and_does_nothing_when_it_is_too_late() {
    let lab = lab();
    let daemon = Pid::from_raw(lab.daemon_pid().unwrap() as i32);
    kill(daemon, Signal::SIGSTOP).unwrap();
    for words in [&["status"][..], &["flip", "llm"]] {
        let (code, out, err) = lab
            .tell(&[&["--timeout", "300ms"], words].concat())
            .unwrap();
        assert_eq!((code, out.as_str()), (9, ""), "{err}");
        let expected = "bgswitch: the daemon did not answer within 300ms: ";
        assert!(err.starts_with(expected), "{err}");
    }
    // Law 5: the word is stored all the same, and by nobody twice.
    let (code, out, err) = lab
        .tell(&["--timeout", "300ms", "rollback", "llm"])
        .unwrap();
    assert_eq!(code, 0, "{err}");
    assert_eq!(
        err,
        "bgswitch: warning: the daemon does not answer: the word was stored without it\n"
    );
    assert!(
        out.starts_with("llm  blue -> green   generation 0 -> 1 "),
        "{out}"
    );
    kill(daemon, Signal::SIGCONT).unwrap();
    assert_eq!(active(&lab), (json!("green"), json!(1)));
    assert!(!entries(&lab).iter().any(|e| e["action"] == "flip"));
}

#[test]
fn a_journal_that_cannot_be_written_stops_a_flip_but_no_rollback() {
    let lab = lab();
    let journal = lab.directory().join("state/journal.jsonl");
    fs::remove_file(&journal).unwrap();
    fs::create_dir(&journal).unwrap();
    let trouble = format!(
        "the journal {} was not written: Is a directory (os error 21)",
        journal.display()
    );
    let (code, out, err) = lab.tell(&["flip", "llm"]).unwrap();
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        err,
        format!(
            "bgswitch: llm was not flipped: {trouble}. `bgswitch flip --force` flips all the same\n"
        )
    );
    assert_eq!(active(&lab), (json!("blue"), json!(0)));
    for (words, generation) in [
        (&["flip", "llm", "--force"][..], 1),
        (&["rollback", "llm"], 2),
    ] {
        let (code, _, err) = lab.tell(words).unwrap();
        assert_eq!(code, 0);
        assert_eq!(err, format!("bgswitch: warning: {trouble}\n").repeat(2));
        assert_eq!(active(&lab).1, generation);
    }
    let (code, _, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""), "no change, no entry");
    lab.configure(&default_service().replace("model@2", "model@3"))
        .unwrap();
    let (code, _, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!(
        (code, err),
        (1, format!("bgswitch: {trouble}. Nothing was applied\n"))
    );
}

#[test]
fn who_is_not_permitted_gets_4() {
    let mut lab = lab();
    let socket = lab.directory().join("sock").display().to_string();
    for words in [
        &["status"][..],
        &["flip", "llm"],
        &["rollback", "llm"],
        &["history"],
    ] {
        let expected = format!(
            "bgswitch: no permission for {socket}: be root, or a member of the group bgswitch\n"
        );
        assert_eq!(as_nobody(&lab, words), (4, expected), "{words:?}");
    }
    lab.end_daemon(Signal::SIGTERM).unwrap();
    for words in [&["rollback", "llm"][..], &["detach"], &["run"]] {
        let (code, err) = as_nobody(&lab, words);
        assert_eq!(code, 4, "{words:?}: {err}");
        let errno = [
            "Permission denied (os error 13)",
            "Operation not permitted (os error 1)",
        ];
        assert!(errno.iter().any(|errno| err.contains(errno)), "{err}");
    }
    lab.start().unwrap();
    assert_eq!(active(&lab), (json!("blue"), json!(0)));
}

#[test]
fn a_configuration_that_hides_the_daemon_is_named() {
    let lab = lab();
    // Wrong in other places, the socket is still found; in TOML, it is not.
    lab.configure("[service.llm]\n").unwrap();
    assert_eq!(lab.tell(&["status"]).unwrap().0, 0);
    fs::write(lab.config(), "[gateway\n").unwrap();
    let (code, _, err) = lab.tell(&["status"]).unwrap();
    assert_eq!(code, 3);
    let cause = format!(
        "{}:1: unclosed table, expected `]`\n",
        lab.config().display()
    );
    assert!(
        err.ends_with(&format!(
            ". Or name the daemon's socket with --socket: {cause}"
        )),
        "{err}"
    );
    let socket = lab.directory().join("sock").display().to_string();
    assert_eq!(lab.tell(&["status", "--socket", &socket]).unwrap().0, 0);
}

fn as_nobody(lab: &Lab, words: &[&str]) -> (i32, String) {
    let mut command = Command::new(binary().unwrap());
    command.arg("--config").arg(lab.config()).args(words);
    command.uid(65534).gid(65534);
    let output = command.output().unwrap();
    assert!(output.stdout.is_empty());
    let code = output.status.code().unwrap_or(-1);
    (code, String::from_utf8_lossy(&output.stderr).into_owned())
}

/// The active colour and the generation of the first service.
fn active(lab: &Lab) -> (Value, Value) {
    let status = lab.ask(&["status"]).unwrap();
    let service = &status["services"][0];
    (service["active"].clone(), service["generation"].clone())
}

fn entries(lab: &Lab) -> Vec<Value> {
    let history = lab.ask(&["history"]).unwrap();
    history["entries"].as_array().unwrap().clone()
}
