//! What `[[service.NAME.canary]]` may say.

use std::time::Duration;

use serde::Deserialize;
use toml::Spanned;

use super::{
    super::{ConfigError, rules::duration, text::Text},
    CanaryStep, Share,
    keys::Keys,
};

/// More steps than this are no plan that anybody follows.
const MAX_STEPS: usize = 16;
const SECOND: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawCanary {
    percent: Option<Spanned<f64>>,
    r#for: Option<Spanned<String>>,
}

/// The steps of a service's canary, in the order of the file: their shares rise.
pub(super) fn canary(
    text: &Text<'_>,
    table: &str,
    raw: Spanned<Vec<Spanned<RawCanary>>>,
) -> Result<Vec<CanaryStep>, ConfigError> {
    let count = raw.get_ref().len();
    if count > MAX_STEPS {
        let message = format!("has {count} steps, {MAX_STEPS} fit");
        return Err(text.wrong(&raw, table, message));
    }
    let mut steps: Vec<CanaryStep> = Vec::with_capacity(count);
    for raw in raw.into_inner() {
        let start = raw.span().start;
        let keys = Keys { text, table, start };
        let step = step(keys, &raw.into_inner(), steps.last())?;
        steps.push(step);
    }
    Ok(steps)
}

fn step(
    keys: Keys<'_>,
    raw: &RawCanary,
    before: Option<&CanaryStep>,
) -> Result<CanaryStep, ConfigError> {
    let Some(given) = &raw.percent else {
        return Err(keys.missing("percent", "which share of new flows, like 5"));
    };
    let percent = *given.get_ref();
    if !(0.01..=100.0).contains(&percent) {
        let message = format!("{percent} is not from 0.01 to 100");
        return Err(keys.wrong(given, "percent", message));
    }
    let percent = Share((percent * 10_000.0).round() as u32);
    if let Some(before) = before.filter(|before| percent.0 <= before.percent.0) {
        let message = format!(
            "{percent} is not more than the {} before it",
            before.percent
        );
        return Err(keys.wrong(given, "percent", message));
    }
    if raw.r#for.is_none() {
        return Err(keys.missing("for", "how long this share is watched, like \"5m\""));
    }
    let time = raw.r#for.as_ref();
    Ok(CanaryStep {
        percent,
        time: duration(keys.text, time, &keys.key("for"), SECOND, SECOND)?,
    })
}
