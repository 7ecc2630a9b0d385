//! Releases: what is asked for, and where one is.

use serde::{Deserialize, Serialize};

use crate::{
    release::{Gate, Note, Release},
    time,
};

/// `bgswitch release start`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ReleaseRequest {
    /// `blue` or `green`; the standby if absent.
    pub to: Option<String>,
    /// What runs there: must be the colour's version, where one is configured.
    pub version: Option<String>,
    /// Only at this generation.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub if_generation: Option<u16>,
    /// Pass over the gates, and flip also to a colour that cannot be reached.
    pub force: bool,
    /// For the journal.
    pub why: Option<String>,
}

/// `bgswitch release approve`, `reject`, `abort`, `pause`, `resume`, and `bgswitch
/// standby retire`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct DecisionRequest {
    /// `resume`: what is not known counts as good. `retire`: also while the active colour is
    /// ill, or health checks do not know yet.
    pub force: bool,
    /// For the journal.
    pub why: Option<String>,
}

/// `bgswitch standby extend`.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields, default)]
pub struct ExtendRequest {
    /// How much longer, seconds.
    pub by_s: u64,
    /// For the journal.
    pub why: Option<String>,
}

/// Where the release of a service is.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ReleaseStatus {
    /// [`super::SCHEMA`].
    pub schema: u32,
    /// Service.
    pub service: String,
    /// The active colour.
    pub active: String,
    /// How often the service has flipped, modulo 65 536.
    #[serde(default)]
    pub generation: u16,
    /// `STEADY`, `VALIDATING`, `READY`, `CANARY`, `SWITCHING`, `BAKING`, `STANDBY`,
    /// `PAUSED`, `FAILED`, `ABORTED`, `ROLLED_BACK` or `SUPERSEDED`.
    pub state: String,
    /// The release that runs, or ran last.
    pub release: Option<ReleaseReport>,
}

/// A release.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct ReleaseReport {
    /// Like `r-42`; counts per service.
    pub id: String,
    /// The colour that is left.
    pub from: String,
    /// The colour that is flipped to.
    pub to: String,
    /// What runs there.
    pub version: Option<String>,
    /// Generation before its flip.
    pub generation: u16,
    /// Who asked for it.
    pub requester: String,
    /// True when the gates were passed over, as was asked for.
    pub forced: bool,
    /// Who agreed to the flip.
    pub approved_by: Option<String>,
    /// Why it is in its state.
    pub why: String,
    /// How far the gate is that runs, in words; `null` where there is none, or it does
    /// not say.
    pub progress: Option<String>,
    /// Since when, RFC 3339.
    pub since: String,
    /// When the wait ends that it is in, RFC 3339; `null` when it is over.
    pub until: Option<String>,
    /// What happens then, if nothing else does before.
    pub next: String,
    /// True when nothing follows.
    pub over: bool,
    /// The exit code of a command that waited for it until now.
    pub code: u8,
    /// Its gates, in order.
    pub gates: Vec<GateReport>,
    /// What happened, oldest first; the last 200.
    pub notes: Vec<NoteReport>,
}

/// A gate of a release.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct GateReport {
    /// Name.
    pub name: String,
    /// `exec`, `http` or another kind of the configuration.
    pub kind: String,
    /// `pass`, `fail` or `inconclusive`; `null` before its first result.
    pub result: Option<String>,
    /// What was seen.
    pub evidence: Option<String>,
    /// How long it took, milliseconds.
    pub took_ms: Option<u64>,
    /// Who let the release go on without it.
    pub forced_by: Option<String>,
}

/// A line of a release's story.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct NoteReport {
    /// Counts from 1.
    pub number: u64,
    /// RFC 3339.
    pub time: String,
    /// Who did it; `null`: the daemon.
    pub actor: Option<String>,
    /// The state from then on.
    pub state: String,
    /// What happened.
    pub text: String,
    /// The operator's words.
    pub why: Option<String>,
}

impl From<&Release> for ReleaseReport {
    fn from(release: &Release) -> Self {
        let gate = |gate: &Gate| GateReport {
            name: gate.plan.name.clone(),
            kind: gate.plan.kind.as_str().to_owned(),
            result: gate
                .outcome
                .as_ref()
                .map(|outcome| outcome.verdict.as_str().to_owned()),
            evidence: gate
                .outcome
                .as_ref()
                .map(|outcome| outcome.evidence.clone()),
            took_ms: gate.outcome.as_ref().map(|outcome| outcome.took_ms),
            forced_by: gate.forced_by.clone(),
        };
        let note = |note: &Note| NoteReport {
            number: note.number,
            time: time::rfc3339_at_unix_ms(note.unix_ms),
            actor: note.actor.clone(),
            state: note.state.as_str().to_owned(),
            text: note.text.clone(),
            why: note.why.clone(),
        };
        Self {
            id: release.id(),
            from: release.from.as_str().to_owned(),
            to: release.to.as_str().to_owned(),
            version: release.version.clone(),
            generation: release.generation,
            requester: release.requester.clone(),
            forced: release.forced,
            approved_by: release.approved_by.clone(),
            why: release.why.clone(),
            progress: None,
            since: time::rfc3339_at_unix_ms(release.since_unix_ms),
            until: release.until_ms().map(time::rfc3339_at_boot_ms),
            next: release.next().to_owned(),
            over: release.state().is_over(),
            code: release.code(),
            gates: release.gates.iter().map(gate).collect(),
            notes: release.notes.iter().map(note).collect(),
        }
    }
}
