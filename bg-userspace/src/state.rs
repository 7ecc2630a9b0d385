//! What the daemon must know after a restart and the kernel does not: when
//! drains end, and what the services are called. The kernel's word is believed
//! over all of it (law 4).

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use bg_common::service::Colour;
use serde::{Deserialize, Serialize};

use crate::{
    switch::Switch,
    time::{self, unix_now},
};

/// The drain that a service is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// The generation of the flip that began it.
    pub generation: u16,
    /// Seconds since 1970.
    pub until: u64,
}

impl Drain {
    /// A drain that ends `after` from now, at a whole second, never earlier.
    pub fn new(generation: u16, after: Duration) -> Self {
        let until = unix_now() + after;
        Self {
            generation,
            until: until.as_secs() + u64::from(until.subsec_nanos() > 0),
        }
    }

    /// True when the deadline has passed.
    pub fn is_over(&self) -> bool {
        unix_now().as_secs() >= self.until
    }

    /// The deadline, RFC 3339, UTC.
    pub fn rfc3339(&self) -> String {
        time::rfc3339(self.until)
    }
}

/// The state file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Drains by service.
    #[serde(default)]
    pub drains: BTreeMap<String, Drain>,
    /// The last word seen of each service: its bits.
    #[serde(default)]
    pub words: BTreeMap<String, u64>,
    /// Ids of the services in the packet path: what a rollback without the
    /// daemon goes by when the configuration cannot be read.
    #[serde(default)]
    pub ids: BTreeMap<String, u32>,
    #[serde(skip)]
    file: PathBuf,
}

impl State {
    /// Reads the state; one that cannot be read is put aside, with a warning:
    /// it never keeps the daemon from starting.
    pub fn load(state_dir: &Path) -> Self {
        let file = state_dir.join("state.json");
        let read = match fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(error),
        };
        let state = read.unwrap_or_else(|error| {
            let aside = file.with_extension("json.bad");
            tracing::warn!(
                "{} cannot be read ({error}): put aside as {}",
                file.display(),
                aside.display()
            );
            let _ = fs::rename(&file, aside);
            Self::default()
        });
        Self { file, ..state }
    }

    /// Writes the state: to a new file, synced, then renamed over the old one.
    pub fn save(&self) -> io::Result<()> {
        let directory = self.file.parent().ok_or(io::ErrorKind::InvalidInput)?;
        fs::create_dir_all(directory)?;
        let temporary = self.file.with_extension("json.new");
        let mut file = fs::File::create(&temporary)?;
        file.write_all(&serde_json::to_vec_pretty(self)?)?;
        file.sync_all()?;
        fs::rename(&temporary, &self.file)?;
        fs::File::open(directory)?.sync_all()
    }

    /// Notes a word that was stored. Returns the drain it began, if it did.
    pub fn switched(&mut self, service: &str, switch: &Switch) -> Option<Drain> {
        self.words.insert(service.to_owned(), switch.to.0);
        self.drains.remove(service);
        let drain = Drain::new(switch.to.generation(), switch.drain?);
        self.drains.insert(service.to_owned(), drain);
        Some(drain)
    }

    /// Forgets all services but these.
    pub fn keep(&mut self, ids: BTreeMap<String, u32>) {
        self.drains.retain(|name, _| ids.contains_key(name));
        self.words.retain(|name, _| ids.contains_key(name));
        self.ids = ids;
    }

    /// The end of the drain that `colour` of a service is in, if it is.
    pub fn draining(
        &self,
        service: &str,
        active: Colour,
        colour: Colour,
        generation: u16,
    ) -> Option<&Drain> {
        let drain = self.drains.get(service)?;
        (colour != active && drain.generation == generation).then_some(drain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_put_aside() {
        let directory = std::env::temp_dir().join(format!("bgswitch-state-{}", std::process::id()));
        fs::create_dir_all(&directory).unwrap();
        fs::write(directory.join("state.json"), b"{\"drains\":").unwrap();
        let mut state = State::load(&directory);
        assert!(state.drains.is_empty() && directory.join("state.json.bad").exists());
        state.drains.insert(
            "llm".into(),
            Drain {
                generation: 3,
                until: 7,
            },
        );
        state.save().unwrap();
        assert_eq!(State::load(&directory), state);
        fs::remove_dir_all(directory).unwrap();
    }
}
