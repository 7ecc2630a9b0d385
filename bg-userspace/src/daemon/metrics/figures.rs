//! What the packet path, the probes and the releases say at one moment.

use std::{collections::BTreeMap, fmt};

use bg_common::{
    service::{Colour, ColourStats},
    signals::Signals,
};
use prometheus_client::{
    collector::Collector,
    encoding::DescriptorEncoder,
    metrics::{MetricType, exemplar::Exemplar},
    registry::Unit,
};

use crate::{
    api::{ColourStatus, Refusal, ServiceStatus, Status},
    daemon::Daemon,
    datapath::AttachMode,
    release::State,
    time,
};

/// `status`, and what it does not have.
#[derive(Debug)]
pub(super) struct Figures {
    status: Status,
    stats: BTreeMap<String, [ColourStats; 2]>,
    /// Of the services that are listened to.
    pub(super) heard: BTreeMap<String, [Signals; 2]>,
    /// By service, seconds since 1970.
    expiries: BTreeMap<String, f64>,
}

impl Figures {
    /// Reads all of it. Blocks for as long as it takes to count the flows.
    pub(super) fn read(daemon: &Daemon) -> Result<Self, Refusal> {
        let status = daemon.status()?;
        let statistics = daemon.datapath.statistics()?;
        let mut stats = BTreeMap::new();
        let mut expiries = BTreeMap::new();
        let mut heard = BTreeMap::new();
        for ServiceStatus { name, .. } in &status.services {
            // A reload may have taken the service away since.
            let Some(id) = daemon.datapath.service_id(name) else {
                continue;
            };
            stats.insert(name.clone(), statistics.of(id)?);
            heard.extend(
                daemon
                    .datapath
                    .heard(name)
                    .map(|heard| (name.clone(), heard)),
            );
            let machine = daemon.releases.shown(name);
            let standby = machine.state() == State::Standby;
            let release = machine.release.filter(|_| standby);
            if let Some(at_ms) = release.and_then(|release| release.until_ms()) {
                expiries.insert(name.clone(), time::unix_seconds_at_boot_ms(at_ms));
            }
        }
        Ok(Self {
            status,
            stats,
            heard,
            expiries,
        })
    }

    fn colours(&self) -> impl Iterator<Item = (&ServiceStatus, &str, &ColourStatus)> {
        self.status.services.iter().flat_map(|service| {
            let colours = service.colours.iter();
            colours.map(move |(name, colour)| (service, name.as_str(), colour))
        })
    }

