//! What a flip or a rollback makes of a word. No clock, no socket, no kernel:
//! facts come in, a word or a refusal goes out.

use bg_common::service::{Colour, CutoverWord};

use crate::{
    api::{FlipRequest, Flipped, Refusal, RollbackRequest, SCHEMA, exit},
    config::FlipMode,
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
}

/// Parses a colour's name.
pub fn colour(text: &str) -> Result<Colour, Refusal> {
    Colour::ALL
        .into_iter()
        .find(|colour| colour.as_str() == text)
        .ok_or_else(|| Refusal::new(exit::USAGE, format!("`{text}` is no colour: blue or green")))
}

/// Decides a flip. `unreachable` lists the target's backends without a next hop.
pub fn flip(
    service: &str,
    word: CutoverWord,
    request: &FlipRequest,
    default_mode: FlipMode,
    unreachable: impl FnOnce(Colour) -> Vec<String>,
) -> Result<Switch, Refusal> {
    still_at(service, word, request.if_generation)?;
    let to = match &request.to {
        Some(text) => colour(text)?,
        None => word.active().other(),
    };
    if to == word.active() {
        let message = format!("{service} is {} already: nothing was changed", to.as_str());
        return Err(Refusal::new(exit::CONFLICT, message));
    }
    let silent = unreachable(to);
    if !silent.is_empty() && !request.force {
        let message = format!(
            "{service} was not flipped: no next hop is known for {} of {} (no route through a gateway \
             interface, or the neighbour does not answer). `bgswitch flip --force` flips all the same",
            silent.join(", "),
            to.as_str()
        );
        return Err(Refusal::new(exit::UNHEALTHY, message));
    }
    let mode = request.mode.unwrap_or(default_mode);
    Ok(Switch {
        from: word,
        to: word.flipped(to, mode == FlipMode::Cut),
        mode,
    })
}

/// A rollback: to the other colour, refused only when it was asked of another
/// word than this one.
pub fn rollback(
    service: &str,
    word: CutoverWord,
    request: &RollbackRequest,
) -> Result<Switch, Refusal> {
    still_at(service, word, request.if_generation)?;
    let mode = request.mode.unwrap_or(FlipMode::Cut);
    Ok(Switch {
        from: word,
        to: word.flipped(word.active().other(), mode == FlipMode::Cut),
        mode,
    })
}

fn still_at(service: &str, word: CutoverWord, generation: Option<u16>) -> Result<(), Refusal> {
    let Some(expected) = generation.filter(|expected| *expected != word.generation()) else {
        return Ok(());
    };
    let message = format!(
        "{service} is {} at generation {}, not at {expected}: somebody flipped it meanwhile. Look at \
         `bgswitch status {service}` and decide again",
        word.active().as_str(),
        word.generation()
    );
    Err(Refusal::new(exit::CONFLICT, message))
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
        at_ns: None,
        store_ns: None,
        first_new_flow_us: None,
        old_flows: None,
        draining_until: None,
        dry_run: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WORD: CutoverWord = CutoverWord::new(Colour::Blue);

    fn decide(request: &FlipRequest, unreachable: &[&str]) -> Result<Switch, u8> {
        let list = unreachable.iter().map(|s| (*s).to_owned()).collect();
        flip("llm", WORD, request, FlipMode::Drain, |_| list).map_err(|refusal| refusal.code)
    }

    #[test]
    fn without_a_colour_it_goes_to_the_standby() {
        assert_eq!(
            decide(&FlipRequest::default(), &[]).unwrap().to.active(),
            Colour::Green
        );
    }

    #[test]
    fn refusals_have_their_codes() {
        let to = |to: &str| FlipRequest {
            to: Some(to.into()),
            ..FlipRequest::default()
        };
        assert_eq!(decide(&to("blue"), &[]), Err(exit::CONFLICT));
        assert_eq!(decide(&to("red"), &[]), Err(exit::USAGE));
        let stale = FlipRequest {
            if_generation: Some(4),
            ..FlipRequest::default()
        };
        assert_eq!(decide(&stale, &[]), Err(exit::CONFLICT));
        assert_eq!(decide(&to("green"), &["10.0.2.10"]), Err(exit::UNHEALTHY));
        let forced = FlipRequest {
            force: true,
            ..to("green")
        };
        assert!(decide(&forced, &["10.0.2.10"]).is_ok());
    }

    #[test]
    fn a_rollback_cuts_only_the_bad_colour() {
        let bad = WORD.flipped(Colour::Green, false);
        let switch = rollback("llm", bad, &RollbackRequest::default()).unwrap();
        assert_eq!(switch.to.active(), Colour::Blue);
        assert!(switch.to.resets(Colour::Green, bad.generation()));
        assert!(!switch.to.resets(Colour::Blue, 0));
    }

    #[test]
    fn a_rollback_is_not_done_twice() {
        let request = RollbackRequest {
            if_generation: Some(1),
            ..RollbackRequest::default()
        };
        let once = rollback("llm", WORD.flipped(Colour::Green, false), &request).unwrap();
        let twice = rollback("llm", once.to, &request);
        assert_eq!(twice.unwrap_err().code, exit::CONFLICT);
    }
}
