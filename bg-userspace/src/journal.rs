//! The journal: who did what to which service, why, and what came of it. JSON
//! lines, appended and synced before (intent) and after (result) each change.

mod backwards;
mod rotation;

use std::{
    fs,
    io::{self, Read as _, Seek as _, Write as _},
    ops::ControlFlow,
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

    /// The newest entries that are wanted, oldest first. A line that was torn by a crash
    /// is passed over. Reads from the end, and no further than it must.
    pub fn last(&self, wanted: &Wanted) -> io::Result<Last> {
        let mut last = Last::default();
        let mut bytes = 0;
        let read = self.backwards(|line| {
            let Ok(entry) = serde_json::from_slice::<Entry>(line) else {
                return ControlFlow::Continue(());
            };
            match wanted.is(&entry) {
                Is::Wanted if last.entries.len() == wanted.limit || bytes > MAX_BYTES => {
                    last.more = true;
                    return ControlFlow::Break(());
                }
                Is::Wanted => {
                    bytes += line.len();
                    last.entries.push(entry);
                }
                Is::Other => {}
                Is::TooOld => return ControlFlow::Break(()),
            }
            ControlFlow::Continue(())
        });
        read.map_err(|error| {
            let file = self.file.display();
            let message = format!("the journal {file} cannot be read: {error}");
            io::Error::new(error.kind(), message)
        })?;
        last.entries.reverse();
        Ok(last)
    }

    /// Reads the lines of all files, the newest first.
    fn backwards(&self, mut take: impl FnMut(&[u8]) -> ControlFlow<()>) -> io::Result<()> {
        // First of all, so that it is not missed when it is put aside meanwhile.
        let newest = if_there(fs::File::open(&self.file))?;
        let its_inode = match &newest {
            Some(newest) => Some(newest.metadata()?.ino()),
            None => None,
        };
        if let Some(newest) = newest
            && backwards::lines(&newest, &mut take)?.is_break()
        {
            return Ok(());
        }
        let aside = if_there(rotation::aside(&self.file))?.unwrap_or_default();
        for (_, path) in aside.into_iter().rev() {
            if let Some(file) = if_there(fs::File::open(path))?
                && Some(file.metadata()?.ino()) != its_inode
                && backwards::lines(&file, &mut take)?.is_break()
            {
                return Ok(());
            }
        }
        Ok(())
    }

    /// What was done beside the daemon since one of them ran last, as far as the end of
    /// the newest file tells; oldest first.
    pub fn while_away(&self) -> Vec<Entry> {
        let mut found = Vec::new();
        let mut bytes = 0;
        let mut take = |line: &[u8]| {
            bytes += line.len();
            match serde_json::from_slice::<Entry>(line) {
                Ok(entry) if matches!(entry.action.as_str(), "start" | "stop") => {
                    return ControlFlow::Break(());
                }
                Ok(entry) => found.push(entry),
                Err(_) => {}
            }
            if bytes > TAIL {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        };
        // Where it cannot be read, nothing is known.
        let _ = fs::File::open(&self.file).and_then(|file| backwards::lines(&file, &mut take));
        found.reverse();
        found
    }
}

/// What is read of the end of a journal for that, bytes: hundreds of lines.
const TAIL: usize = 1 << 18;

/// More than this is not told at once, bytes.
const MAX_BYTES: usize = 64 << 20;

/// A clock may have been set back, by less than this: only what is so much too old has
/// nothing wanted before it.
const SET_BACK_MS: i64 = 3_600_000;

/// Which entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// So many at most.
    pub limit: usize,
    /// Not older than this, milliseconds since 1970.
    pub since_ms: Option<i64>,
    /// Of this service, and what concerns all.
    pub service: Option<String>,
}

enum Is {
    Wanted,
    Other,
    TooOld,
}

impl Wanted {
    fn is(&self, entry: &Entry) -> Is {
        let time = time::unix_ms_of(&entry.time);
        let age = self.since_ms.zip(time).map_or(0, |(since, at)| since - at);
        let of = self.service.as_ref();
        match age {
            SET_BACK_MS.. => Is::TooOld,
            1.. => Is::Other,
            _ if entry.service == "*" || of.is_none_or(|of| *of == entry.service) => Is::Wanted,
            _ => Is::Other,
        }
    }
}

/// The newest entries.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Last {
    /// Oldest first.
    pub entries: Vec<Entry>,
    /// There are older ones that are wanted.
    pub more: bool,
}

/// `None` where there is no such file.
fn if_there<T>(found: io::Result<T>) -> io::Result<Option<T>> {
    match found {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
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

/// All entries.
#[cfg(test)]
pub(crate) fn all(journal: &Journal) -> Vec<Entry> {
    let wanted = Wanted {
        limit: usize::MAX,
        ..Wanted::default()
    };
    journal.last(&wanted).unwrap().entries
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
        assert_eq!(all(&journal), std::slice::from_ref(&entry));
        journal.append(&entry).unwrap();
        assert_eq!(all(&journal), [entry.clone(), entry]);
        fs::remove_dir_all(directory).unwrap();
    }

    /// Entries of every minute since a time, in files that have been put aside, too.
    #[test]
    fn the_newest_ones_are_told_and_nothing_before_them_is_read() {
        let name = format!("bgswitch-last-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&directory);
        let journal = Journal::new(&directory);
        let write = |hour: usize, minute: usize| {
            let service = ["llm", "web", "*"][minute % 3];
            let mut entry = Entry::new("root(0)", service, "flip", "result", 0, String::new());
            entry.time = format!("2026-11-21T{hour:02}:{minute:02}:00.000Z");
            entry.detail = format!("{hour}:{minute}");
            journal.append(&entry).unwrap();
        };
        let file = directory.join("journal.jsonl");
        for (hour, aside) in [(1, "2"), (2, "9"), (3, "10"), (4, "")] {
            (0..60).for_each(|minute| write(hour, minute));
            if !aside.is_empty() {
                fs::rename(&file, directory.join(format!("journal.jsonl.{aside}"))).unwrap();
            }
        }
        let last = |limit, since: Option<&str>, service: Option<&str>| {
            let wanted = Wanted {
                limit,
                since_ms: since.and_then(time::unix_ms_of),
                service: service.map(str::to_owned),
            };
            let last = journal.last(&wanted).unwrap();
            let ends = [last.entries.first(), last.entries.last()];
            let ends = ends.map(|entry| entry.map_or("", |entry| &entry.detail).to_owned());
            (last.entries.len(), ends.join(" "), last.more)
        };
        let is = |count, ends: &str, more| (count, ends.to_owned(), more);
        assert_eq!(last(3, None, None), is(3, "4:57 4:59", true));
        assert_eq!(last(61, None, None), is(61, "3:59 4:59", true));
        assert_eq!(last(240, None, None), is(240, "1:0 4:59", false));
        assert_eq!(last(40, None, Some("llm")), is(40, "4:0 4:59", true));
        let since = Some("2026-11-21T03:30:00Z");
        assert_eq!(last(1000, since, None), is(90, "3:30 4:59", false));
        assert_eq!(last(0, None, None), is(0, " ", true));
        // What is too old is not even opened: the oldest file is a directory.
        fs::remove_file(directory.join("journal.jsonl.2")).unwrap();
        fs::create_dir(directory.join("journal.jsonl.2")).unwrap();
        assert_eq!(last(1000, since, None).0, 90);
        assert_eq!(last(120, None, None), is(120, "3:0 4:59", true));
        fs::remove_dir_all(&directory).unwrap();
    }
}
