//! What the daemon tells about the packet path.

use std::collections::BTreeMap;

use bg_common::{
    flow::FlowTable,
    service::{Colour, ColourStats},
};

use super::Daemon;
use crate::{
    api::{
        BackendStatus, ColourStatus, DaemonStatus, FlowLine, FlowTableStatus, Flows,
        InterfaceStatus, Kind, Refusal, SCHEMA, ServiceStatus, Status,
    },
    config::Service,
    plan::{BackendPlan, ListenerPlan, ServicePlan},
};

type Counts = BTreeMap<(u32, Colour, Option<std::net::IpAddr>), u64>;

impl Daemon {
    /// Blocks for as long as it takes to count the flows.
    pub(super) fn status(&self) -> Result<Status, Refusal> {
        let failed =
            |error: crate::datapath::Error| Refusal::new(Kind::Datapath, error.to_string());
        let config = self.config().clone();
        let mut counts = Counts::new();
        let mut entries = 0;
        self.datapath.flows(|flow| {
            entries += u64::from(flow.table == FlowTable::Established);
            if flow.is_live() {
                *counts
                    .entry((flow.service, flow.colour, flow.backend))
                    .or_default() += 1;
            }
        });
        let services = config
            .services
            .values()
            .map(|service| self.service_status(service, &counts))
            .collect::<Result<_, _>>()
            .map_err(failed)?;
        let reasons = self.datapath.reasons().map_err(failed)?;
        Ok(Status {
            schema: SCHEMA,
            daemon: DaemonStatus {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                uptime_s: self.started.elapsed().as_secs(),
            },
            interfaces: self
                .datapath
                .interfaces()
                .iter()
                .map(|interface| InterfaceStatus {
                    name: interface.name.clone(),
                    mode: interface.mode.to_owned(),
                    program_id: interface.program_id,
                    running: interface.running,
                })
                .collect(),
            services,
            reasons: reasons
                .into_iter()
                .map(|(reason, count)| (reason.as_str().to_owned(), count))
                .collect(),
            flow_table: FlowTableStatus {
                entries,
                capacity: u64::from(self.datapath.max_flows()),
            },
        })
    }

    fn service_status(
        &self,
        service: &Service,
        counts: &Counts,
    ) -> Result<ServiceStatus, crate::datapath::Error> {
        let name = &service.plan.name;
        let unknown = || crate::datapath::Error::UnknownService(name.clone());
        let word = self.datapath.word(name).ok_or_else(unknown)?;
        let id = self.datapath.service_id(name).ok_or_else(unknown)?;
        let stats = self.datapath.stats(name)?;
        let unresolved = self.datapath.unresolved();
        let state = self.state();
        let mut colours = BTreeMap::new();
        for colour in Colour::ALL {
            let ColourStats {
                forward_packets,
                forward_bytes,
                return_packets,
                return_bytes,
                new_flows,
                resets,
            } = stats[colour as usize];
            let flows_of = |address| {
                counts
                    .get(&(id, colour, Some(address)))
                    .copied()
                    .unwrap_or(0)
            };
            let of_colour = counts
                .iter()
                .filter(|((service, of, _), _)| (*service, *of) == (id, colour));
            let draining = state.draining(name, word, colour);
            let status = ColourStatus {
                version: service.versions[colour as usize].clone(),
                flows: of_colour.map(|(_, count)| count).sum(),
                packets: forward_packets + return_packets,
                bytes: forward_bytes + return_bytes,
                new_flows,
                resets,
                draining_until: draining.map(crate::state::Drain::rfc3339),
                backends: service
                    .plan
                    .backends(colour)
                    .iter()
                    .map(|backend| BackendStatus {
                        address: address_of(&service.plan, backend),
                        weight: backend.weight,
                        healthy: !unresolved.contains(&(id, colour, backend.address)),
                        flows: flows_of(backend.address),
                    })
                    .collect(),
            };
            colours.insert(colour.as_str().to_owned(), status);
        }
        Ok(ServiceStatus {
            name: name.clone(),
            active: word.active().as_str().to_owned(),
            generation: word.generation(),
            state: "STEADY".to_owned(),
            canary_percent: f64::from(word.canary()) / 655.36,
            listeners: service
                .plan
                .listeners
                .iter()
                .map(ToString::to_string)
                .collect(),
            announced: self.announced(&service.plan),
            colours,
        })
    }

    /// The listeners that are announced, and the interfaces that have their
    /// addresses.
    fn announced(&self, plan: &ServicePlan) -> BTreeMap<String, Option<String>> {
        if !plan.announce {
            return BTreeMap::new();
        }
        let places = self.datapath.announced();
        let place_of = |listener: &ListenerPlan| {
            let place = places.get(&listener.address.ip())?;
            place.is_there.then(|| place.interface.clone())
        };
        let listeners = plan.listeners.iter();
        listeners
            .map(|listener| (listener.to_string(), place_of(listener)))
            .collect()
    }

    /// Blocks for as long as it takes to read the flows.
    pub(super) fn flow_lines(
        &self,
        service: &str,
        colour: Option<Colour>,
        limit: usize,
        all: bool,
    ) -> Result<Flows, Refusal> {
        let id = self
            .datapath
            .service_id(service)
            .ok_or_else(|| self.unknown(service))?;
        let mut flows = Flows {
            schema: SCHEMA,
            total: 0,
            not_live: 0,
            flows: Vec::new(),
        };
        self.datapath.flows(|flow| {
            if flow.service != id || colour.is_some_and(|colour| colour != flow.colour) {
                return;
            }
            if !flow.is_live() {
                flows.not_live += 1;
                if !all {
                    return;
                }
            }
            flows.total += 1;
            if flows.flows.len() < limit {
                flows.flows.push(FlowLine {
                    service: service.to_owned(),
                    client: flow.client.to_string(),
                    colour: flow.colour.as_str().to_owned(),
                    backend: flow.backend.map(|backend| backend.to_string()),
                    generation: flow.generation,
                    table: flow.table.as_str().to_owned(),
                    idle_ms: flow.idle.as_millis() as u64,
                    closing: flow.closing,
                });
            }
        });
        Ok(flows)
    }
}

/// The backend's address, with the port that packets go to where all listeners
/// agree on one.
fn address_of(plan: &ServicePlan, backend: &BackendPlan) -> String {
    let mut ends = plan
        .listeners
        .iter()
        .filter(|listener| backend.serves(listener))
        .map(|listener| backend.endpoint(listener));
    match ends.next() {
        Some(first) if ends.all(|end| end == first) => first.to_string(),
        _ => backend.to_string(),
    }
}
