//! Writes the journal, the state file and the releases, in order, on a thread of its own: a
//! disk that is slow, or hangs, delays nobody longer than they choose to wait.

use std::{
    collections::BTreeMap,
    io, mem,
    path::PathBuf,
    sync::{Arc, Mutex, mpsc},
    thread,
    time::Duration,
};

use tokio::{sync::oneshot, time::timeout};

use crate::{
    journal::{Entry, Journal},
    locked,
    state::{self, State},
};

/// How long a change waits until its intent is on the disk.
pub const INTENT_WAIT: Duration = Duration::from_secs(2);
/// How long an answer waits until its result is on the disk.
pub const RESULT_WAIT: Duration = Duration::from_secs(1);

/// So much may wait for a disk that hangs; beyond it, only rollbacks do.
const WAITING: usize = 1024;

#[derive(Debug)]
enum Work {
    Entry(Entry),
    State(Box<State>),
    File(PathBuf, Vec<u8>),
}

impl Work {
    /// What is never left out: there is one only for each that somebody asked for.
    fn is_kept(&self) -> bool {
        matches!(self, Self::Entry(entry) if entry.action == "rollback")
    }
}

/// What waits, and what found no room.
#[derive(Debug, Default)]
struct Backlog {
    waiting: usize,
    /// Entries that were left out.
    dropped: u64,
    /// The newest state, and the newest text of each file: those before are void.
    state: Option<Box<State>>,
    files: BTreeMap<PathBuf, Vec<u8>>,
}

impl Backlog {
    /// Takes what found no room. An entry is counted.
    fn overflow(&mut self, work: Work) {
        match work {
            Work::Entry(_) => self.dropped += 1,
            Work::State(state) => self.state = Some(state),
            Work::File(file, bytes) => {
                self.files.insert(file, bytes);
            }
        }
    }

    /// Forgets what is older than this.
    fn supersede(&mut self, work: &Work) {
        match work {
            Work::Entry(_) => {}
            Work::State(_) => self.state = None,
            Work::File(file, _) => {
                self.files.remove(file);
            }
        }
    }

    /// What is to be written of it when nothing waits any more.
    fn rest(&mut self) -> Vec<Work> {
        let dropped = mem::take(&mut self.dropped);
        let lost = (dropped > 0).then(|| {
            let detail = format!("{dropped} entries were left out while the disk hung");
            tracing::error!("the journal: {detail}");
            Work::Entry(Entry::new("bgswitch", "*", "dropped", "result", 0, detail))
        });
        let files = mem::take(&mut self.files).into_iter();
        let files = files.map(|(file, bytes)| Work::File(file, bytes));
        lost.into_iter()
            .chain(self.state.take().map(Work::State))
            .chain(files)
            .collect()
    }
}

#[derive(Debug)]
struct Job {
    work: Work,
    done: oneshot::Sender<Option<String>>,
}

/// The way to the writing thread.
#[derive(Debug)]
pub struct Keeper {
    jobs: mpsc::Sender<Job>,
    backlog: Arc<Mutex<Backlog>>,
}

/// Something on its way to the disk.
#[derive(Debug)]
#[must_use = "what is not waited for may be lost with the process"]
pub struct Pending {
    what: &'static str,
    done: oneshot::Receiver<Option<String>>,
}

impl Keeper {
    /// Starts the thread.
    pub fn start(journal: Journal) -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel::<Job>();
        let backlog = Arc::<Mutex<Backlog>>::default();
        let behind = Arc::clone(&backlog);
        thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || {
                for job in queue {
                    let warning = write_or_warn(&journal, job.work);
                    // Nobody may wait any more.
                    let _ = job.done.send(warning);
                    for rest in done_with_one(&behind) {
                        write_or_warn(&journal, rest);
                    }
                }
            })?;
        Ok(Self { jobs, backlog })
    }

    /// Appends an entry to the journal.
    pub fn entry(&self, entry: Entry) -> Pending {
        self.write("the journal", Work::Entry(entry))
    }

    /// Writes the state file.
    pub fn state(&self, state: State) -> Pending {
        self.write("the state file", Work::State(Box::new(state)))
    }

    /// Writes the file of a release, whole or not at all.
    pub fn release(&self, file: PathBuf, bytes: Vec<u8>) -> Pending {
        self.write("the release's file", Work::File(file, bytes))
    }

    fn write(&self, what: &'static str, work: Work) -> Pending {
        let (sender, done) = oneshot::channel();
        let mut backlog = locked(&self.backlog);
        if backlog.waiting >= WAITING && !work.is_kept() {
            backlog.overflow(work);
            let warning = format!("{what} is not written: the disk hangs, {WAITING} writes wait");
            // Its receiver is below.
            let _ = sender.send(Some(warning));
            return Pending { what, done };
        }
        backlog.supersede(&work);
        backlog.waiting += 1;
        drop(backlog);
        // Without the thread, the waiting one sees the closed channel.
        let _ = self.jobs.send(Job { work, done: sender });
        Pending { what, done }
    }
}

