//! Files of prompts, as JSON lines: what is asked, and what the answer must be.

use std::{collections::BTreeMap, path::Path, time::Duration};

use hyper::{Method, http::uri::PathAndQuery};
use regex::{Regex, RegexBuilder};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    config::{Config, ConfigError},
    file,
    health::http::same,
};

/// A larger file is no list of prompts.
const MAX_BYTES: u64 = 8 << 20;
/// More prompts than this are another kind of test.
const MAX_PROMPTS: usize = 2000;
/// What a compiled expression may take, bytes.
const MAX_REGEX: usize = 1 << 20;

/// A prompt, and what its answer must be.
#[derive(Clone, Debug)]
pub struct Prompt {
    /// What it is called: its name, or where it is.
    pub name: String,
    /// Method.
    pub method: String,
    /// Path and query.
    pub path: String,
    /// What is sent, as JSON.
    pub body: Option<String>,
    /// What the answer must be.
    pub expect: Expect,
    /// Until the first byte of the answer's body.
    pub max_first_byte: Option<Duration>,
    /// Until its last one.
    pub max_total: Option<Duration>,
}

/// What an answer must be.
#[derive(Clone, Debug)]
pub struct Expect {
    /// Status code.
    pub status: u16,
    /// Values at places (RFC 6901).
    pub json: BTreeMap<String, Value>,
    /// What the body must match.
    pub matches: Vec<Regex>,
    /// What the text at a place must match.
    pub json_matches: BTreeMap<String, Regex>,
}

impl Expect {
    /// What is wrong with an answer.
    pub fn trouble(&self, status: u16, body: &[u8]) -> Option<String> {
        if status != self.status {
            return Some(format!("answered {status}, not {}", self.status));
        }
        let text = String::from_utf8_lossy(body);
        if let Some(missed) = self.matches.iter().find(|regex| !regex.is_match(&text)) {
            return Some(format!("the answer does not match `{missed}`"));
        }
        if self.json.is_empty() && self.json_matches.is_empty() {
            return None;
        }
        let Ok(json) = serde_json::from_slice::<Value>(body) else {
            return Some("the answer is no JSON".to_owned());
        };
        let wrong = |pointer: &str, wanted: &Value| match json.pointer(pointer) {
            None => Some(format!("the answer has no {pointer}")),
            Some(found) if same(found, wanted) => None,
            Some(found) => Some(format!("{pointer} is {found}, not {wanted}")),
        };
        let unmatched = |pointer: &str, regex: &Regex| match json.pointer(pointer) {
            None => Some(format!("the answer has no {pointer}")),
            Some(Value::String(text)) if regex.is_match(text) => None,
            Some(other) if !other.is_string() && regex.is_match(&other.to_string()) => None,
            Some(found) => Some(format!(
                "{pointer} is {found}, which does not match `{regex}`"
            )),
        };
        let mut values = self.json.iter();
        let mut texts = self.json_matches.iter();
        values
            .find_map(|(pointer, wanted)| wrong(pointer, wanted))
            .or_else(|| texts.find_map(|(pointer, regex)| unmatched(pointer, regex)))
    }
}

/// Reads the files of prompts that a configuration names: what is wrong in a line is an
/// error, one that cannot be read is told.
pub fn unread_files(config: &Config) -> Result<Vec<String>, ConfigError> {
    let gates = config
        .services
        .values()
        .flat_map(|service| &service.release.gates);
    let mut unread = Vec::new();
    for file in gates.filter_map(|gate| gate.kind.prompts()) {
        match read(file) {
            Ok(_) => {}
            Err(error) if error.line.is_some() => return Err(error),
            Err(error) => unread.push(error.to_string()),
        }
    }
    Ok(unread)
}

