//! What is known of a release: it is kept in a file, and all of it is in there.

use std::time::Duration;

use bg_common::service::{Colour, CutoverWord};
use serde::{Deserialize, Serialize};

use super::hooks::Pending;
use crate::{
    api::{Refusal, exit},
    config::{GatePlan, ReleasePlan, Share, When},
    signals::Baseline,
};

/// Notes of a release that are kept: the last ones.
const NOTES: usize = 200;

/// A moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Milliseconds since the boot (`CLOCK_BOOTTIME`): what is decided by.
    pub ms: u64,
    /// Milliseconds since 1970, as the clock on the wall was set: what people read.
    pub unix_ms: i64,
}

/// What a release looks at of a cut-over word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Word {
    /// The active colour.
    pub active: Colour,
    /// How often the service has flipped, modulo 65 536.
    pub generation: u16,
    /// So many of 65 536 new flows go to the other colour.
    pub canary: u16,
}

impl From<CutoverWord> for Word {
    fn from(word: CutoverWord) -> Self {
        Self {
            active: word.active(),
            generation: word.generation(),
            canary: word.canary(),
        }
    }
}

/// How the active colour is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Health {
    /// Nobody can say.
    #[default]
    Unknown,
    /// It answers as it should.
    Well,
    /// It does not, and why.
    Ill(String),
}

/// What happens to a release.
#[derive(Clone, Debug)]
pub enum Event {
    /// Somebody asks for one.
    Start(Box<Start>),
    /// A run of a gate is over.
    GateEnded {
        /// Which run.
        run: u32,
        /// What came of it.
        outcome: Outcome,
    },
    /// Somebody agrees to the flip.
    Approve(By),
    /// Somebody does not.
    Reject(By),
    /// Somebody ends it before the flip.
    Abort(By),
    /// Somebody stops its clock.
    Pause(By),
    /// Somebody lets it go on.
    Resume {
        /// Who.
        by: By,
        /// What is not known counts as good.
        force: bool,
    },
    /// The old colour must stay up for longer.
    Extend {
        /// Who says so.
        by: By,
        /// How much longer.
        more: Duration,
    },
    /// The old colour need not stay up any more.
    Retire {
        /// Who says so.
        by: By,
        /// Also while the new colour is ill, or nothing is known of it.
        force: bool,
    },
    /// How the active colour is.
    Health(Health),
    /// The configuration has no health checks of it any more.
    Unwatched,
    /// How the old colour is, to which a rollback would go.
    OldHealth(Health),
    /// The active colour fails requests: cold caches are no excuse for that.
    Failing(String),
    /// What the kernel's word is; `None`: the service is gone.
    Word {
        /// The word.
        word: Option<Word>,
        /// Who changed it, if that is known.
        by: Option<String>,
    },
    /// The flip, or the share, cannot be stored yet: nothing is known of the new colour.
    NotYet,
    /// It is time to try that again.
    Again,
    /// The flip, or the share, was not stored.
    NotStored {
        /// Why not, and the exit code that says so.
        refusal: Refusal,
    },
    /// The daemon has started, and this is what the kernel's word is.
    Restarted {
        /// The word.
        word: Option<Word>,
        /// Times since the boot still count.
        same_boot: bool,
    },
    /// A deadline may have passed.
    Tick,
}

/// Who wants something, and why.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct By {
    /// The peer's user, as the journal calls it.
    pub actor: String,
    /// The operator's words.
    pub why: Option<String>,
}

/// What is asked for with a release.
#[derive(Clone, Debug)]
pub struct Start {
    /// Who, and why.
    pub by: By,
    /// The colour to flip to.
    pub to: Colour,
    /// What runs there.
    pub version: Option<String>,
    /// Its backends, listeners and configured version: what the gates test is what serves.
    pub tested: Vec<String>,
    /// What it goes through.
    pub plan: ReleasePlan,
    /// There are health checks.
    pub watched: bool,
    /// Gates are passed over.
    pub force: bool,
    /// The kernel's word at this moment.
    pub word: Word,
}

