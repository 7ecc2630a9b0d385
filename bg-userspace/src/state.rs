//! What the daemon must know after a restart and the kernel does not: what the
//! services are called, where they were, and when drains end. The kernel's word
//! is believed over all of it (law 4).

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use bg_common::service::{Colour, CutoverWord, SPREADS};
use serde::{Deserialize, Serialize};

use crate::{
    config::DrainPlan,
    datapath::{Known, Noted},
    drain::Drain,
    plan::ListenerPlan,
    switch::Switch,
    time,
};

/// A service, by its name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Its id in the packet path; none after it left.
    pub id: Option<u32>,
    /// The bits of its last word.
    pub word: u64,
    /// Its listeners.
    pub listeners: Vec<ListenerPlan>,
    /// Drains that may be under way: that of the word's generation is, that of
    /// the next one is if its flip was stored.
    #[serde(default)]
    drains: Vec<Drain>,
}

/// The state file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Services by name, those included that left.
    pub services: BTreeMap<String, Service>,
    /// The addresses that we put on interfaces.
    #[serde(default, skip_serializing_if = "Noted::is_empty")]
    pub announced: Noted,
    /// The boot that ids and drains belong to.
    #[serde(default)]
    boot: String,
    #[serde(skip)]
    file: PathBuf,
}

impl State {
    /// Reads the state; one that cannot be read is put aside, with a warning:
    /// it never keeps the daemon from starting.
    pub fn load(state_dir: &Path) -> Self {
        let file = state_dir.join("state.json");
        let mut state = read(&file).unwrap_or_else(|error| {
            let aside = file.with_extension("json.bad");
            tracing::warn!(
                "{} cannot be read ({error}): put aside as {}",
                file.display(),
                aside.display()
            );
            let _ = fs::rename(&file, aside);
            Self::default()
        });
        let boot = time::boot_id();
        if state.boot != boot {
            state.detached();
        }
        Self {
            boot,
            file,
            ..state
        }
    }

    /// Writes the state: to a new file, synced, then renamed over the old one.
    pub fn save(&self) -> io::Result<()> {
        replace(&self.file, &serde_json::to_vec_pretty(self)?)
    }

    /// Takes over from the file what a rollback beside a daemon that hung has
    /// noted there: drains of flips later than the last one that is known here.
    pub fn merge(&mut self) {
        let Ok(other) = read(&self.file) else {
            return;
        };
        if other.boot != self.boot {
            return;
        }
        for (name, service) in &mut self.services {
            let noted = other.services.get(name).map(|other| &other.drains);
            for drain in noted.into_iter().flatten() {
                let is_later = drain.generation.wrapping_sub(service.generation()) as i16 > 0;
                if is_later && service.drain(drain.generation).is_none() {
                    service.drains.push(*drain);
                }
            }
        }
    }

    /// What the packet path is to know of the services.
    pub fn known(&self) -> BTreeMap<String, Known> {
        let known = |service: &Service| Known {
            id: service.id,
            word: CutoverWord(service.word),
            listeners: service.listeners.clone(),
        };
        self.services
            .iter()
            .map(|(name, service)| (name.clone(), known(service)))
            .collect()
    }

    /// Notes the services that are in the packet path now. Those that left keep
    /// their word, in case they come back.
    pub fn applied(&mut self, now: BTreeMap<String, (u32, CutoverWord, Vec<ListenerPlan>)>) {
        for (name, service) in &mut self.services {
            if !now.contains_key(name) {
                service.id = None;
                service.drains.clear();
            }
        }
        for (name, (id, word, listeners)) in now {
            let service = self.services.entry(name).or_default();
            if service.id != Some(id) {
                service.word = word.0;
                service.drains.clear();
            }
            (service.id, service.listeners) = (Some(id), listeners);
        }
    }

    /// Nothing is in the packet path any more: flows, drains and ids are gone.
    pub fn detached(&mut self) {
        self.applied(BTreeMap::new());
        self.announced.clear();
    }

    /// Notes a flip that is about to be stored. Returns the drain that it will
    /// begin, if it will: to be saved before the store.
    pub fn intend(&mut self, service: &str, switch: &Switch) -> Option<Drain> {
        let drain = Drain::new(switch.to.generation(), switch.drain?);
        let service = self.services.entry(service.to_owned()).or_default();
        service.drains.retain(|d| d.generation != drain.generation);
        service.drains.push(drain);
        Some(drain)
    }