/// One less waits; behind the last one comes what found no room.
fn done_with_one(backlog: &Mutex<Backlog>) -> Vec<Work> {
    let mut backlog = locked(backlog);
    backlog.waiting = backlog.waiting.saturating_sub(1);
    if backlog.waiting > 0 {
        return Vec::new();
    }
    backlog.rest()
}

fn write_or_warn(journal: &Journal, work: Work) -> Option<String> {
    let warning = write(journal, work).err()?.to_string();
    tracing::error!("{warning}");
    Some(warning)
}

fn write(journal: &Journal, work: Work) -> io::Result<()> {
    match work {
        Work::Entry(entry) => journal.append(&entry),
        Work::File(file, bytes) => state::replace(&file, &bytes).map_err(|error| {
            let message = format!("{} was not written: {error}", file.display());
            io::Error::new(error.kind(), message)
        }),
        Work::State(mut state) => {
            state.merge();
            state.save().map_err(|error| {
                let message = format!("the state file was not written: {error}");
                io::Error::new(error.kind(), message)
            })
        }
    }
}

impl Pending {
    /// Waits for it, and returns what went wrong.
    pub async fn within(self, limit: Duration) -> Option<String> {
        let what = self.what;
        match timeout(limit, self.done).await {
            Ok(Ok(warning)) => warning,
            Ok(Err(_)) => Some(format!("{what} was not written: its thread has ended")),
            Err(_) => Some(format!(
                "{what} is not written yet: the disk took longer than {}",
                humantime::format_duration(limit)
            )),
        }
    }

    /// Lets it be; what goes wrong is in the log.
    pub fn unattended(self) {}
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::OpenOptionsExt as _};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[test]
    fn a_disk_that_hangs_fills_no_memory_and_costs_no_rollback() {
        let directory =
            std::env::temp_dir().join(format!("bgswitch-keeper-{}", std::process::id()));
        let _ = fs::remove_dir_all(&directory);
        fs::create_dir_all(&directory).unwrap();
        let state = State::load(&directory);
        let journal = Journal::new(&directory);
        let keeper = Keeper::start(journal.clone()).unwrap();
        let entry = |action: &str, number: usize| {
            let detail = number.to_string();
            keeper.entry(Entry::new("root(0)", "llm", action, "result", 0, detail))
        };
        // Whoever writes it waits until it is read.
        let fifo = directory.join(format!("state.json.{}", std::process::id()));
        mkfifo(&fifo, Mode::S_IRWXU).unwrap();
        keeper.state(state.clone()).unattended();
        let (falls, rollbacks) = (3000, 20);
        for number in 0..falls {
            entry("fall", number).unattended();
        }
        for number in 0..rollbacks {
            entry("rollback", number).unattended();
        }
        let mut later = state;
        later
            .services
            .insert("late".to_owned(), state::Service::default());
        keeper.state(later).unattended();
        let file = directory.join("releases/llm.json");
        for text in ["older", "newest"] {
            keeper.release(file.clone(), text.into()).unattended();
        }
        assert_eq!(locked(&keeper.backlog).waiting, WAITING + rollbacks);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let flip = runtime.block_on(entry("flip", 0).within(INTENT_WAIT));
        let refused = "the journal is not written: the disk hangs, 1024 writes wait";
        assert_eq!(flip.as_deref(), Some(refused), "at once");

        let reader = fs::OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&fifo)
            .unwrap();
        fs::remove_file(&fifo).unwrap();
        let last = runtime.block_on(entry("rollback", rollbacks).within(Duration::from_mins(1)));
        assert_eq!(last, None);
        drop(reader);
        while locked(&keeper.backlog).dropped > 0 || !file.exists() {
            thread::yield_now();
        }
        let entries = crate::journal::all(&journal);
        let of = |action: &str| -> Vec<&str> {
            let of = entries.iter().filter(|entry| entry.action == action);
            of.map(|entry| entry.detail.as_str()).collect()
        };
        // One place was the state's.
        let kept: Vec<String> = (0..WAITING - 1).map(|number| number.to_string()).collect();
        assert_eq!(of("fall"), kept, "the oldest ones, in order");
        let all: Vec<String> = (0..=rollbacks).map(|number| number.to_string()).collect();
        assert_eq!(of("rollback"), all, "every one");
        let left_out = falls - (WAITING - 1) + 1;
        let said = format!("{left_out} entries were left out while the disk hung");
        assert_eq!(of("dropped"), [said]);
        assert_eq!(fs::read_to_string(&file).unwrap(), "newest");
        assert!(State::load(&directory).services.contains_key("late"));
        fs::remove_dir_all(directory).unwrap();
    }
}
