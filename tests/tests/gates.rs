//! Gates of a release against real servers: what passes, what does not, and what
//! nobody can say.

use std::fs;

use bg_tests::{
    lab::{Lab, Place, default_service},
    load::until,
};
use serde_json::{Value, json};

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
    let start = ["release", "start", "llm", "--wait=ready"];
    let (code, _, err) = lab.tell(&start).unwrap();
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

/// Answers as a model server might: `/say/X` says its colour where `X` is `colour`, and
/// a number that nobody else says where it is `noise`.
const MODEL: &str = r#"
import http.server, itertools, json, sys, time
numbers = itertools.count()
class Model(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        length = int(self.headers.get("content-length") or 0)
        body = json.loads(self.rfile.read(length) or "{}")
        what = self.path.split("/")[-1]
        text = {"colour": sys.argv[1], "noise": str(next(numbers))}.get(what, what)
        answer = {"text": text, "prompt": body.get("prompt"), "version": sys.argv[1]}
        answer = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(answer)))
        self.end_headers()
        # The first byte is soon there, the last one is not.
        slow = "/slow/" in self.path
        self.wfile.write(answer[:slow])
        if slow: time.sleep(20)
        self.wfile.write(answer[slow:])
    do_POST = do_GET
    def log_message(self, *words): pass
class Server(http.server.ThreadingHTTPServer):
    address_family = __import__("socket").AF_INET6
Server(("::", 8003), Model).serve_forever()
"#;

/// A lab with models on port 8003 of all servers.
fn lab_with_models(tables: &str) -> Lab {
    let mut lab = lab(tables);
    for (place, colour) in [(Place::Blue, "blue"), (Place::Green, "green")] {
        let mut command = lab.command(place, "python3").unwrap();
        command.args(["-c", MODEL, colour]);
        lab.spawn(command).unwrap();
        until("the models answer", || {
            let status = lab
                .command(place, "curl")
                .unwrap()
                .args(["-s", "-o", "/dev/null", "http://localhost:8003/"])
                .status();
            status.is_ok_and(|status| status.success())
        });
    }
    lab
}

fn prompts(lab: &Lab, lines: &[&str]) {
    fs::write(lab.directory().join("golden.jsonl"), lines.join("\n")).unwrap();
}

#[test]
fn known_questions_must_be_answered_as_expected_and_as_the_active_colour_does() {
    let gate = |keys: &str| {
        format!(
            "[[service.llm.gate]]\nname = \"golden\"\nkind = \"prompts\"\nport = 8003\n\
             file = \"DIR/golden.jsonl\"\n{keys}\n{STOPS}"
        )
    };
    let lab = lab_with_models(&gate("max_total = \"1m\""));
    let sum = r#"{"name": "sum", "path": "/say/4", "body": {"prompt": "2+2"}, "expect": {"json": {"/prompt": "2+2"}, "json_matches": {"/text": "^4$"}}}"#;
    let (colour, noise) = (
        r#"{"name": "colour", "path": "/say/colour"}"#,
        r#"{"path": "/say/noise"}"#,
    );
    let ask = |lines: &[&str], keys: &str, wanted: i32, evidence: &str| {
        prompts(&lab, lines);
        reconfigure(&lab, &gate(keys));
        let (code, said) = gates_of(&lab);
        assert_eq!(code, wanted, "{said:?}");
        assert!(said[0].contains(evidence), "{evidence} is not in {said:?}");
    };
    ask(
        &[sum, colour],
        "",
        7,
        "pass: 2 prompts on 3 backends, all right, first byte within ",
    );
    let five = sum.replace("^4$", "^5$");
    ask(
        &[&five],
        "",
        6,
        "fail: 1 prompts on 3 backends, 3 wrong: sum on 10.0.2.10:8003: /text is \"4\"",
    );
    let slow = sum.replace("\"expect\"", "\"max_first_byte\": \"1ns\", \"expect\"");
    ask(
        &[&slow],
        "",
        6,
        "sum on 10.0.2.10:8003: the first byte took",
    );
    let slow = r#"{"path": "/slow/answer"}"#;
    let first = "concurrency = 3\nmax_ttft = \"15s\"\ntimeout = \"1m\"";
    ask(
        &[slow],
        first,
        7,
        "pass: 1 prompts on 3 backends, all right, ",
    );
    let total = "concurrency = 3\nmax_total = \"15s\"\ntimeout = \"1m\"";
    ask(&[slow], total, 6, "10.0.2.10:8003: the answer took ");
    let compare = "compare = [\"/text\"]";
    ask(&[sum, sum], compare, 7, "pass: 2 prompts on 3 backends");
    ask(
        &[sum, colour],
        compare,
        6,
        "1 of 2 agree with the active colour, which disagrees with itself on 0: they differ on colour",
    );
    ask(
        &[sum, colour],
        &format!("{compare}\ntolerance = 0.5"),
        7,
        "pass: ",
    );
    ask(&[sum, noise], compare, 7, "pass: 2 prompts on 3 backends");
    // Nobody can say: the noise is all there is, or nobody answers.
    ask(&[noise], compare, 7, "inconclusive: 1 prompts");
    ask(
        &[sum],
        "compare = [\"/none\"]",
        7,
        "the active colour, sum: answered without /none",
    );
    ask(&[sum, "{}"], "", 7, "golden.jsonl:2: missing field `path`");

    // `check` names the line.
    let (code, _, err) = lab.tell(&["check"]).unwrap();
    assert_eq!(code, 2);
    assert!(
        err.contains("golden.jsonl:2: missing field `path`"),
        "{err}"
    );
    fs::remove_file(lab.directory().join("golden.jsonl")).unwrap();
    let (code, out, _) = lab.tell(&["check"]).unwrap();
    assert_eq!(code, 0);
    assert!(out.contains("golden.jsonl: cannot be read: "), "{out}");
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 7, "{said:?}");
    assert!(said[0].starts_with("inconclusive: "), "{said:?}");
}

