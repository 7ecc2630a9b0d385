//! What is shown, and how it is chosen: two looks at the API, and what lies between them.

use std::{cmp::Reverse, collections::BTreeMap, time::Instant};

use clap::ValueEnum;

use crate::{
    api::{ColourStatus, Refusal, ReleaseReport, ServiceStatus, SignalStatus, Status},
    journal::Entry,
};

/// One look at the API.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    pub(super) at: Instant,
    pub(super) status: Status,
    /// Where in `status.services` a service is, by name.
    places: BTreeMap<String, usize>,
    /// The release that runs, or ran last, by service; of services that are steady, none.
    pub(super) releases: BTreeMap<String, ReleaseReport>,
    /// Oldest first.
    pub(super) journal: Vec<Entry>,
}

impl Sample {
    pub(super) fn new(
        status: Status,
        releases: BTreeMap<String, ReleaseReport>,
        journal: Vec<Entry>,
    ) -> Self {
        let names = status.services.iter().map(|service| service.name.clone());
        Self {
            at: Instant::now(),
            places: names.zip(0..).collect(),
            status,
            releases,
            journal,
        }
    }

    fn service(&self, name: &str) -> Option<&ServiceStatus> {
        self.status.services.get(*self.places.get(name)?)
    }
}

/// By what services are sorted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Sort {
    Name,
    Flows,
    NewFlows,
    Packets,
}

impl Sort {
    pub(super) const fn next(self) -> Self {
        match self {
            Self::Name => Self::Flows,
            Self::Flows => Self::NewFlows,
            Self::NewFlows => Self::Packets,
            Self::Packets => Self::Name,
        }
    }

    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Flows => "flows",
            Self::NewFlows => "new flows",
            Self::Packets => "packets",
        }
    }
}

/// What was heard of a colour's servers, a second.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Heard {
    pub(super) refused: f64,
    pub(super) reset: f64,
    pub(super) answers: f64,
    pub(super) failed: f64,
}

/// What is shown.
#[derive(Debug)]
pub(super) struct Screen {
    before: Sample,
    now: Sample,
    /// Name of the service that is shown whole.
    chosen: String,
    pub(super) sort: Sort,
    /// Why there is nothing newer.
    pub(super) trouble: Option<String>,
}

impl Screen {
    pub(super) fn new(first: Sample, sort: Sort) -> Self {
        let mut screen = Self {
            before: first.clone(),
            now: first,
            chosen: String::new(),
            sort,
            trouble: None,
        };
        let first = screen
            .services()
            .first()
            .map(|service| service.name.clone());
        screen.chosen = first.unwrap_or_default();
        screen
    }

    /// Takes a newer look.
    pub(super) fn take(&mut self, sample: Sample) {
        self.before = std::mem::replace(&mut self.now, sample);
        self.trouble = None;
    }

    pub(super) const fn now(&self) -> &Sample {
        &self.now
    }

    /// Chooses a service by its name.
    pub(super) fn choose(&mut self, name: &str) -> Result<(), Refusal> {
        if self.now.service(name).is_none() {
            let known = self.now.status.services.iter().map(|s| s.name.as_str());
            return Err(Refusal::unknown_service(name, known));
        }
        name.clone_into(&mut self.chosen);
        Ok(())
    }

    /// All services, sorted.
    pub(super) fn services(&self) -> Vec<&ServiceStatus> {
        let mut services: Vec<_> = self.now.status.services.iter().collect();
        let size = |service: &ServiceStatus| match self.sort {
            Sort::Name => 0,
            Sort::Flows => sum(service, |colour| colour.flows),
            Sort::NewFlows => self.more(service, |colour| colour.new_flows),
            Sort::Packets => self.more(service, |colour| colour.packets),
        };
        // Stable: those of one size stay in the order of their names.
        services.sort_by_cached_key(|service| Reverse(size(service)));
        services
    }

