//! What gates look at.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

/// A check that the standby must pass before a flip.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GatePlan {
    /// Its name, one of a kind in its service.
    pub name: String,
    /// How long it may take, whole seconds.
    pub timeout: Duration,
    /// What is looked at.
    pub kind: GateKind,
}

/// What a gate looks at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GateKind {
    /// A command: program and arguments.
    Exec(Vec<String>),
    /// An HTTP request to each backend.
    Http(HttpGate),
    /// Many HTTP requests, at a rate.
    Load(LoadGate),
    /// Known questions, and what the answers must be.
    Prompts(PromptsGate),
    /// The standard health service of gRPC.
    Grpc(GrpcGate),
    /// A service of the operator's, which says it.
    Webhook(WebhookGate),
    /// Both colours, and where they must be the same.
    Parity(ParityGate),
    /// Questions that make the standby warm.
    Warm(WarmGate),
}

impl GateKind {
    /// As the configuration has it.
    pub const fn as_str(&self) -> &'static str {
        match self {
            Self::Exec(_) => "exec",
            Self::Http(_) => "http",
            Self::Load(_) => "load",
            Self::Prompts(_) => "prompts",
            Self::Grpc(_) => "grpc",
            Self::Webhook(_) => "webhook",
            Self::Parity(_) => "parity",
            Self::Warm(_) => "warm",
        }
    }
}

impl fmt::Display for GateKind {
    /// All that it says, in a line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exec(words) => write!(f, "{words:?}"),
            Self::Http(http) => http.fmt(f),
            Self::Load(load) => load.fmt(f),
            Self::Prompts(prompts) => prompts.fmt(f),
            Self::Grpc(grpc) => {
                write!(f, "service {:?}", grpc.service)?;
                port(f, grpc.port)
            }
            Self::Webhook(webhook) => webhook.fmt(f),
            Self::Parity(parity) => parity.fmt(f),
            Self::Warm(warm) => warm.fmt(f),
        }
    }
}

impl GateKind {
    /// The file of prompts that it reads when it runs.
    pub fn prompts(&self) -> Option<&Path> {
        match self {
            Self::Prompts(prompts) => Some(&prompts.file),
            Self::Warm(warm) => Some(&warm.file),
            _ => None,
        }
    }
}

fn port(f: &mut fmt::Formatter<'_>, port: Option<u16>) -> fmt::Result {
    match port {
        Some(port) => write!(f, " port {port}"),
        None => Ok(()),
    }
}

/// Names only: their values may be secrets.
fn headers(f: &mut fmt::Formatter<'_>, headers: &BTreeMap<String, String>) -> fmt::Result {
    if headers.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = headers.keys().map(String::as_str).collect();
    write!(f, " headers {}", names.join(", "))
}

/// A GET, and what the answer must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpGate {
    /// Path and query.
    pub path: String,
    /// Port; `None`: the backend's, or that of the first TCP listener it serves.
    pub port: Option<u16>,
    /// Status code.
    pub status: u16,
    /// What the body must contain.
    pub body: Option<String>,
    /// A place in the body (RFC 6901), which must be there.
    pub json: Option<String>,
    /// What must be there: a string, a number or a boolean.
    pub equals: Option<serde_json::Value>,
}

impl fmt::Display for HttpGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} status {}", self.path, self.status)?;
        port(f, self.port)?;
        if let Some(body) = &self.body {
            write!(f, " body {body:?}")?;
        }
        if let Some(json) = &self.json {
            write!(f, " json {json}")?;
        }
        if let Some(equals) = &self.equals {
            write!(f, " equals {equals}")?;
        }
        Ok(())
    }
}

/// Requests at a rate that waits for nobody, and what the answers must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoadGate {
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// Port; `None`: the backend's, or that of the first TCP listener it serves.
    pub port: Option<u16>,
    /// Further headers.
    pub headers: BTreeMap<String, String>,
    /// What is sent.
    pub body: Option<String>,
    /// Requests a second, over all backends.
    pub rate: u32,
    /// How long they are sent, whole seconds.
    pub duration: Duration,
    /// Requests under way at a time, at most.
    pub concurrency: u32,
    /// 99 % of the answers must not take longer.
    pub p99: Option<Duration>,
    /// So many requests may go wrong.
    pub errors: Share,
    /// Status code.
    pub status: u16,
}

impl LoadGate {
    /// Requests in all.
    pub fn requests(&self) -> u64 {
        u64::from(self.rate).saturating_mul(self.duration.as_secs())
    }
}

impl fmt::Display for LoadGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let duration = humantime::format_duration(self.duration);
        write!(
            f,
            "{} {} rate {} duration {duration} concurrency {} status {} errors {}",
            self.method, self.path, self.rate, self.concurrency, self.status, self.errors
        )?;
        if let Some(p99) = self.p99 {
            write!(f, " p99 {}", humantime::format_duration(p99))?;
        }
        port(f, self.port)?;
        headers(f, &self.headers)?;
        match &self.body {
            Some(body) => write!(f, " body of {} bytes", body.len()),
            None => Ok(()),
        }
    }
}

