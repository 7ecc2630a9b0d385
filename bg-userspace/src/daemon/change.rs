//! A change of a word: journal the intent, store, journal the result.

use bg_common::service::CutoverWord;
use tokio::sync::MutexGuard;

use super::{Daemon, metrics::Trigger, monitor::Told};
use crate::{
    api::{Kind, Refusal},
    datapath::{StoreError, Stored, now_ns},
    drain::Drain,
    journal::Entry,
    keeper::{INTENT_WAIT, Pending, RESULT_WAIT},
    switch::Switch,
};

/// Who wants what, why, and until when.
pub(super) struct Order<'a> {
    pub(super) actor: &'a str,
    pub(super) trigger: Trigger,
    pub(super) service: &'a str,
    /// The request is void from then on (`CLOCK_MONOTONIC`, ns).
    pub(super) deadline_ns: Option<u64>,
}

/// A change that was decided, and how it is told.
pub(super) struct WordChange<'a> {
    /// `flip`, `rollback` or `canary`.
    pub(super) action: &'a str,
    /// The word that must still be there.
    pub(super) from: CutoverWord,
    pub(super) to: CutoverWord,
    /// What becomes of old flows, unless they are not touched.
    pub(super) switch: Option<&'a Switch>,
    pub(super) detail: String,
    pub(super) why: Option<&'a String>,
    /// A sentence without its end: that it was not done.
    pub(super) undone: String,
    /// What does it all the same when the journal cannot be written; `None` when
    /// that does not stop it.
    pub(super) forcing: Option<&'a str>,
}

/// A change that was stored.
pub(super) struct Done {
    pub(super) stored: Stored,
    /// The drain that began.
    pub(super) drain: Option<Drain>,
    /// What did not work before the store.
    warnings: Vec<String>,
    /// The state and the result, on their way to the disk.
    writing: [Pending; 2],
}

impl Done {
    /// Waits until it is written down; returns what did not work beside it.
    pub(super) async fn written(self) -> Vec<String> {
        let [state, result] = self.writing.map(|one| one.within(RESULT_WAIT));
        let (state, result) = tokio::join!(state, result);
        let after = state.into_iter().chain(result);
        self.warnings.into_iter().chain(after).collect()
    }
}

impl Daemon {
    /// Journals, stores, journals. The next change may begin with the store done.
    pub(super) async fn carry_out(
        &self,
        order: &Order<'_>,
        change: WordChange<'_>,
        changing: MutexGuard<'_, ()>,
    ) -> Result<Done, Refusal> {
        let service = order.service;
        let WordChange {
            action, from, to, ..
        } = change;
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
        let entry = |phase, generation, detail| Entry {
            why: change.why.cloned(),
            ..Entry::new(order.actor, service, action, phase, generation, detail)
        };
        // A drain is noted before it begins: whoever is killed with the word
        // stored has left its deadline. What is on its way there in vain is void.
        let drain = change
            .switch
            .and_then(|switch| self.state().intend(service, switch));
        let withdraw = || {
            if let Some(switch) = change.switch {
                self.state().withdraw(service, switch);
            }
        };
        let intent = entry("intent", from.generation(), change.detail.clone());
        let intent = self.keeper.entry(intent);
        let noted = drain.map(|_| self.save());
        let mut warnings = Vec::new();
        let warning = intent.within(INTENT_WAIT).await;
        if let (Some(warning), Some(forcing)) = (&warning, change.forcing) {
            withdraw();
            let message = format!("{}: {warning}. {forcing} all the same", change.undone);
            return Err(Refusal::new(Kind::Failed, message));
        }
        warnings.extend(warning);
        if let Some(noted) = noted {
            warnings.extend(noted.within(RESULT_WAIT).await);
        }
        let stored = match self.datapath.store(service, from, to) {
            Ok(stored) => stored,
            Err(error) => {
                withdraw();
                let result = entry("result", from.generation(), format!("failed: {error}"));
                self.keeper.entry(result).unattended();
                let kind = match error {
                    StoreError::Conflict(_) => Kind::Conflict,
                    StoreError::UnknownService(_) => Kind::NotFound,
                };
                let message = format!("{}: {error}", change.undone);
                return Err(Refusal::new(kind, message));
            }
        };
        let told = Told {
            generation: Some(to.generation()),
            detail: change.detail.clone(),
            actor: Some(order.actor),
            why: change.why,
            store_ns: Some(stored.store_ns),
        };
        self.tell(stored.at_ns, action, service, told);
        self.count_stored(order, &change, &stored);
        self.state().saw(service, to);
        self.releases.word_changed(service, Some(order.actor));
        drop(changing);
        let saved = self.save();
        let result = entry("result", to.generation(), change.detail.clone());
        Ok(Done {
            stored,
            drain,
            warnings,
            writing: [saved, self.keeper.entry(result)],
        })
    }
}
