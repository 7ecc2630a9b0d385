//! What a flip, a rollback or a canary makes of a word. No clock, no socket, no kernel:
//! facts come in, a word or a refusal goes out.

use std::time::Duration;

use bg_common::service::{Colour, CutoverWord};

use crate::{
    api::{CanaryRequest, FlipRequest, Flipped, Kind, Refusal, SCHEMA},
    config::{DrainEnd, DrainPlan, FlipMode, MAX_DURATION},
};

/// A flip, or the end of a canary, that may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    /// The word that must still be there.
    pub from: CutoverWord,
    /// The word to store.
    pub to: CutoverWord,
    /// What happens to old flows.
    pub mode: FlipMode,
    /// How they drain; `None` when they are cut.
    pub drain: Option<DrainPlan>,
}

impl Switch {
    fn new(from: CutoverWord, to: Colour, mode: FlipMode, drain: DrainPlan) -> Self {
        Self {
            from,
            to: from.flipped(to, mode == FlipMode::Cut),
            mode,
            drain: (mode == FlipMode::Drain).then_some(drain),
        }
    }

    /// The colour whose flows are the old ones afterwards.
    pub const fn left(&self) -> Colour {
        self.to.active().other()
    }

    /// True when it is no flip: a canary is taken back.
    pub fn is_canary_rollback(&self) -> bool {
        self.from.active() == self.to.active() && self.from != self.to
    }

    /// How long old flows live on, if there is a deadline.
    pub fn deadline(&self) -> Option<Duration> {
        let drain = self.drain.filter(|drain| drain.end == DrainEnd::Reset);
        drain.map(|drain| drain.deadline)
    }
}

/// Parses a colour's name.
pub fn colour(text: &str) -> Result<Colour, Refusal> {
    Colour::ALL
        .into_iter()
        .find(|colour| colour.as_str() == text)
        .ok_or_else(|| Refusal::new(Kind::Usage, format!("`{text}` is no colour: blue or green")))
}

/// Refuses a service whose canary has not the share that was asked for.
fn at_share(service: &str, word: CutoverWord, expected: Option<u16>) -> Result<(), Refusal> {
    match expected {
        Some(expected) if expected != word.canary() => {
            let message = format!(
                "the canary of {service} has {} of 65536 new flows, not {expected}: somebody changed it \
                 meanwhile. Look at `bgswitch status {service}` and decide again",
                word.canary()
            );
            Err(Refusal::new(Kind::StaleGeneration, message))
        }
        _ => Ok(()),
    }
}

/// Refuses a service that is not at the generation that was asked for.
pub fn at_generation(
    service: &str,
    word: CutoverWord,
    expected: Option<u16>,
) -> Result<(), Refusal> {
    match expected {
        Some(expected) if expected != word.generation() => {
            let message = format!(
                "{service} is at generation {}, not {expected}: somebody flipped it meanwhile. Look at \
                 `bgswitch status {service}` and decide again",
                word.generation()
            );
            Err(Refusal::new(Kind::StaleGeneration, message))
        }
        _ => Ok(()),
    }
}

/// Decides a flip. `unreachable` lists the target's backends without a next hop.
/// A drain that is asked for has a deadline, whatever the service's own has.
pub fn flip(
    service: &str,
    word: CutoverWord,
    request: &FlipRequest,
    default: (FlipMode, DrainPlan),
    unreachable: impl FnOnce(Colour) -> Vec<String>,
) -> Result<Switch, Refusal> {
    at_generation(service, word, request.if_generation)?;
    at_share(service, word, request.if_share)?;
    let to = match &request.to {
        Some(text) => colour(text)?,
        None => word.active().other(),
    };
    if to == word.active() {
        let message = format!("{service} is {} already: nothing was changed", to.as_str());
        return Err(Refusal::new(Kind::Conflict, message));
    }
    let mode = request.mode.unwrap_or(default.0);
    let drain = request.drain_s.map(Duration::from_secs);
    if drain.is_some() && mode == FlipMode::Cut {
        let message =
            "a drain is only of use with mode drain: this flip would cut all old flows at once";
        return Err(Refusal::new(Kind::Usage, message));
    }
    if drain.is_some_and(|drain| drain > MAX_DURATION) {
        return Err(Refusal::new(Kind::Usage, "a drain lasts 30 days at most"));
    }
    let silent = unreachable(to);
    if !silent.is_empty() && !request.force {
        let message = format!(
            "{service} was not flipped: {}. `bgswitch flip --force` flips all the same",
            no_way(&silent, to)
        );
        return Err(Refusal::new(Kind::Unhealthy, message));
    }
    let drain = drain.map_or(default.1, |deadline| DrainPlan {
        deadline,
        end: DrainEnd::Reset,
        ..default.1
    });
    Ok(Switch::new(word, to, mode, drain))
}

