//! What `[[service.NAME.gate]]` may say.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    path::PathBuf,
    time::Duration,
};

use hyper::Uri;
use serde::Deserialize;
use toml::Spanned;

use super::{
    super::{ConfigError, rules::duration, text::Text},
    GateKind, GatePlan, GrpcGate, HttpGate, LoadGate, PromptsGate, WebhookGate,
    keys::Keys,
};

/// More gates than this are no plan that anybody follows.
const MAX_GATES: usize = 32;
const KINDS: &str = "\"http\", \"grpc\", \"load\", \"prompts\", \"webhook\" or \"exec\"";
const SECOND: Duration = Duration::from_secs(1);
/// How long a gate may take, unless it says so itself; behind a load, as long again.
const USUAL: Duration = Duration::from_secs(30);
const LONG: Duration = Duration::from_mins(5);
pub(super) const PORT: RangeInclusive<i64> = 1..=65_535;
const STATUS: RangeInclusive<i64> = 100..=599;
/// Requests a second that a gateway makes beside its work.
const RATE: RangeInclusive<i64> = 1..=10_000;
/// Each request under way has a socket; a process has 1024 descriptors if nobody
/// gives it more.
pub(super) const CONCURRENCY: RangeInclusive<i64> = 1..=512;
/// A 99th percentile of fewer requests says nothing.
const FEWEST: u64 = 20;
const LONGEST: Duration = Duration::from_hours(1);

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(in crate::config) struct RawGate {
    pub(super) name: Option<Spanned<String>>,
    pub(super) kind: Option<Spanned<String>>,
    pub(super) timeout: Option<Spanned<String>>,
    pub(super) command: Option<Spanned<Vec<String>>>,
    pub(super) path: Option<Spanned<String>>,
    pub(super) port: Option<Spanned<i64>>,
    pub(super) status: Option<Spanned<i64>>,
    pub(super) body: Option<Spanned<String>>,
    pub(super) json: Option<Spanned<String>>,
    pub(super) equals: Option<Spanned<toml::Value>>,
    pub(super) method: Option<Spanned<String>>,
    pub(super) headers: Option<Spanned<BTreeMap<String, String>>>,
    pub(super) rate: Option<Spanned<i64>>,
    pub(super) duration: Option<Spanned<String>>,
    pub(super) concurrency: Option<Spanned<i64>>,
    pub(super) p99: Option<Spanned<String>>,
    pub(super) errors: Option<Spanned<f64>>,
    pub(super) file: Option<Spanned<PathBuf>>,
    pub(super) max_ttft: Option<Spanned<String>>,
    pub(super) max_total: Option<Spanned<String>>,
    pub(super) compare: Option<Spanned<Vec<String>>>,
    pub(super) noise_runs: Option<Spanned<i64>>,
    pub(super) tolerance: Option<Spanned<f64>>,
    pub(super) service: Option<Spanned<String>>,
    pub(super) url: Option<Spanned<String>>,
    pub(super) token_file: Option<Spanned<PathBuf>>,
}

/// The gates of a service, in the order of the file, behind the `first` ones; `table` is
/// what they are called.
pub(super) fn gates(
    text: &Text<'_>,
    table: &str,
    first: Vec<GatePlan>,
    raw: Spanned<Vec<Spanned<RawGate>>>,
) -> Result<Vec<GatePlan>, ConfigError> {
    let count = raw.get_ref().len();
    if count > MAX_GATES {
        let message = format!("there are {count} gates, {MAX_GATES} fit");
        return Err(text.wrong(&raw, table, message));
    }
    let mut names = first.iter().map(|gate| gate.name.clone()).collect();
    let gates = raw.into_inner().into_iter().map(|raw| {
        let start = raw.span().start;
        let keys = Keys { text, table, start };
        gate(keys, &raw.into_inner(), &mut names)
    });
    first.into_iter().map(Ok).chain(gates).collect()
}

/// A gate, or what a hook runs, with a name of its own.
pub(super) fn gate(
    keys: Keys<'_>,
    raw: &RawGate,
    names: &mut BTreeSet<String>,
) -> Result<GatePlan, ConfigError> {
    let name = keys.own_name(raw.name.as_ref(), "smoke", names)?;
    let Some(kind) = &raw.kind else {
        return Err(keys.missing("kind", KINDS));
    };
    fit(keys, kind.get_ref(), raw)?;
    let (kind, usual) = match kind.get_ref().as_str() {
        "exec" => (exec(keys, raw)?, USUAL),
        "http" => (GateKind::Http(http(keys, raw)?), USUAL),
        "grpc" => {
            let service = raw.service.as_ref().map(|name| name.get_ref().clone());
            let grpc = GrpcGate {
                service: service.unwrap_or_default(),
                port: keys.number("port", raw.port.as_ref(), PORT)?,
            };
            (GateKind::Grpc(grpc), USUAL)
        }
        "webhook" => (GateKind::Webhook(webhook(keys, raw)?), LONG),
        "prompts" => (GateKind::Prompts(prompts(keys, raw)?), LONG),
        "load" => {
            let load = load(keys, raw)?;
            let usual = load.duration + USUAL;
            (GateKind::Load(load), usual)
        }
        other => {
            let message = format!("`{other}` is unknown: {KINDS}");
            return Err(keys.wrong(kind, "kind", message));
        }
    };
    let given = raw.timeout.as_ref();
    let timeout = duration(keys.text, given, &keys.key("timeout"), usual, SECOND)?;
    if let (GateKind::Load(load), Some(given)) = (&kind, given)
        && timeout <= load.duration
    {
        let message = "must be longer than duration, or there is no time for the last answers";
        return Err(keys.wrong(given, "timeout", message));
    }
    Ok(GatePlan {
        name,
        timeout,
        kind,
    })
}

