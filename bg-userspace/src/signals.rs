//! What the packet path has heard of a colour, judged: by what was heard of the colour
//! before it. No clock, no kernel: counts come in, a verdict with its figures goes out.

use std::{collections::VecDeque, time::Duration};

use bg_common::signals::{Signals, Times, end_of};
use serde::{Deserialize, Serialize};

use crate::config::SignalPlan;

/// Looks that are looked back on, one a second: the fewest of these in which enough was
/// heard.
const WINDOWS: [usize; 3] = [6, 20, 60];
/// Fewer bad cases than this in a window say nothing.
const FEW_BAD: u64 = 5;
/// Fewer answers, or connections, than this in a window say nothing.
pub const FEW: u64 = 20;
/// Where there is nothing to compare with, and where a client's way may be at fault as
/// well: such a part.
const MOST: f64 = 0.5;
/// A difference in time below this is none, whatever the factor.
const NOTICED: Duration = Duration::from_millis(20);

/// How the colour before was: what the new one is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// Connections that were begun.
    pub connections: u64,
    /// Those that were refused.
    pub refused: u64,
    /// Those that were not answered for a second.
    pub opened_again: u64,
    /// Those that servers reset.
    pub reset: u64,
    /// Requests.
    pub asked: u64,
    /// Answers.
    pub answers: u64,
    /// Those with a status of 5xx.
    pub failed: u64,
    /// 90 % of the answers were not slower, microseconds.
    pub p90_us: Option<u64>,
    /// Handshakes that were timed.
    #[serde(default)]
    pub handshakes: u64,
    /// 90 % of them were not slower, microseconds.
    #[serde(default)]
    pub handshake_p90_us: Option<u64>,
    /// Requests that were sent again.
    #[serde(default)]
    pub asked_again: u64,
}

impl Baseline {
    /// Of what was heard in a time.
    pub fn of(heard: &Signals) -> Self {
        Self {
            connections: heard.opened,
            refused: heard.refused,
            opened_again: heard.opened_again,
            reset: heard.reset,
            asked: heard.asked,
            answers: heard.answers(),
            failed: heard.status[5],
            p90_us: p90_us(&heard.answer),
            handshakes: heard.handshake.iter().sum(),
            handshake_p90_us: p90_us(&heard.handshake),
            asked_again: heard.asked_again,
        }
    }
}

fn p90_us(times: &Times) -> Option<u64> {
    quantile(times, 0.9).map(|p90| p90.as_micros() as u64)
}

fn share(part: u64, all: u64) -> f64 {
    if all == 0 {
        0.0
    } else {
        part as f64 / all as f64
    }
}

/// A time that so great a part of what was timed did not exceed, to a quarter of an octave;
/// `None` if nothing was timed.
pub fn quantile(times: &Times, part: f64) -> Option<Duration> {
    let all: u64 = times.iter().sum();
    let rank = (all as f64 * part).ceil().max(1.0) as u64;
    let mut seen = 0;
    let span = times.iter().position(|count| {
        seen += count;
        seen >= rank
    });
    span.filter(|_| all > 0)
        .map(|span| Duration::from_nanos(end_of(span).saturating_mul(1024)))
}

/// What the signals say of a colour.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Hearing {
    /// Too little was heard.
    Silent,
    /// It answers as the colour before did.
    Well,
    /// It answers more slowly.
    Slow(String),
    /// It fails requests, or connections.
    Failing(String),
}

/// Listens to one colour after a flip to it, a look a second.
#[derive(Debug)]
pub struct Listener {
    plan: SignalPlan,
    baseline: Baseline,
    /// The last looks, oldest first; the first of all when it began.
    looks: VecDeque<Signals>,
    /// What had been heard when it began.
    begin: Signals,
}

/// Something that may go wrong, and how often it did.
struct Rule {
    what: &'static str,
    /// Bad cases, and all of them.
    count: Count,
    usual: (u64, u64),
    /// How much more of it is allowed.
    more: f64,
}

/// Something that takes time.
struct Pace {
    /// What was timed, and what became of it.
    what: [&'static str; 2],
    times: fn(&Signals) -> &Times,
    /// 90 % did not take longer, microseconds.
    usual_us: Option<u64>,
    /// Of so many.
    usual: u64,
}

/// Cases of a kind in what was heard: the bad ones, and all of them.
type Count = fn(&Signals) -> (u64, u64);

impl Listener {
    /// From a flip on, when so much had been heard of the new colour.
    pub fn new(plan: SignalPlan, baseline: Baseline, begin: Signals) -> Self {
        Self {
            plan,
            baseline,
            looks: VecDeque::from([begin]),
            begin,
        }
    }