fn no_way(silent: &[String], to: Colour) -> String {
    format!(
        "no next hop is known for {} of {} (no route through a gateway interface, or the neighbour does \
         not answer)",
        silent.join(", "),
        to.as_str()
    )
}

/// The colour that a rollback leaves: the standby while it has a canary, otherwise
/// the active one.
pub const fn bad_colour(word: CutoverWord) -> Colour {
    if word.canary() > 0 {
        word.active().other()
    } else {
        word.active()
    }
}

/// A rollback, which leaves a colour: by a flip, or by taking its canary back.
/// Never refused; `None` when new flows do not go there anyway.
pub fn rollback(
    word: CutoverWord,
    leave: Colour,
    mode: Option<FlipMode>,
    drain: DrainPlan,
) -> Option<Switch> {
    let has_left = word.active() != leave && word.canary() == 0;
    let mode = mode.unwrap_or(FlipMode::Cut);
    (!has_left).then(|| Switch::new(word, leave.other(), mode, drain))
}

/// A rollback of what has not flipped yet: new flows stay where they are, under a new
/// generation, so that whoever was about to flip finds another word than he knew.
pub fn stay(word: CutoverWord, mode: Option<FlipMode>, drain: DrainPlan) -> Switch {
    Switch::new(word, word.active(), mode.unwrap_or(FlipMode::Drain), drain)
}

/// Percent of new flows that a canary share of a word stands for.
pub fn percent(share: u16) -> f64 {
    f64::from(share) / 655.36
}

/// The share of a word that is nearest to a percentage from 0 to 100.
pub fn nearest_share(percent: f64) -> u16 {
    (percent * 655.36).round().min(f64::from(u16::MAX)) as u16
}

/// Decides a canary: the word with another share. `unreachable` lists the
/// standby's backends without a next hop; a smaller share never asks for it.
pub fn canary(
    service: &str,
    word: CutoverWord,
    request: &CanaryRequest,
    unreachable: impl FnOnce(Colour) -> Vec<String>,
) -> Result<CutoverWord, Refusal> {
    at_generation(service, word, request.if_generation)?;
    at_share(service, word, request.if_share)?;
    let share = share(request.percent)?;
    if share > word.canary() && !request.force {
        let standby = word.active().other();
        let silent = unreachable(standby);
        if !silent.is_empty() {
            let message = format!(
                "the canary of {service} was not changed: {}. `bgswitch canary --force` does it all the same",
                no_way(&silent, standby)
            );
            return Err(Refusal::new(Kind::Unhealthy, message));
        }
    }
    Ok(word.with_canary(share))
}

/// The share that a request asks for.
fn share(percent: Option<f64>) -> Result<u16, Refusal> {
    let usage = |message: String| Err(Refusal::new(Kind::Usage, message));
    let Some(percent) = percent else {
        return usage("percent is missing: 0 to 100".to_owned());
    };
    if !(0.0..=100.0).contains(&percent) {
        return usage(format!("{percent} is no percentage: 0 to 100"));
    }
    let share = nearest_share(percent);
    if share == 0 && percent > 0.0 {
        return usage(format!(
            "{percent} % is less than the smallest share, 1 of 65536 new flows (0.0016 %)"
        ));
    }
    Ok(share)
}

