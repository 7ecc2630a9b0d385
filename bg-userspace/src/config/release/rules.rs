//! What the tables of a release may say.

use std::{collections::BTreeSet, path::Path, time::Duration};

use hyper::http::uri::PathAndQuery;
use serde::Deserialize;
use toml::Spanned;

use super::{
    super::{
        ConfigError,
        rules::{duration, is_name},
        text::Text,
    },
    ApprovalPlan, BakePlan, GateKind, GatePlan, HttpGate, OnExpiry, OnTrouble, ReleasePlan,
    SignalPlan, StandbyPlan,
};

/// More gates than this are no plan that anybody follows.
const MAX_GATES: usize = 32;
const SECOND: Duration = Duration::from_secs(1);

/// The tables of a service that are about releases.
pub(in crate::config) struct RawRelease {
    pub(in crate::config) gate: Option<Spanned<Vec<Spanned<RawGate>>>>,
    pub(in crate::config) approval: Option<RawApproval>,
    pub(in crate::config) bake: Option<RawBake>,
    pub(in crate::config) standby: Option<RawStandby>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawGate {
    name: Option<Spanned<String>>,
    kind: Option<Spanned<String>>,
    timeout: Option<Spanned<String>>,
    command: Option<Spanned<Vec<String>>>,
    path: Option<Spanned<String>>,
    port: Option<Spanned<i64>>,
    status: Option<Spanned<i64>>,
    body: Option<Spanned<String>>,
    json: Option<Spanned<String>>,
    equals: Option<Spanned<toml::Value>>,
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
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawStandby {
    hold: Option<Spanned<String>>,
    after: Option<Spanned<Vec<String>>>,
    after_timeout: Option<Spanned<String>>,
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
    let bake = match raw.bake {
        None => usual.bake,
        Some(raw) => {
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
            let of = usual.standby;
            let after = raw.after.as_ref();
            StandbyPlan {
                hold: length(&raw.hold, "standby.hold", of.hold, Duration::ZERO)?,
                after: after
                    .map(|words| command_of(text, words, key("standby.after")))
                    .transpose()?,
                after_timeout: length(
                    &raw.after_timeout,
                    "standby.after_timeout",
                    of.after_timeout,
                    SECOND,
                )?,
            }
        }
    };
    let gates = raw.gate.map_or(Ok(Vec::new()), |raw| {
        let key = |name: &str| match name {
            "" => key("gate"),
            name => key(&format!("gate.{name}")),
        };
        gates(text, raw, &key)
    });
    Ok(ReleasePlan {
        gates: gates?,
        approval,
        bake,
        standby,
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

fn gates(
    text: &Text<'_>,
    raw: Spanned<Vec<Spanned<RawGate>>>,
    key: &impl Fn(&str) -> String,
) -> Result<Vec<GatePlan>, ConfigError> {
    let count = raw.get_ref().len();
    if count > MAX_GATES {
        let message = format!("there are {count} gates, {MAX_GATES} fit");
        return Err(text.wrong(&raw, key(""), message));
    }
    let mut names = BTreeSet::new();
    let gates = raw.into_inner().into_iter();
    gates
        .map(|raw| gate(text, raw, key, &mut names))
        .collect::<Result<_, _>>()
}

fn gate(
    text: &Text<'_>,
    raw: Spanned<RawGate>,
    key: &impl Fn(&str) -> String,
    names: &mut BTreeSet<String>,
) -> Result<GatePlan, ConfigError> {
    let start = raw.span().start;
    let raw = raw.into_inner();
    let missing = |name: &str, message: &str| Err(text.error(start, key(name), message));
    let Some(name) = &raw.name else {
        return missing("name", "is missing: add name = \"smoke\"");
    };
    if !is_name(name.get_ref()) {
        let message = "a gate's name has 1 to 63 letters, digits, `-` and `_`";
        return Err(text.wrong(name, key("name"), message));
    }
    if !names.insert(name.get_ref().clone()) {
        let message = format!("`{}` is the name of another gate", name.get_ref());
        return Err(text.wrong(name, key("name"), message));
    }
    let usual = Duration::from_secs(30);
    let timeout = raw.timeout.as_ref();
    let timeout = duration(text, timeout, &key("timeout"), usual, SECOND)?;
    let name = name.get_ref().clone();
    let Some(kind) = &raw.kind else {
        return missing("kind", "is missing: \"exec\" or \"http\"");
    };
    let kind = match kind.get_ref().as_str() {
        "exec" => exec(text, &raw, start, key)?,
        "http" => http(text, &raw, start, key)?,
        other => {
            let message = format!("`{other}` is unknown: \"exec\" or \"http\"");
            return Err(text.wrong(kind, key("kind"), message));
        }
    };
    Ok(GatePlan {
        name,
        timeout,
        kind,
    })
}

fn exec(
    text: &Text<'_>,
    raw: &RawGate,
    start: usize,
    key: &impl Fn(&str) -> String,
) -> Result<GateKind, ConfigError> {
    let places = [
        ("path", raw.path.as_ref().map(Spanned::span)),
        ("port", raw.port.as_ref().map(Spanned::span)),
        ("status", raw.status.as_ref().map(Spanned::span)),
        ("body", raw.body.as_ref().map(Spanned::span)),
        ("json", raw.json.as_ref().map(Spanned::span)),
        ("equals", raw.equals.as_ref().map(Spanned::span)),
    ];
    for (name, place) in places {
        if let Some(place) = place {
            let message = "belongs to kind = \"http\": remove it";
            return Err(text.error(place.start, key(name), message));
        }
    }
    let Some(command) = &raw.command else {
        let message = "is missing: a program and its arguments, like [\"/etc/bgswitch/smoke\"]";
        return Err(text.error(start, key("command"), message));
    };
    command_of(text, command, key("command")).map(GateKind::Exec)
}

/// A program and its arguments.
fn command_of(
    text: &Text<'_>,
    command: &Spanned<Vec<String>>,
    key: String,
) -> Result<Vec<String>, ConfigError> {
    let words = command.get_ref();
    if !words
        .first()
        .is_some_and(|word| Path::new(word).is_absolute())
    {
        let message =
            "must begin with the absolute path of a program, like [\"/etc/bgswitch/smoke\"]";
        return Err(text.wrong(command, key, message));
    }
    if words.iter().any(|word| word.contains('\0')) {
        let message = "has a word with a zero byte, which no program can be given";
        return Err(text.wrong(command, key, message));
    }
    Ok(words.clone())
}

fn http(
    text: &Text<'_>,
    raw: &RawGate,
    start: usize,
    key: &impl Fn(&str) -> String,
) -> Result<GateKind, ConfigError> {
    if let Some(command) = &raw.command {
        let message = "belongs to kind = \"exec\": remove it";
        return Err(text.wrong(command, key("command"), message));
    }
    let Some(path) = &raw.path else {
        let message = "is missing: what to ask for, like \"/v2/health/ready\"";
        return Err(text.error(start, key("path"), message));
    };
    let given = path.get_ref();
    if !given.starts_with('/') || given.contains('#') || given.parse::<PathAndQuery>().is_err() {
        let message = format!(
            "`{}` is no path, like \"/v2/health/ready\" (escape other bytes as %20)",
            given.escape_debug()
        );
        return Err(text.wrong(path, key("path"), message));
    }
    let number =
        |value: &Option<Spanned<i64>>, name: &str, range: std::ops::RangeInclusive<i64>| {
            let Some(value) = value else { return Ok(None) };
            let given = *value.get_ref();
            if range.contains(&given) {
                return Ok(Some(given as u16));
            }
            let message = format!(
                "{given} is not between {} and {}",
                range.start(),
                range.end()
            );
            Err(text.wrong(value, key(name), message))
        };
    if let Some(json) = raw
        .json
        .as_ref()
        .filter(|json| !json.get_ref().starts_with('/'))
    {
        let message = format!(
            "`{}` is no JSON pointer, like \"/models/0/state\"",
            json.get_ref().escape_debug()
        );
        return Err(text.wrong(json, key("json"), message));
    }
    let equals = match &raw.equals {
        None => None,
        Some(value) if raw.json.is_none() => {
            let message = "is only of use with json: add json = \"/models/0/state\"";
            return Err(text.wrong(value, key("equals"), message));
        }
        Some(value) => {
            let message = "must be a string, a number or a boolean";
            let scalar = scalar(value.get_ref());
            Some(scalar.ok_or_else(|| text.wrong(value, key("equals"), message))?)
        }
    };
    Ok(GateKind::Http(HttpGate {
        path: given.clone(),
        port: number(&raw.port, "port", 1..=65_535)?,
        status: number(&raw.status, "status", 100..=599)?.unwrap_or(200),
        body: raw.body.as_ref().map(|body| body.get_ref().clone()),
        json: raw.json.as_ref().map(|json| json.get_ref().clone()),
        equals,
    }))
}

/// What JSON calls a value that is no table, no array and no date.
fn scalar(value: &toml::Value) -> Option<serde_json::Value> {
    match value {
        toml::Value::String(text) => Some(text.clone().into()),
        toml::Value::Integer(number) => Some((*number).into()),
        toml::Value::Float(number) => serde_json::Number::from_f64(*number).map(Into::into),
        toml::Value::Boolean(is) => Some((*is).into()),
        _ => None,
    }
}
