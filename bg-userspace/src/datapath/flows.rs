//! Remembered flows: who is there, and when it is over.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use bg_common::{
    abi::{TICK_SHIFT, tick_ns},
    flow::{Flow, FlowKey, FlowTable, bits},
    service::Colour,
    snat::via,
};
use nix::time::ClockId;

use super::{Datapath, Error, layout::address_of, nanoseconds};

/// One remembered flow.
#[derive(Clone, Debug)]
pub struct FlowRecord {
    /// The client.
    pub client: SocketAddr,
    /// Id of the listener that it came by.
    pub listener: u16,
    /// Service id.
    pub service: u32,
    /// With `snat`, the gateway's port that the backend sees.
    pub source_port: Option<u16>,
    /// Its colour.
    pub colour: Colour,
    /// Its backend's address.
    pub backend: Option<IpAddr>,
    /// Backend id.
    pub backend_id: u32,
    /// Generation it was born in.
    pub generation: u16,
    /// Its [`bg_common::service::colour_spread`].
    pub colour_spread: u8,
    /// The table it is in.
    pub table: FlowTable,
    /// Time since its last packet.
    pub idle: Duration,
    /// Its client has proven to be there; an established flow's has, too.
    pub proven: bool,
    /// Both sides have closed it, or it was reset.
    pub closing: bool,
}

/// Backends that left and are no longer in use, as the sweeps find.
#[derive(Debug, Default)]
pub struct Unused(BTreeSet<u32>);

impl Unused {
    /// Takes what a sweep found without a flow, and returns what the sweep before
    /// found so too: one alone may have looked into a table just before a flow
    /// moved there.
    fn found(&mut self, unused: &BTreeSet<u32>) -> BTreeSet<u32> {
        let twice = unused & &self.0;
        self.0 = unused - &twice;
        twice
    }
}

impl FlowRecord {
    /// True for a flow that carries traffic, or may at any time.
    pub fn is_live(&self) -> bool {
        !self.closing && (self.table != FlowTable::HalfOpen || self.proven)
    }
}

impl Datapath {
    /// Calls `visit` for every flow that is there: lines of flows that are over,
    /// and of listeners that are gone, are passed over. What has no flow is not looked at,
    /// so a large table with few flows is read soon.
    pub fn flows(&self, visit: impl FnMut(&FlowRecord)) {
        let now = tick();
        self.records(now, visit, |table, visit| {
            self.inner.lines.each_there(table, now, visit);
        });
    }

    fn records(
        &self,
        now: u32,
        mut visit: impl FnMut(&FlowRecord),
        each: impl Fn(FlowTable, &mut dyn FnMut(&FlowKey, &Flow)),
    ) {
        let backends = self.inner.backends();
        let listeners = self.inner.applied().listeners.clone();
        for table in FlowTable::ALL {
            each(table, &mut |key: &FlowKey, flow: &Flow| {
                let moved = (flow.from_client | flow.from_backend) & bits::MOVED != 0;
                let half_open = table == FlowTable::HalfOpen;
                if half_open && moved
                    || flow.is_over(table, now)
                    || !listeners.contains(&key.listener())
                {
                    return;
                }
                let client = Ipv6Addr::from(key.address()).to_canonical();
                visit(&FlowRecord {
                    client: SocketAddr::new(client, u16::from_be_bytes(key.port())),
                    listener: key.listener(),
                    service: u32::from(flow.service),
                    source_port: via::is_port(flow.via).then_some(flow.via),
                    colour: flow.colour(),
                    backend: backends.get(&flow.backend).map(address_of),
                    backend_id: flow.backend,
                    generation: flow.generation,
                    colour_spread: flow.colour_spread,
                    table,
                    idle: Duration::from_nanos(tick_ns(now.saturating_sub(flow.seen))),
                    proven: (flow.from_client | flow.from_backend) & bits::PROVEN != 0,
                    closing: flow.is_closing(),
                });
            });
        }
    }

    /// Forgets backends that left and have no flows any more.
    pub fn sweep(&self) -> Result<(), Error> {
        let applied = self.inner.applied().clone();
        let mut unused: BTreeSet<u32> = self.inner.backends().into_keys().collect();
        unused.retain(|id| !applied.backends.contains_key(id));
        if !unused.is_empty() {
            // Every line of every table: what is forgotten must have no flow.
            self.records(
                tick(),
                |flow| {
                    unused.remove(&flow.backend_id);
                },
                |table, visit| self.inner.lines.each(table, visit),
            );
        }
        let twice = self
            .unused
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .found(&unused);
        if twice.is_empty() {
            return Ok(());
        }
        self.inner.forget_backends(&twice)
    }
}

/// The coarse clock in ticks, which goes with the packet path's: that one may be a tick
/// ahead or behind.
pub(super) fn tick() -> u32 {
    (nanoseconds(ClockId::CLOCK_MONOTONIC_COARSE) >> TICK_SHIFT) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backend_is_forgotten_when_two_sweeps_in_a_row_find_no_flow() {
        let mut unused = Unused::default();
        assert!(unused.found(&[1, 2].into()).is_empty());
        assert_eq!(unused.found(&[2, 3].into()), [2].into());
        assert_eq!(unused.found(&[1, 3].into()), [3].into());
    }
}
