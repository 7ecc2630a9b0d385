//! What no sequence of events, times, crashes and words can lead to. A world around
//! the machine carries out its commands, keeps it on a disk of its own, and knows
//! by itself which gates were passed, and who agreed.

use std::{cell::RefCell, collections::BTreeSet, time::Duration};

use bg_common::service::Colour;
use proptest::{
    collection::vec,
    prelude::{BoxedStrategy, Just, ProptestConfig, Strategy, any, prop_oneof},
    sample::select,
    test_runner::{TestCaseError, TestRunner},
};

use super::*;
use crate::config::{
    ApprovalPlan, BakePlan, CanaryStep, GateKind, GatePlan, HookPlan, OnFailure, ReleasePlan,
    Share, SignalPlan, StandbyPlan,
};

/// What is looked at in a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Law {
    FlipNeedsGates,
    OneAtATime,
    EveryWaitEnds,
    RollbackIsOneStep,
    OneRollbackByItself,
    RefusalChangesNothing,
    CanaryGoesBack,
}

/// Where the daemon is killed, and started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Crash {
    No,
    /// With the event handled, and nothing kept.
    BeforeSave,
    /// With the machine kept, and no command carried out.
    AfterSave,
    /// With the commands carried out, and nothing heard of them.
    AfterCommands,
}

#[derive(Clone, Debug)]
enum Step {
    Advance(u64),
    ToDeadline,
    Gate(Verdict),
    /// A result of a run that is not waited for any more.
    OldGate(u32, Verdict),
    Start {
        by: usize,
        force: bool,
        green: bool,
    },
    Approve(usize),
    Reject(usize),
    Abort(usize),
    Pause(usize),
    Resume {
        by: usize,
        force: bool,
    },
    Extend(u64),
    Retire(usize),
    Health(Health),
    Failing,
    /// Somebody flips; the machine may hear of it, or not yet.
    FlipByHand {
        heard: bool,
    },
    /// Somebody stores a share, or takes it back as `rollback` does.
    CanaryByHand {
        share: u16,
        back: bool,
        heard: bool,
    },
    Hear,
    /// The next store does not work.
    Hang,
    /// The next store has to wait for health checks.
    NotYet,
    /// What waits for them is tried again.
    Again,
    /// A reload takes health checks out.
    Unwatched,
    Restart {
        reboot: bool,
    },
}

const ACTORS: [&str; 3] = ["ada(1)", "ben(2)", "cleo(3)"];

fn by(actor: usize) -> By {
    By {
        actor: ACTORS[actor].to_owned(),
        why: None,
    }
}

/// A machine, its disk, the kernel's word, and what the world knows by itself.
#[expect(clippy::struct_excessive_bools, reason = "facts, each by itself")]
struct World {
    law: Law,
    plan: ReleasePlan,
    watched: bool,
    machine: Machine,
    disk: String,
    word: Word,
    now: Now,
    hang: bool,
    not_yet: bool,
    /// Runs of gates that were asked for: run, gate.
    runs: Vec<(u32, usize)>,
    /// Of the release with this number:
    number: u64,
    passed: BTreeSet<usize>,
    /// Hooks that said that all is well, by name.
    hooked: BTreeSet<String>,
    /// Runs of hooks that were asked for: run, name.
    hooks: Vec<(u32, String)>,
    forced: BTreeSet<usize>,
    force_all: bool,
    agreed: BTreeSet<String>,
    ready_until: Option<u64>,
    /// The share that it stored last.
    share: u16,
    flips: u32,
    rollbacks: u32,
    /// Of all releases.
    rolled_back_at: Option<u64>,
    runs_now: bool,
    states: BTreeSet<&'static str>,
}

