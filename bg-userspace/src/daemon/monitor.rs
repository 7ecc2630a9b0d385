//! Who watches packets, and what each is told. The packet path is asked for what any
//! of them wants, and for nothing when nobody is there; each is told what it wants
//! itself. Events stand between the packets, by the time of their store.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use bg_common::{
    flow::FlowTable,
    maglev::mix,
    monitor::{Pressure, Sighting, Watch},
};
use tokio::sync::{Notify, mpsc};

use super::{Daemon, events::Events};
use crate::{
    api::{MonitorBegin, MonitorEvent, MonitorLine, Refusal, SCHEMA},
    datapath::{Names, now_ns},
    sighting::seen,
    time::Wall,
};

/// How often the ring is looked at while somebody watches.
const TURN: Duration = Duration::from_millis(25);
/// So long an event may take from its store to here: packets that are younger wait,
/// and come behind it.
const HOLD_NS: u64 = 20_000_000;
/// Packets told in a turn, at most: the rest waits in the ring, or is lost and
/// counted.
const BATCH: usize = 4096;
/// Lines that wait for a viewer, at most.
const WAITING: usize = 8192;
/// How often a viewer hears from us at least.
const ALIVE: Duration = Duration::from_secs(1);
/// How long names are believed.
const NAMES: Duration = Duration::from_secs(1);

/// What a viewer wants to see.
pub(super) struct Filter {
    /// As [`Watch::reasons`].
    pub(super) reasons: u64,
    /// One packet of so many.
    pub(super) sample: u32,
    /// Only of this service: its id and name.
    pub(super) service: Option<(u32, String)>,
}

struct Viewer {
    filter: Filter,
    since_ns: u64,
    lost_before: u64,
    /// Lines that it was too slow for.
    missed: AtomicU64,
    lines: mpsc::Sender<String>,
}

impl Viewer {
    /// Whether the packet is one for it; `coin` is any number.
    fn wants(&self, sighting: &Sighting, coin: u64) -> bool {
        let of = self.filter.service.as_ref();
        let sample = u64::from(self.filter.sample);
        sighting.at_ns >= self.since_ns
            && self.filter.reasons & 1 << sighting.reason != 0
            && of.is_none_or(|(id, _)| *id == sighting.service)
            && coin.checked_rem(sample).unwrap_or(0) < u64::from(sighting.sample)
    }

    fn wants_event(&self, event: &MonitorEvent) -> bool {
        let of = self.filter.service.as_ref();
        event.at_ns >= self.since_ns
            && (event.service == "*" || of.is_none_or(|(_, name)| *name == event.service))
    }

