//! Carries out what the machines of releases ask for: each service with a release has
//! a task of its own, which hears of everything in order, keeps the machine on the
//! disk, and then acts. Nobody who flips or rolls back by hand waits for it.

mod attendant;
mod rules;

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bg_common::service::Colour;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use self::attendant::Attendant;
use super::{Daemon, change::Order, gates::Progress};
use crate::{
    api::{
        DecisionRequest, ExtendRequest, Kind, Refusal, ReleaseReport, ReleaseRequest,
        ReleaseStatus, SCHEMA,
    },
    locked,
    release::{By, Event, Machine, Start},
    switch, time,
};

/// The services with a release, by name.
#[derive(Debug, Default)]
pub(super) struct Desks(Mutex<BTreeMap<String, Desk>>);

/// The way to the task of a service.
#[derive(Clone, Debug)]
struct Desk {
    mailbox: mpsc::UnboundedSender<Post>,
    /// The machine, as it was kept last.
    shown: Arc<Mutex<Machine>>,
    /// What the gate that runs says.
    progress: Progress,
}

impl Desk {
    fn changed(&self, by: Option<&str>) {
        // Without its task, nobody acts on the word.
        let _ = self.mailbox.send(Post::Changed(by.map(str::to_owned)));
    }
}

/// Who waits for an answer.
#[derive(Debug)]
struct Asked {
    answer: oneshot::Sender<Result<(), Refusal>>,
    /// What was asked for is void from then on (`CLOCK_MONOTONIC`, ns).
    deadline_ns: Option<u64>,
}

#[derive(Debug)]
enum Post {
    /// A gate is over.
    Event(Event),
    /// Somebody asks for something.
    Asked(Event, Asked),
    /// The word was changed, and by whom.
    Changed(Option<String>),
    /// Time goes by.
    Beat,
}

/// What the file of a service says.
#[derive(Default, Serialize, Deserialize)]
struct Kept {
    /// The boot that times belong to.
    boot: String,
    machine: Machine,
}

/// Who may decide what.
#[derive(Clone, Copy, Debug)]
pub(super) enum Decision {
    Approve,
    Reject,
    Abort,
    Pause,
    Resume,
    Retire,
}

impl Desks {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Desk>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The release of a service, as it was kept last.
    pub(super) fn shown(&self, service: &str) -> Machine {
        let desk = self.lock().get(service).cloned();
        let shown = desk.map(|desk| desk.shown);
        shown.map_or_else(Machine::default, |shown| locked(&shown).clone())
    }

    /// What the gate that runs says of how far it is.
    fn progress(&self, service: &str, machine: &Machine) -> Option<String> {
        let release = machine.release.as_ref()?;
        let says = release.run().is_some() || release.is_watched();
        if !says {
            return None;
        }
        let said = self.lock().get(service)?.progress.said();
        Some(said).filter(|said| !said.is_empty())
    }

    /// Tells a release that the word was changed. Waits for nobody.
    pub(super) fn word_changed(&self, service: &str, by: Option<&str>) {
        if let Some(desk) = self.lock().get(service) {
            desk.changed(by);
        }
    }

    /// Tells all releases that services may have come and gone. Waits for nobody.
    pub(super) fn services_changed(&self) {
        for desk in self.lock().values() {
            desk.changed(None);
        }
    }
}

impl Daemon {
    /// Takes the releases up that were kept: before anybody can ask for another one.
    pub(super) fn resume_releases(self: &Arc<Self>) {
        for (service, kept) in kept(&self.release_directory()) {
            let same_boot = kept.boot == time::boot_id();
            self.desk(&service, kept.machine, Some(same_boot));
        }
    }

    /// Begins a release.
    pub(super) async fn start_release(
        self: &Arc<Self>,
        order: &Order<'_>,
        request: ReleaseRequest,
    ) -> Result<ReleaseStatus, Refusal> {
        let service = order.service;
        let known = self.config().services.get(service).cloned();
        let known = known.ok_or_else(|| self.unknown(service))?;
        let word = self.datapath.word(service);
        let word = word.ok_or_else(|| self.unknown(service))?;
        switch::at_generation(service, word, request.if_generation)?;
        let to = request.to.as_deref().map(switch::colour).transpose()?;
        let to = to.unwrap_or_else(|| word.active().other());
        let configured = &known.versions[to as usize];
        if let (Some(asked), Some(configured)) = (&request.version, configured)
            && asked != configured
        {
            let message = format!(
                "{service}'s {} is configured as {configured}, not {asked}: nothing was begun. Change the \
                 file and `bgswitch reload`, or leave --version out",
                to.as_str()
            );
            return Err(Refusal::new(Kind::Usage, message));
        }
        let start = Start {
            by: by(order.actor, request.why),
            to,
            version: request.version.or_else(|| configured.clone()),
            tested: self.tested(service, to),
            plan: known.release,
            watched: self.colour_health(service, to).is_some(),
            force: request.force,
            word: word.into(),
        };
        self.ask(order, Event::Start(Box::new(start))).await
    }

