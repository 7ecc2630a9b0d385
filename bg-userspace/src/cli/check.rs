use std::{fmt::Write as _, path::PathBuf};

use clap::Args;
use serde::Serialize;

use super::Common;
use crate::{api::SCHEMA, config::Config, golden::unread_files};

const NOTE: &str = "\
Every error names the file, the line, the key and what would be right. Exit code
2 when the file is wrong, or a file of prompts that it names. Interfaces and files
that this host lacks are only noted: the file may be for another one.";

/// So many services are named.
const NAMED: usize = 20;

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
    unread_files: Vec<String>,
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
        let unread_files = unread_files(&config)?;
        common.print(
            &Checked {
                schema: SCHEMA,
                file,
                services,
                missing_interfaces,
                unread_files,
            },
            |checked| {
                let named = checked.services.len().min(NAMED);
                let mut text = format!(
                    "{} is valid: services {}",
                    checked.file.display(),
                    checked.services[..named].join(", ")
                );
                if checked.services.len() > named {
                    let _ = write!(text, " and {} more", checked.services.len() - named);
                }
                text.push('\n');
                for interface in &checked.missing_interfaces {
                    let _ = writeln!(
                        text,
                        "note: there is no interface {interface} on this host; `run` needs it"
                    );
                }
                for trouble in &checked.unread_files {
                    let _ = writeln!(text, "note: {trouble}; its gate needs it");
                }
                text
            },
        )
    }
}