/// What is to be done for a release.
#[derive(Clone, Debug, PartialEq)]
pub enum Command {
    /// Run a gate, or a hook, and tell [`Event::GateEnded`].
    RunGate {
        /// Which run it is.
        run: u32,
        /// What to run.
        gate: GatePlan,
        /// The colour that it is about.
        colour: Colour,
        /// It is a hook, and this is its time.
        when: Option<When>,
    },
    /// Send a share of new flows to the standby, and tell [`Event::Word`], then
    /// [`Event::NotStored`] if that did not work.
    Canary {
        /// To this colour.
        to: Colour,
        /// So many of them.
        percent: Share,
        /// Only at this generation.
        from_generation: u16,
        /// Also when the colour cannot be reached.
        force: bool,
    },
    /// Flip the service, and tell [`Event::Word`], then [`Event::NotStored`] if that
    /// did not work.
    Flip {
        /// To this colour.
        to: Colour,
        /// Only from this generation.
        from_generation: u16,
        /// Also when the colour cannot be reached.
        force: bool,
    },
    /// Roll the service back, a canary as well, and tell [`Event::Word`].
    RollBack {
        /// From this colour.
        leave: Colour,
        /// Only from this generation.
        from_generation: u16,
        /// Its flows live on, as behind a flip; otherwise they are reset.
        drains: bool,
        /// Why.
        why: String,
    },
    /// What was asked for is refused.
    Refuse(Refusal),
}

/// What a gate said.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// All is well.
    Pass,
    /// It is not.
    Fail,
    /// It could not be said.
    Inconclusive,
}

impl Verdict {
    /// `"pass"`, `"fail"` or `"inconclusive"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Inconclusive => "inconclusive",
        }
    }
}

/// What came of a run of a gate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Outcome {
    /// In a word.
    pub verdict: Verdict,
    /// What was seen.
    pub evidence: String,
    /// How long it took, milliseconds.
    pub took_ms: u64,
}

/// A gate of a release, and how far it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gate {
    /// What is run.
    pub plan: GatePlan,
    /// What came of its last run.
    pub outcome: Option<Outcome>,
    /// Who let the release go on without it.
    pub forced_by: Option<String>,
}

impl Gate {
    /// True when it keeps no release from its flip.
    pub fn is_passed(&self) -> bool {
        let passed = |outcome: &Outcome| outcome.verdict == Verdict::Pass;
        self.forced_by.is_some() || self.outcome.as_ref().is_some_and(passed)
    }
}

/// What people call where a release is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum State {
    /// There is none, or it is done.
    Steady,
    /// Gates run.
    Validating,
    /// It waits for an approval.
    Ready,
    /// A share of new flows goes to the new colour, which is watched.
    Canary,
    /// A flip, or a rollback by itself, is on its way.
    Switching,
    /// The new colour is watched.
    Baking,
    /// The old colour must stay up.
    Standby,
    /// A human must decide.
    Paused,
    /// A gate failed; nothing was flipped.
    Failed,
    /// It was ended; nothing was flipped.
    Aborted,
    /// The old colour serves again.
    RolledBack,
    /// Another flip, or another release, came in its way.
    Superseded,
}

impl State {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Steady,
        Self::Validating,
        Self::Ready,
        Self::Canary,
        Self::Switching,
        Self::Baking,
        Self::Standby,
        Self::Paused,
        Self::Failed,
        Self::Aborted,
        Self::RolledBack,
        Self::Superseded,
    ];

    /// As the contract writes it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Steady => "STEADY",
            Self::Validating => "VALIDATING",
            Self::Ready => "READY",
            Self::Canary => "CANARY",
            Self::Switching => "SWITCHING",
            Self::Baking => "BAKING",
            Self::Standby => "STANDBY",
            Self::Paused => "PAUSED",
            Self::Failed => "FAILED",
            Self::Aborted => "ABORTED",
            Self::RolledBack => "ROLLED_BACK",
            Self::Superseded => "SUPERSEDED",
        }
    }

    /// True when nothing follows.
    pub const fn is_over(self) -> bool {
        matches!(
            self,
            Self::Steady | Self::Failed | Self::Aborted | Self::RolledBack | Self::Superseded
        )
    }
}

/// What a pause interrupts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Held {
    /// The gate with this index.
    Gate(usize),
    /// The wait for an approval.
    Approval,
    /// The step of the canary with this index.
    Canary(usize),
    /// The bake.
    Bake,
}

