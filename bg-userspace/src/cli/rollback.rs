use std::fmt::Write as _;

use anyhow::{Context as _, bail};
use bg_common::service::CutoverWord;
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
        let service = &self.service;
        let path = service_path(service)? + "/rollback";
        let pinned = Pinned::open(common, service);
        let mut request = RollbackRequest {
            mode: self.mode,
            if_generation: None,
            why: self.message,
        };
        loop {
            // Of a daemon that hangs nobody knows whether it has done, or will
            // do, what it was asked for: it is asked for one generation only.
            request.if_generation = pinned.as_ref().ok().map(|p| p.word().generation());
            match common.post::<Flipped>(&path, &request) {
                // Flipped since we looked: roll that back.
                Err(refusal)
                    if refusal.code == exit::CONFLICT && request.if_generation.is_some() => {}
                // A daemon that is dead, or hangs, keeps nobody from rolling back.
                Err(refusal) if [exit::NO_DAEMON, exit::TIMED_OUT].contains(&refusal.code) => {
                    let flipped = pinned
                        .and_then(|pinned| pinned.rollback(service, &request))
                        .with_context(|| format!("{refusal}; rolling back without it"))?;
                    return common.print(&flipped, |flipped| {
                        let mut text =
                            "the daemon does not answer: the word was stored without it\n"
                                .to_owned();
                        let _ = write!(text, "{}", flip::text(flipped));
                        text
                    });
                }
                answer => return common.print(&answer?, flip::text),
            }
        }
    }
}

/// A service's word, without the daemon.
struct Pinned {
    words: PinnedWords,
    id: u32,
    journal: Journal,
}

impl Pinned {
    fn open(common: &Common, service: &str) -> anyhow::Result<Self> {
        let config = config_of(&common.config)?;
        let Some(known) = config.services.get(service) else {
            bail!(
                "there is no service `{service}` in {}",
                common.config.display()
            );
        };
        let words = PinnedWords::open(&config.gateway.bpffs)?;
        let id = words.service_of(&known.plan.listeners)?.with_context(|| {
            format!("none of the listeners of `{service}` is in the packet path")
        })?;
        Ok(Self {
            words,
            id,
            journal: Journal::new(&config.gateway.state_dir),
        })
    }

    fn word(&self) -> CutoverWord {
        self.words.word(self.id)
    }

    /// One store through the pinned map, journalled (law 5).
    fn rollback(&self, service: &str, request: &RollbackRequest) -> anyhow::Result<Flipped> {
        let uid = Uid::current();
        let name = User::from_uid(uid)
            .ok()
            .flatten()
            .map_or_else(|| "?".to_owned(), |user| user.name);
        let actor = format!("{name}({uid})");
        loop {
            let switch = switch::rollback(service, self.word(), request)?;
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
                if let Err(error) = self.journal.append(entry) {
                    eprintln!("bgswitch: warning: the journal was not written: {error}");
                }
            };
            note(&entry("intent", switch.from.generation()));
            match self.words.store(self.id, switch.from, switch.to) {
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
}
