//! What the daemon tells about the packet path.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
};

use bg_common::{
    flow::FlowTable,
    service::{Colour, ColourStats, CutoverWord},
};

use super::{Daemon, health::Now};
use crate::{
    api::{
        BackendStatus, ColourStatus, DaemonStatus, FlowLine, FlowTableStatus, Flows,
        InterfaceStatus, Refusal, SCHEMA, ServiceStatus, SignalStatus, Status,
    },
    config::{Config, Service},
    datapath::{Announced, Error, FlowRecord, Statistics},
    drain::Drain,
    plan::{BackendPlan, ListenerPlan, ServicePlan},
    switch::percent,
};

type Counts = BTreeMap<(u32, Colour, Option<IpAddr>), Count>;

/// What is looked up once for all services.
struct Snapshot {
    words: BTreeMap<u32, CutoverWord>,
    counts: Counts,
    statistics: Statistics,
    /// Backends without a next hop: service id, colour, address.
    unresolved: BTreeSet<(u32, Colour, IpAddr)>,
    health: Now,
    announced: BTreeMap<IpAddr, Announced>,
}

/// Live flows.
#[derive(Default)]
struct Count {
    all: u64,
    /// Born before the last flip, and not reset yet.
    draining: u64,
    /// Reset with their next packet.
    resetting: u64,
}

impl Count {
    fn add(&mut self, flow: &FlowRecord, word: CutoverWord) {
        self.all += 1;
        if word.resets(flow.colour_spread, flow.generation) {
            self.resetting += 1;
        } else if word.is_old(flow.colour, flow.generation) {
            self.draining += 1;
        }
    }
}

impl Daemon {
    /// Blocks for as long as it takes to count the flows.
    fn snapshot(&self, config: &Config) -> Result<(Snapshot, u64), Error> {
        let words: BTreeMap<u32, CutoverWord> = config
            .services
            .keys()
            .filter_map(|name| Some((self.datapath.service_id(name)?, self.datapath.word(name)?)))
            .collect();
        let mut counts = Counts::new();
        let mut entries = 0;
        self.datapath.flows(|flow| {
            entries += u64::from(flow.table == FlowTable::Established);
            if let Some(word) = words.get(&flow.service).filter(|_| flow.is_live()) {
                let key = (flow.service, flow.colour, flow.backend);
                counts.entry(key).or_default().add(flow, *word);
            }
        });
        let snapshot = Snapshot {
            words,
            counts,
            statistics: self.datapath.statistics()?,
            unresolved: self.datapath.unresolved().into_iter().collect(),
            health: self.health_now(),
            announced: self.datapath.announced(),
        };
        Ok((snapshot, entries))
    }

    /// One service's part of `status`; `None` if there is no such service.
    pub(super) fn status_of(&self, service: &str) -> Result<Option<ServiceStatus>, Refusal> {
        let config = self.config().clone();
        let Some(service) = config.services.get(service) else {
            return Ok(None);
        };
        let status = self
            .snapshot(&config)
            .and_then(|(snapshot, _)| self.service_status(service, &snapshot));
        Ok(Some(status?))
    }

