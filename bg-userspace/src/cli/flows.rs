use std::fmt::Write as _;

use clap::Args;

use super::{Common, service_path};
use crate::api::{self, Status};

/// `bgswitch flows [SERVICE]`.
#[derive(Debug, Args)]
pub(super) struct Flows {
    /// The service [default: all].
    service: Option<String>,
    /// Only flows of this colour.
    #[arg(long, value_parser = ["blue", "green"])]
    colour: Option<String>,
}

impl Flows {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let query = self
            .colour
            .as_ref()
            .map(|colour| format!("?colour={colour}"))
            .unwrap_or_default();
        let services = match self.service {
            Some(service) => vec![service],
            None => common
                .get::<Status>("/v1/status")?
                .services
                .into_iter()
                .map(|s| s.name)
                .collect(),
        };
        for service in services {
            let flows: api::Flows =
                common.get(&format!("{}/flows{query}", service_path(&service)?))?;
            common.print(&flows, |flows| text(&service, flows))?;
        }
        Ok(())
    }
}

fn text(service: &str, flows: &api::Flows) -> String {
    let mut out = format!("{service}: {} flows\n", flows.total);
    for flow in &flows.flows {
        let backend = flow.backend.as_deref().unwrap_or("?");
        let idle = humantime::format_duration(std::time::Duration::from_millis(flow.idle_ms));
        let closing = if flow.closing { "  closing" } else { "" };
        let _ = writeln!(
            out,
            "  {:<46} {:<5} {:<39} {:<11} generation {}  idle {idle}{closing}",
            flow.client, flow.colour, backend, flow.table, flow.generation
        );
    }
    if flows.total > flows.flows.len() as u64 {
        let _ = writeln!(out, "  and {} more", flows.total - flows.flows.len() as u64);
    }
    out
}