    /// Takes an intent back whose flip was not stored.
    pub fn withdraw(&mut self, service: &str, switch: &Switch) {
        if let Some(service) = self.services.get_mut(service) {
            let void = switch.to.generation();
            service.drains.retain(|drain| drain.generation != void);
        }
    }

    /// Notes the word that a service has. Returns the one noted before, if it was
    /// another one; a drain that went on to its end since makes no other word.
    pub fn saw(&mut self, service: &str, word: CutoverWord) -> Option<CutoverWord> {
        let service = self.services.entry(service.to_owned()).or_default();
        let before = CutoverWord(std::mem::replace(&mut service.word, word.0));
        let generation = word.generation();
        if word.drain_spares() == 0 {
            service.drains.clear();
        }
        if word.drain_spares() <= before.drain_spares() && word == before.ended_as(word) {
            return None;
        }
        service.drains.retain(|d| d.generation == generation);
        Some(before)
    }

    /// Makes a service's drain agree with its word, after a time in which nobody
    /// looked after it: resets that have begun go on from where they are, at their
    /// pace, or at that of `plan` where nothing is noted of them; those that are due
    /// begin now.
    pub fn adopt(&mut self, service: &str, word: CutoverWord, plan: DrainPlan) {
        let service = self.services.entry(service.to_owned()).or_default();
        let (generation, now) = (word.generation(), time::since_boot_ms());
        let mut drains = service.drains.iter_mut();
        let noted = drains.find(|drain| drain.generation == generation);
        match (word.drain_spares(), noted) {
            (0, _) | (SPREADS, None) => {}
            (spares, Some(drain)) => drain.rebase(spares, plan.reset_over, now),
            (spares, None) => {
                let mut drain = Drain::new(generation, plan);
                drain.rebase(spares, plan.reset_over, now);
                service.drains.push(drain);
            }
        }
    }

    /// Drains whose deadline has passed, by service.
    pub fn drains_over(&self) -> Vec<(String, Drain)> {
        let now = time::since_boot_ms();
        let over = |service: &Service| {
            let drain = service.drain(service.generation())?;
            drain.is_over(now).then_some(*drain)
        };
        self.services
            .iter()
            .filter_map(|(name, service)| Some((name.clone(), over(service)?)))
            .collect()
    }

    /// The drain that `colour` of a service is in, if it is.
    pub fn draining(&self, service: &str, word: CutoverWord, colour: Colour) -> Option<&Drain> {
        let drain = self.services.get(service)?.drain(word.generation())?;
        (colour != word.active()).then_some(drain)
    }
}

impl Service {
    const fn generation(&self) -> u16 {
        CutoverWord(self.word).generation()
    }

    fn drain(&self, generation: u16) -> Option<&Drain> {
        self.drains.iter().find(|d| d.generation == generation)
    }
}

/// Writes a JSON file whole or not at all: to a new file, synced, then renamed over
/// the old one. Only its owner may read it: gates' headers may hold secrets.
pub fn replace(file: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = file.parent().ok_or(io::ErrorKind::InvalidInput)?;
    fs::create_dir_all(directory)?;
    let temporary = file.with_extension(format!("json.{}", std::process::id()));
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    let mut new = options.open(&temporary)?;
    new.write_all(bytes)?;
    new.sync_all()?;
    fs::rename(&temporary, file)?;
    fs::File::open(directory)?.sync_all()
}

