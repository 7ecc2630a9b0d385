use std::{
    fmt::Write as _,
    io::{self, IsTerminal as _, Write as _},
    time::{Duration, Instant},
};

use clap::{Args, Subcommand, ValueEnum};
use ratatui::crossterm::terminal;

use super::{Common, Output, service_path, text::measured};
use crate::{
    api::{
        DecisionRequest, GateReport, Kind, NoteReport, Refusal, ReleaseReport, ReleaseRequest,
        ReleaseStatus, exit,
    },
    time,
};

/// A command that waits outlives a daemon that is gone, or silent, for so long.
const RESTARTED_WITHIN: Duration = Duration::from_secs(30);
/// How often a command that waits looks again.
const LOOK: Duration = Duration::from_millis(250);

const EXAMPLES: &str = "\
Examples:
  bgswitch release start llm --version llama@8 --wait   gates, flip, bake; back when it is known
  bgswitch release status llm                           where it is, why, since when, what is next
  bgswitch release approve llm -m 'looked at it'        flip now
  bgswitch rollback llm                                 back at any time; ends the release

Exit codes: 0 done (with --wait: baked well), 1 ended by hand, 3 the daemon is gone,
5 another release runs, or somebody flipped, 6 a gate failed, 7 it could not say, was
paused, or (with --wait=ready) waits for an approval, 8 the colour cannot be reached
or is not known to be healthy, 9 nobody decided in time, 10 rolled back by itself.";

/// `bgswitch release ...`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Release {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Begin a release: gates, approval, canary, flip, bake, standby.
    Start(Start),
    /// Show where it is, why, since when, what is next and when.
    Status(Look),
    /// Agree to the flip of a release that is READY.
    Approve(Waiting),
    /// Do not agree: the release ends, nothing was flipped.
    Reject(Decision),
    /// End a release before its flip; a canary is taken back. After it, there is `bgswitch
    /// rollback`.
    Abort(Decision),
    /// Stop the clock in VALIDATING, READY, CANARY or BAKING, for as long as approval.expires
    /// says; then it is aborted, or, behind the flip, rolled back unless all is well.
    Pause(Decision),
    /// Go on: what was interrupted begins anew.
    Resume(Resume),
}

#[derive(Debug, Args)]
struct Start {
    /// The service.
    service: String,
    /// The colour to flip to [default: the standby].
    #[arg(long, value_parser = ["blue", "green"])]
    to: Option<String>,
    /// What runs there; must be the colour's version, where one is configured.
    #[arg(long)]
    version: Option<String>,
    /// Only at this generation: nothing is begun if somebody flipped meanwhile.
    #[arg(long, value_name = "N")]
    if_generation: Option<u16>,
    /// Pass over the gates, and flip also to a colour that cannot be reached; the journal keeps
    /// it. An approval that is required still is.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    wait: Wait,
    #[command(flatten)]
    message: Message,
}

#[derive(Debug, Args)]
struct Look {
    /// The service.
    service: String,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Args)]
struct Decision {
    /// The service.
    service: String,
    #[command(flatten)]
    message: Message,
}

#[derive(Debug, Args)]
struct Waiting {
    #[command(flatten)]
    decision: Decision,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Args)]
struct Resume {
    #[command(flatten)]
    decision: Decision,
    /// What is not known counts as good: the gate that could not say, or the rest of the canary's
    /// step, or of the bake; the journal keeps it.
    #[arg(long)]
    force: bool,
    #[command(flatten)]
    wait: Wait,
}

#[derive(Debug, Args)]
struct Wait {
    /// Wait until it is baked, is over, or is paused; tell what happens meanwhile.
    /// `--wait=ready` waits for no approval: it ends with 7 where one is needed.
    #[arg(
        long,
        value_name = "UNTIL",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "end",
        hide_possible_values = true
    )]
    wait: Option<Until>,
}

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Until {
    /// That it is known how it went; an approval on the way is waited for.
    End,
    /// That, or that it needs an approval.
    Ready,
}

