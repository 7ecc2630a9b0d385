//! The command line: one file per command, and what they share.

mod check;
mod detach;
mod flip;
mod flows;
mod history;
mod reload;
mod rollback;
mod run;
mod status;

use std::{
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use hyper::Method;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    api::{Refusal, exit},
    client,
    config::{Config, ConfigError, DEFAULT_PATH, DEFAULT_SOCKET},
    datapath,
};

/// Blue-green traffic switch at the NIC.
///
/// One word in a BPF map says which colour of a service is live; `flip` stores
/// it, and the next packet of every CPU goes to the other environment.
/// Established connections stay where they are until they end, the drain
/// deadline passes, or you say `--mode cut`.
#[derive(Debug, Parser)]
#[command(name = "bgswitch", version, max_term_width = 100, after_help = AFTER_HELP)]
pub struct Arguments {
    #[command(flatten)]
    common: Common,
    #[command(subcommand)]
    command: Option<Command>,
}

const AFTER_HELP: &str = "\
Examples:
  bgswitch run --config /etc/bgswitch/bgswitch.toml   run the daemon
  bgswitch                                            what is live, what is draining
  bgswitch flip llm -m 'llama@8'                      switch to the standby
  bgswitch rollback llm                               and back; works without the daemon

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 daemon not running,
4 not permitted, 5 conflict, 8 target unreachable, 9 timed out, 11 packet path.";

#[derive(Debug, Args)]
struct Common {
    /// How to print the answer.
    #[arg(short, long, global = true, value_enum, default_value = "text")]
    output: Output,
    /// The daemon's socket [default: the one in the configuration file, or /run/bgswitch/bgswitch.sock].
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The configuration file.
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// How long to wait for the daemon's answer.
    #[arg(long, global = true, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people.
    Text,
    /// For scripts.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon, in the foreground. When it stops, forwarding goes on as it is.
    Run,
    /// Validate a configuration file; needs neither root nor a daemon.
    Check(check::Check),
    /// Show what is live, what is draining, and where packets went.
    Status(status::Status),
    /// Switch a service to its other colour.
    Flip(flip::Flip),
    /// Switch back at once and reset the bad colour's flows. Never refused; works without the daemon.
    Rollback(rollback::Rollback),
    /// Show remembered flows: who is left on the old colour.
    Flows(flows::Flows),
    /// Show who changed what, when and why.
    History(history::History),
    /// Apply the configuration file: whole, or not at all.
    Reload(reload::Reload),
    /// Remove everything from the kernel: forwarding stops, all flows are forgotten.
    Detach,
}

/// Runs a command and turns what went wrong into its exit code.
pub fn run(arguments: Arguments) -> ExitCode {
    let common = arguments.common;
    let result = match arguments
        .command
        .unwrap_or(Command::Status(status::Status::default()))
    {
        Command::Run => run::run(&common),
        Command::Check(check) => check.run(&common),
        Command::Status(status) => status.run(&common),
        Command::Flip(flip) => flip.run(&common),
        Command::Rollback(rollback) => rollback.run(&common),
        Command::Flows(flows) => flows.run(&common),
        Command::History(history) => history.run(&common),
        Command::Reload(reload) => reload.run(&common),
        Command::Detach => detach::run(&common),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bgswitch: {error:#}");
            ExitCode::from(code_of(&error))
        }
    }
}

fn code_of(error: &anyhow::Error) -> u8 {
    for cause in error.chain() {
        if let Some(refusal) = cause.downcast_ref::<Refusal>() {
            return refusal.code;
        }
        if cause.is::<ConfigError>() {
            return exit::USAGE;
        }
        if cause.is::<datapath::Error>() {
            return exit::DATAPATH;
        }
        if cause
            .downcast_ref::<io::Error>()
            .is_some_and(|e| e.kind() == io::ErrorKind::PermissionDenied)
        {
            return exit::NOT_PERMITTED;
        }
    }
    exit::FAILED
}

impl Common {
    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Refusal> {
        client::call(&self.socket(), self.timeout, Method::GET, path, &())
    }

    fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Refusal> {
        client::call(&self.socket(), self.timeout, Method::POST, path, body)
    }

    fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| {
            // A broken file is `run`'s and `check`'s business, not this one's.
            Config::load(&self.config)
                .map_or_else(|_| DEFAULT_SOCKET.into(), |config| config.gateway.socket)
        })
    }

    /// Prints an answer as asked.
    fn print<T: Serialize>(
        &self,
        answer: &T,
        text: impl FnOnce(&T) -> String,
    ) -> anyhow::Result<()> {
        let out = match self.output {
            Output::Text => text(answer),
            Output::Json => serde_json::to_string(answer)? + "\n",
        };
        match io::stdout().write_all(out.as_bytes()) {
            // Whoever read it has read enough.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
            other => Ok(other?),
        }
    }
}

/// A path part of a service's name: only what a name may hold.
fn service_path(service: &str) -> Result<String, Refusal> {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    if service.is_empty() || !service.chars().all(valid) {
        return Err(Refusal::new(
            exit::USAGE,
            format!("`{service}` is no service's name"),
        ));
    }
    Ok(format!("/v1/services/{service}"))
}

fn config_of(path: &Path) -> anyhow::Result<Config> {
    Ok(Config::load(path)?)
}
