//! The API: HTTP/1.1 on the Unix socket.

use bg_tests::{api::call, lab::Lab};
use serde_json::json;

fn lab() -> Lab {
    let mut lab = Lab::new().unwrap();
    lab.configure_default().unwrap();
    lab.start().unwrap();
    lab
}

#[test]
fn etag_and_if_match_keep_flips_apart() {
    let lab = lab();
    let service = call(&lab, "GET", "/v1/services/llm", "", "");
    assert_eq!((service.status, service.etag()), (200, Some("\"0\"")));
    assert_eq!(service.header("content-type"), Some("application/json"));
    assert_eq!(
        (&service.body["schema"], &service.body["name"]),
        (&json!(1), &json!("llm"))
    );
    let status = call(&lab, "GET", "/v1/status", "", "");
    assert_eq!((status.status, &status.body["schema"]), (200, &json!(1)));
    let mut one = service.body.clone();
    one.as_object_mut().unwrap().remove("schema");
    assert_eq!(status.body["services"], json!([one]));

    let flip =
        |condition: &str, body: &str| call(&lab, "POST", "/v1/services/llm/flip", condition, body);
    let flipped = flip("If-Match: \"0\"\r\n", "{}");
    assert_eq!((flipped.status, flipped.etag()), (200, Some("\"1\"")));
    assert_eq!(flipped.body["generation"], 1);

    // The same again, by both ways to say it.
    let stale = flip("If-Match: \"0\"\r\n", "{}");
    assert_eq!(
        (stale.status, &stale.body["kind"]),
        (412, &json!("stale_generation"))
    );
    assert_eq!(
        (&stale.body["schema"], &stale.body["code"]),
        (&json!(1), &json!(5))
    );
    assert!(
        stale.body["error"]
            .as_str()
            .unwrap()
            .starts_with("llm is at generation 1, not 0: ")
    );
    assert_eq!(flip("", r#"{"if_generation": 0}"#).status, 409);
    // Nor does a release begin for who has not seen the flip.
    let start = "/v1/services/llm/release/start";
    let late = call(&lab, "POST", start, "If-Match: \"0\"\r\n", "{}");
    assert_eq!(
        (late.status, &late.body["kind"]),
        (412, &json!("stale_generation"))
    );
    let release = call(&lab, "GET", "/v1/services/llm/release", "", "");
    assert_eq!(release.body["release"], json!(null));
    assert_eq!(release.etag(), Some("\"1\""));
    let back = call(
        &lab,
        "POST",
        "/v1/services/llm/rollback",
        "If-Match: \"0\"\r\n",
        "",
    );
    assert_eq!(back.status, 412);
    for wrong in ["17", "\"x\"", "\"70000\"", "W/\"1\"", "\"1\", \"2\""] {
        let refused = flip(&format!("If-Match: {wrong}\r\n"), "{}");
        assert_eq!(
            (refused.status, &refused.body["kind"]),
            (400, &json!("usage")),
            "{wrong}"
        );
    }
    assert_eq!(
        flip("If-Match: \"1\"\r\n", r#"{"if_generation": 0}"#).status,
        400
    );
    assert_eq!(
        call(&lab, "GET", "/v1/services/llm", "", "").etag(),
        Some("\"1\"")
    );

    // Any state will do, no body is a default one, and a rollback may ask, too.
    assert_eq!(flip("If-Match: *\r\n", "").etag(), Some("\"2\""));
    let back = call(
        &lab,
        "POST",
        "/v1/services/llm/rollback",
        "If-Match: \"2\"\r\n",
        "",
    );
    assert_eq!((back.status, back.etag()), (200, Some("\"3\"")));
}

/// A canary does not change the generation: `If-Match` keeps it out after a flip, and
/// a rollback of it, but not after another canary; the last one holds.
#[test]
fn if_match_keeps_a_canary_and_a_flip_apart() {
    let lab = lab();
    let canary = |condition: &str, percent: u32| {
        let body = format!("{{\"percent\": {percent}, \"force\": true}}");
        call(&lab, "POST", "/v1/services/llm/canary", condition, &body)
    };
    for percent in [25, 50] {
        let set = canary("If-Match: \"0\"\r\n", percent);
        assert_eq!((set.status, set.etag()), (200, Some("\"0\"")));
        assert_eq!(set.body["canary_percent"], json!(f64::from(percent)));
    }
    // Whom the canary is not to leave: asked for twice, it is left once.
    for (already, etag) in [(false, "\"1\""), (true, "\"1\"")] {
        let leave = r#"{"leave": "green"}"#;
        let back = call(&lab, "POST", "/v1/services/llm/rollback", "", leave);
        assert_eq!((back.status, back.etag()), (200, Some(etag)));
        assert_eq!(back.body["already"], already);
    }
    assert_eq!(canary("If-Match: \"0\"\r\n", 5).status, 412);
    let service = call(&lab, "GET", "/v1/services/llm", "", "");
    assert_eq!(
        (&service.body["active"], &service.body["canary_percent"]),
        (&json!("blue"), &json!(0.0))
    );
}

#[test]
fn what_is_wrong_with_a_request_is_said_in_json() {
    let lab = lab();
    let flip = "/v1/services/llm/flip";
    for (method, path, body, status, error) in [
        (
            "POST",
            flip,
            "{",
            400,
            "the body: EOF while parsing an object at line 1 column 1",
        ),
        (
            "POST",
            flip,
            "[]",
            400,
            "the body: it must be a JSON object",
        ),
        (
            "POST",
            flip,
            r#"{"color": "blue"}"#,
            400,
            "the body: unknown field `color`, expected one of `to`, `mode`, ",
        ),
        (
            "POST",
            flip,
            r#"{"if_generation": -1}"#,
            400,
            "the body: invalid value: integer `-1`",
        ),
        (
            "POST",
            flip,
            r#"{"mode": "drop"}"#,
            400,
            "the body: unknown variant `drop`, expected `drain` or `cut`",
        ),
        (
            "POST",
            flip,
            r#"{"to": "red"}"#,
            400,
            "`red` is no colour: blue or green",
        ),
        (
            "POST",
            flip,
            r#"{"drain_s": 31000000}"#,
            400,
            "a drain lasts 30 days at most",
        ),
        (
            "POST",
            flip,
            r#"{"to": "blue"}"#,
            409,
            "llm is blue already: nothing was changed",
        ),
        (
            "POST",
            "/v1/services/llm/rollback",
            r#"{"to": "blue"}"#,
            400,
            "the body: unknown field `to`",
        ),
        (
            "GET",
            "/v1/services/lmm",
            "",
            404,
            "there is no service `lmm`, only: llm",
        ),
        (
            "POST",
            "/v1/services/lmm/flip",
            "{}",
            404,
            "there is no service `lmm`, only: llm",
        ),
        (
            "POST",
            "/v1/services/llm/rollback",
            r#"{"leave": "red"}"#,
            400,
            "`red` is no colour: blue or green",
        ),
        (
            "POST",
            "/v1/services/llm/canary",
            "",
            400,
            "percent is missing: 0 to 100",
        ),
        (
            "POST",
            "/v1/services/llm/canary",
            r#"{"percent": 100.5}"#,
            400,
            "100.5 is no percentage: 0 to 100",
        ),
        (
            "POST",
            "/v1/services/lmm/canary",
            r#"{"percent": 1}"#,
            404,
            "there is no service `lmm`, only: llm",
        ),
        (
            "POST",
            "/v1/services/lmm/rollback",
            "{}",
            404,
            "there is no service `lmm`, only: llm",
        ),
        (
            "GET",
            "/v1/services/lmm/flows",
            "",
            404,
            "there is no service `lmm`, only: llm",
        ),
        (
            "GET",
            "/v1/services/llm/flows?colour=red",
            "",
            400,
            "`red` is no colour: blue or green",
        ),
        (
            "GET",
            "/v1/services/llm/flows?limit=all",
            "",
            400,
            "Failed to deserialize query string: limit: invalid digit",
        ),
        (
            "GET",
            "/v1/services/llm/flows?color=blue",
            "",
            400,
            "Failed to deserialize query string: ",
        ),
        (
            "POST",
            "/v1/reload?dry_run=perhaps",
            "",
            400,
            "Failed to deserialize query string: dry_run: ",
        ),
        ("GET", "/v2/status", "", 404, "there is no /v2/status"),
        (
            "GET",
            flip,
            "",
            405,
            "/v1/services/llm/flip wants another method",
        ),
    ] {
        let answer = call(&lab, method, path, "", body);
        let said = answer.body["error"].as_str().unwrap_or_default();
        assert!(
            answer.status == status && said.starts_with(error),
            "{method} {path} {body}: {} {said}",
            answer.status
        );
        assert_eq!(answer.body["schema"], 1);
        let code = if status == 409 { 5 } else { 2 };
        assert_eq!(answer.body["code"], code);
    }
    assert_eq!(
        call(&lab, "GET", "/v1/services/llm", "", "").etag(),
        Some("\"0\"")
    );
}

#[test]
fn a_request_that_is_too_late_does_nothing() {
    let lab = lab();
    for verb in ["flip", "rollback"] {
        let path = format!("/v1/services/llm/{verb}");
        let late = call(&lab, "POST", &path, "bgswitch-deadline-ns: 1\r\n", "{}");
        let error = format!("the {verb} of llm came too late: nothing was changed");
        assert_eq!((late.status, &late.body["error"]), (408, &json!(error)));
        assert_eq!(late.body["code"], 9);
        let service = call(&lab, "GET", "/v1/services/llm", "", "");
        assert_eq!(service.etag(), Some("\"0\""));
    }
    let deadline = format!("bgswitch-deadline-ns: {}\r\n", u64::MAX);
    let flipped = call(&lab, "POST", "/v1/services/llm/flip", &deadline, "{}");
    assert_eq!(flipped.etag(), Some("\"1\""));
}

#[test]
fn every_verb_is_there_for_scripts() {
    let lab = lab();
    let body = r#"{"to": "green", "mode": "drain", "drain_s": 60, "if_generation": 0, "dry_run": true, "force": false, "why": "a try"}"#;
    let dry = call(&lab, "POST", "/v1/services/llm/flip", "", body);
    assert_eq!(
        (dry.status, &dry.body["dry_run"], &dry.body["drain_s"]),
        (200, &json!(true), &json!(60))
    );
    let flip = body.replace("\"dry_run\": true", "\"dry_run\": false");
    assert_eq!(
        call(&lab, "POST", "/v1/services/llm/flip", "", &flip).body["generation"],
        1
    );
    let flows = call(
        &lab,
        "GET",
        "/v1/services/llm/flows?colour=blue&limit=5",
        "",
        "",
    );
    assert_eq!(
        (flows.status, flows.body),
        (
            200,
            json!({"schema": 1, "total": 0, "not_live": 0, "flows": []})
        )
    );
    let history = call(&lab, "GET", "/v1/history", "", "");
    let last = history.body["entries"]
        .as_array()
        .unwrap()
        .last()
        .unwrap()
        .clone();
    assert_eq!(
        (&last["why"], &last["actor"], &last["phase"]),
        (&json!("a try"), &json!("root(0)"), &json!("result"))
    );
    let reload = call(&lab, "POST", "/v1/reload?dry_run=true", "", "");
    assert_eq!(
        (reload.status, reload.body),
        (
            200,
            json!({"schema": 1, "changes": [], "warnings": [], "dry_run": true})
        )
    );
    assert_eq!(
        call(&lab, "POST", "/v1/reload", "", "").body["dry_run"],
        false
    );
}
