//! A flip: decide, journal the intent, store, journal the result, tell what is
//! true of it.

use std::{sync::Arc, time::Duration};

use bg_common::service::{Colour, FirstFlow};

use super::Daemon;
use crate::{
    api::{FlipRequest, Flipped, Kind, Refusal, RollbackRequest},
    datapath::{StoreError, now_ns},
    journal::Entry,
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
        let id = self.datapath.service_id(service);
        let switch = switch::flip(service, word, &request, default, |colour| {
            let silent = self.datapath.unresolved();
            silent
                .into_iter()
                .filter(|(service, of, _)| Some(*service) == id && *of == colour)
                .map(|(_, _, address)| address.to_string())
                .collect()
        })?;
        if request.dry_run {
            drop(changing);
            let mut flipped = describe(service, &switch);
            flipped.dry_run = true;
            flipped.old_flows = Arc::clone(&self)
                .count_flows(service, switch.from.active())
                .await;
            return Ok(flipped);
        }
        let flipped = self.store("flip", &order, &switch, request.why.as_ref(), request.force)?;
        drop(changing);
        Ok(self.watch(flipped, service).await)
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
        let flipped = self.store("rollback", &order, &switch, request.why.as_ref(), true)?;
        drop(changing);
        Ok(self.watch(flipped, service).await)
    }

    /// Journals, stores, journals. A journal that cannot be written stops what
    /// is not `forced`.
    fn store(
        &self,
        action: &str,
        order: &Order<'_>,
        switch: &Switch,
        why: Option<&String>,
        forced: bool,
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
        let intent = entry("intent", switch.from.generation(), detail.clone());
        if let Some(warning) = self.write(&intent) {
            if !forced {
                let message = format!(
                    "{service} was not flipped: {warning}. `bgswitch flip --force` flips all the same"
                );
                return Err(Refusal::new(Kind::Failed, message));
            }
            flipped.warnings.push(warning);
        }
        let stored = match self.datapath.store(service, switch.from, switch.to) {
            Ok(stored) => stored,
            Err(error) => {
                let detail = format!("failed: {error}");
                self.write(&entry("result", switch.from.generation(), detail));
                let kind = match error {
                    StoreError::Conflict(_) => Kind::Conflict,
                    StoreError::UnknownService(_) => Kind::NotFound,
                };
                let message = format!("{service} was not flipped: {error}");
                return Err(Refusal::new(kind, message));
            }
        };
        flipped.at_ns = Some(stored.at_ns);
        flipped.store_ns = Some(stored.store_ns);
        let drain = self.state().switched(service, switch);
        flipped.draining_until = drain.map(|drain| drain.rfc3339());
        flipped.warnings.extend(self.save());
        let result = entry("result", switch.to.generation(), detail);
        flipped.warnings.extend(self.write(&result));
        Ok(flipped)
    }

    /// Live flows of a colour, if they can be counted in time.
    async fn count_flows(self: Arc<Self>, service: &str, colour: Colour) -> Option<u64> {
        let id = self.datapath.service_id(service);
        let counter = tokio::task::spawn_blocking(move || {
            let mut count = 0;
            let counted = self.datapath.flows(|flow| {
                let of_colour = flow.colour == colour && Some(flow.service) == id;
                count += u64::from(of_colour && !flow.closing && flow.table != "half_open");
            });
            counted.ok().map(|()| count)
        });
        let counted = tokio::time::timeout(FIRST_FLOW_WAIT + COUNT_WAIT, counter).await;
        counted.ok()?.ok().flatten()
    }

    /// Waits a moment for the first new flow, and counts the old ones.
    async fn watch(self: Arc<Self>, mut flipped: Flipped, service: &str) -> Flipped {
        let old = Colour::ALL
            .into_iter()
            .find(|colour| colour.as_str() == flipped.from)
            .unwrap_or(Colour::Blue);
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
        let count = Arc::clone(&self).count_flows(service, old);
        let (first_flow, count) = tokio::join!(first_flow, count);
        flipped.first_new_flow_us = first_flow.ok();
        flipped.old_flows = count;
        flipped
    }
}