/// A file of prompts, and what the answers must be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptsGate {
    /// The file: JSON lines.
    pub file: PathBuf,
    /// Port; `None`: the backend's, or that of the first TCP listener it serves.
    pub port: Option<u16>,
    /// Further headers.
    pub headers: BTreeMap<String, String>,
    /// Prompts under way at a time.
    pub concurrency: u32,
    /// Until the first byte of an answer's body.
    pub max_ttft: Option<Duration>,
    /// Until its last one.
    pub max_total: Option<Duration>,
    /// Places (RFC 6901) where the active colour must answer the same.
    pub compare: Vec<String>,
    /// How often more the active colour is asked, to know how it disagrees with itself.
    pub noise_runs: u32,
    /// So many prompts may differ beyond that.
    pub tolerance: Share,
}

impl fmt::Display for PromptsGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} concurrency {}",
            self.file.display(),
            self.concurrency
        )?;
        for (name, time) in [("max_ttft", self.max_ttft), ("max_total", self.max_total)] {
            if let Some(time) = time {
                write!(f, " {name} {}", humantime::format_duration(time))?;
            }
        }
        if !self.compare.is_empty() {
            let places = self.compare.join(", ");
            let (runs, tolerance) = (self.noise_runs, self.tolerance);
            write!(
                f,
                " compare {places} noise_runs {runs} tolerance {tolerance}"
            )?;
        }
        port(f, self.port)?;
        headers(f, &self.headers)
    }
}

/// The standard health service of gRPC.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrpcGate {
    /// The service that is asked for; empty: the server as a whole.
    pub service: String,
    /// Port; `None`: the backend's, or that of the first TCP listener it serves.
    pub port: Option<u16>,
}

/// A service of the operator's, over HTTP without TLS.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WebhookGate {
    /// Where it is: `http://HOST:PORT/PATH`.
    pub url: String,
    /// A file with the bearer token, read for each request.
    pub token_file: Option<PathBuf>,
}

impl WebhookGate {
    /// The host and port, and path and query.
    pub fn parts(&self) -> (String, &str) {
        let rest = self.url.strip_prefix("http://").unwrap_or(&self.url);
        let (host, path) = match rest.find('/') {
            Some(at) => rest.split_at(at),
            None => (rest, "/"),
        };
        let has_port = host.rsplit_once(':').is_some_and(|(_, port)| {
            !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit())
        });
        if has_port {
            (host.to_owned(), path)
        } else {
            (format!("{host}:80"), path)
        }
    }
}

impl fmt::Display for WebhookGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)?;
        match &self.token_file {
            Some(file) => write!(f, " token_file {}", file.display()),
            None => Ok(()),
        }
    }
}

/// Where both colours must be the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParityGate {
    /// Paths that are asked for.
    pub compare: Vec<String>,
    /// Headers of the answers.
    pub headers: Vec<String>,
    /// A command that is run for each colour: program and arguments.
    pub command: Option<Vec<String>>,
    /// Places that may differ; `*` is any one step.
    pub allow: Vec<String>,
    /// Port; `None`: the backend's, or that of the first TCP listener it serves.
    pub port: Option<u16>,
}

impl fmt::Display for ParityGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "compare [{}]", self.compare.join(", "))?;
        for (name, list) in [("headers", &self.headers), ("allow", &self.allow)] {
            if !list.is_empty() {
                write!(f, " {name} [{}]", list.join(", "))?;
            }
        }
        if let Some(command) = &self.command {
            write!(f, " command {command:?}")?;
        }
        port(f, self.port)
    }
}

/// A file of prompts that each backend of the standby is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmGate {
    /// The file: JSON lines.
    pub file: PathBuf,
    /// Port; `None`: the backend's, or that of the first TCP listener it serves.
    pub port: Option<u16>,
    /// Further headers.
    pub headers: BTreeMap<String, String>,
    /// Prompts under way at a time.
    pub concurrency: u32,
    /// How often each is asked.
    pub repeat: u32,
}

impl fmt::Display for WarmGate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (file, concurrency, repeat) = (self.file.display(), self.concurrency, self.repeat);
        write!(f, "{file} concurrency {concurrency} repeat {repeat}")?;
        port(f, self.port)?;
        headers(f, &self.headers)
    }
}

/// A share, in millionths.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share(pub u32);

impl Share {
    /// In per cent.
    pub fn percent(self) -> f64 {
        f64::from(self.0) / 10_000.0
    }

    /// Whether `part` is more than this share of `whole`.
    pub const fn is_exceeded(self, part: u64, whole: u64) -> bool {
        part as u128 * 1_000_000 > whole as u128 * self.0 as u128
    }
}

impl fmt::Display for Share {
    /// In per cent.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} %", self.percent())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_has_a_port_and_a_path_whether_it_says_so_or_not() {
        for (url, host, path) in [
            ("http://a.example", "a.example:80", "/"),
            ("http://a.example:8080/x?y=1", "a.example:8080", "/x?y=1"),
            ("http://[2001:db8::1]/x", "[2001:db8::1]:80", "/x"),
            ("http://[2001:db8::1]:81", "[2001:db8::1]:81", "/"),
        ] {
            let webhook = WebhookGate {
                url: url.to_owned(),
                token_file: None,
            };
            assert_eq!(webhook.parts(), (host.to_owned(), path));
        }
    }

    #[test]
    fn a_share_is_exceeded_by_one_more_and_shown_in_per_cent() {
        let one_percent = Share(10_000);
        assert!(!one_percent.is_exceeded(10, 1000));
        assert!(one_percent.is_exceeded(11, 1000));
        assert!(!Share(0).is_exceeded(0, 0));
        assert!(Share(0).is_exceeded(1, u64::MAX));
        assert_eq!(one_percent.to_string(), "1 %");
        assert_eq!(Share(500).to_string(), "0.05 %");
    }
}
