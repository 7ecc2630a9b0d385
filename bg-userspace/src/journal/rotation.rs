//! Rotation: a journal that has grown is put aside under the next number, the oldest
//! one goes. Each step is one call, after any of which a crash loses no line.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
};

/// Files that are kept, the one that is written included.
pub(super) const KEPT: u64 = 8;

/// Puts `journal` aside when it has `at` bytes or more. Of several who find that at
/// once, one does it.
pub(super) fn rotate(journal: &Path, at: u64) -> io::Result<()> {
    let Ok(found) = fs::metadata(journal) else {
        return Ok(());
    };
    if !found.is_file() || found.len() < at {
        return Ok(());
    }
    let lock = match Flock::lock(File::open(journal)?, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => lock,
        Err((_, Errno::EWOULDBLOCK)) => return Ok(()),
        Err((_, error)) => return Err(error.into()),
    };
    // Somebody else may have done it just before.
    if fs::metadata(journal)?.ino() != lock.metadata()?.ino() {
        return Ok(());
    }
    let aside = aside(journal)?;
    let next = aside.last().map_or(1, |(number, _)| number + 1);
    fs::rename(journal, numbered(journal, next))?;
    let left = aside.len().saturating_sub(KEPT as usize - 2);
    for (_, oldest) in &aside[..left] {
        fs::remove_file(oldest)?;
    }
    sync_directory(journal)
}

/// What was put aside, oldest first, by number.
pub(super) fn aside(journal: &Path) -> io::Result<Vec<(u64, PathBuf)>> {
    let (Some(directory), Some(name)) = (journal.parent(), journal.file_name()) else {
        return Ok(Vec::new());
    };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let file = entry.file_name();
        let number = file
            .to_str()
            .and_then(|file| file.strip_prefix(name.to_str()?)?.strip_prefix('.'))
            .filter(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
            .and_then(|number| number.parse().ok());
        found.extend(number.map(|number| (number, entry.path())));
    }
    found.sort();
    Ok(found)
}

/// The name under which a journal is put aside.
fn numbered(journal: &Path, number: u64) -> PathBuf {
    let mut name = journal.as_os_str().to_owned();
    name.push(format!(".{number}"));
    name.into()
}

/// Makes names in the journal's directory outlive a loss of power.
pub(super) fn sync_directory(journal: &Path) -> io::Result<()> {
    let directory = journal.parent().ok_or(io::ErrorKind::InvalidInput)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, thread};

    use super::*;
    use crate::journal::{Entry, Journal, all};

    fn directory(name: &str) -> PathBuf {
        let name = format!("bgswitch-rotation-{name}-{}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        directory
    }

    fn entry(detail: &str) -> Entry {
        Entry::new("root(0)", "llm", "canary", "result", 1, detail.to_owned())
    }

    fn details(journal: &Journal) -> Vec<String> {
        let entries = all(journal).into_iter();
        entries.map(|entry| entry.detail).collect()
    }

    #[test]
    fn the_newest_lines_are_kept_in_order_and_the_size_is_bounded() {
        let directory = directory("bounded");
        let max = 8 * 2000;
        let journal = Journal::rotating(&directory, max);
        for number in 0..1000 {
            journal.append(&entry(&number.to_string())).unwrap();
            let files = fs::read_dir(&directory).unwrap().flatten();
            let size: u64 = files.map(|file| file.metadata().unwrap().len()).sum();
            assert!(size <= max + 8 * 300, "{size}");
        }
        let kept = details(&journal);
        let first: usize = kept[0].parse().unwrap();
        let expected: Vec<String> = (first..1000).map(|number| number.to_string()).collect();
        assert_eq!(kept, expected, "no gap, in order, to the last one");
        assert!(kept.len() > 60, "{}", kept.len());
        // Whoever must not rotate, reads and writes the same.
        let beside = Journal::new(&directory);
        beside.append(&entry("beside")).unwrap();
        assert_eq!(details(&beside).last().unwrap(), "beside");
        fs::remove_dir_all(directory).unwrap();
    }

    /// Wherever a rotation is cut off: every line is there, once, and the next rotation
    /// goes on from there.
    #[test]
    fn a_kill_between_two_steps_loses_no_line() {
        let directory = directory("killed");
        let file = directory.join("journal.jsonl");
        let journal = Journal::rotating(&directory, 8 * 1000);
        for number in 0..9 {
            journal.append(&entry(&number.to_string())).unwrap();
        }
        let before = details(&journal);
        // Renamed, nothing written yet.
        fs::rename(&file, directory.join("journal.jsonl.77")).unwrap();
        assert_eq!(details(&journal), before);
        journal.append(&entry("9")).unwrap();
        assert_eq!(details(&journal).last().unwrap(), "9");
        // Renamed, and the oldest ones not removed yet: 12 of them.
        for number in 78..90 {
            let aside = directory.join(format!("journal.jsonl.{number}"));
            fs::copy(directory.join("journal.jsonl.77"), aside).unwrap();
        }
        for number in 10..20 {
            journal.append(&entry(&number.to_string())).unwrap();
        }
        let files = fs::read_dir(&directory).unwrap().count();
        assert_eq!(files as u64, KEPT);
        assert_eq!(details(&journal).last().unwrap(), "19");
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn writers_and_readers_at_once_miss_nothing() {
        let directory = directory("crowd");
        // Few rotations, so that nothing is old enough to go.
        let journal = Journal::rotating(&directory, 8 * 12_000);
        let writer = |name: usize| {
            let journal = journal.clone();
            move || {
                for number in 0..100 {
                    journal.append(&entry(&format!("{name}/{number}"))).unwrap();
                    let mine = format!("{name}/");
                    let read = details(&journal);
                    let seen = read.iter().filter(|line| line.starts_with(&mine)).count();
                    assert_eq!(seen, number + 1, "what was written is read");
                }
            }
        };
        let writers: Vec<_> = (0..4).map(|name| thread::spawn(writer(name))).collect();
        for writer in writers {
            writer.join().unwrap();
        }
        let read = details(&journal);
        assert_eq!(read.iter().collect::<BTreeSet<_>>().len(), 400);
        assert_eq!(read.len(), 400, "each once");
        assert!(fs::read_dir(&directory).unwrap().count() > 2, "it rotated");
        fs::remove_dir_all(directory).unwrap();
    }
}
