//! Writes the journal, the state file and the releases, in order, on a thread of its own: a
//! disk that is slow, or hangs, delays nobody longer than they choose to wait.

use std::{io, path::PathBuf, sync::mpsc, thread, time::Duration};

use tokio::{sync::oneshot, time::timeout};

use crate::{
    journal::{Entry, Journal},
    state::{self, State},
};

/// How long a change waits until its intent is on the disk.
pub const INTENT_WAIT: Duration = Duration::from_secs(2);
/// How long an answer waits until its result is on the disk.
pub const RESULT_WAIT: Duration = Duration::from_secs(1);

enum Work {
    Entry(Entry),
    State(Box<State>),
    File(PathBuf, Vec<u8>),
}

struct Job {
    work: Work,
    done: oneshot::Sender<Option<String>>,
}

/// The way to the writing thread.
#[derive(Debug)]
pub struct Keeper {
    jobs: mpsc::Sender<Job>,
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
        thread::Builder::new()
            .name("keeper".to_owned())
            .spawn(move || {
                for job in queue {
                    let warning = write(&journal, job.work).err().map(|e| e.to_string());
                    if let Some(warning) = &warning {
                        tracing::error!("{warning}");
                    }
                    // Nobody may wait any more.
                    let _ = job.done.send(warning);
                }
            })?;
        Ok(Self { jobs })
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
        // Without the thread, the waiting one sees the closed channel.
        let _ = self.jobs.send(Job { work, done: sender });
        Pending { what, done }
    }
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
