//! What becomes of a release by what its hooks say.

use std::time::Duration;

use bg_common::service::Colour;

use super::{
    service::{Service, exec},
    *,
};
use crate::config::{BakePlan, CanaryStep, HookPlan, OnFailure, ReleasePlan, Share};

fn hook(when: When, name: &str, on_failure: OnFailure) -> HookPlan {
    HookPlan {
        when,
        on_failure,
        run: exec(name, Duration::from_mins(1)),
    }
}

fn stops(when: When) -> HookPlan {
    hook(when, when.as_str(), OnFailure::Stop)
}

fn aside(when: When) -> HookPlan {
    hook(when, when.as_str(), OnFailure::GoOn)
}

impl Service {
    /// Begins a release with a canary of 5 % for a minute, and hooks; what it asks for
    /// first.
    fn begins(hooks: Vec<HookPlan>) -> (Self, Vec<Command>) {
        let mut service = Self::idle();
        let todo = service.starts(ReleasePlan {
            canary: vec![CanaryStep {
                percent: Share(50_000),
                time: Duration::from_mins(1),
            }],
            bake: BakePlan {
                settle: Duration::ZERO,
                ..BakePlan::default()
            },
            hooks,
            ..ReleasePlan::default()
        });
        (service, todo)
    }

    /// The hooks that are asked for, say so.
    fn say(&mut self, todo: &[Command], names: &[&str], verdict: Verdict) -> Vec<Command> {
        assert_eq!(asked(todo), names);
        let runs = todo.iter().filter_map(|command| match command {
            Command::RunGate { run, .. } => Some(*run),
            _ => None,
        });
        let outcome = Outcome {
            verdict,
            evidence: "said so".to_owned(),
            took_ms: 1,
        };
        let runs: Vec<u32> = runs.collect();
        let said = runs.into_iter().flat_map(|run| {
            self.handle(Event::GateEnded {
                run,
                outcome: outcome.clone(),
            })
        });
        said.collect()
    }

    fn stored(&mut self, active: Colour, generation: u16, canary: u16) -> Vec<Command> {
        self.word = Word {
            active,
            generation,
            canary,
        };
        self.look()
    }

    /// Its share is asked for, and stored, and its time goes by.
    fn has_its_canary(&mut self, todo: &[Command]) -> Vec<Command> {
        assert!(matches!(todo, [Command::Canary { .. }]), "{todo:?}");
        assert_eq!(self.stored(Colour::Blue, 7, 3277), []);
        self.after(60, Health::Well).1
    }

    fn stands(&self) -> (State, u8) {
        (self.machine.state(), self.code())
    }

    fn last(&self) -> &str {
        let release = self.machine.release.as_ref().unwrap();
        &release.notes.last().unwrap().text
    }
}

/// Names of the hooks that are asked for.
fn asked(todo: &[Command]) -> Vec<&str> {
    let asked = todo.iter().filter_map(|command| match command {
        Command::RunGate {
            gate,
            when: Some(_),
            ..
        } => Some(gate.name.as_str()),
        _ => None,
    });
    asked.collect()
}

#[test]
fn each_step_waits_for_the_hooks_before_it_and_for_none_behind_it() {
    use When::*;
    let hooks = vec![
        stops(BeforeFlip),
        stops(BeforeCanary),
        stops(BeforeGates),
        hook(BeforeGates, "second", OnFailure::Stop),
        aside(AfterFlip),
        aside(AfterBake),
        aside(AfterStandby),
        aside(Failed),
    ];
    let (mut service, todo) = Service::begins(hooks);
    let todo = service.say(&todo, &["before-gates"], Verdict::Pass);
    let todo = service.say(&todo, &["second"], Verdict::Pass);
    assert_eq!(service.machine.state(), State::Canary);
    let release = service.machine.release.as_ref().unwrap();
    let notes = release.notes.iter();
    let said = notes.filter(|note| note.text.starts_with("hook "));
    assert_eq!(said.count(), 2, "{:?}", release.notes);
    let todo = service.say(&todo, &["before-canary"], Verdict::Pass);
    let todo = service.has_its_canary(&todo);
    assert_eq!(service.machine.state(), State::Switching);
    let todo = service.say(&todo, &["before-flip"], Verdict::Pass);
    assert!(matches!(todo[..], [Command::Flip { .. }]), "{todo:?}");
    let flipped = service.stored(Colour::Green, 8, 0);
    assert_eq!(service.machine.state(), State::Baking);
    // Those behind a step say it when they can, and change nothing.
    assert_eq!(service.say(&flipped, &["after-flip"], Verdict::Fail), []);
    assert_eq!(service.machine.state(), State::Baking);
    assert_eq!(service.last(), "hook after-flip: fail, said so");
    service.seconds += 30 * 60;
    let baked = service.handle(Event::Health(Health::Well));
    assert_eq!(service.machine.state(), State::Standby);
    assert_eq!(asked(&baked), ["after-bake"]);
    let retired = service.retires(false);
    assert_eq!(service.stands(), (State::Steady, 0));
    assert_eq!(service.say(&retired, &["after-standby"], Verdict::Pass), []);
    // Nobody waits for one that hangs.
    service.seconds += 65;
    assert_eq!(service.handle(Event::Tick), []);
    assert_eq!(service.last(), "hook after-bake: no result, it was ended");
    assert_eq!(service.machine.next_deadline(), None);
}