/// Reads a file of prompts; an error names the line.
pub fn read(file: &Path) -> Result<Vec<Prompt>, ConfigError> {
    let wrong = |line, message: String| ConfigError {
        file: file.to_owned(),
        line,
        key: String::new(),
        message,
    };
    let text = file::text(file, MAX_BYTES).map_err(|trouble| wrong(None, trouble.to_string()))?;
    let lines = (1..).zip(text.lines());
    let lines = lines.filter(|(_, line)| !line.trim().is_empty());
    let prompts: Result<Vec<Prompt>, ConfigError> = lines
        .take(MAX_PROMPTS + 1)
        .map(|(number, line)| prompt(number, line).map_err(|message| wrong(Some(number), message)))
        .collect();
    let prompts = prompts?;
    match prompts.len() {
        0 => Err(wrong(
            None,
            "has no prompt: one JSON object a line".to_owned(),
        )),
        1..=MAX_PROMPTS => Ok(prompts),
        _ => Err(wrong(None, format!("has more than {MAX_PROMPTS} prompts"))),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    name: Option<String>,
    method: Option<String>,
    path: String,
    body: Option<Value>,
    #[serde(default)]
    expect: Expected,
    max_first_byte: Option<String>,
    max_total: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Expected {
    status: Option<u16>,
    json: BTreeMap<String, Value>,
    matches: Vec<String>,
    json_matches: BTreeMap<String, String>,
}

fn prompt(number: usize, line: &str) -> Result<Prompt, String> {
    let line: Line = serde_json::from_str(line).map_err(|error| {
        // Each is a text of one line.
        error.to_string().replace("at line 1 column", "at column")
    })?;
    let path = &line.path;
    if !path.starts_with('/') || path.contains('#') || path.parse::<PathAndQuery>().is_err() {
        let path = path.escape_debug();
        return Err(format!("`{path}` is no path, like \"/v1/completions\""));
    }
    let usual = if line.body.is_some() { "POST" } else { "GET" };
    let method = line.method.unwrap_or_else(|| usual.to_owned());
    let upper = !method.bytes().any(|byte| byte.is_ascii_lowercase());
    if !upper || Method::from_bytes(method.as_bytes()).is_err() {
        let method = method.escape_debug();
        return Err(format!("`{method}` is no method, like \"POST\""));
    }
    let expected = line.expect;
    let pointers = expected.json.keys().chain(expected.json_matches.keys());
    if let Some(wrong) = pointers.into_iter().find(|pointer| !is_pointer(pointer)) {
        let wrong = wrong.escape_debug();
        return Err(format!(
            "`{wrong}` is no JSON pointer, like \"/choices/0/text\""
        ));
    }
    let texts = expected.json_matches.into_iter();
    let texts = texts.map(|(pointer, text)| Ok((pointer, regex(&text)?)));
    let expect = Expect {
        status: expected.status.unwrap_or(200),
        json: expected.json,
        matches: expected
            .matches
            .iter()
            .map(|text| regex(text))
            .collect::<Result<_, _>>()?,
        json_matches: texts.collect::<Result<_, String>>()?,
    };
    if !(100..=599).contains(&expect.status) {
        return Err(format!(
            "status {} is not between 100 and 599",
            expect.status
        ));
    }
    Ok(Prompt {
        name: line.name.unwrap_or_else(|| format!("line {number}")),
        method,
        path: line.path,
        body: line.body.map(|body| body.to_string()),
        expect,
        max_first_byte: line.max_first_byte.map(|text| time(&text)).transpose()?,
        max_total: line.max_total.map(|text| time(&text)).transpose()?,
    })
}

/// True for a place in a JSON text (RFC 6901); empty: all of it.
pub fn is_pointer(text: &str) -> bool {
    text.is_empty() || text.starts_with('/')
}

fn regex(text: &str) -> Result<Regex, String> {
    let regex = RegexBuilder::new(text).size_limit(MAX_REGEX).build();
    regex.map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => format!("`{text}` is too large an expression"),
        // Its last line says what is wrong.
        error => {
            let error = error.to_string();
            let why = error.lines().last().unwrap_or_default();
            format!(
                "`{text}` is no regular expression: {}",
                why.trim_start_matches("error: ")
            )
        }
    })
}

