//! The text of a file, and places in it.

use std::{ops::Range, path::Path};

use serde::de::DeserializeOwned;
use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::ConfigError;

/// The text of a file. Places are byte offsets.
pub(super) struct Text<'a> {
    pub(super) file: &'a Path,
    pub(super) text: &'a str,
}

impl Text<'_> {
    /// Decodes the text; an error names the innermost key around the trouble.
    pub(super) fn parse<T: DeserializeOwned>(&self) -> Result<T, ConfigError> {
        toml::from_str(self.text).map_err(|error| {
            let start = error.span().map(|span| span.start);
            let key = start.and_then(|start| self.key_at(start));
            let given = error.span().and_then(|span| self.text.get(span));
            let message = match (error.message(), given) {
                ("duplicate key", Some(key)) => format!("`{key}` is given twice"),
                (message, _) => message.replace("expected i64", "expected a whole number"),
            };
            ConfigError {
                file: self.file.to_owned(),
                line: start.map(|start| self.line(start)),
                key: key.unwrap_or_default(),
                message,
            }
        })
    }

    /// The error that something at a place is wrong.
    pub(super) fn error(
        &self,
        place: usize,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> ConfigError {
        ConfigError {
            file: self.file.to_owned(),
            line: Some(self.line(place)),
            key: key.into(),
            message: message.into(),
        }
    }

    /// The error that a value is wrong.
    pub(super) fn wrong<T>(
        &self,
        value: &Spanned<T>,
        key: impl Into<String>,
        message: impl Into<String>,
    ) -> ConfigError {
        self.error(value.span().start, key, message)
    }

    fn line(&self, place: usize) -> usize {
        let bytes = self.text.bytes().take(place);
        bytes.filter(|byte| *byte == b'\n').count() + 1
    }

    fn key_at(&self, place: usize) -> Option<String> {
        let table = DeTable::parse(self.text).ok()?;
        in_table(table.get_ref(), place).map(|path| path.join("."))
    }
}

fn in_table(table: &DeTable<'_>, place: usize) -> Option<Vec<String>> {
    // A table's span need not hold what its keys hold, so depth comes first.
    let deeper = table.iter().find_map(|(key, value)| {
        let rest = in_value(value.get_ref(), place)?;
        Some([vec![key.get_ref().to_string()], rest].concat())
    });
    deeper.or_else(|| {
        let holds = |span: Range<usize>| span.contains(&place);
        table
            .iter()
            .find(|(key, value)| holds(key.span()) || holds(value.span()))
            .map(|(key, _)| vec![key.get_ref().to_string()])
    })
}

fn in_value(value: &DeValue<'_>, place: usize) -> Option<Vec<String>> {
    match value {
        DeValue::Table(table) => in_table(table, place),
        DeValue::Array(values) => values
            .iter()
            .find_map(|value| in_value(value.get_ref(), place)),
        _ => None,
    }
}
