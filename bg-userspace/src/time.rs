//! Points in time: UTC for scripts and files, local time for people.

use std::time::Duration;

use jiff::{Timestamp, tz::TimeZone};
use nix::time::{ClockId, clock_gettime};

/// Now, RFC 3339, UTC, milliseconds.
pub fn now() -> String {
    format!("{:.3}", Timestamp::now())
}

/// The wall clock beside `CLOCK_MONOTONIC`.
#[derive(Clone, Copy, Debug)]
pub struct Wall {
    /// Nanoseconds from the one to the other.
    ahead: i128,
}

impl Wall {
    /// As both are now.
    pub fn now() -> Self {
        let monotonic = clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |now| {
            i128::from(now.tv_sec()) * 1_000_000_000 + i128::from(now.tv_nsec())
        });
        Self {
            ahead: Timestamp::now().as_nanosecond() - monotonic,
        }
    }

    /// A moment of `CLOCK_MONOTONIC`, ns: RFC 3339, UTC, microseconds.
    pub fn at(self, ns: u64) -> String {
        let time = Timestamp::from_nanosecond(self.ahead + i128::from(ns));
        format!("{:.6}", time.unwrap_or(Timestamp::MAX))
    }
}

/// The local time of day of an RFC 3339 time, to the microsecond.
pub fn local_micros(rfc3339: &str) -> String {
    rfc3339.parse::<Timestamp>().map_or_else(
        |_| rfc3339.to_owned(),
        |time| {
            let time = time.to_zoned_datetime(TimeZone::system());
            time.strftime("%H:%M:%S%.6f").to_string()
        },
    )
}

/// Milliseconds since the boot, those of a suspended host included.
pub fn since_boot_ms() -> u64 {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |now| {
        now.tv_sec() as u64 * 1000 + now.tv_nsec() as u64 / 1_000_000
    })
}

/// The first whole second of the wall clock that is `after` from now or later,
/// in milliseconds since the boot.
pub fn whole_second_in(after: Duration) -> u64 {
    let after = u64::try_from(after.as_millis()).unwrap_or(u64::MAX / 2);
    let wall = Timestamp::now().as_millisecond() as u64;
    let rest = (1000 - wall.wrapping_add(after) % 1000) % 1000;
    since_boot_ms().saturating_add(after).saturating_add(rest)
}

/// A moment since the boot by the wall clock as it is set now: RFC 3339, UTC,
/// to the second.
pub fn rfc3339_at_boot_ms(at_ms: u64) -> String {
    let ahead = i64::try_from(at_ms).unwrap_or(i64::MAX) - since_boot_ms() as i64;
    at_second(Timestamp::now().as_millisecond().saturating_add(ahead))
}

/// The same in seconds since 1970.
pub fn unix_seconds_at_boot_ms(at_ms: u64) -> f64 {
    let ahead = i64::try_from(at_ms).unwrap_or(i64::MAX) - since_boot_ms() as i64;
    unix_ms().saturating_add(ahead) as f64 / 1000.0
}

/// The second that the most of `unix_ms` belongs to.
fn at_second(unix_ms: i64) -> String {
    Timestamp::from_second(unix_ms.saturating_add(500).div_euclid(1000))
        .unwrap_or(Timestamp::MAX)
        .to_string()
}

/// Milliseconds since 1970, as the clock on the wall is set now.
pub fn unix_ms() -> i64 {
    Timestamp::now().as_millisecond()
}

/// A moment by the clock on the wall: RFC 3339, UTC, to the second.
pub fn rfc3339_at_unix_ms(unix_ms: i64) -> String {
    at_second(unix_ms)
}

/// Whole seconds from now to an RFC 3339 time; 0 when that has passed.
pub fn seconds_until(rfc3339: &str) -> Option<u64> {
    let left = unix_ms_of(rfc3339)? - unix_ms();
    Some(u64::try_from(left).unwrap_or(0) / 1000)
}

/// The same to the millisecond.
pub fn rfc3339_ms(unix_ms: i64) -> String {
    let time = Timestamp::from_millisecond(unix_ms);
    format!("{:.3}", time.unwrap_or(Timestamp::MIN))
}

/// An RFC 3339 time in milliseconds since 1970.
pub fn unix_ms_of(rfc3339: &str) -> Option<i64> {
    let time = rfc3339.parse::<Timestamp>().ok()?;
    Some(time.as_millisecond())
}

/// What the kernel calls this boot.
pub fn boot_id() -> String {
    let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    id.trim().to_owned()
}

/// The local time of day of an RFC 3339 time, with the date when that is not
/// today's.
pub fn local(rfc3339: &str) -> String {
    local_in(rfc3339, Timestamp::now(), &TimeZone::system())
}

/// The local date and time of an RFC 3339 time.
pub fn local_date(rfc3339: &str) -> String {
    rfc3339.parse::<Timestamp>().map_or_else(
        |_| rfc3339.to_owned(),
        |time| {
            let time = time.to_zoned_datetime(TimeZone::system());
            time.strftime("%Y-%m-%d %H:%M:%S").to_string()
        },
    )
}

fn local_in(rfc3339: &str, now: Timestamp, zone: &TimeZone) -> String {
    let Ok(time) = rfc3339.parse::<Timestamp>() else {
        return rfc3339.to_owned();
    };
    let (time, now) = (
        time.to_zoned_datetime(zone.clone()),
        now.to_zoned_datetime(zone.clone()),
    );
    let format = if time.date() == now.date() {
        "%H:%M:%S"
    } else {
        "%Y-%m-%d %H:%M:%S"
    };
    time.strftime(format).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn people_read_local_time_and_the_date_only_of_another_day() {
        let zone = TimeZone::fixed(jiff::tz::offset(2));
        let now = "2026-11-21T20:00:00Z".parse().unwrap();
        assert_eq!(local_in("2026-11-21T21:02:10Z", now, &zone), "23:02:10");
        assert_eq!(
            local_in("2026-11-21T22:02:10Z", now, &zone),
            "2026-11-22 00:02:10"
        );
    }

    #[test]
    fn a_deadline_is_a_whole_second_and_never_early() {
        let before = since_boot_ms();
        let deadline = whole_second_in(Duration::from_millis(1500));
        assert!(deadline >= before + 1500 && deadline <= since_boot_ms() + 2500);
    }

    #[test]
    fn scripts_read_utc() {
        assert_eq!(at_second(1_795_273_330_400), "2026-11-21T15:02:10Z");
    }
}
