//! A flip: decide, journal the intent, store, journal the result, tell what is
//! true of it.

use std::{sync::Arc, time::Duration};

use bg_common::service::{Colour, FirstFlow};

use super::Daemon;
use crate::{
    api::{FlipRequest, Flipped, Refusal, RollbackRequest, exit},
    config::FlipMode,
    datapath::{StoreError, now_ns},
    journal::Entry,
    state::Drain,
    switch::{self, Switch, describe},
};

/// How long a command waits for the first new flow.
const FIRST_FLOW_WAIT: Duration = Duration::from_millis(250);
/// How long a command waits for the count of old flows, once that is known.
const COUNT_WAIT: Duration = Duration::from_millis(50);

impl Daemon {
    pub(super) async fn flip(
        self: Arc<Self>,
        actor: &str,
        service: &str,
        request: FlipRequest,
    ) -> Result<Flipped, Refusal> {
        let (mode, drain) = {
            let config = self.config();
            let known = config
                .services
                .get(service)
                .ok_or_else(|| unknown(service))?;
            (
                known.on_flip,
                request.drain_s.map_or(known.drain, Duration::from_secs),
            )
        };
        let changing = self.changing.lock().await;
        if request.expires_ns.is_some_and(|at| now_ns() > at) {
            let message = format!("{service} was not flipped: who asked for it has given up");
            return Err(Refusal::new(exit::TIMED_OUT, message));
        }
        let word = self
            .datapath
            .word(service)
            .ok_or_else(|| unknown(service))?;
        let id = self.datapath.service_id(service);
        let switch = switch::flip(service, word, &request, mode, |colour| {
            let silent = self.datapath.unresolved();
            silent
                .into_iter()
                .filter(|(service, of, _)| Some(*service) == id && *of == colour)
                .map(|(_, _, address)| address.to_string())
                .collect()
        })?;
        if request.dry_run {
            return Ok(Flipped {
                dry_run: true,
                ..describe(service, &switch)
            });
        }
        let flipped = self.store("flip", actor, service, &switch, drain, request.why)?;
        drop(changing);
        Ok(self.watch(flipped, service).await)
    }

    pub(super) async fn rollback(
        self: Arc<Self>,
        actor: &str,
        service: &str,
        request: RollbackRequest,
    ) -> Result<Flipped, Refusal> {
        let drain = {
            let config = self.config();
            config
                .services
                .get(service)
                .ok_or_else(|| unknown(service))?
                .drain
        };
        let changing = self.changing.lock().await;
        let word = self
            .datapath
            .word(service)
            .ok_or_else(|| unknown(service))?;
        let switch = switch::rollback(service, word, &request)?;
        let flipped = self.store("rollback", actor, service, &switch, drain, request.why)?;
        drop(changing);
        Ok(self.watch(flipped, service).await)
    }

    fn store(
        &self,
        action: &str,
        actor: &str,
        service: &str,
        switch: &Switch,
        drain: Duration,
        why: Option<String>,
    ) -> Result<Flipped, Refusal> {
        let mut flipped = describe(service, switch);
        let detail = format!("{} -> {}, {}", flipped.from, flipped.to, flipped.mode);
        let mut entry = Entry::new(
            actor,
            service,
            action,
            "intent",
            switch.from.generation(),
            detail.clone(),
        );
        entry.why.clone_from(&why);
        self.write(&entry);
        let stored = self.datapath.store(service, switch.from, switch.to);
        let mut entry = Entry::new(
            actor,
            service,
            action,
            "result",
            switch.to.generation(),
            detail,
        );
        entry.why = why;
        let stored = match stored {
            Ok(stored) => stored,
            Err(error) => {
                entry.detail = format!("failed: {error}");
                self.write(&entry);
                let code = match error {
                    StoreError::Conflict(_) => exit::CONFLICT,
                    StoreError::UnknownService(_) => exit::FAILED,
                };
                return Err(Refusal::new(
                    code,
                    format!("{service} was not flipped: {error}"),
                ));
            }
        };
        flipped.at_ns = Some(stored.at_ns);
        flipped.store_ns = Some(stored.store_ns);
        {
            let mut state = self.state();
            state.words.insert(service.to_owned(), switch.to.0);
            state.drains.remove(service);
            if switch.mode == FlipMode::Drain {
                let drain = Drain::new(switch.to.generation(), drain);
                flipped.draining_until = Some(drain.rfc3339());
                state.drains.insert(service.to_owned(), drain);
            }
        }
        self.save();
        self.write(&entry);
        Ok(flipped)
    }

    /// Waits a moment for the first new flow, and counts the old ones.
    async fn watch(self: Arc<Self>, mut flipped: Flipped, service: &str) -> Flipped {
        let id = self.datapath.service_id(service);
        let counter = {
            let daemon = Arc::clone(&self);
            let old = Colour::ALL
                .into_iter()
                .find(|colour| colour.as_str() == flipped.from);
            tokio::task::spawn_blocking(move || {
                let mut count = 0;
                daemon
                    .datapath
                    .flows(|flow| {
                        let old = Some(flow.colour) == old && Some(flow.service) == id;
                        count += u64::from(old && !flow.closing && flow.table != "half_open");
                    })
                    .ok()
                    .map(|()| count)
            })
        };
        let wait = async {
            loop {
                let stamp = self.datapath.first_flow(service).unwrap_or(FirstFlow(0));
                if stamp.generation() == flipped.generation {
                    let ns = stamp.ns_since(flipped.at_ns.unwrap_or(0));
                    return Some(ns as f64 / 1000.0);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        flipped.first_new_flow_us = tokio::time::timeout(FIRST_FLOW_WAIT, wait)
            .await
            .ok()
            .flatten();
        flipped.old_flows = match tokio::time::timeout(COUNT_WAIT, counter).await {
            Ok(Ok(count)) => count,
            _ => None,
        };
        flipped
    }
}

fn unknown(service: &str) -> Refusal {
    Refusal::new(
        exit::USAGE,
        format!("there is no service `{service}`: `bgswitch status` lists them"),
    )
}
