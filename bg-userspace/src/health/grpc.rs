//! The standard health service of gRPC (`grpc.health.v1.Health/Check`): one unary call
//! over HTTP/2 without TLS.

use std::{fmt, net::SocketAddr};

use http_body_util::{BodyExt as _, Full, Limited};
use hyper::{
    Request,
    body::Bytes,
    client::conn::http2::handshake,
    header::{CONTENT_TYPE, HeaderMap, HeaderValue, TE, USER_AGENT},
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::task::JoinSet;

use super::{Outcome, http::chain, tcp::connect, tidy};

/// The answer to a check has a few bytes.
const MAX_ANSWER: usize = 4096;
/// Of a message on the wire: one byte for compression, four for its length.
const PREFIX: usize = 5;

/// `kind = "grpc"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GrpcProbe {
    /// The service that is asked for; empty for the server as a whole.
    pub service: String,
}

impl fmt::Display for GrpcProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "service {:?}", self.service)
    }
}

/// Asks whether the service is `SERVING`.
pub async fn probe(endpoint: SocketAddr, probe: &GrpcProbe) -> Outcome {
    let request = Request::post(format!("http://{endpoint}/grpc.health.v1.Health/Check"))
        .header(CONTENT_TYPE, HeaderValue::from_static("application/grpc"))
        .header(TE, HeaderValue::from_static("trailers"))
        .header(USER_AGENT, concat!("bgswitch/", env!("CARGO_PKG_VERSION")))
        .body(Full::new(request(&probe.service)))
        .map_err(|error| tidy(&error.to_string()))?;
    let failed = |error: hyper::Error| tidy(&format!("HTTP/2: {}", chain(&error)));
    let stream = TokioIo::new(connect(endpoint).await?);
    let (mut sender, connection) = handshake(TokioExecutor::new(), stream)
        .await
        .map_err(failed)?;
    // It ends with this function, however that ends.
    let mut driver = JoinSet::new();
    driver.spawn(connection);
    let answer = sender.send_request(request).await.map_err(failed)?;
    let (head, body) = answer.into_parts();
    if head.status.as_u16() != 200 {
        return Err(format!("HTTP status {}", head.status.as_u16()).into());
    }
    let collected = Limited::new(body, MAX_ANSWER).collect().await;
    let collected = collected.map_err(|error| tidy(&format!("HTTP/2: {}", chain(&*error))))?;
    // Without a message, its status is among the headers.
    let trailers = collected.trailers().unwrap_or(&head.headers);
    finished(trailers)?;
    let trouble = match status(&collected.to_bytes()) {
        Some(1) => return Ok(()),
        Some(0) => "UNKNOWN".to_owned(),
        Some(2) => "NOT_SERVING".to_owned(),
        Some(3) => "SERVICE_UNKNOWN".to_owned(),
        Some(other) => format!("serving status {other}"),
        None => "the answer is no HealthCheckResponse".to_owned(),
    };
    Err(trouble.into())
}

/// Whether the call itself succeeded.
fn finished(trailers: &HeaderMap) -> Result<(), String> {
    let text = |name: &str| trailers.get(name).map(HeaderValue::as_bytes);
    let Some(code) = text("grpc-status") else {
        return Err("the answer is not gRPC's".to_owned());
    };
    let code = String::from_utf8_lossy(code);
    let name = match code.as_ref() {
        "0" => return Ok(()),
        "5" => "NOT_FOUND: it does not know the service".to_owned(),
        "12" => "UNIMPLEMENTED: it has no health service".to_owned(),
        "14" => "UNAVAILABLE".to_owned(),
        other => format!("gRPC status {other}"),
    };
    let message = text("grpc-message").map(String::from_utf8_lossy);
    Err(tidy(&match message.filter(|message| !message.is_empty()) {
        Some(message) => format!("{name} ({message})"),
        None => name,
    }))
}

/// A `HealthCheckRequest` as it is sent: its one field is number 1, a string.
fn request(service: &str) -> Bytes {
    let mut message = Vec::new();
    if !service.is_empty() {
        message.push(1 << 3 | 2);
        varint(service.len() as u64, &mut message);
        message.extend(service.as_bytes());
    }
    let mut bytes = vec![0];
    bytes.extend((message.len() as u32).to_be_bytes());
    bytes.extend(message);
    bytes.into()
}

/// Seven bits a byte, the lowest first, a high bit where there are more.
fn varint(mut value: u64, into: &mut Vec<u8>) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

