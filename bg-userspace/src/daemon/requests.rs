//! From the parts of an HTTP request to what is asked for. What they say comes from
//! whoever may open the socket, and may be anything.

use axum::{
    extract::{Query, rejection::QueryRejection},
    http::{HeaderMap, header},
};
use bg_common::reason::Reason;
use serde::{Deserialize, de::DeserializeOwned};

use crate::{
    api::{DEADLINE, Kind, Refusal},
    journal::Wanted,
    time,
};

/// Entries of `GET /v1/history` without a `limit`.
const HISTORY_ENTRIES: usize = 1000;

/// Decodes a body; without one, everything is at its default.
pub fn body<T: DeserializeOwned + Default>(bytes: &[u8]) -> Result<T, Refusal> {
    if bytes.is_empty() {
        return Ok(T::default());
    }
    let refused = |trouble: &dyn std::fmt::Display| {
        Err(Refusal::new(Kind::Usage, format!("the body: {trouble}")))
    };
    // Serde would take the fields from an array, too.
    if bytes.trim_ascii_start().first() != Some(&b'{') {
        return refused(&"it must be a JSON object");
    }
    serde_json::from_slice(bytes).or_else(|error| refused(&error))
}

/// Takes the generation of an `If-Match` (what GET gave as `ETag`) into the
/// request. True when there is one.
pub fn condition(headers: &HeaderMap, if_generation: &mut Option<u16>) -> Result<bool, Refusal> {
    let Some(value) = headers.get(header::IF_MATCH) else {
        return Ok(false);
    };
    let text = value.to_str().unwrap_or_default().trim();
    if text == "*" {
        return Ok(false);
    }
    let generation = text
        .strip_prefix('"')
        .and_then(|text| text.strip_suffix('"')?.parse().ok())
        .filter(|generation| if_generation.is_none_or(|other| other == *generation));
    match generation {
        None => {
            let message = "If-Match must be one ETag, like \"17\", and agree with if_generation";
            Err(Refusal::new(Kind::Usage, message))
        }
        generation => {
            *if_generation = generation;
            Ok(true)
        }
    }
}

/// When the request is void, if it says so: see [`DEADLINE`].
pub fn deadline(headers: &HeaderMap) -> Option<u64> {
    headers.get(DEADLINE)?.to_str().ok()?.parse().ok()
}

/// The decoded query, or a refusal that says what is wrong with it.
pub fn query<T>(query: Result<Query<T>, QueryRejection>) -> Result<T, Refusal> {
    query
        .map(|Query(query)| query)
        .map_err(|error| Refusal::new(Kind::Usage, error.body_text()))
}

/// The query of `GET .../flows`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct FlowsQuery {
    /// Of this colour only.
    pub colour: Option<String>,
    /// Lines at most.
    pub limit: Option<usize>,
    /// Half-open and closing ones, too.
    #[serde(default)]
    pub all: bool,
}

/// The query of `POST /v1/reload`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ReloadQuery {
    /// Say what would change, change nothing.
    #[serde(default)]
    pub dry_run: bool,
}

/// The query of `GET /v1/history`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct HistoryQuery {
    /// Entries at most, the newest ones: 1000 if absent.
    pub limit: Option<usize>,
    /// Not older than this, RFC 3339.
    pub since: Option<String>,
    /// Of this service only, and what concerns all.
    pub service: Option<String>,
}

impl HistoryQuery {
    /// Which entries are asked for.
    pub fn wanted(self) -> Result<Wanted, Refusal> {
        let since_ms = self.since.map(|since| {
            let wrong = || format!("since: `{}` is no RFC 3339 time", since.escape_debug());
            time::unix_ms_of(&since).ok_or_else(|| Refusal::new(Kind::Usage, wrong()))
        });
        Ok(Wanted {
            limit: self.limit.unwrap_or(HISTORY_ENTRIES),
            since_ms: since_ms.transpose()?,
            service: self.service,
        })
    }
}

/// The query of `GET /v1/events`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct EventsQuery {
    /// Of this service only, and what concerns all.
    pub service: Option<String>,
}

/// The query of `GET /v1/monitor`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MonitorQuery {
    /// Names of reasons, with commas between them.
    pub reason: Option<String>,
    /// Of this service only.
    pub service: Option<String>,
    /// One packet of how many.
    pub sample: Option<u32>,
}

/// Bits of the reasons with these names.
pub fn reasons(names: &str) -> Result<u64, Refusal> {
    let bit = |name: &str| {
        let reason = Reason::ALL.iter().find(|reason| reason.as_str() == name);
        reason.map(|reason| 1u64 << *reason as u32).ok_or_else(|| {
            let known: Vec<&str> = Reason::ALL.iter().map(|reason| reason.as_str()).collect();
            let message = format!("there is no reason `{name}`, only: {}", known.join(", "));
            Refusal::new(Kind::Usage, message)
        })
    };
    names
        .split(',')
        .try_fold(0, |bits, name| Ok(bits | bit(name)?))
}

/// The query of `GET /v1/explain`.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct ExplainQuery {
    /// `tcp` or `udp`.
    pub protocol: String,
    /// The client's address and port.
    pub client: String,
    /// The listener's address and port.
    pub listener: String,
}