/// What the journal says of a flip or a rollback.
pub fn detail(switch: &Switch) -> String {
    let (left, to) = (switch.left().as_str(), switch.to.active().as_str());
    let mode = switch.mode.as_str();
    if switch.is_canary_rollback() {
        let percent = percent(switch.from.canary());
        return format!("{left}'s canary of {percent:.4} % is taken back, {mode}");
    }
    format!("{left} -> {to}, {mode}")
}

/// What the journal says of a canary.
pub fn canary_detail(from: CutoverWord, to: CutoverWord) -> String {
    format!(
        "{}'s share of new flows {:.4} % -> {:.4} %",
        from.active().other().as_str(),
        percent(from.canary()),
        percent(to.canary())
    )
}

/// The answer to a rollback that has nothing to do: the word leads where it should.
pub fn has_left(service: &str, word: CutoverWord) -> Flipped {
    let switch = Switch {
        from: word,
        to: word,
        mode: FlipMode::Cut,
        drain: None,
    };
    Flipped {
        already: true,
        ..describe(service, &switch)
    }
}

/// The answer, as far as it is known before the store.
pub fn describe(service: &str, switch: &Switch) -> Flipped {
    Flipped {
        schema: SCHEMA,
        service: service.to_owned(),
        from: switch.left().as_str().to_owned(),
        to: switch.to.active().as_str().to_owned(),
        generation_before: switch.from.generation(),
        generation: switch.to.generation(),
        mode: switch.mode.as_str().to_owned(),
        canary_percent_before: percent(switch.from.canary()),
        canary_rollback: switch.is_canary_rollback(),
        drain_s: switch.deadline().map(|drain| drain.as_secs()),
        drain_end: switch.drain.map(|drain| drain.end.as_str().to_owned()),
        reset_over_s: switch
            .drain
            .filter(|drain| drain.end == DrainEnd::Reset)
            .map(|drain| drain.reset_over.as_secs()),
        at_ns: None,
        store_ns: None,
        first_new_flow_us: None,
        old_flows: None,
        draining_until: None,
        resets_until: None,
        dry_run: false,
        already: false,
        warnings: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORD: CutoverWord = CutoverWord::new(Colour::Blue);

    const KEEP: DrainPlan = DrainPlan {
        deadline: Duration::from_mins(20),
        end: DrainEnd::Keep,
        reset_over: Duration::from_secs(30),
    };

    fn list(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn decide(request: &FlipRequest, unreachable: &[&str]) -> Result<Switch, Kind> {
        let default = (FlipMode::Drain, KEEP);
        flip("llm", WORD, request, default, |_| list(unreachable)).map_err(|refusal| refusal.kind)
    }

    fn decide_canary(word: CutoverWord, percent: f64, unreachable: &[&str]) -> Result<u16, Kind> {
        let request = CanaryRequest {
            percent: Some(percent),
            ..CanaryRequest::default()
        };
        canary("llm", word, &request, |_| list(unreachable))
            .map(CutoverWord::canary)
            .map_err(|refusal| refusal.kind)
    }

    #[test]
    fn without_a_colour_it_goes_to_the_standby() {
        assert_eq!(
            decide(&FlipRequest::default(), &[]).unwrap().to.active(),
            Colour::Green
        );
    }

    #[test]
    fn refusals_have_their_kinds() {
        let to = |to: &str| FlipRequest {
            to: Some(to.into()),
            ..FlipRequest::default()
        };
        assert_eq!(decide(&to("blue"), &[]), Err(Kind::Conflict));
        assert_eq!(decide(&to("red"), &[]), Err(Kind::Usage));
        let stale = FlipRequest {
            if_generation: Some(4),
            ..FlipRequest::default()
        };
        assert_eq!(decide(&stale, &[]), Err(Kind::StaleGeneration));
        let raced = FlipRequest {
            if_share: Some(655),
            ..FlipRequest::default()
        };
        assert_eq!(decide(&raced, &[]), Err(Kind::StaleGeneration));
        assert_eq!(decide(&to("green"), &["10.0.2.10"]), Err(Kind::Unhealthy));
        let contradiction = FlipRequest {
            mode: Some(FlipMode::Cut),
            drain_s: Some(60),
            ..FlipRequest::default()
        };
        assert_eq!(decide(&contradiction, &[]), Err(Kind::Usage));
        let forced = FlipRequest {
            force: true,
            ..to("green")
        };
        assert!(decide(&forced, &["10.0.2.10"]).is_ok());
    }

    #[test]
    fn a_canary_that_somebody_else_changed_is_not_overwritten() {
        let raise = |share: u16| {
            let request = CanaryRequest {
                percent: Some(50.0),
                if_share: Some(655),
                ..CanaryRequest::default()
            };
            canary("llm", WORD.with_canary(share), &request, |_| list(&[]))
                .map(CutoverWord::canary)
                .map_err(|refusal| refusal.kind)
        };
        assert_eq!(raise(655), Ok(32_768));
        assert_eq!(raise(0), Err(Kind::StaleGeneration));
    }

    #[test]
    fn a_rollback_cuts_only_the_bad_colour() {
        let bad = WORD.flipped(Colour::Green, false);
        assert_eq!(bad_colour(bad), Colour::Green);
        let switch = rollback(bad, Colour::Green, None, KEEP).unwrap();
        assert_eq!(switch.to.active(), Colour::Blue);
        assert!(switch.to.resets(Colour::Green as u8, bad.generation()));
        assert!(!switch.to.resets(Colour::Blue as u8, 0));
    }

    #[test]
    fn a_rollback_takes_a_canary_back_and_never_flips_to_it() {
        let canary = WORD.with_canary(655);
        assert_eq!(bad_colour(canary), Colour::Green);
        let switch = rollback(canary, Colour::Green, None, KEEP).unwrap();
        let to = switch.to;
        assert_eq!((to.active(), to.canary()), (Colour::Blue, 0));
        assert_eq!(to.generation(), canary.generation() + 1);
        assert!(to.resets(Colour::Green as u8, canary.generation()));
        assert_eq!(switch.left(), Colour::Green);
        // Asked for again, or after the canary was ended otherwise.
        for word in [to, canary.with_canary(0)] {
            assert_eq!(rollback(word, Colour::Green, None, KEEP), None);
        }
    }

    #[test]
    fn a_drain_that_is_asked_for_has_a_deadline() {
        let usual = decide(&FlipRequest::default(), &[]).unwrap();
        assert_eq!((usual.drain, usual.deadline()), (Some(KEEP), None));
        let asked = FlipRequest {
            drain_s: Some(60),
            ..FlipRequest::default()
        };
        let asked = decide(&asked, &[]).unwrap();
        assert_eq!(asked.deadline(), Some(Duration::from_mins(1)));
    }

    #[test]
    fn a_canary_is_the_nearest_share_and_100_is_one_too() {
        for (percent, share) in [
            (0.0, Ok(0)),
            (0.1, Ok(66)),
            (5.0, Ok(3277)),
            (50.0, Ok(32_768)),
            (100.0, Ok(65_535)),
            (0.0001, Err(Kind::Usage)),
            (-1.0, Err(Kind::Usage)),
            (100.1, Err(Kind::Usage)),
            (f64::NAN, Err(Kind::Usage)),
        ] {
            assert_eq!(decide_canary(WORD, percent, &[]), share, "{percent}");
        }
    }

    #[test]
    fn only_a_larger_canary_asks_for_next_hops() {
        let word = WORD.with_canary(655);
        assert_eq!(
            decide_canary(word, 2.0, &["10.0.2.10"]),
            Err(Kind::Unhealthy)
        );
        assert_eq!(decide_canary(word, 0.5, &["10.0.2.10"]), Ok(328));
        assert_eq!(decide_canary(word, 0.0, &["10.0.2.10"]), Ok(0));
    }
}
