//! Remembered flows: who is there, and when it is over.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use aya::{
    Pod,
    maps::{HashMap, Map, MapData},
};
use bg_common::{
    abi::{TICK_SHIFT, map, tick_ns, ticks},
    key::FlowKey,
    service::{Colour, Flow, state},
};
use nix::time::ClockId;

use super::{Datapath, Error, layout::address_of, nanoseconds};

/// One remembered flow.
#[derive(Clone, Debug)]
pub struct FlowRecord {
    /// The client.
    pub client: SocketAddr,
    /// Service id.
    pub service: u32,
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
    /// `established`, `half_open` or `udp`.
    pub table: &'static str,
    /// Time since its last packet.
    pub idle: Duration,
    /// Both sides have closed it, or it was reset.
    pub closing: bool,
}

/// A kind of flow table: what its entries stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Established,
    HalfOpen,
    Udp,
}

impl Kind {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::HalfOpen => "half_open",
            Self::Udp => "udp",
        }
    }
}

/// The tables of one address family.
struct Family {
    established: &'static str,
    half_open: &'static str,
    udp: &'static str,
}

const V4: Family = Family {
    established: map::FLOWS_V4,
    half_open: map::HALF_OPEN_V4,
    udp: map::UDP_V4,
};
const V6: Family = Family {
    established: map::FLOWS_V6,
    half_open: map::HALF_OPEN_V6,
    udp: map::UDP_V6,
};

impl Family {
    const fn tables(&self) -> [(&'static str, Kind); 3] {
        [
            (self.established, Kind::Established),
            (self.half_open, Kind::HalfOpen),
            (self.udp, Kind::Udp),
        ]
    }
}

/// An established flow that was silent for longer is forgotten.
const ESTABLISHED_IDLE: u32 = ticks(Duration::from_hours(2).as_nanos() as u64);
/// A handshake that got no further in this time is none.
const HALF_OPEN_IDLE: u32 = ticks(Duration::from_mins(1).as_nanos() as u64);
/// A closed flow is kept for segments that are still on their way.
const CLOSING: u32 = ticks(Duration::from_secs(10).as_nanos() as u64);

/// True when an entry stands for no flow any more. `idle` is what its listener
/// says of UDP; `None` when there is no such listener, and so no packet that
/// could find the entry.
const fn is_over(kind: Kind, flow: &Flow, now: u32, idle: Option<u32>) -> bool {
    let Some(idle) = idle else {
        return true;
    };
    let silent = now.saturating_sub(flow.seen);
    match kind {
        Kind::Udp => silent > idle,
        // Proven, but the established table was full.
        Kind::HalfOpen if flow.proof != 0 && flow.state & (state::ANSWERED | state::MOVED) == 0 => {
            silent > ESTABLISHED_IDLE
        }
        Kind::HalfOpen => silent > HALF_OPEN_IDLE,
        Kind::Established => silent > ESTABLISHED_IDLE || is_closing(flow) && silent > CLOSING,
    }
}

const fn is_closing(flow: &Flow) -> bool {
    const BOTH: u8 = state::CLIENT_FIN | state::BACKEND_FIN;
    flow.state & BOTH == BOTH || flow.state & state::RESET != 0
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
        !self.closing && self.table != Kind::HalfOpen.as_str()
    }
}

impl Datapath {
    /// Calls `visit` for every flow that is there: entries that stand for none
    /// any more, and wait for the sweep, are passed over.
    pub fn flows(&self, mut visit: impl FnMut(&FlowRecord)) -> Result<(), Error> {
        self.family::<[u8; 4]>(&V4, &mut visit)?;
        self.family::<[u8; 16]>(&V6, &mut visit)
    }

