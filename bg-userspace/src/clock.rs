//! Times and durations as people and files read them.

use std::time::Duration;

use jiff::{Timestamp, Unit, Zoned, tz::TimeZone};

/// Now, to the millisecond: what the journal and the state file store.
pub fn now() -> Timestamp {
    let now = Timestamp::now();
    now.round(Unit::Millisecond).unwrap_or(now)
}

/// `from` + `duration`; the end of time if that lies beyond it.
pub fn after(from: Timestamp, duration: Duration) -> Timestamp {
    from.checked_add(duration).unwrap_or(Timestamp::MAX)
}

/// From now until `end`; zero once it has passed.
pub fn remaining(now: Timestamp, end: Timestamp) -> Duration {
    Duration::try_from(end.duration_since(now)).unwrap_or(Duration::ZERO)
}

/// Local time of day, `15:02:10`; with the date when that is another day.
pub fn local(time: Timestamp) -> String {
    local_in(time, now(), TimeZone::system())
}

fn local_in(time: Timestamp, now: Timestamp, zone: TimeZone) -> String {
    let now: Zoned = now.to_zoned(zone.clone());
    let time: Zoned = time.to_zoned(zone);
    let format = if time.date() == now.date() { "%H:%M:%S" } else { "%Y-%m-%d %H:%M:%S" };
    time.strftime(format).to_string()
}

/// A duration as it is written in the configuration: `20m`, `1h 30m`.
pub fn duration(duration: Duration) -> String {
    humantime::format_duration(duration).to_string()
}

/// A measured time, in the unit that suits it: `85 ns`, `0.9 µs`, `38 µs`, `1.2 ms`.
#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
pub fn measured(ns: u64) -> String {
    let us = ns as f64 / 1e3;
    match ns {
        0..100 => format!("{ns} ns"),
        100..10_000 => format!("{us:.1} µs"),
        10_000..1_000_000 => format!("{us:.0} µs"),
        1_000_000..1_000_000_000 => format!("{:.1} ms", us / 1e3),
        _ => format!("{:.1} s", us / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_times_have_the_unit_that_suits_them() {
        let cases = [
            (42, "42 ns"),
            (900, "0.9 µs"),
            (38_000, "38 µs"),
            (1_200_000, "1.2 ms"),
            (2_500_000_000, "2.5 s"),
        ];
        for (ns, text) in cases {
            assert_eq!(measured(ns), text);
        }
    }

    #[test]
    fn durations_read_as_they_are_written() {
        assert_eq!(duration(Duration::from_secs(1200)), "20m");
        assert_eq!(duration(Duration::from_millis(1500)), "1s 500ms");
    }

    #[test]
    fn another_day_is_shown_with_its_date() {
        let now: Timestamp = "2026-11-21T23:50:00Z".parse().unwrap();
        let soon = after(now, Duration::from_secs(300));
        let later = after(now, Duration::from_secs(1200));
        assert_eq!(local_in(soon, now, TimeZone::UTC), "23:55:00");
        assert_eq!(local_in(later, now, TimeZone::UTC), "2026-11-22 00:10:00");
    }

    #[test]
    fn what_has_passed_has_nothing_remaining() {
        let now: Timestamp = "2026-11-21T12:00:00Z".parse().unwrap();
        assert_eq!(remaining(now, after(now, Duration::from_secs(3))), Duration::from_secs(3));
        assert_eq!(remaining(after(now, Duration::from_secs(3)), now), Duration::ZERO);
    }
}
