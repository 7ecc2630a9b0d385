//! What the packet path hears of servers, per colour, where it listens to them.

use std::fmt;

use bg_common::{
    service::Colour,
    signals::{SPANS, Signals, Times, end_of},
};
use prometheus_client::{encoding::NoLabelSet, metrics::MetricType, registry::Unit};

use super::figures::{Figures, Label, Page};

/// A time's unit, seconds: 1 024 ns.
const UNIT: f64 = 1.024e-6;
/// Buckets end at 2 to the power of these, in units: 65 µs, 262 µs, ... 17 s. Spans end
/// there, too, so nothing is guessed.
const ENDS: [u32; 10] = [6, 8, 10, 12, 14, 16, 18, 20, 22, 24];
/// By the first digit of the status.
const CLASSES: [&str; 6] = ["none", "1xx", "2xx", "3xx", "4xx", "5xx"];

type Count = fn(&Signals) -> u64;
type Timed = fn(&Signals) -> &Times;

/// Name, help, and what is counted.
const COUNTS: [(&str, &str, Count); 8] = [
    (
        "bgswitch_connections",
        "TCP connections that clients began",
        |heard| heard.opened,
    ),
    (
        "bgswitch_connections_retried",
        "Of those, the ones whose SYN the client sent again: nobody answered for a second",
        |heard| heard.opened_again,
    ),
    (
        "bgswitch_connections_accepted",
        "TCP connections that servers took",
        |heard| heard.accepted,
    ),
    (
        "bgswitch_connections_refused",
        "TCP connections that servers refused",
        |heard| heard.refused,
    ),
    (
        "bgswitch_connections_reset",
        "TCP connections that servers had taken, and reset",
        |heard| heard.reset,
    ),
    (
        "bgswitch_requests",
        "What clients sent after servers had answered",
        |heard| heard.asked,
    ),
    (
        "bgswitch_requests_retried",
        "Requests that clients began to send again",
        |heard| heard.asked_again,
    ),
    (
        "bgswitch_segments_repeated",
        "Segments with data that servers sent again",
        |heard| heard.repeated,
    ),
];

/// Name, help, and what is timed.
const TIMES: [(&str, &str, Timed); 2] = [
    (
        "bgswitch_handshake",
        "From a client's first SYN to the server's SYN-ACK, as they pass by",
        |heard| &heard.handshake,
    ),
    (
        "bgswitch_answer",
        "From a request's first segment to its answer's, as they pass by",
        |heard| &heard.answer,
    ),
];

impl Figures {
    /// Each colour that is listened to.
    fn heard(&self) -> impl Iterator<Item = ([Label<'_>; 2], &Signals)> {
        self.heard.iter().flat_map(|(service, heard)| {
            Colour::ALL.into_iter().map(move |colour| {
                let labels = [("service", service.as_str()), ("colour", colour.as_str())];
                (labels, &heard[colour as usize])
            })
        })
    }

    pub(super) fn of_servers(&self, page: &mut Page<'_, '_>) -> fmt::Result {
        for (name, help, count) in COUNTS {
            let samples = self.heard().map(|(labels, heard)| (labels, count(heard)));
            page.counters((name, None), help, samples)?;
        }
        let answers = self.heard().flat_map(|([service, colour], heard)| {
            let classes = CLASSES.iter().zip(heard.status);
            classes.map(move |(class, count)| ([service, colour, ("class", *class)], count))
        });
        page.counters(
            ("bgswitch_answers", None),
            "Answers by the class of their HTTP/1 status; none: that was not to be read",
            answers,
        )?;
        for (name, help, times) in TIMES {
            page.times(
                name,
                help,
                self.heard().map(|(labels, heard)| (labels, times(heard))),
            )?;
        }
        Ok(())
    }
}

impl Page<'_, '_> {
    fn times<'l>(
        &mut self,
        name: &str,
        help: &str,
        samples: impl IntoIterator<Item = ([Label<'l>; 2], &'l Times)>,
    ) -> fmt::Result {
        let kind = MetricType::Histogram;
        let unit = Some(&Unit::Seconds);
        let mut family = self.encoder.encode_descriptor(name, help, unit, kind)?;
        for (labels, times) in samples {
            let (sum, count, buckets) = histogram(times);
            family
                .encode_family(&labels)?
                .encode_histogram::<NoLabelSet>(sum, count, &buckets, None)?;
        }
        Ok(())
    }
}

/// The sum, seconds, as if each time lay in the middle of its span; how many; and buckets,
/// each without those before it.
fn histogram(times: &Times) -> (f64, u64, Vec<(f64, u64)>) {
    let mut buckets: Vec<(f64, u64)> = ENDS
        .iter()
        .map(|power| (f64::from(1_u32 << power) * UNIT, 0))
        .chain([(f64::INFINITY, 0)])
        .collect();
    let (mut sum, mut all) = (0.0, 0);
    for (span, count) in (0..SPANS).zip(times).filter(|(_, count)| **count > 0) {
        let begin = span.checked_sub(1).map_or(0, end_of);
        let end = end_of(span);
        all += count;
        sum += (begin + end) as f64 / 2.0 * UNIT * *count as f64;
        let fits = |power: &u32| end <= 1 << power;
        let bucket = ENDS.iter().position(fits).unwrap_or(ENDS.len());
        buckets[bucket].1 += count;
    }
    (sum, all, buckets)
}

#[cfg(test)]
mod tests {
    use bg_common::signals::span;

    use super::*;

    #[test]
    fn times_fall_into_the_bucket_that_ends_behind_them() {
        let mut times = [0; SPANS];
        // 63, 64 and 65 units, 1 ms, 1 s, an hour.
        for units in [63, 64, 65, 976, 976_563, 3_515_625_000] {
            times[span(units)] += 1;
        }
        let (sum, count, buckets) = histogram(&times);
        assert_eq!(count, 6);
        assert!((3000.0..4200.0).contains(&sum), "{sum}");
        let counts: Vec<u64> = buckets.iter().map(|(_, count)| *count).collect();
        // 64 is not less than 2^6: it lies in the span behind it.
        assert_eq!(counts, [1, 2, 1, 0, 0, 0, 0, 1, 0, 0, 1]);
        assert!(buckets.iter().is_sorted_by(|a, b| a.0 < b.0));
        for power in ENDS {
            let ends = (0..SPANS - 1).any(|span| end_of(span) == 1 << power);
            assert!(ends, "a span ends at 2^{power}");
        }
    }
}
