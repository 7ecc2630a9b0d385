//! What the packet path has heard of a colour, judged: by what was heard of the colour
//! before it. No clock, no kernel: counts come in, a verdict with its figures goes out.

use std::{collections::VecDeque, time::Duration};

use bg_common::signals::{Signals, Times, end_of};
use serde::{Deserialize, Serialize};

use crate::config::SignalPlan;

/// So many looks are looked back on, one a second.
const WINDOW: usize = 10;
/// A colour fails, or is slow, when so many looks in a row say so.
const FALL: u32 = 2;
/// Fewer bad cases than this in a window say nothing.
const FEW_BAD: u64 = 5;
/// Fewer answers, or connections, than this in a window say nothing.
const FEW: u64 = 20;
/// A difference in time below this is none, whatever the factor.
const NOTICED: Duration = Duration::from_millis(20);

/// How the colour before was: what the new one is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Baseline {
    /// Connections that were begun.
    pub connections: u64,
    /// Those that nobody took.
    pub untaken: u64,
    /// Resets by servers.
    pub reset: u64,
    /// Answers.
    pub answers: u64,
    /// Those with a status of 5xx.
    pub failed: u64,
    /// 90 % of the answers were not slower, microseconds.
    pub p90_us: Option<u64>,
}

impl Baseline {
    /// Of what was heard in a time.
    pub fn of(heard: &Signals) -> Self {
        Self {
            connections: heard.opened,
            untaken: heard.refused + heard.opened_again,
            reset: heard.reset,
            answers: heard.answers(),
            failed: heard.status[5],
            p90_us: quantile(&heard.answer, 0.9).map(|p90| p90.as_micros() as u64),
        }
    }
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
    /// What had been heard when it began.
    begin: Signals,
    /// The last looks, oldest first.
    looks: VecDeque<Signals>,
    failing: u32,
    slow: u32,
}

impl Listener {
    /// From a flip on, when so much had been heard of the new colour.
    pub fn new(plan: SignalPlan, baseline: Baseline, begin: Signals) -> Self {
        Self {
            plan,
            baseline,
            begin,
            looks: VecDeque::from([begin]),
            failing: 0,
            slow: 0,
        }
    }

    /// A look: all that has been heard of the colour so far.
    pub fn look(&mut self, now: &Signals) -> Hearing {
        let before = *self.looks.front().unwrap_or(&self.begin);
        let heard = now.since(&before);
        self.looks.push_back(*now);
        while self.looks.len() > WINDOW {
            self.looks.pop_front();
        }
        let (failing, slow) = (self.fails(&heard), self.is_slow(&heard));
        let in_a_row = |so_far: u32, is: bool| if is { so_far + 1 } else { 0 };
        self.failing = in_a_row(self.failing, failing.is_some());
        self.slow = in_a_row(self.slow, slow.is_some());
        match (failing, slow) {
            (Some(why), _) if self.failing >= FALL => Hearing::Failing(why),
            (_, Some(why)) if self.slow >= FALL => Hearing::Slow(why),
            _ => {
                let all = now.since(&self.begin);
                if all.answers().max(all.accepted) < FEW {
                    Hearing::Silent
                } else {
                    Hearing::Well
                }
            }
        }
    }

    fn fails(&self, heard: &Signals) -> Option<String> {
        let (opened, answers, of) = (heard.opened, heard.answers(), &self.baseline);
        [
            (
                heard.status[5],
                answers,
                share(of.failed, of.answers),
                "answers have a status of 5xx",
            ),
            (
                heard.refused + heard.opened_again,
                opened,
                share(of.untaken, of.connections),
                "connections were refused, or not answered",
            ),
            (
                heard.reset,
                opened,
                share(of.reset, of.connections),
                "connections were reset by servers",
            ),
        ]
        .into_iter()
        .find_map(|(bad, all, usual, what)| {
            let is = share(bad, all);
            let allowed = usual + self.plan.errors();
            (bad >= FEW_BAD && is > allowed).then(|| {
                format!(
                    "{bad} of {all} {what} ({}; before it was {}, {} more are allowed)",
                    percent(is),
                    percent(usual),
                    percent(self.plan.errors())
                )
            })
        })
    }

    fn is_slow(&self, heard: &Signals) -> Option<String> {
        let usual = Duration::from_micros(self.baseline.p90_us?);
        if self.baseline.answers < FEW || heard.answers() < FEW {
            return None;
        }
        let is = quantile(&heard.answer, 0.9)?;
        let limit = usual.mul_f64(self.plan.slower()).max(usual + NOTICED);
        (is > limit).then(|| {
            format!(
                "9 of 10 answers began within {}, before it was {} ({} answers; {} times as long is allowed)",
                length(is),
                length(usual),
                heard.answers(),
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
        assert_eq!(
            look(&mut after(&usual), 30, &answers(100, 0, 5)),
            Hearing::Well
        );
        assert_eq!(
            look(&mut after(&usual), 30, &Signals::NONE),
            Hearing::Silent
        );
        assert_eq!(
            look(&mut after(&usual), 3, &answers(6, 0, 5)),
            Hearing::Silent
        );
    }

    #[test]
    fn a_tenth_of_the_answers_is_failing_with_the_second_look() {
        let mut listener = after(&answers(10_000, 10, 5));
        let bad = answers(500, 50, 5);
        assert_eq!(look(&mut listener, 1, &bad), Hearing::Well);
        let Hearing::Failing(why) = look(&mut listener, 1, &bad) else {
            panic!("it is not failing");
        };
        assert!(
            why.starts_with("100 of 1000 answers have a status of 5xx (10.0 %"),
            "{why}"
        );
    }

    #[test]
    fn what_failed_before_as_often_is_no_news() {
        let usual = answers(10_000, 1000, 5);
        let heard = look(&mut after(&usual), 10, &answers(500, 50, 5));
        assert_eq!(heard, Hearing::Well);
    }

    #[test]
    fn a_few_failures_say_nothing_and_old_ones_are_forgotten() {
        let usual = answers(10_000, 0, 5);
        assert_eq!(
            look(&mut after(&usual), 2, &answers(20, 1, 5)),
            Hearing::Well
        );
        let mut listener = after(&usual);
        assert!(is_failing(&look(&mut listener, 2, &answers(100, 50, 5))));
        assert_eq!(look(&mut listener, 12, &answers(100, 0, 5)), Hearing::Well);
    }

    #[test]
    fn connections_that_nobody_takes_fail_it() {
        let usual = answers(10_000, 0, 5);
        let mut dead = Signals::NONE;
        (dead.opened, dead.refused) = (100, 100);
        assert!(is_failing(&look(&mut after(&usual), 2, &dead)));
        (dead.refused, dead.opened_again) = (0, 100);
        assert!(is_failing(&look(&mut after(&usual), 2, &dead)));
        (dead.opened_again, dead.accepted, dead.reset) = (0, 100, 50);
        assert!(is_failing(&look(&mut after(&usual), 2, &dead)));
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
    fn quantiles_are_where_the_counts_are() {
        let heard = answers(100, 0, 10);
        let p90 = quantile(&heard.answer, 0.9).unwrap().as_micros();
        assert!((10_000..=12_500).contains(&p90), "{p90}");
        assert_eq!(quantile(&Signals::NONE.answer, 0.9), None);
    }
}