#[test]
fn parity_shows_what_differs_and_warm_prompts_reach_every_backend_before_the_gates() {
    let tables = |parity: &str| {
        format!(
            "{STOPS}[[service.llm.gate]]\nname = \"last\"\nkind = \"exec\"\ncommand = [\"/bin/true\"]\n\
             [service.llm.warm]\nport = 8003\nrepeat = 2\nfile = \"DIR/golden.jsonl\"\n\
             [service.llm.parity]\nport = 8003\ncompare = [\"/say/hello\"]\n{parity}\n"
        )
    };
    let lab = lab_with_models(&tables(""));
    prompts(
        &lab,
        &[r#"{"path": "/say/a", "body": {}}"#, r#"{"path": "/say/b"}"#],
    );
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 6);
    let differs = "- blue /say/hello /version: \"blue\" | + green /say/hello /version: \"green\"";
    assert_eq!(said[0], format!("fail: 1 differences: {differs}"));
    assert_eq!(said[1..], ["", ""].map(|_| ": ".to_owned()));

    reconfigure(&lab, &tables("allow = [\"/version\"]"));
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 7, "{said:?}");
    // Two within each colour, and one of both.
    assert_eq!(said[0], "pass: the same as blue: 5 compared");
    for backend in ["10.0.2.10:8003", "10.0.2.11:8003", "[fd00:2::10]:8003"] {
        assert!(
            said[1].contains(&format!("{backend} answered 4 of 4, p50 ")),
            "{said:?}"
        );
    }
    assert_eq!(said[2], "pass: exit code 0");

    let command =
        "allow = [\"/version\"]\ncommand = [\"/bin/sh\", \"-c\", \"echo $BGSWITCH_VERSION\"]";
    reconfigure(&lab, &tables(command));
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 6);
    assert_eq!(
        said[0],
        "fail: 2 differences: - blue command: model@1 | + green command: model@2"
    );
    // A number is no JSON that is compared by value.
    let command = "command = [\"/bin/sh\", \"-c\", \"if test $BGSWITCH_COLOUR = blue; then echo 1.1; else echo 1.10; fi\"]";
    reconfigure(&lab, &tables(&format!("allow = [\"/version\"]\n{command}")));
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 6);
    assert_eq!(
        said[0],
        "fail: 2 differences: - blue command: 1.1 | + green command: 1.10"
    );
    // What a command says in JSON may differ where that is allowed, and nowhere else.
    for (driver, wanted, evidence) in [
        ("1", 7, "pass: the same as blue: 6 compared"),
        (
            r#"\"$BGSWITCH_COLOUR\""#,
            6,
            "fail: 1 differences: - blue command /driver: \"blue\" | + green command /driver: \"green\"",
        ),
    ] {
        let script =
            format!(r#"echo '{{"version": "'$BGSWITCH_VERSION'", "driver": '{driver}'}}'"#);
        let command = json!(["/bin/sh", "-c", script]);
        reconfigure(
            &lab,
            &tables(&format!("allow = [\"/version\"]\ncommand = {command}")),
        );
        let (code, said) = gates_of(&lab);
        assert_eq!(code, wanted, "{said:?}");
        assert_eq!(said[0], evidence);
    }
}

