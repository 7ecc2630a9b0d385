//! Hooks: what the operator wants run, or told, before and after the steps of a release.
//! A step waits for the hooks before it, one at a time, in their order. Those behind a
//! step run aside, and can only be told of: no flip, no rollback and no bake waits for
//! them.

use serde::{Deserialize, Serialize};

use super::{By, Command, GRACE, Now, Outcome, Phase, Release, State, Verdict, milliseconds};
use crate::{
    api::exit,
    config::{OnFailure, When},
};

/// A hook behind a step that has no result yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pending {
    /// Which of the plan's.
    hook: usize,
    pub(super) run: u32,
    /// Until then, milliseconds since the boot.
    until_ms: u64,
    /// It was asked for; whoever is killed asks again.
    #[serde(skip)]
    is_asked: bool,
}

impl Release {
    /// Runs the hooks before a step, from the one with this index on, then takes the step.
    pub(super) fn before(
        &mut self,
        when: When,
        first: usize,
        why: String,
        by: Option<&By>,
        now: Now,
        todo: &mut Vec<Command>,
    ) {
        let mut hooks = self.plan.hooks.iter().enumerate().skip(first);
        let next = hooks.find(|(_, hook)| hook.when == when);
        let Some((hook, gate)) = next.map(|(index, hook)| (index, hook.run.clone())) else {
            return match when {
                When::BeforeGates => {
                    if first > 0 {
                        self.note(why, by, now);
                    }
                    self.next_gate(now, todo);
                }
                When::BeforeCanary => self.raise(0, why, by, now, todo),
                _ => self.flip(why, by, now, todo),
            };
        };
        self.runs += 1;
        let run = self.runs;
        let share = match when {
            When::BeforeFlip => self.plan.canary.len().checked_sub(1),
            _ => None,
        };
        let why = format!("{why}; hook {} runs", gate.name);
        let phase = Phase::Hook { hook, run, share };
        self.enter(phase, gate.timeout + GRACE, why, by, now);
        todo.push(Command::RunGate {
            run,
            gate,
            colour: self.to,
            when: Some(when),
        });
    }

    /// A hook that the step waits for has said it.
    pub(super) fn hook_ended(
        &mut self,
        hook: usize,
        outcome: &Outcome,
        now: Now,
        todo: &mut Vec<Command>,
    ) {
        let told = self.told(hook, outcome.verdict.as_str(), &outcome.evidence);
        self.hook_over(hook, outcome.verdict == Verdict::Pass, told, now, todo);
    }

    /// ... or has not.
    pub(super) fn hook_expired(
        &mut self,
        hook: usize,
        waited: &str,
        now: Now,
        todo: &mut Vec<Command>,
    ) {
        let told = self.told(hook, "no result", &format!("waited for {waited}"));
        self.hook_over(hook, false, told, now, todo);
    }

    fn hook_over(
        &mut self,
        hook: usize,
        passed: bool,
        told: String,
        now: Now,
        todo: &mut Vec<Command>,
    ) {
        let Some(plan) = self.plan.hooks.get(hook) else {
            return;
        };
        let when = plan.when;
        if passed || plan.on_failure == OnFailure::GoOn {
            return self.before(when, hook + 1, told, None, now, todo);
        }
        if self.share().is_some() && self.holds_share() {
            return self.take_back(State::Failed, exit::GATE, told, None, now, todo);
        }
        self.over(State::Failed, exit::GATE, told, None, now);
    }

    /// Runs the hooks behind a step, all of them, and waits for none.
    pub(super) fn after(&mut self, when: When) {
        let hooks = self.plan.hooks.iter().enumerate();
        for (hook, _) in hooks.filter(|(_, hook)| hook.when == when) {
            self.runs += 1;
            self.pending.push(Pending {
                hook,
                run: self.runs,
                until_ms: 0,
                is_asked: false,
            });
        }
    }

    /// Asks for the hooks that are due, also for those that a killed daemon had begun.
    pub(super) fn ask_hooks(&mut self, now: Now, todo: &mut Vec<Command>) {
        for pending in self.pending.iter_mut().filter(|one| !one.is_asked) {
            let Some(hook) = self.plan.hooks.get(pending.hook) else {
                continue;
            };
            let wait = milliseconds(hook.run.timeout + GRACE);
            (pending.until_ms, pending.is_asked) = (now.ms.saturating_add(wait), true);
            todo.push(Command::RunGate {
                run: pending.run,
                gate: hook.run.clone(),
                colour: self.to,
                when: Some(hook.when),
            });
        }
    }

    /// A hook behind a step has said it; false if this is the run of none.
    pub(super) fn pending_ended(&mut self, run: u32, outcome: &Outcome, now: Now) -> bool {
        let Some(at) = self.pending.iter().position(|one| one.run == run) else {
            return false;
        };
        let hook = self.pending.remove(at).hook;
        let told = self.told(hook, outcome.verdict.as_str(), &outcome.evidence);
        self.note(told, None, now);
        true
    }

    /// Nobody hears of those any more that overran their time.
    pub(super) fn expire_pending(&mut self, now: Now) {
        let is_due = |one: &Pending| one.is_asked && now.ms >= one.until_ms;
        let due: Vec<Pending> = self.pending.iter().copied().filter(is_due).collect();
        self.pending.retain(|one| !is_due(one));
        for pending in due {
            let told = self.told(pending.hook, "no result", "it was ended");
            self.note(told, None, now);
        }
    }

    /// When a hook behind a step overruns its time.
    pub(super) fn pending_deadline(&self) -> Option<u64> {
        let asked = self.pending.iter().filter(|one| one.is_asked);
        asked.map(|one| one.until_ms).min()
    }

    /// Some hook behind a step has no result yet.
    #[cfg(test)]
    pub(super) fn has_pending(&self) -> bool {
        !self.pending.is_empty()
    }

    fn told(&self, hook: usize, verdict: &str, said: &str) -> String {
        let hook = self.plan.hooks.get(hook);
        let name = hook.map_or("", |hook| hook.run.name.as_str());
        format!("hook {name}: {verdict}, {said}")
    }
}
