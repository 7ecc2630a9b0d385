//! The words of the services: read and stored, with and without a daemon.

use std::{path::Path, sync::atomic::Ordering};

use bg_common::service::{CutoverWord, FirstFlow};

use super::{Error, Inner, StoreError, mmap::Words, naming::Known, now_ns, pins::Pins};
use crate::plan::ListenerPlan;

/// A flip that was stored.
#[derive(Clone, Copy, Debug)]
pub struct Stored {
    /// `CLOCK_MONOTONIC`, ns, just before the store.
    pub at_ns: u64,
    /// What the store took, ns, the two clock reads included.
    pub store_ns: u64,
}

/// The words, without a daemon: what an emergency rollback needs.
#[derive(Debug)]
pub struct PinnedWords {
    inner: Inner,
}

impl PinnedWords {
    /// Opens the pinned state below `bpffs`.
    pub fn open(bpffs: &Path) -> Result<Self, Error> {
        let pins = Pins::new(bpffs);
        if !pins.hold_state()? {
            return Err(Error::step(
                format!("opening the pinned state in {}", bpffs.display()),
                "there is none: nothing forwards here",
            ));
        }
        pins.check()?;
        Ok(Self {
            inner: Inner::open(&pins)?,
        })
    }

    /// The id of a service: by what is known of its name, or else by its listeners.
    pub fn service(&self, known: Option<&Known>, listeners: &[ListenerPlan]) -> Option<u32> {
        let held = self.inner.held();
        known
            .and_then(|known| known.id_in(&held, listeners))
            .or_else(|| held.service_of(listeners))
    }

    /// A service's word.
    pub fn word(&self, id: u32) -> CutoverWord {
        CutoverWord(self.inner.words.load(id as usize))
    }

    /// The stamp of the newest generation's first flow.
    pub fn first_flow(&self, id: u32) -> FirstFlow {
        FirstFlow(self.inner.first_flows.load(id as usize))
    }

    /// Stores a service's word, if it is still `expected`.
    pub fn store(
        &self,
        id: u32,
        expected: CutoverWord,
        new: CutoverWord,
    ) -> Result<Stored, StoreError> {
        store(&self.inner.words, id, expected, new)
    }
}

/// Stores a word, if it is still `expected`.
pub(super) fn store(
    words: &Words,
    id: u32,
    expected: CutoverWord,
    new: CutoverWord,
) -> Result<Stored, StoreError> {
    let word = words.at(id as usize);
    let at_ns = now_ns();
    let stored = word.compare_exchange(expected.0, new.0, Ordering::SeqCst, Ordering::Acquire);
    let store_ns = now_ns() - at_ns;
    stored
        .map(|_| Stored { at_ns, store_ns })
        .map_err(|actual| StoreError::Conflict(CutoverWord(actual)))
}
