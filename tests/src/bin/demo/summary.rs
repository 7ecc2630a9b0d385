//! What the clients saw, in numbers.

use std::{fmt, path::Path, time::Duration};

use anyhow::Result;
use bg_tests::load::Answer;
use bg_userspace::api::Flipped;
use hdrhistogram::Histogram;
use serde::Serialize;

/// The demo's answer.
#[derive(Debug, Serialize)]
pub struct Summary {
    schema: u32,
    pub requests: usize,
    pub failed: usize,
    pub flips: Vec<Flip>,
    pub latency_us: Latency,
    pub streams: Streams,
    picture: String,
    #[serde(skip)]
    failures: Vec<String>,
}

/// One flip, and what came of it.
#[derive(Debug, Serialize)]
pub struct Flip {
    pub from: String,
    pub to: String,
    pub store_ns: Option<u64>,
    pub first_new_flow_us: Option<f64>,
    /// Connections begun after the store that reached the colour that was left.
    pub stale_new_flows: usize,
    #[serde(skip)]
    old_flows: Option<u64>,
}

/// Of requests, in microseconds; of the first one on a connection, its set-up included.
#[derive(Debug, Serialize)]
pub struct Latency {
    pub p50: u64,
    pub p99: u64,
    pub p999: u64,
}

/// Streaming responses, each of which was under way during a flip.
#[derive(Debug, Serialize)]
pub struct Streams {
    pub opened: usize,
    pub broken: usize,
    #[serde(skip)]
    failures: Vec<String>,
}

impl Streams {
    /// The sums over their ends.
    pub fn of(ends: impl Iterator<Item = Result<()>>) -> Self {
        let mut streams = Self {
            opened: 0,
            broken: 0,
            failures: Vec::new(),
        };
        for end in ends {
            streams.opened += 1;
            if let Err(error) = end {
                streams.broken += 1;
                streams.failures.push(format!("a stream broke: {error:#}"));
            }
        }
        streams
    }
}

/// Failures that are told one by one.
const TOLD: usize = 5;

impl Summary {
    /// Sums up; `picture` without its ending.
    pub fn new(answers: &[Answer], flips: &[Flipped], streams: Streams, picture: &Path) -> Self {
        let mut histogram =
            Histogram::<u64>::new_with_bounds(1, 60_000_000, 3).expect("the bounds are in order");
        for answer in answers {
            histogram.saturating_record(answer.latency.as_micros() as u64);
        }
        let failures: Vec<String> = answers
            .iter()
            .filter_map(|answer| answer.result.as_ref().err())
            .map(|error| format!("a request failed: {error}"))
            .collect();
        let next_ns = |number: usize| {
            flips
                .get(number + 1)
                .and_then(|next| next.at_ns)
                .unwrap_or(u64::MAX)
        };
        Self {
            schema: 1,
            requests: answers.len(),
            failed: failures.len(),
            flips: flips
                .iter()
                .enumerate()
                .map(|(number, flip)| Flip {
                    from: flip.from.clone(),
                    to: flip.to.clone(),
                    store_ns: flip.store_ns,
                    first_new_flow_us: flip.first_new_flow_us,
                    stale_new_flows: stale(answers, flip, next_ns(number)),
                    old_flows: flip.old_flows,
                })
                .collect(),
            latency_us: Latency {
                p50: histogram.value_at_quantile(0.5),
                p99: histogram.value_at_quantile(0.99),
                p999: histogram.value_at_quantile(0.999),
            },
            streams,
            picture: picture.with_extension("svg").display().to_string(),
            failures,
        }
    }

    /// True when nothing failed, broke, or went to the wrong colour.
    pub fn is_clean(&self) -> bool {
        self.failed == 0
            && self.streams.broken == 0
            && self.requests > 0
            && self.flips.iter().all(|flip| flip.stale_new_flows == 0)
    }
}

