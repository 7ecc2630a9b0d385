use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Args;
use nix::unistd::Uid;

use super::{Common, flip, service_path, warn};
use crate::{
    api::{Flipped, Kind, Refusal, RollbackRequest},
    config::{Config, FlipMode, Paths},
    datapath::{PinnedWords, StoreError},
    journal::{Entry, Journal, actor},
    state::State,
    switch::{self, Switch},
};

/// The drain of a service whose configuration cannot be read.
const DRAIN: Duration = Duration::from_mins(20);
const FIRST_FLOW_WAIT: Duration = Duration::from_millis(250);

const EXAMPLES: &str = "\
Examples:
  bgswitch rollback llm -m 'wrong answers'    back at once, the bad colour's flows are reset
  bgswitch rollback llm --mode drain          back, the bad colour's flows may end

When the daemon does not run, or does not answer within --timeout, the word is
stored without it: that needs root.";

/// `bgswitch rollback SERVICE`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Rollback {
    /// The service.
    service: String,
    /// What happens to flows of the bad colour [default: cut].
    #[arg(long, value_enum)]
    mode: Option<FlipMode>,
    /// Why, for the journal.
    #[arg(short, long = "message", value_name = "WHY")]
    message: Option<String>,
}

impl Rollback {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let path = service_path(&self.service)? + "/rollback";
        let request = RollbackRequest {
            mode: self.mode,
            why: self.message,
            if_generation: None,
        };
        match common.post::<Flipped>(&path, &request) {
            // A daemon that is dead, or hangs, keeps nobody from rolling back.
            Err(refusal) if [Kind::NoDaemon, Kind::TimedOut].contains(&refusal.kind) => {
                let why = match refusal.kind {
                    Kind::NoDaemon => "the daemon does not run",
                    _ => "the daemon does not answer",
                };
                let flipped = without_daemon(common, &self.service, &request)
                    .with_context(|| format!("{why}, and without it"))?;
                warn(&format!("{why}: the word was stored without it"));
                if flipped.draining_until.is_some() {
                    warn("the deadline of the drain passes unheeded until the daemon runs");
                }
                flip::print(common, &flipped)
            }
            answer => flip::print(common, &answer?),
        }
    }
}

/// One store through the pinned map, journalled (law 5).
fn without_daemon(
    common: &Common,
    service: &str,
    request: &RollbackRequest,
) -> anyhow::Result<Flipped> {
    let paths = Paths::load(&common.config)?;
    let words = PinnedWords::open(&paths.bpffs)?;
    let mut state = State::load(&paths.state_dir);
    // The file may be half edited: then the daemon's notes tell the service's id.
    let (id, drain) = match Config::load(&common.config) {
        Ok(config) => {
            let known = config.services.get(service).ok_or_else(|| {
                Refusal::unknown_service(service, config.services.keys().map(String::as_str))
            })?;
            (words.service_of(&known.plan.listeners)?, known.drain)
        }
        Err(error) => {
            warn(&format!("{error}; going by what the daemon noted"));
            (state.ids.get(service).copied(), DRAIN)
        }
    };
    let id = id.with_context(|| format!("`{service}` is not in the packet path"))?;
    let journal = Journal::new(&paths.state_dir);
    let actor = actor(Uid::current());
    loop {
        let switch = switch::rollback(words.word(id), request, drain);
        let mut flipped = switch::describe(service, &switch);
        let detail = format!(
            "{} -> {}, {}, without the daemon",
            flipped.from, flipped.to, flipped.mode
        );
        let entry = |phase, generation| Entry {
            why: request.why.clone(),
            ..Entry::new(
                &actor,
                service,
                "rollback",
                phase,
                generation,
                detail.clone(),
            )
        };
        // A journal that cannot be written never keeps a rollback from happening.
        let warning = |result: std::io::Result<()>| result.err().map(|error| error.to_string());
        let intent = journal.append(&entry("intent", switch.from.generation()));
        flipped.warnings.extend(warning(intent));
        match words.store(id, switch.from, switch.to) {
            Ok(stored) => {
                flipped.at_ns = Some(stored.at_ns);
                flipped.store_ns = Some(stored.store_ns);
                let drain = state.switched(service, &switch);
                flipped.draining_until = drain.map(|drain| drain.rfc3339());
                flipped.warnings.extend(warning(state.save()));
                let result = journal.append(&entry("result", switch.to.generation()));
                flipped.warnings.extend(warning(result));
                flipped.first_new_flow_us = first_flow(&words, id, &switch, stored.at_ns);
                return Ok(flipped);
            }
            Err(StoreError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Microseconds to the first new flow, if one comes in a moment.
fn first_flow(words: &PinnedWords, id: u32, switch: &Switch, at_ns: u64) -> Option<f64> {
    let deadline = Instant::now() + FIRST_FLOW_WAIT;
    while Instant::now() < deadline {
        let stamp = words.first_flow(id);
        if stamp.generation() == switch.to.generation() {
            return Some(stamp.ns_since(at_ns) as f64 / 1000.0);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    None
}
