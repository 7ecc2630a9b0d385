//! What becomes of a bake and of a hold, by the health of the new colour.

use std::time::Duration;

use bg_common::service::Colour;

use super::{
    service::{Service, exec, ill},
    *,
};
use crate::config::{BakePlan, ReleasePlan, SignalPlan};

impl Service {
    /// A release that has just flipped; it settles for 10 s, bakes for 100 s, and is
    /// held for 45 min.
    fn baking(bake: BakePlan) -> Self {
        let mut service = Self::idle();
        service.release_with(bake);
        service
    }

    fn release_with(&mut self, bake: BakePlan) {
        self.release_to(bake, State::Baking);
    }

    /// Rolls back by itself, once.
    fn release_after_a_rollback(&mut self) {
        self.after(0, Health::Well);
        self.release_with(bake());
        let (_, todo) = self.after(20, ill());
        assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
        assert_eq!(self.flipped(), State::RolledBack);
    }

    /// A release that is in this state behind its flip.
    fn release_to(&mut self, bake: BakePlan, state: State) {
        let todo = self.starts(ReleasePlan {
            gates: vec![exec("smoke", Duration::from_secs(5))],
            bake,
            ..ReleasePlan::default()
        });
        let [Command::RunGate { run, .. }] = todo[..] else {
            panic!("no gate runs: {todo:?}");
        };
        let outcome = Outcome {
            verdict: Verdict::Pass,
            evidence: String::new(),
            took_ms: 1,
        };
        let todo = self.handle(Event::GateEnded { run, outcome });
        assert!(matches!(todo[..], [Command::Flip { .. }]), "{todo:?}");
        assert_eq!(self.flipped(), state);
    }

    /// Stores the other colour.
    fn flipped(&mut self) -> State {
        self.word = Word {
            active: self.word.active.other(),
            generation: self.word.generation + 1,
            canary: 0,
        };
        assert_eq!(self.look(), []);
        self.machine.state()
    }
}

fn bake() -> BakePlan {
    BakePlan {
        duration: Duration::from_secs(100),
        settle: Duration::from_secs(10),
        ..BakePlan::default()
    }
}

#[test]
fn requests_that_fail_count_while_caches_are_cold() {
    let mut service = Service::baking(bake());
    let (state, todo) = service.after(1, ill());
    assert_eq!((state, todo), (State::Baking, Vec::new()));
    let todo = service.handle(Event::Failing("50 of 500 answers".to_owned()));
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
    assert_eq!(service.flipped(), State::RolledBack);
}

#[test]
fn a_bake_by_signals_in_which_nothing_is_heard_is_no_pass() {
    let mut service = Service::baking(BakePlan {
        signals: Some(SignalPlan::default()),
        ..bake()
    });
    service.machine.release.as_mut().unwrap().watched = false;
    let (state, _) = service.after(200, Health::Unknown);
    assert_eq!(state, State::Paused);
}

#[test]
fn an_ill_colour_is_left_by_itself_and_it_is_said_why() {
    let mut service = Service::baking(bake());
    let (state, todo) = service.after(10, ill());
    assert_eq!(state, State::Switching);
    let [
        Command::RollBack {
            leave,
            from_generation,
            drains: false,
            why,
        },
    ] = &todo[..]
    else {
        panic!("no rollback: {todo:?}");
    };
    assert_eq!((*leave, *from_generation), (Colour::Green, 8));
    assert_eq!(why, "r-1: green is ill: it is wedged");
    assert_eq!(service.flipped(), State::RolledBack);
    assert_eq!(service.code(), exit::ROLLED_BACK);
    assert_eq!(
        service.why(),
        "green is ill: it is wedged; it rolled back by itself to blue"
    );
}

#[test]
fn what_goes_wrong_while_it_settles_counts_only_if_it_stays() {
    let mut service = Service::baking(bake());
    assert_eq!(service.after(9, ill()), (State::Baking, vec![]));
    assert_eq!(service.after(0, Health::Well), (State::Baking, vec![]));
    assert_eq!(service.after(100, Health::Well).0, State::Baking);
    assert_eq!(service.after(1, Health::Well), (State::Standby, vec![]));
    assert_eq!(
        (service.code(), service.why()),
        (0, "the bake is over, green is well")
    );

    let mut service = Service::baking(bake());
    service.after(9, ill());
    // At the end of the settle time, whether it is looked at or not.
    assert_eq!(service.machine.next_deadline(), Some(1_010_000));
    service.seconds = 1010;
    let todo = service.handle(Event::Tick);
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
}

