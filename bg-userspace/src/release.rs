//! The life of a release, top to bottom: events and times come in, commands go out.
//! No clock, no socket, no kernel. Whoever runs it keeps the machine on the disk
//! before it carries the commands out; after a restart the kernel's word is believed
//! over what was kept (law 4), and a rollback by hand needs nothing of all this
//! (law 5).

mod canary;
mod hooks;
mod record;

#[cfg(test)]
mod bakes;
#[cfg(test)]
mod canaries;
#[cfg(test)]
mod hooked;
#[cfg(test)]
mod properties;
#[cfg(test)]
mod service;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use self::record::Phase;
pub use self::record::{
    By, Command, Event, Gate, Health, Held, Note, Now, Outcome, Release, Start, State, Verdict,
    Word,
};
use crate::{
    api::{Kind, Refusal, exit},
    config::{MAX_DURATION, OnExpiry, OnTrouble, When},
    signals::{Baseline, FEW},
};

/// A gate that overran its own time by so much is not heard of any more.
const GRACE: Duration = Duration::from_secs(5);
/// How long a store may take.
const SWITCH: Duration = Duration::from_secs(30);
/// How often the active colour is looked at while its illness keeps the old one up.
const RECHECK: Duration = Duration::from_mins(1);

/// The releases of a service: one at a time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// The one that runs, or ran last.
    pub release: Option<Release>,
    /// The one that has just given way to it, until its end is told.
    #[serde(skip)]
    pub replaced: Option<Box<Release>>,
}

/// What a rollback by hand means while a release is known, and new flows do not go to its
/// colour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unflipped {
    /// It was about to send them there: it must not.
    Running,
    /// None of them goes there any more, or ever did.
    Over,
}

impl Machine {
    /// Whether a rollback has nothing to roll back, by this word. To go to the colour that
    /// is being tested, or was just left, is never the way back.
    pub fn unflipped(&self, word: Word) -> Option<Unflipped> {
        let release = self.release.as_ref()?;
        if word.active != release.from || word.canary != 0 {
            return None;
        }
        let flips = word.generation.wrapping_sub(release.generation);
        match release.state() {
            // There and back.
            State::RolledBack if flips <= 2 => Some(Unflipped::Over),
            // Never there; one rollback before the flip, or of its share, counts as a flip.
            State::Failed | State::Aborted | State::Superseded if flips <= 1 => {
                Some(Unflipped::Over)
            }
            state if state.is_over() => None,
            // Its rollback is stored, and it has not heard of it yet.
            _ if release.has_flipped() => (flips == 2).then_some(Unflipped::Over),
            // The first of two rollbacks is stored, and it has not heard of it yet.
            _ if flips > 0 => Some(Unflipped::Over),
            _ => Some(Unflipped::Running),
        }
    }

    /// Takes an event in, and says what is to be done.
    pub fn handle(&mut self, event: Event, now: Now) -> Vec<Command> {
        let mut todo = Vec::new();
        // What the word says, and what was just heard, counts more than the clock.
        let is_news = matches!(
            event,
            Event::Word { .. }
                | Event::Restarted { .. }
                | Event::Health(_)
                | Event::OldHealth(_)
                | Event::Failing(_)
        );
        if !is_news {
            self.expire(now, &mut todo);
        }
        let done = match event {
            Event::Start(start) => self.start(*start, now, &mut todo),
            event => match &mut self.release {
                Some(release) => release.handle(event, now, &mut todo),
                None => no_release(&event),
            },
        };
        if let Err(refusal) = done {
            todo.push(Command::Refuse(refusal));
        }
        self.expire(now, &mut todo);
        if let Some(release) = &mut self.release {
            release.ask_hooks(now, &mut todo);
        }
        todo
    }

    /// How the old colour was, before a store.
    pub fn compare_with(&mut self, baseline: Baseline) {
        if let Some(release) = &mut self.release {
            release.compare_with(baseline);
        }
    }

    /// When it must hear of the time again, milliseconds since the boot.
    pub fn next_deadline(&self) -> Option<u64> {
        let release = self.release.as_ref()?;
        let deadlines = [release.deadline(), release.pending_deadline()];
        deadlines.into_iter().flatten().min()
    }

    /// Where the service is.
    pub fn state(&self) -> State {
        let release = self.release.as_ref();
        release.map_or(State::Steady, Release::state)
    }

    fn expire(&mut self, now: Now, todo: &mut Vec<Command>) {
        let Some(release) = &mut self.release else {
            return;
        };
        release.expire_pending(now);
        if release.deadline().is_some_and(|at| now.ms >= at) {
            release.expire(now, todo);
        }
    }

    // ---- STEADY -> VALIDATING