/// Where a release is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Phase {
    /// A gate runs.
    Validating { gate: usize, run: u32 },
    /// An approval is waited for.
    Ready,
    /// A hook runs that the next step waits for; the step of the canary whose share is held.
    Hook {
        hook: usize,
        run: u32,
        share: Option<usize>,
    },
    /// The share of this step of the canary is on its way.
    Raising { step: usize },
    /// That share is stored; what goes wrong counts from `settled_ms` on, since the boot.
    Canary { step: usize, settled_ms: u64 },
    /// The canary is on its way back to 0; what the release is then.
    TakingBack { state: State, code: u8 },
    /// The flip is on its way.
    Switching,
    /// What goes wrong counts from `settled_ms` on, since the boot.
    Baking { settled_ms: u64 },
    /// A rollback by itself is on its way.
    SwitchingBack,
    /// The old colour is held.
    Standby,
    /// A human must decide.
    Paused(Held),
    /// Nothing follows. The exit code of whoever waited for it.
    Over { state: State, code: u8 },
}

/// A line of a release's story.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Counts from 1.
    pub number: u64,
    /// Milliseconds since 1970.
    pub unix_ms: i64,
    /// Who did it; `None`: the daemon.
    pub actor: Option<String>,
    /// The state from then on.
    pub state: State,
    /// What happened.
    pub text: String,
    /// The operator's words.
    pub why: Option<String>,
}

/// A release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Counts the releases of the service, from 1.
    pub number: u64,
    /// Who asked for it.
    pub requester: String,
    /// The colour that is left.
    #[serde(with = "named")]
    pub from: Colour,
    /// The colour that is flipped to.
    #[serde(with = "named")]
    pub to: Colour,
    /// What runs there.
    pub version: Option<String>,
    /// Its backends, listeners and configured version when the gates began.
    pub tested: Vec<String>,
    /// The generation before the flip.
    pub generation: u16,
    /// Gates were passed over, as was asked for.
    pub forced: bool,
    /// What it goes through.
    pub plan: ReleasePlan,
    /// The gates, in order.
    pub gates: Vec<Gate>,
    /// Who agreed to the flip.
    pub approved_by: Option<String>,
    /// What happened, oldest first.
    pub notes: Vec<Note>,
    /// Why it is where it is.
    pub why: String,
    /// Since when it is there, milliseconds since 1970.
    pub since_unix_ms: i64,
    /// Hooks behind steps that have no result yet.
    #[serde(default)]
    pub(super) pending: Vec<Pending>,
    pub(super) phase: Phase,
    /// When the wait ends, milliseconds since the boot; nothing is waited for without
    /// an end.
    pub(super) until_ms: u64,
    /// How long the wait was when it began, milliseconds.
    pub(super) wait_ms: u64,
    /// Runs of gates and hooks so far, those of earlier releases included.
    pub(super) runs: u32,
    /// Until then there is no rollback by itself, milliseconds since the boot.
    pub(super) cool_until_ms: u64,
    /// There are health checks.
    pub(super) watched: bool,
    /// How the old colour was before the flip, if it was listened to.
    #[serde(default)]
    pub baseline: Option<Baseline>,
    /// How the active colour was when last heard of.
    #[serde(skip)]
    pub(super) health: Health,
    /// How the old colour was.
    #[serde(skip)]
    pub(super) old: Health,
    /// So many of 65 536 new flows went to the other colour than the active one.
    #[serde(skip)]
    pub(super) canary: u16,
}

impl Release {
    /// `"r-42"`.
    pub fn id(&self) -> String {
        format!("r-{}", self.number)
    }

