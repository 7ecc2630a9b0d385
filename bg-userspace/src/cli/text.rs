//! Figures and nouns, as people read them.

use std::time::Duration;

/// A measured time, in the unit that suits it: `85 ns`, `0.9 µs`, `38 µs`.
pub(super) fn measured(ns: u64) -> String {
    let (value, unit) = match ns {
        0..100 => return format!("{ns} ns"),
        100..1_000_000 => (ns as f64 / 1e3, "µs"),
        1_000_000..1_000_000_000 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    let decimals = usize::from(value < 10.0);
    format!("{value:.decimals$} {unit}")
}

/// A configured time: `20m`, `1h 30m`.
pub(super) fn length(seconds: u64) -> String {
    humantime::format_duration(Duration::from_secs(seconds)).to_string()
}

/// A share of new flows as it is, to a ten-thousandth: `0.1007`, `95`.
pub(super) fn percent(percent: f64) -> String {
    let text = format!("{percent:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// A count, its digits in groups of three: `1 234`.
pub(super) fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

/// `1 flow`, `143 flows`.
pub(super) fn flows(count: u64) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} flow{plural}")
}

/// `word` with its ending for `count` of a thing: `1 flow stays`, `2 flows stay`.
pub(super) fn verb(count: Option<u64>, one: &'static str, many: &'static str) -> &'static str {
    if count == Some(1) { one } else { many }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_shown_as_it_is() {
        for (share, text) in [
            (0u16, "0"),
            (66, "0.1007"),
            (3277, "5.0003"),
            (32_768, "50"),
            (65_535, "99.9985"),
        ] {
            assert_eq!(percent(crate::switch::percent(share)), text);
        }
    }

    #[test]
    fn digits_stand_in_groups() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1234, "1 234"),
            (1_234_567, "1 234 567"),
        ] {
            assert_eq!(count(number), text);
        }
    }

    #[test]
    fn the_unit_suits_the_size() {
        let cases = [
            (0, "0 ns"),
            (85, "85 ns"),
            (940, "0.9 µs"),
            (38_400, "38 µs"),
            (1_500_000, "1.5 ms"),
            (250_000_000, "250 ms"),
            (2_340_000_000, "2.3 s"),
        ];
        for (ns, text) in cases {
            assert_eq!(measured(ns), text);
        }
    }
}