    /// Begins a release. One that holds its standby ends with it: that colour is
    /// needed.
    fn start(&mut self, start: Start, now: Now, todo: &mut Vec<Command>) -> Result<(), Refusal> {
        let before = self.release.as_mut().filter(|release| !release.is_over());
        if let Some(release) = &before
            && release.state() != State::Standby
        {
            let message = format!(
                "another release runs: {} is {}. Wait for it, or end it with `bgswitch release abort`, or \
                 `bgswitch rollback` after its flip",
                release.id(),
                release.state().as_str()
            );
            return conflict(message);
        }
        if start.to == start.word.active {
            let message = format!("{} is active already: nothing was begun", start.to.as_str());
            return conflict(message);
        }
        let plan = &start.plan;
        let watches = start.watched || plan.hears();
        let canary = watches && !plan.canary.is_empty();
        if plan.gates.is_empty() && !plan.approval.required && !canary && !start.force {
            let message = "nothing would be looked at: there are no gates, and no approval is required. \
                           Configure [[service.NAME.gate]] or [service.NAME.approval], or say --force";
            return Err(Refusal::new(Kind::Usage, message));
        }
        if let Some(release) = before {
            release.over(
                State::Superseded,
                exit::CONFLICT,
                "another release was started".to_owned(),
                Some(&start.by),
                now,
            );
            self.replaced = Some(Box::new(release.clone()));
        }
        let release = Release::new(start, self.release.as_ref(), now);
        let release = self.release.insert(release);
        let why = "it has begun".to_owned();
        release.before(When::BeforeGates, 0, why, None, now, todo);
        Ok(())
    }
}

impl Release {
    /// When its own wait ends.
    fn deadline(&self) -> Option<u64> {
        let until = self.until_ms()?;
        Some(match self.phase {
            Phase::Baking { settled_ms } | Phase::Canary { settled_ms, .. }
                if matches!(self.health, Health::Ill(_)) =>
            {
                until.min(settled_ms)
            }
            _ => until,
        })
    }

    fn new(start: Start, before: Option<&Self>, now: Now) -> Self {
        let forced_by = start.force.then(|| start.by.actor.clone());
        let gates = start.plan.gates.iter().map(|plan| Gate {
            plan: plan.clone(),
            outcome: None,
            forced_by: forced_by.clone(),
        });
        let mut release = Self {
            number: before.map_or(0, |before| before.number) + 1,
            requester: start.by.actor.clone(),
            from: start.to.other(),
            to: start.to,
            version: start.version,
            tested: start.tested,
            generation: start.word.generation,
            forced: start.force,
            gates: gates.collect(),
            plan: start.plan,
            approved_by: None,
            notes: Vec::new(),
            why: String::new(),
            since_unix_ms: now.unix_ms,
            pending: Vec::new(),
            phase: Phase::Validating { gate: 0, run: 0 },
            until_ms: now.ms,
            wait_ms: 0,
            // A late result of an earlier release is none of this one.
            runs: before.map_or(0, |before| before.runs),
            cool_until_ms: before.map_or(0, |before| before.cool_until_ms),
            watched: start.watched,
            baseline: None,
            health: Health::Unknown,
            old: Health::Unknown,
            canary: start.word.canary,
        };
        let forced = if start.force {
            ", gates passed over"
        } else {
            ""
        };
        let version = release.version.as_deref().unwrap_or("no version named");
        let text = format!(
            "{} to {} ({version}){forced}",
            release.id(),
            release.to.as_str()
        );
        release.note(text, Some(&start.by), now);
        release
    }

    fn handle(&mut self, event: Event, now: Now, todo: &mut Vec<Command>) -> Result<(), Refusal> {
        match event {
            Event::GateEnded { run, outcome } => self.gate_ended(run, outcome, now, todo),
            Event::Approve(by) => return self.approve(&by, now, todo),
            Event::Reject(by) => return self.reject(&by, now),
            Event::NotYet => self.not_yet(now),
            Event::Again => self.again(todo),
            Event::NotStored { refusal } => self.not_stored(&refusal, now, todo),
            Event::Health(health) => self.hear(health, now, todo),
            Event::Unwatched => self.unwatched(now),
            Event::OldHealth(health) => self.old = health,
            Event::Failing(why) => self.failing(why, now, todo),
            Event::Extend { by, more } => return self.extend(&by, more, now),
            Event::Retire { by, force } => return self.retire(&by, force, now),
            Event::Pause(by) => return self.pause_by_hand(&by, now),
            Event::Resume { by, force } => return self.resume(&by, force, now, todo),
            Event::Abort(by) => return self.abort(&by, now, todo),
            Event::Word { word, by } => self.believe(word, by, now),
            Event::Restarted { word, same_boot } => self.restart(word, same_boot, now, todo),
            Event::Start(_) | Event::Tick => {}
        }
        Ok(())
    }