    /// Where it is, as people say it.
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Hook { hook, .. } => match self.plan.hooks.get(hook).map(|hook| hook.when) {
                Some(When::BeforeCanary) => State::Canary,
                Some(When::BeforeFlip) => State::Switching,
                _ => State::Validating,
            },
            Phase::Validating { .. } => State::Validating,
            Phase::Ready => State::Ready,
            Phase::Raising { .. } | Phase::Canary { .. } => State::Canary,
            Phase::Switching | Phase::SwitchingBack | Phase::TakingBack { .. } => State::Switching,
            Phase::Baking { .. } => State::Baking,
            Phase::Standby => State::Standby,
            Phase::Paused(_) => State::Paused,
            Phase::Over { state, .. } => state,
        }
    }

    /// The exit code of whoever waited for it until now.
    pub const fn code(&self) -> u8 {
        match self.phase {
            Phase::Ready | Phase::Paused(_) => exit::INCONCLUSIVE,
            Phase::Over { code, .. } => code,
            _ => 0,
        }
    }

    /// When the wait ends that it is in, milliseconds since the boot.
    pub const fn until_ms(&self) -> Option<u64> {
        match self.phase {
            Phase::Over { .. } => None,
            _ => Some(self.until_ms),
        }
    }

    /// The run of a gate, or of a hook, that is waited for.
    pub const fn run(&self) -> Option<u32> {
        match self.phase {
            Phase::Validating { run, .. } | Phase::Hook { run, .. } => Some(run),
            _ => None,
        }
    }

    /// True when the new colour serves because of it.
    pub const fn has_flipped(&self) -> bool {
        matches!(
            self.phase,
            Phase::Baking { .. }
                | Phase::SwitchingBack
                | Phase::Standby
                | Phase::Paused(Held::Bake)
        )
    }

    /// The share of new flows that the word had when it was looked at last.
    pub const fn seen_share(&self) -> u16 {
        self.canary
    }

    /// The step of the canary whose share it holds, or is about to hold.
    pub const fn share(&self) -> Option<usize> {
        match self.phase {
            Phase::Raising { step }
            | Phase::Canary { step, .. }
            | Phase::Paused(Held::Canary(step)) => Some(step),
            Phase::Hook { share, .. } => share,
            _ => None,
        }
    }

    /// What is watched of the new colour begins anew with each release, with each step of a
    /// canary, and with the flip.
    pub const fn part(&self) -> (u64, Option<usize>) {
        (self.number, self.share())
    }

    /// True while the new colour has to prove itself.
    pub const fn is_watched(&self) -> bool {
        matches!(self.phase, Phase::Baking { .. } | Phase::Canary { .. })
    }

    /// True while it counts how the new colour is.
    pub const fn is_looked_at(&self) -> bool {
        self.has_flipped() || self.share().is_some()
    }

    /// What happens when the wait ends, if nothing else does before.
    pub fn next(&self) -> &'static str {
        match self.phase {
            Phase::Validating { .. } => "without a result it pauses",
            Phase::Hook { .. } => "without a result it is as if the hook had failed",
            Phase::Ready if self.plan.approval.on_expiry == crate::config::OnExpiry::Flip => {
                "without an answer it goes on"
            }
            Phase::Ready => "without an approval it is aborted",
            Phase::Raising { .. } | Phase::Switching => "without a store it is aborted",
            Phase::Canary { step, .. } if step + 1 < self.plan.canary.len() => {
                "the share grows, if all is well"
            }
            Phase::Canary { .. } => "it flips, if all is well",
            Phase::Baking { .. } => "standby, if all is well",
            Phase::SwitchingBack | Phase::TakingBack { .. } => "without a store it tries again",
            Phase::Standby => "the release is done",
            Phase::Paused(Held::Bake) => "standby if all is well, else rollback",
            Phase::Paused(_) => "it is aborted",
            Phase::Over { .. } => "nothing",
        }
    }

    /// True while this run of a hook behind a step has no result.
    pub fn awaits(&self, run: u32) -> bool {
        self.run() == Some(run) || self.pending.iter().any(|one| one.run == run)
    }

    /// Tells its story on.
    pub(super) fn note(&mut self, text: String, by: Option<&By>, now: Now) {
        let number = self.notes.last().map_or(0, |note| note.number) + 1;
        self.notes.push(Note {
            number,
            unix_ms: now.unix_ms,
            actor: by.map(|by| by.actor.clone()),
            state: self.state(),
            text,
            why: by.and_then(|by| by.why.clone()),
        });
        let surplus = self.notes.len().saturating_sub(NOTES);
        self.notes.drain(..surplus);
    }
}

/// A colour by its name.
mod named {
    use bg_common::service::Colour;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde wants it so")]
    pub(super) fn serialize<S: Serializer>(colour: &Colour, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(colour.as_str())
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Colour, D::Error> {
        let name = String::deserialize(from)?;
        let mut all = Colour::ALL.into_iter();
        all.find(|colour| colour.as_str() == name)
            .ok_or_else(|| D::Error::custom("no colour"))
    }
}