#[test]
fn a_hook_that_fails_or_hangs_before_a_step_stops_it_unless_it_is_told_to_go_on() {
    for (on_failure, wanted) in [
        (OnFailure::Stop, (State::Failed, exit::GATE)),
        (OnFailure::GoOn, (State::Canary, 0)),
    ] {
        let hooks = || vec![hook(When::BeforeCanary, "notice", on_failure)];
        for verdict in [Verdict::Fail, Verdict::Inconclusive] {
            let (mut service, todo) = Service::begins(hooks());
            service.say(&todo, &["notice"], verdict);
            assert_eq!(service.stands(), wanted);
        }
        let (mut service, _) = Service::begins(hooks());
        service.seconds += 65;
        service.handle(Event::Tick);
        assert_eq!(service.stands(), wanted);
    }
}

#[test]
fn a_hook_that_stops_the_flip_takes_the_canary_back() {
    let (mut service, todo) = Service::begins(vec![stops(When::BeforeFlip), aside(When::Failed)]);
    let todo = service.has_its_canary(&todo);
    let todo = service.say(&todo, &["before-flip"], Verdict::Fail);
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
    assert_eq!(asked(&service.stored(Colour::Blue, 8, 0)), ["failed"]);
    assert_eq!(service.stands(), (State::Failed, exit::GATE));
}

#[test]
fn a_canary_is_watched_also_while_a_hook_before_the_flip_runs() {
    let hooks = [When::AfterRollback, When::Failed].map(aside);
    let (mut service, todo) =
        Service::begins([vec![stops(When::BeforeFlip)], hooks.to_vec()].concat());
    service.has_its_canary(&todo);
    let todo = service.handle(Event::Failing("half of the answers".to_owned()));
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
    let todo = service.stored(Colour::Blue, 8, 0);
    assert_eq!(service.stands(), (State::RolledBack, exit::ROLLED_BACK));
    assert_eq!(asked(&todo), ["after-rollback"]);
}

#[test]
fn who_must_decide_is_called_and_an_end_before_the_flip_is_told() {
    let mut service = Service::idle();
    let hooks = [When::Ready, When::Paused, When::Failed].map(aside);
    let mut plan = ReleasePlan {
        hooks: hooks.to_vec(),
        ..ReleasePlan::default()
    };
    plan.approval.required = true;
    let by = By::default();
    let todo = service.starts(plan);
    assert_eq!(service.say(&todo, &["ready"], Verdict::Pass), []);
    let todo = service.handle(Event::Pause(by.clone()));
    assert_eq!(service.say(&todo, &["paused"], Verdict::Fail), []);
    let todo = service.handle(Event::Resume {
        by: by.clone(),
        force: false,
    });
    assert_eq!(asked(&todo), ["ready"]);
    assert_eq!(service.machine.state(), State::Ready);
    let todo = service.handle(Event::Reject(by));
    assert_eq!(service.stands(), (State::Aborted, exit::FAILED));
    assert_eq!(service.say(&todo, &["failed"], Verdict::Pass), []);

    let hooks = vec![stops(When::BeforeGates), aside(When::Failed)];
    let (mut service, todo) = Service::begins(hooks);
    let todo = service.say(&todo, &["before-gates"], Verdict::Fail);
    assert_eq!(asked(&todo), ["failed"]);
    assert_eq!(service.stands(), (State::Failed, exit::GATE));
    assert_eq!(service.say(&todo, &["failed"], Verdict::Pass), []);

    // Whoever flips by hand may have flipped to the new colour.
    let (mut service, _) = Service::begins(vec![aside(When::Failed)]);
    assert_eq!(service.stored(Colour::Green, 8, 0), []);
    assert_eq!(service.stands(), (State::Superseded, exit::CONFLICT));
}

/// Law 5.
#[test]
fn a_rollback_waits_for_no_hook() {
    let hooks = vec![stops(When::BeforeFlip), aside(When::AfterRollback)];
    let (mut service, todo) = Service::begins(hooks);
    service.has_its_canary(&todo);
    let todo = service.stored(Colour::Blue, 8, 0);
    assert_eq!(service.stands(), (State::RolledBack, exit::FAILED));
    assert_eq!(asked(&todo), ["after-rollback"]);
}

#[test]
fn what_a_killed_daemon_had_begun_is_run_again() {
    let (mut service, todo) =
        Service::begins(vec![stops(When::BeforeCanary), aside(When::AfterRollback)]);
    let again = |service: &mut Service| {
        let kept = serde_json::to_string(&service.machine).unwrap();
        service.machine = serde_json::from_str(&kept).unwrap();
        let word = Some(service.word);
        service.handle(Event::Restarted {
            word,
            same_boot: true,
        })
    };
    assert_eq!(asked(&todo), ["before-canary"]);
    let todo = again(&mut service);
    let todo = service.say(&todo, &["before-canary"], Verdict::Pass);
    assert!(matches!(todo[..], [Command::Canary { .. }]), "{todo:?}");
    service.stored(Colour::Blue, 7, 3277);
    let todo = service.stored(Colour::Blue, 8, 0);
    assert_eq!(asked(&todo), ["after-rollback"]);
    let todo = again(&mut service);
    assert_eq!(service.say(&todo, &["after-rollback"], Verdict::Pass), []);
    assert_eq!(again(&mut service), []);
}
