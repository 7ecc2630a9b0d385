//! The keys of a table, and what may be there.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::RangeInclusive,
    path::{Path, PathBuf},
    time::Duration,
};

use hyper::{
    Method,
    header::{HeaderName, HeaderValue},
    http::uri::PathAndQuery,
};
use toml::Spanned;

use super::{
    super::{ConfigError, rules::is_name, text::Text},
    Share,
};

/// Headers that the request itself decides.
const OWN_HEADERS: [&str; 4] = ["connection", "content-length", "host", "transfer-encoding"];
/// A time that an answer may take.
const LATENCY: RangeInclusive<Duration> = Duration::from_millis(1)..=Duration::from_hours(1);

/// Entries of a list.
const MAX_LIST: usize = 32;

/// True for path and query of a request.
pub(super) fn is_path(given: &str) -> bool {
    given.starts_with('/') && !given.contains('#') && given.parse::<PathAndQuery>().is_ok()
}

/// A table of the file.
#[derive(Clone, Copy)]
pub(super) struct Keys<'a> {
    pub(super) text: &'a Text<'a>,
    /// What it is called, like `service.llm.gate`.
    pub(super) table: &'a str,
    /// Where it begins.
    pub(super) start: usize,
}

impl Keys<'_> {
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.table)
    }

    pub(super) fn wrong<T>(
        &self,
        value: &Spanned<T>,
        name: &str,
        message: impl Into<String>,
    ) -> ConfigError {
        self.text.wrong(value, self.key(name), message)
    }

    pub(super) fn missing(&self, name: &str, message: &str) -> ConfigError {
        let message = format!("is missing: {message}");
        self.text.error(self.start, self.key(name), message)
    }

    /// A name that no other table of this kind has, like `usual`.
    pub(super) fn own_name(
        &self,
        name: Option<&Spanned<String>>,
        usual: &str,
        names: &mut BTreeSet<String>,
    ) -> Result<String, ConfigError> {
        let Some(name) = name else {
            return Err(self.missing("name", &format!("add name = \"{usual}\"")));
        };
        let given = name.get_ref();
        if !is_name(given) {
            let message = "a name has 1 to 63 letters, digits, `-` and `_`";
            return Err(self.wrong(name, "name", message));
        }
        if !names.insert(given.clone()) {
            let message = format!("`{given}` is the name of another one");
            return Err(self.wrong(name, "name", message));
        }
        Ok(given.clone())
    }

    /// Path and query of a request.
    pub(super) fn path(&self, name: &str, path: &Spanned<String>) -> Result<String, ConfigError> {
        let given = path.get_ref();
        if is_path(given) {
            return Ok(given.clone());
        }
        let message = format!(
            "`{}` is no path, like \"/v2/health/ready\" (escape other bytes as %20)",
            given.escape_debug()
        );
        Err(self.wrong(path, name, message))
    }

    /// A whole number.
    pub(super) fn number<T: TryFrom<i64>>(
        &self,
        name: &str,
        value: Option<&Spanned<i64>>,
        range: RangeInclusive<i64>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(value) = value else { return Ok(None) };
        let given = *value.get_ref();
        let number = Some(given).filter(|given| range.contains(given));
        if let Some(number) = number.and_then(|given| T::try_from(given).ok()) {
            return Ok(Some(number));
        }
        let (from, to) = (range.start(), range.end());
        let message = format!("{given} is not between {from} and {to}");
        Err(self.wrong(value, name, message))
    }

    /// A time that an answer may take.
    pub(super) fn latency(
        &self,
        name: &str,
        value: Option<&Spanned<String>>,
    ) -> Result<Option<Duration>, ConfigError> {
        let Some(value) = value else { return Ok(None) };
        let given = value.get_ref();
        match humantime::parse_duration(given) {
            Ok(duration) if LATENCY.contains(&duration) => Ok(Some(duration)),
            Ok(_) => {
                let message = format!("`{given}` is not between 1ms and 1h");
                Err(self.wrong(value, name, message))
            }
            Err(_) => {
                let message = format!("`{given}` is no duration, like \"200ms\"");
                Err(self.wrong(value, name, message))
            }
        }
    }

    /// A share between 0 and 1; 0 if absent.
    pub(super) fn share(
        &self,
        name: &str,
        value: Option<&Spanned<f64>>,
    ) -> Result<Share, ConfigError> {
        let Some(value) = value else {
            return Ok(Share::default());
        };
        let given = *value.get_ref();
        if (0.0..=1.0).contains(&given) {
            return Ok(Share((given * 1_000_000.0).round() as u32));
        }
        let message = format!("{given} is no share: 0.01 is one of a hundred, 1 is all");
        Err(self.wrong(value, name, message))
    }

    /// A method of HTTP.
    pub(super) fn method(
        &self,
        name: &str,
        value: &Spanned<String>,
    ) -> Result<String, ConfigError> {
        let given = value.get_ref();
        let upper = !given.bytes().any(|byte| byte.is_ascii_lowercase());
        if upper && Method::from_bytes(given.as_bytes()).is_ok() && given != "CONNECT" {
            return Ok(given.clone());
        }
        let message = format!("`{}` is no method, like \"POST\"", given.escape_debug());
        Err(self.wrong(value, name, message))
    }

    /// Headers of a request.
    pub(super) fn headers(
        &self,
        name: &str,
        value: Option<&Spanned<BTreeMap<String, String>>>,
    ) -> Result<BTreeMap<String, String>, ConfigError> {
        let Some(value) = value else {
            return Ok(BTreeMap::new());
        };
        for (header, content) in value.get_ref() {
            let shown = header.escape_debug();
            let trouble = if HeaderName::try_from(header.as_str()).is_err() {
                format!("`{shown}` is no header, like authorization = \"Bearer token\"")
            } else if OWN_HEADERS.contains(&header.to_ascii_lowercase().as_str()) {
                format!("`{shown}` is set by the request itself: remove it")
            } else if HeaderValue::from_str(content).is_err() {
                format!("`{shown}` has bytes that a header cannot carry")
            } else {
                continue;
            };
            return Err(self.wrong(value, name, trouble));
        }
        Ok(value.get_ref().clone())
    }

    /// A file, by its absolute path.
    pub(super) fn file(
        &self,
        name: &str,
        value: Option<&Spanned<PathBuf>>,
        like: &str,
    ) -> Result<PathBuf, ConfigError> {
        let Some(value) = value else {
            return Err(self.missing(name, &format!("a file, like \"{like}\"")));
        };
        let given = value.get_ref();
        if given.is_absolute() {
            return Ok(given.clone());
        }
        let given = given.display();
        let message = format!("`{given}` is no absolute path, like \"{like}\"");
        Err(self.wrong(value, name, message))
    }

    /// Places in a JSON text (RFC 6901).
    pub(super) fn pointers(
        &self,
        name: &str,
        value: Option<&Spanned<Vec<String>>>,
    ) -> Result<Vec<String>, ConfigError> {
        let list = |pointer: &String| pointer.starts_with('/').then(|| pointer.clone());
        self.list(name, value, list, "JSON pointer, like \"/choices/0/text\"")
    }

    /// A list of what is `what`.
    pub(super) fn list(
        &self,
        name: &str,
        value: Option<&Spanned<Vec<String>>>,
        is: impl Fn(&String) -> Option<String>,
        what: &str,
    ) -> Result<Vec<String>, ConfigError> {
        let Some(value) = value else {
            return Ok(Vec::new());
        };
        if value.get_ref().len() > MAX_LIST {
            let message = format!("has {} entries, {MAX_LIST} fit", value.get_ref().len());
            return Err(self.wrong(value, name, message));
        }
        let one = |text: &String| {
            let wrong = || format!("`{}` is no {what}", text.escape_debug());
            is(text).ok_or_else(|| self.wrong(value, name, wrong()))
        };
        value.get_ref().iter().map(one).collect()
    }

    /// A program and its arguments.
    pub(super) fn command(
        &self,
        name: &str,
        command: &Spanned<Vec<String>>,
    ) -> Result<Vec<String>, ConfigError> {
        let words = command.get_ref();
        let program = words.first().map(Path::new);
        if !program.is_some_and(Path::is_absolute) {
            let message =
                "must begin with the absolute path of a program, like [\"/etc/bgswitch/smoke\"]";
            return Err(self.wrong(command, name, message));
        }
        if words.iter().any(|word| word.contains('\0')) {
            let message = "has a word with a zero byte, which no program can be given";
            return Err(self.wrong(command, name, message));
        }
        Ok(words.clone())
    }
}
