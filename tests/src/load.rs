//! Servers that say which colour they are, and clients that write down what
//! they got: real HTTP over real sockets, in the lab's namespaces.

use std::{
    convert::Infallible,
    fs::File,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use http_body_util::{BodyExt as _, Empty, combinators::BoxBody};
use hyper::{
    Request, Response, StatusCode,
    body::{Bytes, Frame, Incoming},
    client::conn::http1 as client,
    server::conn::http1 as server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use nix::{
    sched::{CloneFlags, setns},
    time::{ClockId, clock_gettime},
};
use tokio::net::{TcpListener, TcpStream, UdpSocket};

/// Nanoseconds of `CLOCK_MONOTONIC`: the clock of a flip's `at_ns`.
pub fn now_ns() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).expect("the monotonic clock");
    now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64
}

/// Runs `work` in a runtime on a thread of its own in a namespace.
pub fn in_place<R, F>(
    namespace: File,
    work: impl FnOnce() -> F + Send + 'static,
) -> JoinHandle<Result<R>>
where
    R: Send + 'static,
    F: Future<Output = Result<R>>,
{
    std::thread::spawn(move || {
        setns(&namespace, CloneFlags::CLONE_NEWNET).context("entering the namespace")?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let local = tokio::task::LocalSet::new();
        runtime.block_on(local.run_until(work()))
    })
}

/// How long to wait for what is sure to come, on any machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Waits for what will be so, however slow the machine is.
///
/// # Panics
/// When it does not come.
#[track_caller]
pub fn until(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_mins(2);
    while !is_so() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

type Body = BoxBody<Bytes, Infallible>;

/// Lines that `GET /stream/N` sends in each of its N seconds.
pub const STREAM_LINES_PER_SECOND: u64 = 20;

/// Serves HTTP on TCP ports and echoes UDP datagrams, answering with `colour`,
/// until the process ends. Returns when it listens.
///
/// `GET /stream/N` sends [`STREAM_LINES_PER_SECOND`] lines for N seconds, `GET /peer`
/// the colour and who has asked, in the eyes of the server.
pub fn serve(namespace: File, colour: &'static str, tcp: &[u16], udp: &[SocketAddr]) -> Result<()> {
    serve_in(namespace, colour, tcp, udp, &Arc::default())
}

/// How servers answer over HTTP.
#[derive(Debug, Default)]
pub struct Mood {
    /// So many of a thousand requests are answered with 500, evenly.
    pub failing: AtomicU32,
    /// Answers take so many milliseconds longer.
    pub slow: AtomicU32,
    /// When the first one was answered with 500, `CLOCK_MONOTONIC` ns; 0: none was.
    pub failed_ns: AtomicU64,
    asked: AtomicU32,
}

impl Mood {
    /// Answers so many of a thousand requests with 500, from here on.
    pub fn fail(&self, permille: u32) {
        self.failing.store(permille, Ordering::Relaxed);
    }

    /// Answers later, from here on.
    pub fn slow_down(&self, by: Duration) {
        self.slow.store(by.as_millis() as u32, Ordering::Relaxed);
    }

    /// Waits, and says whether this request is to fail.
    async fn next(&self) -> bool {
        let slow = self.slow.load(Ordering::Relaxed);
        if slow > 0 {
            tokio::time::sleep(Duration::from_millis(slow.into())).await;
        }
        let failing = u64::from(self.failing.load(Ordering::Relaxed));
        let asked = u64::from(self.asked.fetch_add(1, Ordering::Relaxed));
        let fails = (asked + 1) * failing / 1000 > asked * failing / 1000;
        if fails {
            let first = (0, now_ns());
            let _ = self.failed_ns.compare_exchange(
                first.0,
                first.1,
                Ordering::Relaxed,
                Ordering::Relaxed,
            );
        }
        fails
    }
}

/// The same, by servers of a mood.
pub fn serve_in(
    namespace: File,
    colour: &'static str,
    tcp: &[u16],
    udp: &[SocketAddr],
    mood: &Arc<Mood>,
) -> Result<()> {
    let mood = Arc::clone(mood);
    let (ready, listening) = std::sync::mpsc::channel();
    let (tcp, udp) = (tcp.to_vec(), udp.to_vec());
    let thread: JoinHandle<Result<()>> = in_place(namespace, move || async move {
        for port in tcp {
            let listener = TcpListener::bind(("::", port)).await?;
            tokio::task::spawn_local(accept(listener, colour, Arc::clone(&mood)));
        }
        for address in udp {
            let socket = UdpSocket::bind(address).await?;
            tokio::task::spawn_local(async move {
                let mut buffer = [0; 2048];
                while let Ok((_, from)) = socket.recv_from(&mut buffer).await {
                    let _ = socket.send_to(colour.as_bytes(), from).await;
                }
            });
        }
        let _ = ready.send(());
        std::future::pending().await
    });
    if listening.recv_timeout(Duration::from_secs(10)).is_err() {
        ensure!(thread.is_finished(), "the server did not start");
        thread
            .join()
            .map_err(|_| anyhow::anyhow!("the server panicked"))??;
    }
    Ok(())
}

async fn accept(listener: TcpListener, colour: &'static str, mood: Arc<Mood>) {
    while let Ok((stream, peer)) = listener.accept().await {
        let _ = stream.set_nodelay(true);
        let mood = Arc::clone(&mood);
        tokio::task::spawn_local(async move {
            let service = service_fn(move |request: Request<Incoming>| {
                let mood = Arc::clone(&mood);
                async move {
                    // A readiness check that lies, as they do.
                    let is_work = request.uri().path() != "/ready";
                    let fails = is_work && mood.next().await;
                    let mut response = Response::new(answer(request.uri().path(), colour, peer));
                    if fails {
                        *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
                    }
                    Ok::<_, Infallible>(response)
                }
            });
            // A client that goes away is no concern of the server.
            let _ = server::Builder::new()
                .serve_connection(TokioIo::new(stream), service)
                .await;
        });
    }
}

fn answer(path: &str, colour: &'static str, peer: SocketAddr) -> Body {
    if path == "/peer" {
        let address = peer.ip().to_canonical();
        let text = format!("{colour} {}", SocketAddr::new(address, peer.port()));
        return http_body_util::Full::new(Bytes::from(text)).boxed();
    }
    let Some(seconds) = path
        .strip_prefix("/stream/")
        .and_then(|text| text.parse::<u64>().ok())
    else {
        return http_body_util::Full::new(Bytes::from_static(colour.as_bytes())).boxed();
    };
    let (sender, receiver) = tokio::sync::mpsc::channel(4);
    tokio::task::spawn_local(async move {
        for _ in 0..seconds * STREAM_LINES_PER_SECOND {
            if sender.send(format!("{colour}\n")).await.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1000 / STREAM_LINES_PER_SECOND)).await;
        }
    });
    Lines(receiver).boxed()
}