    /// Decides about a release.
    pub(super) async fn decide(
        self: &Arc<Self>,
        order: &Order<'_>,
        decision: Decision,
        request: DecisionRequest,
    ) -> Result<ReleaseStatus, Refusal> {
        if request.force && !matches!(decision, Decision::Resume | Decision::Retire) {
            let message = "force is only of use with resume and retire";
            return Err(Refusal::new(Kind::Usage, message));
        }
        let by = by(order.actor, request.why);
        let event = match decision {
            Decision::Approve => Event::Approve(by),
            Decision::Reject => Event::Reject(by),
            Decision::Abort => Event::Abort(by),
            Decision::Pause => Event::Pause(by),
            Decision::Retire => Event::Retire {
                by,
                force: request.force,
            },
            Decision::Resume => Event::Resume {
                by,
                force: request.force,
            },
        };
        self.ask(order, event).await
    }

    /// Holds the standby for longer.
    pub(super) async fn extend_standby(
        self: &Arc<Self>,
        order: &Order<'_>,
        request: ExtendRequest,
    ) -> Result<ReleaseStatus, Refusal> {
        if request.by_s == 0 {
            let message = "by_s is missing: how many seconds longer?";
            return Err(Refusal::new(Kind::Usage, message));
        }
        let event = Event::Extend {
            by: by(order.actor, request.why),
            more: Duration::from_secs(request.by_s),
        };
        self.ask(order, event).await
    }

    /// Where the release of a service is.
    pub(super) fn release_status(&self, service: &str) -> Result<ReleaseStatus, Refusal> {
        let known = self.config().services.contains_key(service);
        let word = self.datapath.word(service).filter(|_| known);
        let word = word.ok_or_else(|| self.unknown(service))?;
        let machine = self.releases.shown(service);
        let mut release = machine.release.as_ref().map(ReleaseReport::from);
        if let Some(release) = &mut release {
            release.progress = self.releases.progress(service, &machine);
        }
        Ok(ReleaseStatus {
            schema: SCHEMA,
            service: service.to_owned(),
            active: word.active().as_str().to_owned(),
            generation: word.generation(),
            state: machine.state().as_str().to_owned(),
            release,
        })
    }

    /// Tells the task of a service, and waits for its answer.
    async fn ask(
        self: &Arc<Self>,
        order: &Order<'_>,
        event: Event,
    ) -> Result<ReleaseStatus, Refusal> {
        let service = order.service;
        if !self.config().services.contains_key(service) {
            return Err(self.unknown(service));
        }
        let desk = self.desk(service, Machine::default(), None);
        let (answer, answered) = oneshot::channel();
        let asked = Asked {
            answer,
            deadline_ns: order.deadline_ns,
        };
        let ended = || Refusal::new(Kind::Failed, "the release's task has ended");
        let posted = desk.mailbox.send(Post::Asked(event, asked));
        posted.map_err(|_| ended())?;
        answered.await.unwrap_or_else(|_| Err(ended()))?;
        self.release_status(service)
    }

    /// The desk of a service, with a task. A new one begins with `machine`; `resumed`
    /// says that it comes from a file, and whether of this boot.
    fn desk(self: &Arc<Self>, service: &str, machine: Machine, resumed: Option<bool>) -> Desk {
        let mut desks = self.releases.lock();
        if let Some(desk) = desks.get(service) {
            return desk.clone();
        }
        let (mailbox, post) = mpsc::unbounded_channel();
        let shown = Arc::new(Mutex::new(machine.clone()));
        let desk = Desk {
            mailbox,
            shown,
            progress: Progress::default(),
        };
        desks.insert(service.to_owned(), desk.clone());
        let attendant = Attendant::new(self, service, machine, &desk);
        tokio::spawn(attendant.attend(post, resumed));
        desk
    }

    /// What of a colour must not change between its gates and its flip.
    fn tested(&self, service: &str, colour: Colour) -> Vec<String> {
        let config = self.config();
        let Some(known) = config.services.get(service) else {
            return Vec::new();
        };
        let backends = known.plan.backends(colour).iter();
        let backends = backends.map(|backend| format!("{backend} weight {}", backend.weight));
        let listeners = known.plan.listeners.iter().map(ToString::to_string);
        let version = known.versions[colour as usize].iter().cloned();
        backends.chain(listeners).chain(version).collect()
    }

    fn release_directory(&self) -> PathBuf {
        self.config().gateway.paths.state_dir.join("releases")
    }
}

fn by(actor: &str, why: Option<String>) -> By {
    By {
        actor: actor.to_owned(),
        why,
    }
}

fn file_of(directory: &Path, service: &str) -> PathBuf {
    directory.join(format!("{service}.json"))
}

/// The releases in a directory, by service. A file that cannot be read is put aside,
/// with a warning: the word says what serves, whatever a release wanted.
fn kept(directory: &Path) -> Vec<(String, Kept)> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut all = Vec::new();
    for path in entries.map(|entry| entry.path()) {
        let service = path.file_stem().and_then(|stem| stem.to_str());
        let is_json = path
            .extension()
            .is_some_and(|extension| extension == "json");
        let Some(service) = service.filter(|_| is_json) else {
            continue;
        };
        match fs::read(&path)
            .and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).map_err(io::Error::from))
        {
            Ok(kept) => all.push((service.to_owned(), kept)),
            Err(error) => {
                let aside = path.with_extension("json.bad");
                tracing::warn!(
                    "{} cannot be read ({error}): put aside as {}",
                    path.display(),
                    aside.display()
                );
                let _ = fs::rename(&path, aside);
            }
        }
    }
    all
}
