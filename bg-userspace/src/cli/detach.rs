use std::path::PathBuf;

use clap::Args;
use nix::unistd::Uid;
use serde::Serialize;

use super::{Common, warn};
use crate::{
    api::SCHEMA,
    config::Paths,
    datapath,
    journal::{Entry, Journal, actor},
    state::State,
};

const NOTE: &str = "\
Refused while a daemon runs: stop it first. Afterwards packets for the services
go where the host's own stack sends them, and no flow is remembered.";

/// `bgswitch detach`.
#[derive(Debug, Args)]
#[command(after_help = NOTE)]
pub(super) struct Detach {
    /// Why, for the journal.
    #[arg(short, long = "message", value_name = "WHY")]
    message: Option<String>,
}

#[derive(Serialize)]
struct Detached {
    schema: u32,
    removed: Vec<PathBuf>,
}

impl Detach {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let paths = Paths::load(&common.config)?;
        let removed = datapath::detach(&paths.bpffs)?;
        if !removed.is_empty() {
            let detail = format!("{} pins removed, nothing is forwarded", removed.len());
            let entry = Entry {
                why: self.message,
                ..Entry::new(&actor(Uid::current()), "*", "detach", "result", 0, detail)
            };
            let mut state = State::load(&paths.state_dir);
            state.keep([].into());
            for written in [Journal::new(&paths.state_dir).append(&entry), state.save()] {
                if let Err(error) = written {
                    warn(&error.to_string());
                }
            }
        }
        let schema = SCHEMA;
        common.print(&Detached { schema, removed }, |detached| {
            match detached.removed.len() {
                0 => "nothing was attached\n".to_owned(),
                pins => format!("detached: {pins} pins removed, nothing is forwarded any more\n"),
            }
        })
    }
}
