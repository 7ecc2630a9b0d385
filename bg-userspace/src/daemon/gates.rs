//! Runs of gates, against the backends of a colour by their own addresses.

use std::{
    fmt, io,
    net::SocketAddr,
    process::{ExitStatus, Stdio},
    time::{Duration, Instant},
};

use http_body_util::Full;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    net::TcpStream,
    process::Command,
    task::JoinSet,
    time::timeout,
};

use crate::{
    config::{GateKind, GatePlan, HttpGate},
    health::{exec::Group, http, tidy_to},
    plan::{BackendPlan, Protocol, ServicePlan},
    release::{Outcome, Verdict},
};

/// Bytes of a command's output that are kept: the last ones.
const OUTPUT: usize = 2000;
/// The exit code of a command that cannot say (`EX_TEMPFAIL` of sysexits.h).
const CANNOT_SAY: i32 = 75;
/// What a command leaves behind may hold its output open for so long.
const LEFT_OPEN: Duration = Duration::from_millis(200);

/// What a gate is run against.
#[derive(Clone, Debug)]
pub(super) struct Target {
    /// The service, as it is configured now.
    pub(super) plan: ServicePlan,
    /// Backends of the colour.
    pub(super) backends: Vec<BackendPlan>,
    /// What a command is told: names and values.
    pub(super) environment: Vec<(&'static str, String)>,
}

impl Target {
    /// Where each backend answers over TCP: at its own port, or that of the first
    /// listener that it serves; `None` when no listener is TCP.
    pub(super) fn endpoints(&self, port: Option<u16>) -> Option<Vec<SocketAddr>> {
        let endpoint = |backend: &BackendPlan| {
            if let Some(port) = port {
                return Some(SocketAddr::new(backend.address, port));
            }
            let mut listeners = self.plan.listeners.iter();
            let listener = listeners
                .find(|listener| listener.protocol == Protocol::Tcp && backend.serves(listener))?;
            Some(backend.endpoint(listener))
        };
        self.backends.iter().map(endpoint).collect()
    }
}

/// Characters of what a gate has seen, at most ...
const EVIDENCE: usize = 4000;
/// ... and of what it has seen of one backend.
const SAID: usize = 300;

/// Runs a gate to its end.
pub(super) async fn run(gate: &GatePlan, target: &Target) -> Outcome {
    let began = Instant::now();
    let (verdict, evidence) = match &gate.kind {
        GateKind::Exec(words) => exec(words, gate.timeout, target).await,
        GateKind::Http(of) => ask_all(of, gate.timeout, target).await,
    };
    Outcome {
        verdict,
        evidence: tidy_to(&evidence, EVIDENCE),
        took_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    }
}

async fn exec(words: &[String], limit: Duration, target: &Target) -> (Verdict, String) {
    let mut words = words.iter();
    let program = words.next().map_or("", String::as_str);
    let cannot = |error: io::Error| {
        let evidence = format!("{program} could not be run: {error}");
        (Verdict::Inconclusive, evidence)
    };
    let mut command = Command::new(program);
    command
        .args(words)
        .envs(target.environment.iter().map(|(name, value)| (name, value)))
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut group = match command.spawn() {
        Ok(child) => Group(child),
        Err(error) => return cannot(error),
    };
    let (stdout, stderr) = (group.0.stdout.take(), group.0.stderr.take());
    let output = tokio::spawn(async move {
        let (out, err) = tokio::join!(tail(stdout), tail(stderr));
        [out, err].concat()
    });
    let Ok(status) = timeout(limit, group.0.wait()).await else {
        drop(group);
        let said = said(output).await;
        let limit = humantime::format_duration(limit);
        let evidence = format!("had no result after {limit}, and was killed{said}");
        return (Verdict::Inconclusive, evidence);
    };
    let status = match status {
        Ok(status) => status,
        Err(error) => return cannot(error),
    };
    let (verdict, ended) = judge(status);
    (verdict, format!("{ended}{}", said(output).await))
}

fn judge(status: ExitStatus) -> (Verdict, String) {
    match status.code() {
        Some(0) => (Verdict::Pass, "exit code 0".to_owned()),
        Some(CANNOT_SAY) => (Verdict::Inconclusive, format!("exit code {CANNOT_SAY}")),
        Some(code) => (Verdict::Fail, format!("exit code {code}")),
        None => (
            Verdict::Inconclusive,
            format!("ended by a signal ({status})"),
        ),
    }
}

/// What a command has said, in one line.
async fn said(output: tokio::task::JoinHandle<Vec<u8>>) -> String {
    let stop = output.abort_handle();
    let bytes = if let Ok(Ok(bytes)) = timeout(LEFT_OPEN, output).await {
        bytes
    } else {
        stop.abort();
        Vec::new()
    };
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    match lines.join(" | ").trim_matches([' ', '|']) {
        "" => String::new(),
        line => format!(": {line}"),
    }
}

/// The last bytes of a stream.
async fn tail(stream: Option<impl AsyncRead + Unpin>) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else {
        return kept;
    };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        kept.extend_from_slice(buffer.get(..count).unwrap_or_default());
        let surplus = kept.len().saturating_sub(OUTPUT);
        kept.drain(..surplus);
    }
    kept
}

