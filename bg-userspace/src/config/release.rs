//! What a release does before and after its flip: `[service.NAME.parity]`,
//! `[service.NAME.warm]`, `[[service.NAME.gate]]`, `[service.NAME.approval]`,
//! `[[service.NAME.canary]]`, `[service.NAME.bake]`, `[service.NAME.standby]` and
//! `[[service.NAME.hook]]`.

pub(super) mod canary;
pub(super) mod gates;
pub(super) mod hooks;
mod keys;
mod kinds;
pub(super) mod prometheus;
pub(super) mod rules;
pub(super) mod tables;

use std::time::Duration;

use serde::{Deserialize, Serialize};

pub use self::hooks::{HookPlan, OnFailure, When};
pub use self::kinds::{
    GateKind, GatePlan, GrpcGate, HttpGate, LoadGate, ParityGate, PromptsGate, Share, WarmGate,
    WebhookGate,
};
pub use self::prometheus::{Figure, NoData, PrometheusPlan, RulePlan};

/// What a release of a service goes through. A release keeps the plan that it began
/// with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleasePlan {
    /// In the order in which the standby must pass them.
    pub gates: Vec<GatePlan>,
    /// Who must agree before the flip.
    pub approval: ApprovalPlan,
    /// Shares of new flows before the flip, rising; none: it flips at once.
    #[serde(default)]
    pub canary: Vec<CanaryStep>,
    /// The watched time after the flip.
    pub bake: BakePlan,
    /// Figures that count while the new colour is watched.
    #[serde(default)]
    pub prometheus: Option<PrometheusPlan>,
    /// How long the old colour must stay up.
    pub standby: StandbyPlan,
    /// What is run before and after its steps.
    #[serde(default)]
    pub hooks: Vec<HookPlan>,
}

/// A share of new flows, and how long it is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryStep {
    /// So many of the new flows go to the new colour.
    pub percent: Share,
    /// For so long; whole seconds.
    pub time: Duration,
}

/// Who must agree before the flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ApprovalPlan {
    /// Whether anybody must.
    pub required: bool,
    /// Somebody else than who asked for the release.
    pub not_requester: bool,
    /// How long a release waits for people: for an approval, and in a pause.
    pub expires: Duration,
    /// What happens when nobody has approved by then.
    pub on_expiry: OnExpiry,
}

impl Default for ApprovalPlan {
    fn default() -> Self {
        Self {
            required: false,
            not_requester: false,
            expires: Duration::from_hours(4),
            on_expiry: OnExpiry::Abort,
        }
    }
}

/// What an approval that nobody gave means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnExpiry {
    /// The release ends; nothing was flipped.
    Abort,
    /// The service is flipped.
    Flip,
}

impl OnExpiry {
    /// `"abort"` or `"flip"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Abort => "abort",
            Self::Flip => "flip",
        }
    }
}

/// The watched time after the flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BakePlan {
    /// From the end of `settle` on.
    pub duration: Duration,
    /// After the flip: what goes wrong now, does not count yet.
    pub settle: Duration,
    /// What happens when the new colour is ill.
    pub on_fail: OnTrouble,
    /// What happens when nothing is known of it.
    pub on_inconclusive: OnTrouble,
    /// So long after a rollback by itself there is no other one: a pause instead.
    pub cooldown: Duration,
    /// What the packet path hears of the servers counts, too.
    #[serde(default)]
    pub signals: Option<SignalPlan>,
}

impl ReleasePlan {
    /// Something says how the new colour is, beside health checks.
    pub const fn hears(&self) -> bool {
        self.bake.signals.is_some() || self.prometheus.is_some()
    }
}

impl Default for BakePlan {
    fn default() -> Self {
        Self {
            duration: Duration::from_mins(30),
            settle: Duration::from_mins(1),
            on_fail: OnTrouble::Rollback,
            on_inconclusive: OnTrouble::Pause,
            cooldown: Duration::from_mins(10),
            signals: None,
        }
    }
}

/// How much worse than the old colour the new one may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalPlan {
    /// So many more requests, or connections, of a million may fail.
    pub errors_ppm: u32,
    /// Its answers may take so many times as long, in thousandths.
    pub slower_permille: u32,
}

impl SignalPlan {
    /// Which part more may fail.
    pub fn errors(&self) -> f64 {
        f64::from(self.errors_ppm) / 1e6
    }

    /// How many times as long answers may take.
    pub fn slower(&self) -> f64 {
        f64::from(self.slower_permille) / 1e3
    }
}

impl Default for SignalPlan {
    fn default() -> Self {
        Self {
            errors_ppm: 10_000,
            slower_permille: 2000,
        }
    }
}

/// What a bake that goes wrong means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OnTrouble {
    /// Back to the old colour at once.
    Rollback,
    /// A human decides.
    Pause,
}

impl OnTrouble {
    /// `"rollback"` or `"pause"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Rollback => "rollback",
            Self::Pause => "pause",
        }
    }
}

/// How long the old colour must stay up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StandbyPlan {
    /// From the end of the bake on.
    pub hold: Duration,
}

impl Default for StandbyPlan {
    fn default() -> Self {
        Self {
            hold: Duration::from_mins(45),
        }
    }
}
