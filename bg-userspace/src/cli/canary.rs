use std::fmt::Write as _;

use clap::Args;

use super::{
    Common, service_path,
    text::{flows, measured, percent, verb},
    warn,
};
use crate::api::{Canaried, CanaryRequest};

const EXAMPLES: &str = "\
Examples:
  bgswitch canary llm 0.1                     one new flow of a thousand to the standby
  bgswitch canary llm 5 -m 'llama@8, first'   more; who was on the standby stays there
  bgswitch canary llm 0                       no new flow any more; old ones stay until they end
  bgswitch rollback llm                       no new flow any more, and old ones are reset
  bgswitch flip llm                           all new flows: the canary has become the release

New flows only, and by the client's address: a client gets the same colour each time,
as long as the share and the active colour stay. Shares are multiples of 1/65536; at
100, one address in 65536 still goes to the active colour: to go over, flip. Exit code
5: not at that generation; 8: a backend of the standby has no next hop,
or none of them is known to be healthy, where they are probed.";

/// `bgswitch canary SERVICE PERCENT`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Canary {
    /// The service.
    service: String,
    /// Share of new flows that goes to the standby, 0 to 100, also 0.1.
    #[arg(value_parser = share)]
    percent: f64,
    /// Only if the service is still at this generation: nobody flipped meanwhile.
    #[arg(long, value_name = "N")]
    if_generation: Option<u16>,
    /// Say what would happen, change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also to a colour that cannot be reached or is not healthy, and also when the journal cannot
    /// be written.
    #[arg(long)]
    force: bool,
    /// Why, for the journal.
    #[arg(short, long = "message", value_name = "WHY")]
    message: Option<String>,
}

/// A percentage, with or without its sign.
fn share(text: &str) -> Result<f64, String> {
    let number = text.strip_suffix('%').unwrap_or(text).trim();
    match number.parse() {
        Ok(percent) if (0.0..=100.0).contains(&percent) => Ok(percent),
        _ => Err("no percentage from 0 to 100, like 5 or 0.1".to_owned()),
    }
}

impl Canary {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let path = service_path(&self.service)? + "/canary";
        let request = CanaryRequest {
            percent: Some(self.percent),
            if_generation: self.if_generation,
            if_share: None,
            dry_run: self.dry_run,
            force: self.force,
            why: self.message,
        };
        let canary: Canaried = common.post(&path, &request)?;
        for warning in &canary.warnings {
            warn(warning);
        }
        common.print(&canary, text)
    }
}

/// What is true of the canary, and how to go on (law 10).
fn text(canary: &Canaried) -> String {
    let Canaried {
        service,
        active,
        standby,
        share,
        ..
    } = canary;
    let [before, after] = [canary.canary_percent_before, canary.canary_percent].map(percent);
    let mut out = format!(
        "{service}  canary on {standby} {before} % -> {after} %   generation {}",
        canary.generation
    );
    if let Some(ns) = canary.store_ns {
        let _ = write!(out, "   stored in {}", measured(ns));
    }
    out.push('\n');
    let count = canary.standby_flows;
    let stay = format!(
        "{} {} on {standby}",
        count.map_or_else(|| "flows".to_owned(), flows),
        verb(count, "stays", "stay"),
    );
    let _ = match (share, count) {
        (0, Some(0)) => writeln!(out, "all new flows go to {active}; none is on {standby}"),
        (0, _) => writeln!(out, "all new flows go to {active}; {stay}"),
        _ => writeln!(
            out,
            "new flows of {share} in 65536 client addresses go to {standby}, the rest to {active}"
        ),
    };
    if canary.dry_run {
        out.push_str("nothing was changed (dry run)\n");
    } else if *share > 0 {
        let _ = writeln!(
            out,
            "go over: bgswitch flip {service}   undo: bgswitch rollback {service}"
        );
    }
    out
}