impl World {
    fn new(law: Law, plan: ReleasePlan, watched: bool) -> Self {
        let machine = Machine::default();
        Self {
            law,
            plan,
            watched,
            disk: serde_json::to_string(&machine).unwrap(),
            machine,
            word: Word {
                active: Colour::Blue,
                generation: u16::MAX - 3,
                canary: 0,
            },
            now: Now {
                ms: 1_000_000,
                unix_ms: 0,
            },
            hang: false,
            not_yet: false,
            runs: Vec::new(),
            number: 0,
            passed: BTreeSet::new(),
            hooked: BTreeSet::new(),
            hooks: Vec::new(),
            forced: BTreeSet::new(),
            force_all: false,
            agreed: BTreeSet::new(),
            ready_until: None,
            share: 0,
            flips: 0,
            rollbacks: 0,
            rolled_back_at: None,
            runs_now: false,
            states: BTreeSet::new(),
        }
    }

    fn walk(&mut self, step: &Step, crash: Crash) {
        let event = match step {
            Step::Advance(ms) => {
                self.now.ms += ms;
                Event::Tick
            }
            Step::ToDeadline => {
                let deadline = self.machine.next_deadline().unwrap_or(self.now.ms);
                self.now.ms = self.now.ms.max(deadline);
                Event::Tick
            }
            Step::Gate(verdict) => {
                let Some((run, _)) = self.runs.last().copied() else {
                    return;
                };
                ended(run, *verdict)
            }
            Step::OldGate(run, verdict) => {
                let latest = self.runs.last().map_or(0, |(run, _)| *run);
                ended(latest.saturating_sub(run + 1), *verdict)
            }
            Step::Start {
                by: actor,
                force,
                green,
            } => Event::Start(Box::new(Start {
                by: by(*actor),
                to: if *green {
                    Colour::Green
                } else {
                    self.word.active.other()
                },
                version: None,
                tested: Vec::new(),
                plan: self.plan.clone(),
                watched: self.watched,
                force: *force,
                word: self.word,
            })),
            Step::Approve(actor) => Event::Approve(by(*actor)),
            Step::Reject(actor) => Event::Reject(by(*actor)),
            Step::Abort(actor) => Event::Abort(by(*actor)),
            Step::Pause(actor) => Event::Pause(by(*actor)),
            Step::Resume { by: actor, force } => Event::Resume {
                by: by(*actor),
                force: *force,
            },
            Step::Extend(seconds) => Event::Extend {
                by: by(0),
                more: Duration::from_secs(*seconds),
            },
            Step::Retire(actor) => Event::Retire {
                by: by(*actor),
                force: false,
            },
            Step::Health(health) => Event::Health(health.clone()),
            Step::Failing => Event::Failing("it answers 500".to_owned()),
            Step::FlipByHand { heard } => {
                self.word = flipped(self.word);
                self.share = 0;
                if !heard {
                    return;
                }
                self.heard(Some("ben(2)"))
            }
            Step::CanaryByHand { share, back, heard } => {
                self.word = if *back {
                    taken_back(self.word)
                } else {
                    Word {
                        canary: *share,
                        ..self.word
                    }
                };
                // What a human stored is his.
                self.share = 0;
                if !heard {
                    return;
                }
                self.heard(Some("ben(2)"))
            }
            Step::Hear => self.heard(None),
            Step::Hang => {
                self.hang = true;
                return;
            }
            Step::NotYet => {
                self.not_yet = true;
                return;
            }
            Step::Again => Event::Again,
            Step::Unwatched => Event::Unwatched,
            Step::Restart { reboot } => {
                self.restart(*reboot);
                return;
            }
        };
        self.feed(&event, crash);
    }

    fn heard(&self, by: Option<&str>) -> Event {
        Event::Word {
            word: Some(self.word),
            by: by.map(str::to_owned),
        }
    }

    /// As the daemon does it: handle, keep, carry out, tell.
    fn feed(&mut self, event: &Event, crash: Crash) {
        let before = self.machine.clone();
        let todo = self.machine.handle(event.clone(), self.now);
        if crash == Crash::BeforeSave {
            return self.restart(false);
        }
        self.disk = serde_json::to_string(&self.machine).unwrap();
        self.note(&before, event, &todo);
        self.look(&before, &todo);
        if crash == Crash::AfterSave {
            return self.restart(false);
        }
        let told: Vec<Event> = todo
            .iter()
            .flat_map(|command| self.carry_out(&before, command))
            .collect();
        if crash == Crash::AfterCommands {
            return self.restart(false);
        }
        for event in told {
            self.feed(&event, Crash::No);
        }
    }

