//! Carries out what the machines of releases ask for: each service with a release has
//! a task of its own, which hears of everything in order, keeps the machine on the
//! disk, and then acts. Nobody who flips or rolls back by hand waits for it.

use std::{
    collections::{BTreeMap, VecDeque},
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bg_common::service::Colour;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{mpsc, oneshot},
    task::AbortHandle,
};

use super::{
    Daemon,
    change::Order,
    gates::{self, Target},
    monitor::Told,
};
use crate::{
    api::{
        DecisionRequest, ExtendRequest, FlipRequest, Kind, Refusal, ReleaseReport, ReleaseRequest,
        ReleaseStatus, RollbackRequest, SCHEMA,
    },
    config::GatePlan,
    datapath::now_ns,
    journal::Entry,
    keeper::RESULT_WAIT,
    release::{By, Command, Event, Health, Machine, Note, Now, Release, Start, Word},
    switch, time,
};

/// How often a release looks at the clock, and at the health of its new colour.
const BEAT: Duration = Duration::from_secs(1);
/// A flip of a release is void so long after it was decided.
const FLIP_WITHIN_NS: u64 = 10_000_000_000;

/// The services with a release, by name.
#[derive(Debug, Default)]
pub(super) struct Desks(Mutex<BTreeMap<String, Desk>>);

/// The way to the task of a service.
#[derive(Clone, Debug)]
struct Desk {
    mailbox: mpsc::UnboundedSender<Post>,
    /// The machine, as it was kept last.
    shown: Arc<Mutex<Machine>>,
}

impl Desk {
    fn changed(&self, by: Option<&str>) {
        // Without its task, nobody acts on the word.
        let _ = self.mailbox.send(Post::Changed(by.map(str::to_owned)));
    }
}

#[derive(Debug)]
enum Post {
    /// Something happens; who asked for it may wait for the answer.
    Event(Event, Option<oneshot::Sender<Result<(), Refusal>>>),
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
        actor: &str,
        service: &str,
        request: ReleaseRequest,
    ) -> Result<ReleaseStatus, Refusal> {
        let known = self.config().services.get(service).cloned();
        let known = known.ok_or_else(|| self.unknown(service))?;
        let word = self.datapath.word(service);
        let word = word.ok_or_else(|| self.unknown(service))?;
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
            by: by(actor, request.why),
            to,
            version: request.version.or_else(|| configured.clone()),
            backends: self.backends(service, to),
            plan: known.release,
            watched: self.health(service, to).is_some(),
            force: request.force,
            word: word.into(),
        };
        self.ask(service, Event::Start(Box::new(start))).await
    }

    /// Decides about a release.
    pub(super) async fn decide(
        self: &Arc<Self>,
        actor: &str,
        service: &str,
        decision: Decision,
        request: DecisionRequest,
    ) -> Result<ReleaseStatus, Refusal> {
        if request.force && !matches!(decision, Decision::Resume) {
            let message = "force is only of use with resume";
            return Err(Refusal::new(Kind::Usage, message));
        }
        let by = by(actor, request.why);
        let event = match decision {
            Decision::Approve => Event::Approve(by),
            Decision::Reject => Event::Reject(by),
            Decision::Abort => Event::Abort(by),
            Decision::Pause => Event::Pause(by),
            Decision::Retire => Event::Retire(by),
            Decision::Resume => Event::Resume {
                by,
                force: request.force,
            },
        };
        self.ask(service, event).await
    }

    /// Holds the standby for longer.
    pub(super) async fn extend_standby(
        self: &Arc<Self>,
        actor: &str,
        service: &str,
        request: ExtendRequest,
    ) -> Result<ReleaseStatus, Refusal> {
        if request.by_s == 0 {
            let message = "by_s is missing: how many seconds longer?";
            return Err(Refusal::new(Kind::Usage, message));
        }
        let event = Event::Extend {
            by: by(actor, request.why),
            more: Duration::from_secs(request.by_s),
        };
        self.ask(service, event).await
    }

    /// Where the release of a service is.
    pub(super) fn release_status(&self, service: &str) -> Result<ReleaseStatus, Refusal> {
        let known = self.config().services.contains_key(service);
        let word = self.datapath.word(service).filter(|_| known);
        let word = word.ok_or_else(|| self.unknown(service))?;
        let machine = self.releases.shown(service);
        Ok(ReleaseStatus {
            schema: SCHEMA,
            service: service.to_owned(),
            active: word.active().as_str().to_owned(),
            state: machine.state().as_str().to_owned(),
            release: machine.release.as_ref().map(ReleaseReport::from),
        })
    }

    /// Tells the task of a service, and waits for its answer.
    async fn ask(self: &Arc<Self>, service: &str, event: Event) -> Result<ReleaseStatus, Refusal> {
        if !self.config().services.contains_key(service) {
            return Err(self.unknown(service));
        }
        let desk = self.desk(service, Machine::default(), None);
        let (answer, answered) = oneshot::channel();
        let ended = || Refusal::new(Kind::Failed, "the release's task has ended");
        desk.mailbox
            .send(Post::Event(event, Some(answer)))
            .map_err(|_| ended())?;
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
            mailbox: mailbox.clone(),
            shown: Arc::clone(&shown),
        };
        desks.insert(service.to_owned(), desk.clone());
        let attendant = Attendant {
            daemon: Arc::clone(self),
            service: service.to_owned(),
            told: last_note(&machine),
            machine,
            kept: Vec::new(),
            mailbox,
            shown,
            gate: None,
        };
        tokio::spawn(attendant.attend(post, resumed));
        desk
    }

    /// The health of a colour: `None` where there are no health checks. This is where
    /// they plug in.
    #[expect(clippy::unused_self, reason = "health checks belong to the daemon")]
    fn health(&self, _service: &str, _colour: Colour) -> Option<Health> {
        None
    }

    /// What of a colour must not change between its gates and its flip.
    fn backends(&self, service: &str, colour: Colour) -> Vec<String> {
        let config = self.config();
        let known = config.services.get(service);
        let backends = known.map_or(&[][..], |known| known.plan.backends(colour));
        backends
            .iter()
            .map(|backend| format!("{backend} weight {}", backend.weight))
            .collect()
    }

    fn release_directory(&self) -> PathBuf {
        self.config().gateway.paths.state_dir.join("releases")
    }
}

