//! The demo: flips a service under load in network namespaces, and shows what
//! its clients saw of it. `cargo xtask demo` runs it.

mod inference;
mod picture;
mod story;
mod summary;

use std::{
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bg_tests::{
    lab::{Lab, Place, SERVICE, SERVICE_V6, beside_the_build},
    load::{self, Load, Reuse},
};
use bg_userspace::api::Flipped;
use clap::{Parser, ValueEnum};
use summary::{Streams, Summary};

/// Flips a service under load in network namespaces, and draws what happened.
///
/// Makes namespaces for clients, a gateway, and blue and green servers, runs
/// `bgswitch run` in the gateway and `bgswitch flip` as an operator would. Fails
/// if one request failed, one stream broke, or one new connection reached the
/// colour that was left.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo")]
struct Arguments {
    /// How long clients are at work.
    #[arg(long, default_value_t = 14, value_parser = clap::value_parser!(u32).range(2..=600))]
    seconds: u32,
    /// How often the service is flipped in that time.
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u32).range(1..=100))]
    flips: u32,
    /// Clients at once: half keep connections alive, half make one per request.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..=4096))]
    clients: u32,
    /// Another story: a good release, then one that fails requests and rolls back by itself.
    #[arg(long, conflicts_with_all = ["seconds", "flips", "clients"])]
    release_story: bool,
    /// Another story: a release of a real inference server (MLServer), over HTTP and gRPC.
    #[arg(long, conflicts_with_all = ["seconds", "flips", "clients", "release_story"])]
    inference: bool,
    /// How the summary is printed.
    #[arg(short, long, value_enum, default_value = "text")]
    output: Output,
    /// Where the picture goes, as SVG and PNG [default: target/demo/flips, release or inference].
    #[arg(long, value_name = "PATH")]
    picture: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

