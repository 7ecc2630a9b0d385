//! Steps of a release beside its gates, its flip and its bake, as operators see them:
//! real servers, real clients, and a daemon that is killed on the way.

use std::{
    fs::File,
    sync::{Arc, atomic::Ordering},
};

use bg_tests::{
    lab::{Lab, Place, default_service, listener},
    load::{self, Mood, until},
};
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// The usual service with tables about releases, and green servers of a mood.
fn lab(tables: &str) -> (Lab, Arc<Mood>) {
    let mood = Arc::default();
    let lab = Lab::new().unwrap();
    let tables = tables.replace("DIR", lab.directory().to_str().unwrap());
    let service = default_service() + &tables;
    (lab.served_in(&service, &mood).unwrap(), mood)
}

fn reconfigure(lab: &Lab, tables: &str) {
    lab.configure(&(default_service() + tables)).unwrap();
    lab.ask(&["reload"]).unwrap();
}

fn service(lab: &Lab) -> Value {
    lab.status().unwrap()["services"][0].clone()
}

fn state(lab: &Lab) -> String {
    service(lab)["state"].as_str().unwrap().to_owned()
}

/// The active colour, the generation, and the rounded share of the other one.
fn word(lab: &Lab) -> (String, u64, u64) {
    let service = service(lab);
    let active = service["active"].as_str().unwrap().to_owned();
    let share = service["canary_percent"].as_f64().unwrap();
    (
        active,
        service["generation"].as_u64().unwrap(),
        share.round() as u64,
    )
}

fn at(active: &str, generation: u64, share: u64) -> (String, u64, u64) {
    (active.to_owned(), generation, share)
}

fn release(lab: &Lab) -> Value {
    lab.ask(&["release", "status", "llm"]).unwrap()["release"].clone()
}

fn notes(lab: &Lab) -> Vec<String> {
    let release = release(lab);
    let notes = release["notes"].as_array().unwrap().iter();
    notes
        .map(|note| note["text"].as_str().unwrap().to_owned())
        .collect()
}

fn client(lab: &Lab) -> File {
    lab.enter(Place::Client).unwrap()
}

/// Two steps; the lab's client is one address, which only a share of 100 % is sure to hold.
fn canary(seconds: u32) -> String {
    format!(
        "[[service.llm.canary]]\npercent = 0.01\nfor = \"1s\"\n\
         [[service.llm.canary]]\npercent = 100\nfor = \"{seconds}s\"\n\
         [service.llm.bake]\nsettle = \"0s\"\nduration = \"1s\"\non_inconclusive = \"pause\"\n"
    )
}

/// A share that lasts until somebody ends it.
const LASTS: &str = "[[service.llm.canary]]\npercent = 25\nfor = \"1h\"\n[service.llm.bake]\n";

/// Law 4: the share is in the word, which outlives the daemon; the step begins anew.
#[test]
fn a_canary_rises_by_what_is_heard_also_over_kill_9_and_flips() {
    let (mut lab, _) = lab(&canary(8).replace("for = \"1s\"", "for = \"1h\""));
    let load = lab.load().unwrap();
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it has its share", || state(&lab) == "CANARY");
    assert_eq!(service(&lab)["canary_percent"].as_f64(), Some(7.0 / 655.36));
    let told = lab.tell(&["release", "status", "llm"]).unwrap().1;
    assert!(told.contains("the share grows, if all is well"), "{told}");
    // Too few ever come by for such a share to be known: a human goes on.
    lab.ask(&["release", "pause", "llm"]).unwrap();
    lab.ask(&["release", "resume", "llm", "--force"]).unwrap();
    until("all new flows go there", || {
        word(&lab) == at("blue", 0, 100)
    });
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert_eq!(load::once(client(&lab), listener(8000)).unwrap(), "green");
    lab.start().unwrap();
    until("it says so", || {
        notes(&lab).contains(
            &"the daemon was restarted, so the step begins anew: 100 % of new flows go to green, step 2 of 2"
                .to_owned(),
        )
    });
    assert_eq!(word(&lab), at("blue", 0, 100));
    until("it is flipped", || word(&lab) == at("green", 1, 0));
    assert!(notes(&lab).contains(&"step 2 is over, green is well".to_owned()));
    load::assert_flawless(&load.finish().unwrap());
}