/// Asks each backend; all must answer as they should.
async fn ask_all(gate: &HttpGate, limit: Duration, target: &Target) -> (Verdict, String) {
    let Some(endpoints) = target.endpoints(gate.port) else {
        let evidence = "a backend serves no TCP listener: name a port";
        return (Verdict::Inconclusive, evidence.to_owned());
    };
    let mut asked = JoinSet::new();
    for (index, endpoint) in endpoints.into_iter().enumerate() {
        let gate = gate.clone();
        asked.spawn(async move {
            let began = Instant::now();
            let answer = timeout(limit, ask(&gate, endpoint)).await;
            let took = began.elapsed().as_millis();
            let (verdict, said) = answer.unwrap_or_else(|_| {
                let limit = humantime::format_duration(limit);
                (Verdict::Fail, format!("no answer within {limit}"))
            });
            let said = tidy_to(&said, SAID);
            (index, verdict, format!("{endpoint} {said} ({took} ms)"))
        });
    }
    let mut answers = asked.join_all().await;
    answers.sort_unstable_by_key(|(index, ..)| *index);
    let is = |wanted| answers.iter().any(|(_, verdict, _)| *verdict == wanted);
    let verdict = match (is(Verdict::Fail), is(Verdict::Inconclusive)) {
        (true, _) => Verdict::Fail,
        (_, true) => Verdict::Inconclusive,
        _ => Verdict::Pass,
    };
    // Of many, those that went wrong.
    let telling = answers.iter().filter(|(_, of, _)| *of == verdict);
    let telling: Vec<&str> = telling.map(|(.., said)| said.as_str()).collect();
    (verdict, telling.join("; "))
}

/// Asks one backend.
async fn ask(gate: &HttpGate, endpoint: SocketAddr) -> (Verdict, String) {
    let stream = match TcpStream::connect(endpoint).await {
        Ok(stream) => stream,
        Err(error) => return unreachable(&error),
    };
    let badly = |error: &dyn fmt::Display| (Verdict::Fail, format!("answered badly: {error}"));
    let request = http::get(endpoint, None, &gate.path).body(Full::default());
    let request = match request {
        Ok(request) => request,
        Err(error) => return badly(&error),
    };
    let answer = match http::exchange(stream, request).await {
        Ok(answer) => answer,
        Err(error) => return badly(&error),
    };
    let status = answer.status.as_u16();
    match trouble(gate, status, &answer.body) {
        None => (Verdict::Pass, format!("answered {status}")),
        Some(trouble) => (Verdict::Fail, trouble),
    }
}

/// Who does not answer, fails; what is our own trouble, says nothing of the backend.
fn unreachable(error: &io::Error) -> (Verdict, String) {
    let theirs = matches!(
        error.kind(),
        io::ErrorKind::ConnectionRefused
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::TimedOut
    );
    let verdict = if theirs {
        Verdict::Fail
    } else {
        Verdict::Inconclusive
    };
    (verdict, format!("cannot be reached: {error}"))
}