/// New connections that were begun after the store of a flip, and all the same
/// reached the colour that was left. One that was still under way at the next
/// flip may rightly have gone back to it.
fn stale(answers: &[Answer], flip: &Flipped, next_ns: u64) -> usize {
    let (Some(at), Some(took)) = (flip.at_ns, flip.store_ns) else {
        return 0;
    };
    answers
        .iter()
        .filter(|answer| {
            answer.first && answer.connected_ns > at + took && answer.done_ns < next_ns
        })
        .filter(|answer| {
            answer
                .result
                .as_ref()
                .is_ok_and(|colour| *colour == flip.from)
        })
        .count()
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "\nflip               store   first new flow   old flows then   stale new flows"
        )?;
        for flip in &self.flips {
            let old = flip
                .old_flows
                .map_or_else(|| "?".to_owned(), |flows| flows.to_string());
            writeln!(
                f,
                "{:<15} {:>8} {:>16} {old:>16} {:>17}",
                format!("{} -> {}", flip.from, flip.to),
                ns(flip.store_ns),
                us(flip.first_new_flow_us),
                flip.stale_new_flows
            )?;
        }
        let Latency { p50, p99, p999 } = self.latency_us;
        writeln!(f, "\nrequests   {}, {} failed", self.requests, self.failed)?;
        writeln!(
            f,
            "latency    p50 {}   p99 {}   p99.9 {}",
            us(Some(p50 as f64)),
            us(Some(p99 as f64)),
            us(Some(p999 as f64))
        )?;
        writeln!(
            f,
            "streams    {} opened, {} broken",
            self.streams.opened, self.streams.broken
        )?;
        writeln!(f, "picture    {}, .png", self.picture)?;
        for failure in self
            .failures
            .iter()
            .chain(&self.streams.failures)
            .take(TOLD)
        {
            writeln!(f, "{failure}")?;
        }
        Ok(())
    }
}

/// Nanoseconds, for people.
pub fn ns(ns: Option<u64>) -> String {
    us(ns.map(|ns| Duration::from_nanos(ns).as_secs_f64() * 1e6))
}

/// Microseconds, for people.
pub fn us(us: Option<f64>) -> String {
    match us {
        None => "-".to_owned(),
        Some(us) if us < 1.0 => format!("{:.0} ns", us * 1e3),
        Some(us) if us < 1e3 => format!("{us:.0} \u{b5}s"),
        Some(us) => format!("{:.1} ms", us / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flip(at_ns: u64) -> Flipped {
        serde_json::from_value(serde_json::json!({
            "schema": 1, "service": "llm", "from": "blue", "to": "green", "generation_before": 0,
            "generation": 1, "mode": "drain", "at_ns": at_ns, "store_ns": 10, "first_new_flow_us": 1.0,
            "old_flows": 0, "draining_until": null, "drain_s": null, "dry_run": false, "warnings": []
        }))
        .unwrap()
    }

    fn answer(connected_ns: u64, done_ns: u64, first: bool, colour: &str) -> Answer {
        Answer {
            connected_ns,
            first,
            done_ns,
            latency: Duration::from_micros(3),
            result: Ok(colour.to_owned()),
        }
    }

    #[test]
    fn only_new_connections_after_the_store_are_stale() {
        let answers = [
            answer(900, 1200, true, "blue"),
            answer(1011, 1200, false, "blue"),
            answer(1011, 1200, true, "green"),
            answer(1990, 2100, true, "blue"),
        ];
        assert_eq!(stale(&answers, &flip(1000), 2000), 0);
        assert_eq!(
            stale(&[answer(1011, 1200, true, "blue")], &flip(1000), 2000),
            1
        );
    }

    #[test]
    fn a_slow_request_is_not_cut_short() {
        let slow = Answer {
            latency: Duration::from_secs(9),
            ..answer(0, 1, true, "blue")
        };
        let summary = Summary::new(
            &[slow],
            &[],
            Streams::of(std::iter::empty()),
            Path::new("x"),
        );
        assert!(summary.latency_us.p999.abs_diff(9_000_000) < 9_000);
    }

    #[test]
    fn a_failed_request_is_not_clean() {
        let streams = || Streams::of(std::iter::empty());
        let mut answers = vec![answer(0, 1, true, "blue")];
        assert!(Summary::new(&answers, &[], streams(), Path::new("x")).is_clean());
        answers.push(Answer {
            result: Err("reset".to_owned()),
            ..answer(0, 1, true, "")
        });
        assert!(!Summary::new(&answers, &[], streams(), Path::new("x")).is_clean());
    }
}