#[test]
fn it_pauses_where_it_is_told_to_and_where_it_just_rolled_back() {
    let mut service = Service::baking(BakePlan {
        on_fail: OnTrouble::Pause,
        ..bake()
    });
    assert_eq!(service.after(20, ill()), (State::Paused, vec![]));
    assert_eq!(service.code(), exit::INCONCLUSIVE);

    let mut service = Service::baking(bake());
    service.after(20, ill());
    service.flipped();
    service.release_with(bake());
    assert_eq!(service.after(20, ill()), (State::Paused, vec![]));
    assert!(
        service.why().ends_with("so a human decides"),
        "{}",
        service.why()
    );
    // Nobody does, for four hours.
    service.seconds += 4 * 3600;
    let todo = service.handle(Event::Tick);
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
    assert_eq!(service.flipped(), State::RolledBack);
    // And after the cool-down, by itself again.
    service.release_with(bake());
    service.after(0, Health::Well);
    service.seconds += 10 * 60;
    assert_eq!(service.after(0, Health::Well).0, State::Standby);
}

/// As a daemon that was killed and started again.
fn restarted(service: &mut Service) -> Vec<Command> {
    let kept = serde_json::to_string(&service.machine).unwrap();
    service.machine = serde_json::from_str(&kept).unwrap();
    let word = Some(service.word);
    service.handle(Event::Restarted {
        word,
        same_boot: true,
    })
}

#[test]
fn a_pause_that_ends_while_nobody_looks_decides_nothing_at_once() {
    let pausing = || BakePlan {
        on_fail: OnTrouble::Pause,
        ..bake()
    };
    for (then, wanted) in [
        (Health::Well, State::Standby),
        (ill(), State::Switching),
        (Health::Unknown, State::Switching),
    ] {
        let mut service = Service::baking(pausing());
        assert_eq!(service.after(20, ill()).0, State::Paused);
        service.seconds += 5 * 3600;
        assert_eq!(restarted(&mut service), []);
        assert_eq!(service.machine.state(), State::Paused);
        service.after(59, then.clone());
        assert_eq!(service.machine.state(), State::Paused);
        assert_eq!(service.after(1, then).0, wanted);
    }
    // Where nobody ever looks, nobody knows, and that is no reason to go back.
    let mut service = Service::idle();
    service.starts_watched(
        ReleasePlan {
            gates: vec![exec("smoke", Duration::from_secs(5))],
            bake: BakePlan {
                signals: None,
                ..bake()
            },
            ..ReleasePlan::default()
        },
        false,
    );
    let outcome = Outcome {
        verdict: Verdict::Pass,
        evidence: String::new(),
        took_ms: 1,
    };
    service.handle(Event::GateEnded { run: 1, outcome });
    assert_eq!(service.flipped(), State::Baking);
    service.handle(Event::Pause(By::default()));
    service.seconds += 5 * 3600;
    assert_eq!(service.handle(Event::Tick), []);
    assert_eq!(service.machine.state(), State::Standby);
}

#[test]
fn a_flip_waits_for_the_first_verdicts_behind_a_start() {
    let mut service = Service::idle();
    service.starts(ReleasePlan {
        gates: vec![exec("smoke", Duration::from_secs(5))],
        bake: bake(),
        ..ReleasePlan::default()
    });
    let outcome = Outcome {
        verdict: Verdict::Pass,
        evidence: String::new(),
        took_ms: 1,
    };
    service.handle(Event::GateEnded { run: 1, outcome });
    service.seconds += 29;
    let todo = restarted(&mut service);
    assert!(matches!(todo[..], [Command::Flip { .. }]), "{todo:?}");
    for _ in 0..3 {
        assert_eq!(service.handle(Event::NotYet), []);
    }
    assert_eq!(service.why(), "nothing is known of green's health yet");
    service.seconds += 40;
    let todo = service.handle(Event::Again);
    assert!(matches!(todo[..], [Command::Flip { .. }]), "{todo:?}");
    assert_eq!(service.flipped(), State::Baking);
    assert_eq!(service.handle(Event::Again), []);
    let notes = &service.machine.release.as_ref().unwrap().notes;
    let told = notes.iter().filter(|note| note.text.contains("known"));
    assert_eq!(told.count(), 1, "{notes:?}");
}

#[test]
fn health_checks_that_leave_the_configuration_hold_nothing_up() {
    let mut service = Service::baking(BakePlan {
        signals: None,
        ..bake()
    });
    service.after(100, Health::Unknown);
    service.handle(Event::Unwatched);
    assert_eq!(service.after(10, Health::Unknown).0, State::Standby);
    let retired = service.retires(false);
    assert_eq!(retired, []);
    assert_eq!(service.machine.state(), State::Steady);
}

#[test]
fn not_to_know_is_not_to_pass() {
    let mut service = Service::baking(bake());
    assert_eq!(service.after(111, Health::Unknown), (State::Paused, vec![]));
    assert_eq!(service.code(), exit::INCONCLUSIVE);
    assert_eq!(service.why(), "too little is known of green");
    let mut service = Service::baking(BakePlan {
        on_inconclusive: OnTrouble::Rollback,
        ..bake()
    });
    let (_, todo) = service.after(111, Health::Unknown);
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
}