    fn tell(&self, line: &str) {
        if let Err(mpsc::error::TrySendError::Full(_)) = self.lines.try_send(line.to_owned()) {
            self.missed.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// All viewers.
#[derive(Default)]
pub(super) struct Hub {
    viewers: Mutex<BTreeMap<u64, Arc<Viewer>>>,
    events: Mutex<Vec<MonitorEvent>>,
    /// The newest events, for whoever listens to nothing else.
    pub(super) log: Events,
    came: Notify,
}

impl Hub {
    fn viewers(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<Viewer>>> {
        self.viewers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn events(&self) -> MutexGuard<'_, Vec<MonitorEvent>> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the packet path is asked for: all that any of them wants.
fn union<'a>(filters: impl Iterator<Item = &'a Filter>) -> Watch {
    let mut watch: Option<Watch> = None;
    for filter in filters {
        let service = filter.service.as_ref().map_or(0, |(id, _)| id + 1);
        let own = Watch {
            reasons: filter.reasons,
            sample: filter.sample,
            service,
        };
        watch = Some(watch.map_or(own, |so_far| Watch {
            reasons: so_far.reasons | own.reasons,
            sample: so_far.sample.min(own.sample),
            service: if so_far.service == own.service {
                own.service
            } else {
                0
            },
        }));
    }
    watch.unwrap_or_default()
}

/// One viewer's end; the packet path is asked for less when it goes.
pub(super) struct View {
    daemon: Arc<Daemon>,
    id: u64,
    viewer: Arc<Viewer>,
    lines: mpsc::Receiver<String>,
    due: tokio::time::Instant,
}

impl Drop for View {
    fn drop(&mut self) {
        let mut viewers = self.daemon.hub.viewers();
        viewers.remove(&self.id);
        let watch = union(viewers.values().map(|viewer| &viewer.filter));
        self.daemon.datapath.watcher().set(&watch);
    }
}

impl View {
    /// The next lines, or, after a second without one, how many packets were not
    /// shown so far.
    pub(super) async fn next(&mut self) -> Option<String> {
        let mut lines = Vec::new();
        let waited = tokio::time::timeout_at(self.due, self.lines.recv_many(&mut lines, 256));
        if waited.await.is_ok() {
            return (!lines.is_empty()).then(|| lines.concat());
        }
        self.due = tokio::time::Instant::now() + ALIVE;
        let lost = self.daemon.datapath.watcher().lost().unwrap_or(0);
        let lost = lost.saturating_sub(self.viewer.lost_before);
        let missed = lost + self.viewer.missed.load(Ordering::Relaxed);
        Some(line(&MonitorLine::Alive {
            schema: SCHEMA,
            missed,
        }))
    }
}

fn line(line: &MonitorLine) -> String {
    serde_json::to_string(line).unwrap_or_default() + "\n"
}

impl Daemon {
    /// Lets somebody watch.
    pub(super) fn view(self: &Arc<Self>, filter: Filter) -> Result<View, Refusal> {
        let watcher = self.datapath.watcher();
        let lost_before = watcher.lost()?;
        let (sender, lines) = mpsc::channel(WAITING);
        let mut viewers = self.hub.viewers();
        let id = viewers.last_key_value().map_or(0, |(id, _)| id + 1);
        let viewer = Arc::new(Viewer {
            filter,
            since_ns: now_ns(),
            lost_before,
            missed: AtomicU64::new(0),
            lines: sender,
        });
        viewers.insert(id, Arc::clone(&viewer));
        watcher.set(&union(viewers.values().map(|viewer| &viewer.filter)));
        drop(viewers);
        self.hub.came.notify_one();
        let Filter {
            sample, service, ..
        } = &viewer.filter;
        viewer.tell(&line(&MonitorLine::Begin(MonitorBegin {
            schema: SCHEMA,
            at_ns: viewer.since_ns,
            service: service.as_ref().map(|(_, name)| name.clone()),
            sample: *sample,
        })));
        Ok(View {
            daemon: Arc::clone(self),
            id,
            viewer,
            lines,
            due: tokio::time::Instant::now() + ALIVE,
        })
    }

    /// Tells viewers and listeners what happened at `at_ns`. Waits for nobody.
    pub(super) fn tell(&self, at_ns: u64, event: &str, service: &str, told: Told<'_>) {
        let event = MonitorEvent {
            schema: SCHEMA,
            time: Wall::now().at(at_ns),
            at_ns,
            store_ns: told.store_ns,
            event: event.to_owned(),
            service: service.to_owned(),
            generation: told.generation,
            detail: told.detail,
            actor: told.actor.map(str::to_owned),
            why: told.why.cloned(),
        };
        if !self.hub.viewers().is_empty() {
            self.hub.events().push(event.clone());
        }
        self.hub.log.push(event);
    }

    /// Asks the packet path for nothing any more, whoever is still there.
    pub(super) fn stop_watching(&self) {
        self.hub.viewers().clear();
        self.datapath.watcher().set(&Watch::default());
    }

    /// Passes on what the packet path tells, for as long as somebody is there to hear
    /// it, beside the runtime: it never delays a flip.
    pub(super) async fn pass_on(self: Arc<Self>) {
        loop {
            self.hub.came.notified().await;
            let daemon = Arc::clone(&self);
            let passed = tokio::task::spawn_blocking(move || {
                let mut teller = Teller::new(&daemon);
                while !daemon.hub.viewers().is_empty() {
                    std::thread::sleep(TURN);
                    teller.turn(&daemon);
                }
            });
            if let Err(error) = passed.await {
                tracing::error!("passing on what packets do: {error}");
            }
        }
    }
}

/// What is told of an event.
#[derive(Default)]
pub(super) struct Told<'a> {
    pub(super) generation: Option<u16>,
    pub(super) detail: String,
    pub(super) actor: Option<&'a str>,
    pub(super) why: Option<&'a String>,
    /// What the store took, for what is one.
    pub(super) store_ns: Option<u64>,
}

/// What is kept from one turn to the next.
struct Teller {
    /// Packets that are too young.
    held: Vec<Sighting>,
    names: Names,
    names_until: Instant,
    pressure: [Pressure; FlowTable::ALL.len()],
    pressed: Instant,
    tosses: u64,
}

impl Teller {
    fn new(daemon: &Daemon) -> Self {
        Self {
            held: Vec::new(),
            names: Names::default(),
            names_until: Instant::now(),
            pressure: daemon.datapath.pressure().unwrap_or_default(),
            pressed: Instant::now(),
            tosses: now_ns(),
        }
    }

    fn turn(&mut self, daemon: &Daemon) {
        self.press(daemon);
        let horizon = now_ns().saturating_sub(HOLD_NS);
        let room = BATCH.saturating_sub(self.held.len());
        let held = &mut self.held;
        daemon
            .datapath
            .watcher()
            .drain(room, |sighting| held.push(sighting));
        held.sort_by_key(|sighting| sighting.at_ns);
        let ripe = held.partition_point(|sighting| sighting.at_ns <= horizon);
        let young = held.split_off(ripe);
        let ripe = std::mem::replace(held, young);
        let mut events = std::mem::take(&mut *daemon.hub.events());
        events.sort_by_key(|event| event.at_ns);
        let mut events = events.into_iter().peekable();
        if ripe.is_empty() && events.peek().is_none() {
            return;
        }
        if Instant::now() >= self.names_until {
            self.names_until = Instant::now() + NAMES;
            match daemon.datapath.names() {
                Ok(names) => self.names = names,
                Err(error) => tracing::error!("{error}"),
            }
        }
        let viewers: Vec<Arc<Viewer>> = daemon.hub.viewers().values().cloned().collect();
        let wall = Wall::now();
        for sighting in ripe {
            while let Some(event) = events.next_if(|event| event.at_ns <= sighting.at_ns) {
                tell_event(&viewers, event);
            }
            self.tosses += 1;
            let coin = mix(self.tosses);
            let mut wanting = viewers
                .iter()
                .filter(|viewer| viewer.wants(&sighting, coin))
                .peekable();
            if wanting.peek().is_some() {
                let seen = seen(&sighting, &mut self.names, wall);
                let line = line(&MonitorLine::Packet(Box::new(seen)));
                wanting.for_each(|viewer| viewer.tell(&line));
            }
        }
        events.for_each(|event| tell_event(&viewers, event));
    }

    /// Once a second: what befell the flow tables.
    fn press(&mut self, daemon: &Daemon) {
        if self.pressed.elapsed() < ALIVE {
            return;
        }
        self.pressed = Instant::now();
        let Ok(pressure) = daemon.datapath.pressure() else {
            return;
        };
        for table in FlowTable::ALL {
            let (now, before) = (pressure[table as usize], self.pressure[table as usize]);
            let name = table.as_str();
            let told = |detail| Told {
                detail,
                ..Told::default()
            };
            let evicted = now.evicted.saturating_sub(before.evicted);
            if evicted > 0 {
                let detail = format!("{name}: {evicted} flows gave way to newer ones");
                daemon.tell(now_ns(), "evicted", "*", told(detail));
            }
            let full = now.full.saturating_sub(before.full);
            if full > 0 {
                let detail = format!("{name}: no room for a flow, {full} times");
                daemon.tell(now_ns(), "table_full", "*", told(detail));
            }
        }
        self.pressure = pressure;
    }
}

fn tell_event(viewers: &[Arc<Viewer>], event: MonitorEvent) {
    let wanting = viewers.iter().filter(|viewer| viewer.wants_event(&event));
    let wanting: Vec<_> = wanting.collect();
    let line = line(&MonitorLine::Event(event));
    for viewer in wanting {
        viewer.tell(&line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(reasons: u64, sample: u32, service: Option<u32>) -> Filter {
        Filter {
            reasons,
            sample,
            service: service.map(|id| (id, id.to_string())),
        }
    }

    #[test]
    fn the_packet_path_is_asked_for_all_that_anybody_wants() {
        let asked = |filters: &[Filter]| {
            let watch = union(filters.iter());
            (watch.reasons, watch.sample, watch.service)
        };
        assert_eq!(asked(&[]), (0, 0, 0));
        assert_eq!(asked(&[filter(1, 10, Some(3))]), (1, 10, 4));
        let same = [filter(1, 10, Some(3)), filter(6, 5, Some(3))];
        assert_eq!(asked(&same), (7, 5, 4));
        let others = [filter(1, 10, Some(0)), filter(1, 10, Some(3))];
        assert_eq!(asked(&others), (1, 10, 0));
        let all = [filter(1, 10, Some(3)), filter(1, 10, None)];
        assert_eq!(asked(&all), (1, 10, 0));
    }
}