fn time(text: &str) -> Result<Duration, String> {
    humantime::parse_duration(text).map_err(|_| format!("`{text}` is no duration, like \"800ms\""))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_line_says_what_is_asked_and_what_must_come() {
        let line = r#"{"name": "sum", "path": "/v1/completions", "body": {"prompt": "2+2"},
            "expect": {"json": {"/n": 1}, "matches": ["(?i)four"], "json_matches": {"/choices/0/text": "^4|four"}},
            "max_first_byte": "800ms"}"#;
        let prompt = prompt(1, line).unwrap();
        assert_eq!(
            (prompt.name.as_str(), prompt.method.as_str()),
            ("sum", "POST")
        );
        assert_eq!(prompt.body.as_deref(), Some(r#"{"prompt":"2+2"}"#));
        assert_eq!(prompt.max_first_byte, Some(Duration::from_millis(800)));
        let trouble = |status, body: &str| prompt.expect.trouble(status, body.as_bytes());
        let good = r#"{"n": 1.0, "choices": [{"text": "four"}]}"#;
        assert_eq!(trouble(200, good), None);
        for (status, body, wrong) in [
            (500, good, "answered 500, not 200"),
            (200, "{}", "the answer does not match `(?i)four`"),
            (200, "four", "the answer is no JSON"),
            (200, r#"{"n": 2, "is": "four"}"#, "/n is 2, not 1"),
            (
                200,
                r#"{"n": 1, "is": "four"}"#,
                "the answer has no /choices/0/text",
            ),
            (
                200,
                r#"{"n": 1, "choices": [{"text": "5, not four?"}]}"#,
                "",
            ),
            (
                200,
                r#"{"n": 1, "choices": [{"text": "5"}], "is": "four"}"#,
                "/choices/0/text is \"5\", which does not match `^4|four`",
            ),
        ] {
            let wrong = Some(wrong.to_owned()).filter(|wrong| !wrong.is_empty());
            assert_eq!(trouble(status, body), wrong, "{body}");
        }
    }

    #[test]
    fn a_wrong_line_is_named() {
        let file = std::env::temp_dir().join(format!("bgswitch-golden-{}", std::process::id()));
        let good = "{\"path\": \"/\"}\n\n";
        for (line, message) in [
            (
                "{\"path\": \"x\"}",
                "`x` is no path, like \"/v1/completions\"",
            ),
            ("{\"path\": \"/\", \"promt\": 1}", "unknown field `promt`"),
            ("{\"path\"", "EOF while parsing an object at column 7"),
            (
                "{\"path\": \"/\", \"expect\": {\"json\": {\"a\": 1}}}",
                "`a` is no JSON pointer",
            ),
            (
                "{\"path\": \"/\", \"expect\": {\"matches\": [\"(\"]}}",
                "`(` is no regular expression: unclosed group",
            ),
            (
                "{\"path\": \"/\", \"max_total\": \"soon\"}",
                "`soon` is no duration",
            ),
            (
                "{\"path\": \"/\", \"method\": \"get\"}",
                "`get` is no method",
            ),
        ] {
            fs::write(&file, format!("{good}{line}\n")).unwrap();
            let error = read(&file).unwrap_err();
            assert_eq!(error.line, Some(3), "{error}");
            assert!(error.message.starts_with(message), "{error}");
        }
        for (text, message) in [
            ("\n\n".to_owned(), "has no prompt"),
            (good.repeat(MAX_PROMPTS + 1), "has more than 2000 prompts"),
            ("x".repeat(MAX_BYTES as usize + 1), "is larger than 8 MiB"),
        ] {
            fs::write(&file, text).unwrap();
            let error = read(&file).unwrap_err();
            assert!(error.message.starts_with(message), "{error}");
        }
        fs::write(&file, good).unwrap();
        assert_eq!(read(&file).unwrap().len(), 1);
        fs::remove_file(&file).unwrap();
        assert!(
            read(&file)
                .unwrap_err()
                .message
                .starts_with("cannot be read: ")
        );
    }
}
