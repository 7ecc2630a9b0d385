//! A canary: a share of new flows goes to the standby.

use std::sync::Arc;

use super::{
    Daemon,
    change::{Order, WordChange},
    health::Intent,
};
use crate::{
    api::{Canaried, CanaryRequest, Refusal, SCHEMA},
    switch::{self, percent},
};

impl Daemon {
    /// Sets the share; a smaller one is never kept from being set.
    pub(super) async fn canary(
        self: Arc<Self>,
        order: Order<'_>,
        request: CanaryRequest,
    ) -> Result<Canaried, Refusal> {
        let service = order.service;
        let changing = self.changing.lock().await;
        let word = self
            .datapath
            .word(service)
            .ok_or_else(|| self.unknown(service))?;
        let to = switch::canary(service, word, &request, |colour| {
            self.unreachable(service, colour)
        })?;
        let standby = word.active().other();
        let smaller = to.canary() <= word.canary();
        let ill = if smaller {
            None
        } else {
            self.check_health(&Intent {
                service,
                to: standby,
                force: request.force,
                undone: format!("the canary of {service} was not changed"),
                forcing: "`bgswitch canary --force` does it",
            })?
        };
        let mut answer = Canaried {
            schema: SCHEMA,
            service: service.to_owned(),
            active: word.active().as_str().to_owned(),
            standby: standby.as_str().to_owned(),
            generation: word.generation(),
            canary_percent_before: percent(word.canary()),
            canary_percent: percent(to.canary()),
            share: to.canary(),
            at_ns: None,
            store_ns: None,
            standby_flows: None,
            dry_run: request.dry_run,
            warnings: Vec::new(),
        };
        if request.dry_run {
            drop(changing);
            answer.standby_flows = self.count_flows(service, standby).await;
        } else {
            let mut detail = switch::canary_detail(word, to);
            if let Some(ill) = ill {
                detail = format!("{detail}, forced: {ill}");
            }
            let change = WordChange {
                action: "canary",
                from: word,
                to,
                switch: None,
                detail,
                why: request.why.as_ref(),
                undone: format!("the canary of {service} was not changed"),
                forcing: (!smaller && !request.force)
                    .then_some("`bgswitch canary --force` does it"),
            };
            let done = self.carry_out(&order, change, changing).await?;
            answer.at_ns = Some(done.stored.at_ns);
            answer.store_ns = Some(done.stored.store_ns);
            let counted = self.count_flows(service, standby);
            (answer.standby_flows, answer.warnings) = tokio::join!(counted, done.written());
        }
        if !smaller {
            answer
                .warnings
                .extend(self.health_warnings(service, standby));
        }
        Ok(answer)
    }
}