/// What a shell expects of a program ended by Ctrl-C.
const INTERRUPTED: u8 = 130;
/// Between two requests of one client.
const PAUSE: Duration = Duration::from_millis(4);

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    if let Err(error) = ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)) {
        eprintln!("demo: Ctrl-C will not clean up: {error}");
    }
    match run(&arguments, &interrupted) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(_) if interrupted.load(Ordering::Relaxed) => {
            eprintln!("\ndemo: interrupted; namespaces, pins and processes are removed");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the demo; true when nothing failed. The lab is gone when it returns.
fn run(arguments: &Arguments, interrupted: &AtomicBool) -> Result<bool> {
    let picture = match &arguments.picture {
        Some(path) => path.clone(),
        None if arguments.release_story => beside_the_build("demo")?.join("release"),
        None if arguments.inference => beside_the_build("demo")?.join("inference"),
        None => beside_the_build("demo")?.join("flips"),
    };
    let json = arguments.output == Output::Json;
    if arguments.release_story {
        return story::run(&picture, json, interrupted);
    }
    if arguments.inference {
        return inference::run(&picture, json, interrupted);
    }
    eprintln!(
        "demo: a gateway, {} clients, two servers a colour, in network namespaces",
        arguments.clients
    );
    let mut lab = Lab::new()?;
    lab.configure_default()?;
    for (place, colour) in [(Place::Blue, "blue"), (Place::Green, "green")] {
        load::serve(lab.enter(place)?, colour, &[8000, 8001], &[])?;
    }
    // A connection per request uses a client's ports up: after some seconds its
    // kernel would look for a free one longer than everything else takes.
    for setting in ["ip_local_port_range=1024 65535", "tcp_tw_reuse=1"] {
        lab.sysctl(Place::Client, &format!("net.ipv4.{setting}"))?;
    }
    eprintln!("$ bgswitch run");
    lab.start()?;

    let mut show = Progress::new();
    let begun_ns = load::now_ns();
    let begun = Instant::now();
    let seconds = Duration::from_secs(u64::from(arguments.seconds));
    let interval = seconds / (arguments.flips + 1);
    let load = Load::start(
        lab.enter(Place::Client)?,
        clients(arguments.clients, interval)?,
        PAUSE,
    );
    let mut streams = vec![open_stream(&lab, seconds)?];
    let mut flips = Vec::new();
    for number in 1..=arguments.flips {
        let due = interval * number;
        // A stream that begins before the flip and ends after it.
        show.until(due.saturating_sub(interval / 2), begun, &load, interrupted)?;
        streams.push(open_stream(&lab, interval)?);
        show.until(due, begun, &load, interrupted)?;
        let flipped: Flipped = serde_json::from_value(lab.ask(&["flip", "llm", "-m", "demo"])?)?;
        show.flipped(&flipped);
        flips.push(flipped);
    }
    show.until(seconds, begun, &load, interrupted)?;
    let answers = load.finish()?;
    let streams = Streams::of(streams.into_iter().map(Stream::end));
    show.clear();
    drop(lab);

    let summary = Summary::new(&answers, &flips, streams, &picture);
    picture::draw(
        &picture,
        &summary,
        &answers,
        &flips,
        begun_ns,
        arguments.clients,
    )
    .with_context(|| format!("drawing {}", picture.display()))?;
    match arguments.output {
        Output::Text => print!("{summary}"),
        Output::Json => println!("{}", serde_json::to_string(&summary)?),
    }
    Ok(summary.is_clean())
}

/// Sleeps; an error once interrupted.
fn wait(length: Duration, interrupted: &AtomicBool) -> Result<()> {
    let begun = Instant::now();
    loop {
        ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
        let left = length.saturating_sub(begun.elapsed());
        if left.is_zero() {
            return Ok(());
        }
        std::thread::sleep(left.min(Duration::from_millis(100)));
    }
}

/// Clients over both families and both ports. Those that keep connections alive
/// renew them now and then, as connection pools do.
fn clients(count: u32, interval: Duration) -> Result<Vec<(SocketAddr, Reuse)>> {
    let services: [SocketAddr; 4] = [
        format!("{SERVICE}:8000").parse()?,
        format!("[{SERVICE_V6}]:8000").parse()?,
        format!("{SERVICE}:8001").parse()?,
        format!("[{SERVICE_V6}]:8001").parse()?,
    ];
    let client = |number: u32| {
        let age = interval / 2 + interval * (number % 16) / 32;
        let reuse = if number.is_multiple_of(2) {
            Reuse::Never
        } else {
            Reuse::For(age)
        };
        (services[number as usize / 2 % services.len()], reuse)
    };
    Ok((0..count).map(client).collect())
}

struct Stream {
    seconds: u64,
    lines: JoinHandle<Result<Vec<String>>>,
}

/// Fetches a stream that lasts at least `length`.
fn open_stream(lab: &Lab, length: Duration) -> Result<Stream> {
    let seconds = length.as_millis().div_ceil(1000) as u64;
    let to = format!("{SERVICE}:8000").parse()?;
    Ok(Stream {
        seconds,
        lines: load::stream(lab.enter(Place::Client)?, to, seconds),
    })
}

impl Stream {
    /// Waits for its end; an error unless it came whole, and from one colour.
    fn end(self) -> Result<()> {
        let lines = self
            .lines
            .join()
            .map_err(|_| anyhow::anyhow!("the stream's client panicked"))??;
        let wanted = self.seconds * load::STREAM_LINES_PER_SECOND;
        ensure!(
            lines.len() as u64 == wanted,
            "{} of {wanted} lines",
            lines.len()
        );
        ensure!(
            lines.iter().all(|line| *line == lines[0]),
            "more than one colour in one stream"
        );
        Ok(())
    }
}

/// One line on a terminal, rewritten as it goes; only the flips elsewhere.
struct Progress {
    terminal: bool,
    seen: (usize, Instant),
    active: String,
}

impl Progress {
    fn new() -> Self {
        Self {
            terminal: std::io::stderr().is_terminal(),
            seen: (0, Instant::now()),
            active: "blue".to_owned(),
        }
    }

    /// Shows what happens until `due` after `begun`; an error once interrupted.
    fn until(
        &mut self,
        due: Duration,
        begun: Instant,
        load: &Load,
        interrupted: &AtomicBool,
    ) -> Result<()> {
        while begun.elapsed() < due {
            ensure!(!interrupted.load(Ordering::Relaxed), "interrupted");
            self.line(begun.elapsed(), load);
            let left = due.saturating_sub(begun.elapsed());
            std::thread::sleep(left.min(Duration::from_millis(100)));
        }
        Ok(())
    }

    fn line(&mut self, at: Duration, load: &Load) {
        if !self.terminal {
            return;
        }
        let (answers, failed) = load.progress();
        let since = self.seen.1.elapsed().as_secs_f64().max(0.001);
        let rate = (answers - self.seen.0) as f64 / since;
        self.seen = (answers, Instant::now());
        let dot = paint(&self.active, "\u{25cf}");
        let active = &self.active;
        eprint!(
            "\r\x1b[K{:5.1} s  {dot} new flows: {active:<5}  {rate:>7.0} requests/s  {answers:>8} answered  {failed} failed",
            at.as_secs_f64()
        );
        let _ = std::io::stderr().flush();
    }

    fn flipped(&mut self, flipped: &Flipped) {
        self.clear();
        self.active.clone_from(&flipped.to);
        let (from, to) = (&flipped.from, &flipped.to);
        let old = flipped
            .old_flows
            .map_or_else(|| "?".to_owned(), |flows| flows.to_string());
        eprintln!(
            "$ bgswitch flip llm      {from} -> {to}, stored in {}, first new flow after {}, {old} flows stay on {from}",
            summary::ns(flipped.store_ns),
            summary::us(flipped.first_new_flow_us)
        );
    }

    fn clear(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

fn paint(colour: &str, text: &str) -> String {
    let code = if colour == "blue" { 34 } else { 32 };
    format!("\x1b[{code}m{text}\x1b[0m")
}
