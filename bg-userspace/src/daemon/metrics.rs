//! What Prometheus is told: events are counted as they happen, everything else is
//! looked up when somebody asks, once a second at most.

mod figures;
mod heard;
mod server;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bg_common::service::{Colour, CutoverWord};
use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, histogram::Histogram},
    registry::{Registry, Unit},
};

use self::figures::Figures;
pub(super) use self::server::Rebinding;
use super::{
    Daemon,
    change::{Order, WordChange},
};
use crate::{
    api::{FlipRequest, Flipped, Kind, Refusal, RollbackRequest},
    datapath::Stored,
    journal::{Entry, OFFLINE},
    release::Outcome,
    switch,
};

/// So long what was looked up is good enough for whoever asks next.
const FRESH: Duration = Duration::from_secs(1);
/// Seconds that a store takes.
const STORE: [f64; 9] = [1e-7, 2.5e-7, 5e-7, 1e-6, 2.5e-6, 5e-6, 1e-5, 1e-4, 1e-3];
/// Seconds until the first new flow.
const FIRST_FLOW: [f64; 8] = [1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0, 60.0];
/// Seconds that a gate takes.
const GATE: [f64; 9] = [0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 900.0];

/// What made somebody flip.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Trigger {
    /// A command, or a request.
    Manual,
    /// A release that goes on.
    Release,
    /// A release that rolls back by itself.
    Automatic,
    /// A command beside the daemon.
    Offline,
}

