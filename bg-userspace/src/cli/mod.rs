//! The command line: one file per command, and what they share.

mod canary;
mod check;
mod completions;
mod detach;
mod doctor;
mod explain;
mod flip;
mod flows;
mod history;
mod man;
mod monitor;
mod release;
mod reload;
mod rollback;
mod run;
mod standby;
mod status;
mod text;
mod top;

use std::{
    ffi::OsString,
    fmt::Write as _,
    io::{self, Write},
    ops::ControlFlow,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand, ValueEnum};
use hyper::Method;
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    api::{Kind, Refusal, SCHEMA, exit},
    client,
    config::{ConfigError, DEFAULT_PATH, MAX_DURATION, Paths, is_name},
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
  bgswitch canary llm 5                               5 % of new flows to the standby
  bgswitch release start llm --wait                   the same with gates, a bake, a held standby
  bgswitch monitor --service llm                      its packets, and what becomes of them
  bgswitch top                                        live, on the whole terminal
  bgswitch doctor                                     what keeps XDP from working here
  bgswitch status -o json | jq '.services[].active'   for scripts

With -o json, what went wrong is a JSON object too, the last line on stderr.

Exit codes: 0 done, 1 failed, 2 usage or configuration, 3 daemon not running,
4 not permitted, 5 conflict, 6 gate failed, 7 inconclusive, or (with --wait=ready)
waiting for an approval, 8 target unreachable or unhealthy, 9 timed out,
10 rolled back by itself, 11 packet path.";

#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Everywhere")]
struct Common {
    /// How to print the answer: for people or for scripts.
    #[arg(short, long, global = true, value_enum, default_value = "text")]
    output: Output,
    /// The daemon's socket [default: the configuration's, or /run/bgswitch/bgswitch.sock].
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The configuration file.
    #[arg(long, global = true, value_name = "FILE", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// How long to wait for the daemon's answer.
    #[arg(long, global = true, value_name = "DURATION", default_value = "10s", value_parser = duration)]
    timeout: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the daemon, in the foreground. When it stops, forwarding goes on as it is.
    Run(run::Run),
    /// Validate a configuration file; needs neither root nor a daemon.
    Check(check::Check),
    /// Show what is live, what is draining, and where packets went.
    Status(status::Status),
    /// Switch a service to its other colour.
    Flip(flip::Flip),
    /// Switch back at once and reset the bad colour's flows. Never refused; works without the daemon.
    Rollback(rollback::Rollback),
    /// Send a share of new flows to the standby, sticky by client address.
    Canary(canary::Canary),
    /// Bring a new version live: gates, approval, flip, bake, standby.
    Release(release::Release),
    /// Hold the old colour for longer, or end its hold.
    Standby(standby::Standby),
    /// Show remembered flows: who is left on the old colour.
    Flows(flows::Flows),
    /// Show who changed what, when and why.
    History(history::History),
    /// Watch services live: colours, releases, flows, backends, and what was not forwarded.
    Top(top::Top),
    /// Show packets and their verdicts as they come, and flips between them.
    Monitor(monitor::Monitor),
    /// Say what would become of a client's packets, and why; changes nothing.
    Explain(explain::Explain),
    /// Say what on this host would keep XDP from working, and what mends it.
    Doctor(doctor::Doctor),
    /// Apply the configuration file: whole, or not at all.
    Reload(reload::Reload),
    /// Remove everything from the kernel: forwarding stops, all flows are forgotten.
    Detach(detach::Detach),
    /// Print what a shell needs to complete these commands.
    Completions(completions::Completions),
    /// Print the manual page, for man(1).
    Man(man::Man),
}

/// A duration like `20m`, 30 days at most.
fn duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration <= MAX_DURATION => Ok(duration),
        Ok(_) => Err("30 days at most".to_owned()),
        Err(_) => Err("no duration, like \"30s\" or \"20m\"".to_owned()),
    }
}