/// The task of a service.
struct Attendant {
    daemon: Arc<Daemon>,
    service: String,
    machine: Machine,
    /// The last note that was told: of which release, which one.
    told: (u64, u64),
    /// What the file says.
    kept: Vec<u8>,
    mailbox: mpsc::UnboundedSender<Post>,
    shown: Arc<Mutex<Machine>>,
    /// The gate that runs: its run, and how to stop it.
    gate: Option<(u32, AbortHandle)>,
}

impl Attendant {
    async fn attend(mut self, mut post: mpsc::UnboundedReceiver<Post>, resumed: Option<bool>) {
        if let Some(same_boot) = resumed {
            let word = self.word();
            let event = Event::Restarted { word, same_boot };
            // Nobody asked, so nobody is refused.
            let _ = self.step(event).await;
        }
        loop {
            let beat = self.machine.next_deadline().map(|at| {
                let left = Duration::from_millis(at.saturating_sub(time::since_boot_ms()));
                left.min(BEAT)
            });
            let next = match beat {
                None => post.recv().await,
                Some(beat) => {
                    let next = tokio::time::timeout(beat, post.recv()).await;
                    next.unwrap_or(Some(Post::Beat))
                }
            };
            let (event, answer) = match next {
                None => return,
                Some(Post::Event(event, answer)) => (event, answer),
                Some(Post::Changed(by)) => (self.look(by), None),
                Some(Post::Beat) => (self.beat(), None),
            };
            let done = self.step(event).await;
            if let Some(answer) = answer {
                // Who asked may have given up.
                let _ = answer.send(done);
            }
        }
    }

