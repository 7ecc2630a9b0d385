//! A release of a real inference server: MLServer with two versions of a scikit-learn
//! model, and clients over HTTP and gRPC who must not notice when they get the other.

mod judge;

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use bg_tests::{
    api,
    lab::{Lab, Place, SERVERS, SERVICE, beside_the_build},
    load::now_ns,
};
use bg_userspace::api::MonitorEvent;
use judge::{Asked, Summary};

use crate::wait;

/// What is laid out in the lab's directory.
const FILES: [(&str, &str); 5] = [
    ("models.py", include_str!("inference/models.py")),
    ("v2.py", include_str!("inference/v2.py")),
    ("clients.py", include_str!("inference/clients.py")),
    ("gate.py", include_str!("inference/gate.py")),
    ("prompts.jsonl", include_str!("inference/prompts.jsonl")),
];
const CONFIGURATION: &str = include_str!("inference/service.toml");
/// What the program `mlserver` does.
const MLSERVER: &str = "import mlserver.cli; mlserver.cli.main()";
/// Servers of a colour: those of the lab that have IPv4 addresses.
const SERVERS_A_COLOUR: usize = 2;
/// Four servers import a lot at once, before they load a small model.
const UNTIL_READY: Duration = Duration::from_mins(5);
/// Requests before the release begins: what the new version is compared with.
const BEFORE: usize = 400;

/// Tells the story; true when every promise was kept.
pub fn run(picture: &Path, json: bool, interrupted: &AtomicBool) -> Result<bool> {
    let python = python()?;
    eprintln!(
        "demo: a gateway, {SERVERS_A_COLOUR} MLServers a colour, clients over HTTP and gRPC, in network namespaces"
    );
    let mut lab = Lab::new()?;
    lay_out(&lab, &python)?;
    serve(&mut lab, &python)?;
    eprintln!("$ bgswitch run");
    lab.start()?;
    await_models(&lab, interrupted)?;
    let begun_ns = now_ns();
    let mut clients = Clients::start(&lab, &python)?;
    clients.advance(BEFORE, interrupted)?;

    let release = "release start llm --version iris@2 --wait";
    operate(&lab, release, interrupted)?;
    wait(Duration::from_secs(4), interrupted)?;
    // Version 2 is well: who is on it may go on. A plain rollback would reset them.
    operate(&lab, "rollback llm --mode drain -m demo", interrupted)?;
    wait(Duration::from_secs(6), interrupted)?;
    let stores = stores(&lab)?;
    let answers = clients.finish()?;
    drop(lab);

    let summary = Summary::new(&answers, &stores, picture);
    judge::draw(&summary, &answers, &stores, begun_ns)
        .save(picture)
        .with_context(|| format!("drawing {}", picture.display()))?;
    if json {
        println!("{}", serde_json::to_string(&summary)?);
    } else {
        print!("{summary}");
    }
    Ok(summary.is_clean())
}

/// The interpreter that has MLServer.
fn python() -> Result<PathBuf> {
    let python = beside_the_build("inference")?.join("venv/bin/python");
    ensure!(
        python.is_file(),
        "MLServer is not installed in {}: `cargo xtask demo --inference` does it",
        python.display()
    );
    // Not resolved: what the link leads to knows nothing of the environment.
    Ok(std::path::absolute(python)?)
}

/// Programs, the configuration and both versions of the model.
fn lay_out(lab: &Lab, python: &Path) -> Result<()> {
    let directory = lab.directory();
    for (name, text) in FILES {
        fs::write(directory.join(name), text)?;
    }
    let configuration = CONFIGURATION
        .replace("{directory}", &directory.display().to_string())
        .replace("{python}", &python.display().to_string());
    lab.configure(&configuration)?;
    eprintln!("training two versions of a model");
    let status = Command::new(python)
        .arg(directory.join("models.py"))
        .arg(directory.join("models"))
        .stdout(std::io::stderr())
        .status()?;
    ensure!(status.success(), "the training failed: {status}");
    Ok(())
}

/// Starts the servers: version 1 on blue, 2 on green.
fn serve(lab: &mut Lab, python: &Path) -> Result<()> {
    let colours = [(Place::Blue, "1"), (Place::Green, "2")];
    for ((place, version), hosts) in colours.into_iter().zip(SERVERS) {
        for host in &hosts[..SERVERS_A_COLOUR] {
            let log = File::create(log_of(lab, host))?;
            let mut server = lab.command(place, python)?;
            server
                .args(["-c", MLSERVER, "start"])
                .arg(lab.directory().join("models").join(version))
                .current_dir(lab.directory())
                .env("MLSERVER_HOST", host)
                .env("MLSERVER_DEBUG", "false")
                // In the server's own process: the model takes a millisecond.
                .env("MLSERVER_PARALLEL_WORKERS", "0")
                .env("OMP_NUM_THREADS", "1")
                .stdout(log.try_clone()?)
                .stderr(log);
            lab.spawn(server)?;
        }
    }
    Ok(())
}

