//! Points in time: UTC for scripts and files, local time for people.

use std::time::Duration;

use jiff::{Timestamp, tz::TimeZone};

/// Now, RFC 3339, UTC, milliseconds.
pub fn now() -> String {
    format!("{:.3}", Timestamp::now())
}

/// Time since 1970.
pub fn unix_now() -> Duration {
    Duration::try_from(Timestamp::now().as_duration()).unwrap_or_default()
}

/// `unix` seconds after 1970, RFC 3339, UTC.
pub fn rfc3339(unix: u64) -> String {
    Timestamp::from_second(unix as i64)
        .unwrap_or(Timestamp::MAX)
        .to_string()
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
    fn scripts_read_utc() {
        assert_eq!(rfc3339(1_795_273_330), "2026-11-21T15:02:10Z");
    }
}