/// The status of a `HealthCheckResponse`: field 1, a number, 0 where it is absent.
fn status(bytes: &[u8]) -> Option<u64> {
    let (prefix, mut message) = bytes.split_at_checked(PREFIX)?;
    let length = u32::from_be_bytes(*prefix.last_chunk()?);
    if prefix[0] != 0 || message.len() != length as usize {
        return None;
    }
    let mut status = 0;
    while !message.is_empty() {
        let tag = take_varint(&mut message)?;
        match tag & 7 {
            0 => {
                let value = take_varint(&mut message)?;
                if tag >> 3 == 1 {
                    status = value;
                }
            }
            1 => message = message.get(8..)?,
            2 => {
                let length = take_varint(&mut message)?;
                message = message.get(usize::try_from(length).ok()?..)?;
            }
            5 => message = message.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

fn take_varint(message: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = message.split_first()?;
        *message = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use hyper::{Response, body::Incoming, server::conn::http2, service::service_fn};
    use tokio::net::TcpListener;

    use super::*;
    use crate::health::fake::{self, Does, nobody};

    /// What a server answers: its message, and the trailers behind it.
    type Answer = (&'static [u8], &'static [(&'static str, &'static str)]);

    /// A server that knows the service `llm` and itself.
    async fn serving(answer: Answer) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let service = service_fn(move |request| answered(request, answer));
                let server = http2::Builder::new(TokioExecutor::new());
                tokio::spawn(server.serve_connection(TokioIo::new(stream), service));
            }
        });
        address
    }

    async fn answered(
        request: Request<Incoming>,
        (message, trailers): Answer,
    ) -> Result<Response<http_body_util::combinators::BoxBody<Bytes, Infallible>>, Infallible> {
        assert_eq!(request.uri().path(), "/grpc.health.v1.Health/Check");
        assert_eq!(request.headers()[CONTENT_TYPE], "application/grpc");
        assert_eq!(request.headers()[TE], "trailers");
        let asked = request.into_body().collect().await.unwrap().to_bytes();
        let known = [&b"\0\0\0\0\0"[..], b"\0\0\0\0\x05\x0a\x03llm"].contains(&&asked[..]);
        let (message, trailers) = if known {
            (message, trailers)
        } else {
            (&b""[..], &[("grpc-status", "5")][..])
        };
        let mut map = HeaderMap::new();
        for (name, value) in trailers {
            map.insert(*name, HeaderValue::from_static(value));
        }
        let answer = Response::builder().header(CONTENT_TYPE, "application/grpc");
        let body = Full::new(Bytes::from_static(message));
        let body = body.with_trailers(async move { Some(Ok(map)) });
        Ok(answer.body(body.boxed()).unwrap())
    }

    fn of(service: &str) -> GrpcProbe {
        GrpcProbe {
            service: service.to_owned(),
        }
    }

    const FINE: &[(&str, &str)] = &[("grpc-status", "0")];

    #[tokio::test]
    async fn only_serving_is_good() {
        for (message, trailers, expected) in [
            (&b"\0\0\0\0\x02\x08\x01"[..], FINE, Ok(())),
            // With a field that nobody knows yet.
            (b"\0\0\0\0\x06\x12\x02ab\x08\x01", FINE, Ok(())),
            (b"\0\0\0\0\x02\x08\x02", FINE, Err("NOT_SERVING")),
            (b"\0\0\0\0\0", FINE, Err("UNKNOWN")),
            (
                b"\0\0\0\0\x02\x08",
                FINE,
                Err("the answer is no HealthCheckResponse"),
            ),
            (b"", FINE, Err("the answer is no HealthCheckResponse")),
            (
                b"\0\0\0\0\x02\x08\x01",
                &[],
                Err("the answer is not gRPC's"),
            ),
            (
                b"",
                &[("grpc-status", "12"), ("grpc-message", "unknown service")],
                Err("UNIMPLEMENTED: it has no health service (unknown service)"),
            ),
        ] {
            let address = serving((message, trailers)).await;
            for service in ["", "llm"] {
                let found = probe(address, &of(service)).await;
                assert_eq!(
                    found,
                    expected.map_err(|text| text.to_owned().into()),
                    "{message:?}"
                );
            }
        }
    }

    #[tokio::test]
    async fn the_service_is_asked_for_by_its_name() {
        let address = serving((b"\0\0\0\0\x02\x08\x01", FINE)).await;
        assert_eq!(
            probe(address, &of("embed")).await,
            Err("NOT_FOUND: it does not know the service".to_owned().into())
        );
        let long = "x".repeat(300);
        assert_eq!(request(&long)[..8], *b"\0\0\0\x01\x2f\x0a\xac\x02");
    }

    #[tokio::test]
    async fn what_is_no_answer_is_bad() {
        let refused = probe(nobody().await, &of(""))
            .await
            .unwrap_err()
            .to_string();
        assert!(refused.contains("Connection refused"), "{refused}");
        for does in [fake::answer(200, "ok"), Does::Send(Vec::new())] {
            let (address, _requests) = fake::server(does).await;
            let found = probe(address, &of("")).await.unwrap_err().to_string();
            assert!(found.starts_with("HTTP/2: "), "{found}");
        }
    }
}
