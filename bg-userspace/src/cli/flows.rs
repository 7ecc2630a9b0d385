use std::{fmt::Write as _, time::Duration};

use clap::Args;

use super::{Common, service_path, text};
use crate::{
    api::{self, SCHEMA, Status},
    time,
};

const EXAMPLES: &str = "\
Examples:
  bgswitch flows llm --colour blue            who is left on the old colour
  bgswitch flows -o json | jq '.flows[].client'

established: TCP, seen from both sides; half_open: TCP, not yet; udp. A flow that a
drain will reset has the time of it.";

/// `bgswitch flows [SERVICE]`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct Flows {
    /// The service [default: all].
    service: Option<String>,
    /// Only flows of this colour.
    #[arg(long, value_parser = ["blue", "green"])]
    colour: Option<String>,
    /// Also flows that are half open, closed or reset (kept for some seconds).
    #[arg(long)]
    all: bool,
    /// Show at most so many flows of a service.
    #[arg(long, value_name = "N", default_value_t = 1000)]
    limit: usize,
}

impl Flows {
    pub(super) fn run(self, common: &Common) -> anyhow::Result<()> {
        let mut query = format!("?limit={}&all={}", self.limit, self.all);
        if let Some(colour) = &self.colour {
            let _ = write!(query, "&colour={colour}");
        }
        let services = match self.service {
            Some(service) => vec![service],
            None => common
                .get::<Status>("/v1/status")?
                .services
                .into_iter()
                .map(|s| s.name)
                .collect(),
        };
        let mut all = api::Flows {
            schema: SCHEMA,
            total: 0,
            not_live: 0,
            flows: Vec::new(),
        };
        let mut out = String::new();
        for service in services {
            let path = format!("{}/flows{query}", service_path(&service)?);
            let flows: api::Flows = common.get(&path)?;
            write_flows(&mut out, &service, &flows, self.all);
            all.total += flows.total;
            all.not_live += flows.not_live;
            all.flows.extend(flows.flows);
        }
        common.print(&all, |_| out)
    }
}

fn write_flows(out: &mut String, service: &str, flows: &api::Flows, all: bool) {
    let _ = write!(out, "{service}: {}", text::flows(flows.total));
    if flows.not_live > 0 && !all {
        let _ = write!(out, "  ({} half open or closing: --all)", flows.not_live);
    }
    out.push('\n');
    for flow in &flows.flows {
        let backend = flow.backend.as_deref().unwrap_or("?");
        let idle = text::measured(Duration::from_millis(flow.idle_ms).as_nanos() as u64);
        let end = match (&flow.reset_at, flow) {
            (_, flow) if flow.closing => "  closing".to_owned(),
            (_, flow) if flow.resetting => "  reset with its next packet".to_owned(),
            (Some(at), _) => format!("  until {}", time::local(at)),
            (None, _) => String::new(),
        };
        let by = match &flow.listener {
            Some(listener) if flow.preview => format!("  by its preview {listener}"),
            _ => String::new(),
        };
        let from = match flow.source_port {
            Some(port) => format!("  from port {port}"),
            None => String::new(),
        };
        let _ = writeln!(
            out,
            "  {:<46} {:<5} {:<39} {:<11} generation {}  idle {idle}{by}{from}{end}",
            flow.client, flow.colour, backend, flow.table, flow.generation
        );
    }
    let hidden = flows.total - flows.flows.len() as u64;
    if hidden > 0 {
        let _ = writeln!(out, "  and {hidden} more (--limit)");
    }
}
