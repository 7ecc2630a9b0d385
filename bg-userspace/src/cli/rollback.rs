use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use clap::Args;
use nix::unistd::{Uid, User};

use super::{Common, config_of, flip, service_path};
use crate::{
    api::{Flipped, RollbackRequest, exit},
    config::FlipMode,
    datapath::{PinnedWords, StoreError},
    journal::{Entry, Journal},
    switch,
};

/// `bgswitch rollback SERVICE`.
#[derive(Debug, Args)]
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
        };
        match common.post::<Flipped>(&path, &request) {
            // A daemon that is dead, or hangs, keeps nobody from rolling back.
            Err(refusal) if [exit::NO_DAEMON, exit::TIMED_OUT].contains(&refusal.code) => {
                let flipped = without_daemon(common, &self.service, &request)
                    .with_context(|| format!("{refusal}; rolling back without it"))?;
                common.print(&flipped, |flipped| {
                    let mut text =
                        "the daemon does not run: the word was stored without it\n".to_owned();
                    let _ = write!(text, "{}", flip::text(flipped));
                    text
                })
            }
            answer => common.print(&answer?, flip::text),
        }
    }
}

/// One store through the pinned map, journalled (law 5).
fn without_daemon(
    common: &Common,
    service: &str,
    request: &RollbackRequest,
) -> anyhow::Result<Flipped> {
    let config = config_of(&common.config)?;
    let Some(known) = config.services.get(service) else {
        bail!(
            "there is no service `{service}` in {}",
            common.config.display()
        );
    };
    let words = PinnedWords::open(&config.gateway.bpffs)?;
    let id = words
        .service_of(&known.plan.listeners)?
        .with_context(|| format!("none of the listeners of `{service}` is in the packet path"))?;
    let journal = Journal::new(&config.gateway.state_dir);
    let uid = Uid::current();
    let name = User::from_uid(uid)
        .ok()
        .flatten()
        .map_or_else(|| "?".to_owned(), |user| user.name);
    let actor = format!("{name}({uid})");
    loop {
        let switch = switch::rollback(words.word(id), request);
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
        let note = |entry: &Entry| {
            if let Err(error) = journal.append(entry) {
                eprintln!("bgswitch: warning: the journal was not written: {error}");
            }
        };
        note(&entry("intent", switch.from.generation()));
        match words.store(id, switch.from, switch.to) {
            Ok(stored) => {
                flipped.at_ns = Some(stored.at_ns);
                flipped.store_ns = Some(stored.store_ns);
                note(&entry("result", switch.to.generation()));
                return Ok(flipped);
            }
            Err(StoreError::Conflict(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