    /// A look: all that has been heard of the colour so far.
    pub fn look(&mut self, now: &Signals) -> Hearing {
        self.looks.push_back(*now);
        let [.., longest] = WINDOWS;
        while self.looks.len() > longest + 1 {
            self.looks.pop_front();
        }
        let of = &self.baseline;
        let (connections, answers) = (of.connections, of.answers);
        let errors = self.plan.errors();
        let unanswered = |more| Rule {
            what: "connections were not answered for a second",
            count: |heard| (heard.opened_again, heard.opened),
            usual: (of.opened_again, connections),
            more,
        };
        let fails = [
            Rule {
                what: "answers have a status of 5xx",
                count: |heard| (heard.status[5], heard.answers()),
                usual: (of.failed, answers),
                more: errors,
            },
            Rule {
                what: "connections were refused",
                count: |heard| (heard.refused, heard.opened),
                usual: (of.refused, connections),
                more: errors,
            },
            Rule {
                what: "connections or requests ended with a reset by a server",
                count: |heard| (heard.reset, heard.opened.max(heard.asked)),
                usual: (of.reset, connections.max(of.asked)),
                more: errors,
            },
            unanswered(MOST),
        ];
        if let Some(why) = fails.iter().find_map(|rule| self.breaks(rule)) {
            return Hearing::Failing(why);
        }
        // What also a cold start may be like.
        let slow = [
            unanswered(errors),
            Rule {
                what: "requests were not answered",
                count: |heard| (heard.asked.saturating_sub(heard.answers()), heard.asked),
                usual: (of.asked.saturating_sub(answers), of.asked),
                more: MOST,
            },
            Rule {
                what: "requests were sent again",
                count: |heard| (heard.asked_again, heard.asked),
                usual: (of.asked_again, of.asked),
                more: MOST,
            },
        ];
        let paces = [
            Pace {
                what: ["answers", "began"],
                times: |heard| &heard.answer,
                usual_us: of.p90_us,
                usual: answers,
            },
            Pace {
                what: ["connections", "were taken"],
                times: |heard| &heard.handshake,
                usual_us: of.handshake_p90_us,
                usual: of.handshakes,
            },
        ];
        let slow = slow.iter().find_map(|rule| self.breaks(rule));
        let slow = slow.or_else(|| paces.iter().find_map(|pace| self.is_slow(pace)));
        if let Some(why) = slow {
            return Hearing::Slow(why);
        }
        let all = now.since(&self.begin);
        let recent = self.since(WINDOWS[1]);
        let waits = recent.asked >= FEW && recent.answers() * 2 < recent.asked;
        if all.answers() < FEW || waits {
            Hearing::Silent
        } else {
            Hearing::Well
        }
    }

    /// How many looks the shortest window has in which there were enough cases.
    fn window(&self, cases: impl Fn(&Signals) -> u64) -> Option<usize> {
        let enough = |looks: &usize| cases(&self.since(*looks)) >= FEW;
        let looks = WINDOWS.into_iter().find(enough)?;
        Some(looks.min(self.looks.len() - 1))
    }

    /// What was heard in the later half of a window, and in the earlier one.
    fn halves(&self, looks: usize) -> [Signals; 2] {
        let last = self.looks.len() - 1;
        let earlier = self.looks[last - looks / 2].since(&self.looks[last - looks]);
        [self.since(looks / 2), earlier]
    }

    /// What was heard in the last so many looks, or since the begin.
    fn since(&self, looks: usize) -> Signals {
        let last = self.looks.len() - 1;
        self.looks[last].since(&self.looks[last.saturating_sub(looks)])
    }

    /// Why a rule is broken: in the shortest window in which enough was heard, and in both
    /// halves of it, so that one bad moment is none.
    fn breaks(&self, rule: &Rule) -> Option<String> {
        let looks = self.window(|heard| (rule.count)(heard).1)?;
        let (bad, all) = (rule.count)(&self.since(looks));
        let has_baseline = rule.usual.1 >= FEW;
        let usual = share(rule.usual.0, rule.usual.1);
        let allowed = if has_baseline {
            usual + rule.more
        } else {
            MOST.max(rule.more)
        };
        let too_many = |heard: &Signals| {
            let (bad, all) = (rule.count)(heard);
            bad > 0 && share(bad, all) > allowed
        };
        let broken = looks >= 2 && bad >= FEW_BAD && self.halves(looks).iter().all(too_many);
        broken.then(|| {
            let compared = if has_baseline {
                format!(
                    "before it was {}, {} more are allowed",
                    percent(usual),
                    percent(rule.more)
                )
            } else {
                format!("nothing to compare with, {} are allowed", percent(allowed))
            };
            let what = rule.what;
            format!(
                "{bad} of {all} {what} in {looks} s ({}; {compared})",
                percent(share(bad, all))
            )
        })
    }

