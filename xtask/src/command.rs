//! Running other programs: shown before, named exactly when they fail.

use std::{
    error::Error,
    ffi::OsStr,
    fmt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result};

/// A program that ran and did not succeed.
#[derive(Debug)]
pub struct Failed {
    line: String,
    code: Option<i32>,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(f, "`{}` exited with {code}", self.line),
            None => write!(f, "`{}` was ended by a signal", self.line),
        }
    }
}

impl Error for Failed {}

/// The exit code that tells `error`: the failed program's own, else 1.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error
        .downcast_ref::<Failed>()
        .and_then(|failed| u8::try_from(failed.code?).ok())
        .filter(|code| *code != 0)
        .unwrap_or(1)
}

/// Shows the command, runs it with stdout sent to stderr, and fails with its
/// exact words.
pub fn run(command: &mut Command) -> Result<()> {
    eprintln!("$ {}", line(command));
    let status = command
        .stdin(Stdio::null())
        .stdout(std::io::stderr())
        .status()
        .with_context(|| format!("starting `{}`", line(command)))?;
    check(command, status)
}

/// An error naming the command, unless `status` is success.
pub fn check(command: &Command, status: std::process::ExitStatus) -> Result<()> {
    if status.success() {
        return Ok(());
    }
    Err(Failed {
        line: line(command),
        code: status.code(),
    }
    .into())
}

/// What a program printed on stdout; `None` if it is missing or failed.
pub fn capture<A: AsRef<OsStr>>(program: impl AsRef<OsStr>, arguments: &[A]) -> Option<String> {
    let output = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    output.status.success().then_some(text)
}

/// The command as one would type it.
pub fn line(command: &Command) -> String {
    let variables = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}={}", name.display(), quoted(value?))));
    variables
        .chain([quoted(command.get_program())])
        .chain(command.get_args().map(quoted))
        .collect::<Vec<_>>()
        .join(" ")
}

/// `cargo`, the one that runs this task.
pub fn cargo() -> Command {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(root());
    cargo
}

/// Builds the programs and the tests in one go: what tests need turns features of
/// some crates on, and with another set of features all would be compiled again.
pub fn build_all() -> Result<()> {
    run(cargo().args(["build", "--release", "--workspace", "--bins", "--tests"]))
}

/// The top of the repository.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Where cargo builds: `$CARGO_TARGET_DIR`, or `target` at the top.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// Whether this process has root's rights.
pub fn is_root() -> bool {
    // SAFETY: geteuid takes nothing, touches no memory and cannot fail.
    unsafe { libc::geteuid() == 0 }
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.into_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}
