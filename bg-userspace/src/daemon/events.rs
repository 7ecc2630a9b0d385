//! What happened, for whoever wants to hear of it as it comes, or was away for a while:
//! a ring of the newest events, each with a number. Who is slow reads later, and is cut
//! when the ring has gone on without him; nobody waits for him.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};

use super::Daemon;
use crate::{
    api::{Kind, MonitorEvent, Refusal, SCHEMA},
    time,
};

/// Events that are kept.
const KEPT: usize = 1024;
/// Who may listen at once.
const LISTENERS: usize = 64;

/// The newest events.
#[derive(Debug)]
struct Ring {
    /// The number of the next one; they count from 1.
    next: u64,
    kept: VecDeque<Arc<MonitorEvent>>,
}

impl Ring {
    /// The number of the oldest one that is kept.
    fn first(&self) -> u64 {
        self.next - self.kept.len() as u64
    }

    fn push(&mut self, event: MonitorEvent) {
        if self.kept.len() == KEPT {
            self.kept.pop_front();
        }
        self.kept.push_back(Arc::new(event));
        self.next += 1;
    }

    fn get(&self, number: u64) -> Option<Arc<MonitorEvent>> {
        let index = number.checked_sub(self.first())?;
        self.kept.get(usize::try_from(index).ok()?).cloned()
    }
}

/// The ring, and who listens.
#[derive(Debug)]
pub(super) struct Events {
    /// Which daemon numbers them: milliseconds since 1970 at its start.
    epoch: i64,
    ring: Mutex<Ring>,
    came: watch::Sender<()>,
    room: Arc<Semaphore>,
}

impl Default for Events {
    fn default() -> Self {
        let kept = VecDeque::new();
        Self {
            epoch: time::unix_ms(),
            ring: Mutex::new(Ring { next: 1, kept }),
            came: watch::Sender::default(),
            room: Arc::new(Semaphore::new(LISTENERS)),
        }
    }
}

impl Events {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds an event. Waits for nobody.
    pub(super) fn push(&self, event: MonitorEvent) {
        self.ring().push(event);
        self.came.send_replace(());
    }

    fn id(&self, number: u64) -> String {
        format!("{}-{number}", self.epoch)
    }

    /// What follows an id that was given out: the next number, if this daemon gave it.
    fn after(&self, id: &str) -> Option<u64> {
        let (epoch, number) = id.split_once('-')?;
        let number: u64 = number.parse().ok()?;
        let ours = epoch.parse() == Ok(self.epoch) && number < self.ring().next;
        ours.then_some(number + 1)
    }
}

/// That events are missing.
#[derive(Debug, PartialEq, Eq, Serialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub(super) struct Lost {
    /// [`SCHEMA`].
    schema: u32,
    /// How many; `null` when another daemon counted them.
    missed: Option<u64>,
}

/// What a listener hears.
#[derive(Debug)]
pub(super) enum Heard {
    /// An event, and its id.
    Event(String, Arc<MonitorEvent>),
    /// Some are missing; the id says where it goes on.
    Lost(String, Lost),
}

/// Somebody who listens.
pub(super) struct Ear {
    daemon: Arc<Daemon>,
    came: watch::Receiver<()>,
    /// The number of the next event.
    next: u64,
    /// Of this service only, and what concerns all.
    service: Option<String>,
    /// Told first: what was missed before.
    lost: Option<Lost>,
    /// It was too slow, and has been told so.
    cut: bool,
    _place: OwnedSemaphorePermit,
}