struct Lines(tokio::sync::mpsc::Receiver<String>);

impl hyper::body::Body for Lines {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: std::pin::Pin<&mut Self>,
        context: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0
            .poll_recv(context)
            .map(|line| line.map(|line| Ok(Frame::data(Bytes::from(line)))))
    }
}

/// One request, as its client saw it.
#[derive(Clone, Debug)]
pub struct Answer {
    /// When its connection was begun, `CLOCK_MONOTONIC` ns.
    pub connected_ns: u64,
    /// True for the first request of a connection.
    pub first: bool,
    /// When it was done, `CLOCK_MONOTONIC` ns.
    pub done_ns: u64,
    /// How long it took, from the request (or the connection, for the first
    /// one) to the end of the answer.
    pub latency: Duration,
    /// The colour that answered, or what went wrong.
    pub result: Result<String, String>,
}

/// What clients do between requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reuse {
    /// One connection for all requests.
    KeepAlive,
    /// One connection for requests of that time, then the next.
    For(Duration),
    /// One connection for each request.
    Never,
}

/// Clients at work.
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    answers: Arc<Mutex<Vec<Answer>>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

impl Load {
    /// Starts clients: for each, where it connects to, how, and its pause
    /// between requests.
    pub fn start(namespace: File, clients: Vec<(SocketAddr, Reuse)>, pause: Duration) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let answers = Arc::new(Mutex::new(Vec::new()));
        let (stopped, record) = (Arc::clone(&stop), Arc::clone(&answers));
        let thread = in_place(namespace, move || async move {
            let mut tasks = tokio::task::JoinSet::new();
            for (to, reuse) in clients {
                tasks.spawn_local(client_loop(
                    to,
                    reuse,
                    pause,
                    Arc::clone(&stopped),
                    Arc::clone(&record),
                ));
            }
            tasks.join_all().await;
            Ok(())
        });
        Self {
            stop,
            answers,
            thread: Some(thread),
        }
    }

    /// What was answered so far.
    pub fn answers(&self) -> Vec<Answer> {
        self.answers
            .lock()
            .map(|answers| answers.clone())
            .unwrap_or_default()
    }

    /// How many answers there are so far, and how many of them are failures.
    pub fn progress(&self) -> (usize, usize) {
        self.answers.lock().map_or((0, 0), |answers| {
            (
                answers.len(),
                answers
                    .iter()
                    .filter(|answer| answer.result.is_err())
                    .count(),
            )
        })
    }

    /// Waits for this many more answers.
    ///
    /// # Panics
    /// When they do not come.
    #[track_caller]
    pub fn advance(&self, answers: usize) {
        let (begun, before) = (Instant::now(), self.progress().0);
        while self.progress().0 < before + answers {
            assert!(begun.elapsed() < PATIENCE, "nobody is answered any more");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Lets the requests under way end, and hands all answers over.
    pub fn finish(mut self) -> Result<Vec<Answer>> {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread
                .join()
                .map_err(|_| anyhow::anyhow!("the clients panicked"))??;
        }
        Ok(self
            .answers
            .lock()
            .map(|mut answers| std::mem::take(&mut *answers))
            .unwrap_or_default())
    }
}

