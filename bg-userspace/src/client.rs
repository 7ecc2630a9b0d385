//! The command line's side of the socket.

use std::{io, path::Path, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::api::{Refusal, exit};

/// Sends one request and decodes the answer. A [`Refusal`] carries the exit
/// code of the command.
pub fn call<T: DeserializeOwned>(
    socket: &Path,
    timeout: Duration,
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> Result<T, Refusal> {
    let failed = |error: &dyn std::fmt::Display| {
        Refusal::new(exit::FAILED, format!("talking to the daemon: {error}"))
    };
    let body = serde_json::to_vec(body).map_err(|e| failed(&e))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| failed(&e))?;
    runtime.block_on(async {
        let answer = tokio::time::timeout(timeout, exchange(socket, method, path, body)).await;
        let (ok, bytes) = answer.unwrap_or_else(|_| {
            let message = format!(
                "the daemon did not answer within {}",
                humantime::format_duration(timeout)
            );
            Err(Refusal::new(exit::TIMED_OUT, message))
        })?;
        if ok {
            serde_json::from_slice(&bytes).map_err(|e| failed(&e))
        } else {
            let text = String::from_utf8_lossy(&bytes).into_owned();
            Err(serde_json::from_slice(&bytes).unwrap_or_else(|_| Refusal::new(exit::USAGE, text)))
        }
    })
}

async fn exchange(
    socket: &Path,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(bool, Bytes), Refusal> {
    let failed = |error: &dyn std::fmt::Display| {
        Refusal::new(exit::FAILED, format!("talking to the daemon: {error}"))
    };
    let stream = UnixStream::connect(socket).await.map_err(|error| {
        let shown = socket.display();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Refusal::new(
                exit::NO_DAEMON,
                format!(
                    "the daemon is not running (nobody listens on {shown}). Forwarding goes on as it was; start \
                     the daemon with `bgswitch run`, or roll back without it with `bgswitch rollback SERVICE`"
                ),
            ),
            io::ErrorKind::PermissionDenied => Refusal::new(
                exit::NOT_PERMITTED,
                format!("no permission for {shown}: be root, or a member of the group bgswitch"),
            ),
            _ => Refusal::new(exit::FAILED, format!("connecting to {shown}: {error}")),
        }
    })?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed(&e))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "bgswitch")
        .header(header::CONTENT_TYPE, "application/json")
        .body(Full::new(Bytes::from(body)))
        .map_err(|e| failed(&e))?;
    let response = sender.send_request(request).await.map_err(|e| failed(&e))?;
    let ok = response.status().is_success();
    let bytes = response
        .into_body()
        .collect()
        .await
        .map_err(|e| failed(&e))?
        .to_bytes();
    Ok((ok, bytes))
}
