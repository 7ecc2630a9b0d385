//! Clients that ask as fast as they are answered, over plain sockets: what they cost
//! themselves is little, and connecting is part of what a request takes.

use std::{
    cell::RefCell,
    fs::File,
    net::SocketAddr,
    rc::Rc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use bg_tests::load::{self, PATIENCE};
use hdrhistogram::Histogram;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// What every client asks.
const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nhost: service\r\n\r\n";
/// How an answer begins, and ends.
const OK: &[u8] = b"HTTP/1.1 200 ";
const COLOUR: &[u8] = b"\r\n\r\nblue";
/// What is not written down, at the beginning.
const WARM_UP: Duration = Duration::from_millis(300);

/// What they got.
#[derive(Debug)]
pub struct Outcome {
    /// Answers that were written down.
    pub answers: u64,
    /// All answers.
    pub all: u64,
    /// From the first that was written down to the last, about.
    pub took: Duration,
    /// Requests that failed.
    pub failed: u64,
    /// Why the first of them did.
    pub why: Option<String>,
    /// Microseconds a request, with its connection if it was the first on it.
    pub latency: Histogram<u64>,
}

/// Lets `count` clients of a namespace ask for `length`, with one connection each or
/// one for each request. The calling thread's CPUs are theirs.
pub fn ask(
    namespace: File,
    to: SocketAddr,
    count: u32,
    keep_alive: bool,
    length: Duration,
) -> Result<Outcome> {
    let thread = load::in_place(namespace, move || async move {
        let from = Instant::now() + WARM_UP;
        let outcome = Rc::new(RefCell::new(Outcome {
            answers: 0,
            all: 0,
            took: length,
            failed: 0,
            why: None,
            latency: Histogram::new_with_bounds(1, 60_000_000, 3)?,
        }));
        let mut clients = tokio::task::JoinSet::new();
        for _ in 0..count {
            let outcome = Rc::clone(&outcome);
            clients.spawn_local(client(to, keep_alive, from, from + length, outcome));
        }
        clients.join_all().await;
        let outcome = Rc::try_unwrap(outcome).map_err(|_| anyhow!("a client goes on"))?;
        Ok(outcome.into_inner())
    });
    thread.join().map_err(|_| anyhow!("the clients panicked"))?
}

async fn client(
    to: SocketAddr,
    keep_alive: bool,
    from: Instant,
    until: Instant,
    outcome: Rc<RefCell<Outcome>>,
) {
    let mut stream = None;
    loop {
        let begun = Instant::now();
        if begun >= until {
            return;
        }
        let answer = tokio::time::timeout(PATIENCE, request(&mut stream, to));
        let answer = answer.await.context("no answer").and_then(|answer| answer);
        let mut outcome = outcome.borrow_mut();
        match answer {
            Ok(()) => {
                outcome.all += 1;
                if begun >= from {
                    outcome.answers += 1;
                    let took = begun.elapsed().as_micros() as u64;
                    outcome.latency.saturating_record(took);
                }
            }
            Err(error) => {
                stream = None;
                outcome.failed += 1;
                outcome.why.get_or_insert(format!("{error:#}"));
            }
        }
        if !keep_alive {
            stream = None;
        }
    }
}

/// Asks once; an error unless blue answers.
async fn request(stream: &mut Option<TcpStream>, to: SocketAddr) -> Result<()> {
    let stream = if let Some(stream) = stream {
        stream
    } else {
        let new = TcpStream::connect(to).await.context("connecting")?;
        new.set_nodelay(true)?;
        stream.insert(new)
    };
    stream.write_all(REQUEST).await.context("sending")?;
    let mut answer = [0; 512];
    let mut length = 0;
    while !answer[..length].ends_with(COLOUR) {
        let more = stream.read(&mut answer[length..]).await;
        let more = more.context("reading")?;
        ensure!(
            more > 0,
            "the connection was closed, or the answer is not blue's: {}",
            String::from_utf8_lossy(&answer[..length])
        );
        length += more;
    }
    ensure!(answer.starts_with(OK), "a status other than 200");
    Ok(())
}
