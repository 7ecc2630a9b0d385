//! A flip: decide, journal the intent, store, journal the result, tell what is
//! true of it.

use std::{sync::Arc, time::Duration};

use bg_common::service::{Colour, FirstFlow};
use tokio::sync::MutexGuard;

use super::Daemon;
use crate::{
    api::{FlipRequest, Flipped, Kind, Refusal, RollbackRequest},
    datapath::{StoreError, now_ns},
    journal::Entry,
    keeper::{INTENT_WAIT, RESULT_WAIT},
    switch::{self, Switch, describe},
};

/// How long a command waits for the first new flow.
const FIRST_FLOW_WAIT: Duration = Duration::from_millis(250);
/// How much longer it waits for the count of old flows.
const COUNT_WAIT: Duration = Duration::from_millis(50);

/// Who wants what, why, and until when.
pub(super) struct Order<'a> {
    pub(super) actor: &'a str,
    pub(super) service: &'a str,
    /// The request is void from then on (`CLOCK_MONOTONIC`, ns).
    pub(super) deadline_ns: Option<u64>,
}

impl Daemon {
    pub(super) async fn flip(
        self: Arc<Self>,
        order: Order<'_>,
        request: FlipRequest,
    ) -> Result<Flipped, Refusal> {
        let service = order.service;
        let changing = self.changing.lock().await;
        let default = {
            let config = self.config();
            let known = config.services.get(service);
            known.map(|known| (known.on_flip, known.drain))
        };
        let default = default.ok_or_else(|| self.unknown(service))?;
        let word = self
            .datapath
            .word(service)
            .ok_or_else(|| self.unknown(service))?;
        let switch = switch::flip(service, word, &request, default, |colour| {
            self.unreachable(service, colour)
        })?;
        if request.dry_run {
            drop(changing);
            let mut flipped = describe(service, &switch);
            flipped.dry_run = true;
            flipped.old_flows = self.count_flows(service, switch.from.active()).await;
            return Ok(flipped);
        }
        let doomed = self.doomed_flows(service, &switch);
        let why = request.why.as_ref();
        let stored = self.store("flip", &order, &switch, why, request.force, changing);
        let flipped = stored.await?;
        Ok(self.watch(flipped, service, doomed).await)
    }

    pub(super) async fn rollback(
        self: Arc<Self>,
        order: Order<'_>,
        request: RollbackRequest,
    ) -> Result<Flipped, Refusal> {
        let service = order.service;
        let changing = self.changing.lock().await;
        let drain = self.config().services.get(service).map(|known| known.drain);
        let drain = drain.ok_or_else(|| self.unknown(service))?;
        let word = self
            .datapath
            .word(service)
            .ok_or_else(|| self.unknown(service))?;
        switch::at_generation(service, word, request.if_generation)?;
        let switch = switch::rollback(word, &request, drain);
        let doomed = self.doomed_flows(service, &switch);
        let why = request.why.as_ref();
        let stored = self.store("rollback", &order, &switch, why, true, changing);
        let flipped = stored.await?;
        Ok(self.watch(flipped, service, doomed).await)
    }

