use std::io::{self, Write as _};

use clap::{Args, CommandFactory as _};
use clap_mangen::{
    Man as Page,
    roff::{Roff, roman},
};

use super::Arguments;

const EXAMPLES: &str = "\
Examples:
  bgswitch man > /usr/local/share/man/man8/bgswitch.8
  bgswitch man | man -l -";

/// `bgswitch man`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Man {}

/// One page for all commands, each with a section of its own.
pub(super) fn run() -> anyhow::Result<()> {
    let mut command = Arguments::command();
    command.build();
    let mut page = Vec::new();
    let whole = Page::new(command.clone()).section("8").manual("bgswitch");
    whole.render_title(&mut page)?;
    whole.render_name_section(&mut page)?;
    whole.render_synopsis_section(&mut page)?;
    whole.render_description_section(&mut page)?;
    whole.render_options_section(&mut page)?;
    for one in visible(&command) {
        section(&mut page, "bgswitch", one)?;
    }
    whole.render_extra_section(&mut page)?;
    let mut stdout = io::stdout();
    stdout.write_all(&page)?;
    Ok(stdout.flush()?)
}

fn visible(command: &clap::Command) -> impl Iterator<Item = &clap::Command> {
    let commands = command.get_subcommands();
    commands.filter(|command| !command.is_hide_set() && command.get_name() != "help")
}

/// A command with what it takes, and those below it.
fn section(page: &mut Vec<u8>, above: &str, command: &clap::Command) -> io::Result<()> {
    let name = format!("{above} {}", command.get_name());
    let mut head = Roff::new();
    head.control("SH", [name.to_uppercase().as_str()]);
    head.text([roman(
        command
            .get_about()
            .map(ToString::to_string)
            .unwrap_or_default(),
    )]);
    head.control("PP", []);
    head.to_writer(page)?;
    // What is the same everywhere is told once.
    let own = command.clone().mut_args(|argument| {
        let global = argument.is_global_set();
        argument.hide(global)
    });
    let of = Page::new(own);
    let mut body = Vec::new();
    of.render_synopsis_section(&mut body)?;
    of.render_options_section(&mut body)?;
    of.render_extra_section(&mut body)?;
    // Its sections are below this one.
    let body = String::from_utf8_lossy(&body).replace("\n.SH ", "\n.SS ");
    let body = body
        .strip_prefix(".SH ")
        .map_or(body.clone(), |rest| format!(".SS {rest}"));
    page.write_all(body.as_bytes())?;
    for one in visible(command) {
        section(page, &name, one)?;
    }
    Ok(())
}
