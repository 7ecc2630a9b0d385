//! What the packet path hears of servers: who is listened to, and how a colour was before
//! a flip.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use bg_common::{service::Colour, signals::Signals};

use super::Daemon;
use crate::signals::Baseline;

/// How often what was heard is put aside, ...
const EVERY: Duration = Duration::from_mins(1);
/// ... and how often that is looked back on: a quarter of an hour.
const BACK: usize = 15;

/// What had been heard, a minute each, oldest first.
#[derive(Debug, Default)]
pub(super) struct Memory(Mutex<BTreeMap<String, VecDeque<[Signals; 2]>>>);

impl Daemon {
    /// Listens to the services whose bakes go by signals.
    pub(super) fn listen_to_servers(&self) {
        let config = self.config();
        let services = config.services.iter();
        let listened = services.filter(|(_, service)| service.release.bake.signals.is_some());
        let names: BTreeSet<String> = listened.map(|(name, _)| name.clone()).collect();
        drop(config);
        if let Err(error) = self.datapath.listen(&names) {
            tracing::error!("bakes go without signals: {error}");
        }
        let mut memory = self.heard.0.lock().unwrap_or_else(PoisonError::into_inner);
        memory.retain(|name, _| names.contains(name));
    }

    /// Puts aside what was heard, for ever.
    pub(super) async fn remember_signals(self: Arc<Self>) {
        loop {
            tokio::time::sleep(EVERY).await;
            let services: Vec<String> = self.config().services.keys().cloned().collect();
            for service in services {
                let Some(heard) = self.datapath.heard(&service) else {
                    continue;
                };
                let mut memory = self.heard.0.lock().unwrap_or_else(PoisonError::into_inner);
                let of_service = memory.entry(service).or_default();
                of_service.push_back(heard);
                if of_service.len() > BACK {
                    of_service.pop_front();
                }
            }
        }
    }

    /// How a colour was in the last quarter of an hour, as far as it was listened to.
    pub(super) fn baseline(&self, service: &str, colour: Colour) -> Option<Baseline> {
        let now = self.datapath.heard(service)?[colour as usize];
        let memory = self.heard.0.lock().unwrap_or_else(PoisonError::into_inner);
        let before = memory.get(service).and_then(VecDeque::front);
        let before = before.map_or(Signals::NONE, |heard| heard[colour as usize]);
        Some(Baseline::of(&now.since(&before)))
    }
}
