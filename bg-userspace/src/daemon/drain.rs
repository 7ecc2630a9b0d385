//! The end of drains: when a deadline has passed, the word's floor rises, and fewer
//! and fewer of the flows below it are spared.

use std::{sync::Arc, time::Duration};

use super::{Daemon, monitor::Told};
use crate::{datapath::StoreError, drain::Drain, journal::Entry, time};

/// How often the daemon looks at its words and drains.
const TICK: Duration = Duration::from_secs(1);
/// How often while flows are being reset: a window of 30 s has some 300 steps, more
/// than there are spreads.
const STEP: Duration = Duration::from_millis(100);

impl Daemon {
    /// Ends drains, and notices words that somebody else stored.
    pub(super) async fn tick(self: Arc<Self>) {
        loop {
            let pause = {
                let _changing = self.changing.lock().await;
                self.compare_words();
                if self.end_drains() { STEP } else { TICK }
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// Takes up the drains that go on without a daemon, as the words have them (law
    /// 4).
    pub(super) fn adopt_drains(&self) {
        let plans: Vec<_> = {
            let config = self.config();
            let services = config.services.iter();
            services.map(|(name, s)| (name.clone(), s.drain)).collect()
        };
        for (name, plan) in plans {
            if let Some(word) = self.datapath.word(&name) {
                self.state().adopt(&name, word, plan);
            }
        }
    }

    /// Takes every drain that is over a step further. True while there are steps
    /// left.
    fn end_drains(&self) -> bool {
        let over = self.state().drains_over();
        let steps = over.iter().map(|(name, drain)| self.end_drain(name, drain));
        steps.fold(false, |left, step| left | step)
    }

    /// One step of one drain; a step back is never taken. True when some are left.
    fn end_drain(&self, name: &str, drain: &Drain) -> bool {
        let word = self.datapath.word(name);
        let Some(word) = word.filter(|word| word.generation() == drain.generation) else {
            return false;
        };
        let spares = drain.spares(time::since_boot_ms());
        if spares >= word.drain_spares() {
            return true;
        }
        let to = word.drained(spares);
        let stored = match self.datapath.store(name, word, to) {
            Ok(stored) => stored,
            // Somebody changed the word in this moment: the next step, if there is one.
            Err(error @ StoreError::Conflict(_)) => {
                tracing::info!("{name}: {error}");
                return true;
            }
            Err(error @ StoreError::UnknownService(_)) => {
                tracing::info!("{name}: {error}");
                return false;
            }
        };
        self.state().saw(name, to);
        let began = word.floor().is_none();
        let detail = || format!("{}'s old flows are reset", word.active().other().as_str());
        let note = |phase, detail: String| {
            let generation = word.generation();
            let told = Told {
                generation: Some(generation),
                detail: detail.clone(),
                store_ns: Some(stored.store_ns),
                ..Told::default()
            };
            self.tell(stored.at_ns, "drain_end", name, told);
            let entry = Entry::new("bgswitch", name, "drain_end", phase, generation, detail);
            self.keeper.entry(entry).unattended();
        };
        if spares == 0 {
            note("result", detail());
            self.save().unattended();
        } else if began {
            let until = drain.resets_until().unwrap_or_default();
            note("intent", format!("{}, the last one at {until}", detail()));
        }
        spares > 0
    }
}
