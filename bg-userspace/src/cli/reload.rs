use std::fmt::Write as _;

use clap::Args;

use super::{Common, warn};
use crate::api::Reloaded;

const NOTE: &str = "\
The daemon reads the file that it was started with. [gateway] is read at its
start only. SIGHUP does the same.";

/// `bgswitch reload`.
#[derive(Debug, Args)]
#[command(after_help = NOTE)]
pub(super) struct Reload {
    /// Show the difference, change nothing.
    #[arg(long)]
    dry_run: bool,
}

impl Reload {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let reloaded: Reloaded =
            common.post(&format!("/v1/reload?dry_run={}", self.dry_run), &())?;
        for warning in &reloaded.warnings {
            warn(warning);
        }
        common.print(&reloaded, |reloaded| {
            let mut text = match (reloaded.changes.is_empty(), reloaded.dry_run) {
                (true, _) => "nothing to change\n".to_owned(),
                (false, true) => "would change (dry run):\n".to_owned(),
                (false, false) => "changed:\n".to_owned(),
            };
            for change in &reloaded.changes {
                let _ = writeln!(text, "  {change}");
            }
            text
        })
    }
}
