//! Gates, written as a configuration has them.

use std::{
    collections::BTreeMap,
    fmt::{Display, Write as _},
    path::Path,
    time::Duration,
};

use bg_userspace::config::{
    GateKind, HttpGate, LoadGate, ParityGate, PromptsGate, Share, WarmGate,
};

use super::{list, quoted};

/// Writes the keys of a gate's kind.
pub(super) fn written(text: &mut String, kind: &GateKind) {
    match kind {
        GateKind::Exec(words) => key(text, "command", &list(words)),
        GateKind::Http(of) => http(text, of),
        GateKind::Load(of) => load(text, of),
        GateKind::Prompts(of) => prompts(text, of),
        GateKind::Grpc(of) => {
            key(text, "service", &quoted(&of.service));
            maybe(text, "port", of.port);
        }
        GateKind::Webhook(of) => {
            key(text, "url", &quoted(&of.url));
            let token = of.token_file.as_ref();
            maybe(
                text,
                "token_file",
                token.map(|file| quoted(file.to_str().unwrap_or_default())),
            );
        }
        GateKind::Parity(of) => parity(text, of),
        GateKind::Warm(of) => warm(text, of),
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
    headers(text, &load.headers);
    maybe(text, "body", load.body.as_ref().map(|body| quoted(body)));
    key(text, "rate", &load.rate);
    key(text, "duration", &duration(load.duration));
    key(text, "concurrency", &load.concurrency);
    maybe(text, "p99", load.p99.map(duration));
    key(text, "errors", &share(load.errors));
    key(text, "status", &load.status);
}

fn headers(text: &mut String, headers: &BTreeMap<String, String>) {
    let headers = headers.iter();
    let headers = headers.map(|(name, value)| format!("{} = {}", quoted(name), quoted(value)));
    let headers: Vec<String> = headers.collect();
    key(text, "headers", &format!("{{ {} }}", headers.join(", ")));
}

fn file(text: &mut String, file: &Path) {
    key(text, "file", &quoted(file.to_str().unwrap_or_default()));
}

fn prompts(text: &mut String, prompts: &PromptsGate) {
    file(text, &prompts.file);
    maybe(text, "port", prompts.port);
    headers(text, &prompts.headers);
    key(text, "concurrency", &prompts.concurrency);
    maybe(text, "max_ttft", prompts.max_ttft.map(duration));
    maybe(text, "max_total", prompts.max_total.map(duration));
    if !prompts.compare.is_empty() {
        key(text, "compare", &list(&prompts.compare));
        key(text, "noise_runs", &prompts.noise_runs);
        key(text, "tolerance", &share(prompts.tolerance));
    }
}

fn parity(text: &mut String, parity: &ParityGate) {
    key(text, "compare", &list(&parity.compare));
    key(text, "headers", &list(&parity.headers));
    maybe(
        text,
        "command",
        parity.command.as_ref().map(|words| list(words)),
    );
    key(text, "allow", &list(&parity.allow));
    maybe(text, "port", parity.port);
}

fn warm(text: &mut String, warm: &WarmGate) {
    file(text, &warm.file);
    maybe(text, "port", warm.port);
    headers(text, &warm.headers);
    key(text, "concurrency", &warm.concurrency);
    key(text, "repeat", &warm.repeat);
}
