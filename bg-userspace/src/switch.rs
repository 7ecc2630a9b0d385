//! What a flip or a rollback makes of a word. No clock, no socket, no kernel:
//! facts come in, a word or a refusal goes out.

use std::time::Duration;

use bg_common::service::{Colour, CutoverWord};

use crate::{
    api::{FlipRequest, Flipped, Kind, Refusal, RollbackRequest, SCHEMA},
    config::{FlipMode, MAX_DURATION},
};

/// A flip that may be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Switch {
    /// The word that must still be there.
    pub from: CutoverWord,
    /// The word to store.
    pub to: CutoverWord,
    /// What happens to old flows.
    pub mode: FlipMode,
    /// How long they live on; `None` when they are cut.
    pub drain: Option<Duration>,
}

impl Switch {
    fn new(from: CutoverWord, to: Colour, mode: FlipMode, drain: Duration) -> Self {
        Self {
            from,
            to: from.flipped(to, mode == FlipMode::Cut),
            mode,
            drain: (mode == FlipMode::Drain).then_some(drain),
        }
    }
}

/// Parses a colour's name.
pub fn colour(text: &str) -> Result<Colour, Refusal> {
    Colour::ALL
        .into_iter()
        .find(|colour| colour.as_str() == text)
        .ok_or_else(|| Refusal::new(Kind::Usage, format!("`{text}` is no colour: blue or green")))
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
pub fn flip(
    service: &str,
    word: CutoverWord,
    request: &FlipRequest,
    default: (FlipMode, Duration),
    unreachable: impl FnOnce(Colour) -> Vec<String>,
) -> Result<Switch, Refusal> {
    at_generation(service, word, request.if_generation)?;
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
            "{service} was not flipped: no next hop is known for {} of {} (no route through a gateway \
             interface, or the neighbour does not answer). `bgswitch flip --force` flips all the same",
            silent.join(", "),
            to.as_str()
        );
        return Err(Refusal::new(Kind::Unhealthy, message));
    }
    Ok(Switch::new(word, to, mode, drain.unwrap_or(default.1)))
}

/// A rollback: to the other colour, never refused.
pub fn rollback(word: CutoverWord, request: &RollbackRequest, drain: Duration) -> Switch {
    let mode = request.mode.unwrap_or(FlipMode::Cut);
    Switch::new(word, word.active().other(), mode, drain)
}

/// The answer, as far as it is known before the store.
pub fn describe(service: &str, switch: &Switch) -> Flipped {
    Flipped {
        schema: SCHEMA,
        service: service.to_owned(),
        from: switch.from.active().as_str().to_owned(),
        to: switch.to.active().as_str().to_owned(),
        generation_before: switch.from.generation(),
        generation: switch.to.generation(),
        mode: switch.mode.as_str().to_owned(),
        drain_s: switch.drain.map(|drain| drain.as_secs()),
        at_ns: None,
        store_ns: None,
        first_new_flow_us: None,
        old_flows: None,
        draining_until: None,
        dry_run: false,
        warnings: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORD: CutoverWord = CutoverWord::new(Colour::Blue);

    const DRAIN: Duration = Duration::from_mins(20);

    fn decide(request: &FlipRequest, unreachable: &[&str]) -> Result<Switch, Kind> {
        let list = unreachable.iter().map(|s| (*s).to_owned()).collect();
        let default = (FlipMode::Drain, DRAIN);
        flip("llm", WORD, request, default, |_| list).map_err(|refusal| refusal.kind)
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
    fn a_rollback_cuts_only_the_bad_colour() {
        let bad = WORD.flipped(Colour::Green, false);
        let switch = rollback(bad, &RollbackRequest::default(), DRAIN);
        assert_eq!(switch.to.active(), Colour::Blue);
        assert!(switch.to.resets(Colour::Green, bad.generation()));
        assert!(!switch.to.resets(Colour::Blue, 0));
    }
}