#[derive(Debug, Args)]
struct Message {
    /// Why, for the journal.
    #[arg(short, long = "message", value_name = "WHY")]
    message: Option<String>,
}

impl Release {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        match self.verb {
            Verb::Start(start) => start.run(common),
            Verb::Status(Look { service, wait }) => {
                let path = service_path(&service)? + "/release";
                let status: ReleaseStatus = common.get(&path)?;
                // Its story is in the status.
                let last = status.release.as_ref().and_then(|r| r.notes.last());
                let told = last.map_or(0, |note| note.number);
                finish(common, status, &wait, told)
            }
            Verb::Approve(Waiting { decision, wait }) => {
                let status = decision.ask(common, "approve")?;
                decided(common, status, &wait)
            }
            Verb::Reject(decision) => print(common, &decision.ask(common, "reject")?),
            Verb::Abort(decision) => print(common, &decision.ask(common, "abort")?),
            Verb::Pause(decision) => print(common, &decision.ask(common, "pause")?),
            Verb::Resume(resume) => resume.run(common),
        }
    }
}

impl Start {
    fn run(self, common: &Common) -> anyhow::Result<()> {
        let path = service_path(&self.service)? + "/release/start";
        let request = ReleaseRequest {
            to: self.to,
            version: self.version,
            if_generation: self.if_generation,
            force: self.force,
            why: self.message.message,
        };
        let status: ReleaseStatus = common.post(&path, &request)?;
        begun(common, status, &self.wait, 0)
    }
}

impl Resume {
    fn run(self, common: &Common) -> anyhow::Result<()> {
        let path = service_path(&self.decision.service)? + "/release/resume";
        let request = DecisionRequest {
            force: self.force,
            why: self.decision.message.message,
        };
        let status = common.post(&path, &request)?;
        decided(common, status, &self.wait)
    }
}

impl Decision {
    fn ask(self, common: &Common, verb: &str) -> anyhow::Result<ReleaseStatus> {
        let path = format!("{}/release/{verb}", service_path(&self.service)?);
        let request = DecisionRequest {
            force: false,
            why: self.message.message,
        };
        Ok(common.post(&path, &request)?)
    }
}

/// Goes on with a release that somebody has let go on.
fn decided(common: &Common, status: ReleaseStatus, wait: &Wait) -> anyhow::Result<()> {
    let release = status.release.as_ref();
    // What was decided is told, what was before is not.
    let told = release.map_or(0, |release| {
        let mut notes = release.notes.iter().rev();
        let decided = notes.find(|note| note.actor.is_some());
        decided.map_or(0, |note| note.number - 1)
    });
    begun(common, status, wait, told)
}

/// The same as [`finish`]; and without waiting, what is over at once is told as if it had
/// been waited for.
fn begun(common: &Common, status: ReleaseStatus, wait: &Wait, told: u64) -> anyhow::Result<()> {
    let is_over = status.release.as_ref().is_some_and(|release| release.over);
    if wait.wait.is_some() || !is_over {
        return finish(common, status, wait, told);
    }
    print(common, &status)?;
    verdict(&status).map_err(Into::into)
}

/// Prints where a release is; when it is to be waited for, once that is known, and
/// what happens until then.
fn finish(common: &Common, status: ReleaseStatus, wait: &Wait, told: u64) -> anyhow::Result<()> {
    let Some(until) = wait.wait else {
        return print(common, &status);
    };
    let status = follow(common, status, until, told)?;
    print(common, &status)?;
    verdict(&status).map_err(Into::into)
}

pub(super) fn print(common: &Common, status: &ReleaseStatus) -> anyhow::Result<()> {
    common.print(status, text)
}

