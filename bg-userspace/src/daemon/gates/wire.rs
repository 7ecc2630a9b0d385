//! HTTP/1.1 to one backend, over connections that are kept for the next request.

use std::{fmt, io, net::SocketAddr, sync::Mutex, time::Duration};

use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Bytes, Incoming},
    client::conn::http1::{SendRequest, handshake},
    header::{HOST, HeaderName, HeaderValue, USER_AGENT},
};
use hyper_util::rt::TokioIo;
use tokio::{
    net::TcpStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    health::{http::chain, tcp::is_ours, tidy_to},
    locked,
};

/// Characters of what went wrong.
const TROUBLE: usize = 200;

/// What is asked for, of whomever.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
}

impl Question {
    /// A question of what the configuration has checked.
    pub(super) fn new<'a>(
        method: &str,
        path: &str,
        headers: impl IntoIterator<Item = (&'a String, &'a String)>,
        body: Option<&str>,
    ) -> Self {
        let checked = headers.into_iter().filter_map(|(name, value)| {
            let name = HeaderName::try_from(name.as_str()).ok()?;
            Some((name, HeaderValue::from_str(value).ok()?))
        });
        Self {
            method: Method::from_bytes(method.as_bytes()).unwrap_or_default(),
            path: path.to_owned(),
            headers: checked.collect(),
            body: Bytes::from(body.unwrap_or_default().to_owned()),
        }
    }

    fn to(&self, endpoint: SocketAddr) -> Result<Request<Full<Bytes>>, hyper::http::Error> {
        let mut request = Request::builder()
            .method(self.method.clone())
            .uri(&self.path)
            .header(USER_AGENT, concat!("bgswitch/", env!("CARGO_PKG_VERSION")));
        if let Some(headers) = request.headers_mut() {
            headers.extend(self.headers.clone());
        }
        if !self.headers.contains_key(HOST) {
            request = request.header(HOST, endpoint.to_string());
        }
        request.body(Full::new(self.body.clone()))
    }
}

/// What came back.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    /// As much of the body as was to be kept.
    pub(super) body: Bytes,
    /// From the sending to the first byte of the body; to its end, if it is empty.
    pub(super) first_byte: Duration,
    /// From the sending to the end of the body.
    pub(super) took: Duration,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The backend cannot be reached.
    Unreachable(String),
    /// It answers, but not in HTTP, or breaks off.
    Broken(String),
    /// Its answer is larger than what is to be kept.
    TooLarge,
    /// The gateway cannot ask: it says nothing of the backend.
    Own(String),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreachable(error) => write!(f, "cannot be reached: {error}"),
            Self::Broken(error) => write!(f, "answered badly: {error}"),
            Self::TooLarge => f.write_str("answered with too large a body"),
            Self::Own(error) => write!(f, "could not be asked: {error}"),
        }
    }
}

/// The connections to a backend. They end with it.
#[derive(Debug)]
pub(super) struct Line {
    pub(super) endpoint: SocketAddr,
    /// How long a connection may take.
    within: Option<Duration>,
    idle: Mutex<Vec<SendRequest<Full<Bytes>>>>,
    drivers: Mutex<JoinSet<()>>,
}

impl Line {
    pub(super) fn to(endpoint: SocketAddr) -> Self {
        Self::within(endpoint, None)
    }

    /// The same, with a bound on the time that a connection may take.
    pub(super) fn within(endpoint: SocketAddr, within: Option<Duration>) -> Self {
        Self {
            endpoint,
            within,
            idle: Mutex::default(),
            drivers: Mutex::default(),
        }
    }