    fn restart(&mut self, reboot: bool) {
        self.machine = serde_json::from_str(&self.disk).unwrap();
        self.runs.clear();
        self.hooks.clear();
        if reboot {
            self.now.ms = 5000;
            // The world counts anew, too.
            let cooldown = self.plan.bake.cooldown.as_millis() as u64;
            self.rolled_back_at = self
                .rolled_back_at
                .map(|_| self.now.ms.saturating_sub(cooldown));
            self.ready_until = None;
        }
        let event = Event::Restarted {
            word: Some(self.word),
            same_boot: !reboot,
        };
        self.feed(&event, Crash::No);
    }

    /// What an outsider learns from an event that was kept.
    fn note(&mut self, before: &Machine, event: &Event, todo: &[Command]) {
        let refused = todo.iter().any(|c| matches!(c, Command::Refuse(_)));
        let held = before.release.as_ref().map(|release| release.phase);
        match event {
            Event::Start(start) if !refused => {
                if self.law == Law::OneAtATime {
                    assert!(!self.runs_now, "two releases at once: {before:?}");
                }
                self.number += 1;
                self.passed.clear();
                self.hooked.clear();
                self.forced.clear();
                self.agreed.clear();
                (self.force_all, self.flips, self.rollbacks) = (start.force, 0, 0);
                self.ready_until = None;
            }
            Event::GateEnded { run, outcome } => {
                let awaited = before.release.as_ref().and_then(Release::run);
                let hook = self.hooks.iter().find(|(of, _)| of == run);
                if let Some((_, name)) = hook.filter(|_| awaited == Some(*run))
                    && outcome.verdict == Verdict::Pass
                {
                    self.hooked.insert(name.clone());
                }
                let gate = self.runs.iter().find(|(of, _)| of == run);
                if let Some((_, gate)) = gate.filter(|_| awaited == Some(*run)) {
                    match outcome.verdict {
                        Verdict::Pass => self.passed.insert(*gate),
                        _ => self.passed.remove(gate),
                    };
                }
            }
            Event::Approve(by) if !refused => {
                self.agreed.insert(by.actor.clone());
            }
            Event::Resume { force: true, .. } if !refused => {
                if let Some(Phase::Paused(Held::Gate(gate))) = held {
                    self.forced.insert(gate);
                }
            }
            _ => {}
        }
        for command in todo {
            if let Command::RunGate {
                run, gate, when, ..
            } = command
            {
                let mut gates = self.plan.gates.iter();
                let index = gates.position(|plan| plan == gate).unwrap_or(usize::MAX);
                self.runs.push((*run, index));
                if when.is_some() {
                    self.hooks.push((*run, gate.name.clone()));
                }
            }
        }
        let state = self.machine.state();
        self.states.insert(state.as_str());
        self.runs_now = !state.is_over() && state != State::Standby;
        if state == State::Ready && self.ready_until.is_none() {
            let expires = self.plan.approval.expires.as_millis() as u64;
            self.ready_until = Some(self.now.ms + expires);
        }
    }