    /// Blocks for as long as it takes to count the flows.
    pub(super) fn status(&self) -> Result<Status, Refusal> {
        let config = self.config().clone();
        let (snapshot, entries) = self.snapshot(&config)?;
        let services = config
            .services
            .values()
            .map(|service| self.service_status(service, &snapshot))
            .collect::<Result<_, _>>()?;
        let reasons = self.datapath.reasons()?;
        let [established, half_open, udp] = self.datapath.pressure()?;
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
                full: established.full,
                evicted_half_open: half_open.evicted,
                evicted_udp: udp.evicted,
            },
        })
    }

    fn service_status(
        &self,
        service: &Service,
        snapshot: &Snapshot,
    ) -> Result<ServiceStatus, Error> {
        let name = &service.plan.name;
        let unknown = || Error::UnknownService(name.clone());
        let id = self.datapath.service_id(name).ok_or_else(unknown)?;
        let Snapshot {
            words,
            counts,
            statistics,
            unresolved,
            health,
            announced,
        } = snapshot;
        let word = *words.get(&id).ok_or_else(unknown)?;
        let stats = statistics.of(id)?;
        let state = self.state();
        let heard = self.datapath.heard(name);
        let mut colours = BTreeMap::new();
        for colour in Colour::ALL {
            let ColourStats {
                forward_packets,
                forward_bytes,
                return_packets,
                return_bytes,
                new_flows,
                cut_resets,
                drain_resets,
            } = stats[colour as usize];
            let flows_of = |address| {
                counts
                    .get(&(id, colour, Some(address)))
                    .map_or(0, |count| count.all)
            };
            let of_colour = counts
                .range((id, colour, None)..)
                .take_while(|((service, of, _), _)| (*service, *of) == (id, colour));
            let sum =
                |part: fn(&Count) -> u64| of_colour.clone().map(|(_, count)| part(count)).sum();
            let drain = state.draining(name, word, colour);
            let status = ColourStatus {
                version: service.versions[colour as usize].clone(),
                flows: sum(|count| count.all),
                packets: forward_packets + return_packets,
                bytes: forward_bytes + return_bytes,
                new_flows,
                resets: cut_resets + drain_resets,
                draining_until: drain.and_then(Drain::until),
                resets_until: drain.and_then(Drain::resets_until),
                drain_end: drain.map(|drain| drain.end().as_str().to_owned()),
                draining_flows: sum(|count| count.draining),
                resetting_flows: sum(|count| count.resetting),
                all_down: health.all_down(&service.plan, colour),
                signals: heard
                    .as_ref()
                    .map(|heard| SignalStatus::from(&heard[colour as usize])),
                preview: service
                    .plan
                    .previews_of(colour)
                    .map(|at| at.to_string())
                    .collect(),
                backends: service
                    .plan
                    .backends(colour)
                    .iter()
                    .map(|backend| {
                        let name = service.plan.name_of(colour, backend);
                        let reachable = !unresolved.contains(&(id, colour, backend.address));
                        let known = health.known.get(&name);
                        BackendStatus {
                            address: address_of(&service.plan, backend),
                            weight: backend.weight,
                            healthy: match known {
                                Some(known) => known.verdict.is_healthy(),
                                None => Some(reachable),
                            },
                            reachable,
                            in_pool: !health.out.contains(&name),
                            health: known.map(|known| health.status(known)),
                            flows: flows_of(backend.address),
                        }
                    })
                    .collect(),
            };
            colours.insert(colour.as_str().to_owned(), status);
        }
        Ok(ServiceStatus {
            name: name.clone(),
            active: word.active().as_str().to_owned(),
            generation: word.generation(),
            state: self.releases.shown(name).state().as_str().to_owned(),
            canary_percent: percent(word.canary()),
            listeners: service
                .plan
                .listeners
                .iter()
                .map(ToString::to_string)
                .collect(),
            forward: service.plan.forward.as_str().to_owned(),
            announced: places(&service.plan, announced),
            colours,
        })
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
        let word = self
            .datapath
            .word(service)
            .ok_or_else(|| self.unknown(service))?;
        let drain = self
            .state()
            .draining(service, word, word.active().other())
            .copied();
        let names = self.datapath.names()?;
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
                let resetting = word.resets(flow.colour_spread, flow.generation);
                let drains = !resetting && word.is_old(flow.colour, flow.generation);
                let spread = flow.colour_spread >> 1;
                let reset_at = drain.filter(|_| drains).and_then(|d| d.reset_at(spread));
                flows.flows.push(FlowLine {
                    service: service.to_owned(),
                    client: flow.client.to_string(),
                    listener: names.listener_at(flow.listener).map(|at| at.to_string()),
                    preview: names.preview(flow.listener).is_some(),
                    colour: flow.colour.as_str().to_owned(),
                    backend: flow.backend.map(|backend| backend.to_string()),
                    generation: flow.generation,
                    table: flow.table.as_str().to_owned(),
                    idle_ms: flow.idle.as_millis() as u64,
                    closing: flow.closing,
                    source_port: flow.source_port,
                    reset_at,
                    resetting,
                });
            }
        });
        Ok(flows)
    }
}

/// The listeners and previews of an announced service, and the interfaces that have their
/// addresses.
fn places(
    plan: &ServicePlan,
    announced: &BTreeMap<IpAddr, Announced>,
) -> BTreeMap<String, Option<String>> {
    let place_of = |endpoint: &ListenerPlan| {
        let place = announced.get(&endpoint.address.ip())?;
        place.is_there.then(|| place.interface.clone())
    };
    let endpoints = plan.endpoints().filter(|_| plan.announce);
    endpoints
        .map(|endpoint| (endpoint.to_string(), place_of(&endpoint)))
        .collect()
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