#[test]
fn a_canary_that_fails_a_tenth_of_its_requests_loses_its_share_at_once() {
    let (lab, mood) = lab(&LASTS.replace("25", "100"));
    let load = lab.load().unwrap();
    mood.fail(100);
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 10, "{out}{err}");
    assert!(
        err.contains("ROLLED_BACK: green fails: ")
            && err.contains("answers have a status of 5xx")
            && err.contains("new flows go to blue"),
        "{err}"
    );
    assert_eq!(word(&lab), at("blue", 1, 0));
    assert_eq!(load::once(client(&lab), listener(8000)).unwrap(), "blue");
    let answers = load.finish().unwrap();
    let hurt = answers.iter().filter(|answer| answer.result.is_err());
    assert!(hurt.count() > 0 && mood.failed_ns.load(Ordering::Relaxed) > 0);
}

#[test]
fn a_canary_of_which_too_little_is_heard_waits_for_a_human() {
    let (lab, _) = lab(&canary(1));
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 7, "{out}{err}");
    assert!(err.contains("too little is known of green"), "{err}");
    assert!(err.contains("end it: bgswitch release abort llm"), "{err}");
    // Who decides nothing keeps the share; who aborts takes it back.
    assert_eq!(service(&lab)["canary_percent"].as_f64(), Some(7.0 / 655.36));
    let aborted = lab.ask(&["release", "abort", "llm"]).unwrap();
    assert_eq!(
        (&aborted["state"], &aborted["release"]["code"]),
        (&json!("ABORTED"), &json!(1))
    );
    assert_eq!(word(&lab), at("blue", 1, 0));
}

/// Law 5: whoever stores a word by hand is believed, and asked nothing.
#[test]
fn what_is_stored_by_hand_ends_a_canary() {
    let (mut lab, _) = lab(LASTS);
    let begin = |lab: &Lab| {
        lab.ask(&["release", "start", "llm"]).unwrap();
        until("it has its share", || word(lab).2 == 25);
        assert_eq!(lab.tell(&["release", "start", "llm"]).unwrap().0, 5);
    };
    let ends = |lab: &Lab, wanted: &str, code: u8| {
        until("the release hears of it", || state(lab) == wanted);
        assert_eq!(release(lab)["code"], json!(code));
    };
    begin(&lab);
    lab.ask(&["rollback", "llm"]).unwrap();
    assert_eq!(word(&lab), at("blue", 1, 0));
    ends(&lab, "ROLLED_BACK", 1);
    // Once more goes nowhere: least of all to the colour that was just left.
    let again = lab.ask(&["rollback", "llm"]).unwrap();
    assert_eq!(again["already"], true);
    assert_eq!(word(&lab), at("blue", 1, 0));

    begin(&lab);
    lab.ask(&["canary", "llm", "0"]).unwrap();
    ends(&lab, "ROLLED_BACK", 1);
    assert_eq!(word(&lab), at("blue", 1, 0));

    begin(&lab);
    lab.ask(&["canary", "llm", "10"]).unwrap();
    ends(&lab, "SUPERSEDED", 5);
    assert_eq!(word(&lab), at("blue", 1, 10));

    begin(&lab);
    lab.end_daemon(Signal::SIGKILL).unwrap();
    assert_eq!(lab.tell(&["rollback", "llm"]).unwrap().0, 0);
    lab.start().unwrap();
    ends(&lab, "ROLLED_BACK", 1);
    assert_eq!(word(&lab), at("blue", 2, 0));

    begin(&lab);
    lab.ask(&["flip", "llm"]).unwrap();
    ends(&lab, "SUPERSEDED", 5);
    assert_eq!(word(&lab), at("green", 3, 0));
}