    /// Looks at where the machine is.
    fn look(&self, before: &Machine, todo: &[Command]) {
        match self.law {
            Law::EveryWaitEnds => self.every_wait_ends(),
            Law::RollbackIsOneStep => self.rollback_is_one_step(),
            Law::OneAtATime => {
                let acts = |c: &Command| !matches!(c, Command::Refuse(_)) && !is_aside(c);
                let number = |machine: &Machine| machine.release.as_ref().map(|r| r.number);
                let began = number(before) != number(&self.machine);
                assert!(
                    began || !before.state().is_over() || !todo.iter().any(acts),
                    "a release that is over still acts: {before:?} {todo:?}"
                );
                assert_eq!(number(&self.machine).unwrap_or(0), self.number);
            }
            Law::RefusalChangesNothing => {
                let refused = todo.iter().any(|c| matches!(c, Command::Refuse(_)));
                let is_due = before.next_deadline().is_some_and(|at| at <= self.now.ms);
                if refused && !is_due {
                    assert_eq!((before, todo.len()), (&self.machine, 1));
                }
            }
            Law::CanaryGoesBack => self.canary_goes_back(),
            Law::FlipNeedsGates | Law::OneRollbackByItself => {}
        }
    }

    /// A release that is over has left no share of its own behind.
    fn canary_goes_back(&self) {
        let Some(release) = &self.machine.release else {
            return;
        };
        let (State::Aborted | State::RolledBack | State::Failed) = release.state() else {
            return;
        };
        assert_eq!(self.share, 0, "{} % stay: {release:?}", self.share);
    }

    fn every_wait_ends(&self) {
        let deadline = self.machine.next_deadline();
        if self.machine.state().is_over() {
            let waits = self
                .machine
                .release
                .as_ref()
                .is_some_and(Release::has_pending);
            if !waits {
                return assert_eq!(deadline, None, "{:?}", self.machine);
            }
        }
        let deadline = deadline.expect("a wait without an end");
        let longest = MAX_DURATION.as_millis() as u64 * 2;
        assert!(deadline <= self.now.ms + longest, "{:?}", self.machine);
        let mut later = self.machine.clone();
        let now = Now {
            ms: deadline.max(self.now.ms),
            unix_ms: 7,
        };
        later.handle(Event::Tick, now);
        assert_ne!(later, self.machine, "nothing happens at the end of a wait");
    }

    /// Whoever stores the other colour has rolled back: the release is over, and
    /// stores nothing after it.
    fn rollback_is_one_step(&self) {
        let Some(release) = self.machine.release.as_ref().filter(|r| !r.is_over()) else {
            return;
        };
        let ours = Word {
            active: release.to,
            generation: release.generation.wrapping_add(1),
            canary: 0,
        };
        let (word, state) = if release.has_flipped() || self.word == ours {
            (flipped(ours), State::RolledBack)
        } else {
            (flipped(flipped(ours)), State::Superseded)
        };
        // A flip that was stored, and of which nothing was heard, was somebody's.
        let unheard = release.share().is_some()
            || matches!(
                release.phase,
                Phase::Validating { .. }
                    | Phase::Ready
                    | Phase::Hook { .. }
                    | Phase::TakingBack { .. }
            )
            || matches!(release.phase, Phase::Paused(Held::Gate(_) | Held::Approval));
        let is_back = word.active == release.from;
        let wanted = match release.phase {
            Phase::TakingBack { state, .. } if is_back => state,
            _ if is_back && release.share().is_some() => State::RolledBack,
            _ if unheard => State::Superseded,
            _ => state,
        };
        self.ends_with(word, wanted);
        let before = Word {
            active: release.from,
            generation: release.generation,
            canary: 655,
        };
        match release.phase {
            Phase::TakingBack { state, .. } => self.ends_with(taken_back(before), state),
            _ if release.share().is_some() => {
                self.ends_with(taken_back(before), State::RolledBack);
            }
            _ => {}
        }
    }

    /// With this word the release is over, and nothing is stored any more.
    fn ends_with(&self, word: Word, wanted: State) {
        let mut after = self.machine.clone();
        let event = Event::Word {
            word: Some(word),
            by: None,
        };
        let mut todo = after.handle(event, self.now);
        assert_eq!(after.state(), wanted, "{:?}", self.machine);
        let now = Now {
            ms: self.now.ms + MAX_DURATION.as_millis() as u64 * 9,
            unix_ms: 7,
        };
        todo.extend(after.handle(Event::Health(Health::Ill("x".to_owned())), now));
        let restarted = Event::Restarted {
            word: Some(word),
            same_boot: true,
        };
        todo.extend(after.handle(restarted, now));
        // Hooks behind a rollback run aside.
        todo.retain(|command| !is_aside(command));
        assert_eq!(todo, [], "{:?}", self.machine);
    }