    // ---- VALIDATING: gates, in order

    /// Runs the first gate that is not passed yet, or goes on behind the last one.
    fn next_gate(&mut self, now: Now, todo: &mut Vec<Command>) {
        let mut gates = self.gates.iter().enumerate();
        let next = gates.find(|(_, gate)| !gate.is_passed());
        let Some((index, gate)) = next.map(|(index, gate)| (index, gate.plan.clone())) else {
            return self.gates_passed(now, todo);
        };
        self.runs += 1;
        let run = self.runs;
        let phase = Phase::Validating { gate: index, run };
        let why = format!("gate {} runs", gate.name);
        self.enter(phase, gate.timeout + GRACE, why, None, now);
        let colour = self.to;
        todo.push(Command::RunGate {
            run,
            gate,
            colour,
            when: None,
        });
    }

    /// A result counts only for the run that is waited for.
    fn gate_ended(&mut self, run: u32, outcome: Outcome, now: Now, todo: &mut Vec<Command>) {
        if self.pending_ended(run, &outcome, now) {
            return;
        }
        let (gate, waited_for) = match self.phase {
            Phase::Validating { gate, run } => (gate, run),
            Phase::Hook { hook, run: of, .. } if run == of => {
                return self.hook_ended(hook, &outcome, now, todo);
            }
            _ => return,
        };
        let Some(passing) = self.gates.get_mut(gate).filter(|_| run == waited_for) else {
            return;
        };
        let (name, verdict) = (passing.plan.name.clone(), outcome.verdict);
        let told = format!("gate {name}: {}, {}", verdict.as_str(), outcome.evidence);
        passing.outcome = Some(outcome);
        match verdict {
            Verdict::Pass => {
                self.note(told, None, now);
                self.next_gate(now, todo);
            }
            Verdict::Fail => self.over(State::Failed, exit::GATE, told, None, now),
            Verdict::Inconclusive => self.pause(Held::Gate(gate), told, None, now),
        }
    }

    fn gates_passed(&mut self, now: Now, todo: &mut Vec<Command>) {
        let why = match (self.forced, self.gates.len()) {
            (true, _) => "gates were passed over",
            (false, 0) => "there are no gates",
            (false, _) => "all gates are passed",
        };
        if self.plan.approval.required {
            return self.ready(why, now);
        }
        self.go(why.to_owned(), None, now, todo);
    }

    // ---- READY: an approval

    fn ready(&mut self, why: &str, now: Now) {
        let expires = self.plan.approval.expires;
        let why = format!("{why}; it waits for an approval");
        self.after(When::Ready);
        self.enter(Phase::Ready, expires, why, None, now);
    }

    fn approve(&mut self, by: &By, now: Now, todo: &mut Vec<Command>) -> Result<(), Refusal> {
        if self.phase != Phase::Ready {
            return self.cannot("be approved");
        }
        if self.plan.approval.not_requester && by.actor == self.requester {
            let message = format!(
                "{} was asked for by {}: somebody else must approve it (approval.not_requester)",
                self.id(),
                self.requester
            );
            return Err(Refusal::new(Kind::NotPermitted, message));
        }
        self.approved_by = Some(by.actor.clone());
        self.go("it is approved".to_owned(), Some(by), now, todo);
        Ok(())
    }

    fn reject(&mut self, by: &By, now: Now) -> Result<(), Refusal> {
        if self.phase != Phase::Ready {
            return self.cannot("be rejected");
        }
        let why = "it was rejected".to_owned();
        self.over(State::Aborted, exit::FAILED, why, Some(by), now);
        Ok(())
    }

    // ---- CANARY: a share of new flows, step by step (`release/canary.rs`)

    /// Behind gates and approval: the first share, or all of them.
    fn go(&mut self, why: String, by: Option<&By>, now: Now, todo: &mut Vec<Command>) {
        let when = if self.plan.canary.is_empty() {
            When::BeforeFlip
        } else {
            When::BeforeCanary
        };
        self.before(when, 0, why, by, now, todo);
    }

    // ---- SWITCHING: the flip

    fn flip(&mut self, why: String, by: Option<&By>, now: Now, todo: &mut Vec<Command>) {
        self.enter(Phase::Switching, SWITCH, why, by, now);
        todo.push(self.flip_command());
    }

    const fn flip_command(&self) -> Command {
        Command::Flip {
            to: self.to,
            from_generation: self.generation,
            force: self.forced,
        }
    }

