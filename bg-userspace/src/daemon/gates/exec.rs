//! `kind = "exec"`: a command of the operator's.

use std::{
    io,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::Command,
    task::JoinHandle,
    time::timeout,
};

use crate::{health::exec::Group, release::Verdict};

/// Bytes of a command's output that are kept: the last ones.
const OUTPUT: usize = 2000;
/// The exit code of a command that cannot say (`EX_TEMPFAIL` of sysexits.h).
const CANNOT_SAY: i32 = 75;
/// What a command leaves behind may hold its output open for so long.
const LEFT_OPEN: Duration = Duration::from_millis(200);

/// Runs a command: its exit code says it.
pub(super) async fn run(
    words: &[String],
    limit: Duration,
    environment: &[(&'static str, String)],
) -> (Verdict, String) {
    match finish(words, limit, environment, OUTPUT).await {
        Err(trouble) => (Verdict::Inconclusive, trouble),
        Ok(ended) => {
            let (verdict, how) = judge(ended.status);
            (verdict, format!("{how}{}", said(&ended.output)))
        }
    }
}

/// A command that has come to its end.
pub(super) struct Ended {
    pub(super) status: ExitStatus,
    /// The last of what it wrote to stdout and to stderr.
    output: [Vec<u8>; 2],
    /// That is not all of it, as far as is known.
    is_part: bool,
}

impl Ended {
    /// All that it wrote to stdout; `None` if that is not known, or nothing.
    pub(super) fn text(&self) -> Option<String> {
        let [text, _] = &self.output;
        let is_whole = !self.is_part && !text.is_empty();
        is_whole.then(|| String::from_utf8_lossy(text).into_owned())
    }
}

/// Runs a command to its end, and keeps `most` bytes of either output; says why it has
/// come to none.
pub(super) async fn finish(
    words: &[String],
    limit: Duration,
    environment: &[(&'static str, String)],
    most: usize,
) -> Result<Ended, String> {
    let mut words = words.iter();
    let program = words.next().map_or("", String::as_str);
    let cannot = |error: io::Error| format!("{program} could not be run: {error}");
    let mut command = Command::new(program);
    command
        .args(words)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .env_remove("NOTIFY_SOCKET")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let mut group = Group(command.spawn().map_err(cannot)?);
    let (stdout, stderr) = (group.0.stdout.take(), group.0.stderr.take());
    let output = tokio::spawn(async move {
        let (out, err) = tokio::join!(tail(stdout, most), tail(stderr, most));
        [out, err]
    });
    let Ok(status) = timeout(limit, group.0.wait()).await else {
        drop(group);
        let said = said(&written(output).await.unwrap_or_default());
        let limit = humantime::format_duration(limit);
        return Err(format!("had no result after {limit}, and was killed{said}"));
    };
    let output = written(output).await;
    let is_full = |output: &[Vec<u8>; 2]| output[0].len() >= most;
    Ok(Ended {
        status: status.map_err(cannot)?,
        is_part: output.as_ref().is_none_or(is_full),
        output: output.unwrap_or_default(),
    })
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

/// What was written by a command that has ended, unless somebody may still write.
async fn written(output: JoinHandle<[Vec<u8>; 2]>) -> Option<[Vec<u8>; 2]> {
    let stop = output.abort_handle();
    let read = timeout(LEFT_OPEN, output).await;
    stop.abort();
    read.ok()?.ok()
}

/// What a command has said, in one line.
fn said(output: &[Vec<u8>; 2]) -> String {
    let bytes = output.concat();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    match lines.join(" | ").trim_matches([' ', '|']) {
        "" => String::new(),
        line => format!(": {line}"),
    }
}

/// The last bytes of a stream.
async fn tail(stream: Option<impl AsyncRead + Unpin>, most: usize) -> Vec<u8> {
    let mut kept = Vec::new();
    let Some(mut stream) = stream else {
        return kept;
    };
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        kept.extend_from_slice(buffer.get(..count).unwrap_or_default());
        let surplus = kept.len().saturating_sub(most);
        kept.drain(..surplus);
    }
    kept
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn said_by(script: &str, limit: Duration) -> (Verdict, String) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let words = ["/bin/sh", "-c", script].map(str::to_owned);
        runtime.block_on(run(
            &words,
            limit,
            &[("BGSWITCH_COLOUR", "green".to_owned())],
        ))
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
}
