use std::fmt::Write as _;

use clap::Args;

use super::{Common, service_path, warn};
use crate::{
    api::{self, Kind, Refusal, Status},
    config::Paths,
    journal::{Entry, Journal, Wanted},
    time,
};

const EXAMPLES: &str = "\
Examples:
  bgswitch history llm
  bgswitch history --since 2h --limit 5000
  bgswitch history --since 2026-11-21T15:00:00Z
  bgswitch history -o json | jq '.entries[] | select(.action == \"rollback\")'

Every change has two entries in the journal, its intent before and its result
after; an intent is shown here only where its result is missing. JSON has both,
and `more`: whether there are older ones. Reads the journal itself when the
daemon does not run.";

/// `bgswitch history [SERVICE]`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct History {
    /// Only this service, and what concerns all [default: everything].
    service: Option<String>,
    /// Read at most so many entries, the newest ones.
    #[arg(long, value_name = "N", default_value_t = 200)]
    limit: usize,
    /// Only what is not older: a duration like 2h, or a time like 2026-11-21T15:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = since)]
    since: Option<i64>,
}

/// How long ago, or when: milliseconds since 1970.
fn since(text: &str) -> Result<i64, String> {
    if let Some(time) = time::unix_ms_of(text) {
        return Ok(time);
    }
    let ago = humantime::parse_duration(text)
        .map_err(|_| "no duration like 2h, and no time like 2026-11-21T15:00:00Z".to_owned())?;
    let ago = i64::try_from(ago.as_millis()).unwrap_or(i64::MAX);
    Ok(time::unix_ms().saturating_sub(ago))
}

impl History {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let history = match common.get::<api::History>(&self.path()?) {
            // The journal is a file: it can be read without the daemon.
            Err(refusal) if refusal.kind == Kind::NoDaemon => {
                warn("the daemon does not run: this is what the journal says");
                let (paths, _) = Paths::salvage(&common.config);
                Journal::new(&paths.state_dir).last(&self.wanted())?.into()
            }
            answer => answer?,
        };
        if let Some(service) = &self.service
            && !history.entries.iter().any(|e| e.service == *service)
        {
            is_known(common, service)?;
        }
        common.print(&history, text)
    }

    fn wanted(&self) -> Wanted {
        Wanted {
            limit: self.limit,
            since_ms: self.since,
            service: self.service.clone(),
        }
    }

    fn path(&self) -> Result<String, Refusal> {
        let mut path = format!("/v1/history?limit={}", self.limit);
        if let Some(since) = self.since {
            let _ = write!(path, "&since={}", time::rfc3339_ms(since));
        }
        if let Some(service) = &self.service {
            service_path(service)?;
            let _ = write!(path, "&service={service}");
        }
        Ok(path)
    }
}

/// A service without entries may be new; or it is a slip of the pen.
fn is_known(common: &Common, service: &str) -> Result<(), Refusal> {
    match common.get::<Status>("/v1/status") {
        Ok(status) if !status.services.iter().any(|s| s.name == service) => {
            let known = status.services.iter().map(|s| s.name.as_str());
            Err(Refusal::unknown_service(service, known))
        }
        _ => Ok(()),
    }
}

fn text(history: &api::History) -> String {
    let mut out = String::new();
    if history.more {
        out.push_str("(older ones are not shown: --limit, --since)\n");
    }
    for (number, entry) in history.entries.iter().enumerate() {
        let same = |later: &&Entry| later.service == entry.service && later.action == entry.action;
        let next = history.entries[number + 1..].iter().find(same);
        if entry.phase == "intent" && next.is_some_and(|next| next.phase == "result") {
            continue;
        }
        let generation = match entry.service.as_str() {
            "*" => String::new(),
            _ => format!("generation {}", entry.generation),
        };
        let why = entry
            .why
            .as_ref()
            .map(|why| format!("  ({why})"))
            .unwrap_or_default();
        let _ = writeln!(
            out,
            "{}  {:<12} {:<10} {:<16} {:<7} {generation:<16} {}{why}",
            time::local_date(&entry.time),
            entry.actor,
            entry.service,
            entry.action,
            entry.phase,
            entry.detail
        );
    }
    out
}
