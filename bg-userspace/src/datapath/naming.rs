//! Which service of a plan is which one in the kernel.

use std::collections::{BTreeMap, BTreeSet};

use bg_common::{
    abi::Room,
    service::{Colour, CutoverWord},
};

use super::{
    error::Error,
    ids::Ids,
    layout::{Layout, Tables},
};
use crate::plan::{ListenerPlan, Plan};

/// Ids that remembered flows hold: none of them is given to something new.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InUse {
    /// Of listeners.
    pub listeners: BTreeSet<u16>,
    /// Of services.
    pub services: BTreeSet<u32>,
}

/// What is known of a service by its name, from before a reload or a start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its id, if it was in the packet path.
    pub id: Option<u32>,
    /// Its last word.
    pub word: CutoverWord,
    /// The listeners it had.
    pub listeners: Vec<ListenerPlan>,
}

impl Known {
    /// The id, if a listener that it had, or one that it shall have, says the
    /// same in the kernel (law 4).
    pub fn id_in(&self, held: &Tables, wanted: &[ListenerPlan]) -> Option<u32> {
        self.id.filter(|id| {
            self.listeners
                .iter()
                .chain(wanted)
                .filter_map(|listener| held.endpoints.service_at(listener))
                .any(|service| service == *id)
        })
    }
}

/// Gives every service its id: by its name, if the kernel agrees; otherwise, for
/// a name that is new, by its listeners, if no other name has that id; otherwise
/// a new one, with a word that moves no traffic.
pub fn name_services(
    layout: &mut Layout,
    plan: &Plan,
    known: &BTreeMap<String, Known>,
    held: &Tables,
    in_use: &InUse,
    room: Room,
) -> Result<(), Error> {
    let mut taken = BTreeSet::new();
    for service in &plan.services {
        let id = known
            .get(&service.name)
            .and_then(|known| known.id_in(held, &service.listeners))
            .filter(|id| taken.insert(*id));
        layout
            .services
            .extend(id.map(|id| (service.name.clone(), id)));
    }
    let mut ids = Ids::new(
        "services, with those that old flows hold",
        0,
        room.services,
        held.endpoints
            .listeners
            .values()
            .map(|listener| listener.service)
            .chain(held.backends.values().map(|b| u32::from(b.service)))
            .chain(in_use.services.iter().copied()),
    );
    for service in &plan.services {
        if layout.services.contains_key(&service.name) {
            continue;
        }
        let mut before = service
            .listeners
            .iter()
            .filter_map(|listener| held.endpoints.service_at(listener));
        let id = if let Some(id) = before.clone().find(|id| taken.insert(*id)) {
            id
        } else {
            let id = ids.free()?;
            let word = match known.get(&service.name) {
                Some(known) => fresh(known.word.active(), known.word.generation()),
                None => before
                    .find_map(|id| held.words.get(&id))
                    .map_or(CutoverWord::new(Colour::Blue), |word| {
                        fresh(word.active(), 0)
                    }),
            };
            layout.new_services.insert(id, word);
            id
        };
        layout.services.insert(service.name.clone(), id);
    }
    Ok(())
}

/// A word without canary and floor.
const fn fresh(active: Colour, generation: u16) -> CutoverWord {
    CutoverWord(active as u64 | (generation as u64) << 32)
}