#[test]
fn the_old_colour_stays_up_while_the_new_one_is_ill() {
    let mut service = Service::baking(bake());
    service.after(100, Health::Well);
    assert_eq!(service.after(10, Health::Well).0, State::Standby);
    service.after(10, ill());
    let refused = service.retires(false);
    assert!(matches!(refused[..], [Command::Refuse(_)]), "{refused:?}");
    for _ in 0..3 {
        assert_eq!(service.after(3600, ill()), (State::Standby, vec![]));
        assert_eq!(
            service.why(),
            "green is ill: it is wedged; blue must stay up"
        );
        assert_eq!(service.after(3600, Health::Unknown).0, State::Standby);
    }
    // Nor does anybody end it by hand before somebody knows, unless it is forced.
    let refused = service.retires(false);
    assert!(matches!(refused[..], [Command::Refuse(_)]), "{refused:?}");
    let mut forced = Service {
        machine: service.machine.clone(),
        ..service
    };
    assert_eq!(forced.retires(true), []);
    assert_eq!(
        (forced.machine.state(), forced.why()),
        (
            State::Steady,
            "blue need not stay up any more, forced: nothing is known of green's health"
        )
    );
    service.after(0, Health::Well);
    assert_eq!(service.after(60, Health::Well).0, State::Steady);
}

#[test]
fn a_hold_that_is_over_right_behind_a_start_waits_until_something_is_heard() {
    let over = |health: Health| {
        let mut service = Service::baking(BakePlan {
            signals: Some(SignalPlan::default()),
            ..bake()
        });
        service.machine.release.as_mut().unwrap().watched = false;
        service.after(100, Health::Well);
        assert_eq!(service.after(10, Health::Well).0, State::Standby);
        service.seconds += 24 * 3600;
        let word = Some(service.word);
        service.machine.release.as_mut().unwrap().health = Health::Unknown;
        service.handle(Event::Restarted {
            word,
            same_boot: true,
        });
        assert_eq!(service.machine.state(), State::Standby);
        service.after(60, health).0
    };
    assert_eq!(over(ill()), State::Standby);
    assert_eq!(over(Health::Well), State::Steady);
    // A quiet night ends, too.
    assert_eq!(over(Health::Unknown), State::Steady);
}

#[test]
fn it_does_not_go_back_to_a_colour_that_is_ill_too() {
    let mut service = Service::baking(bake());
    service.handle(Event::OldHealth(ill()));
    assert_eq!(service.after(20, ill()), (State::Paused, vec![]));
    assert_eq!(
        service.why(),
        "green is ill: it is wedged; blue is ill, too: it is wedged, so a human decides"
    );
    // Nor when nobody decides; but when blue is well again, it does.
    service.seconds += 4 * 3600;
    assert_eq!(service.handle(Event::Tick), []);
    assert_eq!(service.machine.state(), State::Paused);
    service.handle(Event::OldHealth(Health::Well));
    service.seconds += 4 * 3600;
    let todo = service.handle(Event::Tick);
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
}

#[test]
fn a_colour_that_is_well_when_nobody_decides_stays() {
    let mut service = Service::baking(bake());
    assert_eq!(service.after(111, Health::Unknown).0, State::Paused);
    assert_eq!(service.after(60, Health::Well).0, State::Paused);
    assert_eq!(
        service.after(4 * 3600, Health::Well),
        (State::Standby, vec![])
    );
}

#[test]
fn the_old_colour_stays_up_while_a_canary_goes_there() {
    let mut service = Service::baking(bake());
    service.after(100, Health::Well);
    assert_eq!(service.after(10, Health::Well).0, State::Standby);
    service.word.canary = 655;
    let word = Some(service.word);
    assert_eq!(service.handle(Event::Word { word, by: None }), []);
    let refused = service.retires(false);
    assert!(matches!(refused[..], [Command::Refuse(_)]), "{refused:?}");
    assert_eq!(service.after(3600, Health::Well).0, State::Standby);
    assert_eq!(
        service.why(),
        "a share of new flows goes to blue; blue must stay up"
    );
    service.word.canary = 0;
    let word = Some(service.word);
    service.handle(Event::Word { word, by: None });
    assert_eq!(service.after(60, Health::Well).0, State::Steady);
}

#[test]
fn without_a_bake_the_hold_begins_at_once() {
    let mut service = Service::baking(bake());
    service.after(20, ill());
    service.flipped();
    let none = BakePlan {
        duration: Duration::ZERO,
        settle: Duration::ZERO,
        ..bake()
    };
    service.release_to(none, State::Standby);
    assert_eq!(service.code(), 0);
}

#[test]
fn a_reboot_does_not_keep_it_from_rolling_back_for_ever() {
    let mut service = Service::baking(bake());
    service.seconds += 1_000_000;
    service.release_after_a_rollback();
    // Another boot counts from 0 again.
    service.seconds = 60;
    let word = Some(service.word);
    service.handle(Event::Restarted {
        word,
        same_boot: false,
    });
    service.seconds += 11 * 60;
    service.release_with(bake());
    let (_, todo) = service.after(20, ill());
    assert!(matches!(todo[..], [Command::RollBack { .. }]), "{todo:?}");
}