/// What is wrong with an answer.
fn trouble(gate: &HttpGate, status: u16, body: &[u8]) -> Option<String> {
    if status != gate.status {
        return Some(format!("answered {status}, not {}", gate.status));
    }
    if let Some(wanted) = &gate.body {
        let text = String::from_utf8_lossy(body);
        if !text.contains(wanted.as_str()) {
            return Some(format!("answered {status} without `{wanted}`"));
        }
    }
    let pointer = gate.json.as_ref()?;
    let Ok(json) = serde_json::from_slice::<serde_json::Value>(body) else {
        return Some(format!("answered {status}, but no JSON"));
    };
    match (json.pointer(pointer), &gate.equals) {
        (None, _) => Some(format!("answered {status} without {pointer}")),
        (Some(_), None) => None,
        (Some(found), Some(wanted)) if http::same(found, wanted) => None,
        (Some(found), Some(wanted)) => Some(format!(
            "answered {status} with {pointer} = {found}, not {wanted}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target() -> Target {
        Target {
            plan: ServicePlan {
                name: "llm".to_owned(),
                listeners: vec!["tcp://192.0.2.1:80".parse().unwrap()],
                forward: crate::plan::ForwardMode::default(),
                announce: false,
                udp_idle: Duration::ZERO,
                colours: [Vec::new(), Vec::new()],
            },
            backends: Vec::new(),
            environment: vec![("BGSWITCH_COLOUR", "green".to_owned())],
        }
    }

    fn said_by(script: &str, limit: Duration) -> (Verdict, String) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let words = ["/bin/sh", "-c", script].map(str::to_owned);
        runtime.block_on(exec(&words, limit, &target()))
    }

    #[test]
    fn a_command_says_it_by_its_exit_code() {
        let hour = Duration::from_hours(1);
        for (script, verdict, evidence) in [
            ("echo $BGSWITCH_COLOUR", Verdict::Pass, "exit code 0: green"),
            (
                "echo a; echo b >&2; exit 1",
                Verdict::Fail,
                "exit code 1: a | b",
            ),
            ("exit 75", Verdict::Inconclusive, "exit code 75"),
        ] {
            assert_eq!(said_by(script, hour), (verdict, evidence.to_owned()));
        }
        let (verdict, evidence) = said_by("kill -9 $$", hour);
        assert_eq!(verdict, Verdict::Inconclusive);
        assert!(evidence.starts_with("ended by a signal"), "{evidence}");
    }

    #[test]
    fn a_command_that_hangs_is_killed_with_all_that_it_started() {
        let file = std::env::temp_dir().join(format!("bgswitch-gate-{}", std::process::id()));
        let script = format!("sleep 3600 & echo $! > {}; wait", file.display());
        let (verdict, evidence) = said_by(&script, Duration::from_secs(1));
        assert_eq!(verdict, Verdict::Inconclusive, "{evidence}");
        let left = std::fs::read_to_string(&file).unwrap();
        std::fs::remove_file(file).unwrap();
        let state = || std::fs::read_to_string(format!("/proc/{}/stat", left.trim()));
        let begun = Instant::now();
        // Whoever inherits it may be slow to take notice of its end.
        while state().is_ok_and(|stat| !stat.contains(") Z")) {
            assert!(begun.elapsed() < Duration::from_secs(20), "it still runs");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    #[test]
    fn an_answer_must_be_as_configured() {
        let gate = HttpGate {
            path: "/".to_owned(),
            port: None,
            status: 200,
            body: Some("ready".to_owned()),
            json: Some("/models/0/count".to_owned()),
            equals: Some(1.into()),
        };
        let good = br#"{"models": [{"count": 1.0, "state": "ready"}]}"#;
        assert_eq!(trouble(&gate, 200, good), None);
        for (status, body, wrong) in [
            (503, &good[..], "answered 503, not 200"),
            (200, b"{}", "answered 200 without `ready`"),
            (200, b"ready", "answered 200, but no JSON"),
            (200, br#"["ready"]"#, "answered 200 without /models/0/count"),
            (
                200,
                br#"{"models": [{"count": 2}], "is": "ready"}"#,
                "answered 200 with /models/0/count = 2, not 1",
            ),
        ] {
            assert_eq!(trouble(&gate, status, body).as_deref(), Some(wrong));
        }
    }
}
