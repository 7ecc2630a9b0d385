//! A flip or a rollback: decide, carry out, tell what is true of it.

use std::{net::IpAddr, sync::Arc, time::Duration};

use bg_common::service::{Colour, FirstFlow};
use tokio::sync::MutexGuard;

use super::{
    Daemon,
    change::{Done, Order, WordChange},
    health::Intent,
};
use crate::{
    api::{FlipRequest, Flipped, Refusal, RollbackRequest},
    config::FlipMode,
    release::Unflipped,
    switch::{self, Switch, describe},
};

/// How long a command waits for the first new flow.
const FIRST_FLOW_WAIT: Duration = Duration::from_millis(250);
/// How much longer it waits for the count of old flows.
const COUNT_WAIT: Duration = Duration::from_millis(50);

/// Whether a change was forced, and over what.
struct Force {
    given: bool,
    over: Vec<String>,
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
        let to = switch.to.active();
        let ill = self.check_health(&Intent {
            service,
            to,
            force: request.force,
            undone: format!("{service} was not flipped"),
            forcing: "`bgswitch flip --force` flips",
        })?;
        if request.dry_run {
            drop(changing);
            let mut flipped = describe(service, &switch);
            flipped.dry_run = true;
            flipped.warnings = self.health_warnings(service, to);
            flipped.old_flows = self.count_flows(service, switch.left()).await;
            return Ok(flipped);
        }
        let doomed = self.doomed_flows(service, &switch);
        let why = request.why.as_ref();
        let silent = Some(self.unreachable(service, to)).filter(|silent| !silent.is_empty());
        let silent = silent.map(|silent| format!("no next hop for {}", silent.join(", ")));
        let force = Force {
            given: request.force,
            over: silent.into_iter().chain(ill).collect(),
        };
        let stored = self.store("flip", &order, &switch, why, force, changing);
        let (flipped, done) = stored.await?;
        Ok(self.watch(flipped, done, service, doomed).await)
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
        let leave = request.leave.as_deref().map(switch::colour).transpose()?;
        let leave = leave.unwrap_or_else(|| switch::bad_colour(word));
        // The word alone does not say that a release is about to flip.
        let releases = self.releases.shown(service);
        let unflipped = (leave == word.active())
            .then(|| releases.unflipped(word.into()))
            .flatten();
        let switch = match unflipped {
            Some(Unflipped::Over) => {
                let ended = releases
                    .release
                    .as_ref()
                    .map_or_else(String::new, |release| {
                        format!("{} is {}. ", release.id(), release.state().as_str())
                    });
                let warning = format!(
                    "{ended}New flows do not go to {} because of it; `bgswitch flip {service}` sends them there \
                     all the same",
                    leave.other().as_str()
                );
                return Ok(Flipped {
                    warnings: vec![warning],
                    ..switch::has_left(service, word)
                });
            }
            Some(Unflipped::Running) => Some(switch::stay(word, request.mode, drain)),
            None => switch::rollback(word, leave, request.mode, drain),
        };
        let Some(switch) = switch else {
            return Ok(switch::has_left(service, word));
        };
        let doomed = self.doomed_flows(service, &switch);
        let why = request.why.as_ref();
        let force = Force {
            given: true,
            over: Vec::new(),
        };
        let stored = self.store("rollback", &order, &switch, why, force, changing);
        let (flipped, done) = stored.await?;
        Ok(self.watch(flipped, done, service, doomed).await)
    }

    /// Carries a switch out. A journal that cannot be written stops what is not
    /// forced.
    async fn store(
        &self,
        action: &str,
        order: &Order<'_>,
        switch: &Switch,
        why: Option<&String>,
        force: Force,
        changing: MutexGuard<'_, ()>,
    ) -> Result<(Flipped, Done), Refusal> {
        let mut detail = switch::detail(switch);
        if !force.over.is_empty() {
            detail = format!("{detail}, forced: {}", force.over.join("; "));
        }
        let change = WordChange {
            action,
            from: switch.from,
            to: switch.to,
            switch: Some(switch),
            detail,
            why,
            undone: format!("{} was not flipped", order.service),
            forcing: (!force.given).then_some("`bgswitch flip --force` flips"),
        };
        let done = self.carry_out(order, change, changing).await?;
        let flipped = Flipped {
            at_ns: Some(done.stored.at_ns),
            store_ns: Some(done.stored.store_ns),
            draining_until: done.drain.and_then(|drain| drain.until()),
            resets_until: done.drain.and_then(|drain| drain.resets_until()),
            ..describe(order.service, switch)
        };
        Ok((flipped, done))
    }

    /// Backends in a colour's pools without a next hop.
    pub(super) fn unreachable(&self, service: &str, colour: Colour) -> Vec<String> {
        let id = self.datapath.service_id(service);
        let silent = self.datapath.unresolved().into_iter();
        let silent = silent.filter(|(of_id, of, _)| Some(*of_id) == id && *of == colour);
        let silent: Vec<IpAddr> = silent.map(|(.., address)| address).collect();
        let silent = self.in_pools(service, colour, silent).into_iter();
        silent.map(|address| address.to_string()).collect()
    }

    /// Live flows of a colour, if they can be counted in time.
    pub(super) fn count_flows(
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
        let cut = switch.mode == FlipMode::Cut;
        cut.then(|| self.count_flows(service, switch.left()))
    }

    /// Waits a moment for the first new flow, and counts the old ones, unless those
    /// that were `doomed` are being counted; meanwhile what was done is written down.
    async fn watch(
        self: Arc<Self>,
        mut flipped: Flipped,
        done: Done,
        service: &str,
        doomed: Option<impl Future<Output = Option<u64>>>,
    ) -> Flipped {
        let [old, new] = if flipped.from == Colour::Blue.as_str() {
            [Colour::Blue, Colour::Green]
        } else {
            [Colour::Green, Colour::Blue]
        };
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
        let (first_flow, count, warnings) = tokio::join!(first_flow, count, done.written());
        flipped.warnings = warnings;
        flipped.warnings.extend(self.health_warnings(service, new));
        let silent = self.unreachable(service, new);
        if !silent.is_empty() {
            flipped.warnings.push(format!(
                "no next hop is known for {} of {}: their share of new flows may go nowhere",
                silent.join(", "),
                flipped.to
            ));
        }
        flipped.first_new_flow_us = first_flow.ok();
        flipped.old_flows = count;
        flipped
    }
}
