//! What becomes of a canary, by the health of the new colour, and by what humans store.

use std::time::Duration;

use bg_common::service::Colour;

use super::{
    service::{Service, ill},
    *,
};
use crate::{
    config::{BakePlan, CanaryStep, ReleasePlan, Share, SignalPlan},
    switch::nearest_share,
};

impl Service {
    /// A release that goes by 5 % for 60 s, then 50 % for 120 s, and has its first share.
    fn with(bake: BakePlan) -> Self {
        let step = |percent: u32, seconds| CanaryStep {
            percent: Share(percent * 10_000),
            time: Duration::from_secs(seconds),
        };
        let mut service = Self::idle();
        let todo = service.starts(ReleasePlan {
            canary: vec![step(5, 60), step(50, 120)],
            bake,
            ..ReleasePlan::default()
        });
        service.stores(5, &todo);
        service
    }

    /// The same; it settles for 10 s.
    fn new() -> Self {
        Self::with(bake())
    }

    /// The share is asked for, and stored.
    fn stores(&mut self, percent: u32, todo: &[Command]) {
        let command = Command::Canary {
            to: Colour::Green,
            percent: Share(percent * 10_000),
            from_generation: 7,
            force: false,
        };
        assert_eq!(todo, [command]);
        assert_eq!(self.machine.state(), State::Canary);
        self.word.canary = nearest_share(f64::from(percent));
        assert_eq!(self.look(), []);
        assert_eq!(self.machine.state(), State::Canary);
    }

    /// The canary is asked back, and goes.
    fn goes_back(&mut self, drains: bool, todo: &[Command]) {
        let [
            Command::RollBack {
                leave,
                from_generation,
                drains: asked,
                ..
            },
        ] = todo
        else {
            panic!("it stays: {todo:?}");
        };
        let is = (*leave, *from_generation, *asked);
        assert_eq!(is, (Colour::Green, 7, drains));
        assert_eq!(self.machine.state(), State::Switching);
        self.word.generation += 1;
        self.word.canary = 0;
        assert_eq!(self.look(), []);
    }

    fn ended(&self) -> (State, u8, &str) {
        (self.machine.state(), self.code(), self.why())
    }
}

fn bake() -> BakePlan {
    BakePlan {
        settle: Duration::from_secs(10),
        ..BakePlan::default()
    }
}

#[test]
fn shares_rise_step_by_step_and_then_all_of_it_flips() {
    let mut service = Service::new();
    let (_, _, why) = service.ended();
    assert_eq!(why, "5 % of new flows go to green, step 1 of 2");
    assert_eq!(service.after(59, Health::Well), (State::Canary, vec![]));
    let (_, todo) = service.after(1, Health::Well);
    service.stores(50, &todo);
    assert_eq!(service.after(119, Health::Well), (State::Canary, vec![]));
    let (state, todo) = service.after(1, Health::Well);
    assert_eq!(state, State::Switching);
    assert!(
        matches!(
            todo[..],
            [Command::Flip {
                from_generation: 7,
                ..
            }]
        ),
        "{todo:?}"
    );
    service.word = Word {
        active: Colour::Green,
        generation: 8,
        canary: 0,
    };
    assert_eq!(service.look(), []);
    assert_eq!(service.machine.state(), State::Baking);
}

#[test]
fn an_ill_colour_loses_its_share_by_itself_and_it_is_said_why() {
    let mut service = Service::new();
    // Caches are cold.
    assert_eq!(service.after(9, ill()), (State::Canary, vec![]));
    let (_, todo) = service.after(1, ill());
    service.goes_back(false, &todo);
    let why = "green is ill: it is wedged; new flows go to blue";
    assert_eq!(service.ended(), (State::RolledBack, exit::ROLLED_BACK, why));
}

#[test]
fn requests_that_fail_count_at_once_in_every_step() {
    let mut service = Service::new();
    let (_, todo) = service.after(60, Health::Well);
    service.stores(50, &todo);
    let todo = service.handle(Event::Failing("50 of 500 answers".to_owned()));
    service.goes_back(false, &todo);
    assert_eq!(service.machine.state(), State::RolledBack);
}

#[test]
fn not_to_know_is_no_reason_for_a_larger_share() {
    let mut service = Service::new();
    assert_eq!(service.after(60, Health::Unknown), (State::Paused, vec![]));
    let release = service.machine.release.as_ref().unwrap();
    assert_eq!(
        (release.code(), release.share()),
        (exit::INCONCLUSIVE, Some(0))
    );
    // The share stays; a human lets it grow, and it is written down.
    let todo = service.handle(Event::Resume {
        by: By::default(),
        force: true,
    });
    service.stores(50, &todo);
    // Or waits for too long.
    assert_eq!(service.after(120, Health::Unknown).0, State::Paused);
    service.seconds += 4 * 3600;
    let todo = service.handle(Event::Tick);
    service.goes_back(true, &todo);
    let (state, code, _) = service.ended();
    assert_eq!((state, code), (State::Aborted, exit::TIMED_OUT));
}

#[test]
fn a_pause_keeps_the_share_and_the_step_begins_anew() {
    let mut service = Service::new();
    service.seconds += 50;
    assert_eq!(service.handle(Event::Pause(By::default())), []);
    assert_eq!(service.after(3600, ill()), (State::Paused, vec![]));
    let by = By::default();
    assert_eq!(service.handle(Event::Resume { by, force: false }), []);
    assert_eq!(service.after(59, Health::Well), (State::Canary, vec![]));
    let (_, todo) = service.after(1, Health::Well);
    service.stores(50, &todo);
}