    /// Asks, and reads the answer to its end; of its body, `keep` bytes are kept, and a
    /// longer one is trouble; without `keep`, nothing is kept.
    pub(super) async fn ask(
        &self,
        question: &Question,
        keep: Option<usize>,
    ) -> Result<Answer, Trouble> {
        let began = Instant::now();
        let (response, sender) = self.send(question).await?;
        let (head, mut body) = response.into_parts();
        let (mut kept, mut first_byte) = (Vec::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|error| broken(&error))?;
            let Some(bytes) = frame.data_ref() else {
                continue;
            };
            first_byte.get_or_insert_with(|| began.elapsed());
            if let Some(most) = keep {
                if kept.len() + bytes.len() > most {
                    return Err(Trouble::TooLarge);
                }
                kept.extend_from_slice(bytes);
            }
        }
        let took = began.elapsed();
        locked(&self.idle).push(sender);
        Ok(Answer {
            status: head.status,
            headers: head.headers,
            body: kept.into(),
            first_byte: first_byte.unwrap_or(took),
            took,
        })
    }

    /// Sends over a connection that was kept, or a new one. A server may close one that
    /// is idle at any moment: what fails there is asked once more, over a new one.
    async fn send(
        &self,
        question: &Question,
    ) -> Result<(Response<Incoming>, SendRequest<Full<Bytes>>), Trouble> {
        let request = || {
            let request = question.to(self.endpoint);
            request.map_err(|error| Trouble::Own(error.to_string()))
        };
        loop {
            let kept = locked(&self.idle).pop();
            let Some(mut sender) = kept else { break };
            if sender.is_closed() || sender.ready().await.is_err() {
                continue;
            }
            match sender.send_request(request()?).await {
                Ok(response) => return Ok((response, sender)),
                Err(_) => break,
            }
        }
        let mut sender = self.connect().await?;
        let response = sender.send_request(request()?).await;
        Ok((response.map_err(|error| broken(&error))?, sender))
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, Trouble> {
        let connecting = TcpStream::connect(self.endpoint);
        let stream = match self.within {
            None => connecting.await,
            Some(within) => {
                let late = |_| Err(io::Error::from(io::ErrorKind::TimedOut));
                timeout(within, connecting).await.unwrap_or_else(late)
            }
        };
        let stream = stream.map_err(|error| {
            if is_ours(&error) {
                Trouble::Own(error.to_string())
            } else {
                Trouble::Unreachable(error.to_string())
            }
        })?;
        // A request is one write, and waits for nothing.
        let _ = stream.set_nodelay(true);
        let done = handshake(TokioIo::new(stream)).await;
        let (sender, connection) = done.map_err(|error| broken(&error))?;
        let mut drivers = locked(&self.drivers);
        while drivers.try_join_next().is_some() {}
        drivers.spawn(async move {
            // What went wrong, the request says.
            let _ = connection.await;
        });
        Ok(sender)
    }
}

fn broken(error: &hyper::Error) -> Trouble {
    Trouble::Broken(tidy_to(&chain(error), TROUBLE))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::fake::{self, Does};

    fn question() -> Question {
        let headers = [("x-test".to_owned(), "a b".to_owned())];
        let headers = headers.iter().map(|(name, value)| (name, value));
        Question::new("POST", "/v1?x=1", headers, Some("{}"))
    }

    #[tokio::test]
    async fn the_request_is_what_was_asked_for_also_when_the_server_closes_each_time() {
        let (address, mut requests) = fake::server(fake::answer(201, "done")).await;
        let line = Line::to(address);
        for _ in 0..3 {
            let answer = line.ask(&question(), Some(4)).await.unwrap();
            assert_eq!(
                (answer.status.as_u16(), &answer.body[..]),
                (201, &b"done"[..])
            );
            assert!(answer.first_byte <= answer.took);
            let request = requests.recv().await.unwrap();
            assert!(
                request.starts_with("POST /v1?x=1 HTTP/1.1\r\n"),
                "{request}"
            );
            for part in [
                &format!("host: {address}"),
                "x-test: a b",
                "content-length: 2",
            ] {
                assert!(request.contains(&format!("\r\n{part}\r\n")), "{request}");
            }
            assert!(request.ends_with("\r\n\r\n{}"), "{request}");
        }
    }

    #[tokio::test]
    async fn what_is_no_answer_is_told_apart() {
        let ask = |address, keep| async move { Line::to(address).ask(&question(), keep).await };
        let refused = ask(fake::nobody().await, None).await.unwrap_err();
        assert!(matches!(refused, Trouble::Unreachable(_)), "{refused}");
        let torn = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf";
        for bytes in [&b""[..], b"SSH-2.0-OpenSSH_9.2\r\n\r\n", torn] {
            let (address, _requests) = fake::server(Does::Send(bytes.to_vec())).await;
            let broken = ask(address, None).await.unwrap_err();
            assert!(matches!(broken, Trouble::Broken(_)), "{broken}");
        }
        let (address, _requests) = fake::server(fake::answer(200, "12345")).await;
        assert_eq!(ask(address, Some(4)).await.unwrap_err(), Trouble::TooLarge);
        assert!(ask(address, None).await.unwrap().body.is_empty());
    }
}
