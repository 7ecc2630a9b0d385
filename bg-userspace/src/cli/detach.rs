use std::{fmt::Write as _, net::IpAddr, path::PathBuf};

use clap::Args;
use nix::unistd::Uid;
use serde::Serialize;

use super::{Common, warn};
use crate::{
    api::SCHEMA,
    config::Paths,
    datapath::{self, Detached as Removed},
    journal::{Entry, Journal, actor},
    state::State,
};

const NOTE: &str = "\
Refused while a daemon runs: stop it first. Afterwards packets for the services
go where the host's own stack sends them, and no flow is remembered. Announced
addresses leave their interfaces, but for those that somebody else put there.";

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
    addresses: Vec<IpAddr>,
}

impl Detach {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let paths = Paths::load(&common.config)?;
        let mut state = State::load(&paths.state_dir);
        let Removed { addresses, pins } = datapath::detach(&paths.bpffs, &state.announced)?;
        if !pins.is_empty() || !addresses.is_empty() {
            let detail = format!("{} pins removed, nothing is forwarded", pins.len());
            let entry = Entry {
                why: self.message,
                ..Entry::new(&actor(Uid::current()), "*", "detach", "result", 0, detail)
            };
            state.detached();
            for written in [Journal::new(&paths.state_dir).append(&entry), state.save()] {
                if let Err(error) = written {
                    warn(&error.to_string());
                }
            }
        }
        let detached = Detached {
            schema: SCHEMA,
            removed: pins,
            addresses,
        };
        common.print(&detached, |detached| {
            let mut text = match detached.removed.len() {
                0 => "nothing was attached\n".to_owned(),
                pins => format!("detached: {pins} pins removed, nothing is forwarded any more\n"),
            };
            for address in &detached.addresses {
                let _ = writeln!(text, "{address} is announced no more");
            }
            text
        })
    }
}