    fn family<A: Copy + Into<IpAddr> + 'static>(
        &self,
        family: &Family,
        visit: &mut impl FnMut(&FlowRecord),
    ) -> Result<(), Error>
    where
        FlowKey<A>: Pod,
    {
        let backends = self.inner.backends();
        let listeners = self.inner.applied().listeners.clone();
        let now = tick();
        for (name, kind) in family.tables() {
            self.inner.each_flow::<A>(name, |key, flow| {
                let idle = listeners.get(&key.listener()).copied();
                let moved = kind == Kind::HalfOpen && flow.state & state::MOVED != 0;
                if moved || is_over(kind, flow, now, idle) {
                    return;
                }
                visit(&FlowRecord {
                    client: SocketAddr::new(key.client.into(), u16::from_be_bytes(key.port)),
                    service: flow.service,
                    colour: flow.colour(),
                    backend: backends.get(&flow.backend).map(address_of),
                    backend_id: flow.backend,
                    generation: flow.generation,
                    colour_spread: flow.colour_spread,
                    table: kind.as_str(),
                    idle: Duration::from_nanos(tick_ns(now.saturating_sub(flow.seen))),
                    closing: is_closing(flow),
                });
            })?;
        }
        Ok(())
    }

    /// Deletes the entries of flows that are over, and forgets backends that left
    /// and have no flows any more. Returns how many entries went.
    pub fn sweep(&self) -> Result<usize, Error> {
        let swept = self.sweep_family::<[u8; 4]>(&V4)? + self.sweep_family::<[u8; 16]>(&V6)?;
        self.forget_unused()?;
        Ok(swept)
    }

    fn sweep_family<A: Copy + Ord + 'static>(&self, family: &Family) -> Result<usize, Error>
    where
        FlowKey<A>: Pod,
    {
        let mut half_open = self.flow_table::<A>(family.half_open)?;
        let mut swept = 0;
        for (name, kind) in family.tables() {
            let listeners = self.inner.applied().listeners.clone();
            let now = tick();
            let over = |listeners: &BTreeMap<u16, u32>, key: &FlowKey<A>, flow: &Flow| {
                is_over(kind, flow, now, listeners.get(&key.listener()).copied())
            };
            let mut candidates = Vec::new();
            self.inner.each_flow::<A>(name, |key, flow| {
                if over(&listeners, key, flow) {
                    candidates.push(*key);
                }
            })?;
            if candidates.is_empty() {
                continue;
            }
            // Packets and changes went on meanwhile: look again.
            let listeners = self.inner.applied().listeners.clone();
            let mut table = self.flow_table::<A>(name)?;
            for key in &candidates {
                if !table
                    .get(key, 0)
                    .is_ok_and(|flow| over(&listeners, key, &flow))
                {
                    continue;
                }
                // What the handshake left behind would pass for the flow.
                let moved = |flow: Flow| flow.state & state::MOVED != 0;
                if kind == Kind::Established && half_open.get(key, 0).is_ok_and(moved) {
                    let _ = half_open.remove(key);
                }
                swept += usize::from(table.remove(key).is_ok());
            }
        }
        Ok(swept)
    }

    fn flow_table<A: Copy + 'static>(
        &self,
        name: &str,
    ) -> Result<HashMap<MapData, FlowKey<A>, Flow>, Error>
    where
        FlowKey<A>: Pod,
    {
        let of = if name == map::FLOWS_V4 || name == map::FLOWS_V6 {
            Map::HashMap
        } else {
            Map::LruHashMap
        };
        self.inner.open_map(name, of)
    }

    fn forget_unused(&self) -> Result<(), Error> {
        let applied = self.inner.applied().clone();
        let mut unused: BTreeSet<u32> = self.inner.backends().into_keys().collect();
        unused.retain(|id| !applied.backends.contains_key(id));
        if !unused.is_empty() {
            self.flows(|flow| {
                unused.remove(&flow.backend_id);
            })?;
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

fn tick() -> u32 {
    (nanoseconds(ClockId::CLOCK_MONOTONIC_COARSE) >> TICK_SHIFT) as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDLE: Option<u32> = Some(450);

    fn seen(seen: u32, state: u8) -> Flow {
        Flow {
            seen,
            state,
            ..Flow::default()
        }
    }

    #[test]
    fn a_silent_datagram_flow_is_over_when_the_packet_path_says_so() {
        let flow = seen(1000, 0);
        assert!(!is_over(Kind::Udp, &flow, 1450, IDLE));
        assert!(is_over(Kind::Udp, &flow, 1451, IDLE));
    }

    #[test]
    fn a_handshake_gets_a_minute() {
        for state in [0, state::ANSWERED, state::ORPHAN, state::MOVED] {
            assert!(!is_over(
                Kind::HalfOpen,
                &seen(0, state),
                HALF_OPEN_IDLE,
                IDLE
            ));
            assert!(is_over(
                Kind::HalfOpen,
                &seen(0, state),
                HALF_OPEN_IDLE + 1,
                IDLE
            ));
        }
        let full = Flow {
            proof: 1,
            ..seen(0, 0)
        };
        assert!(!is_over(Kind::HalfOpen, &full, HALF_OPEN_IDLE + 1, IDLE));
    }

    #[test]
    fn a_closed_flow_goes_soon_and_a_silent_one_late() {
        let closed = seen(0, state::CLIENT_FIN | state::BACKEND_FIN);
        assert!(!is_over(Kind::Established, &closed, CLOSING, IDLE));
        assert!(is_over(Kind::Established, &closed, CLOSING + 1, IDLE));
        let half_closed = seen(0, state::CLIENT_FIN);
        assert!(!is_over(
            Kind::Established,
            &half_closed,
            ESTABLISHED_IDLE,
            IDLE
        ));
        assert!(is_over(
            Kind::Established,
            &half_closed,
            ESTABLISHED_IDLE + 1,
            IDLE
        ));
    }

    #[test]
    fn a_flow_of_no_listener_is_over() {
        assert!(is_over(Kind::Established, &seen(1000, 0), 1000, None));
    }

    #[test]
    fn a_backend_is_forgotten_when_two_sweeps_in_a_row_find_no_flow() {
        let mut unused = Unused::default();
        assert!(unused.found(&[1, 2].into()).is_empty());
        assert_eq!(unused.found(&[2, 3].into()), [2].into());
        assert_eq!(unused.found(&[1, 3].into()), [3].into());
    }
}