    /// Handles an event, and those that come of it: keep first, then act.
    async fn step(&mut self, event: Event) -> Result<(), Refusal> {
        let mut events = VecDeque::from([event]);
        let mut refused = Ok(());
        while let Some(event) = events.pop_front() {
            let todo = self.machine.handle(event, now());
            let unkept = self.keep().await;
            self.end_other_gates();
            for command in todo {
                match command {
                    Command::Refuse(refusal) => refused = Err(refusal),
                    Command::RunGate { run, gate } => self.run_gate(run, gate),
                    Command::Flip {
                        to,
                        from_generation,
                        force,
                    } => {
                        let flip = self.flip(to, from_generation, force, unkept.as_deref());
                        let done = flip.await;
                        events.push_back(self.look(None));
                        events.extend(done.err().map(|refusal| Event::NotFlipped { refusal }));
                    }
                    Command::RollBack {
                        leave,
                        from_generation,
                        why,
                    } => {
                        self.roll_back(leave, from_generation, why).await;
                        events.push_back(self.look(None));
                    }
                }
            }
        }
        refused
    }

    fn word(&self) -> Option<Word> {
        self.daemon.datapath.word(&self.service).map(Word::from)
    }

    /// What the kernel says now, whoever made it say so.
    fn look(&self, by: Option<String>) -> Event {
        Event::Word {
            word: self.word(),
            by,
        }
    }

    fn beat(&self) -> Event {
        match self.machine.release.as_ref().filter(|r| r.has_flipped()) {
            Some(release) => {
                let health = self.daemon.health(&self.service, release.to);
                Event::Health(health.unwrap_or_default())
            }
            None => Event::Tick,
        }
    }

    /// Keeps the machine on the disk, and tells what is new. Returns what did not
    /// work.
    async fn keep(&mut self) -> Option<String> {
        let kept = Kept {
            boot: time::boot_id(),
            machine: self.machine.clone(),
        };
        let warning = match serde_json::to_vec_pretty(&kept) {
            Ok(bytes) if bytes == self.kept => None,
            Ok(bytes) => {
                let file = file_of(&self.daemon.release_directory(), &self.service);
                let written = self.daemon.keeper.release(file, bytes.clone());
                let warning = written.within(RESULT_WAIT).await;
                if warning.is_none() {
                    self.kept = bytes;
                }
                warning
            }
            Err(error) => Some(format!("the release cannot be written down: {error}")),
        };
        locked(&self.shown).clone_from(&self.machine);
        self.tell();
        warning
    }

    /// Journals and logs the notes that are new.
    fn tell(&mut self) {
        let Some(release) = &self.machine.release else {
            return;
        };
        let (number, last) = self.told;
        let told = if number == release.number { last } else { 0 };
        let generation = self.word().map_or(0, |word| word.generation);
        for note in release.notes.iter().filter(|note| note.number > told) {
            self.tell_one(release, note, generation);
        }
        self.told = last_note(&self.machine);
    }

    fn tell_one(&self, release: &Release, note: &Note, generation: u16) {
        let detail = format!("{} {}: {}", release.id(), note.state.as_str(), note.text);
        tracing::info!("{}: release {detail}", self.service);
        let actor = note.actor.as_deref();
        let told = Told {
            generation: Some(generation),
            detail: detail.clone(),
            actor,
            why: note.why.as_ref(),
            store_ns: None,
        };
        self.daemon.tell(now_ns(), "release", &self.service, told);
        let actor = actor.unwrap_or("bgswitch");
        let entry = Entry {
            why: note.why.clone(),
            ..Entry::new(
                actor,
                &self.service,
                "release",
                "result",
                generation,
                detail,
            )
        };
        self.daemon.keeper.entry(entry).unattended();
    }

    /// Ends the gate that runs, unless it is the one that is waited for.
    fn end_other_gates(&mut self) {
        let wanted = self.machine.release.as_ref().and_then(Release::run);
        if let Some((run, gate)) = &self.gate
            && wanted != Some(*run)
        {
            gate.abort();
            self.gate = None;
        }
    }