fn read(file: &Path) -> io::Result<State> {
    match fs::read(file) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(State::default()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use crate::config::FlipMode;

    const BLUE: CutoverWord = CutoverWord::new(Colour::Blue);

    fn directory(name: &str) -> PathBuf {
        let directory =
            std::env::temp_dir().join(format!("bgswitch-state-{name}-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn drain(from: CutoverWord, after: Duration) -> Switch {
        Switch {
            from,
            to: from.flipped(from.active().other(), false),
            mode: FlipMode::Drain,
            drain: Some(DrainPlan {
                deadline: after,
                ..DrainPlan::default()
            }),
        }
    }

    fn with_llm(directory: &Path) -> State {
        let mut state = State::load(directory);
        let listeners = vec!["tcp://192.0.2.1:80".parse().unwrap()];
        state.applied([("llm".to_owned(), (3, BLUE, listeners))].into());
        state
    }

    #[test]
    fn garbage_is_put_aside() {
        let directory = directory("garbage");
        fs::write(directory.join("state.json"), b"{\"services\":").unwrap();
        let mut state = with_llm(&directory);
        assert!(directory.join("state.json.bad").exists());
        state.intend("llm", &drain(BLUE, Duration::from_mins(1)));
        state.save().unwrap();
        assert_eq!(State::load(&directory), state);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_drain_that_was_noted_before_the_store_counts_from_the_store_on() {
        let directory = directory("drain");
        let mut state = with_llm(&directory);
        let first = drain(BLUE, Duration::from_mins(1));
        state.intend("llm", &first);
        state.saw("llm", first.to);
        let second = drain(first.to, Duration::from_mins(1));
        state.intend("llm", &second);
        let drains = &mut state.services.get_mut("llm").unwrap().drains;
        for drain in drains.iter_mut().filter(|d| d.generation == 2) {
            let now = time::since_boot_ms();
            drain.rebase(SPREADS - 1, Duration::ZERO, now);
        }
        // Killed here, or the store failed: the first drain is what counts.
        assert!(state.draining("llm", first.to, Colour::Blue).is_some());
        assert!(state.drains_over().is_empty());
        // Killed after the store: a later start sees the word, and the drain.
        assert_eq!(state.saw("llm", second.to), Some(first.to));
        let over = state.drains_over();
        assert_eq!((over.len(), over[0].1.generation), (1, 2));
        assert!(state.draining("llm", second.to, Colour::Green).is_some());
        // Its end is no change by somebody else, and done when nothing is spared.
        assert_eq!(state.saw("llm", second.to.drained(9)), None);
        assert_eq!(state.drains_over().len(), 1);
        assert_eq!(state.saw("llm", second.to.drained(0)), None);
        assert!(state.drains_over().is_empty());
        // Nor is a word that stays, also after a cut.
        let cut = second.to.drained(0).flipped(Colour::Blue, true);
        assert!(state.saw("llm", cut).is_some());
        assert_eq!(state.saw("llm", cut), None);
        assert!(state.saw("llm", second.to.drained(0)).is_some());
        // What goes backwards is.
        assert!(state.saw("llm", second.to).is_some());
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn a_rollback_beside_the_daemon_leaves_its_drain() {
        let directory = directory("beside");
        let mut daemon = with_llm(&directory);
        daemon.save().unwrap();
        let mut beside = State::load(&directory);
        let switch = drain(BLUE, Duration::from_mins(1));
        let noted = beside.intend("llm", &switch);
        beside.saw("llm", switch.to);
        beside.save().unwrap();
        daemon.merge();
        daemon.saw("llm", switch.to);
        assert_eq!(
            daemon.draining("llm", switch.to, Colour::Blue),
            noted.as_ref()
        );
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn the_word_says_how_far_a_drain_is_at_its_end() {
        let directory = directory("adopt");
        let green = BLUE.flipped(Colour::Green, false);
        let plan = DrainPlan::default();
        // Of one that is noted to have an hour left, and of one of which nothing is.
        for noted in [true, false] {
            let mut state = with_llm(&directory);
            if noted {
                state.intend("llm", &drain(BLUE, Duration::from_hours(1)));
            }
            state.saw("llm", green);
            state.adopt("llm", green, plan);
            assert!(state.drains_over().is_empty());
            state.adopt("llm", green.drained(64), plan);
            let over = state.drains_over();
            let spares = over[0].1.spares(time::since_boot_ms());
            assert!((40..=65).contains(&spares), "{spares}");
        }
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn another_boot_has_no_drains_and_no_ids_but_the_words() {
        let directory = directory("boot");
        let mut state = with_llm(&directory);
        state.intend("llm", &drain(BLUE, Duration::from_mins(1)));
        let green = BLUE.flipped(Colour::Green, false);
        state.saw("llm", green);
        state.boot = "another".to_owned();
        state.save().unwrap();
        let state = State::load(&directory);
        assert_eq!(state.known()["llm"].word, green);
        assert_eq!(state.known()["llm"].id, None);
        assert!(state.draining("llm", green, Colour::Blue).is_none());
        fs::remove_dir_all(directory).unwrap();
    }
}
