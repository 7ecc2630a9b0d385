use std::{fmt::Write as _, io::IsTerminal as _};

use clap::Args;

use super::Common;
use crate::{
    api::{Kind, Refusal},
    doctor::{self, Found, Report},
};

const NOTE: &str = "\
Looks at the kernel, at what this user may do, at the BPF file system, each interface
of the configuration, the host's settings, listeners' addresses, and the daemon.
Changes nothing, and needs neither root nor a daemon: what it cannot see it says.

ok: as it should be. note: it works, but look. trouble: it keeps the packet path from
working, or packets from arriving; under it is the command that mends it. unseen: only
root, or a newer kernel, could tell. Exit code 0 without trouble, otherwise 1.

  bgswitch doctor -o json | jq -r '.findings[] | select(.found == \"trouble\") | .mends'";

/// `bgswitch doctor`.
#[derive(Debug, Args)]
#[command(after_help = NOTE)]
pub(super) struct Doctor {
    /// Show only what is not as it should be.
    #[arg(long)]
    quiet: bool,
}

impl Doctor {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let mut report = doctor::look(&common.config, common.socket.as_deref(), common.timeout);
        if self.quiet {
            report.findings.retain(|finding| finding.found != Found::Ok);
        }
        let colours = std::io::stdout().is_terminal();
        common.print(&report, |report| text(report, colours))?;
        if report.well {
            return Ok(());
        }
        let is_trouble = |found: &&doctor::Finding| found.found == Found::Trouble;
        let count = report.findings.iter().filter(is_trouble).count();
        let things = if count == 1 { "thing is" } else { "things are" };
        let message = format!("{count} {things} in the way of the packet path");
        Err(Refusal::new(Kind::Failed, message).into())
    }
}

fn text(report: &Report, colours: bool) -> String {
    let mut out = String::new();
    for finding in &report.findings {
        let found = format!("{:<8}", finding.found.as_str());
        let code = match finding.found {
            _ if !colours => None,
            Found::Ok => Some(32),
            Found::Note => Some(33),
            Found::Trouble => Some(31),
            Found::Unseen => Some(90),
        };
        let found = code.map_or(found.clone(), |code| format!("\x1b[{code}m{found}\x1b[0m"));
        let _ = writeln!(out, "{found} {:<14} {}", finding.about, finding.message);
        if let Some(mends) = &finding.mends {
            let _ = writeln!(out, "{:<23} {mends}", "");
        }
    }
    out
}
