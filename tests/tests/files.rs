//! Files that a configuration names are regular ones: what a read could wait for is told,
//! and keeps nobody waiting.

use std::fs;

use bg_tests::{
    lab::{Lab, default_service},
    load::until,
};
use nix::{sys::stat::Mode, unistd::mkfifo};
use serde_json::Value;

const WRONG: &str = "is a FIFO: it must be a regular file";

fn lab(tables: &str) -> Lab {
    let lab = Lab::new().unwrap();
    mkfifo(&lab.directory().join("fifo"), Mode::S_IRWXU).unwrap();
    let tables = tables.replace("FIFO", lab.directory().join("fifo").to_str().unwrap());
    lab.served_as(&(default_service() + &tables)).unwrap()
}

#[test]
fn prompts_that_are_no_regular_file_are_told_and_hang_nothing() {
    let lab = lab("[service.llm.warm]\nfile = \"FIFO\"\ntimeout = \"1h\"\n\
         [[service.llm.gate]]\nname = \"golden\"\nkind = \"prompts\"\nfile = \"FIFO\"\ntimeout = \"1h\"\n");
    let (code, out, err) = lab.tell(&["check"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(
        out.contains(&format!("fifo: {WRONG}; its gate needs it")),
        "{out}"
    );
    lab.ask(&["release", "start", "llm"]).unwrap();
    let mut release = Value::Null;
    until("the release waits for a human", || {
        let status = lab.ask(&["release", "status", "llm"]).unwrap();
        release = status["release"].clone();
        status["state"] == "PAUSED" || status["state"] == "FAILED"
    });
    let story = release.to_string();
    assert!(story.contains(WRONG), "{story}");
}

#[test]
fn a_token_that_is_no_regular_file_is_told_and_hangs_no_probe() {
    let lab = lab(
        "[service.llm.health]\nkind = \"openai\"\nmodel = \"m\"\ntoken_file = \"FIFO\"\n\
         interval = \"200ms\"\ntimeout = \"150ms\"\nfall = 2\n",
    );
    until("every backend has fallen, and it is said why", || {
        let status = lab.status().unwrap();
        let backends = status["services"][0]["colours"]["blue"]["backends"].clone();
        backends.as_array().unwrap().iter().all(|backend| {
            let why = backend["health"]["why"].as_str().unwrap_or_default();
            why.contains(WRONG)
        })
    });
    // A pipe may be a configuration: somebody writes it.
    let file = fs::File::open(lab.config()).unwrap();
    let mut check = lab.bgswitch(&["check", "/dev/stdin"]).unwrap();
    let output = check.stdin(file).output().unwrap();
    assert!(output.status.success());
}