fn log_of(lab: &Lab, host: &str) -> PathBuf {
    lab.directory().join(format!("mlserver-{host}.log"))
}

/// Waits until the gateway finds the model ready on every server.
fn await_models(lab: &Lab, interrupted: &AtomicBool) -> Result<()> {
    eprintln!("waiting until all servers have loaded the model");
    let begun = Instant::now();
    loop {
        let status = lab.status()?;
        let mut ill = Vec::new();
        for colour in ["blue", "green"] {
            let backends = &status["services"][0]["colours"][colour]["backends"];
            let backends = backends.as_array().context("no backends in `status`")?;
            let not_healthy = backends.iter().filter(|b| b["healthy"] != true);
            ill.extend(not_healthy.filter_map(|b| b["address"].as_str()));
        }
        let Some(address) = ill.first() else {
            eprintln!("they are ready after {} s", begun.elapsed().as_secs());
            return Ok(());
        };
        if begun.elapsed() > UNTIL_READY {
            let host = address.rsplit_once(':').map_or(*address, |(host, _)| host);
            let log = fs::read_to_string(log_of(lab, host)).unwrap_or_default();
            bail!("no model on {}; the first one says:\n{log}", ill.join(", "));
        }
        wait(Duration::from_millis(500), interrupted)?;
    }
}

/// Runs a `bgswitch` command that must succeed, and shows what it says meanwhile.
fn operate(lab: &Lab, line: &str, interrupted: &AtomicBool) -> Result<()> {
    eprintln!("\n$ bgswitch {line}");
    let words: Vec<&str> = line.split(' ').collect();
    let mut command = lab.bgswitch(&words)?;
    command.stdin(Stdio::null()).stdout(std::io::stderr());
    let mut child = Ended(command.spawn()?);
    loop {
        if let Some(status) = child.0.try_wait()? {
            ensure!(status.success(), "bgswitch {line}: {status}");
            return Ok(());
        }
        wait(Duration::from_millis(50), interrupted)?;
    }
}

/// A program that is ended when it is dropped.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// When the words of the flip and of the rollback were stored, as the daemon's events
/// tell it.
fn stores(lab: &Lab) -> Result<[MonitorEvent; 2]> {
    // An id of another daemon: this one tells all that it remembers.
    let all = "Last-Event-ID: 0-0\r\n";
    let events = api::send(lab, "GET", "/v1/events?service=llm", all, "")?;
    let mut flip = None;
    for line in BufReader::new(events).lines() {
        let line = line.context("no rollback among the events")?;
        let Some(data) = line.strip_prefix("data: ") else {
            continue;
        };
        let Ok(event) = serde_json::from_str::<MonitorEvent>(data) else {
            continue;
        };
        match event.event.as_str() {
            "flip" => flip = Some(event),
            "rollback" => return Ok([flip.context("no flip among the events")?, event]),
            _ => {}
        }
    }
    bail!("the events ended before the rollback")
}

/// The clients at work, and what they were answered.
struct Clients {
    program: Ended,
    seen: Arc<AtomicUsize>,
    answers: JoinHandle<Result<Vec<Asked>>>,
}

impl Clients {
    fn start(lab: &Lab, python: &Path) -> Result<Self> {
        let mut program = lab
            .command(Place::Client, python)?
            .arg(lab.directory().join("clients.py"))
            .arg(SERVICE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("starting the clients")?;
        let lines = BufReader::new(program.stdout.take().context("no pipe")?).lines();
        let seen = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&seen);
        let answers = std::thread::spawn(move || {
            let mut answers = Vec::new();
            for line in lines {
                answers.push(serde_json::from_str(&line?)?);
                counter.fetch_add(1, Ordering::Relaxed);
            }
            Ok(answers)
        });
        Ok(Self {
            program: Ended(program),
            seen,
            answers,
        })
    }

    /// Waits until so many requests are answered.
    fn advance(&mut self, requests: usize, interrupted: &AtomicBool) -> Result<()> {
        while self.seen.load(Ordering::Relaxed) < requests {
            if let Some(status) = self.program.0.try_wait()? {
                bail!("the clients ended: {status}");
            }
            wait(Duration::from_millis(100), interrupted)?;
        }
        Ok(())
    }

    /// Lets the requests under way end, and hands all answers over.
    fn finish(mut self) -> Result<Vec<Asked>> {
        drop(self.program.0.stdin.take());
        let status = self.program.0.wait()?;
        ensure!(status.success(), "the clients failed: {status}");
        let answers = self.answers.join();
        answers.map_err(|_| anyhow!("the reader of answers panicked"))?
    }
}
