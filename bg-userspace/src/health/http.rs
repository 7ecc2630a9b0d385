//! An HTTP/1.1 request over a connection of its own, and what its answer must be.

use std::{fmt, net::SocketAddr};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request, StatusCode,
    body::Bytes,
    client::conn::http1::handshake,
    header::{CONNECTION, HOST, HeaderValue, USER_AGENT},
    http::request::Builder,
};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::{net::TcpStream, task::JoinSet};

use super::{Outcome, Trouble, tcp::connect, tidy};

/// Longer answers are not read.
const MAX_BODY: usize = 1 << 20;

/// `kind = "http"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HttpProbe {
    /// What is asked for: path and query.
    pub path: String,
    /// The `Host` header; the endpoint if absent.
    pub host: Option<String>,
    /// The status that is right; any 2xx if absent.
    pub status: Option<u16>,
    /// What the body must contain.
    pub body: Option<String>,
    /// What the body must say, as JSON: a pointer (RFC 6901) and the value there.
    pub json: Option<(String, Value)>,
}

impl fmt::Display for HttpProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "path {}", self.path)?;
        if let Some(host) = &self.host {
            write!(f, ", host {host}")?;
        }
        if let Some(status) = self.status {
            write!(f, ", status {status}")?;
        }
        if let Some(body) = &self.body {
            write!(f, ", body {body:?}")?;
        }
        match &self.json {
            Some((pointer, value)) => write!(f, ", json {pointer:?} = {value}"),
            None => Ok(()),
        }
    }
}

/// An answer that was read whole.
pub struct Answer {
    /// Its status.
    pub status: StatusCode,
    /// Its body.
    pub body: Bytes,
}

/// Asks, and checks what is answered.
pub async fn probe(endpoint: SocketAddr, probe: &HttpProbe) -> Outcome {
    let request = get(endpoint, probe.host.as_deref(), &probe.path);
    let answer = ask(endpoint, request, Bytes::new()).await?;
    status(&answer, probe.status)?;
    if let Some(text) = &probe.body {
        let wanted = text.as_bytes();
        let mut places = answer.body.windows(wanted.len());
        if !places.any(|place| place == wanted) {
            return Err(tidy(&format!("the body does not contain {text:?}")).into());
        }
    }
    match &probe.json {
        Some((pointer, value)) => Ok(says(&answer, pointer, value)?),
        None => Ok(()),
    }
}

/// The beginning of a request.
pub fn get(endpoint: SocketAddr, host: Option<&str>, path: &str) -> Builder {
    let host = host.map_or_else(|| endpoint.to_string(), str::to_owned);
    Request::get(path)
        .header(HOST, host)
        .header(CONNECTION, HeaderValue::from_static("close"))
        .header(USER_AGENT, concat!("bgswitch/", env!("CARGO_PKG_VERSION")))
}

/// Sends a request and reads its answer.
pub async fn ask(endpoint: SocketAddr, request: Builder, body: Bytes) -> Result<Answer, Trouble> {
    let request = request
        .body(Full::new(body))
        .map_err(|error| tidy(&error.to_string()))?;
    let answer = exchange(connect(endpoint).await?, request).await;
    Ok(answer.map_err(|error| tidy(&format!("HTTP: {}", chain(&*error))))?)
}

/// The same over a connection that is there.
pub async fn exchange(
    stream: TcpStream,
    request: Request<Full<Bytes>>,
) -> Result<Answer, Box<dyn std::error::Error + Send + Sync>> {
    let (mut sender, connection) = handshake(TokioIo::new(stream)).await?;
    // It ends with this function, however that ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let answer = sender.send_request(request).await?;
    let status = answer.status();
    let body = Limited::new(answer.into_body(), MAX_BODY).collect().await?;
    Ok(Answer {
        status,
        body: body.to_bytes(),
    })
}

/// Whether the status is right: `wanted`, or any 2xx.
pub fn status(answer: &Answer, wanted: Option<u16>) -> Result<(), String> {
    let status = answer.status;
    let is_right = wanted.map_or(status.is_success(), |wanted| wanted == status.as_u16());
    is_right
        .then_some(())
        .ok_or_else(|| format!("HTTP status {}", status.as_u16()))
}

/// Whether the body says `wanted` at a pointer.
fn says(answer: &Answer, pointer: &str, wanted: &Value) -> Result<(), String> {
    let body: Value =
        serde_json::from_slice(&answer.body).map_err(|_| "the body is no JSON".to_owned())?;
    match body.pointer(pointer) {
        Some(found) if same(found, wanted) => Ok(()),
        Some(found) => Err(tidy(&format!("{pointer:?} is {found}, not {wanted}"))),
        None => Err(tidy(&format!("the body has no {pointer:?}"))),
    }
}

