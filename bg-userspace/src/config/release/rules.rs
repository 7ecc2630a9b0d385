//! What the tables of a release may say.

use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::{
    super::{ConfigError, rules::duration, text::Text},
    ApprovalPlan, BakePlan, GatePlan, OnExpiry, OnTrouble, ReleasePlan, SignalPlan, StandbyPlan,
    When,
    canary::{RawCanary, canary},
    gates::{RawGate, gates},
    hooks::{RawHook, hooks},
    prometheus::{RawRule, prometheus},
    tables::{RawParity, RawWarm, parity, warm},
};

const SECOND: Duration = Duration::from_secs(1);

/// The tables of a service that are about releases.
pub(in crate::config) struct RawRelease {
    pub(in crate::config) parity: Option<Spanned<RawParity>>,
    pub(in crate::config) warm: Option<Spanned<RawWarm>>,
    pub(in crate::config) gate: Option<Spanned<Vec<Spanned<RawGate>>>>,
    pub(in crate::config) approval: Option<RawApproval>,
    pub(in crate::config) canary: Option<Spanned<Vec<Spanned<RawCanary>>>>,
    pub(in crate::config) bake: Option<RawBake>,
    pub(in crate::config) standby: Option<RawStandby>,
    pub(in crate::config) hook: Option<Spanned<Vec<Spanned<RawHook>>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawApproval {
    required: Option<bool>,
    not_requester: Option<Spanned<bool>>,
    expires: Option<Spanned<String>>,
    on_expiry: Option<OnExpiry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawBake {
    duration: Option<Spanned<String>>,
    settle: Option<Spanned<String>>,
    on_fail: Option<OnTrouble>,
    on_inconclusive: Option<OnTrouble>,
    cooldown: Option<Spanned<String>>,
    signals: Option<bool>,
    errors: Option<Spanned<f64>>,
    slower: Option<Spanned<f64>>,
    prometheus: Option<Spanned<String>>,
    rule: Option<Spanned<Vec<Spanned<RawRule>>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawStandby {
    hold: Option<Spanned<String>>,
}

/// The plan of a service's releases.
pub(in crate::config) fn plan(
    text: &Text<'_>,
    raw: RawRelease,
    key: &impl Fn(&str) -> String,
) -> Result<ReleasePlan, ConfigError> {
    let usual = ReleasePlan::default();
    let length = |value: &Option<Spanned<String>>, name: &str, usual, smallest| {
        duration(text, value.as_ref(), &key(name), usual, smallest)
    };
    let approval = match raw.approval {
        None => usual.approval,
        Some(raw) => {
            let (of, required) = (usual.approval, raw.required.unwrap_or(false));
            if let Some(other) = raw.not_requester.as_ref().filter(|_| !required) {
                let message = "is only of use with required = true: nobody is asked";
                return Err(text.wrong(other, key("approval.not_requester"), message));
            }
            ApprovalPlan {
                required,
                not_requester: raw.not_requester.is_some_and(Spanned::into_inner),
                expires: length(&raw.expires, "approval.expires", of.expires, SECOND)?,
                on_expiry: raw.on_expiry.unwrap_or(of.on_expiry),
            }
        }
    };
    let mut figures = None;
    let bake = match raw.bake {
        None => usual.bake,
        Some(mut raw) => {
            let rules = raw.rule.take();
            figures = prometheus(text, &key("bake"), raw.prometheus.as_ref(), rules)?;
            let (of, zero) = (usual.bake, Duration::ZERO);
            BakePlan {
                duration: length(&raw.duration, "bake.duration", of.duration, zero)?,
                settle: length(&raw.settle, "bake.settle", of.settle, zero)?,
                on_fail: raw.on_fail.unwrap_or(of.on_fail),
                on_inconclusive: raw.on_inconclusive.unwrap_or(of.on_inconclusive),
                cooldown: length(&raw.cooldown, "bake.cooldown", of.cooldown, zero)?,
                signals: signals(text, &raw, key)?,
            }
        }
    };
    let standby = match raw.standby {
        None => usual.standby,
        Some(raw) => {
            let (of, zero) = (usual.standby, Duration::ZERO);
            StandbyPlan {
                hold: length(&raw.hold, "standby.hold", of.hold, zero)?,
            }
        }
    };
    let parity = raw.parity.map(|raw| parity(text, &key("parity"), raw));
    let warm = raw.warm.map(|raw| warm(text, &key("warm"), raw));
    let first: Vec<GatePlan> = [parity, warm]
        .into_iter()
        .flatten()
        .collect::<Result<_, _>>()?;
    let gates = match raw.gate {
        None => first,
        Some(raw) => gates(text, &key("gate"), first, raw)?,
    };
    let canary = match raw.canary {
        None => Vec::new(),
        Some(raw) => canary(text, &key("canary"), raw)?,
    };
    let hooks = match raw.hook {
        None => Vec::new(),
        Some(raw) => {
            let mut never = Vec::new();
            if canary.is_empty() {
                let message =
                    "there is no canary: add [[service.NAME.canary]], or say \"before-flip\"";
                never.push((When::BeforeCanary, message));
            }
            if !approval.required {
                let message = "nobody is asked: add required = true to [service.NAME.approval]";
                never.push((When::Ready, message));
            }
            hooks(text, &key("hook"), &never, raw)?
        }
    };
    Ok(ReleasePlan {
        gates,
        approval,
        canary,
        bake,
        prometheus: figures,
        standby,
        hooks,
    })
}

/// What is heard of servers counts unless it is said not to.
fn signals(
    text: &Text<'_>,
    raw: &RawBake,
    key: &impl Fn(&str) -> String,
) -> Result<Option<SignalPlan>, ConfigError> {
    let usual = SignalPlan::default();
    let is_on = raw.signals.unwrap_or(true);
    let number = |value: &Option<Spanned<f64>>, name: &str, unit: f64, smallest, largest, usual| {
        let Some(value) = value else {
            return Ok(usual);
        };
        let key = key(name);
        if !is_on {
            return Err(text.wrong(value, key, "is of no use with signals = false"));
        }
        let number = *value.get_ref();
        if !(smallest..=largest).contains(&number) {
            let message = format!("{number} is not from {smallest} to {largest}");
            return Err(text.wrong(value, key, message));
        }
        Ok((number * unit).round() as u32)
    };
    let errors = number(&raw.errors, "bake.errors", 1e6, 0.0, 1.0, usual.errors_ppm)?;
    let slower = usual.slower_permille;
    let slower = number(&raw.slower, "bake.slower", 1e3, 1.0, 1000.0, slower)?;
    Ok(is_on.then_some(SignalPlan {
        errors_ppm: errors,
        slower_permille: slower,
    }))
}