/// What its gates have tested is what gets a share; what has one loses it.
#[test]
fn a_share_does_not_grow_over_backends_that_nobody_has_seen() {
    let (lab, _) = lab(LASTS);
    lab.ask(&["release", "start", "llm"]).unwrap();
    until("it has its share", || word(&lab).2 == 25);
    let fewer = default_service().replace("\"10.0.2.11\", ", "") + LASTS;
    lab.configure(&fewer).unwrap();
    lab.ask(&["reload"]).unwrap();
    lab.ask(&["release", "pause", "llm"]).unwrap();
    let (code, _, err) = lab
        .tell(&["release", "resume", "llm", "--force", "--wait"])
        .unwrap();
    assert_eq!(code, 5);
    assert!(err.contains("green's backends have changed"), "{err}");
    assert_eq!(
        (state(&lab), word(&lab)),
        ("ABORTED".to_owned(), at("blue", 1, 0))
    );
    let unwatched = LASTS.replace("[service.llm.bake]\n", "");
    lab.configure(&(default_service() + &unwatched)).unwrap();
    let (code, _, err) = lab.tell(&["reload"]).unwrap();
    assert_eq!(code, 2);
    assert!(err.contains("canary: rises unwatched"), "{err}");
}

/// Keeps what it is told, and answers with the status that its path says.
const EAR: &str = r#"
import http.server, sys
class Ear(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        with open(sys.argv[1], "ab") as heard: heard.write(body + b"\n")
        self.send_response(int(self.path.split("/")[-1]))
        self.send_header("content-length", "0")
        self.end_headers()
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()
    def log_message(self, *words): pass
http.server.ThreadingHTTPServer(("10.0.1.10", 8004), Ear).serve_forever()
"#;

/// A lab in which somebody listens to webhooks, and writes them to the file `heard`.
fn lab_with_ear(tables: &str) -> Lab {
    let (mut lab, _) = lab(tables);
    let mut command = lab.command(Place::Blue, "python3").unwrap();
    command.args(["-c", EAR]);
    command.arg(lab.directory().join("heard"));
    lab.spawn(command).unwrap();
    until("it listens", || {
        let asked = lab
            .command(Place::Blue, "curl")
            .unwrap()
            .args(["-s", "http://10.0.1.10:8004/"])
            .status();
        asked.is_ok_and(|status| status.success())
    });
    lab
}

fn hook(name: &str, when: &str, rest: &str) -> String {
    format!("[[service.llm.hook]]\nname = \"{name}\"\nwhen = \"{when}\"\n{rest}\n")
}

fn script(text: &str) -> String {
    format!("kind = \"exec\"\ncommand = [\"/bin/sh\", \"-c\", \"{text}\"]")
}

fn webhook(status: u16) -> String {
    format!("kind = \"webhook\"\nurl = \"http://10.0.1.10:8004/{status}\"")
}

/// A release that nobody looks at, but for its hooks.
const BLIND: &str = "[service.llm.bake]\nsignals = false\nsettle = \"0s\"\nduration = \"0s\"\n\
                     [service.llm.standby]\nhold = \"0s\"\n";

#[test]
fn hooks_are_told_who_is_there_before_and_after_each_step() {
    let told = "echo $BGSWITCH_WHEN $BGSWITCH_STATE $BGSWITCH_ACTIVE $BGSWITCH_COLOUR \
                $BGSWITCH_VERSION $BGSWITCH_OLD_COLOUR $BGSWITCH_OLD_VERSION >> DIR/told";
    let tables = [
        BLIND.to_owned(),
        hook("prepare", "before-gates", &script(told)),
        hook("ticket", "before-flip", &webhook(204)),
        hook("notice", "after-flip", &webhook(204)),
        hook("baked", "after-bake", &script("exit 1")),
        hook(
            "scale-down",
            "after-standby",
            &script(
                &(told.to_owned()
                    + "; echo $BGSWITCH_OLD_BACKENDS $BGSWITCH_OLD_FLOWS >> DIR/told"),
            ),
        ),
    ];
    let lab = lab_with_ear(&tables.concat());
    let flow = load::stream(client(&lab), listener(8000), 60);
    until("there is a flow", || {
        service(&lab)["colours"]["blue"]["flows"] == 1
    });
    let start = ["release", "start", "llm", "--force", "--wait"];
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 0, "{out}{err}");
    until("all hooks have said it", || {
        let said = [
            "prepare: pass",
            "ticket: pass, answered 204",
            "notice: pass, answered 204",
            "baked: fail, exit code 1",
            "scale-down: pass",
        ];
        let notes = notes(&lab);
        said.iter().all(|said| {
            notes
                .iter()
                .any(|note| note.contains(&format!("hook {said}")))
        })
    });
    assert_eq!(
        (state(&lab), word(&lab)),
        ("STEADY".to_owned(), at("green", 1, 0))
    );
    let told = std::fs::read_to_string(lab.directory().join("told")).unwrap();
    assert_eq!(
        told,
        "before-gates VALIDATING blue green model@2 blue model@1\n\
         after-standby STEADY green green model@2 blue model@1\n\
         10.0.1.10:8000 10.0.1.11:8000 [fd00:1::10]:8000 1\n"
    );
    let heard = std::fs::read_to_string(lab.directory().join("heard")).unwrap();
    let heard: Vec<Value> = heard
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let of = |told: &Value| {
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        (
            text(&told["when"]),
            text(&told["state"]),
            text(&told["active"]),
        )
    };
    assert_eq!(
        of(&heard[0]),
        ("before-flip".into(), "SWITCHING".into(), "blue".into())
    );
    assert_eq!(
        of(&heard[1]),
        ("after-flip".into(), "STEADY".into(), "green".into())
    );
    assert_eq!(heard[1]["old"]["flows"], 1);
    assert_eq!(heard[1]["canary_percent"], 0.0);
    assert_eq!(heard[1]["old"]["backends"][0], "10.0.1.10:8000");
    assert_eq!(heard[1]["backends"][0], "10.0.2.10:8000");
    drop(flow);
}