/// The usual servers answer with a text, which says nothing of a release.
#[test]
fn a_webhook_that_does_not_say_it_holds_the_release() {
    let gate = |url: &str| {
        format!(
            "[[service.llm.gate]]\nname = \"hook\"\nkind = \"webhook\"\ntimeout = \"5s\"\nurl = \"{url}\"\n{STOPS}"
        )
    };
    let lab = lab(&gate("http://10.0.1.10:8000/"));
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 7, "{said:?}");
    assert!(
        said[0].starts_with("inconclusive: answered 200: blue, which is no"),
        "{said:?}"
    );
    reconfigure(&lab, &gate("http://10.0.1.10:9/"));
    let (code, said) = gates_of(&lab);
    assert_eq!(code, 7, "{said:?}");
    assert!(
        said[0].contains("has not said it: cannot be reached"),
        "{said:?}"
    );
}

/// Says what is in a file to who has the token, behind a moment in which it does not know.
const JUDGE: &str = r#"
import http.server, json, os, sys
class Judge(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    asked = 0
    def do_POST(self):
        told = json.loads(self.rfile.read(int(self.headers["content-length"])))
        Judge.asked += 1
        status, said = 401, ""
        if self.headers.get("authorization") == "Bearer sesame":
            status = 202 if Judge.asked == 1 else 200
            why = " ".join([told["colour"]] + told["preview"])
            said = json.dumps({"result": open(sys.argv[1]).read(), "why": why})
        said = b"" if status != 200 else said.encode()
        self.send_response(status)
        if status == 202: self.send_header("retry-after", "1")
        self.send_header("content-length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)
    def log_message(self, *words): pass
server = http.server.ThreadingHTTPServer(("10.0.1.10", 8004), Judge)
os.mknod(sys.argv[2])
server.serve_forever()
"#;

#[test]
fn a_webhook_is_asked_with_its_token_until_it_says_it() {
    let tables = format!(
        "[[service.llm.gate]]\nname = \"judge\"\nkind = \"webhook\"\ntimeout = \"1m\"\n\
         url = \"http://10.0.1.10:8004/\"\ntoken_file = \"DIR/token\"\n{STOPS}"
    );
    let mut lab = lab("");
    let file = |name: &str| lab.directory().join(name);
    let (says, ready, token) = (file("says"), file("ready"), file("token"));
    let mut judge = lab.command(Place::Blue, "python3").unwrap();
    judge.args(["-c", JUDGE]).arg(&says).arg(&ready);
    lab.spawn(judge).unwrap();
    until("it listens", || ready.exists());
    let green = "[service.llm.green]\n";
    let preview = format!("{green}preview = [\"203.0.113.12\"]\n");
    let tables = tables.replace("DIR", lab.directory().to_str().unwrap());
    let service = default_service().replace(green, &preview) + &tables;
    fs::write(&token, "sesame\n").unwrap();
    lab.configure(&service).unwrap();
    lab.ask(&["reload"]).unwrap();

    for (word, code) in [("pass", 7), ("fail", 6), ("inconclusive", 7)] {
        fs::write(&says, word).unwrap();
        let (ended, said) = gates_of(&lab);
        assert_eq!(ended, code, "{said:?}");
        let evidence = format!("{word}: green 203.0.113.12:8000 203.0.113.12:8001");
        assert_eq!(said, [evidence]);
    }
    fs::write(&token, "swordfish\n").unwrap();
    let (code, said) = gates_of(&lab);
    assert_eq!(
        (code, said),
        (6, vec!["fail: answered 401".to_owned()]),
        "who does not know the token"
    );
}
