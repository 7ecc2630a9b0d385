use std::{fmt::Write as _, path::PathBuf};

use clap::Args;
use serde::Serialize;

use super::Common;
use crate::{api::SCHEMA, config::Config};

const NOTE: &str = "\
Every error names the file, the line, the key and what would be right. Exit code
2 when the file is wrong. Interfaces that this host lacks are only noted: the
file may be for another one.";

/// `bgswitch check FILE`.
#[derive(Debug, Args)]
#[command(after_help = NOTE)]
pub(super) struct Check {
    /// The file [default: the one of --config].
    file: Option<PathBuf>,
}

#[derive(Serialize)]
struct Checked {
    schema: u32,
    file: PathBuf,
    services: Vec<String>,
    missing_interfaces: Vec<String>,
}

impl Check {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let file = self.file.unwrap_or_else(|| common.config.clone());
        let config = Config::load(&file)?;
        let missing = |name: &&String| nix::net::if_::if_nametoindex(name.as_str()).is_err();
        let missing_interfaces = config
            .gateway
            .interfaces
            .iter()
            .filter(missing)
            .cloned()
            .collect();
        let services = config.services.keys().cloned().collect();
        common.print(
            &Checked {
                schema: SCHEMA,
                file,
                services,
                missing_interfaces,
            },
            |checked| {
                let mut text = format!(
                    "{} is valid: services {}\n",
                    checked.file.display(),
                    checked.services.join(", ")
                );
                for interface in &checked.missing_interfaces {
                    let _ = writeln!(
                        text,
                        "note: there is no interface {interface} on this host; `run` needs it"
                    );
                }
                text
            },
        )
    }
}