#[test]
fn a_hook_before_a_step_stops_it_and_a_rollback_waits_for_none() {
    let lab = lab_with_ear(&(BLIND.to_owned() + &hook("ticket", "before-flip", &webhook(403))));
    let start = ["release", "start", "llm", "--force", "--wait"];
    let (code, _, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 6, "{err}");
    assert!(
        err.contains("FAILED: hook ticket: fail, answered 403"),
        "{err}"
    );
    assert_eq!(word(&lab), at("blue", 0, 0));

    let goes_on = hook(
        "ticket",
        "before-flip",
        &(webhook(403) + "\non_failure = \"go-on\""),
    );
    let hangs = hook("late", "after-rollback", &script("sleep 3600"));
    reconfigure(
        &lab,
        &(BLIND.replace("hold = \"0s\"", "hold = \"1h\"") + &goes_on + &hangs),
    );
    let (code, _, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 0, "{err}");
    lab.ask(&["rollback", "llm"]).unwrap();
    assert_eq!(load::once(client(&lab), listener(8000)).unwrap(), "blue");
    until("it is over", || state(&lab) == "ROLLED_BACK");

    // One that hangs before a step does not keep anybody from ending the release.
    let hangs = hook("wait", "before-flip", &script("sleep 3600"));
    reconfigure(&lab, &(BLIND.to_owned() + &hangs));
    lab.ask(&["release", "start", "llm", "--force"]).unwrap();
    until("it runs", || state(&lab) == "SWITCHING");
    lab.ask(&["release", "abort", "llm"]).unwrap();
    assert_eq!(
        (state(&lab), word(&lab)),
        ("ABORTED".to_owned(), at("blue", 2, 0))
    );

    // Nor does a rollback go to the colour that was never flipped to: it ends the release.
    lab.ask(&["release", "start", "llm", "--force"]).unwrap();
    until("it runs", || state(&lab) == "SWITCHING");
    lab.ask(&["rollback", "llm"]).unwrap();
    until("the release hears of it", || state(&lab) == "SUPERSEDED");
    assert_eq!(word(&lab), at("blue", 3, 0));
    // Neither does a second one, nor one behind a release that has failed.
    let (code, out, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert_eq!(code, 0, "{err}");
    assert!(out.contains("llm is at blue already"), "{out}");
    assert!(
        err.contains("is SUPERSEDED. New flows do not go to green"),
        "{err}"
    );
    assert_eq!(word(&lab), at("blue", 3, 0));
    let fails = hook("no", "before-gates", &script("exit 1"));
    reconfigure(&lab, &(BLIND.to_owned() + &fails));
    assert_eq!(lab.tell(&start).unwrap().0, 6);
    let (_, _, err) = lab.tell(&["rollback", "llm"]).unwrap();
    assert!(
        err.contains("is FAILED. New flows do not go to green"),
        "{err}"
    );
    assert_eq!(word(&lab), at("blue", 3, 0));
    assert_eq!(load::once(client(&lab), listener(8000)).unwrap(), "blue");
}

#[test]
fn hooks_call_who_must_decide_and_tell_of_an_end_before_the_flip() {
    let told = script(
        "echo $BGSWITCH_WHEN $BGSWITCH_STATE $BGSWITCH_ACTIVE $BGSWITCH_CANARY_PERCENT >> DIR/told",
    );
    let tables = [
        "[[service.llm.gate]]\nname = \"unsure\"\nkind = \"exec\"\n\
         command = [\"/bin/sh\", \"-c\", \"exit 75\"]\n"
            .to_owned(),
        "[service.llm.approval]\nrequired = true\n".to_owned(),
        hook("decide", "paused", &told),
        hook("approve", "ready", &told),
        hook("clean-up", "failed", &told),
    ];
    let (lab, _) = lab(&tables.concat());
    let told = || std::fs::read_to_string(lab.directory().join("told")).unwrap_or_default();
    let paused = "paused PAUSED blue 0\n";
    let (code, _, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 7, "{err}");
    until("somebody is called", || told() == paused);
    let resume = ["release", "resume", "llm", "--force", "--wait=ready"];
    assert_eq!(lab.tell(&resume).unwrap().0, 7);
    let ready = format!("{paused}ready READY blue 0\n");
    until("somebody is called", || told() == ready);
    lab.ask(&["release", "reject", "llm"]).unwrap();
    let failed = format!("{ready}failed ABORTED blue 0\n");
    until("its end is told", || told() == failed);
    until("that is in the story", || {
        let notes = notes(&lab);
        let mut hooks = notes.iter();
        hooks.any(|note| note.starts_with("hook clean-up: pass"))
    });
    assert_eq!(
        (state(&lab), word(&lab)),
        ("ABORTED".to_owned(), at("blue", 0, 0))
    );
}

/// A hook that ran when the daemon was killed is run again.
#[test]
fn a_hook_is_run_again_after_kill_9() {
    let script = script(
        "echo run >> DIR/runs; for i in $(seq 1200); do test -e DIR/go && exit 0; sleep 0.05; done; exit 1",
    );
    let (mut lab, _) = lab(&(BLIND.to_owned() + &hook("wait", "before-flip", &script)));
    let runs = lab.directory().join("runs");
    let count = || {
        let runs = std::fs::read_to_string(&runs).unwrap_or_default();
        runs.lines().count()
    };
    lab.ask(&["release", "start", "llm", "--force"]).unwrap();
    until("it runs", || count() == 1);
    lab.end_daemon(Signal::SIGKILL).unwrap();
    lab.start().unwrap();
    until("it runs again", || count() == 2);
    assert_eq!(
        (state(&lab), word(&lab)),
        ("SWITCHING".to_owned(), at("blue", 0, 0))
    );
    std::fs::write(lab.directory().join("go"), "").unwrap();
    until("it is flipped", || word(&lab) == at("green", 1, 0));
}

/// Answers each query with the figure in a file, in the words of Prometheus' HTTP API,
/// and writes the queries to another one.
const PROMETHEUS: &str = r#"
import http.server, json, sys, urllib.parse
class Prometheus(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        url = urllib.parse.urlsplit(self.path)
        query = urllib.parse.parse_qs(url.query).get("query", [""])[0]
        with open(sys.argv[1] + "/queries", "a") as queries: queries.write(url.path + " " + query + "\n")
        try: figure = open(sys.argv[1] + "/figure").read().strip()
        except FileNotFoundError: figure = ""
        series = [{"metric": {}, "value": [0, figure]}] if figure else []
        answer = {"status": "success", "data": {"resultType": "vector", "result": series}}
        answer = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)
    def log_message(self, *words): pass
http.server.ThreadingHTTPServer(("10.0.1.10", 9090), Prometheus).serve_forever()
"#;

fn rules(prometheus: &str, bake: &str, rule: &str) -> String {
    format!(
        "[service.llm.bake]\nsignals = false\nsettle = \"0s\"\nprometheus = \"{prometheus}\"\n{bake}\n\
         [[service.llm.bake.rule]]\nname = \"errors\"\npromql = 'x{{colour=\"{{colour}}\",v=\"{{version}}\"}}'\n\
         max = 0.01\ninterval = \"1s\"\n{rule}\n"
    )
}

#[test]
fn figures_of_prometheus_decide_over_a_bake_and_a_canary() {
    let prometheus = "http://10.0.1.10:9090/p/";
    let (mut lab, _) = lab(&rules(prometheus, "duration = \"20s\"", ""));
    let mut command = lab.command(Place::Blue, "python3").unwrap();
    command.args(["-c", PROMETHEUS]).arg(lab.directory());
    lab.spawn(command).unwrap();
    until("it listens", || {
        let asked = lab
            .command(Place::Blue, "curl")
            .unwrap()
            .args(["-s", "-o", "/dev/null", "http://10.0.1.10:9090/"])
            .status();
        asked.is_ok_and(|status| status.success())
    });
    let figure = |figure: &str| {
        let (new, file) = (lab.directory().join("new"), lab.directory().join("figure"));
        std::fs::write(&new, figure).unwrap();
        std::fs::rename(new, file).unwrap();
    };
    let start = ["release", "start", "llm", "--force", "--wait"];

    figure("0.004");
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("the bake is over, green is well"), "{out}");
    let queries = std::fs::read_to_string(lab.directory().join("queries")).unwrap();
    let query = "/p/api/v1/query x{colour=\"green\",v=\"model@2\"}";
    assert!(queries.lines().any(|line| line == query), "{queries}");

    // The figure says that it fails: back, and it says with what.
    lab.ask(&["flip", "llm", "--to", "blue"]).unwrap();
    figure("0.034");
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 10, "{out}{err}");
    let ill = "ROLLED_BACK: green is ill: rule errors: 0.034 is above 0.01, ";
    let (_, times) = err.split_once(ill).expect(&err);
    // On a busy machine, one more is asked for before the third is acted on.
    let (times, rest) = times.split_once(' ').expect(&err);
    assert!(times.parse::<u32>().unwrap() >= 3, "{err}");
    assert!(rest.starts_with("times in a row, one every 1s"), "{err}");
    assert_eq!(service(&lab)["active"], "blue");

    // It does not swing to and fro: so soon, a human decides.
    let (code, out, err) = lab.tell(&start).unwrap();
    assert_eq!(code, 7, "{out}{err}");
    let cools = "it rolled back by itself just before, so a human decides";
    assert!(err.contains(cools), "{err}");
    assert_eq!(
        (state(&lab), service(&lab)["active"].clone()),
        ("PAUSED".to_owned(), json!("green"))
    );
    lab.ask(&["rollback", "llm"]).unwrap();
    until("it is over", || state(&lab) == "ROLLED_BACK");

    // A canary goes by it, too.
    let canary = "[[service.llm.canary]]\npercent = 25\nfor = \"1h\"\n";
    reconfigure(&lab, &(canary.to_owned() + &rules(prometheus, "", "")));
    let (code, out, err) = lab.tell(&["release", "start", "llm", "--wait"]).unwrap();
    assert_eq!(code, 10, "{out}{err}");
    assert!(err.contains("rule errors: 0.034 is above 0.01"), "{err}");
    assert_eq!(service(&lab)["canary_percent"], 0.0);

    // No data is inconclusive, unless it is said to be a pass; nobody there never is one.
    figure("");
    let cooled = "duration = \"15s\"\ncooldown = \"0s\"";
    for (prometheus, no_data, wanted) in [
        (prometheus, "inconclusive", 7),
        (prometheus, "pass", 0),
        ("http://10.0.1.10:9", "pass", 7),
    ] {
        reconfigure(
            &lab,
            &rules(prometheus, cooled, &format!("no_data = \"{no_data}\"")),
        );
        let (code, out, err) = lab.tell(&start).unwrap();
        assert_eq!(code, wanted, "{out}{err}");
        lab.ask(&["rollback", "llm"]).unwrap();
        until("it is over", || state(&lab) == "ROLLED_BACK");
    }
}
