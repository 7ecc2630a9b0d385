//! The journal: who did what to which service, why, and what came of it. JSON
//! lines, appended and synced before (intent) and after (result) each change.

mod rotation;

use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::unistd::{Uid, User};
use serde::{Deserialize, Serialize};

use crate::time;

/// What the detail of a change ends with that was made beside the daemon.
pub const OFFLINE: &str = ", without the daemon";

/// One line of the journal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
pub struct Entry {
    /// RFC 3339, UTC, milliseconds.
    pub time: String,
    /// Who: name and user id of the peer, or the daemon itself.
    pub actor: String,
    /// Which service; `*` for all.
    pub service: String,
    /// `flip`, `rollback`, `canary`, `drain_end`, `reload`, `start`, `stop`, `detach`,
    /// `changed_outside`, `fall`, `rise`, `release`, `dropped`.
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
    /// Bytes at which the file is put aside.
    rotate_at: Option<u64>,
}

impl Journal {
    /// The journal of a state directory, for whoever writes a few lines beside the
    /// daemon: it is not rotated.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            file: state_dir.join("journal.jsonl"),
            rotate_at: None,
        }
    }

    /// The same, kept to `max` bytes: beyond them, the oldest eighth goes.
    pub fn rotating(state_dir: &Path, max: u64) -> Self {
        Self {
            rotate_at: Some(max / rotation::KEPT),
            ..Self::new(state_dir)
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
        // A journal that is too large is better than one that is not written.
        if let Some(Err(error)) = self.rotate_at.map(|at| rotation::rotate(&self.file, at)) {
            let file = self.file.display();
            tracing::warn!("the journal {file} grows on, it cannot be rotated: {error}");
        }
        let mut file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .read(true)
            .open(&self.file)?;
        let is_new = file.metadata()?.len() == 0;
        let mut line = Vec::new();
        if !ends_a_line(&mut file)? {
            line.push(b'\n');
        }
        serde_json::to_writer(&mut line, entry)?;
        line.push(b'\n');
        file.write_all(&line)?;
        file.sync_data()?;
        if is_new {
            rotation::sync_directory(&self.file)?;
        }
        Ok(())
    }

    /// All entries, oldest first. A line that was torn by a crash is passed over.
    pub fn read(&self) -> io::Result<Vec<Entry>> {
        self.read_all().map_err(|error| {
            let file = self.file.display();
            let message = format!("the journal {file} cannot be read: {error}");
            io::Error::new(error.kind(), message)
        })
    }

    fn read_all(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        // First of all, so that it is not missed when it is put aside meanwhile.
        let newest = if_there(fs::File::open(&self.file))?;
        let its_inode = match &newest {
            Some(newest) => Some(newest.metadata()?.ino()),
            None => None,
        };
        for (_, path) in if_there(rotation::aside(&self.file))?.unwrap_or_default() {
            if let Some(file) = if_there(fs::File::open(path))?
                && Some(file.metadata()?.ino()) != its_inode
            {
                read_into(&mut entries, file)?;
            }
        }
        if let Some(newest) = newest {
            read_into(&mut entries, newest)?;
        }
        Ok(entries)
    }

    /// What was done beside the daemon since one of them ran last, as far as the end of
    /// the newest file tells.
    pub fn while_away(&self) -> Vec<Entry> {
        let mut newest = self.tail().unwrap_or_default();
        let daemons = |entry: &Entry| matches!(entry.action.as_str(), "start" | "stop");
        let since = newest.iter().rposition(daemons).map_or(0, |last| last + 1);
        newest.split_off(since)
    }

    fn tail(&self) -> io::Result<Vec<Entry>> {
        let mut file = fs::File::open(&self.file)?;
        let length = file.metadata()?.len();
        file.seek(io::SeekFrom::Start(length.saturating_sub(TAIL)))?;
        let mut entries = Vec::new();
        read_into(&mut entries, file)?;
        Ok(entries)
    }
}

/// What is read of the end of a journal: hundreds of lines.
const TAIL: u64 = 1 << 18;

/// `None` where there is no such file.
fn if_there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Adds the entries of a file.
fn read_into(entries: &mut Vec<Entry>, mut file: fs::File) -> io::Result<()> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes)?;
    let lines = bytes.split(|byte| *byte == b'\n');
    entries.extend(lines.filter_map(|line| serde_json::from_slice::<Entry>(line).ok()));
    Ok(())
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