    /// How the old colour was. What was heard before a canary stays, where the old colour
    /// has hardly been heard since.
    fn compare_with(&mut self, baseline: Baseline) {
        let is_less = |before: &Baseline| {
            (baseline.answers < FEW && before.answers >= FEW)
                || (baseline.connections < FEW && before.connections >= FEW)
        };
        if !self.baseline.as_ref().is_some_and(is_less) {
            self.baseline = Some(baseline);
        }
    }

    /// A store waits for the first verdicts of health checks: a daemon that was just started
    /// has none.
    fn not_yet(&mut self, now: Now) {
        let why = self.nothing_known();
        if self.waits_for_store() && self.why != why {
            self.why.clone_from(&why);
            self.wait(RECHECK, now);
            self.note(why, None, now);
        }
    }

    fn nothing_known(&self) -> String {
        format!("nothing is known of {}'s health yet", self.to.as_str())
    }

    /// Why a store did not come in time, and the exit code that says so.
    fn too_late(&self, what: &str, waited: &dyn std::fmt::Display) -> (u8, String) {
        let why = format!("{what} was not stored within {waited}");
        if self.why == self.nothing_known() {
            (exit::UNHEALTHY, format!("{why}: {}", self.why))
        } else {
            (exit::TIMED_OUT, why)
        }
    }

    /// What has waited for them is asked for again.
    fn again(&self, todo: &mut Vec<Command>) {
        match self.phase {
            Phase::Switching => todo.push(self.flip_command()),
            Phase::Raising { step } => todo.extend(self.raise_command(step)),
            _ => {}
        }
    }

    const fn waits_for_store(&self) -> bool {
        matches!(self.phase, Phase::Switching | Phase::Raising { .. })
    }

    fn not_stored(&mut self, refusal: &Refusal, now: Now, todo: &mut Vec<Command>) {
        let why = match self.phase {
            Phase::Switching => format!("it was not flipped: {refusal}"),
            Phase::Raising { .. } => format!("its share was not stored: {refusal}"),
            _ => return,
        };
        // What a human stored stays.
        if refusal.kind == Kind::StaleGeneration {
            return self.superseded(why, None, now);
        }
        if self.holds_share() {
            return self.take_back(State::Aborted, refusal.code, why, None, now, todo);
        }
        self.over(State::Aborted, refusal.code, why, None, now);
    }

    // ---- BAKING: the new colour is watched

    fn bake(&mut self, why: String, now: Now) {
        let plan = self.plan.bake;
        if plan.settle.is_zero() && plan.duration.is_zero() {
            return self.hold(format!("{why}; there is no bake"), None, now);
        }
        let settled_ms = now.ms.saturating_add(milliseconds(plan.settle));
        let phase = Phase::Baking { settled_ms };
        // What was heard before was of another colour, or of another time.
        (self.health, self.old) = (Health::Unknown, Health::Unknown);
        self.enter(phase, plan.settle + plan.duration, why, None, now);
    }

    fn hear(&mut self, health: Health, now: Now, todo: &mut Vec<Command>) {
        self.health = health;
        let settled_ms = match self.phase {
            Phase::Baking { settled_ms } | Phase::Canary { settled_ms, .. } => settled_ms,
            Phase::Hook { share: Some(_), .. } => now.ms,
            _ => return,
        };
        if let Health::Ill(why) = &self.health
            && now.ms >= settled_ms
        {
            let why = format!("{} is ill: {why}", self.to.as_str());
            self.trouble(self.plan.bake.on_fail, why, now, todo);
        }
    }

    /// Requests that fail count from the store on.
    fn failing(&mut self, why: String, now: Now, todo: &mut Vec<Command>) {
        self.health = Health::Ill(why);
        let is_watched = matches!(
            self.phase,
            Phase::Baking { .. } | Phase::Canary { .. } | Phase::Hook { share: Some(_), .. }
        );
        if let (true, Health::Ill(why)) = (is_watched, &self.health) {
            let why = format!("{} fails: {why}", self.to.as_str());
            self.trouble(self.plan.bake.on_fail, why, now, todo);
        }
    }

    /// Health checks have left the configuration: nobody waits for what they say. A canary
    /// that nobody else watches does not grow for that.
    fn unwatched(&mut self, now: Now) {
        if self.watched && (self.has_flipped() || self.plan.hears()) {
            self.watched = false;
            self.health = Health::Unknown;
            let text = "health checks are not configured any more: it goes on without them";
            self.note(text.to_owned(), None, now);
        }
    }

    fn bake_ends(&mut self, now: Now, todo: &mut Vec<Command>) {
        if let Some(how) = self.is_proven(now, todo) {
            self.hold(format!("the bake is over{how}"), None, now);
        }
    }

