//! `kind = "http"`: a GET to each backend.

use std::{fmt, io, net::SocketAddr, time::Duration};

use http_body_util::Full;
use tokio::net::TcpStream;

use super::{Target, no_port, of_all};
use crate::{
    config::HttpGate,
    health::{http, tcp::is_ours},
    release::Verdict,
};

/// Asks each backend; all must answer as they should.
pub(super) async fn run(gate: &HttpGate, limit: Duration, target: &Target) -> (Verdict, String) {
    let Some(endpoints) = target.endpoints(gate.port) else {
        return no_port();
    };
    of_all(endpoints, limit, |endpoint| ask(gate, endpoint)).await
}

/// Asks one backend.
async fn ask(gate: &HttpGate, endpoint: SocketAddr) -> (Verdict, String) {
    let stream = match TcpStream::connect(endpoint).await {
        Ok(stream) => stream,
        Err(error) => return unreachable(&error),
    };
    let badly = |error: &dyn fmt::Display| (Verdict::Fail, format!("answered badly: {error}"));
    let request = http::get(endpoint, None, &gate.path).body(Full::default());
    let request = match request {
        Ok(request) => request,
        Err(error) => return badly(&error),
    };
    let answer = match http::exchange(stream, request).await {
        Ok(answer) => answer,
        Err(error) => return badly(&error),
    };
    let status = answer.status.as_u16();
    match trouble(gate, status, &answer.body) {
        None => (Verdict::Pass, format!("answered {status}")),
        Some(trouble) => (Verdict::Fail, trouble),
    }
}

/// Who does not answer, fails; what is our own trouble, says nothing of the backend.
fn unreachable(error: &io::Error) -> (Verdict, String) {
    let verdict = if is_ours(error) {
        Verdict::Inconclusive
    } else {
        Verdict::Fail
    };
    (verdict, format!("cannot be reached: {error}"))
}

/// What is wrong with an answer.
fn trouble(gate: &HttpGate, status: u16, body: &[u8]) -> Option<String> {
    if status != gate.status {
        return Some(format!("answered {status}, not {}", gate.status));
    }
    if let Some(wanted) = &gate.body {
        let text = String::from_utf8_lossy(body);
        if !text.contains(wanted.as_str()) {
            return Some(format!("answered {status} without `{wanted}`"));
        }
    }
    let pointer = gate.json.as_ref()?;
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(body) else {
        return Some(format!("answered {status}, but no JSON"));
    };
    match (json.pointer(pointer), &gate.equals) {
        (None, _) => Some(format!("answered {status} without {pointer}")),
        (Some(_), None) => None,
        (Some(found), Some(wanted)) if http::same(found, wanted) => None,
        (Some(found), Some(wanted)) => Some(format!(
            "answered {status} with {pointer} = {found}, not {wanted}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_must_be_as_configured() {
        let gate = HttpGate {
            path: "/".to_owned(),
            port: None,
            status: 200,
            body: Some("ready".to_owned()),
            json: Some("/models/0/count".to_owned()),
            equals: Some(1.into()),
        };
        let good = br#"{"models": [{"count": 1.0, "state": "ready"}]}"#;
        assert_eq!(trouble(&gate, 200, good), None);
        for (status, body, wrong) in [
            (503, &good[..], "answered 503, not 200"),
            (200, b"{}", "answered 200 without `ready`"),
            (200, b"ready", "answered 200, but no JSON"),
            (200, br#"["ready"]"#, "answered 200 without /models/0/count"),
            (
                200,
                br#"{"models": [{"count": 2}], "is": "ready"}"#,
                "answered 200 with /models/0/count = 2, not 1",
            ),
        ] {
            assert_eq!(trouble(&gate, status, body).as_deref(), Some(wrong));
        }
    }
}
