//! What `[[service.NAME.hook]]` may say.

use std::{collections::BTreeSet, path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};
use toml::Spanned;

use super::{
    super::{ConfigError, text::Text},
    GatePlan,
    gates::{self, RawGate},
    keys::Keys,
};

/// More hooks than this are no plan that anybody follows.
const MAX_HOOKS: usize = 32;
/// How long a hook may take, unless it says so itself.
const USUAL: Duration = Duration::from_mins(5);
const TIMES: &str = "\"before-gates\", \"before-canary\", \"before-flip\", \"after-flip\", \"after-bake\", \
                     \"after-standby\", \"after-rollback\", \"ready\", \"paused\" or \"failed\"";

/// What is run, or asked, before or after a step of a release.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookPlan {
    /// When.
    pub when: When,
    /// What its failure means.
    pub on_failure: OnFailure,
    /// What is run, and how long it may take.
    pub run: GatePlan,
}

/// When a hook is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum When {
    /// A release has begun.
    BeforeGates,
    /// The first share of new flows is about to be stored.
    BeforeCanary,
    /// The flip is about to be stored.
    BeforeFlip,
    /// It was stored.
    AfterFlip,
    /// The new colour has proved itself.
    AfterBake,
    /// The old colour need not stay up any more.
    AfterStandby,
    /// New flows go to the old colour again.
    AfterRollback,
    /// Somebody must approve.
    Ready,
    /// Somebody must decide.
    Paused,
    /// It is over, and was not flipped.
    Failed,
}

impl When {
    /// All of them, in the order of a release.
    pub const ALL: [Self; 10] = [
        Self::BeforeGates,
        Self::BeforeCanary,
        Self::BeforeFlip,
        Self::AfterFlip,
        Self::AfterBake,
        Self::AfterStandby,
        Self::AfterRollback,
        Self::Ready,
        Self::Paused,
        Self::Failed,
    ];

    /// As the configuration has it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::BeforeGates => "before-gates",
            Self::BeforeCanary => "before-canary",
            Self::BeforeFlip => "before-flip",
            Self::AfterFlip => "after-flip",
            Self::AfterBake => "after-bake",
            Self::AfterStandby => "after-standby",
            Self::AfterRollback => "after-rollback",
            Self::Ready => "ready",
            Self::Paused => "paused",
            Self::Failed => "failed",
        }
    }

    /// True when the step waits for it.
    pub const fn is_before(self) -> bool {
        matches!(
            self,
            Self::BeforeGates | Self::BeforeCanary | Self::BeforeFlip
        )
    }
}

/// What a hook that fails, or has no result in time, means.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnFailure {
    /// The release ends; nothing was flipped.
    Stop,
    /// It is told, and the release goes on.
    GoOn,
}

impl OnFailure {
    /// `"stop"` or `"go-on"`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::GoOn => "go-on",
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawHook {
    name: Option<Spanned<String>>,
    when: Option<Spanned<String>>,
    kind: Option<Spanned<String>>,
    command: Option<Spanned<Vec<String>>>,
    url: Option<Spanned<String>>,
    token_file: Option<Spanned<PathBuf>>,
    timeout: Option<Spanned<String>>,
    on_failure: Option<Spanned<OnFailure>>,
}

/// The hooks of a service, in the order of the file; `never`: times that do not come, and why.
pub(super) fn hooks(
    text: &Text<'_>,
    table: &str,
    never: &[(When, &str)],
    raw: Spanned<Vec<Spanned<RawHook>>>,
) -> Result<Vec<HookPlan>, ConfigError> {
    let count = raw.get_ref().len();
    if count > MAX_HOOKS {
        let message = format!("there are {count} hooks, {MAX_HOOKS} fit");
        return Err(text.wrong(&raw, table, message));
    }
    let mut names = BTreeSet::new();
    let hooks = raw.into_inner().into_iter().map(|raw| {
        let start = raw.span().start;
        let keys = Keys { text, table, start };
        hook(keys, raw.into_inner(), never, &mut names)
    });
    hooks.collect()
}

fn hook(
    keys: Keys<'_>,
    raw: RawHook,
    never: &[(When, &str)],
    names: &mut BTreeSet<String>,
) -> Result<HookPlan, ConfigError> {
    let Some(given) = &raw.when else {
        return Err(keys.missing("when", TIMES));
    };
    let mut all = When::ALL.into_iter();
    let Some(when) = all.find(|when| when.as_str() == given.get_ref()) else {
        let given_text = given.get_ref().escape_debug();
        let message = format!("`{given_text}` is unknown: {TIMES}");
        return Err(keys.wrong(given, "when", message));
    };
    if let Some((_, message)) = never.iter().find(|(never, _)| *never == when) {
        return Err(keys.wrong(given, "when", *message));
    }
    let kind = raw.kind.as_ref();
    if let Some(kind) = kind.filter(|kind| !["exec", "webhook"].contains(&kind.get_ref().as_str()))
    {
        let given = kind.get_ref().escape_debug();
        let message = format!("`{given}` is no kind of a hook: \"exec\" or \"webhook\"");
        return Err(keys.wrong(kind, "kind", message));
    }
    if kind.is_none() {
        return Err(keys.missing("kind", "\"exec\" or \"webhook\""));
    }
    let on_failure = raw.on_failure.as_ref();
    if let Some(given) = on_failure.filter(|_| !when.is_before()) {
        let message = "is of use before a step only: nothing waits for this one";
        return Err(keys.wrong(given, "on_failure", message));
    }
    let usual = if when.is_before() {
        OnFailure::Stop
    } else {
        OnFailure::GoOn
    };
    let on_failure = on_failure.map_or(usual, |given| *given.get_ref());
    let has_timeout = raw.timeout.is_some();
    let raw = RawGate {
        name: raw.name,
        kind: raw.kind,
        timeout: raw.timeout,
        command: raw.command,
        url: raw.url,
        token_file: raw.token_file,
        ..RawGate::default()
    };
    let run = gates::gate(keys, &raw, names)?;
    let timeout = if has_timeout { run.timeout } else { USUAL };
    Ok(HookPlan {
        when,
        on_failure,
        run: GatePlan { timeout, ..run },
    })
}
