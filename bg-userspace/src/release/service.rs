//! A service, its word and a clock, for tests of its releases.

use std::time::Duration;

use bg_common::service::Colour;

use super::*;
use crate::config::{GateKind, GatePlan, ReleasePlan};

/// Blue is active. The clock is in seconds.
pub(super) struct Service {
    pub(super) machine: Machine,
    pub(super) word: Word,
    pub(super) seconds: u64,
}

impl Service {
    /// Without a release.
    pub(super) fn idle() -> Self {
        Self {
            machine: Machine::default(),
            word: Word {
                active: Colour::Blue,
                generation: 7,
                canary: 0,
            },
            seconds: 1000,
        }
    }

    /// Begins a release to the standby, with health checks; what it asks for first.
    pub(super) fn starts(&mut self, plan: ReleasePlan) -> Vec<Command> {
        self.starts_watched(plan, true)
    }

    /// The same, with or without health checks.
    pub(super) fn starts_watched(&mut self, plan: ReleasePlan, watched: bool) -> Vec<Command> {
        let start = Start {
            by: By::default(),
            to: self.word.active.other(),
            version: None,
            tested: Vec::new(),
            plan,
            watched,
            force: false,
            word: self.word,
        };
        self.handle(Event::Start(Box::new(start)))
    }

    pub(super) fn handle(&mut self, event: Event) -> Vec<Command> {
        let now = Now {
            ms: self.seconds * 1000,
            unix_ms: 0,
        };
        self.machine.handle(event, now)
    }

    /// The machine looks at the word.
    pub(super) fn look(&mut self) -> Vec<Command> {
        let word = Some(self.word);
        self.handle(Event::Word { word, by: None })
    }

    /// Its hold is ended by hand.
    pub(super) fn retires(&mut self, force: bool) -> Vec<Command> {
        let by = By::default();
        self.handle(Event::Retire { by, force })
    }

    /// Time goes by, and then the new colour is like this.
    pub(super) fn after(&mut self, seconds: u64, health: Health) -> (State, Vec<Command>) {
        self.seconds += seconds;
        let todo = self.handle(Event::Health(health));
        (self.machine.state(), todo)
    }

    fn release(&self) -> &Release {
        self.machine.release.as_ref().unwrap()
    }

    pub(super) fn code(&self) -> u8 {
        self.release().code()
    }

    pub(super) fn why(&self) -> &str {
        &self.release().why
    }
}

pub(super) fn ill() -> Health {
    Health::Ill("it is wedged".to_owned())
}

/// Something of the operator's that is run, and passes if it is not told otherwise.
pub(super) fn exec(name: &str, timeout: Duration) -> GatePlan {
    GatePlan {
        name: name.to_owned(),
        timeout,
        kind: GateKind::Exec(vec!["/bin/true".to_owned()]),
    }
}
