//! A command of the operator's: good is exit status 0.

use std::{fmt, net::SocketAddr, process::Stdio, time::Duration};

use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    process::{Child, Command},
    time::timeout,
};

use super::{Outcome, Trouble, tidy};
use crate::plan::BackendName;

/// What is kept of a command's output; the rest is read and dropped.
const MAX_OUTPUT: usize = 4096;

/// How long the last of its output is waited for, when it has ended.
const LAST_WORDS: Duration = Duration::from_millis(100);

/// `kind = "exec"`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecProbe {
    /// The program, an absolute path, and its arguments.
    pub command: Vec<String>,
}

impl fmt::Display for ExecProbe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "command {:?}", self.command)
    }
}

/// Runs the command, and kills it with its process group when it is not waited for any
/// more.
pub async fn probe(name: &BackendName, endpoint: Option<SocketAddr>, probe: &ExecProbe) -> Outcome {
    let [program, arguments @ ..] = probe.command.as_slice() else {
        return Err(Trouble::Ours("there is no command".to_owned()));
    };
    let port = endpoint.map_or_else(String::new, |endpoint| endpoint.port().to_string());
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("BGSWITCH_SERVICE", &name.service)
        .env("BGSWITCH_COLOUR", name.colour.as_str())
        .env("BGSWITCH_BACKEND", name.to_string())
        .env("BGSWITCH_ADDRESS", name.address.to_string())
        .env("BGSWITCH_PORT", port)
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    let child = command.spawn();
    let unable = |error| Trouble::Ours(tidy(&format!("{program}: {error}")));
    let mut group = Group(child.map_err(unable)?);
    let (out, err) = (group.0.stdout.take(), group.0.stderr.take());
    let (mut said, mut complained) = (Vec::new(), Vec::new());
    let status = {
        let reading = async { tokio::join!(read(out, &mut said), read(err, &mut complained)) };
        tokio::pin!(reading);
        let mut is_open = true;
        let status = loop {
            tokio::select! {
                status = group.0.wait() => break status,
                _ = &mut reading, if is_open => is_open = false,
            }
        };
        // What it left behind may have its output open for ever.
        if is_open {
            let _ = timeout(LAST_WORDS, reading).await;
        }
        status
    };
    let status = status.map_err(|error| Trouble::Ours(tidy(&error.to_string())))?;
    if status.success() {
        return Ok(());
    }
    let how = status.to_string();
    let texts = [complained, said].map(|text| String::from_utf8_lossy(&text).into_owned());
    let lines = texts.iter().flat_map(|text| text.lines());
    let line = lines.map(str::trim).find(|line| !line.is_empty());
    let trouble = tidy(&match line {
        Some(line) => format!("{how}: {line}"),
        None => how,
    });
    Err(trouble.into())
}

/// Reads to the end, and keeps the beginning.
async fn read(pipe: Option<impl AsyncRead + Unpin>, kept: &mut Vec<u8>) {
    let Some(mut pipe) = pipe else {
        return;
    };
    let mut buffer = [0; 1024];
    while let Ok(length @ 1..) = pipe.read(&mut buffer).await {
        let room = MAX_OUTPUT.saturating_sub(kept.len());
        kept.extend(buffer.iter().take(length.min(room)));
    }
}

/// A command and the process group that it leads: killed when it is dropped before its
/// end.
pub struct Group(pub Child);

impl Drop for Group {
    /// Kills the group, unless the command has ended by itself and was waited for: then
    /// its id may be somebody else's.
    fn drop(&mut self) {
        if let Some(id) = self.0.id() {
            // It may end in this moment, and then there is nothing to kill.
            let _ = killpg(Pid::from_raw(id as i32), Signal::SIGKILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use bg_common::service::Colour;
    use nix::sys::signal::kill;

    use super::*;

    async fn shell(script: &str) -> Outcome {
        let name = BackendName {
            service: "llm".to_owned(),
            colour: Colour::Green,
            address: [10, 0, 2, 10].into(),
            port: Some(9000),
        };
        let command = ["/bin/sh", "-c", script].map(str::to_owned).into();
        probe(
            &name,
            Some(([10, 0, 2, 10], 9000).into()),
            &ExecProbe { command },
        )
        .await
    }

    #[tokio::test]
    async fn its_exit_status_counts_and_its_first_line_says_why() {
        assert_eq!(shell("echo whatever; exit 0").await, Ok(()));
        for (script, expected) in [
            ("exit 3", "exit status: 3"),
            ("echo out; exit 1", "exit status: 1: out"),
            (
                "echo out; echo; echo ' err ' >&2; exit 1",
                "exit status: 1: err",
            ),
            ("kill -TERM $$", "signal: 15 (SIGTERM)"),
        ] {
            let said = shell(script).await;
            assert_eq!(said, Err(expected.to_owned().into()), "{script}");
        }
    }

    #[tokio::test]
    async fn what_cannot_be_started_says_nothing_of_the_backend() {
        let name = BackendName {
            service: "llm".to_owned(),
            colour: Colour::Green,
            address: [10, 0, 2, 10].into(),
            port: None,
        };
        let command = vec!["/nowhere/probe".to_owned()];
        let said = probe(&name, None, &ExecProbe { command }).await;
        let expected = "/nowhere/probe: No such file or directory (os error 2)";
        assert_eq!(said, Err(Trouble::Ours(expected.to_owned())));
    }

    #[tokio::test]
    async fn it_is_told_whom_to_probe_and_nothing_else() {
        let wanted = "llm green 10.0.2.10:9000 10.0.2.10 9000 / unset";
        let script = "echo $BGSWITCH_SERVICE $BGSWITCH_COLOUR $BGSWITCH_BACKEND $BGSWITCH_ADDRESS \
                      $BGSWITCH_PORT $PWD ${CARGO:-unset}; exit 1";
        assert_eq!(
            shell(script).await,
            Err(format!("exit status: 1: {wanted}").into())
        );
    }

    #[tokio::test]
    async fn output_without_end_blocks_nobody() {
        let script = "i=0; while [ $i -lt 3000 ]; do echo 0123456789012345678901234567890123456789; \
                      echo x >&2; i=$((i+1)); done";
        assert_eq!(shell(script).await, Ok(()));
    }

    #[tokio::test]
    async fn what_it_leaves_behind_is_not_waited_for() {
        let file = std::env::temp_dir().join(format!("bgswitch-exec-left-{}", std::process::id()));
        let script = format!("sleep 1000 & echo $! > {}", file.display());
        assert_eq!(shell(&script).await, Ok(()));
        let left = pid_in(&file).await;
        kill(left, Signal::SIGKILL).unwrap();
    }

    /// When its time is up, the future is dropped.
    #[tokio::test]
    async fn it_is_killed_with_all_that_it_started() {
        let file = std::env::temp_dir().join(format!("bgswitch-exec-{}", std::process::id()));
        let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
        let started = async {
            tokio::select! {
                outcome = shell(&script) => unreachable!("it ended: {outcome:?}"),
                pid = pid_in(&file) => pid,
            }
        };
        let child = started.await;
        while is_alive(child) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The process id that a file will have.
    async fn pid_in(file: &Path) -> Pid {
        loop {
            let text = fs::read_to_string(file).unwrap_or_default();
            if let Some(pid) = text.strip_suffix('\n') {
                fs::remove_file(file).unwrap();
                return Pid::from_raw(pid.parse().unwrap());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether it runs: a zombie does not.
    fn is_alive(pid: Pid) -> bool {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let state = stat
            .rsplit(") ")
            .next()
            .and_then(|rest| rest.chars().next());
        state.is_some_and(|state| state != 'Z')
    }
}