/// Equality of values, of numbers whatever they are written like.
pub fn same(found: &Value, wanted: &Value) -> bool {
    match (found.as_f64(), wanted.as_f64()) {
        (Some(found), Some(wanted)) => found.total_cmp(&wanted).is_eq(),
        _ => found == wanted,
    }
}

/// An error and its causes, with colons between them.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::fake::{Does, answer, nobody, server};

    fn plain() -> HttpProbe {
        HttpProbe {
            path: "/health?full=1".to_owned(),
            host: None,
            status: None,
            body: None,
            json: None,
        }
    }

    async fn outcome(does: Does, is: &HttpProbe) -> Outcome {
        let (address, _requests) = server(does).await;
        probe(address, is).await
    }

    #[tokio::test]
    async fn the_request_is_what_was_asked_for() {
        let (address, mut requests) = server(answer(204, "")).await;
        let named = HttpProbe {
            host: Some("llm.example.com".to_owned()),
            ..plain()
        };
        probe(address, &plain()).await.unwrap();
        probe(address, &named).await.unwrap();
        for host in [address.to_string().as_str(), "llm.example.com"] {
            let request = requests.recv().await.unwrap();
            assert!(
                request.starts_with("GET /health?full=1 HTTP/1.1\r\n"),
                "{request}"
            );
            for header in [&format!("host: {host}"), "connection: close"] {
                assert!(request.contains(&format!("\r\n{header}\r\n")), "{request}");
            }
        }
    }

    #[tokio::test]
    async fn the_status_must_be_right() {
        let created = HttpProbe {
            status: Some(201),
            ..plain()
        };
        for (status, is, right) in [
            (200, &plain(), true),
            (204, &plain(), true),
            (302, &plain(), false),
            (503, &plain(), false),
            (201, &created, true),
            (200, &created, false),
        ] {
            let expected = if right {
                Ok(())
            } else {
                Err(format!("HTTP status {status}").into())
            };
            assert_eq!(outcome(answer(status, ""), is).await, expected);
        }
    }

    #[tokio::test]
    async fn the_body_must_say_it() {
        let text = HttpProbe {
            body: Some("ready".to_owned()),
            ..plain()
        };
        assert_eq!(outcome(answer(200, "is ready."), &text).await, Ok(()));
        assert_eq!(
            outcome(answer(200, "is not"), &text).await,
            Err("the body does not contain \"ready\"".to_owned().into())
        );
        let json = |pointer: &str, value: Value| HttpProbe {
            json: Some((pointer.to_owned(), value)),
            ..plain()
        };
        let body = r#"{"models":[{"state":"READY","gpus":2}],"a/b":true}"#;
        for (pointer, value, expected) in [
            ("/models/0/state", Value::from("READY"), Ok(())),
            ("/models/0/gpus", Value::from(2.0), Ok(())),
            ("/a~1b", Value::from(true), Ok(())),
            (
                "/models/0/gpus",
                Value::from(4),
                Err("\"/models/0/gpus\" is 2, not 4"),
            ),
            (
                "/models/1",
                Value::from(1),
                Err("the body has no \"/models/1\""),
            ),
        ] {
            let found = outcome(answer(200, body), &json(pointer, value)).await;
            assert_eq!(
                found,
                expected.map_err(|text| text.to_owned().into()),
                "{pointer}"
            );
        }
        assert_eq!(
            outcome(answer(200, "<html>"), &json("/a", Value::from(1))).await,
            Err("the body is no JSON".to_owned().into())
        );
    }

    #[tokio::test]
    async fn what_is_no_answer_is_bad() {
        let refused = probe(nobody().await, &plain())
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("Connection refused"), "{refused}");
        let torn = "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf";
        for bytes in ["", "SSH-2.0-OpenSSH_9.2\r\n\r\n", torn] {
            let found = outcome(Does::Send(bytes.into()), &plain()).await;
            assert!(
                found.unwrap_err().to_string().starts_with("HTTP: "),
                "{bytes}"
            );
        }
        let endless = answer(200, &"x".repeat(MAX_BODY + 1));
        let found = outcome(endless, &plain()).await.unwrap_err().to_string();
        assert!(found.contains("length limit exceeded"), "{found}");
    }
}
