use std::io::{self, Write as _};

use clap::{Args, CommandFactory as _};
use clap_complete::{Shell, generate};

use super::Arguments;

const EXAMPLES: &str = "\
Examples:
  bgswitch completions bash > /usr/share/bash-completion/completions/bgswitch
  bgswitch completions zsh > /usr/share/zsh/site-functions/_bgswitch
  bgswitch completions fish > /usr/share/fish/vendor_completions.d/bgswitch.fish";

/// `bgswitch completions SHELL`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Completions {
    /// The shell.
    shell: Shell,
}

impl Completions {
    pub(super) fn run(self) -> anyhow::Result<()> {
        let mut script = Vec::new();
        generate(
            self.shell,
            &mut Arguments::command(),
            "bgswitch",
            &mut script,
        );
        let mut stdout = io::stdout();
        stdout.write_all(&script)?;
        Ok(stdout.flush()?)
    }
}
