use std::{fmt::Write as _, time::Duration};

use clap::Args;

use super::{
    Common, duration, service_path,
    text::{flows, length, measured, percent, verb},
    warn,
};
use crate::{
    api::{FlipRequest, Flipped, Kind, Refusal},
    config::FlipMode,
    time,
};

const EXAMPLES: &str = "\
Examples:
  bgswitch flip llm -m 'llama@8'              to the standby, old flows drain
  bgswitch flip llm --to green --drain 1h     old flows may stay for an hour
  bgswitch flip llm --mode cut                old flows are reset at once
  bgswitch flip llm --if-generation 17        only if nobody flipped meanwhile

Exit code 5: not at that generation, or that colour is active already; 8: a
backend in the target's pools has no next hop, or none of them is known to be
healthy, where they are probed.";

/// `bgswitch flip SERVICE`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flip {
    /// The service.
    service: String,
    /// The colour to switch to [default: the standby].
    #[arg(long, value_parser = ["blue", "green"])]
    to: Option<String>,
    /// What happens to flows of the old colour [default: the service's on_flip].
    #[arg(long, value_enum)]
    mode: Option<FlipMode>,
    /// How long flows of the old colour may live on, in whole seconds; then they are reset, also
    /// where drain_end is keep [default: the service's drain].
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    drain: Option<Duration>,
    /// Only if the service is still at this generation.
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

impl Flip {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let path = service_path(&self.service)? + "/flip";
        if self.drain.is_some_and(|drain| drain.subsec_nanos() != 0) {
            return Err(Refusal::new(Kind::Usage, "--drain: whole seconds only").into());
        }
        let request = FlipRequest {
            to: self.to,
            mode: self.mode,
            drain_s: self.drain.map(|drain| drain.as_secs()),
            if_generation: self.if_generation,
            if_share: None,
            dry_run: self.dry_run,
            force: self.force,
            why: self.message,
        };
        let flipped: Flipped = common.post(&path, &request)?;
        print(common, &flipped)
    }
}

/// Prints the answer, and warnings beside it.
pub(super) fn print(common: &Common, flipped: &Flipped) -> anyhow::Result<()> {
    for warning in &flipped.warnings {
        warn(warning);
    }
    common.print(flipped, text)
}

/// What is true of the flip, and how to undo it (law 10).
fn text(flipped: &Flipped) -> String {
    let Flipped {
        service,
        from,
        to,
        generation_before,
        generation,
        old_flows,
        ..
    } = flipped;
    if flipped.already {
        return format!(
            "{service} is at {to} already, generation {generation} (nothing to roll back)\n"
        );
    }
    let mut out = if flipped.canary_rollback && flipped.canary_percent_before == 0.0 {
        format!("{service}  new flows stay on {to}, the release that was about to flip is over")
    } else if flipped.canary_rollback {
        let share = percent(flipped.canary_percent_before);
        format!("{service}  canary of {share} % on {from} taken back")
    } else {
        format!("{service}  {from} -> {to}")
    };
    let _ = write!(out, "   generation {generation_before} -> {generation}");
    if let Some(ns) = flipped.store_ns {
        let _ = write!(out, "   stored in {}", measured(ns));
    }
    out.push('\n');
    if flipped.dry_run {
        let count = old_flows.map_or_else(|| "flows".to_owned(), flows);
        let _ = match (flipped.mode.as_str(), flipped.drain_s) {
            ("cut", _) => writeln!(
                out,
                "{count} of {from} would be reset with their next packet"
            ),
            (_, Some(drain)) => writeln!(
                out,
                "{count} would stay on {from} for up to {}{}",
                length(drain),
                resets(flipped, ", then be reset")
            ),
            (_, None) => writeln!(out, "{count} would stay on {from} until they end"),
        };
        out.push_str("nothing was changed (dry run)\n");
        return out;
    }
    let _ = match flipped.first_new_flow_us {
        Some(us) => {
            let after = measured((us * 1000.0) as u64);
            write!(out, "first new flow on {to} after {after}; ")
        }
        None => write!(out, "no new flow yet; the next one goes to {to}; "),
    };
    let count = old_flows.map_or_else(|| "flows".to_owned(), flows);
    let _ = match (flipped.mode.as_str(), &flipped.draining_until, old_flows) {
        ("cut", _, Some(0)) => writeln!(out, "no flow was on {from}"),
        ("cut", ..) => writeln!(
            out,
            "{count} of {from} {} reset with {} next packet",
            verb(*old_flows, "is", "are"),
            verb(*old_flows, "its", "their"),
        ),
        (_, _, Some(0)) => writeln!(out, "no flow is left on {from}"),
        (_, Some(until), _) => writeln!(
            out,
            "{count} {} on {from} until {} (drain {}{})",
            verb(*old_flows, "stays", "stay"),
            time::local(until),
            length(flipped.drain_s.unwrap_or_default()),
            resets(flipped, ", resets")
        ),
        (_, None, _) => writeln!(
            out,
            "{count} {} on {from} until {}",
            verb(*old_flows, "stays", "stay"),
            verb(*old_flows, "it ends", "they end"),
        ),
    };
    // After a canary, a rollback would flip to its colour.
    if !flipped.canary_rollback {
        let _ = writeln!(out, "undo: bgswitch rollback {service}");
    }
    out
}

/// How long the resets at a drain's end take, if they take any time.
fn resets(flipped: &Flipped, what: &str) -> String {
    match flipped.reset_over_s {
        None | Some(0) => String::new(),
        Some(over) => format!("{what} over {}", length(over)),
    }
}
