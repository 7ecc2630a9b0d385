//! Gates, written as a configuration has them.

use std::{
    fmt::{Display, Write as _},
    time::Duration,
};

use bg_userspace::config::{GateKind, HttpGate, LoadGate, Share};

use super::{list, quoted};

/// Writes the keys of a gate's kind.
pub(super) fn written(text: &mut String, kind: &GateKind) {
    match kind {
        GateKind::Exec(words) => key(text, "command", &list(words)),
        GateKind::Http(of) => http(text, of),
        GateKind::Load(of) => load(text, of),
    }
}

fn key(text: &mut String, name: &str, value: &impl Display) {
    let _ = writeln!(text, "{name} = {value}");
}

fn maybe<T: Display>(text: &mut String, name: &str, value: Option<T>) {
    if let Some(value) = value {
        key(text, name, &value);
    }
}

fn share(of: Share) -> f64 {
    f64::from(of.0) / 1_000_000.0
}

fn duration(of: Duration) -> String {
    format!("\"{}ns\"", of.as_nanos())
}

fn http(text: &mut String, http: &HttpGate) {
    key(text, "path", &quoted(&http.path));
    key(text, "status", &http.status);
    maybe(text, "port", http.port);
    maybe(text, "body", http.body.as_ref().map(|body| quoted(body)));
    maybe(text, "json", http.json.as_ref().map(|json| quoted(json)));
    let equals = http.equals.as_ref().map(|value| match value.as_str() {
        Some(text) => quoted(text),
        None => value.to_string(),
    });
    maybe(text, "equals", equals);
}

fn load(text: &mut String, load: &LoadGate) {
    key(text, "method", &quoted(&load.method));
    key(text, "path", &quoted(&load.path));
    maybe(text, "port", load.port);
    let headers = load.headers.iter();
    let headers = headers.map(|(name, value)| format!("{} = {}", quoted(name), quoted(value)));
    let headers: Vec<String> = headers.collect();
    key(text, "headers", &format!("{{ {} }}", headers.join(", ")));
    maybe(text, "body", load.body.as_ref().map(|body| quoted(body)));
    key(text, "rate", &load.rate);
    key(text, "duration", &duration(load.duration));
    key(text, "concurrency", &load.concurrency);
    maybe(text, "p99", load.p99.map(duration));
    key(text, "errors", &share(load.errors));
    key(text, "status", &load.status);
}