    /// Journals, stores, journals. A journal that cannot be written stops what
    /// is not `forced`. The next change may begin with the store done.
    async fn store(
        &self,
        action: &str,
        order: &Order<'_>,
        switch: &Switch,
        why: Option<&String>,
        forced: bool,
        changing: MutexGuard<'_, ()>,
    ) -> Result<Flipped, Refusal> {
        let service = order.service;
        // The word was read before: if its owner has given up and stores a word
        // of its own after this line, the store below finds another word.
        if order
            .deadline_ns
            .is_some_and(|deadline| now_ns() >= deadline)
        {
            let message = format!("the {action} of {service} came too late: nothing was changed");
            tracing::warn!("{message}");
            return Err(Refusal::new(Kind::TimedOut, message));
        }
        let mut flipped = describe(service, switch);
        let detail = format!("{} -> {}, {}", flipped.from, flipped.to, flipped.mode);
        let entry = |phase, generation, detail| Entry {
            why: why.cloned(),
            ..Entry::new(order.actor, service, action, phase, generation, detail)
        };
        // A drain is noted before it begins: whoever is killed with the word
        // stored has left its deadline. What is on its way there in vain is void.
        let drain = self.state().intend(service, switch);
        let intent = entry("intent", switch.from.generation(), detail.clone());
        let intent = self.keeper.entry(intent);
        let noted = drain.map(|_| self.save());
        let warning = intent.within(INTENT_WAIT).await;
        if let Some(warning) = warning.as_ref().filter(|_| !forced) {
            self.state().withdraw(service, switch);
            let message = format!(
                "{service} was not flipped: {warning}. `bgswitch flip --force` flips all the same"
            );
            return Err(Refusal::new(Kind::Failed, message));
        }
        flipped.warnings.extend(warning);
        if let Some(noted) = noted {
            flipped.warnings.extend(noted.within(RESULT_WAIT).await);
        }
        let stored = match self.datapath.store(service, switch.from, switch.to) {
            Ok(stored) => stored,
            Err(error) => {
                self.state().withdraw(service, switch);
                let detail = format!("failed: {error}");
                let result = entry("result", switch.from.generation(), detail);
                self.keeper.entry(result).unattended();
                let kind = match error {
                    StoreError::Conflict(_) => Kind::Conflict,
                    StoreError::UnknownService(_) => Kind::NotFound,
                };
                let message = format!("{service} was not flipped: {error}");
                return Err(Refusal::new(kind, message));
            }
        };
        self.state().saw(service, switch.to);
        drop(changing);
        flipped.at_ns = Some(stored.at_ns);
        flipped.store_ns = Some(stored.store_ns);
        flipped.draining_until = drain.map(|drain| drain.rfc3339());
        let saved = self.save();
        let result = self
            .keeper
            .entry(entry("result", switch.to.generation(), detail));
        let (saved, result) = tokio::join!(saved.within(RESULT_WAIT), result.within(RESULT_WAIT));
        flipped.warnings.extend(saved.into_iter().chain(result));
        Ok(flipped)
    }

    /// Backends of a colour without a next hop.
    pub(super) fn unreachable(&self, service: &str, colour: Colour) -> Vec<String> {
        let id = self.datapath.service_id(service);
        let silent = self.datapath.unresolved().into_iter();
        silent
            .filter(|(service, of, _)| Some(*service) == id && *of == colour)
            .map(|(_, _, address)| address.to_string())
            .collect()
    }

    /// Live flows of a colour, if they can be counted in time.
    fn count_flows(
        self: &Arc<Self>,
        service: &str,
        colour: Colour,
    ) -> impl Future<Output = Option<u64>> + use<> {
        let id = self.datapath.service_id(service);
        let daemon = Arc::clone(self);
        let counter = tokio::task::spawn_blocking(move || {
            let mut count = 0;
            daemon.datapath.flows(|flow| {
                let of_colour = flow.colour == colour && Some(flow.service) == id;
                count += u64::from(of_colour && flow.is_live());
            });
            count
        });
        async move {
            let counted = tokio::time::timeout(FIRST_FLOW_WAIT + COUNT_WAIT, counter).await;
            counted.ok()?.ok()
        }
    }

    /// Begins to count the flows that a cut will reset; the store does not wait for
    /// it. Afterwards, many of them are reset already.
    fn doomed_flows(
        self: &Arc<Self>,
        service: &str,
        switch: &Switch,
    ) -> Option<impl Future<Output = Option<u64>> + use<>> {
        let cut = switch.drain.is_none();
        cut.then(|| self.count_flows(service, switch.from.active()))
    }

    /// Waits a moment for the first new flow, and counts the old ones, unless those
    /// that were `doomed` are being counted.
    async fn watch(
        self: Arc<Self>,
        mut flipped: Flipped,
        service: &str,
        doomed: Option<impl Future<Output = Option<u64>>>,
    ) -> Flipped {
        let [old, new] = if flipped.from == Colour::Blue.as_str() {
            [Colour::Blue, Colour::Green]
        } else {
            [Colour::Green, Colour::Blue]
        };
        let silent = self.unreachable(service, new);
        if !silent.is_empty() {
            flipped.warnings.push(format!(
                "no next hop is known for {} of {}: their share of new flows may go nowhere",
                silent.join(", "),
                flipped.to
            ));
        }
        let first_flow = async {
            loop {
                let stamp = self.datapath.first_flow(service).unwrap_or(FirstFlow(0));
                if stamp.generation() == flipped.generation {
                    let ns = stamp.ns_since(flipped.at_ns.unwrap_or(0));
                    return ns as f64 / 1000.0;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        let first_flow = tokio::time::timeout(FIRST_FLOW_WAIT, first_flow);
        let count = async {
            match doomed {
                Some(doomed) => doomed.await,
                None => self.count_flows(service, old).await,
            }
        };
        let (first_flow, count) = tokio::join!(first_flow, count);
        flipped.first_new_flow_us = first_flow.ok();
        flipped.old_flows = count;
        flipped
    }
}