    /// At the end of a watched time: how the new colour is, if it may go on.
    fn is_proven(&mut self, now: Now, todo: &mut Vec<Command>) -> Option<String> {
        let (plan, to) = (self.plan.bake, self.to.as_str());
        match &self.health {
            Health::Ill(why) => {
                let why = format!("{to} is ill: {why}");
                self.trouble(plan.on_fail, why, now, todo);
                None
            }
            Health::Unknown if self.is_judged() => {
                let why = format!("too little is known of {to}");
                self.trouble(plan.on_inconclusive, why, now, todo);
                None
            }
            Health::Unknown => {
                Some("; neither health checks nor signals: nothing was looked at".to_owned())
            }
            Health::Well => Some(format!(", {to} is well")),
        }
    }

    /// The new colour is ill, or nothing is known of it, while it is watched.
    fn trouble(&mut self, then: OnTrouble, why: String, now: Now, todo: &mut Vec<Command>) {
        let held = match self.phase {
            Phase::Canary { step, .. }
            | Phase::Hook {
                share: Some(step), ..
            } => Held::Canary(step),
            _ => Held::Bake,
        };
        // What both suffer from is seldom the new version's fault, and a rollback would
        // reset flows that are served, to where nobody serves them.
        if let (OnTrouble::Rollback, Some(trouble)) = (then, self.old_trouble()) {
            let why = format!("{why}; {trouble}, so a human decides");
            return self.pause(held, why, None, now);
        }
        match (then, held) {
            (OnTrouble::Pause, _) => self.pause(held, why, None, now),
            // Most flows never left the old colour: nothing swings to and fro.
            (OnTrouble::Rollback, Held::Canary(_)) => {
                self.take_back(State::RolledBack, exit::ROLLED_BACK, why, None, now, todo);
            }
            (OnTrouble::Rollback, _) if now.ms >= self.cool_until_ms => {
                self.roll_back(why, now, todo);
            }
            (OnTrouble::Rollback, _) => {
                let why =
                    format!("{why}; it rolled back by itself just before, so a human decides");
                self.pause(held, why, None, now);
            }
        }
    }

    /// What speaks against the old colour.
    fn old_trouble(&self) -> Option<String> {
        match &self.old {
            Health::Ill(why) => Some(format!("{} is ill, too: {why}", self.from.as_str())),
            Health::Unknown | Health::Well => None,
        }
    }

    /// Back by itself. It ends the release, so there is no second one.
    fn roll_back(&mut self, why: String, now: Now, todo: &mut Vec<Command>) {
        self.enter(Phase::SwitchingBack, SWITCH, why, None, now);
        self.go_back(now, todo);
    }

    /// Asks for the rollback, for the first time or again: the time to cool down counts from
    /// the one that is stored.
    fn go_back(&mut self, now: Now, todo: &mut Vec<Command>) {
        let cooldown = milliseconds(self.plan.bake.cooldown);
        self.cool_until_ms = now.ms.saturating_add(cooldown);
        todo.push(Command::RollBack {
            leave: self.to,
            from_generation: self.flipped_generation(),
            drains: false,
            why: format!("{}: {}", self.id(), self.why),
        });
    }

    // ---- STANDBY: the old colour must stay up

    fn hold(&mut self, why: String, by: Option<&By>, now: Now) {
        self.after(When::AfterBake);
        let hold = self.plan.standby.hold;
        self.enter(Phase::Standby, hold, why, by, now);
    }

    fn extend(&mut self, by: &By, more: Duration, now: Now) -> Result<(), Refusal> {
        if self.phase != Phase::Standby {
            return self.cannot("hold its standby for longer");
        }
        let until = self.until_ms.saturating_add(milliseconds(more));
        if until - now.ms > milliseconds(MAX_DURATION) {
            let message = "a standby is held for 30 days at most";
            return Err(Refusal::new(Kind::Usage, message));
        }
        (self.until_ms, self.wait_ms) = (until, until - now.ms);
        let more = humantime::format_duration(more);
        self.note(
            format!("the standby is held for {more} more"),
            Some(by),
            now,
        );
        Ok(())
    }

    fn retire(&mut self, by: &By, force: bool, now: Now) -> Result<(), Refusal> {
        if self.phase != Phase::Standby {
            return self.cannot("retire its standby");
        }
        let from = self.from.as_str();
        if self.canary > 0 {
            let message = format!("a share of new flows goes to {from}: it must stay up");
            return conflict(message);
        }
        let mut why = format!("{from} need not stay up any more");
        if let Some(trouble) = self.objection() {
            if !force {
                let forcing = "`bgswitch standby retire --force` ends its hold all the same";
                return conflict(format!("{trouble}; {from} must stay up. {forcing}"));
            }
            why = format!("{why}, forced: {trouble}");
        }
        self.retired(why, Some(by), now);
        Ok(())
    }

