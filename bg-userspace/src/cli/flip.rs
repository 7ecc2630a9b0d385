use std::{fmt::Write as _, time::Duration};

use clap::Args;

use super::{Common, service_path};
use crate::{
    api::{FlipRequest, Flipped},
    config::FlipMode,
    datapath::now_ns,
};

/// `bgswitch flip SERVICE`.
#[derive(Debug, Args)]
pub(super) struct Flip {
    /// The service.
    service: String,
    /// The colour to switch to [default: the standby].
    #[arg(long, value_parser = ["blue", "green"])]
    to: Option<String>,
    /// What happens to flows of the old colour [default: the service's on_flip].
    #[arg(long, value_enum)]
    mode: Option<FlipMode>,
    /// How long flows of the old colour may live on [default: the service's drain].
    #[arg(long, value_name = "DURATION", value_parser = humantime::parse_duration)]
    drain: Option<Duration>,
    /// Only if the service is still at this generation.
    #[arg(long, value_name = "N")]
    if_generation: Option<u16>,
    /// Say what would happen, change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Also to a colour that cannot be reached.
    #[arg(long)]
    force: bool,
    /// Why, for the journal.
    #[arg(short, long = "message", value_name = "WHY")]
    message: Option<String>,
}

impl Flip {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let path = service_path(&self.service)? + "/flip";
        let request = FlipRequest {
            to: self.to,
            mode: self.mode,
            drain_s: self.drain.map(|drain| drain.as_secs()),
            if_generation: self.if_generation,
            dry_run: self.dry_run,
            force: self.force,
            expires_ns: Some(now_ns() + common.timeout.as_nanos() as u64),
            why: self.message,
        };
        let flipped: Flipped = common.post(&path, &request)?;
        common.print(&flipped, text)
    }
}

/// What is true of the flip, and how to undo it (law 10).
pub(super) fn text(flipped: &Flipped) -> String {
    let Flipped {
        service,
        from,
        to,
        generation_before,
        generation,
        ..
    } = flipped;
    let mut out =
        format!("{service}  {from} -> {to}   generation {generation_before} -> {generation}");
    if flipped.dry_run {
        let _ = writeln!(
            out,
            "   mode {}\nnothing was changed (dry run)",
            flipped.mode
        );
        return out;
    }
    if let Some(ns) = flipped.store_ns {
        let _ = write!(out, "   stored in {:.1} µs", ns as f64 / 1000.0);
    }
    out.push('\n');
    match flipped.first_new_flow_us {
        Some(us) => {
            let _ = write!(out, "first new flow on {to} after {us:.0} µs");
        }
        None => {
            let _ = write!(out, "no new flow yet; the next one goes to {to}");
        }
    }
    let count = flipped
        .old_flows
        .map_or_else(|| "flows".to_owned(), |n| format!("{n} flows"));
    let _ = match (&flipped.draining_until, flipped.old_flows) {
        (_, Some(0)) => writeln!(out, "; no flows are left on {from}"),
        (Some(until), _) => writeln!(out, "; {count} stay on {from} until {until}"),
        (None, _) => writeln!(out, "; {count} of {from} are reset with their next packet"),
    };
    let _ = writeln!(out, "undo: bgswitch rollback {service}");
    out
}