    /// The service that is shown whole: the first one, where the chosen one is gone.
    pub(super) fn chosen(&self) -> Option<&ServiceStatus> {
        let chosen = self.now.service(&self.chosen);
        chosen.or_else(|| self.services().first().copied())
    }

    /// Chooses the next service below.
    pub(super) fn down(&mut self) {
        self.step(|at, last| (at + 1).min(last));
    }

    /// Chooses the next service above.
    pub(super) fn up(&mut self) {
        self.step(|at, _| at.saturating_sub(1));
    }

    fn step(&mut self, to: impl Fn(usize, usize) -> usize) {
        let services = self.services();
        let at = services
            .iter()
            .position(|service| service.name == self.chosen);
        let next = to(at.unwrap_or(0), services.len().saturating_sub(1));
        let name = services.get(next).map(|service| service.name.clone());
        self.chosen = name.unwrap_or_default();
    }

    /// How much more of something there is since the look before, a second.
    fn per_second(&self, before: u64, now: u64) -> f64 {
        let seconds = self.now.at.duration_since(self.before.at).as_secs_f64();
        if seconds <= 0.0 {
            return 0.0;
        }
        // Less than before: the pins, or the listening, are new.
        now.saturating_sub(before) as f64 / seconds
    }

    /// What a service's colours counted together since the look before.
    fn more(&self, service: &ServiceStatus, of: fn(&ColourStatus) -> u64) -> u64 {
        let before = self.before.service(&service.name);
        let before = before.map_or(0, |before| sum(before, of));
        sum(service, of).saturating_sub(before)
    }

    /// The same, a second.
    pub(super) fn rate(&self, service: &ServiceStatus, of: fn(&ColourStatus) -> u64) -> f64 {
        self.per_second(0, self.more(service, of))
    }

    /// What a colour of the service counted, a second.
    pub(super) fn colour_rate(
        &self,
        service: &ServiceStatus,
        colour: &str,
        of: fn(&ColourStatus) -> u64,
    ) -> f64 {
        let in_it = |service: &ServiceStatus| service.colours.get(colour).map_or(0, of);
        let before = self.before.service(&service.name).map_or(0, in_it);
        self.per_second(before, in_it(service))
    }

    /// What was heard of a colour's servers, a second; `None` where nobody listens.
    pub(super) fn heard(&self, service: &ServiceStatus, colour: &str) -> Option<Heard> {
        let heard = |service: &ServiceStatus| service.colours.get(colour)?.signals.clone();
        let now = heard(service)?;
        let before = self.before.service(&service.name).and_then(heard);
        let before = before.unwrap_or_default();
        let failed = |heard: &SignalStatus| heard.status[4];
        Some(Heard {
            refused: self.per_second(
                before.refused + before.opened_again,
                now.refused + now.opened_again,
            ),
            reset: self.per_second(before.reset, now.reset),
            answers: self.per_second(before.answers, now.answers),
            failed: self.per_second(failed(&before), failed(&now)),
        })
    }

    /// Verdicts other than `forwarded` that came since the look before, a second, the
    /// most frequent first.
    pub(super) fn reasons(&self) -> Vec<(&str, f64)> {
        let before = &self.before.status.reasons;
        let reasons = self.now.status.reasons.iter();
        let mut rates: Vec<(&str, f64)> = reasons
            .filter(|(reason, _)| *reason != "forwarded")
            .map(|(reason, count)| {
                let before = before.get(reason).copied().unwrap_or(0);
                (reason.as_str(), self.per_second(before, *count))
            })
            .filter(|(_, rate)| *rate > 0.0)
            .collect();
        rates.sort_by(|a, b| b.1.total_cmp(&a.1));
        rates
    }
}

/// Of both colours together.
pub(super) fn sum(service: &ServiceStatus, of: fn(&ColourStatus) -> u64) -> u64 {
    service.colours.values().map(of).sum()
}
