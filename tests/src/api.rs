//! The API as scripts use it: HTTP/1.1 on the Unix socket.

use std::{
    io::{Read as _, Write as _},
    os::unix::net::UnixStream,
};

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::{lab::Lab, load::PATIENCE};

/// An answer.
#[derive(Debug)]
pub struct Answer {
    /// HTTP's status.
    pub status: u16,
    /// The lines before the body.
    pub head: String,
    /// The body.
    pub body: Value,
}

impl Answer {
    /// The value of a header.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().find_map(|line| {
            let (key, value) = line.split_once(": ")?;
            key.eq_ignore_ascii_case(name).then_some(value)
        })
    }

    /// The generation of the service, as it is written.
    pub fn etag(&self) -> Option<&str> {
        self.header("etag")
    }
}

/// One request, as `curl --unix-socket` would send it. `headers` are lines, each with
/// its end.
pub fn try_call(lab: &Lab, method: &str, path: &str, headers: &str, body: &str) -> Result<Answer> {
    let headers = format!("Connection: close\r\n{headers}");
    let mut stream = send(lab, method, path, &headers, body)?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
    let status = head.split(' ').nth(1).context("no status")?.parse()?;
    Ok(Answer {
        status,
        head: head.to_owned(),
        body: serde_json::from_str(body).with_context(|| text.clone())?,
    })
}

/// The same with a daemon that answers.
///
/// # Panics
/// When it does not.
pub fn call(lab: &Lab, method: &str, path: &str, headers: &str, body: &str) -> Answer {
    try_call(lab, method, path, headers, body).unwrap()
}

/// Sends a request; the answer is still to be read.
pub fn send(lab: &Lab, method: &str, path: &str, headers: &str, body: &str) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(lab.directory().join("sock"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: bgswitch\r\n{headers}Content-Length: {length}\r\n\r\n{body}"
    )?;
    Ok(stream)
}
