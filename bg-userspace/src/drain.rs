//! A drain: until when old flows may stay, and how they are reset then. Pure: the
//! time comes in, what the word has to say goes out.

use std::time::Duration;

use bg_common::service::SPREADS;
use serde::{Deserialize, Serialize};

use crate::{
    config::{DrainEnd, DrainPlan},
    time,
};

/// The largest spread.
const LAST: u64 = SPREADS as u64 - 1;

/// The drain that a flip began. Its times are in the clock that no one can set
/// (`CLOCK_BOOTTIME`): pins and flows last as long as the boot, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// The generation of the flip.
    pub generation: u16,
    /// The deadline, milliseconds since the boot; `None`: old flows stay until they
    /// end.
    until_ms: Option<u64>,
    /// From the first reset to the last, milliseconds.
    #[serde(default)]
    reset_over_ms: u64,
}

impl Drain {
    /// A drain that begins now. Its deadline is at a whole second of the wall clock,
    /// never early.
    pub fn new(generation: u16, plan: DrainPlan) -> Self {
        let ends = plan.end == DrainEnd::Reset;
        Self {
            generation,
            until_ms: ends.then(|| time::whole_second_in(plan.deadline)),
            reset_over_ms: milliseconds(plan.reset_over),
        }
    }

    /// Whether the deadline has passed at `now_ms` since the boot.
    pub fn is_over(&self, now_ms: u64) -> bool {
        self.until_ms.is_some_and(|until| now_ms >= until)
    }

    /// How its old flows end.
    pub const fn end(&self) -> DrainEnd {
        match self.until_ms {
            Some(_) => DrainEnd::Reset,
            None => DrainEnd::Keep,
        }
    }

    /// How many spreads are spared at `now_ms`: all of them before the deadline, then
    /// ever fewer, 0 when the last flow is reset.
    pub fn spares(&self, now_ms: u64) -> u8 {
        let Some(until) = self.until_ms.filter(|until| now_ms >= *until) else {
            return SPREADS;
        };
        let left = self.reset_over_ms.saturating_sub(now_ms - until);
        // Nothing is left either where they are reset all at once.
        (left * LAST).div_ceil(self.reset_over_ms.max(1)) as u8
    }

    /// Moves the deadline so that `spares` are spared at `now_ms`; one that is still
    /// to come, with all of them spared, stays. Where there was none, the resets
    /// take `reset_over`.
    pub fn rebase(&mut self, spares: u8, reset_over: Duration, now_ms: u64) {
        if spares == SPREADS && !self.is_over(now_ms) {
            return;
        }
        if self.until_ms.is_none() {
            self.reset_over_ms = milliseconds(reset_over);
        }
        let gone = LAST.saturating_sub(u64::from(spares));
        self.until_ms = Some(now_ms.saturating_sub(self.reset_over_ms * gone / LAST));
    }

    /// The deadline by the wall clock as it is set now: RFC 3339, UTC.
    pub fn until(&self) -> Option<String> {
        self.until_ms.map(time::rfc3339_at_boot_ms)
    }

    /// When the last old flow is reset, likewise.
    pub fn resets_until(&self) -> Option<String> {
        self.reset_at(0)
    }

    /// When the flows of a spread are reset, likewise.
    pub fn reset_at(&self, spread: u8) -> Option<String> {
        let after = self.reset_over_ms * LAST.saturating_sub(u64::from(spread));
        let at = self.until_ms?.saturating_add(after.div_ceil(LAST));
        Some(time::rfc3339_at_boot_ms(at))
    }
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drain(until_ms: u64, reset_over_ms: u64) -> Drain {
        Drain {
            generation: 1,
            until_ms: Some(until_ms),
            reset_over_ms,
        }
    }

    #[test]
    fn resets_begin_at_the_deadline_and_are_done_when_they_should() {
        for over in [1, 2, 50, 127, 1000, 30_000, 30 * 86_400_000] {
            let drain = drain(5000, over);
            assert_eq!(drain.spares(4999), SPREADS);
            assert_eq!(drain.spares(5000), SPREADS - 1);
            assert_eq!(drain.spares(5000 + over), 0);
            assert_eq!(drain.spares(u64::MAX), 0);
            assert!(drain.spares(5000 + over - 1) > 0);
            let mut before = SPREADS;
            for step in 0..=1000 {
                let spares = drain.spares(5000 + over * step / 1000);
                assert!(spares <= before);
                before = spares;
            }
            let half = i32::from(drain.spares(5000 + over / 2));
            assert!(over < 50 || (62..=66).contains(&half), "{half}");
        }
    }

    #[test]
    fn without_a_time_for_them_all_resets_come_at_once() {
        assert_eq!(drain(5000, 0).spares(4999), SPREADS);
        assert_eq!(drain(5000, 0).spares(5000), 0);
    }

    #[test]
    fn what_is_kept_is_never_reset() {
        let keep = Drain {
            until_ms: None,
            ..drain(0, 30_000)
        };
        assert_eq!(
            (keep.spares(u64::MAX), keep.end()),
            (SPREADS, DrainEnd::Keep)
        );
        assert!(!keep.is_over(u64::MAX));
        assert_eq!((keep.until(), keep.resets_until()), (None, None));
    }

    #[test]
    fn resets_go_on_where_the_word_says_they_are() {
        for spares in 1..SPREADS {
            let mut late = drain(5000, 30_000);
            late.rebase(spares, Duration::ZERO, 900_000);
            let goes_on = late.spares(900_000);
            assert!(
                (spares..=spares + 1).contains(&goes_on),
                "{spares}: {goes_on}"
            );
            assert!(late.spares(900_000 + 30_000) == 0);
        }
        // Due, but not begun: now, and not all at once.
        let mut due = drain(5000, 30_000);
        due.rebase(SPREADS, Duration::ZERO, 900_000);
        assert_eq!(due, drain(900_000, 30_000));
        // Still to come.
        let mut early = drain(5000, 30_000);
        early.rebase(SPREADS, Duration::ZERO, 4000);
        assert_eq!(early, drain(5000, 30_000));
    }
}