    /// Why something takes too long: in the shortest window in which enough was timed, and
    /// in both halves of it.
    fn is_slow(&self, pace: &Pace) -> Option<String> {
        let usual = Duration::from_micros(pace.usual_us?);
        if pace.usual < FEW {
            return None;
        }
        let timed = |heard: &Signals| -> u64 { (pace.times)(heard).iter().sum() };
        let looks = self.window(timed)?;
        let heard = self.since(looks);
        let is = quantile((pace.times)(&heard), 0.9)?;
        let limit = usual.mul_f64(self.plan.slower()).max(usual + NOTICED);
        let is_late =
            |heard: &Signals| quantile((pace.times)(heard), 0.9).is_some_and(|p90| p90 > limit);
        let [what, became] = pace.what;
        (is > limit && self.halves(looks).iter().all(is_late)).then(|| {
            format!(
                "9 of 10 {what} {became} within {}, before it was {} ({} {what}; {} times as long is allowed)",
                length(is),
                length(usual),
                timed(&heard),
                self.plan.slower()
            )
        })
    }
}

fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

fn length(time: Duration) -> String {
    if time < Duration::from_millis(10) {
        format!("{:.1} ms", time.as_secs_f64() * 1e3)
    } else {
        format!("{} ms", time.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use bg_common::signals::span;

    use super::*;

    const MS: u32 = 977; // units of 1 024 ns

    /// Answers that took so many milliseconds each, some of them with a status of 500.
    fn answers(count: u64, failed: u64, ms: u32) -> Signals {
        let mut heard = Signals::NONE;
        heard.status[2] = count - failed;
        heard.status[5] = failed;
        heard.answer[span(ms * MS)] = count;
        heard.asked = count;
        heard.opened = count;
        heard.accepted = count;
        heard
    }

    fn after(baseline: &Signals) -> Listener {
        Listener::new(SignalPlan::default(), Baseline::of(baseline), Signals::NONE)
    }

    /// So many looks, with so much more heard before each; what the last one says.
    fn look(listener: &mut Listener, times: usize, each: &Signals) -> Hearing {
        let mut all = *listener.looks.back().unwrap();
        let mut last = Hearing::Silent;
        for _ in 0..times {
            all.add(each);
            last = listener.look(&all);
        }
        last
    }

    fn is_failing(hearing: &Hearing) -> bool {
        matches!(hearing, Hearing::Failing(_))
    }

    #[test]
    fn who_answers_as_before_is_well_and_who_is_not_heard_is_silent() {
        let usual = answers(10_000, 10, 5);
        let heard = |times, each: &Signals| look(&mut after(&usual), times, each);
        assert_eq!(heard(30, &answers(100, 0, 5)), Hearing::Well);
        assert_eq!(heard(30, &Signals::NONE), Hearing::Silent);
        assert_eq!(heard(3, &answers(6, 0, 5)), Hearing::Silent);
    }

    #[test]
    fn who_takes_requests_and_answers_none_is_not_well() {
        let mut listener = after(&answers(10_000, 10, 5));
        assert_eq!(look(&mut listener, 5, &answers(100, 0, 5)), Hearing::Well);
        let mut wedged = Signals::NONE;
        (wedged.opened, wedged.accepted, wedged.asked) = (100, 100, 100);
        assert!(matches!(look(&mut listener, 10, &wedged), Hearing::Slow(_)));
        // Nor is one of which nothing else was heard, and with nothing to compare with.
        let mut listener = after(&Signals::NONE);
        assert!(matches!(look(&mut listener, 10, &wedged), Hearing::Slow(_)));
    }

    #[test]
    fn a_tenth_of_the_answers_is_failing_with_the_second_look() {
        let mut listener = after(&answers(10_000, 10, 5));
        let bad = answers(500, 50, 5);
        assert_eq!(look(&mut listener, 1, &bad), Hearing::Well);
        let Hearing::Failing(why) = look(&mut listener, 1, &bad) else {
            panic!("it is not failing");
        };
        let begin = "100 of 1000 answers have a status of 5xx in 2 s (10.0 %; before it was 0.1 %";
        assert!(why.starts_with(begin), "{why}");
    }

    #[test]
    fn what_begins_later_is_failing_within_five_looks() {
        let mut listener = after(&answers(10_000, 10, 5));
        assert_eq!(look(&mut listener, 100, &answers(500, 0, 5)), Hearing::Well);
        assert!(is_failing(&look(&mut listener, 4, &answers(500, 50, 5))));
    }

    #[test]
    fn one_bad_moment_is_none() {
        let mut listener = after(&answers(10_000, 10, 5));
        look(&mut listener, 100, &answers(500, 0, 5));
        look(&mut listener, 1, &answers(500, 400, 5));
        for _ in 0..100 {
            assert_eq!(look(&mut listener, 1, &answers(500, 0, 5)), Hearing::Well);
        }
    }

    #[test]
    fn what_failed_before_as_often_is_no_news() {
        let usual = answers(10_000, 1000, 5);
        let heard = look(&mut after(&usual), 10, &answers(500, 50, 5));
        assert_eq!(heard, Hearing::Well);
    }

    #[test]
    fn without_anything_to_compare_with_it_takes_more_than_half() {
        let heard = look(&mut after(&Signals::NONE), 10, &answers(500, 200, 5));
        assert_eq!(heard, Hearing::Well);
        let heard = look(&mut after(&Signals::NONE), 10, &answers(500, 300, 5));
        assert!(is_failing(&heard));
    }

    #[test]
    fn few_cases_say_nothing_and_a_slow_trickle_says_it_later() {
        let usual = answers(10_000, 0, 5);
        let mut listener = after(&usual);
        assert_eq!(look(&mut listener, 4, &answers(2, 2, 5)), Hearing::Silent);
        assert!(is_failing(&look(&mut listener, 20, &answers(2, 2, 5))));
    }

    #[test]
    fn connections_that_nobody_takes_fail_it() {
        let usual = answers(10_000, 0, 5);
        let heard = |opened, refused, again, reset| {
            let mut dead = Signals::NONE;
            (dead.opened, dead.refused) = (opened, refused);
            (dead.opened_again, dead.reset) = (again, reset);
            look(&mut after(&usual), 3, &dead)
        };
        assert!(is_failing(&heard(100, 100, 0, 0)));
        assert!(is_failing(&heard(100, 0, 100, 0)));
        assert!(is_failing(&heard(100, 0, 0, 50)));
        // Some clients' way is bad, or a herd comes back: no failure, but to be watched.
        assert!(matches!(heard(100, 0, 10, 0), Hearing::Slow(_)));
    }

    #[test]
    fn twice_as_slow_is_slow_unless_nobody_notices() {
        let slow = |usual, is| {
            let usual = answers(10_000, 0, usual);
            let heard = look(&mut after(&usual), 2, &answers(100, 0, is));
            matches!(heard, Hearing::Slow(_))
        };
        assert!(slow(100, 300));
        assert!(!slow(100, 150));
        assert!(!slow(1, 10));
        assert!(slow(1, 50));
        // Nothing to compare with.
        let heard = look(&mut after(&Signals::NONE), 2, &answers(100, 0, 900));
        assert_eq!(heard, Hearing::Well);
    }

    #[test]
    fn slow_handshakes_and_requests_that_are_sent_again_are_slow() {
        let one = |handshake_ms: u32, again| {
            let mut one = answers(100, 0, 5);
            one.handshake[span(handshake_ms * MS)] = 100;
            one.asked_again = again;
            one
        };
        let usual = || one(1, 1);
        let heard = |before: &Signals, handshake_ms: u32, again| {
            look(&mut after(before), 4, &one(handshake_ms, again))
        };
        let is_slow = |heard: &Hearing, what: &str| match heard {
            Hearing::Slow(why) => why.contains(what),
            _ => false,
        };
        assert_eq!(heard(&usual(), 1, 1), Hearing::Well);
        assert_eq!(heard(&usual(), 15, 1), Hearing::Well, "nobody notices");
        let late = heard(&usual(), 40, 1);
        assert!(is_slow(&late, "connections were taken within"), "{late:?}");
        let again = heard(&usual(), 1, 60);
        assert!(is_slow(&again, "requests were sent again"), "{again:?}");
        // Nothing to compare with.
        assert_eq!(heard(&Signals::NONE, 900, 1), Hearing::Well);
        // A bad moment is none.
        let mut listener = after(&usual());
        assert_eq!(look(&mut listener, 10, &usual()), Hearing::Well);
        assert_eq!(look(&mut listener, 1, &one(900, 1)), Hearing::Well);
        assert_eq!(look(&mut listener, 1, &usual()), Hearing::Well);
    }

    #[test]
    fn quantiles_are_where_the_counts_are() {
        let heard = answers(100, 0, 10);
        let p90 = quantile(&heard.answer, 0.9).unwrap().as_micros();
        assert!((10_000..=12_500).contains(&p90), "{p90}");
        assert_eq!(quantile(&Signals::NONE.answer, 0.9), None);
    }
}
