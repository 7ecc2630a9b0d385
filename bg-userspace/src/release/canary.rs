//! CANARY: before the flip, a share of new flows goes to the new colour, step by step.
//! The word holds the share, so it is there with the daemon dead, too. However a release
//! ends from here but by a human's own store, its share is taken back to 0.

use super::{By, Command, Health, Now, Phase, Release, SWITCH, State, Word, milliseconds};
use crate::{
    config::{CanaryStep, When},
    switch,
};

impl Release {
    /// Stores the share of a step.
    pub(super) fn raise(
        &mut self,
        step: usize,
        why: String,
        by: Option<&By>,
        now: Now,
        todo: &mut Vec<Command>,
    ) {
        self.enter(Phase::Raising { step }, SWITCH, why, by, now);
        todo.extend(self.raise_command(step));
    }

    pub(super) fn raise_command(&self, step: usize) -> Option<Command> {
        let plan = self.plan.canary.get(step)?;
        Some(Command::Canary {
            to: self.to,
            percent: plan.percent,
            from_generation: self.generation,
            force: self.forced,
        })
    }

    /// The share is stored: the step's time begins. `why` it begins anew goes before it.
    pub(super) fn watch(&mut self, step: usize, why: &str, now: Now) {
        let Some(plan) = self.plan.canary.get(step).copied() else {
            return;
        };
        let settle = self.plan.bake.settle.min(plan.time);
        let settled_ms = now.ms.saturating_add(milliseconds(settle));
        let (percent, to) = (plan.percent, self.to.as_str());
        let (number, all) = (step + 1, self.plan.canary.len());
        let why = format!("{why}{percent} of new flows go to {to}, step {number} of {all}");
        // What was heard before was of another time.
        (self.health, self.old) = (Health::Unknown, Health::Unknown);
        let phase = Phase::Canary { step, settled_ms };
        self.enter(phase, plan.time, why, None, now);
    }

    /// A step's time is over.
    pub(super) fn share_ends(&mut self, step: usize, now: Now, todo: &mut Vec<Command>) {
        if let Some(how) = self.is_proven(now, todo) {
            let why = format!("step {} is over{how}", step + 1);
            self.next_share(step, why, None, now, todo);
        }
    }

    /// The next share, or behind the last one, all new flows.
    pub(super) fn next_share(
        &mut self,
        step: usize,
        why: String,
        by: Option<&By>,
        now: Now,
        todo: &mut Vec<Command>,
    ) {
        let next = step + 1;
        if next < self.plan.canary.len() {
            self.raise(next, why, by, now, todo);
        } else {
            self.before(When::BeforeFlip, 0, why, by, now, todo);
        }
    }

    /// No new flow any more; then the release is over, as `state` says.
    pub(super) fn take_back(
        &mut self,
        state: State,
        code: u8,
        why: String,
        by: Option<&By>,
        now: Now,
        todo: &mut Vec<Command>,
    ) {
        let phase = Phase::TakingBack { state, code };
        self.enter(phase, SWITCH, why, by, now);
        todo.push(self.take_back_command());
    }

    /// Who is ill must be left by all; where the new colour is not to blame, its flows may
    /// end in peace.
    pub(super) fn take_back_command(&self) -> Command {
        let fails = matches!(
            self.phase,
            Phase::TakingBack {
                state: State::RolledBack,
                ..
            }
        );
        Command::RollBack {
            leave: self.to,
            from_generation: self.generation,
            drains: !fails,
            why: format!("{}: {}", self.id(), self.why),
        }
    }

    /// True when there is a share, and this release may have stored it: what a human set
    /// before, or beside a release without a canary, stays.
    pub(super) const fn holds_share(&self) -> bool {
        self.canary > 0 && !self.plan.canary.is_empty()
    }

    /// Believes the word about the share. True where that says all there is to say.
    pub(super) fn believe_share(&mut self, word: Word, by: Option<&By>, now: Now) -> bool {
        let is_taken_back = word.active == self.from && word.canary == 0;
        let flips = word.generation.wrapping_sub(self.generation);
        let is_ours = word.active == self.from && flips == 0;
        if let Phase::TakingBack { state, code } = self.phase {
            if is_taken_back {
                let why = format!("{}; new flows go to {}", self.why, self.from.as_str());
                self.after(When::AfterRollback);
                self.over(state, code, why, by, now);
            }
            return is_taken_back;
        }
        let Some(step) = self.share() else {
            // A canary that was taken back counts as a flip.
            // A flip that waits behind a canary goes by what a human does to its share.
            let last = self.plan.canary.last().map(share_of);
            let is_changed = is_ours && last.is_some_and(|last| last != word.canary);
            let is_switching = self.phase == Phase::Switching;
            if is_switching && (is_changed && word.canary == 0 || is_taken_back && flips == 1) {
                self.rolled_back(by, now);
                return true;
            }
            if is_switching && is_changed {
                self.another_share(word, by, now);
                return true;
            }
            return false;
        };
        let share_at = |step| self.plan.canary.get(step).map_or(0, share_of);
        let share = share_at(step);
        let before = step.checked_sub(1).map_or(0, share_at);
        match self.phase {
            Phase::Raising { .. } if is_ours && word.canary == share => {
                self.watch(step, "", now);
                return true;
            }
            // Not stored yet: the share of the step before, or whatever was there first.
            Phase::Raising { .. } if is_ours && (step == 0 || word.canary == before) => {
                return true;
            }
            _ if is_ours && word.canary == share => return true,
            _ if is_taken_back => self.rolled_back(by, now),
            _ if is_ours => self.another_share(word, by, now),
            _ => return false,
        }
        true
    }

    fn another_share(&mut self, word: Word, by: Option<&By>, now: Now) {
        let why = format!(
            "somebody set another share: {:.4} % of new flows go to {}",
            switch::percent(word.canary),
            self.to.as_str()
        );
        self.superseded(why, by, now);
    }
}

/// The share of a step, as a word has it.
fn share_of(step: &CanaryStep) -> u16 {
    switch::nearest_share(step.percent.percent())
}