    fn carry_out(&mut self, before: &Machine, command: &Command) -> Vec<Event> {
        let hangs = std::mem::take(&mut self.hang);
        match *command {
            Command::Flip {
                to,
                from_generation,
                ..
            } => {
                if self.law == Law::FlipNeedsGates {
                    self.may_flip(true);
                }
                if std::mem::take(&mut self.not_yet) {
                    return vec![Event::NotYet];
                }
                if hangs || self.word.generation != from_generation || self.word.active == to {
                    let refusal = Refusal::new(Kind::Failed, "hangs");
                    return vec![self.heard(None), Event::NotStored { refusal }];
                }
                self.flips += 1;
                if self.law == Law::FlipNeedsGates {
                    assert_eq!(self.flips, 1, "flipped twice");
                }
                self.word = flipped(self.word);
                self.share = 0;
                vec![self.heard(Some("bgswitch"))]
            }
            Command::Canary {
                to,
                percent,
                from_generation,
                ..
            } => {
                if self.law == Law::FlipNeedsGates {
                    self.may_flip(false);
                }
                if std::mem::take(&mut self.not_yet) {
                    return vec![Event::NotYet];
                }
                if hangs || self.word.generation != from_generation || self.word.active == to {
                    let refusal = Refusal::new(Kind::Failed, "hangs");
                    return vec![self.heard(None), Event::NotStored { refusal }];
                }
                self.share = crate::switch::nearest_share(percent.percent());
                self.word.canary = self.share;
                vec![self.heard(Some("bgswitch"))]
            }
            Command::RollBack {
                leave,
                from_generation,
                ..
            } => {
                let is_canary = self.word.active != leave;
                if self.law == Law::OneRollbackByItself && !is_canary {
                    self.may_roll_back(before);
                }
                if hangs || self.word.generation != from_generation {
                    return vec![self.heard(None)];
                }
                if is_canary {
                    if self.word.canary > 0 {
                        self.word = taken_back(self.word);
                    }
                    self.share = 0;
                    return vec![self.heard(Some("bgswitch"))];
                }
                self.rollbacks += 1;
                self.rolled_back_at = Some(self.now.ms);
                self.word = flipped(self.word);
                vec![self.heard(Some("bgswitch"))]
            }
            Command::RunGate { .. } | Command::Refuse(_) => Vec::new(),
        }
    }

    fn may_flip(&self, is_flip: bool) {
        let release = self.machine.release.as_ref().unwrap();
        for (index, gate) in release.gates.iter().enumerate() {
            let forced = self.force_all || self.forced.contains(&index);
            let known = self.passed.contains(&index) || forced;
            assert!(known, "a flip without gate {index}: {release:?}");
            let written = gate.forced_by.is_some() && notes(release, "passed over");
            assert!(
                self.passed.contains(&index) || written,
                "not written down: {release:?}"
            );
        }
        for hook in &release.plan.hooks {
            let is_due = matches!(hook.when, When::BeforeGates | When::BeforeFlip);
            let is_due = is_due && (hook.when == When::BeforeGates || is_flip);
            let passed = self.hooked.contains(&hook.run.name);
            let stops = hook.on_failure == OnFailure::Stop;
            assert!(
                passed || !is_due || !stops,
                "a flip without a hook: {release:?}"
            );
        }
        let plan = self.plan.approval;
        if plan.required {
            let counts = |by: &String| !plan.not_requester || *by != release.requester;
            let expired = plan.on_expiry == OnExpiry::Flip
                && self.ready_until.is_none_or(|until| self.now.ms >= until);
            let agreed = self.agreed.iter().any(counts);
            assert!(agreed || expired, "a flip without an approval: {release:?}");
        } else if release.gates.is_empty() && release.plan.canary.is_empty() {
            assert!(
                self.force_all && notes(release, "passed over"),
                "{release:?}"
            );
        }
    }