impl Daemon {
    /// Lets somebody listen, from now on, or from behind the event with an id.
    pub(super) fn listen(
        self: &Arc<Self>,
        service: Option<String>,
        last: Option<&str>,
    ) -> Result<Ear, Refusal> {
        let events = &self.hub.log;
        let place = Arc::clone(&events.room).try_acquire_owned();
        let place = place.map_err(|_| {
            let message = format!("{LISTENERS} listen to events already: close one of them");
            Refusal::new(Kind::Conflict, message)
        })?;
        let came = events.came.subscribe();
        let after = last.map(|id| events.after(id));
        let ring = events.ring();
        let (next, lost) = match after {
            None => (ring.next, None),
            Some(None) => {
                let (schema, missed) = (SCHEMA, None);
                (ring.first(), Some(Lost { schema, missed }))
            }
            Some(Some(next)) if next < ring.first() => {
                let (schema, missed) = (SCHEMA, Some(ring.first() - next));
                (ring.first(), Some(Lost { schema, missed }))
            }
            Some(Some(next)) => (next, None),
        };
        drop(ring);
        Ok(Ear {
            daemon: Arc::clone(self),
            came,
            next,
            service,
            lost,
            cut: false,
            _place: place,
        })
    }
}

impl Ear {
    /// The next event; `None` for who was too slow.
    pub(super) async fn next(&mut self) -> Option<Heard> {
        let daemon = Arc::clone(&self.daemon);
        let events = &daemon.hub.log;
        if let Some(lost) = self.lost.take() {
            return Some(Heard::Lost(events.id(self.next - 1), lost));
        }
        if self.cut {
            return None;
        }
        loop {
            // Before the look: what comes behind it wakes.
            self.came.borrow_and_update();
            match self.look(&events.ring()) {
                Seen::Event(number, event) => {
                    return Some(Heard::Event(events.id(number), event));
                }
                Seen::Lost(lost) => {
                    self.cut = true;
                    return Some(Heard::Lost(events.id(self.next - 1), lost));
                }
                Seen::Nothing => {}
            }
            self.came.changed().await.ok()?;
        }
    }

    fn look(&mut self, ring: &Ring) -> Seen {
        let first = ring.first();
        if self.next < first {
            let (schema, missed) = (SCHEMA, Some(first - self.next));
            self.next = first;
            return Seen::Lost(Lost { schema, missed });
        }
        while let Some(event) = ring.get(self.next) {
            let number = self.next;
            self.next += 1;
            let of = self.service.as_ref();
            if event.service == "*" || of.is_none_or(|service| *service == event.service) {
                return Seen::Event(number, event);
            }
        }
        Seen::Nothing
    }
}

/// What is there for a listener.
enum Seen {
    Event(u64, Arc<MonitorEvent>),
    Lost(Lost),
    Nothing,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(detail: usize) -> MonitorEvent {
        MonitorEvent {
            schema: SCHEMA,
            time: String::new(),
            at_ns: 0,
            store_ns: None,
            event: "flip".to_owned(),
            service: "llm".to_owned(),
            generation: None,
            detail: detail.to_string(),
            actor: None,
            why: None,
        }
    }

    #[test]
    fn the_ring_keeps_the_newest_and_knows_their_numbers() {
        let mut ring = Ring {
            next: 1,
            kept: VecDeque::new(),
        };
        assert!(ring.get(1).is_none());
        for number in 1..=KEPT + 10 {
            ring.push(event(number));
        }
        assert_eq!((ring.first(), ring.next), (11, KEPT as u64 + 11));
        assert!(ring.get(10).is_none());
        assert_eq!(ring.get(11).unwrap().detail, "11");
        let newest = ring.get(ring.next - 1).unwrap();
        assert_eq!(newest.detail, (KEPT + 10).to_string());
        assert!(ring.get(ring.next).is_none());
    }

    #[test]
    fn only_ids_of_this_daemon_are_taken_up() {
        let events = Events::default();
        events.push(event(1));
        let epoch = events.epoch;
        assert_eq!(events.after(&format!("{epoch}-0")), Some(1));
        assert_eq!(events.after(&events.id(1)), Some(2));
        for wrong in [
            "",
            "1",
            "-",
            "x-1",
            &events.id(2),
            &format!("{}-1", epoch - 1),
        ] {
            assert_eq!(events.after(wrong), None, "{wrong}");
        }
    }
}
