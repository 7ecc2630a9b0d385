use std::{fmt::Write as _, path::PathBuf};

use clap::Args;
use serde::Serialize;

use super::{Common, config_of};
use crate::api::SCHEMA;

/// `bgswitch check FILE`.
#[derive(Debug, Args)]
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
        let config = config_of(&file)?;
        let there = |name: &String| nix::net::if_::if_nametoindex(name.as_str()).is_err();
        let missing_interfaces = config
            .gateway
            .interfaces
            .iter()
            .filter(|name| there(name))
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
