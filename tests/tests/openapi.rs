//! docs/openapi.json is held against a daemon: its routes are there with these verbs, and
//! all that is answered is as it says.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    path::Path,
};

use bg_tests::{
    api::{call, send},
    lab::{Lab, Place, default_service, listener},
    load::{once, until},
};
use serde_json::{Value, json};

fn document() -> Value {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
}

/// Closes every object: a field that it does not name is an error.
fn close(value: &mut Value) {
    match value {
        Value::Object(map) => {
            if map.get("properties").is_some_and(Value::is_object) {
                map.insert("unevaluatedProperties".to_owned(), json!(false));
            }
            map.values_mut().for_each(close);
        }
        Value::Array(values) => values.iter_mut().for_each(close),
        _ => {}
    }
}

/// Opens those again that others add fields to.
fn open_parts(document: &mut Value) {
    let mut parts = BTreeSet::new();
    extended(document, &mut parts);
    for part in parts {
        let part = document.pointer_mut(part.trim_start_matches('#')).unwrap();
        part.as_object_mut()
            .unwrap()
            .remove("unevaluatedProperties");
    }
}

fn extended(value: &Value, parts: &mut BTreeSet<String>) {
    match value {
        Value::Object(map) => {
            if let (Some(Value::String(part)), true) =
                (map.get("$ref"), map.contains_key("properties"))
            {
                parts.insert(part.clone());
            }
            map.values().for_each(|value| extended(value, parts));
        }
        Value::Array(values) => values.iter().for_each(|value| extended(value, parts)),
        _ => {}
    }
}

/// What the document says, and what of it was seen.
struct Contract {
    document: Value,
    seen: BTreeSet<(String, String)>,
}

impl Contract {
    fn new() -> Self {
        let mut document = document();
        close(&mut document["components"]);
        open_parts(&mut document);
        Self {
            document,
            seen: BTreeSet::new(),
        }
    }

