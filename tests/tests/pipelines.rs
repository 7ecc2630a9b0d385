//! What docs/pipelines.md shows, run as it stands there: the script, the steps of the
//! workflow, the request with a condition, and errors for scripts.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use bg_tests::{
    api::call,
    lab::{Lab, Place, binary, default_service},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use yaml_rust2::{Yaml, YamlLoader};

/// A service whose gate wants to hear `body`, and which bakes for a moment.
fn lab(body: &str) -> Lab {
    let lab = Lab::new().unwrap();
    let tables = format!(
        "[[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/\"\nbody = \"{body}\"\n\
         [service.llm.bake]\nsignals = false\nduration = \"1s\"\nsettle = \"0s\"\n"
    );
    lab.served_as(&(default_service() + &tables)).unwrap()
}

fn docs(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../docs")
        .join(name)
}

/// The block of a kind in the page that begins like this.
fn block(kind: &str, begin: &str) -> String {
    let page = fs::read_to_string(docs("pipelines.md")).unwrap();
    let mut blocks = page.split("```").skip(1).step_by(2);
    let start = format!("{kind}\n{begin}");
    let found = blocks.find(|block| block.starts_with(&start));
    let found = found.unwrap_or_else(|| panic!("no block that begins with {start}"));
    found[kind.len() + 1..].to_owned()
}

/// `bgswitch` in the search path, as it is on a gateway.
fn installed(lab: &Lab) -> PathBuf {
    let directory = lab.directory().join("bin");
    fs::create_dir_all(&directory).unwrap();
    let (binary, config) = (binary().unwrap(), lab.config());
    let (binary, config) = (binary.display(), config.display());
    let command = directory.join("bgswitch");
    fs::write(
        &command,
        format!("#!/bin/sh\nexec {binary} --config {config} \"$@\"\n"),
    )
    .unwrap();
    fs::set_permissions(&command, fs::Permissions::from_mode(0o755)).unwrap();
    directory
}

/// A command on the gateway, as a pipeline runs it.
fn piped(lab: &Lab, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = lab.command(Place::Gateway, program).unwrap();
    let path = std::env::var("PATH").unwrap();
    command
        .env("PATH", format!("{}:{path}", installed(lab).display()))
        .env("BGSWITCH_SOCKET", lab.directory().join("sock"));
    command
}

fn said(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    (
        output.status.code().unwrap_or(-1),
        text(&output.stdout),
        text(&output.stderr),
    )
}

/// The script's exit code, stdout and stderr.
fn script(lab: &Lab, arguments: &[&str]) -> (i32, String, String) {
    let mut command = piped(lab, docs("examples/release.sh"));
    command.env("WHY", "build 1234").args(arguments);
    said(&command.output().unwrap())
}

fn active(lab: &Lab) -> Value {
    lab.status().unwrap()["services"][0]["active"].clone()
}