/// Follows a release until it is known how it went, or nobody but a human can say.
fn follow(
    common: &Common,
    mut status: ReleaseStatus,
    until: Until,
    mut told: u64,
) -> anyhow::Result<ReleaseStatus> {
    let path = service_path(&status.service)? + "/release";
    let live = io::stdout().is_terminal() && common.output == Output::Text;
    let id = |status: &ReleaseStatus| status.release.as_ref().map(|release| release.id.clone());
    let followed = id(&status);
    let mut heard = Instant::now();
    let mut is_asked = false;
    loop {
        if let Some(release) = &status.release {
            if common.output == Output::Text {
                told = tell(release, told, live)?;
            }
            if is_known(&status.state, release, until) {
                return Ok(status);
            }
            // Once for each time that somebody is waited for.
            let asks = status.state == "READY";
            if asks && !is_asked {
                let approval = approval(&status.service);
                match common.output {
                    Output::Text => writeln!(io::stdout(), "{:23}{approval}", "")?,
                    Output::Json => writeln!(io::stderr(), "bgswitch: {approval}")?,
                }
            }
            is_asked = asks;
            if live {
                let mut stdout = io::stdout();
                // A line that the terminal broke in two could not be taken back.
                let columns = terminal::size().map_or(0, |(columns, _)| columns);
                // A terminal that was never told its size says that it has none.
                let columns = if columns == 0 { 80 } else { columns };
                let line = line(&status, release);
                let fits = line.chars().take(usize::from(columns) - 1);
                write!(stdout, "\r\x1b[K{}", fits.collect::<String>())?;
                stdout.flush()?;
            }
        } else {
            return Ok(status);
        }
        std::thread::sleep(LOOK);
        match common.get::<ReleaseStatus>(&path) {
            Ok(now) => (status, heard) = (now, Instant::now()),
            // It may be restarted, or hang, and the release goes on.
            Err(refusal) if is_of_the_way(refusal.kind) => {
                if heard.elapsed() > common.timeout.max(RESTARTED_WITHIN) {
                    let message = format!(
                        "{refusal}. The release goes on with the daemon: bgswitch release status {} --wait",
                        status.service
                    );
                    return Err(Refusal::new(Kind::NoDaemon, message).into());
                }
            }
            Err(refusal) => return Err(refusal.into()),
        }
        if id(&status) != followed {
            let message = format!("another release of {} was begun meanwhile", status.service);
            return Err(Refusal::new(Kind::Conflict, message).into());
        }
    }
}

/// What says nothing of the release: nobody listens, nobody answers, or the connection broke.
const fn is_of_the_way(kind: Kind) -> bool {
    matches!(kind, Kind::NoDaemon | Kind::TimedOut | Kind::Failed)
}

fn is_known(state: &str, release: &ReleaseReport, until: Until) -> bool {
    match state {
        "PAUSED" | "STANDBY" => true,
        "READY" => until == Until::Ready,
        _ => release.over,
    }
}

/// Tells the notes after the one with the number `told`; returns the last one's.
fn tell(release: &ReleaseReport, told: u64, live: bool) -> io::Result<u64> {
    let mut stdout = io::stdout();
    let mut last = told;
    for note in release.notes.iter().filter(|note| note.number > told) {
        let clear = if live { "\r\x1b[K" } else { "" };
        writeln!(stdout, "{clear}{}", note_text(note))?;
        last = note.number;
    }
    if live {
        write!(stdout, "\r\x1b[K")?;
    }
    stdout.flush()?;
    Ok(last)
}

fn note_text(note: &NoteReport) -> String {
    let mut text = format!(
        "{}  {:<11}  {}",
        time::local(&note.time),
        note.state,
        note.text
    );
    if let Some(actor) = &note.actor {
        let _ = write!(text, "  by {actor}");
    }
    if let Some(why) = &note.why {
        let _ = write!(text, "  ({why})");
    }
    text
}