    /// Why the old colour should stay up, if the new one's health says so.
    fn objection(&self) -> Option<String> {
        let to = self.to.as_str();
        match &self.health {
            Health::Ill(why) => Some(format!("{to} is ill: {why}")),
            Health::Unknown if self.watched => Some(format!("nothing is known of {to}'s health")),
            Health::Unknown | Health::Well => None,
        }
    }

    /// The hold is over, but never in an incident, nor while nobody can say.
    fn hold_ends(&mut self, now: Now) {
        let from = self.from.as_str();
        let keeps = if self.canary > 0 {
            Some(format!("a share of new flows goes to {from}"))
        } else {
            self.objection()
        };
        match keeps {
            None => {
                let why = format!("{from} was held for its time, and need not stay up any more");
                self.retired(why, None, now);
            }
            Some(trouble) => {
                let why = format!("{trouble}; {from} must stay up");
                // A story that says the same each minute is none.
                if self.why == why {
                    self.wait(RECHECK, now);
                } else {
                    self.enter(Phase::Standby, RECHECK, why, None, now);
                }
            }
        }
    }

    /// The release is done; hooks behind it take the old colour down.
    fn retired(&mut self, why: String, by: Option<&By>, now: Now) {
        self.after(When::AfterStandby);
        self.over(State::Steady, 0, why, by, now);
    }

    // ---- PAUSED: a human must decide

    fn pause(&mut self, held: Held, why: String, by: Option<&By>, now: Now) {
        let expires = self.plan.approval.expires;
        self.after(When::Paused);
        self.enter(Phase::Paused(held), expires, why, by, now);
    }

    fn pause_by_hand(&mut self, by: &By, now: Now) -> Result<(), Refusal> {
        let held = match self.phase {
            Phase::Validating { gate, .. } => Held::Gate(gate),
            Phase::Ready => Held::Approval,
            Phase::Canary { step, .. } => Held::Canary(step),
            Phase::Baking { .. } => Held::Bake,
            _ => return self.cannot("be paused"),
        };
        self.pause(held, "it was paused".to_owned(), Some(by), now);
        Ok(())
    }

    /// What was interrupted begins anew; with `force`, what it asked counts as
    /// answered, and it is written down who said so.
    fn resume(
        &mut self,
        by: &By,
        force: bool,
        now: Now,
        todo: &mut Vec<Command>,
    ) -> Result<(), Refusal> {
        let Phase::Paused(held) = self.phase else {
            return self.cannot("be resumed");
        };
        match held {
            Held::Gate(index) => {
                if let Some(gate) = self.gates.get_mut(index).filter(|_| force) {
                    gate.forced_by = Some(by.actor.clone());
                    let text = format!("gate {} was passed over", gate.plan.name);
                    self.note(text, Some(by), now);
                } else {
                    self.note("it was resumed".to_owned(), Some(by), now);
                }
                self.next_gate(now, todo);
            }
            Held::Approval if force => {
                let message = "an approval cannot be passed over: resume it, then approve it";
                return Err(Refusal::new(Kind::Usage, message));
            }
            Held::Approval => {
                self.note("it was resumed".to_owned(), Some(by), now);
                self.ready("it was resumed", now);
            }
            Held::Canary(step) if force => {
                let why = "the rest of the step was passed over".to_owned();
                self.next_share(step, why, Some(by), now, todo);
            }
            Held::Canary(step) => {
                self.note("it was resumed".to_owned(), Some(by), now);
                self.watch(step, "it was resumed, and the step begins anew: ", now);
            }
            Held::Bake if force => {
                let why = "the rest of the bake was passed over".to_owned();
                self.hold(why, Some(by), now);
            }
            Held::Bake => {
                self.note("it was resumed".to_owned(), Some(by), now);
                self.bake(
                    "it was resumed, and bakes from the beginning".to_owned(),
                    now,
                );
            }
        }
        Ok(())
    }

    fn abort(&mut self, by: &By, now: Now, todo: &mut Vec<Command>) -> Result<(), Refusal> {
        if self.has_flipped() || self.phase == Phase::Switching {
            let message = format!(
                "{} is {}: there is no way back but `bgswitch rollback`",
                self.id(),
                self.state().as_str()
            );
            return conflict(message);
        }
        if self.is_over() {
            return self.cannot("be aborted");
        }
        let why = "it was aborted".to_owned();
        match self.phase {
            Phase::TakingBack { .. } => return self.cannot("be aborted"),
            // A hook before the flip has the last share.
            _ if self.share().is_some() => {
                self.take_back(State::Aborted, exit::FAILED, why, Some(by), now, todo);
            }
            _ => self.over(State::Aborted, exit::FAILED, why, Some(by), now),
        }
        Ok(())
    }

