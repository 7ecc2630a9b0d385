//! The command line's side of the socket.

use std::{io, ops::ControlFlow, path::Path, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    Method, Request, Response,
    body::{Bytes, Incoming},
    client::conn::http1,
    header,
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::UnixStream,
    signal::unix::{SignalKind, signal},
};

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
    runtime()?.block_on(async {
        let deadline =
            now_ns().saturating_add(u64::try_from(timeout.as_nanos()).unwrap_or(u64::MAX));
        let exchange = exchange(socket, deadline, method, path, body);
        let answer = tokio::time::timeout(timeout, exchange).await;
        let (ok, bytes) = answer.unwrap_or_else(|_| Err(no_answer(timeout)))?;
        if ok {
            return serde_json::from_slice(&bytes).map_err(|e| failed(&e));
        }
        Err(refusal(&bytes))
    })
}

/// How a stream of lines came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// Who read them had enough.
    Enough,
    /// SIGINT or SIGTERM.
    Interrupted,
    /// The daemon went away.
    Closed,
}

/// Reads a stream of lines: `take` gets one or several whole ones at a time. `timeout`
/// is about the first of them.
pub fn stream(
    socket: &Path,
    timeout: Duration,
    path: &str,
    mut take: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<End, Refusal> {
    runtime()?.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(|e| failed(&e))?;
        let mut terminate = signal(SignalKind::terminate()).map_err(|e| failed(&e))?;
        let asked = ask(socket, 0, Method::GET, path, Vec::new());
        let asked = tokio::time::timeout(timeout, asked).await;
        let response = asked.unwrap_or_else(|_| Err(no_answer(timeout)))?;
        let ok = response.status().is_success();
        let mut body = response.into_body();
        if !ok {
            let bytes = body.collect().await.map_err(|e| failed(&e))?.to_bytes();
            return Err(refusal(&bytes));
        }
        let mut text = Vec::new();
        loop {
            let frame = tokio::select! {
                frame = body.frame() => frame,
                _ = interrupt.recv() => return Ok(End::Interrupted),
                _ = terminate.recv() => return Ok(End::Interrupted),
            };
            // A torn connection is what a daemon leaves that was killed.
            let Some(Ok(frame)) = frame else {
                return Ok(End::Closed);
            };
            text.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
            let Some(end) = text.iter().rposition(|byte| *byte == b'\n') else {
                continue;
            };
            let lines: Vec<u8> = text.drain(..=end).collect();
            if take(&String::from_utf8_lossy(&lines)).is_break() {
                return Ok(End::Enough);
            }
        }
    })
}

fn runtime() -> Result<tokio::runtime::Runtime, Refusal> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| failed(&e))
}

fn no_answer(timeout: Duration) -> Refusal {
    let message = format!(
        "the daemon did not answer within {}: it hangs, or has too much to do. Forwarding goes on \
         as it is; `bgswitch status` tells whether the daemon still did what was asked",
        humantime::format_duration(timeout)
    );
    Refusal::new(Kind::TimedOut, message)
}

fn refusal(bytes: &[u8]) -> Refusal {
    serde_json::from_slice(bytes).unwrap_or_else(|_| failed(&String::from_utf8_lossy(bytes)))
}

async fn exchange(
    socket: &Path,
    deadline_ns: u64,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<(bool, Bytes), Refusal> {
    let response = ask(socket, deadline_ns, method, path, body).await?;
    let ok = response.status().is_success();
    let bytes = response
        .into_body()
        .collect()
        .await
        .map_err(|e| failed(&e))?
        .to_bytes();
    Ok((ok, bytes))
}

async fn ask(
    socket: &Path,
    deadline_ns: u64,
    method: Method,
    path: &str,
    body: Vec<u8>,
) -> Result<Response<Incoming>, Refusal> {
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
    sender.send_request(request).await.map_err(|e| failed(&e))
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