/// The error of a release that did not come as far as it should.
fn verdict(status: &ReleaseStatus) -> Result<(), Refusal> {
    let Some(release) = &status.release else {
        let message = format!("{} has no release", status.service);
        return Err(Refusal::new(Kind::Failed, message));
    };
    let kind = match release.code {
        0 => return Ok(()),
        exit::CONFLICT => Kind::Conflict,
        exit::GATE => Kind::GateFailed,
        exit::INCONCLUSIVE => Kind::Inconclusive,
        exit::UNHEALTHY => Kind::Unhealthy,
        exit::TIMED_OUT => Kind::TimedOut,
        exit::ROLLED_BACK => Kind::RolledBack,
        _ => Kind::Failed,
    };
    let service = &status.service;
    let advice = match status.state.as_str() {
        "READY" => format!(". {} --wait", approval(service)),
        "PAUSED" => format!(
            ". Go on: bgswitch release resume {service}   end it: bgswitch {} {service}",
            if status.active == release.to {
                "rollback"
            } else {
                "release abort"
            }
        ),
        _ => String::new(),
    };
    let message = format!(
        "{} of {service} is {}: {}{advice}",
        release.id, status.state, release.why
    );
    Err(Refusal::new(kind, message))
}

/// What a human is asked for.
fn approval(service: &str) -> String {
    format!("Approve it: bgswitch release approve {service}")
}

/// One line that is always true, for a terminal.
fn line(status: &ReleaseStatus, release: &ReleaseReport) -> String {
    let mut out = format!("{}  {}  {}", status.service, status.state, release.why);
    if let Some(progress) = &release.progress {
        let _ = write!(out, ": {progress}");
    }
    if let Some(until) = &release.until {
        let _ = write!(out, "; {}{}", release.next, left(until));
    }
    out
}

fn left(until: &str) -> String {
    match time::seconds_until(until) {
        Some(seconds) => format!(
            " in {}",
            humantime::format_duration(Duration::from_secs(seconds))
        ),
        None => String::new(),
    }
}

/// Where it is, why, since when, what is next and when.
fn text(status: &ReleaseStatus) -> String {
    let ReleaseStatus {
        service,
        active,
        state,
        ..
    } = status;
    let Some(release) = &status.release else {
        return format!("{service}  {state}  {active} is active; there was no release yet\n");
    };
    let version = release.version.as_deref().unwrap_or("no version named");
    let mut out = format!(
        "{service}  {state}  since {}   {}: {} -> {} ({version}), asked for by {}\n",
        time::local(&release.since),
        release.id,
        release.from,
        release.to,
        release.requester,
    );
    let _ = writeln!(out, "  why     {}", release.why);
    if let Some(progress) = &release.progress {
        let _ = writeln!(out, "  so far  {progress}");
    }
    if let Some(until) = &release.until {
        let _ = writeln!(
            out,
            "  next    {} at {}{}",
            release.next,
            time::local(until),
            left(until)
        );
    }
    if release.forced {
        let _ = writeln!(out, "  forced  gates passed over by {}", release.requester);
    }
    if let Some(by) = &release.approved_by {
        let _ = writeln!(out, "  agreed  {by}");
    }
    for gate in &release.gates {
        let _ = writeln!(out, "  gate    {}", gate_text(gate));
    }
    if *active == release.to && !release.over {
        let _ = writeln!(out, "  undo    bgswitch rollback {service}");
    }
    out
}

fn gate_text(gate: &GateReport) -> String {
    let result = gate.result.as_deref().unwrap_or("no result yet");
    let mut out = format!("{} ({}): {result}", gate.name, gate.kind);
    if let Some(ms) = gate.took_ms {
        let _ = write!(out, " in {}", measured(ms.saturating_mul(1_000_000)));
    }
    if let Some(by) = &gate.forced_by {
        let _ = write!(out, ", passed over by {by}");
    }
    if let Some(evidence) = gate.evidence.as_ref().filter(|text| !text.is_empty()) {
        let _ = write!(out, "  {evidence}");
    }
    out
}
