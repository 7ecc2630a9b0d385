use std::fmt::Write as _;

use clap::Args;

use super::{Common, config_of};
use crate::{
    api::{self, SCHEMA, exit},
    journal::Journal,
};

/// `bgswitch history [SERVICE]`.
#[derive(Debug, Args)]
pub(super) struct History {
    /// Only this service.
    service: Option<String>,
}

impl History {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let mut history = match common.get::<api::History>("/v1/history") {
            // The journal is a file: it can be read without the daemon.
            Err(refusal) if refusal.code == exit::NO_DAEMON => {
                let journal = Journal::new(&config_of(&common.config)?.gateway.state_dir);
                api::History {
                    schema: SCHEMA,
                    entries: journal.read()?,
                }
            }
            answer => answer?,
        };
        if let Some(service) = &self.service {
            history
                .entries
                .retain(|entry| entry.service == *service || entry.service == "*");
        }
        common.print(&history, |history| {
            let mut out = String::new();
            for entry in &history.entries {
                let why = entry
                    .why
                    .as_ref()
                    .map(|why| format!("  ({why})"))
                    .unwrap_or_default();
                let _ = writeln!(
                    out,
                    "{}  {:<12} {:<10} {:<16} {:<7} generation {:<5} {}{why}",
                    entry.time,
                    entry.actor,
                    entry.service,
                    entry.action,
                    entry.phase,
                    entry.generation,
                    entry.detail
                );
            }
            out
        })
    }
}
