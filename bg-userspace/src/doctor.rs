//! What on this host would keep the packet path from working, and what mends it. Looks,
//! and changes nothing.

mod gateway;
mod host;
mod interfaces;

use std::path::Path;

use serde::Serialize;

use crate::{
    api::SCHEMA,
    config::{Config, Paths},
    golden,
};

/// What was found of one thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Found {
    /// As it should be.
    Ok,
    /// It works; it may not be what is wanted.
    Note,
    /// It keeps the packet path from working.
    Trouble,
    /// It could not be seen.
    Unseen,
}

impl Found {
    /// As it is written.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Note => "note",
            Self::Trouble => "trouble",
            Self::Unseen => "unseen",
        }
    }
}

/// A line of the report.
#[derive(Clone, Debug, Serialize)]
pub struct Finding {
    /// What was looked at, like `kernel`, or the name of an interface.
    pub about: String,
    /// What was found.
    pub found: Found,
    /// The same in words.
    pub message: String,
    /// The command that mends it.
    pub mends: Option<String>,
}

/// Everything that was looked at.
#[derive(Debug, Serialize)]
pub struct Report {
    /// [`SCHEMA`].
    pub schema: u32,
    /// Nothing was found that keeps the packet path from working.
    pub well: bool,
    /// In the order in which they were looked at.
    pub findings: Vec<Finding>,
}

/// Takes down what is found.
#[derive(Debug, Default)]
struct Findings(Vec<Finding>);

impl Findings {
    fn add(
        &mut self,
        about: &str,
        found: Found,
        message: impl Into<String>,
        mends: Option<String>,
    ) {
        self.0.push(Finding {
            about: about.to_owned(),
            found,
            message: message.into(),
            mends,
        });
    }

    fn ok(&mut self, about: &str, message: impl Into<String>) {
        self.add(about, Found::Ok, message, None);
    }

    fn note(&mut self, about: &str, message: impl Into<String>, mends: Option<String>) {
        self.add(about, Found::Note, message, mends);
    }

    fn trouble(&mut self, about: &str, message: impl Into<String>, mends: Option<String>) {
        self.add(about, Found::Trouble, message, mends);
    }

    fn unseen(&mut self, about: &str, message: impl Into<String>) {
        self.add(about, Found::Unseen, message, None);
    }
}

/// What the files of prompts say that a valid configuration names.
fn prompts(findings: &mut Findings, file: &Path, config: &Config) {
    match golden::unread_files(config) {
        Err(error) => findings.trouble("configuration", error.to_string(), None),
        Ok(unread) => {
            findings.ok("configuration", format!("{} is valid", file.display()));
            for error in unread {
                let message = format!("{error}; its gate needs it");
                findings.note("configuration", message, None);
            }
        }
    }
}

/// Looks at everything that the configuration in `file` is about. `socket` takes the
/// place of the configured one.
pub fn look(file: &Path, socket: Option<&Path>, timeout: std::time::Duration) -> Report {
    let mut findings = Findings::default();
    let (mut paths, _) = Paths::salvage(file);
    if let Some(socket) = socket {
        socket.clone_into(&mut paths.socket);
    }
    let config = match Config::load(file) {
        Ok(config) => {
            prompts(&mut findings, file, &config);
            Some(config)
        }
        Err(error) => {
            findings.trouble("configuration", error.to_string(), None);
            None
        }
    };
    host::look(&mut findings, &paths);
    if let Some(config) = &config {
        interfaces::look(&mut findings, config);
        gateway::look(&mut findings, config);
    }
    gateway::daemon(&mut findings, &paths, timeout);
    let Findings(findings) = findings;
    Report {
        schema: SCHEMA,
        well: findings
            .iter()
            .all(|finding| finding.found != Found::Trouble),
        findings,
    }
}