    // ---- What the kernel says, and what the clock says

    /// Believes the word: it says whether the flip was stored, and whether somebody
    /// else stored another one.
    fn believe(&mut self, word: Option<Word>, by: Option<String>, now: Now) {
        let by = by.map(|actor| By { actor, why: None });
        let by = by.as_ref();
        if self.is_over() {
            return;
        }
        let Some(word) = word else {
            return self.superseded("the service is not configured any more".to_owned(), by, now);
        };
        self.canary = word.canary;
        let flips = word.generation.wrapping_sub(self.generation);
        let after = word.active == self.to && flips == 1;
        if self.phase == Phase::Switching && after {
            let why = format!("new flows go to {}", self.to.as_str());
            self.after(When::AfterFlip);
            return self.bake(why, now);
        }
        if self.believe_share(word, by, now) {
            return;
        }
        let as_expected = if self.has_flipped() {
            after
        } else {
            word.active == self.from && flips == 0
        };
        if as_expected {
            return;
        }
        let may_have_flipped = self.has_flipped() || self.phase == Phase::Switching;
        if may_have_flipped && word.active == self.from && flips >= 2 {
            return self.rolled_back(by, now);
        }
        let why = format!(
            "somebody flipped: {} is active, generation {}",
            word.active.as_str(),
            word.generation
        );
        self.superseded(why, by, now);
    }

    fn superseded(&mut self, why: String, by: Option<&By>, now: Now) {
        self.over(State::Superseded, exit::CONFLICT, why, by, now);
    }

    fn rolled_back(&mut self, by: Option<&By>, now: Now) {
        let from = self.from.as_str();
        self.after(When::AfterRollback);
        if self.phase == Phase::SwitchingBack {
            let why = format!("{}; it rolled back by itself to {from}", self.why);
            return self.over(State::RolledBack, exit::ROLLED_BACK, why, None, now);
        }
        let why = format!("rolled back by hand: new flows go to {from}");
        self.over(State::RolledBack, exit::FAILED, why, by, now);
    }

    /// Goes on after a restart of the daemon. What nobody looked after in between
    /// begins anew: the gate that ran, and the bake.
    fn restart(&mut self, word: Option<Word>, same_boot: bool, now: Now, todo: &mut Vec<Command>) {
        if !same_boot {
            self.until_ms = now.ms.saturating_add(self.wait_ms);
            self.cool_until_ms = match self.cool_until_ms {
                0 => 0,
                _ => now.ms.saturating_add(milliseconds(self.plan.bake.cooldown)),
            };
        }
        if self.is_over() {
            return;
        }
        let before = self.phase;
        self.believe(word, None, now);
        if self.phase != before {
            return;
        }
        let is_due = now.ms >= self.until_ms;
        match self.phase {
            Phase::Validating { .. } => {
                self.note("the daemon was restarted".to_owned(), None, now);
                self.next_gate(now, todo);
            }
            Phase::Hook { hook, .. } if !is_due => {
                let when = self.plan.hooks.get(hook).map(|hook| hook.when);
                if let Some(when) = when {
                    let why = "the daemon was restarted".to_owned();
                    self.before(when, hook, why, None, now, todo);
                }
            }
            Phase::Switching | Phase::Raising { .. } if !is_due => {
                // Its first verdicts take as long as its probes do.
                if self.watched {
                    self.wait(RECHECK, now);
                }
                self.again(todo);
            }
            Phase::Canary { step, .. } => {
                let why = "the daemon was restarted, so the step begins anew: ";
                self.watch(step, why, now);
            }
            Phase::TakingBack { .. } => {
                self.wait(SWITCH, now);
                todo.push(self.take_back_command());
            }
            Phase::SwitchingBack => {
                self.wait(SWITCH, now);
                self.go_back(now, todo);
            }
            // Nothing was heard yet; in a quiet night nothing will be.
            Phase::Standby if self.plan.hears() => self.wait_a_moment(now),
            // Nor does it roll back for that.
            Phase::Paused(Held::Bake) if self.is_judged() => self.wait_a_moment(now),
            Phase::Baking { .. } => {
                let why = "the daemon was restarted, so it bakes from the beginning";
                self.bake(why.to_owned(), now);
            }
            _ => {}
        }
    }