impl Trigger {
    const fn as_str(self) -> &'static str {
        match self {
            Self::Manual => "manual",
            Self::Release => "release",
            Self::Automatic => "automatic",
            Self::Offline => "offline",
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FlipLabels {
    service: String,
    to: &'static str,
    trigger: &'static str,
    result: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RollbackLabels {
    trigger: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct GateLabels {
    service: String,
    gate: String,
    result: &'static str,
}

/// A word that was stored, and whose first flow was not seen yet.
struct Awaited {
    generation: u16,
    at_ns: u64,
}

/// What was counted since the daemon's start, and who may ask for it.
pub(super) struct Metrics {
    registry: Registry,
    flips: Family<FlipLabels, Counter>,
    rollbacks: Family<RollbackLabels, Counter>,
    store: Histogram,
    first_flow: Histogram,
    gates: Family<GateLabels, Histogram, fn() -> Histogram>,
    /// By service.
    awaited: Mutex<BTreeMap<String, Awaited>>,
    /// The last answer, and when it was made. Whoever makes the next one holds it.
    answer: Mutex<Option<(Instant, Arc<str>)>>,
    server: Mutex<server::Server>,
}

impl Metrics {
    /// Nothing was counted yet. Binds the address, if there is one, which waits for
    /// [`Daemon::serve_metrics`].
    pub(super) fn bind(address: Option<SocketAddr>) -> anyhow::Result<Self> {
        let listener = address.map(server::bind).transpose();
        let listener = listener.map_err(anyhow::Error::msg)?;
        let gate: fn() -> Histogram = || Histogram::new(GATE);
        let metrics = Self {
            registry: Registry::default(),
            flips: Family::default(),
            rollbacks: Family::default(),
            store: Histogram::new(STORE),
            first_flow: Histogram::new(FIRST_FLOW),
            gates: Family::new_with_constructor(gate),
            awaited: Mutex::default(),
            answer: Mutex::default(),
            server: Mutex::new(server::Server::new(listener)),
        };
        // What alerts look for is there before it first happens.
        for trigger in [
            Trigger::Manual,
            Trigger::Release,
            Trigger::Automatic,
            Trigger::Offline,
        ] {
            drop(metrics.rollbacks.get_or_create(&rollback(trigger)));
        }
        Ok(metrics.registered())
    }

    fn registered(mut self) -> Self {
        let registry = &mut self.registry;
        registry.register(
            "bgswitch_flips",
            "Changes of the active colour that were asked for since the daemon's start",
            self.flips.clone(),
        );
        registry.register(
            "bgswitch_rollbacks",
            "Rollbacks of a flip or a canary that were done since the daemon's start",
            self.rollbacks.clone(),
        );
        registry.register_with_unit(
            "bgswitch_flip_store",
            "What the store of a flip or a rollback took",
            Unit::Seconds,
            self.store.clone(),
        );
        registry.register_with_unit(
            "bgswitch_flip_first_flow",
            "From the store of a flip to the first new flow on the new colour, as the packet path saw it",
            Unit::Seconds,
            self.first_flow.clone(),
        );
        registry.register_with_unit(
            "bgswitch_gate_duration",
            "What a gate of a release took",
            Unit::Seconds,
            self.gates.clone(),
        );
        self
    }

    fn awaited(&self) -> MutexGuard<'_, BTreeMap<String, Awaited>> {
        self.awaited.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a gate's run.
    pub(super) fn gate(&self, service: &str, gate: &str, outcome: &Outcome) {
        let labels = GateLabels {
            service: service.to_owned(),
            gate: gate.to_owned(),
            result: outcome.verdict.as_str(),
        };
        let seconds = outcome.took_ms as f64 / 1000.0;
        self.gates.get_or_create(&labels).observe(seconds);
    }

    fn flipped(&self, service: &str, to: Colour, trigger: Trigger, result: &'static str) {
        let labels = FlipLabels {
            service: service.to_owned(),
            to: to.as_str(),
            trigger: trigger.as_str(),
            result,
        };
        self.flips.get_or_create(&labels).inc();
    }

    fn rolled_back(&self, trigger: Trigger) {
        self.rollbacks.get_or_create(&rollback(trigger)).inc();
    }
}

const fn rollback(trigger: Trigger) -> RollbackLabels {
    RollbackLabels {
        trigger: trigger.as_str(),
    }
}

/// What became of a change that was not made; `None` for what was no order at all.
const fn result(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Usage | Kind::NotFound => None,
        Kind::Failed | Kind::NoDaemon | Kind::TimedOut | Kind::Datapath => Some("failed"),
        _ => Some("refused"),
    }
}

impl Daemon {
    /// Flips, and counts it when that is not done.
    pub(super) async fn counted_flip(
        self: &Arc<Self>,
        order: Order<'_>,
        request: FlipRequest,
    ) -> Result<Flipped, Refusal> {
        let (service, trigger, dry_run) = (order.service, order.trigger, request.dry_run);
        let to = self.aim(service, request.to.as_deref(), Colour::other);
        let flipped = Arc::clone(self).flip(order, request).await;
        if let (Err(refusal), Some(to), false) = (&flipped, to, dry_run) {
            self.count_undone(service, to, trigger, refusal);
        }
        flipped
    }

    /// Rolls back, and counts it when that is not done.
    pub(super) async fn counted_rollback(
        self: &Arc<Self>,
        order: Order<'_>,
        request: RollbackRequest,
    ) -> Result<Flipped, Refusal> {
        let (service, trigger) = (order.service, order.trigger);
        let leave = self.aim(service, request.leave.as_deref(), |active| active);
        let flipped = Arc::clone(self).rollback(order, request).await;
        if let (Err(refusal), Some(leave)) = (&flipped, leave) {
            self.count_undone(service, leave.other(), trigger, refusal);
        }
        flipped
    }

    /// The colour that is named, or what `usual` makes of the active one.
    fn aim(
        &self,
        service: &str,
        named: Option<&str>,
        usual: impl FnOnce(Colour) -> Colour,
    ) -> Option<Colour> {
        let active = self.datapath.word(service)?.active();
        named.map_or(Some(usual(active)), |named| switch::colour(named).ok())
    }

    fn count_undone(&self, service: &str, to: Colour, trigger: Trigger, refusal: &Refusal) {
        if let Some(result) = result(refusal.kind) {
            self.metrics.flipped(service, to, trigger, result);
        }
    }

    /// Counts a word that was just stored.
    pub(super) fn count_stored(&self, order: &Order<'_>, change: &WordChange<'_>, stored: &Stored) {
        let (from, to) = (change.from, change.to);
        if from.generation() == to.generation() {
            return;
        }
        let metrics = &self.metrics;
        metrics.store.observe(stored.store_ns as f64 / 1e9);
        if change.action == "rollback" {
            metrics.rolled_back(order.trigger);
        }
        if from.active() != to.active() {
            metrics.flipped(order.service, to.active(), order.trigger, "done");
            self.await_first_flow(order.service, to.generation(), stored.at_ns);
        }
    }

    /// Counts what was done while no daemon ran.
    pub(super) fn count_while_away(&self, entries: &[Entry]) {
        let done = |entry: &&Entry| {
            let is_rollback = entry.action == "rollback" && entry.phase == "result";
            is_rollback && entry.detail.ends_with(OFFLINE) && !entry.detail.starts_with("failed")
        };
        for Entry {
            service, detail, ..
        } in entries.iter().filter(done)
        {
            self.metrics.rolled_back(Trigger::Offline);
            // Not so where a canary was taken back.
            let to = detail
                .split([' ', ','])
                .skip_while(|word| *word != "->")
                .nth(1);
            if let Some(to) = to.and_then(|to| switch::colour(to).ok())
                && self.datapath.service_id(service).is_some()
            {
                self.metrics.flipped(service, to, Trigger::Offline, "done");
            }
        }
    }

    /// Counts a word that was stored beside the daemon.
    pub(super) fn count_outside(&self, service: &str, from: CutoverWord, to: CutoverWord) {
        if from.generation() == to.generation() {
            return;
        }
        self.metrics.rolled_back(Trigger::Offline);
        if from.active() != to.active() {
            let to = to.active();
            self.metrics.flipped(service, to, Trigger::Offline, "done");
        }
    }

    fn await_first_flow(&self, service: &str, generation: u16, at_ns: u64) {
        self.settle_first_flows();
        let awaited = Awaited { generation, at_ns };
        self.metrics.awaited().insert(service.to_owned(), awaited);
    }

    /// Looks for the first flows that are awaited: the packet path has stamped them.
    fn settle_first_flows(&self) {
        self.metrics.awaited().retain(|service, awaited| {
            let Some(stamp) = self.datapath.first_flow(service) else {
                return false;
            };
            let came = stamp.generation() == awaited.generation;
            if came {
                let waited = stamp.ns_since(awaited.at_ns) as f64 / 1e9;
                self.metrics.first_flow.observe(waited);
            }
            !came
        });
    }

    /// Everything, as text. Blocks for as long as it takes to count the flows, and not
    /// at all when somebody asked just before.
    fn metrics_text(&self) -> Result<Arc<str>, Refusal> {
        let mut answer = self
            .metrics
            .answer
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some((made, text)) = &*answer
            && made.elapsed() < FRESH
        {
            return Ok(Arc::clone(text));
        }
        let mut now = Registry::default();
        now.register_collector(Box::new(Figures::read(self)?));
        self.settle_first_flows();
        let mut out = String::new();
        text::encode_registry(&mut out, &now)
            .and_then(|()| text::encode_registry(&mut out, &self.metrics.registry))
            .and_then(|()| text::encode_eof(&mut out))
            .map_err(|error| Refusal::new(Kind::Failed, error.to_string()))?;
        let text: Arc<str> = out.into();
        *answer = Some((Instant::now(), Arc::clone(&text)));
        Ok(text)
    }
}
