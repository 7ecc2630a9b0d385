use std::time::Duration;

use clap::{Args, Subcommand};

use super::{Common, duration, release, service_path};
use crate::api::{DecisionRequest, ExtendRequest, Kind, Refusal, ReleaseStatus};

const EXAMPLES: &str = "\
Examples:
  bgswitch standby extend llm 30m             the old colour must stay up for longer
  bgswitch standby retire llm                 it need not any more: the release is done

The packet path does not care: a rollback goes to the old colour at any time, whether
anybody is there or not. Exit code 5: no standby is held; or, but for --force, the active
colour is ill, or its health is not known; or a canary sends new flows to the old one.";

/// `bgswitch standby ...`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Standby {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Hold the old colour for longer.
    Extend(Extend),
    /// End the hold now. Refused while the active colour is ill, or health checks do not know yet.
    Retire(Retire),
}

#[derive(Debug, Args)]
struct Extend {
    /// The service.
    service: String,
    /// How much longer, in whole seconds.
    #[arg(value_parser = duration)]
    more: Duration,
    /// Why, for the journal.
    #[arg(short, long = "message", value_name = "WHY")]
    message: Option<String>,
}

#[derive(Debug, Args)]
struct Retire {
    /// The service.
    service: String,
    /// Whatever is known of the active colour's health; the journal keeps it.
    #[arg(long)]
    force: bool,
    /// Why, for the journal.
    #[arg(short, long = "message", value_name = "WHY")]
    message: Option<String>,
}

impl Standby {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let status: ReleaseStatus = match self.verb {
            Verb::Extend(extend) => {
                let path = service_path(&extend.service)? + "/standby/extend";
                if extend.more.is_zero() || extend.more.subsec_nanos() != 0 {
                    let message = "whole seconds only, at least one";
                    return Err(Refusal::new(Kind::Usage, message).into());
                }
                let request = ExtendRequest {
                    by_s: extend.more.as_secs(),
                    why: extend.message,
                };
                common.post(&path, &request)?
            }
            Verb::Retire(retire) => {
                let path = service_path(&retire.service)? + "/standby/retire";
                let request = DecisionRequest {
                    force: retire.force,
                    why: retire.message,
                };
                common.post(&path, &request)?
            }
        };
        release::print(common, &status)
    }
}
