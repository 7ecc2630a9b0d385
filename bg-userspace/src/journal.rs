//! The journal: who did what to which service, why, and what came of it. JSON
//! lines, appended and synced before (intent) and after (result) each change.

use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    path::{Path, PathBuf},
};

use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

use crate::time;

/// A journal file is put aside when it grows beyond this.
const ROTATE_AT: u64 = 16 << 20;

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Entry {
    /// RFC 3339, UTC, milliseconds.
    pub time: String,
    /// Who: name and user id of the peer, or the daemon itself.
    pub actor: String,
    /// Which service; `*` for all.
    pub service: String,
    /// `flip`, `rollback`, `canary`, `drain_end`, `reload`, `start`, `stop`, `detach`,
    /// `changed_outside`, `fall`, `rise`, `release`.
    pub action: String,
    /// `intent` or `result`.
    pub phase: String,
    /// Generation before (intent) or after (result).
    pub generation: u16,
    /// What is or was to be done, or why it failed.
    pub detail: String,
    /// The operator's words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Entry {
    /// An entry of this moment.
    pub fn new(
        actor: &str,
        service: &str,
        action: &str,
        phase: &str,
        generation: u16,
        detail: String,
    ) -> Self {
        Self {
            time: time::now(),
            actor: actor.to_owned(),
            service: service.to_owned(),
            action: action.to_owned(),
            phase: phase.to_owned(),
            generation,
            detail,
            why: None,
        }
    }
}

/// How the journal calls a user.
pub fn actor(uid: Uid) -> String {
    let user = User::from_uid(uid).ok().flatten();
    let name = user.map_or_else(|| "?".to_owned(), |user| user.name);
    format!("{name}({uid})")
}

/// The file, opened anew for each entry, so that an emergency rollback beside
/// the daemon, or a rotation, is no trouble.
#[derive(Clone, Debug)]
pub struct Journal {
    file: PathBuf,
}

impl Journal {
    /// The journal of a state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            file: state_dir.join("journal.jsonl"),
        }
    }

    /// Appends an entry with one write, and syncs it. An error names the file.
    pub fn append(&self, entry: &Entry) -> io::Result<()> {
        self.append_line(entry).map_err(|error| {
            let message = format!(
                "the journal {} was not written: {error}",
                self.file.display()
            );
            io::Error::new(error.kind(), message)
        })
    }

    fn append_line(&self, entry: &Entry) -> io::Result<()> {
        if let Some(directory) = self.file.parent() {
            fs::create_dir_all(directory)?;
        }
        if fs::metadata(&self.file).is_ok_and(|meta| meta.len() > ROTATE_AT) {
            fs::rename(&self.file, self.file.with_extension("jsonl.1"))?;
        }
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(&self.file)?;
        let mut line = Vec::new();
        if !ends_a_line(&mut file)? {
            line.push(b'\n');
        }
        serde_json::to_writer(&mut line, entry)?;
        line.push(b'\n');
        file.write_all(&line)?;
        file.sync_data()
    }

    /// All entries, oldest first. A line that was torn by a crash is passed over.
    pub fn read(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for file in [self.file.with_extension("jsonl.1"), self.file.clone()] {
            match fs::read_to_string(&file) {
                Ok(text) => entries.extend(
                    text.lines()
                        .filter_map(|line| serde_json::from_str::<Entry>(line).ok()),
                ),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let message = format!("the journal {} cannot be read: {error}", file.display());
                    return Err(io::Error::new(error.kind(), message));
                }
            }
        }
        Ok(entries)
    }
}

/// False when the last line was torn by a crash.
fn ends_a_line(file: &mut fs::File) -> io::Result<bool> {
    if file.metadata()?.len() == 0 {
        return Ok(true);
    }
    let mut last = [0];
    file.seek(io::SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_line_costs_only_itself() {
        let directory =
            std::env::temp_dir().join(format!("bgswitch-journal-{}", std::process::id()));
        let journal = Journal::new(&directory);
        let entry = Entry::new(
            "root(0)",
            "llm",
            "flip",
            "intent",
            1,
            "blue -> green".into(),
        );
        journal.append(&entry).unwrap();
        let file = directory.join("journal.jsonl");
        let mut bytes = fs::read(&file).unwrap();
        bytes.extend(b"{\"time\":\"2026-");
        fs::write(&file, &bytes).unwrap();
        assert_eq!(journal.read().unwrap(), std::slice::from_ref(&entry));
        journal.append(&entry).unwrap();
        assert_eq!(journal.read().unwrap(), [entry.clone(), entry]);
        fs::remove_dir_all(directory).unwrap();
    }
}