    /// A figure for each colour of each service.
    fn by_colour(
        &self,
        figure: impl Fn(&ServiceStatus, &str, &ColourStatus) -> u64,
    ) -> impl Iterator<Item = ([Label<'_>; 2], u64)> {
        self.colours().map(move |(service, name, colour)| {
            let labels = [("service", service.name.as_str()), ("colour", name)];
            (labels, figure(service, name, colour))
        })
    }

    /// A figure of the packet path for each colour of each service.
    fn by_stats(
        &self,
        figure: impl Fn(&ColourStats) -> u64,
    ) -> impl Iterator<Item = ([Label<'_>; 2], u64)> {
        self.stats.iter().flat_map(move |(service, stats)| {
            let of = |colour: Colour| {
                let labels = [("service", service.as_str()), ("colour", colour.as_str())];
                (labels, figure(&stats[colour as usize]))
            };
            Colour::ALL.map(of)
        })
    }

    /// The same for each value of one label more.
    fn by_part<const N: usize>(
        &self,
        label: &'static str,
        parts: [Part; N],
    ) -> impl Iterator<Item = ([Label<'_>; 3], u64)> {
        parts.into_iter().flat_map(move |(value, figure)| {
            let stats = self.by_stats(figure);
            stats
                .map(move |([service, colour], figure)| ([service, colour, (label, value)], figure))
        })
    }

    fn of_host(&self, page: &mut Page<'_, '_>) -> fmt::Result {
        let Status {
            daemon,
            interfaces,
            flow_table,
            ..
        } = &self.status;
        page.build(&daemon.version)?;
        page.gauges(
            "bgswitch_xdp_attached",
            "1 for the mode that XDP runs in on the interface",
            interfaces.iter().flat_map(|interface| {
                [AttachMode::Native, AttachMode::Generic].map(|mode| {
                    let labels = [("interface", &*interface.name), ("mode", mode.as_str())];
                    (labels, u64::from(interface.mode == mode.as_str()))
                })
            }),
        )?;
        page.gauges(
            "bgswitch_flow_table_entries",
            "Established TCP flows",
            [([], flow_table.entries)],
        )?;
        page.gauges(
            "bgswitch_flow_table_capacity",
            "Established TCP flows that fit",
            [([], flow_table.capacity)],
        )?;
        page.counters(
            ("bgswitch_flow_table_full", None),
            "Established flows that found no room, and are forwarded all the same",
            [([], flow_table.full)],
        )?;
        page.counters(
            ("bgswitch_flows_evicted", None),
            "Flows that gave way to newer ones",
            [
                ([("table", "half_open")], flow_table.evicted_half_open),
                ([("table", "udp")], flow_table.evicted_udp),
            ],
        )?;
        let reasons = self.status.reasons.iter();
        page.counters(
            ("bgswitch_verdicts", None),
            "Packets by the reason of their verdict",
            reasons.map(|(reason, count)| ([("reason", reason.as_str())], *count)),
        )
    }

    fn of_services(&self, page: &mut Page<'_, '_>) -> fmt::Result {
        let services = &self.status.services;
        page.gauges(
            "bgswitch_active_colour",
            "1 for the colour that new flows go to",
            self.by_colour(|service, name, _| (service.active == name).into()),
        )?;
        page.gauges(
            "bgswitch_generation",
            "Flips, and canaries that were rolled back, modulo 65536",
            services.iter().map(|service| {
                let labels = [("service", service.name.as_str())];
                (labels, service.generation.into())
            }),
        )?;
        let healthy = self.colours().flat_map(|(service, name, colour)| {
            colour.backends.iter().filter_map(move |backend| {
                let labels = [
                    ("service", service.name.as_str()),
                    ("colour", name),
                    ("backend", backend.address.as_str()),
                ];
                Some((labels, backend.healthy?.into()))
            })
        });
        page.gauges(
            "bgswitch_backend_healthy",
            "1 for a healthy backend, 0 for one that is not, no sample while that is not known",
            healthy,
        )?;
        let states = services.iter().flat_map(|service| {
            State::ALL.map(|state| {
                let labels = [("service", &*service.name), ("state", state.as_str())];
                (labels, u64::from(service.state == state.as_str()))
            })
        });
        page.gauges(
            "bgswitch_release_state",
            "1 for the state of the service's release",
            states,
        )?;
        page.expiries(&self.expiries)
    }

    fn of_traffic(&self, page: &mut Page<'_, '_>) -> fmt::Result {
        page.counters(
            ("bgswitch_packets", None),
            "Packets that were sent on",
            self.by_part(
                "direction",
                [
                    ("forward", |of| of.forward_packets),
                    ("return", |of| of.return_packets),
                ],
            ),
        )?;
        page.counters(
            ("bgswitch", Some(Unit::Bytes)),
            "Bytes of the packets that were sent on, from the IP header",
            self.by_part(
                "direction",
                [
                    ("forward", |of| of.forward_bytes),
                    ("return", |of| of.return_bytes),
                ],
            ),
        )?;
        page.counters(
            ("bgswitch_new_flows", None),
            "Flows that chose the colour, without those by its preview",
            self.by_stats(|of| of.new_flows),
        )?;
        page.counters(
            ("bgswitch_resets", None),
            "TCP resets that were sent, to either side, by what caused them",
            self.by_part(
                "cause",
                [("cut", |of| of.cut_resets), ("drain", |of| of.drain_resets)],
            ),
        )?;
        page.gauges(
            "bgswitch_flows",
            "Remembered flows, closing ones left out",
            self.by_colour(|_, _, colour| colour.flows),
        )?;
        page.gauges(
            "bgswitch_draining_flows",
            "Flows of the colour that were born before the last flip away from it",
            self.by_colour(|_, _, colour| colour.draining_flows),
        )
    }
}

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let mut page = Page {
            encoder: &mut encoder,
        };
        self.of_host(&mut page)?;
        self.of_services(&mut page)?;
        self.of_traffic(&mut page)?;
        self.of_servers(&mut page)
    }
}

pub(super) type Label<'a> = (&'a str, &'a str);

/// A label's value, and the figure that has it.
type Part = (&'static str, fn(&ColourStats) -> u64);

const NO_EXEMPLAR: Option<&Exemplar<[Label<'_>; 0], u64>> = None;

/// Where families are written to, each with all its samples.
pub(super) struct Page<'a, 'b> {
    pub(super) encoder: &'a mut DescriptorEncoder<'b>,
}

impl Page<'_, '_> {
    fn gauges<'l, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([Label<'l>; N], u64)>,
    ) -> fmt::Result {
        let kind = MetricType::Gauge;
        let mut family = self.encoder.encode_descriptor(name, help, None, kind)?;
        for (labels, value) in samples {
            let value = i64::try_from(value).unwrap_or(i64::MAX);
            if labels.is_empty() {
                family.encode_gauge(&value)?;
            } else {
                family.encode_family(&labels)?.encode_gauge(&value)?;
            }
        }
        Ok(())
    }

    pub(super) fn counters<'l, const N: usize>(
        &mut self,
        (name, unit): (&str, Option<Unit>),
        help: &str,
        samples: impl IntoIterator<Item = ([Label<'l>; N], u64)>,
    ) -> fmt::Result {
        let (kind, unit) = (MetricType::Counter, unit.as_ref());
        let mut family = self.encoder.encode_descriptor(name, help, unit, kind)?;
        for (labels, value) in samples {
            if labels.is_empty() {
                family.encode_counter(&value, NO_EXEMPLAR)?;
            } else {
                let mut sample = family.encode_family(&labels)?;
                sample.encode_counter(&value, NO_EXEMPLAR)?;
            }
        }
        Ok(())
    }

    fn build(&mut self, version: &str) -> fmt::Result {
        let (name, help) = ("bgswitch_build", "The daemon's version");
        let mut family = self
            .encoder
            .encode_descriptor(name, help, None, MetricType::Info)?;
        family.encode_info(&[("version", version)])
    }

    fn expiries(&mut self, expiries: &BTreeMap<String, f64>) -> fmt::Result {
        let mut family = self.encoder.encode_descriptor(
            "bgswitch_standby_expiry_timestamp",
            "When the old colour need not stay up any more, while it is held",
            Some(&Unit::Seconds),
            MetricType::Gauge,
        )?;
        for (service, at) in expiries {
            let labels = [("service", service.as_str())];
            family.encode_family(&labels)?.encode_gauge(at)?;
        }
        Ok(())
    }
}