#[test]
fn the_script_brings_a_good_version_live() {
    let lab = lab("green");
    let (code, out, err) = script(&lab, &["llm", "model@2"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.starts_with("r-1 0 the bake is over"), "{out}");
    for line in [
        "release.sh: llm is at generation 0, blue is active\n",
        "  VALIDATING  gate smoke runs\n",
        "  BAKING  new flows go to green\n",
        "release.sh: llm is live on green\n",
    ] {
        assert!(err.contains(line), "{line} is not in {err}");
    }
    assert_eq!(active(&lab), "green");
    let history = lab.ask(&["history", "llm"]).unwrap().to_string();
    assert!(history.contains("build 1234"), "{history}");
}

#[test]
fn the_script_says_what_kept_a_version_from_going_live() {
    let mut lab = lab("purple");
    let (code, out, err) = script(&lab, &["llm", "model@2"]);
    assert_eq!(code, 6, "{out}{err}");
    assert!(out.starts_with("r-1 6 "), "{out}");
    assert!(
        err.contains("a gate failed, or a hook: the old version serves on"),
        "{err}"
    );
    assert_eq!(active(&lab), "blue");
    for (arguments, code, said) in [
        (
            &["llm", "model@9"][..],
            2,
            "is configured as model@2, not model@9",
        ),
        (&["lmm"], 2, "there is no service `lmm`, only: llm"),
    ] {
        let (found, out, err) = script(&lab, arguments);
        assert_eq!((found, out.as_str()), (code, ""), "{err}");
        assert!(err.contains(said), "{err}");
    }
    lab.end_daemon(Signal::SIGTERM).unwrap();
    let (code, _, err) = script(&lab, &["llm"]);
    assert_eq!(code, 3);
    assert!(err.contains("the daemon does not answer on "), "{err}");
}

/// The steps of the workflow that are commands, by name.
fn steps() -> Vec<(String, String)> {
    let workflow = block("yaml", "name: release\n");
    let workflow = YamlLoader::load_from_str(&workflow).unwrap();
    let job = &workflow[0]["jobs"]["release"];
    for name in ["SERVICE", "VERSION"] {
        assert!(job["env"][name].as_str().is_some(), "{name}");
    }
    let steps = job["steps"].as_vec().unwrap().iter();
    let text = |step: &Yaml, key: &str| step[key].as_str().unwrap().to_owned();
    steps
        .map(|step| (text(step, "name"), text(step, "run")))
        .collect()
}

/// Runs the steps as a runner does, up to the first one that fails: their exit codes.
fn work(lab: &Lab) -> Vec<(String, i32)> {
    let mut codes = Vec::new();
    for (name, step) in steps() {
        let mut command = piped(lab, "bash");
        command
            .args(["-e", "-c", &step])
            .env("SERVICE", "llm")
            .env("VERSION", "model@2")
            .env("GITHUB_RUN_ID", "77");
        let (code, ..) = said(&command.output().unwrap());
        codes.push((name, code));
        if code != 0 {
            break;
        }
    }
    codes
}

#[test]
fn the_workflow_brings_a_good_version_live() {
    let lab = lab("green");
    let codes = work(&lab);
    assert_eq!(codes.len(), 4);
    assert!(codes.iter().all(|(_, code)| *code == 0), "{codes:?}");
    assert_eq!(active(&lab), "green");
    let history = lab.ask(&["history", "llm"]).unwrap().to_string();
    assert!(history.contains("run 77"), "{history}");
}

#[test]
fn the_workflow_ends_where_a_gate_fails() {
    let lab = lab("purple");
    let codes = work(&lab);
    let (name, code) = codes.last().unwrap();
    assert_eq!(
        (name.as_str(), *code),
        ("Gates, flip, bake", 6),
        "{codes:?}"
    );
    assert_eq!(active(&lab), "blue");
}

#[test]
fn a_request_with_a_stale_generation_gets_412() {
    let lab = lab("green");
    let shown = block("", "curl --silent");
    let socket = lab.directory().join("sock");
    let ask = |generation: u16| {
        let text = shown
            .replace("/run/bgswitch/bgswitch.sock", socket.to_str().unwrap())
            .replace("\"17\"", &format!("\"{generation}\""));
        let output = piped(&lab, "sh").args(["-c", &text]).output().unwrap();
        let (code, out, err) = said(&output);
        assert_eq!((code, err.as_str()), (0, ""));
        let mut values = serde_json::Deserializer::from_str(&out).into_iter::<Value>();
        let mut next = || values.next().unwrap().unwrap();
        (next(), next())
    };
    let (flipped, status) = ask(0);
    assert_eq!((&flipped["generation"], &status), (&json!(1), &json!(200)));
    let (refused, status) = ask(0);
    assert_eq!(
        (&refused["kind"], &status),
        (&json!("stale_generation"), &json!(412))
    );
    assert_eq!(
        call(&lab, "GET", "/v1/services/llm", "", "").etag(),
        Some("\"1\"")
    );
}

#[test]
fn what_went_wrong_is_json_for_who_asks_for_json() {
    let mut lab = lab("purple");
    let fails = |lab: &Lab, words: &[&str], kind: &str, exit_code: i32, message: &str| {
        let (text_code, _, text) = lab.tell(words).unwrap();
        let (code, out, err) = lab.tell(&[&["-o", "json"], words].concat()).unwrap();
        assert_eq!((text_code, code), (exit_code, exit_code), "{words:?} {err}");
        let line = err.lines().last().unwrap();
        let said: Value = serde_json::from_str(line).unwrap_or_else(|_| panic!("{err}"));
        assert_eq!(said["schema"], 1);
        let error = &said["error"];
        assert_eq!(
            (&error["kind"], &error["exit_code"]),
            (&json!(kind), &json!(exit_code))
        );
        assert!(
            error["message"].as_str().unwrap().contains(message),
            "{err}"
        );
        assert!(text.contains(message), "{text}");
        (out, said)
    };
    let stale = ["flip", "llm", "--if-generation", "9"];
    let (out, _) = fails(
        &lab,
        &stale,
        "stale_generation",
        5,
        "llm is at generation 0, not 9",
    );
    assert_eq!(out, "");
    fails(
        &lab,
        &["flip", "lmm"],
        "not_found",
        2,
        "there is no service `lmm`",
    );
    fails(
        &lab,
        &["flip", "llm", "--to", "blue"],
        "conflict",
        5,
        "is blue already",
    );
    fails(
        &lab,
        &["flip", "llm", "--to", "red"],
        "usage",
        2,
        "invalid value 'red'",
    );
    fails(
        &lab,
        &["flipp"],
        "usage",
        2,
        "unrecognized subcommand 'flipp'",
    );
    // A release that was waited for is an answer all the same.
    let start = ["release", "start", "llm", "--wait"];
    let (out, _) = fails(&lab, &start, "gate_failed", 6, "FAILED");
    let release: Value = serde_json::from_str(&out).unwrap();
    assert_eq!(release["release"]["code"], 6);
    lab.end_daemon(Signal::SIGTERM).unwrap();
    fails(
        &lab,
        &["status"],
        "no_daemon",
        3,
        "start the daemon with `bgswitch run`",
    );
    fs::write(lab.config(), "[gateway]\n").unwrap();
    fails(&lab, &["run"], "usage", 2, "gateway.interfaces: is missing");
    // What is no error goes where it went.
    let (code, out, err) = lab.tell(&["-o", "json", "--version"]).unwrap();
    assert_eq!((code, err.as_str()), (0, ""));
    assert!(out.starts_with("bgswitch "), "{out}");
}
