//! Ids that are given out once: the lowest free one next.

use std::collections::BTreeSet;

use super::error::Error;

/// Ids of one kind.
pub struct Ids {
    what: &'static str,
    limit: u32,
    taken: BTreeSet<u32>,
    /// All ids below are taken.
    next: u32,
}

impl Ids {
    /// Ids from `first` to below `limit`, of which these are taken.
    pub fn new(
        what: &'static str,
        first: u32,
        limit: u32,
        taken: impl IntoIterator<Item = u32>,
    ) -> Self {
        Self {
            what,
            limit,
            taken: taken.into_iter().collect(),
            next: first,
        }
    }

    /// Takes the lowest free id.
    pub fn free(&mut self) -> Result<u32, Error> {
        while self.taken.contains(&self.next) {
            self.next += 1;
        }
        if self.next >= self.limit {
            return Err(Error::Full {
                what: self.what,
                wanted: self.limit as usize + 1,
                limit: self.limit as usize,
            });
        }
        self.taken.insert(self.next);
        Ok(self.next)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_filled_and_the_limit_is_kept() {
        let mut ids = Ids::new("things", 0, 4, [0, 2]);
        assert_eq!((ids.free().unwrap(), ids.free().unwrap()), (1, 3));
        assert!(ids.free().is_err());
    }
}