async fn client_loop(
    to: SocketAddr,
    reuse: Reuse,
    pause: Duration,
    stop: Arc<AtomicBool>,
    record: Arc<Mutex<Vec<Answer>>>,
) {
    let mut sender = None;
    let mut connected_ns = 0;
    let mut turn = (now_ns() % 1000) as f64 / 1000.0;
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        let first = sender.is_none();
        if first {
            connected_ns = now_ns();
        }
        let result = tokio::time::timeout(Duration::from_secs(10), request(&mut sender, to)).await;
        let result = match result {
            Ok(Ok(colour)) => Ok(colour),
            Ok(Err(error)) => Err(format!("{error:#}")),
            Err(_) => Err("no answer within 10 s".to_owned()),
        };
        let worn_out = match reuse {
            Reuse::Never => true,
            Reuse::KeepAlive => false,
            Reuse::For(age) => now_ns() - connected_ns > age.as_nanos() as u64,
        };
        if result.is_err() || worn_out {
            sender = None;
        }
        let answer = Answer {
            connected_ns,
            first,
            done_ns: now_ns(),
            latency: begun.elapsed(),
            result,
        };
        if let Ok(mut record) = record.lock() {
            record.push(answer);
        }
        // Between half of the pause and one and a half: clients do not march in step.
        turn = (turn + GOLDEN_RATIO).fract();
        tokio::time::sleep(pause.mul_f64(0.5 + turn)).await;
    }
}

const GOLDEN_RATIO: f64 = 0.618_033_988_75;

type Sender = client::SendRequest<Empty<Bytes>>;

async fn connect(to: SocketAddr) -> Result<Sender> {
    let stream = TcpStream::connect(to).await.context("connecting")?;
    stream.set_nodelay(true)?;
    let (sender, connection) = client::handshake(TokioIo::new(stream)).await?;
    tokio::task::spawn_local(connection);
    Ok(sender)
}

async fn request(sender: &mut Option<Sender>, to: SocketAddr) -> Result<String> {
    if sender.is_none() {
        *sender = Some(connect(to).await?);
    }
    let sender = sender.as_mut().context("no connection")?;
    sender.ready().await.context("the connection was closed")?;
    let request = Request::get("/")
        .header("host", "service")
        .body(Empty::new())?;
    let response = sender.send_request(request).await.context("sending")?;
    ensure!(
        response.status().is_success(),
        "status {}",
        response.status()
    );
    let bytes = response
        .into_body()
        .collect()
        .await
        .context("reading")?
        .to_bytes();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Fetches a stream of `seconds`; returns its lines, or how it broke.
pub fn stream(namespace: File, to: SocketAddr, seconds: u64) -> JoinHandle<Result<Vec<String>>> {
    in_place(namespace, move || async move {
        let mut sender = connect(to).await?;
        let request = Request::get(format!("/stream/{seconds}"))
            .header("host", "service")
            .body(Empty::new())?;
        let response = sender.send_request(request).await?;
        let bytes = response
            .into_body()
            .collect()
            .await
            .context("the stream broke")?
            .to_bytes();
        Ok(String::from_utf8_lossy(&bytes)
            .lines()
            .map(str::to_owned)
            .collect())
    })
}

/// Sends a datagram from `socket` and returns the answer.
pub async fn query(socket: &UdpSocket, to: SocketAddr) -> Result<String> {
    let mut buffer = [0; 64];
    socket.send_to(b"who", to).await?;
    let (length, _) = tokio::time::timeout(Duration::from_secs(2), socket.recv_from(&mut buffer))
        .await
        .context("no answer over UDP")??;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}

/// One request over a new connection: the colour that answered.
pub fn once(namespace: File, to: SocketAddr) -> Result<String> {
    in_place(
        namespace,
        move || async move { request(&mut None, to).await },
    )
    .join()
    .map_err(|_| anyhow::anyhow!("the client panicked"))?
}

/// Clients of the usual mix: both families, both ports, half of them on one
/// connection for all their requests.
pub fn mix(clients: usize) -> Vec<(SocketAddr, Reuse)> {
    use crate::lab::{listener, listener_v6};
    let to = [listener(8000), listener_v6(8000), listener(8001)];
    (0..clients)
        .map(|n| {
            let reuse = [Reuse::KeepAlive, Reuse::Never][n / 3 % 2];
            (to[n % 3], reuse)
        })
        .collect()
}

/// Asserts that there were answers and that none of them is a failure.
///
/// # Panics
/// When it is not so.
#[track_caller]
pub fn assert_flawless(answers: &[Answer]) {
    assert!(!answers.is_empty(), "nobody asked");
    let failures: Vec<&Answer> = answers.iter().filter(|a| a.result.is_err()).collect();
    assert!(
        failures.is_empty(),
        "{} of {} requests failed, first {:#?}",
        failures.len(),
        answers.len(),
        failures[0]
    );
}