    fn may_roll_back(&self, before: &Machine) {
        assert_eq!(self.rollbacks, 0, "rolled back twice: {:?}", self.machine);
        let cooldown = self.plan.bake.cooldown.as_millis() as u64;
        let cool = self
            .rolled_back_at
            .is_none_or(|at| self.now.ms >= at + cooldown);
        // Nobody decided for hours, or it was decided, and the daemon was killed.
        let decided = matches!(before.state(), State::Paused | State::Switching);
        assert!(cool || decided, "rolled back again at once: {before:?}");
    }
}

fn notes(release: &Release, what: &str) -> bool {
    release
        .notes
        .iter()
        .any(|note| note.actor.is_some() && note.text.contains(what))
}

/// A hook behind a step.
fn is_aside(command: &Command) -> bool {
    matches!(command, Command::RunGate { when: Some(when), .. } if !when.is_before())
}

fn flipped(word: Word) -> Word {
    Word {
        active: word.active.other(),
        generation: word.generation.wrapping_add(1),
        canary: 0,
    }
}

/// What a rollback makes of a canary.
fn taken_back(word: Word) -> Word {
    Word {
        generation: word.generation.wrapping_add(1),
        canary: 0,
        ..word
    }
}

fn ended(run: u32, verdict: Verdict) -> Event {
    Event::GateEnded {
        run,
        outcome: Outcome {
            verdict,
            evidence: "said so".to_owned(),
            took_ms: 1,
        },
    }
}

fn plans() -> impl Strategy<Value = ReleasePlan> {
    let gates = (0..4usize).prop_map(|count| {
        let gate = |index| GatePlan {
            name: format!("g{index}"),
            timeout: Duration::from_secs(20),
            kind: GateKind::Exec(vec!["/bin/true".to_owned()]),
        };
        (0..count).map(gate).collect()
    });
    let approval = (
        any::<bool>(),
        any::<bool>(),
        select(vec![OnExpiry::Abort, OnExpiry::Flip]),
    );
    let trouble = || select(vec![OnTrouble::Rollback, OnTrouble::Pause]);
    let seconds = || select(vec![0u64, 30, 600]);
    let bake = (seconds(), seconds(), trouble(), trouble(), seconds());
    let canary = (0..3u32).prop_map(|steps| {
        let step = |step: u32| CanaryStep {
            percent: Share((step + 1) * 50_000),
            time: Duration::from_mins(1),
        };
        (0..steps).map(step).collect()
    });
    (gates, canary, approval, bake, seconds()).prop_map(
        |(gates, canary, (required, not_requester, on_expiry), bake, hold)| ReleasePlan {
            gates,
            canary,
            approval: ApprovalPlan {
                required,
                not_requester,
                expires: Duration::from_secs(100),
                on_expiry,
            },
            bake: BakePlan {
                duration: Duration::from_secs(bake.0),
                settle: Duration::from_secs(bake.1),
                on_fail: bake.2,
                on_inconclusive: bake.3,
                cooldown: Duration::from_secs(bake.4),
                signals: (bake.4 == 30).then(SignalPlan::default),
            },
            prometheus: None,
            standby: StandbyPlan {
                hold: Duration::from_secs(hold),
            },
            hooks: if hold == 30 { hooks() } else { Vec::new() },
        },
    )
}

/// One at each time, and one more that only tells.
fn hooks() -> Vec<HookPlan> {
    let hook = |(index, when): (usize, When)| HookPlan {
        when,
        on_failure: if index == 0 || !when.is_before() {
            OnFailure::GoOn
        } else {
            OnFailure::Stop
        },
        run: GatePlan {
            name: format!("h{index}"),
            timeout: Duration::from_secs(20),
            kind: GateKind::Exec(vec!["/bin/true".to_owned()]),
        },
    };
    let first = std::iter::once(When::BeforeGates);
    first.chain(When::ALL).enumerate().map(hook).collect()
}

