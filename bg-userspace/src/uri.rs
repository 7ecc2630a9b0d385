//! Text in addresses of HTTP.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};

/// What is escaped: all but the unreserved characters (RFC 3986, section 2.3).
const ESCAPED: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'.')
    .remove(b'_')
    .remove(b'~');

/// A text as a segment of a path, or as a value of a query.
pub fn escaped(text: &str) -> String {
    utf8_percent_encode(text, ESCAPED).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_but_the_unreserved_is_escaped() {
        assert_eq!(
            escaped("rate(a{b=\"ü\"}[1m])"),
            "rate%28a%7Bb%3D%22%C3%BC%22%7D%5B1m%5D%29"
        );
        assert_eq!(escaped("a-b.c_d~9"), "a-b.c_d~9");
    }
}