    /// Holds a value against a schema of the document.
    fn assert_is(&self, what: &str, schema: &Value, value: &Value) {
        let mut schema = schema.clone();
        schema["components"] = self.document["components"].clone();
        let validator = jsonschema::draft202012::new(&schema).unwrap();
        let errors: Vec<String> = validator
            .iter_errors(value)
            .map(|error| format!("{}: {error}", error.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{what}: {errors:?} in {value}");
    }

    fn answer(&self, verb: &str, path: &str, status: u16, media: &str) -> Value {
        let responses = &self.document["paths"][path][verb.to_lowercase()]["responses"];
        let own = &responses[status.to_string()];
        let response = if own.is_null() {
            &responses["default"]
        } else {
            own
        };
        let schema = &response["content"][media]["schema"];
        assert!(schema.is_object(), "{verb} {path} {status}: not described");
        schema.clone()
    }

    /// Makes a request to a path of the document, and holds the answer against it.
    fn call(&mut self, lab: &Lab, verb: &str, path: &str, rest: &str, body: &Value) -> Value {
        let (path, query) = path.split_once('?').unwrap_or((path, ""));
        let mut to = path.replace("{service}", "llm").replace("{decision}", rest);
        if !query.is_empty() {
            to = format!("{to}?{query}");
        }
        let text = if body.is_null() {
            String::new()
        } else {
            body.to_string()
        };
        let headers = if rest.starts_with("If-Match") {
            rest
        } else {
            ""
        };
        let answer = call(lab, verb, &to, headers, &text);
        let schema = self.answer(verb, path, answer.status, "application/json");
        self.assert_is(&format!("{verb} {to}"), &schema, &answer.body);
        if answer.status == 200 {
            self.seen.insert((path.to_owned(), verb.to_owned()));
            let request = &self.document["paths"][path][verb.to_lowercase()];
            let etag = &request["responses"]["200"]["headers"]["ETag"];
            assert_eq!(etag.is_null(), answer.etag().is_none(), "{verb} {to}");
            if !body.is_null() {
                let schema = &request["requestBody"]["content"]["application/json"]["schema"];
                self.assert_is(&format!("the body of {verb} {to}"), schema, body);
            }
        }
        answer.body
    }

    /// The same for the first lines of a stream, each taken apart by `data`.
    fn stream(&mut self, lab: &Lab, path: &str, media: &str, data: impl Fn(&str) -> Option<&str>) {
        let stream = send(lab, "GET", path, "Connection: close\r\n", "").unwrap();
        let mut lines = BufReader::new(stream).lines();
        let mut head = lines
            .by_ref()
            .take_while(|line| line.as_ref().unwrap() != "");
        assert!(head.any(|line| {
            line.unwrap()
                .eq_ignore_ascii_case(&format!("content-type: {media}"))
        }));
        head.for_each(drop);
        let schema = self.answer("GET", path, 200, media);
        let _ = lab.ask(&["flip", "llm"]).unwrap();
        once(lab.enter(Place::Client).unwrap(), listener(8000)).unwrap();
        for _ in 0..2 {
            let line = lines
                .find_map(|line| data(&line.unwrap()).map(str::to_owned))
                .unwrap();
            let value = serde_json::from_str(&line).unwrap();
            self.assert_is(path, &schema, &value);
            let _ = lab.ask(&["flip", "llm"]).unwrap();
        }
        self.seen.insert((path.to_owned(), "GET".to_owned()));
    }
}

#[test]
fn every_answer_is_as_it_is_described() {
    let tables = "[service.llm.health]\nkind = \"tcp\"\ninterval = \"200ms\"\n\
        [[service.llm.gate]]\nname = \"smoke\"\nkind = \"http\"\npath = \"/\"\n\
        [service.llm.approval]\nrequired = true\n\
        [service.llm.bake]\nduration = \"0s\"\nsettle = \"0s\"\n[service.llm.standby]\nhold = \"1h\"\n";
    // Probes are over TCP: UDP's listeners would have none.
    let lab = Lab::new()
        .unwrap()
        .served_as(&(default_service() + tables))
        .unwrap();
    let mut api = Contract::new();
    let none = Value::Null;
    let service = "/v1/services/{service}";
    let of = |rest: &str| format!("{service}/{rest}");
    until("all are healthy", || {
        let status = lab.status().unwrap();
        !status["services"][0]["colours"]
            .to_string()
            .contains("\"healthy\":null")
    });
    api.call(&lab, "GET", "/v1/status", "", &none);
    api.call(&lab, "GET", service, "", &none);
    once(lab.enter(Place::Client).unwrap(), listener(8000)).unwrap();
    api.call(&lab, "GET", &of("flows?all=true"), "", &none);
    let dry = json!({"to": "green", "mode": "cut", "dry_run": true, "if_generation": 0});
    api.call(&lab, "POST", &of("flip"), "", &dry);
    api.call(
        &lab,
        "POST",
        &of("flip"),
        "If-Match: \"0\"\r\n",
        &json!({"why": "a try"}),
    );
    let stale = api.call(&lab, "POST", &of("flip"), "If-Match: \"0\"\r\n", &none);
    assert_eq!(stale["kind"], "stale_generation");
    api.call(&lab, "GET", &of("flows"), "", &none);
    api.call(&lab, "POST", &of("rollback"), "", &json!({"mode": "drain"}));
    api.call(&lab, "POST", &of("canary"), "", &json!({"percent": 12.5}));
    api.call(&lab, "POST", &of("canary"), "", &json!({"percent": 0}));
    api.call(&lab, "POST", "/v1/reload?dry_run=true", "", &none);
    api.call(&lab, "POST", "/v1/reload", "", &none);
    let client = format!(
        "protocol=tcp&client=198.51.100.10:40000&listener={}",
        listener(8000)
    );
    api.call(&lab, "GET", &format!("/v1/explain?{client}"), "", &none);
    api.call(
        &lab,
        "GET",
        "/v1/explain?protocol=icmp&client=x&listener=y",
        "",
        &none,
    );
    api.stream(&lab, "/v1/monitor", "application/x-ndjson", |line| {
        line.starts_with('{').then_some(line)
    });
    api.stream(&lab, "/v1/events", "text/event-stream", |line| {
        line.strip_prefix("data: ")
    });

    let decide = of("release/{decision}");
    api.call(&lab, "GET", &of("release"), "", &none);
    api.call(&lab, "POST", &decide, "approve", &none);
    api.call(
        &lab,
        "POST",
        &of("release/start"),
        "",
        &json!({"why": "monday"}),
    );
    let state = || lab.status().unwrap()["services"][0]["state"].clone();
    until("it waits for an approval", || state() == "READY");
    api.call(&lab, "GET", &of("release"), "", &none);
    api.call(&lab, "POST", &decide, "pause", &json!({"why": "lunch"}));
    api.call(&lab, "POST", &decide, "resume", &none);
    until("it waits again", || state() == "READY");
    api.call(&lab, "POST", &decide, "approve", &none);
    until("it holds the standby", || state() == "STANDBY");
    api.call(&lab, "GET", &of("release"), "", &none);
    api.call(
        &lab,
        "POST",
        &of("standby/extend"),
        "",
        &json!({"by_s": 60}),
    );
    api.call(&lab, "POST", &of("standby/extend"), "", &json!({"by": 60}));
    api.call(
        &lab,
        "POST",
        &of("standby/retire"),
        "",
        &json!({"force": true}),
    );
    api.call(&lab, "GET", "/v1/status", "", &none);
    api.call(&lab, "GET", "/v1/history", "", &none);

    // Nothing that is described was left out, and no other verb is served.
    for (path, verbs) in api.document["paths"].as_object().unwrap() {
        for verb in verbs.as_object().unwrap().keys() {
            let seen = (path.clone(), verb.to_uppercase());
            assert!(api.seen.contains(&seen), "{seen:?} was not seen");
        }
        let other = if verbs.get("get").is_some() {
            "POST"
        } else {
            "GET"
        };
        let to = path
            .replace("{service}", "llm")
            .replace("{decision}", "pause");
        assert_eq!(call(&lab, other, &to, "", "").status, 405, "{other} {path}");
    }
}
