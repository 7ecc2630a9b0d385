//! What `[service.NAME.parity]` and `[service.NAME.warm]` may say. They are gates that
//! run before the others.

use std::{collections::BTreeMap, path::PathBuf, time::Duration};

use hyper::header::HeaderName;
use serde::Deserialize;
use toml::Spanned;

use super::{
    super::{ConfigError, rules::duration, text::Text},
    GateKind, GatePlan, ParityGate, WarmGate,
    gates::{CONCURRENCY, PORT},
    keys::{Keys, is_path},
};

const SECOND: Duration = Duration::from_secs(1);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawParity {
    compare: Option<Spanned<Vec<String>>>,
    headers: Option<Spanned<Vec<String>>>,
    command: Option<Spanned<Vec<String>>>,
    allow: Option<Spanned<Vec<String>>>,
    port: Option<Spanned<i64>>,
    timeout: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawWarm {
    file: Option<Spanned<PathBuf>>,
    port: Option<Spanned<i64>>,
    headers: Option<Spanned<BTreeMap<String, String>>>,
    concurrency: Option<Spanned<i64>>,
    repeat: Option<Spanned<i64>>,
    timeout: Option<Spanned<String>>,
}

/// The gate `parity`; `table` is what its table is called.
pub(super) fn parity(
    text: &Text<'_>,
    table: &str,
    raw: Spanned<RawParity>,
) -> Result<GatePlan, ConfigError> {
    let start = raw.span().start;
    let (keys, raw) = (Keys { text, table, start }, raw.into_inner());
    let path = |path: &String| is_path(path).then(|| path.clone());
    let header = |name: &String| {
        let name = HeaderName::try_from(name.as_str()).ok()?;
        Some(name.as_str().to_owned())
    };
    let command = raw.command.as_ref();
    let gate = ParityGate {
        compare: keys.list("compare", raw.compare.as_ref(), path, "path, like \"/v2\"")?,
        headers: keys.list(
            "headers",
            raw.headers.as_ref(),
            header,
            "header, like \"server\"",
        )?,
        command: command
            .map(|command| keys.command("command", command))
            .transpose()?,
        allow: keys.pointers("allow", raw.allow.as_ref())?,
        port: keys.number("port", raw.port.as_ref(), PORT)?,
    };
    if gate.compare.is_empty() && gate.command.is_none() {
        let message = "paths whose answers must be the same, like [\"/v2\"], or add `command`";
        return Err(keys.missing("compare", message));
    }
    let (timeout, usual) = (raw.timeout.as_ref(), Duration::from_secs(30));
    Ok(GatePlan {
        name: "parity".to_owned(),
        timeout: duration(text, timeout, &keys.key("timeout"), usual, SECOND)?,
        kind: GateKind::Parity(gate),
    })
}

/// The gate `warm`; `table` is what its table is called.
pub(super) fn warm(
    text: &Text<'_>,
    table: &str,
    raw: Spanned<RawWarm>,
) -> Result<GatePlan, ConfigError> {
    let start = raw.span().start;
    let (keys, raw) = (Keys { text, table, start }, raw.into_inner());
    let gate = WarmGate {
        file: keys.file("file", raw.file.as_ref(), "/etc/bgswitch/warm.jsonl")?,
        port: keys.number("port", raw.port.as_ref(), PORT)?,
        headers: keys.headers("headers", raw.headers.as_ref())?,
        concurrency: keys
            .number("concurrency", raw.concurrency.as_ref(), CONCURRENCY)?
            .unwrap_or(4),
        repeat: keys
            .number("repeat", raw.repeat.as_ref(), 1..=100)?
            .unwrap_or(1),
    };
    let (timeout, usual) = (raw.timeout.as_ref(), Duration::from_mins(10));
    Ok(GatePlan {
        name: "warm".to_owned(),
        timeout: duration(text, timeout, &keys.key("timeout"), usual, SECOND)?,
        kind: GateKind::Warm(gate),
    })
}