    fn run_gate(&mut self, run: u32, gate: GatePlan) {
        let (Some(target), mailbox) = (self.target(), self.mailbox.clone()) else {
            // The word's look says that the service is gone.
            return;
        };
        let gate = tokio::spawn(async move {
            let outcome = gates::run(&gate, &target).await;
            // At the daemon's end, nobody waits for it.
            let _ = mailbox.send(Post::Event(Event::GateEnded { run, outcome }, None));
        });
        self.gate = Some((run, gate.abort_handle()));
    }

    /// What gates run against: the colour as it is configured now.
    fn target(&self) -> Option<Target> {
        let release = self.machine.release.as_ref()?;
        let plan = self
            .daemon
            .config()
            .services
            .get(&self.service)?
            .plan
            .clone();
        let mut target = Target {
            backends: plan.backends(release.to).to_vec(),
            plan,
            environment: Vec::new(),
        };
        let endpoints = target.endpoints(None).unwrap_or_default();
        let endpoints: Vec<String> = endpoints.iter().map(ToString::to_string).collect();
        target.environment = vec![
            ("BGSWITCH_SERVICE", self.service.clone()),
            ("BGSWITCH_RELEASE", release.id()),
            ("BGSWITCH_COLOUR", release.to.as_str().to_owned()),
            (
                "BGSWITCH_VERSION",
                release.version.clone().unwrap_or_default(),
            ),
            ("BGSWITCH_BACKENDS", endpoints.join(" ")),
        ];
        Some(target)
    }

    /// Flips as `bgswitch flip` does, in the name of who agreed to it.
    async fn flip(
        &self,
        to: Colour,
        from_generation: u16,
        force: bool,
        unkept: Option<&str>,
    ) -> Result<(), Refusal> {
        let Some(release) = &self.machine.release else {
            return Ok(());
        };
        if let Some(warning) = unkept.filter(|_| !force) {
            return Err(Refusal::new(Kind::Failed, warning));
        }
        if self.daemon.backends(&self.service, to) != release.backends {
            let message = format!(
                "{}'s backends have changed since the release began: begin another one",
                to.as_str()
            );
            return Err(Refusal::new(Kind::Conflict, message));
        }
        let version = release.version.as_deref().unwrap_or("no version named");
        let order = Order {
            actor: release.approved_by.as_ref().unwrap_or(&release.requester),
            service: &self.service,
            deadline_ns: Some(now_ns().saturating_add(FLIP_WITHIN_NS)),
        };
        let request = FlipRequest {
            to: Some(to.as_str().to_owned()),
            if_generation: Some(from_generation),
            force,
            why: Some(format!("release {} ({version})", release.id())),
            ..FlipRequest::default()
        };
        let flipped = Arc::clone(&self.daemon).flip(order, request).await?;
        self.warn(&flipped.warnings);
        Ok(())
    }

    /// Rolls back as `bgswitch rollback` does. What went wrong shows in the word.
    async fn roll_back(&self, leave: Colour, from_generation: u16, why: String) {
        let order = Order {
            actor: "bgswitch",
            service: &self.service,
            deadline_ns: None,
        };
        let request = RollbackRequest {
            leave: Some(leave.as_str().to_owned()),
            if_generation: Some(from_generation),
            why: Some(why),
            mode: None,
        };
        match Arc::clone(&self.daemon).rollback(order, request).await {
            Ok(flipped) => self.warn(&flipped.warnings),
            Err(refusal) => tracing::error!("{}: not rolled back: {refusal}", self.service),
        }
    }

    fn warn(&self, warnings: &[String]) {
        for warning in warnings {
            tracing::warn!("{}: {warning}", self.service);
        }
    }
}

fn by(actor: &str, why: Option<String>) -> By {
    By {
        actor: actor.to_owned(),
        why,
    }
}

fn now() -> Now {
    Now {
        ms: time::since_boot_ms(),
        unix_ms: time::unix_ms(),
    }
}

fn last_note(machine: &Machine) -> (u64, u64) {
    let release = machine.release.as_ref();
    release.map_or((0, 0), |release| {
        let note = release.notes.last().map_or(0, |note| note.number);
        (release.number, note)
    })
}

fn locked(shown: &Mutex<Machine>) -> MutexGuard<'_, Machine> {
    shown.lock().unwrap_or_else(PoisonError::into_inner)
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