fn steps() -> BoxedStrategy<Step> {
    let actor = || 0..ACTORS.len();
    let verdict = || {
        prop_oneof![
            6 => Just(Verdict::Pass),
            1 => Just(Verdict::Fail),
            2 => Just(Verdict::Inconclusive),
        ]
    };
    let health = select(vec![
        Health::Unknown,
        Health::Well,
        Health::Ill("it is wedged".to_owned()),
    ]);
    prop_oneof![
        6 => (0..90_000u64).prop_map(Step::Advance),
        4 => Just(Step::ToDeadline),
        16 => verdict().prop_map(Step::Gate),
        2 => (0..3u32, verdict()).prop_map(|(run, verdict)| Step::OldGate(run, verdict)),
        10 => (actor(), any::<bool>(), any::<bool>())
            .prop_map(|(by, force, green)| Step::Start { by, force, green }),
        6 => actor().prop_map(Step::Approve),
        1 => actor().prop_map(Step::Reject),
        1 => actor().prop_map(Step::Abort),
        2 => actor().prop_map(Step::Pause),
        4 => (actor(), any::<bool>()).prop_map(|(by, force)| Step::Resume { by, force }),
        1 => (0..3000u64).prop_map(Step::Extend),
        1 => actor().prop_map(Step::Retire),
        6 => health.prop_map(Step::Health),
        1 => Just(Step::Failing),
        1 => any::<bool>().prop_map(|heard| Step::FlipByHand { heard }),
        1 => (0..9000u16, any::<bool>(), any::<bool>())
            .prop_map(|(share, back, heard)| Step::CanaryByHand { share, back, heard }),
        1 => Just(Step::Hear),
        1 => Just(Step::Hang),
        1 => Just(Step::NotYet),
        2 => Just(Step::Again),
        1 => Just(Step::Unwatched),
        3 => any::<bool>().prop_map(|reboot| Step::Restart { reboot }),
    ]
    .boxed()
}

fn crashes() -> impl Strategy<Value = Crash> {
    prop_oneof![
        12 => Just(Crash::No),
        1 => Just(Crash::BeforeSave),
        1 => Just(Crash::AfterSave),
        1 => Just(Crash::AfterCommands),
    ]
}

/// Walks at random, through every state there is.
fn holds(law: Law) {
    let seen = RefCell::new(BTreeSet::new());
    let walks = (plans(), any::<bool>(), vec((steps(), crashes()), 1..80));
    let config = ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let done = TestRunner::new(config).run(&walks, |(plan, watched, steps)| {
        let mut world = World::new(law, plan, watched);
        for (step, crash) in &steps {
            world.walk(step, *crash);
        }
        seen.borrow_mut().extend(world.states);
        Ok::<_, TestCaseError>(())
    });
    if let Err(error) = done {
        panic!("{error}");
    }
    assert_eq!(
        seen.borrow().len(),
        State::ALL.len(),
        "not everywhere: {:?}",
        seen.borrow()
    );
}

#[test]
fn nothing_leads_to_a_flip_without_passed_gates_unless_forced_and_written_down() {
    holds(Law::FlipNeedsGates);
}

#[test]
fn nothing_leads_to_two_releases_of_a_service_at_once() {
    holds(Law::OneAtATime);
}

#[test]
fn nothing_leads_to_a_wait_without_an_end() {
    holds(Law::EveryWaitEnds);
}

#[test]
fn nothing_leads_to_a_state_from_which_rollback_is_not_one_step() {
    holds(Law::RollbackIsOneStep);
}

#[test]
fn nothing_leads_to_a_share_that_is_left_behind() {
    holds(Law::CanaryGoesBack);
}

#[test]
fn what_is_refused_changes_nothing() {
    holds(Law::RefusalChangesNothing);
}

#[test]
fn nothing_leads_to_a_second_rollback_by_itself() {
    holds(Law::OneRollbackByItself);
}
