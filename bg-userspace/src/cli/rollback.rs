use std::time::{Duration, Instant};

use anyhow::Context as _;
use bg_common::service::{Colour, CutoverWord};
use clap::Args;
use nix::unistd::Uid;

use super::{Common, flip, service_path, warn};
use crate::{
    api::{Flipped, Kind, Refusal, RollbackRequest},
    config::{Config, DrainPlan, FlipMode, Paths},
    datapath::{PinnedWords, StoreError},
    journal::{Entry, Journal, OFFLINE, actor},
    keeper::{INTENT_WAIT, Keeper, Pending, RESULT_WAIT},
    state::State,
    switch::{self, Switch},
};

const FIRST_FLOW_WAIT: Duration = Duration::from_millis(250);

const EXAMPLES: &str = "\
Examples:
  bgswitch rollback llm -m 'wrong answers'    back at once, the bad colour's flows are reset
  bgswitch rollback llm --mode drain          back, the bad colour's flows may end

While a canary runs, its colour is the bad one: no new flow goes there any more, and
all flows of the standby are reset. Leaves the colour that is live (or the canary's)
when the command begins: when somebody else rolls back in that moment, it does not
flip again. A release ends with it; one that has not flipped, or never did, is no
reason to go to the colour that it tested: new flows stay where they are.

When the daemon does not run, or does not answer within --timeout, the word is
stored without it: that needs root, and goes to the other colour whatever a release
has tested there.";

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
        // Where the service is now is what shall be left, by whom of all that try.
        let pinned = Pinned::open(common, &self.service);
        let request = RollbackRequest {
            mode: self.mode,
            leave: pinned
                .as_ref()
                .ok()
                .map(|pinned| pinned.leave().as_str().to_owned()),
            why: self.message,
            if_generation: pinned.as_ref().ok().map(|pinned| pinned.from.generation()),
        };
        let refusal = match common.post::<Flipped>(&path, &request) {
            Ok(flipped) => return flip::print(common, &flipped),
            Err(refusal) => refusal,
        };
        let (why, pinned) = match (refusal.kind, pinned) {
            (Kind::StaleGeneration | Kind::Conflict, Ok(pinned)) => {
                return pinned.moved(common, &request, pinned.word(), refusal);
            }
            // A daemon that is dead, or hangs, keeps nobody from rolling back.
            (Kind::NoDaemon, pinned) => ("the daemon does not run", pinned),
            (Kind::TimedOut, pinned) => ("the daemon does not answer", pinned),
            _ => return Err(refusal.into()),
        };
        let pinned = pinned.with_context(|| format!("{why}, and without it"))?;
        pinned.roll_back(common, &request, why)
    }
}

/// A service's word in the pinned map, as it was found, and what is needed to
/// store another one (law 5).
struct Pinned {
    service: String,
    words: PinnedWords,
    id: u32,
    from: CutoverWord,
    drain: DrainPlan,
    state: State,
    journal: Journal,
}

impl Pinned {
    fn open(common: &Common, service: &str) -> anyhow::Result<Self> {
        let (paths, _) = Paths::salvage(&common.config);
        let words = PinnedWords::open(&paths.bpffs)?;
        let state = State::load(&paths.state_dir);
        let noted = state.known();
        // The file may be half edited: the daemon's notes come first.
        let config = Config::load(&common.config);
        if let Err(error) = &config {
            warn(&format!("{error}; going by what the daemon noted"));
        }
        let configured = config.as_ref().ok().and_then(|c| c.services.get(service));
        let listeners = configured.map_or(&[][..], |known| &known.plan.listeners);
        let Some(id) = words.service(noted.get(service), listeners) else {
            let names = noted.iter().filter(|(_, known)| known.id.is_some());
            let names = names.map(|(name, _)| name.as_str());
            return Err(Refusal::unknown_service(service, names).into());
        };
        Ok(Self {
            service: service.to_owned(),
            from: words.word(id),
            words,
            id,
            // That of a service whose configuration cannot be read is the usual one.
            drain: configured.map_or_else(DrainPlan::default, |known| known.drain),
            state,
            journal: Journal::new(&paths.state_dir),
        })
    }