/// Refuses keys of other kinds: they would promise what is not done.
fn fit(keys: Keys<'_>, kind: &str, raw: &RawGate) -> Result<(), ConfigError> {
    fn at<T>(value: Option<&Spanned<T>>) -> Option<usize> {
        value.map(|value| value.span().start)
    }
    if !["exec", "http", "load", "grpc", "prompts", "webhook"].contains(&kind) {
        return Ok(());
    }
    let table: &[(&str, Option<usize>, &[&str])] = &[
        ("command", at(raw.command.as_ref()), &["exec"]),
        ("path", at(raw.path.as_ref()), &["http", "load"]),
        (
            "port",
            at(raw.port.as_ref()),
            &["http", "grpc", "load", "prompts"],
        ),
        ("status", at(raw.status.as_ref()), &["http", "load"]),
        ("body", at(raw.body.as_ref()), &["http", "load"]),
        ("json", at(raw.json.as_ref()), &["http"]),
        ("equals", at(raw.equals.as_ref()), &["http"]),
        ("method", at(raw.method.as_ref()), &["load"]),
        ("headers", at(raw.headers.as_ref()), &["load", "prompts"]),
        ("rate", at(raw.rate.as_ref()), &["load"]),
        ("duration", at(raw.duration.as_ref()), &["load"]),
        (
            "concurrency",
            at(raw.concurrency.as_ref()),
            &["load", "prompts"],
        ),
        ("p99", at(raw.p99.as_ref()), &["load"]),
        ("errors", at(raw.errors.as_ref()), &["load"]),
        ("file", at(raw.file.as_ref()), &["prompts"]),
        ("max_ttft", at(raw.max_ttft.as_ref()), &["prompts"]),
        ("max_total", at(raw.max_total.as_ref()), &["prompts"]),
        ("compare", at(raw.compare.as_ref()), &["prompts"]),
        ("noise_runs", at(raw.noise_runs.as_ref()), &["prompts"]),
        ("tolerance", at(raw.tolerance.as_ref()), &["prompts"]),
        ("service", at(raw.service.as_ref()), &["grpc"]),
        ("url", at(raw.url.as_ref()), &["webhook"]),
        ("token_file", at(raw.token_file.as_ref()), &["webhook"]),
    ];
    for (name, place, kinds) in table {
        if let Some(place) = place.filter(|_| !kinds.contains(&kind)) {
            let kinds = kinds.join("\" or \"");
            let message = format!("belongs to kind = \"{kinds}\": remove it");
            return Err(keys.text.error(place, keys.key(name), message));
        }
    }
    Ok(())
}

fn exec(keys: Keys<'_>, raw: &RawGate) -> Result<GateKind, ConfigError> {
    let Some(command) = &raw.command else {
        let message = "a program and its arguments, like [\"/etc/bgswitch/smoke\"]";
        return Err(keys.missing("command", message));
    };
    keys.command("command", command).map(GateKind::Exec)
}

/// What is asked for.
fn path(keys: Keys<'_>, raw: &RawGate) -> Result<String, ConfigError> {
    match &raw.path {
        Some(path) => keys.path("path", path),
        None => Err(keys.missing("path", "what to ask for, like \"/v2/health/ready\"")),
    }
}

fn http(keys: Keys<'_>, raw: &RawGate) -> Result<HttpGate, ConfigError> {
    let path = path(keys, raw)?;
    let json = raw.json.as_ref();
    if let Some(json) = json.filter(|json| !json.get_ref().starts_with('/')) {
        let message = format!(
            "`{}` is no JSON pointer, like \"/models/0/state\"",
            json.get_ref().escape_debug()
        );
        return Err(keys.wrong(json, "json", message));
    }
    let equals = match &raw.equals {
        None => None,
        Some(value) if raw.json.is_none() => {
            let message = "is only of use with json: add json = \"/models/0/state\"";
            return Err(keys.wrong(value, "equals", message));
        }
        Some(value) => {
            let message = "must be a string, a number or a boolean";
            let scalar = scalar(value.get_ref());
            Some(scalar.ok_or_else(|| keys.wrong(value, "equals", message))?)
        }
    };
    Ok(HttpGate {
        path,
        port: keys.number("port", raw.port.as_ref(), PORT)?,
        status: keys
            .number("status", raw.status.as_ref(), STATUS)?
            .unwrap_or(200),
        body: raw.body.as_ref().map(|body| body.get_ref().clone()),
        json: json.map(|json| json.get_ref().clone()),
        equals,
    })
}