/// Runs a command and turns what went wrong into its exit code.
pub fn run(arguments: Arguments) -> ExitCode {
    let common = arguments.common;
    let result = match arguments
        .command
        .unwrap_or(Command::Status(status::Status::default()))
    {
        Command::Run(_) => run::run(&common),
        Command::Check(check) => check.run(&common),
        Command::Status(status) => status.run(&common),
        Command::Flip(flip) => flip.run(&common),
        Command::Rollback(rollback) => rollback.run(&common),
        Command::Canary(canary) => canary.run(&common),
        Command::Release(release) => release.run(&common),
        Command::Standby(standby) => standby.run(&common),
        Command::Flows(flows) => flows.run(&common),
        Command::History(history) => history.run(&common),
        Command::Top(top) => top.run(&common),
        Command::Monitor(monitor) => monitor.run(&common),
        Command::Explain(explain) => explain.run(&common),
        Command::Doctor(doctor) => doctor.run(&common),
        Command::Reload(reload) => reload.run(&common),
        Command::Detach(detach) => detach.run(&common),
        Command::Completions(completions) => completions.run(),
        Command::Man(_) => man::run(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read the output has read enough.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let message = format!("{error:#}");
            let (kind, exit_code) = kind_of(&error);
            tell(common.output, kind, message, exit_code);
            ExitCode::from(exit_code)
        }
    }
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<io::Error>()
        .is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A line on stderr; where that is closed, nobody wants it.
fn say(line: &str) {
    let _ = writeln!(io::stderr(), "bgswitch: {line}");
}

fn warn(line: &str) {
    say(&format!("warning: {line}"));
}

/// Of what kind an error is, and its exit code.
fn kind_of(error: &anyhow::Error) -> (Kind, u8) {
    let known = error.chain().find_map(|cause| {
        if let Some(refusal) = cause.downcast_ref::<Refusal>() {
            return Some((refusal.kind, refusal.code));
        }
        let is_denied = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        let kind = match cause.downcast_ref::<datapath::Error>() {
            _ if cause.is::<ConfigError>() => Kind::Usage,
            Some(datapath::Error::NotPermitted { .. }) => Kind::NotPermitted,
            Some(_) => Kind::Datapath,
            None if cause.downcast_ref().is_some_and(is_denied) => Kind::NotPermitted,
            None => return None,
        };
        Some((kind, kind.exit_code()))
    });
    known.unwrap_or((Kind::Failed, exit::FAILED))
}

/// Says what went wrong, in the last line on stderr.
fn tell(output: Output, kind: Kind, message: String, exit_code: u8) {
    if output == Output::Text {
        return say(&message);
    }
    let told = Told {
        schema: SCHEMA,
        error: Trouble {
            kind,
            message,
            exit_code,
        },
    };
    let line = serde_json::to_string(&told).unwrap_or_default();
    // Where stderr is closed, nobody wants it.
    let _ = writeln!(io::stderr(), "{line}");
}

/// The command's arguments. What is wrong with them is told in the form that they ask
/// for, and ends the process.
pub fn arguments() -> Arguments {
    Arguments::try_parse().unwrap_or_else(|error| {
        if !error.use_stderr() || !wants_json(std::env::args_os()) {
            error.exit();
        }
        let message = error.to_string();
        let message = message.strip_prefix("error: ").unwrap_or(&message);
        let kind = Kind::Usage;
        tell(Output::Json, kind, message.trim().to_owned(), exit::USAGE);
        std::process::exit(exit::USAGE.into())
    })
}

/// Whether arguments that cannot be read ask for JSON all the same.
fn wants_json(arguments: impl Iterator<Item = OsString>) -> bool {
    let arguments = arguments.map(|argument| argument.to_string_lossy().into_owned());
    let arguments: Vec<String> = arguments.take_while(|argument| argument != "--").collect();
    let together = ["-ojson", "-o=json", "--output=json"];
    let apart =
        |pair: &[String]| matches!(pair[0].as_str(), "-o" | "--output") && pair[1] == "json";
    arguments.iter().any(|one| together.contains(&one.as_str())) || arguments.windows(2).any(apart)
}

/// An error, as JSON.
#[derive(Debug, Serialize)]
struct Told {
    schema: u32,
    error: Trouble,
}

#[derive(Debug, Serialize)]
struct Trouble {
    kind: Kind,
    message: String,
    exit_code: u8,
}

impl Common {
    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Refusal> {
        self.call(Method::GET, path, &())
    }

    fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Refusal> {
        self.call(Method::POST, path, body)
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, Refusal> {
        self.at_the_socket(|socket| client::call(socket, self.timeout, method, path, body))
    }

    /// Reads a stream of lines.
    fn stream(
        &self,
        path: &str,
        mut take: impl FnMut(&str) -> anyhow::Result<ControlFlow<()>>,
    ) -> anyhow::Result<client::End> {
        // What `take` fails with is no refusal, and needs no advice.
        let mut taken = Ok(());
        let end = self.at_the_socket(|socket| {
            client::stream(socket, self.timeout, path, |lines| {
                take(lines).unwrap_or_else(|error| {
                    taken = Err(error);
                    ControlFlow::Break(())
                })
            })
        })?;
        taken.map(|()| end)
    }

    /// Asks the daemon; where it does not run, the refusal says what to do.
    fn at_the_socket<T>(
        &self,
        ask: impl FnOnce(&std::path::Path) -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        // A broken file is `run`'s and `check`'s business, unless it kept the
        // daemon from being found.
        let (paths, trouble) = Paths::salvage(&self.config);
        let trouble = trouble.filter(|_| self.socket.is_none());
        let socket = self.socket.as_ref().unwrap_or(&paths.socket);
        ask(socket).map_err(|refusal| {
            if refusal.kind != Kind::NoDaemon {
                return refusal;
            }
            let advice = match datapath::is_there(&paths.bpffs) {
                Some(true) => {
                    "Forwarding goes on as it was; start the daemon with `bgswitch run`, or roll back \
                     without it with `bgswitch rollback SERVICE`"
                }
                Some(false) => "Nothing forwards here either; `bgswitch run` begins it",
                None => "Start it with `bgswitch run`, as root",
            };
            let mut error = format!("{refusal}. {advice}");
            if let Some(trouble) = trouble {
                let _ = write!(
                    error,
                    ". Or name the daemon's socket with --socket: {trouble}"
                );
            }
            Refusal { error, ..refusal }
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
        let mut stdout = io::stdout();
        stdout.write_all(out.as_bytes())?;
        Ok(stdout.flush()?)
    }
}

/// The path of a service, whose name must be one.
fn service_path(service: &str) -> Result<String, Refusal> {
    if !is_name(service) {
        return Err(Refusal::new(
            Kind::Usage,
            format!("`{}` is no service's name", service.escape_debug()),
        ));
    }
    Ok(format!("/v1/services/{service}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_for_json_is_found_however_it_is_written() {
        let asks = |line: &str| wants_json(line.split(' ').map(OsString::from));
        for line in [
            "bgswitch -o json flipp",
            "bgswitch flipp -ojson",
            "bgswitch flipp --output=json",
            "bgswitch --output json",
        ] {
            assert!(asks(line), "{line}");
        }
        for line in [
            "bgswitch flipp",
            "bgswitch -o text json",
            "bgswitch -o",
            "bgswitch -- -o json",
        ] {
            assert!(!asks(line), "{line}");
        }
    }
}
