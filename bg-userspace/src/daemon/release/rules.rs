//! Asks for the figures of a release's rules, while its new colour is watched.

use std::sync::{Arc, Mutex};

use tokio::{
    task::JoinSet,
    time::{MissedTickBehavior, interval},
};

use crate::{
    config::PrometheusPlan,
    daemon::gates::prometheus::ask,
    figures::{Standing, Watch, together},
    locked,
    release::Release,
};

/// The rules of a release, at a step of its canary or, without one, behind its flip.
pub(super) struct Rules {
    /// [`Release::part`].
    of: (u64, Option<usize>),
    watches: Arc<Mutex<Vec<Watch>>>,
    /// Ended with it.
    _asking: JoinSet<()>,
}

impl Rules {
    /// Begins to ask.
    pub(super) fn new(service: &str, release: &Release, plan: &PrometheusPlan) -> Self {
        let watches: Vec<Watch> = plan.rules.iter().cloned().map(Watch::new).collect();
        let watches = Arc::new(Mutex::new(watches));
        let mut asking = JoinSet::new();
        for (index, rule) in plan.rules.iter().enumerate() {
            let version = release.version.as_deref().unwrap_or_default();
            let query = rule.query(service, release.to, version);
            let (plan, rule, watches) = (plan.clone(), rule.clone(), Arc::clone(&watches));
            asking.spawn(async move {
                // A server that answers late is not asked twice at once for it.
                let mut turns = interval(rule.interval);
                turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
                loop {
                    turns.tick().await;
                    let sample = ask(&plan, &query, rule.timeout).await;
                    if let Some(watch) = locked(&watches).get_mut(index) {
                        watch.hear(&sample);
                    }
                }
            });
        }
        Self {
            of: release.part(),
            watches,
            _asking: asking,
        }
    }

    /// True when it is of this release, where that is now.
    pub(super) fn are_of(&self, release: &Release) -> bool {
        self.of == release.part()
    }

    /// How they are, all together.
    pub(super) fn standing(&self) -> Standing {
        together(locked(&self.watches).iter())
    }

    /// What their last samples said.
    pub(super) fn said(&self) -> String {
        let said: Vec<String> = locked(&self.watches).iter().map(Watch::said).collect();
        said.join("; ")
    }
}
