//! What the daemon makes of a request, up to the word that it would store.

use axum::{
    extract::Query,
    http::{HeaderMap, HeaderName, HeaderValue, Uri, header},
};
use bg_common::service::CutoverWord;
use bg_userspace::{
    api::{CanaryRequest, DEADLINE, FlipRequest, Kind, Refusal, RollbackRequest},
    config::{DrainPlan, FlipMode, MAX_DURATION},
    daemon::requests::{FlowsQuery, ReloadQuery, body, condition, deadline, query},
    switch::{self, Switch},
};

use crate::bytes::Bytes;

/// Decodes a request, and decides it for a service with a word.
pub fn run(data: &[u8]) {
    let mut bytes = Bytes(data);
    let kind = bytes.u8();
    let word = CutoverWord(bytes.u64());
    let headers = headers(&mut bytes);
    assert!(headers.contains_key(DEADLINE) || deadline(&headers).is_none());
    let asked = match kind % 5 {
        0 => flip(word, &headers, bytes.0),
        1 => rollback(word, &headers, bytes.0),
        2 => canary(word, &headers, bytes.0),
        3 => flows(bytes.0),
        _ => reload(bytes.0),
    };
    if let Err(refusal) = asked {
        assert!(!refusal.error.trim().is_empty(), "refused without a word");
        let code = refusal.kind.exit_code();
        assert!(code != 0 && code == refusal.code);
    }
}

fn headers(bytes: &mut Bytes<'_>) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for name in [header::IF_MATCH, HeaderName::from_static(DEADLINE)] {
        let length = bytes.u8();
        if let Ok(value) = HeaderValue::from_bytes(bytes.take(length.into()))
            && length > 0
        {
            headers.insert(name, value);
        }
    }
    headers
}

fn flip(word: CutoverWord, headers: &HeaderMap, bytes: &[u8]) -> Result<(), Refusal> {
    let mut request: FlipRequest = body(bytes)?;
    condition(headers, &mut request.if_generation)?;
    let usual = (FlipMode::Drain, DrainPlan::default());
    let switch = switch::flip("llm", word, &request, usual, |_| {
        vec!["10.0.1.10".to_owned()]
    })?;
    assert!(request.force, "a silent target");
    assert_ne!(switch.to.active(), word.active());
    assert!(
        request
            .if_generation
            .is_none_or(|asked| asked == word.generation())
    );
    told(&switch);
    Ok(())
}

fn rollback(word: CutoverWord, headers: &HeaderMap, bytes: &[u8]) -> Result<(), Refusal> {
    let mut request: RollbackRequest = body(bytes)?;
    condition(headers, &mut request.if_generation)?;
    let leave = request.leave.as_deref().map(switch::colour).transpose()?;
    let leave = leave.unwrap_or_else(|| switch::bad_colour(word));
    if let Some(switch) = switch::rollback(word, leave, request.mode, DrainPlan::default()) {
        assert_eq!((switch.to.active(), switch.to.canary()), (leave.other(), 0));
        told(&switch);
    }
    Ok(())
}

/// What is said of a switch is what is in it.
fn told(switch: &Switch) {
    assert_eq!(switch.to.canary(), 0);
    let next = switch.from.generation().wrapping_add(1);
    let told = switch::describe("llm", switch);
    assert_eq!((told.generation, switch.to.generation()), (next, next));
    assert!(
        told.drain_s
            .is_none_or(|drain| drain <= MAX_DURATION.as_secs())
    );
    assert!(!switch::detail(switch).is_empty());
}

fn canary(word: CutoverWord, headers: &HeaderMap, bytes: &[u8]) -> Result<(), Refusal> {
    let mut request: CanaryRequest = body(bytes)?;
    condition(headers, &mut request.if_generation)?;
    let after = switch::canary("llm", word, &request, |_| Vec::new())?;
    assert_eq!(
        after.with_canary(0),
        word.with_canary(0),
        "more than the share changed"
    );
    let asked = request.percent.unwrap_or(f64::NAN);
    let is = switch::percent(after.canary());
    assert!((asked - is).abs() <= 0.0016, "{asked} % became {is} %");
    Ok(())
}

fn flows(bytes: &[u8]) -> Result<(), Refusal> {
    let asked: FlowsQuery = query(Query::try_from_uri(&uri(bytes)?))?;
    asked.colour.as_deref().map(switch::colour).transpose()?;
    Ok(())
}

fn reload(bytes: &[u8]) -> Result<(), Refusal> {
    let _: ReloadQuery = query(Query::try_from_uri(&uri(bytes)?))?;
    Ok(())
}

fn uri(bytes: &[u8]) -> Result<Uri, Refusal> {
    Uri::try_from(bytes).map_err(|error| Refusal::new(Kind::Usage, error.to_string()))
}

/// One request of each kind, and some that are wrong.
pub fn seeds() -> Vec<Vec<u8>> {
    let request = |kind: u8, etag: &str, deadline: &str, rest: &str| {
        let mut seed = vec![kind];
        seed.extend([0, 17, 0, 17, 0x40, 0, 1, 1]); // a word
        for value in [etag, deadline] {
            seed.push(value.len() as u8);
            seed.extend(value.bytes());
        }
        seed.extend(rest.bytes());
        seed
    };
    vec![
        request(
            0,
            "\"17\"",
            "123456",
            r#"{"to":"green","mode":"drain","drain_s":60,"if_generation":17,"force":true,"why":"é"}"#,
        ),
        request(0, "*", "", r#"{"force":true,"mode":"cut"}"#),
        request(0, "", "", ""),
        request(1, "", "", r#"{"mode":"drain","leave":"blue","why":null}"#),
        request(1, "\"17\"", "", "{}"),
        request(2, "", "", r#"{"percent":12.5,"force":true,"dry_run":true}"#),
        request(2, "", "", r#"{"percent":0.0001}"#),
        request(
            3,
            "",
            "",
            "/v1/services/llm/flows?colour=blue&limit=10&all=true",
        ),
        request(4, "", "", "/v1/reload?dry_run=true"),
        request(0, "W/\"1\"", "x", r#"["green"]"#),
    ]
}

#[cfg(test)]
mod tests {
    use crate::seeds::try_out;

    #[test]
    fn any_request_is_decided_or_refused_with_a_word() {
        try_out(super::run, &super::seeds(), 100_000);
    }
}