    /// A wait is over.
    fn expire(&mut self, now: Now, todo: &mut Vec<Command>) {
        let waited = humantime::format_duration(Duration::from_millis(self.wait_ms));
        match self.phase {
            Phase::Validating { gate, .. } => {
                let why = format!("the gate had no result after {waited}");
                self.pause(Held::Gate(gate), why, None, now);
            }
            Phase::Ready => {
                let why = format!("nobody approved it within {waited}");
                match self.plan.approval.on_expiry {
                    OnExpiry::Abort => {
                        self.over(State::Aborted, exit::TIMED_OUT, why, None, now);
                    }
                    OnExpiry::Flip => self.go(why, None, now, todo),
                }
            }
            Phase::Switching => {
                let (code, why) = self.too_late("the flip", &waited);
                if self.holds_share() {
                    self.take_back(State::Aborted, code, why, None, now, todo);
                } else {
                    self.over(State::Aborted, code, why, None, now);
                }
            }
            Phase::Raising { .. } => {
                let (code, why) = self.too_late("its share", &waited);
                self.take_back(State::Aborted, code, why, None, now, todo);
            }
            Phase::Canary { step, .. } => self.share_ends(step, now, todo),
            Phase::TakingBack { .. } => {
                self.wait(SWITCH, now);
                todo.push(self.take_back_command());
            }
            Phase::Paused(Held::Canary(_)) => {
                let why = format!("it was paused, and nobody decided within {waited}");
                self.take_back(State::Aborted, exit::TIMED_OUT, why, None, now, todo);
            }
            Phase::Baking { .. } => self.bake_ends(now, todo),
            Phase::SwitchingBack => {
                self.wait(SWITCH, now);
                self.go_back(now, todo);
            }
            Phase::Standby => self.hold_ends(now),
            Phase::Hook { hook, .. } => {
                self.hook_expired(hook, &waited.to_string(), now, todo);
            }
            Phase::Paused(Held::Bake) => {
                let why = format!("it was paused, and nobody decided within {waited}");
                match (&self.health, self.old_trouble()) {
                    (Health::Well, _) => {
                        let why = format!("{why}; {} is well", self.to.as_str());
                        self.hold(why, None, now);
                    }
                    // Where nobody looks, it is no sign of illness that nothing is known.
                    (Health::Unknown, _) if !self.is_judged() => self.hold(why, None, now),
                    (_, Some(trouble)) => {
                        self.pause(Held::Bake, format!("{why}; {trouble}"), None, now);
                    }
                    (_, None) => self.roll_back(why, now, todo),
                }
            }
            Phase::Paused(_) => {
                let why = format!("it was paused, and nobody decided within {waited}");
                self.over(State::Aborted, exit::TIMED_OUT, why, None, now);
            }
            Phase::Over { .. } => {}
        }
    }

    // ---- Small things

    fn enter(&mut self, phase: Phase, wait: Duration, why: String, by: Option<&By>, now: Now) {
        self.phase = phase;
        self.since_unix_ms = now.unix_ms;
        self.wait(wait, now);
        self.why.clone_from(&why);
        self.note(why, by, now);
    }

    fn wait(&mut self, wait: Duration, now: Now) {
        self.wait_ms = milliseconds(wait);
        self.until_ms = now.ms.saturating_add(self.wait_ms);
    }

    /// No less than a moment from now, for what was not heard yet.
    fn wait_a_moment(&mut self, now: Now) {
        let soon = now.ms.saturating_add(milliseconds(RECHECK));
        self.until_ms = self.until_ms.max(soon);
    }

    /// Somebody looks at the new colour: health checks, signals or rules.
    fn is_judged(&self) -> bool {
        self.watched || self.plan.hears()
    }

    fn over(&mut self, state: State, code: u8, why: String, by: Option<&By>, now: Now) {
        if matches!(state, State::Failed | State::Aborted) {
            self.after(When::Failed);
        }
        self.enter(Phase::Over { state, code }, Duration::ZERO, why, by, now);
    }

    fn is_over(&self) -> bool {
        self.state().is_over()
    }

    /// The generation that its flip makes.
    const fn flipped_generation(&self) -> u16 {
        self.generation.wrapping_add(1)
    }

    fn cannot(&self, what: &str) -> Result<(), Refusal> {
        let (id, state) = (self.id(), self.state().as_str());
        conflict(format!("{id} cannot {what}: it is {state} ({})", self.why))
    }
}

fn no_release(event: &Event) -> Result<(), Refusal> {
    match event {
        Event::Approve(_)
        | Event::Reject(_)
        | Event::Abort(_)
        | Event::Pause(_)
        | Event::Resume { .. }
        | Event::Extend { .. }
        | Event::Retire { .. } => {
            conflict("there is no release: begin one with `bgswitch release start`")
        }
        _ => Ok(()),
    }
}

fn conflict(message: impl Into<String>) -> Result<(), Refusal> {
    Err(Refusal::new(Kind::Conflict, message))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}