    fn word(&self) -> CutoverWord {
        self.words.word(self.id)
    }

    /// The colour that is to be left, whatever becomes of the word meanwhile.
    const fn leave(&self) -> Colour {
        switch::bad_colour(self.from)
    }

    /// What a rollback makes of a word; `None` when the colour has been left.
    fn switch(&self, word: CutoverWord, request: &RollbackRequest) -> Option<Switch> {
        switch::rollback(word, self.leave(), request.mode, self.drain)
    }

    /// Says that there is nothing to do any more.
    fn has_left(&self, common: &Common, word: CutoverWord) -> anyhow::Result<()> {
        let flipped = Flipped {
            generation_before: self.from.generation(),
            ..switch::has_left(&self.service, word)
        };
        flip::print(common, &flipped)
    }

    /// One store, journalled; a disk that hangs does not keep it from happening.
    fn roll_back(
        mut self,
        common: &Common,
        request: &RollbackRequest,
        why: &str,
    ) -> anyhow::Result<()> {
        let Some(mut switch) = self.switch(self.from, request) else {
            return self.has_left(common, self.from);
        };
        let mut flipped = switch::describe(&self.service, &switch);
        let actor = actor(Uid::current());
        let entry = |phase, generation, detail| Entry {
            why: request.why.clone(),
            ..Entry::new(&actor, &self.service, "rollback", phase, generation, detail)
        };
        let detail = format!("{}{OFFLINE}", switch::detail(&switch));
        let keeper = Keeper::start(self.journal.clone())?;
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let wait = |pending: Pending, limit| runtime.block_on(pending.within(limit));
        let intent = entry("intent", switch.from.generation(), detail.clone());
        let drain = self.state.intend(&self.service, &switch);
        let intent = keeper.entry(intent);
        let noted = drain.map(|_| keeper.state(self.state.clone()));
        flipped.warnings.extend(wait(intent, INTENT_WAIT));
        flipped
            .warnings
            .extend(noted.and_then(|noted| wait(noted, RESULT_WAIT)));

        let stored = loop {
            match self.words.store(self.id, switch.from, switch.to) {
                // Not another flip, only the end of a drain, or another canary: the
                // same again.
                Err(StoreError::Conflict(word))
                    if word.generation() == switch.from.generation() =>
                {
                    match self.switch(word, request) {
                        Some(again) => switch = again,
                        None => return self.has_left(common, word),
                    }
                }
                stored => break stored,
            }
        };
        match stored {
            Ok(stored) => {
                flipped.at_ns = Some(stored.at_ns);
                flipped.store_ns = Some(stored.store_ns);
                flipped.draining_until = drain.and_then(|drain| drain.until());
                flipped.resets_until = drain.and_then(|drain| drain.resets_until());
                flipped.first_new_flow_us = first_flow(&self.words, self.id, &switch, stored.at_ns);
                self.state.saw(&self.service, switch.to);
                let saved = keeper.state(self.state.clone());
                let result = keeper.entry(entry("result", switch.to.generation(), detail));
                flipped.warnings.extend(wait(saved, RESULT_WAIT));
                flipped.warnings.extend(wait(result, RESULT_WAIT));
                warn(&format!("{why}: the word was stored without it"));
                if drain.is_some_and(|drain| drain.until().is_some()) {
                    warn("the deadline of the drain passes unheeded until the daemon runs");
                }
                flip::print(common, &flipped)
            }
            Err(error) => {
                let detail = format!("failed: {error}");
                let result = keeper.entry(entry("result", switch.from.generation(), detail));
                wait(result, RESULT_WAIT);
                let refusal = Refusal::new(Kind::Conflict, error.to_string());
                self.moved(common, request, self.word(), refusal)
            }
        }
    }

    /// The word has moved since it was read. If it leads where it was to lead,
    /// that is all that was wanted; it is never moved a second time.
    fn moved(
        &self,
        common: &Common,
        request: &RollbackRequest,
        word: CutoverWord,
        refusal: Refusal,
    ) -> anyhow::Result<()> {
        match self.switch(word, request) {
            Some(_) => Err(refusal.into()),
            None => self.has_left(common, word),
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