fn load(keys: Keys<'_>, raw: &RawGate) -> Result<LoadGate, ConfigError> {
    let path = path(keys, raw)?;
    let Some(rate) = keys.number("rate", raw.rate.as_ref(), RATE)? else {
        return Err(keys.missing("rate", "requests a second, like 50"));
    };
    let Some(given) = &raw.duration else {
        return Err(keys.missing("duration", "how long requests are sent, like \"60s\""));
    };
    let key = keys.key("duration");
    let duration = duration(keys.text, Some(given), &key, SECOND, SECOND)?;
    if duration > LONGEST {
        let message = format!("`{}` is longer than 1h", given.get_ref());
        return Err(keys.wrong(given, "duration", message));
    }
    let usual = if raw.body.is_some() { "POST" } else { "GET" };
    let method = raw.method.as_ref();
    let method = method.map_or(Ok(usual.to_owned()), |method| keys.method("method", method))?;
    let load = LoadGate {
        method,
        path,
        port: keys.number("port", raw.port.as_ref(), PORT)?,
        headers: keys.headers("headers", raw.headers.as_ref())?,
        body: raw.body.as_ref().map(|body| body.get_ref().clone()),
        rate,
        duration,
        concurrency: keys
            .number("concurrency", raw.concurrency.as_ref(), CONCURRENCY)?
            .unwrap_or(64),
        p99: keys.latency("p99", raw.p99.as_ref())?,
        errors: keys.share("errors", raw.errors.as_ref())?,
        status: keys
            .number("status", raw.status.as_ref(), STATUS)?
            .unwrap_or(200),
    };
    if load.requests() < FEWEST {
        let message = format!(
            "makes {} requests with this rate, too few to judge by: at least {FEWEST}",
            load.requests()
        );
        return Err(keys.wrong(given, "duration", message));
    }
    Ok(load)
}

fn prompts(keys: Keys<'_>, raw: &RawGate) -> Result<PromptsGate, ConfigError> {
    let compare = keys.pointers("compare", raw.compare.as_ref())?;
    let runs = raw.noise_runs.as_ref().map(Spanned::span);
    let tolerance = raw.tolerance.as_ref().map(Spanned::span);
    for (name, place) in [("noise_runs", runs), ("tolerance", tolerance)] {
        if let Some(place) = place.filter(|_| compare.is_empty()) {
            let message = "is only of use with compare: add compare = [\"/choices/0/text\"]";
            return Err(keys.text.error(place.start, keys.key(name), message));
        }
    }
    Ok(PromptsGate {
        file: keys.file("file", raw.file.as_ref(), "/etc/bgswitch/golden.jsonl")?,
        port: keys.number("port", raw.port.as_ref(), PORT)?,
        headers: keys.headers("headers", raw.headers.as_ref())?,
        concurrency: keys
            .number("concurrency", raw.concurrency.as_ref(), CONCURRENCY)?
            .unwrap_or(4),
        max_ttft: keys.latency("max_ttft", raw.max_ttft.as_ref())?,
        max_total: keys.latency("max_total", raw.max_total.as_ref())?,
        compare,
        noise_runs: keys
            .number("noise_runs", raw.noise_runs.as_ref(), 0..=10)?
            .unwrap_or(2),
        tolerance: keys.share("tolerance", raw.tolerance.as_ref())?,
    })
}

fn webhook(keys: Keys<'_>, raw: &RawGate) -> Result<WebhookGate, ConfigError> {
    let Some(url) = &raw.url else {
        let message = "where to ask, like \"http://ci.example.com:8080/gate\"";
        return Err(keys.missing("url", message));
    };
    let given = url.get_ref();
    if !is_url(given) {
        let message = format!(
            "`{}` is no URL of plain HTTP, like \"http://ci.example.com:8080/gate\"; for https use kind = \
             \"exec\" with curl",
            given.escape_debug()
        );
        return Err(keys.wrong(url, "url", message));
    }
    let token_file = raw.token_file.as_ref();
    Ok(WebhookGate {
        url: given.clone(),
        token_file: token_file
            .map(|file| keys.file("token_file", Some(file), "/etc/bgswitch/token"))
            .transpose()?,
    })
}

/// True for where a server of plain HTTP is.
pub(super) fn is_url(given: &str) -> bool {
    let host = |uri: Uri| uri.host().is_some_and(|host| !host.is_empty());
    given.starts_with("http://")
        && !given.contains(['#', '@'])
        && given.parse::<Uri>().is_ok_and(host)
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
