use std::fmt::Write as _;

use clap::Args;

use super::{Common, warn};
use crate::{
    api::{self, Kind, Refusal, SCHEMA, Status},
    config::Paths,
    journal::{Entry, Journal},
    time,
};

const EXAMPLES: &str = "\
Examples:
  bgswitch history llm
  bgswitch history -o json | jq '.entries[] | select(.action == \"rollback\")'

Every change has two entries in the journal, its intent before and its result
after; an intent is shown here only where its result is missing. JSON has both.
Reads the journal itself when the daemon does not run.";

/// `bgswitch history [SERVICE]`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct History {
    /// Only this service, and what concerns all [default: everything].
    service: Option<String>,
}

impl History {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let mut history = match common.get::<api::History>("/v1/history") {
            // The journal is a file: it can be read without the daemon.
            Err(refusal) if refusal.kind == Kind::NoDaemon => {
                warn("the daemon does not run: this is what the journal says");
                let (paths, _) = Paths::salvage(&common.config);
                api::History {
                    schema: SCHEMA,
                    entries: Journal::new(&paths.state_dir).read()?,
                }
            }
            answer => answer?,
        };
        if let Some(service) = &self.service {
            if !history
                .entries
                .iter()
                .any(|entry| entry.service == *service)
            {
                is_known(common, service)?;
            }
            history
                .entries
                .retain(|entry| entry.service == *service || entry.service == "*");
        }
        common.print(&history, text)
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
