//! The command line's side of the socket.

use std::{io, path::Path, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request, body::Bytes, client::conn::http1, header};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::net::UnixStream;

use crate::{
    api::{DEADLINE, Kind, Refusal},
    datapath::now_ns,
};

/// Sends one request and decodes the answer. A [`Refusal`] carries the exit
/// code of the command.
pub fn call<T: DeserializeOwned>(
    socket: &Path,
    timeout: Duration,
    method: Method,
    path: &str,
    body: &impl Serialize,
) -> Result<T, Refusal> {
    let body = serde_json::to_vec(body).map_err(|e| failed(&e))?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| failed(&e))?;
    runtime.block_on(async {
        let deadline = now_ns().saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX));
        let exchange = exchange(socket, deadline, method, path, body);
        let answer = tokio::time::timeout(timeout, exchange).await;
        let (ok, bytes) = answer.unwrap_or_else(|_| {
            let message = format!(
                "the daemon did not answer within {}: it hangs, or has too much to do. Forwarding goes on \
                 as it is; `bgswitch status` tells whether the daemon still did what was asked",
                humantime::format_duration(timeout)
            );
            Err(Refusal::new(Kind::TimedOut, message))
        })?;
        if ok {
            return serde_json::from_slice(&bytes).map_err(|e| failed(&e));
        }
        Err(serde_json::from_slice(&bytes)
            .unwrap_or_else(|_| failed(&String::from_utf8_lossy(&bytes))))
    })
}

async fn exchange(
    socket: &Path,
    deadline_ns: u64,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(bool, Bytes), Refusal> {
    let stream = UnixStream::connect(socket)
        .await
        .map_err(|error| not_connected(socket, &error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| failed(&e))?;
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::HOST, "bgswitch")
        .header(header::CONTENT_TYPE, "application/json")
        .header(DEADLINE, deadline_ns)
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

fn failed(error: &dyn std::fmt::Display) -> Refusal {
    Refusal::new(Kind::Failed, format!("talking to the daemon: {error}"))
}

fn not_connected(socket: &Path, error: &io::Error) -> Refusal {
    let shown = socket.display();
    match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Refusal::new(
            Kind::NoDaemon,
            format!("the daemon is not running (nobody listens on {shown})"),
        ),
        io::ErrorKind::PermissionDenied => Refusal::new(
            Kind::NotPermitted,
            format!("no permission for {shown}: be root, or a member of the group bgswitch"),
        ),
        _ => Refusal::new(Kind::Failed, format!("connecting to {shown}: {error}")),
    }
}