#[test]
fn an_abort_takes_the_share_back_and_lets_its_flows_end() {
    for is_paused in [false, true] {
        let mut service = Service::new();
        if is_paused {
            service.handle(Event::Pause(By::default()));
        }
        let todo = service.handle(Event::Abort(By::default()));
        service.goes_back(true, &todo);
        let (state, code, why) = service.ended();
        assert_eq!((state, code), (State::Aborted, exit::FAILED));
        assert_eq!(why, "it was aborted; new flows go to blue");
    }
}

#[test]
fn it_is_taken_back_until_it_is_back() {
    let mut service = Service::new();
    let todo = service.handle(Event::Abort(By::default()));
    for _ in 0..3 {
        assert_eq!(service.look(), []);
        assert_eq!(service.machine.state(), State::Switching);
        service.seconds += 30;
        assert_eq!(service.handle(Event::Tick), todo);
    }
    service.goes_back(true, &todo);
    assert_eq!(service.machine.state(), State::Aborted);
}

#[test]
fn what_humans_store_meanwhile_ends_it() {
    let ended_by = |word| {
        let mut service = Service::new();
        service.word = word;
        assert_eq!(service.look(), []);
        let (state, code, _) = service.ended();
        (state, code)
    };
    let word = |active, generation, percent| Word {
        active,
        generation,
        canary: nearest_share(percent),
    };
    let rolled_back = (State::RolledBack, exit::FAILED);
    assert_eq!(ended_by(word(Colour::Blue, 8, 0.0)), rolled_back);
    assert_eq!(ended_by(word(Colour::Blue, 7, 0.0)), rolled_back);
    let superseded = (State::Superseded, exit::CONFLICT);
    assert_eq!(ended_by(word(Colour::Blue, 7, 10.0)), superseded);
    assert_eq!(ended_by(word(Colour::Green, 8, 0.0)), superseded);
}

#[test]
fn the_flip_behind_a_canary_takes_it_back_when_it_is_refused() {
    let mut service = Service::new();
    let (_, todo) = service.after(60, Health::Well);
    service.stores(50, &todo);
    let (_, todo) = service.after(120, Health::Well);
    assert!(matches!(todo[..], [Command::Flip { .. }]), "{todo:?}");
    let refusal = Refusal::new(Kind::Unhealthy, "nobody is there");
    let todo = service.handle(Event::NotStored { refusal });
    service.goes_back(true, &todo);
    let (state, code, _) = service.ended();
    assert_eq!((state, code), (State::Aborted, exit::UNHEALTHY));
}

#[test]
fn a_share_that_is_refused_leaves_none_behind() {
    let mut service = Service::new();
    let (_, todo) = service.after(60, Health::Well);
    assert!(matches!(todo[..], [Command::Canary { .. }]), "{todo:?}");
    let refusal = Refusal::new(Kind::Unhealthy, "nobody is there");
    let todo = service.handle(Event::NotStored { refusal });
    service.goes_back(true, &todo);
    assert_eq!(service.machine.state(), State::Aborted);
}

#[test]
fn a_rollback_by_hand_never_goes_to_what_is_tested_or_was_just_left() {
    let mut service = Service::new();
    let unflipped = |service: &Service| service.machine.unflipped(service.word);
    // The share is taken back, as ever.
    assert_eq!(unflipped(&service), None);
    let (_, todo) = service.after(10, ill());
    service.goes_back(false, &todo);
    assert_eq!(unflipped(&service), Some(Unflipped::Over));
    // Somebody has flipped since, and back.
    service.word.generation += 2;
    assert_eq!(unflipped(&service), None);
    // Before it has a share.
    let mut waits = Service::new();
    waits.word.canary = 0;
    assert_eq!(unflipped(&waits), Some(Unflipped::Running));
    waits.word.active = Colour::Green;
    assert_eq!(unflipped(&waits), None);
    // Nor once it is over, by the first of two rollbacks or by itself.
    waits.word.active = Colour::Blue;
    waits.handle(Event::Abort(By::default()));
    assert_eq!(waits.machine.state(), State::Switching);
    waits.word.generation += 1;
    waits.look();
    assert_eq!(waits.machine.state(), State::Aborted);
    assert_eq!(unflipped(&waits), Some(Unflipped::Over));
}

#[test]
fn a_share_that_a_human_set_before_the_second_step_is_not_overwritten() {
    let mut service = Service::new();
    let (_, todo) = service.after(60, Health::Well);
    assert!(matches!(todo[..], [Command::Canary { .. }]), "{todo:?}");
    service.word.canary = 0;
    assert_eq!(service.look(), []);
    assert_eq!(service.machine.state(), State::RolledBack);
}

#[test]
fn what_nobody_looks_at_is_no_canary_to_release_by() {
    let mut service = Service::new();
    service.handle(Event::Abort(By::default()));
    service.word.generation += 1;
    service.word.canary = 0;
    service.look();
    let release = service.machine.release.clone().unwrap();
    let mut start = |signals| {
        let mut plan = release.plan.clone();
        plan.bake.signals = signals;
        service.starts_watched(plan, false)
    };
    let todo = start(None);
    assert!(matches!(todo[..], [Command::Refuse(_)]), "{todo:?}");
    let todo = start(Some(SignalPlan::default()));
    assert!(matches!(todo[..], [Command::Canary { .. }]), "{todo:?}");
}

#[test]
fn both_colours_ill_is_a_humans_business() {
    let mut service = Service::new();
    service.handle(Event::OldHealth(ill()));
    assert_eq!(service.after(20, ill()), (State::Paused, vec![]));
}
