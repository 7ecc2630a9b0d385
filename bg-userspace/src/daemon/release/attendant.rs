//! The task of a service's releases: hears, keeps, acts.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use bg_common::service::Colour;
use tokio::{
    sync::mpsc,
    task::{AbortHandle, spawn_blocking},
    time::{Instant, timeout_at},
};

use super::{Desk, Kept, Post, file_of, rules::Rules};
use crate::{
    api::{CanaryRequest, FlipRequest, Kind, Refusal, RollbackRequest},
    config::{FlipMode, GatePlan, When},
    daemon::{
        Daemon,
        change::Order,
        gates::{self, Moment, Progress, Target},
        metrics::Trigger,
        monitor::Told,
    },
    datapath::now_ns,
    figures::Standing,
    journal::{Entry, Wanted},
    keeper::RESULT_WAIT,
    locked,
    release::{Command, Event, Health, Machine, Note, Now, Release, State, Word},
    signals::{Hearing, Listener},
    switch, time,
};

/// How often a release looks at the clock, and at the health of its new colour.
const BEAT: Duration = Duration::from_secs(1);
/// So many of the journal's newest lines of a service are looked through, after a start, for
/// the newest one of its release.
const JOURNALLED: usize = 1000;
/// A flip of a release is void so long after it was decided.
const FLIP_WITHIN_NS: u64 = 10_000_000_000;

/// The task of a service.
pub(super) struct Attendant {
    daemon: Arc<Daemon>,
    service: String,
    machine: Machine,
    /// The last note that was told: of which release, which one.
    told: (u64, u64),
    /// What the file says.
    kept: Vec<u8>,
    mailbox: mpsc::UnboundedSender<Post>,
    shown: Arc<Mutex<Machine>>,
    progress: Progress,
    /// A store waits for what health checks say first.
    waits: bool,
    /// The gate that runs: its run, and how to stop it.
    gate: Option<(u32, AbortHandle)>,
    /// Hooks behind steps that run, by their run.
    hooks: BTreeMap<u32, AbortHandle>,
    /// Listens to the new colour, in this [`Release::part`].
    ear: Option<((u64, Option<usize>), Listener)>,
    /// Asks for figures of that colour.
    rules: Option<Rules>,
}

impl Attendant {
    pub(super) fn new(daemon: &Arc<Daemon>, service: &str, machine: Machine, desk: &Desk) -> Self {
        Self {
            daemon: Arc::clone(daemon),
            service: service.to_owned(),
            told: last_note(&machine),
            machine,
            kept: Vec::new(),
            mailbox: desk.mailbox.clone(),
            shown: Arc::clone(&desk.shown),
            progress: desk.progress.clone(),
            waits: false,
            gate: None,
            hooks: BTreeMap::new(),
            ear: None,
            rules: None,
        }
    }

    pub(super) async fn attend(
        mut self,
        mut post: mpsc::UnboundedReceiver<Post>,
        resumed: Option<bool>,
    ) {
        if let Some(same_boot) = resumed {
            self.told = self.journalled().await;
            let word = self.word();
            let event = Event::Restarted { word, same_boot };
            let _ = self.step(event).await;
        }
        let mut looked = Instant::now();
        loop {
            let next = match self.machine.next_deadline() {
                None => post.recv().await,
                // Whoever asks all the time keeps nobody from looking.
                Some(_) if looked.elapsed() >= BEAT => Some(Post::Beat),
                Some(at) => {
                    let left = Duration::from_millis(at.saturating_sub(time::since_boot_ms()));
                    let due = (Instant::now() + left).min(looked + BEAT);
                    let next = timeout_at(due, post.recv()).await;
                    next.unwrap_or(Some(Post::Beat))
                }
            };
            let event = match next {
                None => return,
                Some(Post::Asked(event, asked)) => {
                    let done = self.asked(event, asked.deadline_ns).await;
                    // Who asked may have given up.
                    let _ = asked.answer.send(done);
                    continue;
                }
                Some(Post::Event(event)) => {
                    // Whoever stored another word meanwhile, comes first here, too.
                    let _ = self.step(self.look(None)).await;
                    event
                }
                Some(Post::Changed(by)) => self.look(by),
                Some(Post::Beat) => {
                    self.beat().await;
                    looked = Instant::now();
                    continue;
                }
            };
            // Nobody asked, so nobody is refused.
            let _ = self.step(event).await;
        }
    }

    /// Who has given up did not ask.
    async fn asked(&mut self, event: Event, deadline_ns: Option<u64>) -> Result<(), Refusal> {
        if deadline_ns.is_some_and(|deadline| now_ns() >= deadline) {
            let message = "it was asked for too long ago: nothing was changed";
            return Err(Refusal::new(Kind::TimedOut, message));
        }
        // Whoever stored another word meanwhile, also without the daemon, comes first.
        let _ = self.step(self.look(None)).await;
        // And so does who fell since the last look.
        if let Some([old, Some(ill @ Health::Ill(_))]) = self.healths() {
            let _ = self.step(Event::OldHealth(old.unwrap_or_default())).await;
            let _ = self.step(Event::Health(ill)).await;
        }
        if let Event::Start(start) = &event
            && self.word() != Some(start.word)
        {
            let message = "somebody flipped, or set a share, meanwhile: nothing was begun";
            return Err(Refusal::new(Kind::StaleGeneration, message));
        }
        self.step(event).await
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
                    Command::RunGate {
                        run,
                        gate,
                        colour,
                        when,
                    } => self.run_gate(run, gate, colour, when),
                    Command::Flip {
                        to,
                        from_generation,
                        force,
                    } => {
                        if !force && self.is_not_known_yet(to) {
                            events.push_back(Event::NotYet);
                            continue;
                        }
                        let unkept = self.listen(to.other(), unkept.clone()).await;
                        let flip = self.flip(to, from_generation, force, unkept.as_deref());
                        let done = flip.await;
                        events.push_back(self.look(None));
                        events.extend(done.err().map(|refusal| Event::NotStored { refusal }));
                    }
                    Command::Canary {
                        to,
                        percent,
                        from_generation,
                        force,
                    } => {
                        if !force && self.is_not_known_yet(to) {
                            events.push_back(Event::NotYet);
                            continue;
                        }
                        let unkept = self.listen(to.other(), unkept.clone()).await;
                        let request = CanaryRequest {
                            percent: Some(percent.percent()),
                            if_generation: Some(from_generation),
                            force,
                            ..CanaryRequest::default()
                        };
                        let done = self.raise(to, request, unkept.as_deref()).await;
                        events.push_back(self.look(None));
                        events.extend(done.err().map(|refusal| Event::NotStored { refusal }));
                    }
                    Command::RollBack {
                        leave,
                        from_generation,
                        drains,
                        why,
                    } => {
                        self.roll_back(leave, from_generation, drains, why).await;
                        events.push_back(self.look(None));
                    }
                }
            }
        }
        refused
    }

    /// True while a store would be refused because health checks have not said anything of a
    /// colour yet; then it is tried again at the next look.
    fn is_not_known_yet(&mut self, colour: Colour) -> bool {
        let health = self.daemon.colour_health(&self.service, colour);
        self.waits =
            health == Some(Health::Unknown) && self.daemon.has_no_healthy(&self.service, colour);
        self.waits
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

    /// How the old and the new colour are by their probes, while a release looks at them.
    fn healths(&self) -> Option<[Option<Health>; 2]> {
        let release = self.machine.release.as_ref()?;
        let health = |colour| self.daemon.colour_health(&self.service, colour);
        release
            .is_looked_at()
            .then(|| [health(release.from), health(release.to)])
    }

    /// Looks at the word, then at both colours, and at the clock. Nobody is refused.
    async fn beat(&mut self) {
        let _ = self.step(self.look(None)).await;
        if std::mem::take(&mut self.waits) {
            let _ = self.step(Event::Again).await;
        }
        let Some([old, new]) = self.healths() else {
            let _ = self.step(Event::Tick).await;
            return;
        };
        if new.is_none() {
            let _ = self.step(Event::Unwatched).await;
        }
        let _ = self.step(Event::OldHealth(old.unwrap_or_default())).await;
        let event = match (new, self.hear(), self.figures()) {
            (_, Some(Hearing::Failing(why)), _) => Event::Failing(why),
            (Some(Health::Ill(why)), ..)
            | (_, Some(Hearing::Slow(why)), _)
            | (.., Some(Standing::Broken(why))) => Event::Health(Health::Ill(why)),
            // Each rule must be known to hold, and one that does is no answer that a client got.
            (.., Some(Standing::Unknown)) | (None, Some(Hearing::Silent), _) => {
                Event::Health(Health::Unknown)
            }
            (None, Some(Hearing::Well), _) | (None, _, Some(Standing::Holds)) => {
                Event::Health(Health::Well)
            }
            (health, ..) => Event::Health(health.unwrap_or_default()),
        };
        let _ = self.step(event).await;
    }

    /// What the packet path hears of the new colour, if it is listened to. Begins with the
    /// flip, or anew where the daemon began anew.
    fn hear(&mut self) -> Option<Hearing> {
        let release = self.machine.release.as_ref()?;
        let plan = release.plan.bake.signals?;
        let heard = self.daemon.datapath.heard(&self.service)?;
        let heard = &heard[release.to as usize];
        let part = release.part();
        if self.ear.as_ref().is_none_or(|(of, _)| *of != part) {
            let baseline = release.baseline.unwrap_or_default();
            self.ear = Some((part, Listener::new(plan, baseline, *heard)));
        }
        self.ear.as_mut().map(|(_, listener)| listener.look(heard))
    }

    /// What the figures say of the new colour, if there are rules. Begins anew with each
    /// step. While the old one is held, nobody waits until they are known.
    fn figures(&mut self) -> Option<Standing> {
        let release = self.machine.release.as_ref()?;
        let plan = release.plan.prometheus.as_ref()?;
        let is_held = release.state() == State::Standby;
        let rules = self.rules.as_ref();
        if rules.is_none_or(|rules| !rules.are_of(release)) {
            self.rules = Some(Rules::new(&self.service, release, plan));
        }
        let rules = self.rules.as_ref()?;
        if release.is_watched() {
            self.progress.say(rules.said());
        }
        let standing = rules.standing();
        (!is_held || standing != Standing::Unknown).then_some(standing)
    }

    /// Begins to listen before a store: what happens right behind it counts, too. How the
    /// old colour was is taken before any new flow goes to the other one, and kept: it
    /// outlives a kill right behind the store. Returns what is not kept, `unkept` before.
    async fn listen(&mut self, old: Colour, unkept: Option<String>) -> Option<String> {
        if let Some(baseline) = self.daemon.baseline(&self.service, old) {
            self.machine.compare_with(baseline);
        }
        let _ = self.hear();
        match unkept {
            None => self.keep().await,
            unkept => unkept,
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

    /// Journals and logs the notes that are new, those of a release that gave way first.
    fn tell(&mut self) {
        let replaced = self.machine.replaced.take();
        for release in replaced.as_deref().into_iter().chain(&self.machine.release) {
            self.tell_of(release);
        }
        self.told = last_note(&self.machine);
    }

    fn tell_of(&self, release: &Release) {
        let (number, last) = self.told;
        let told = if number == release.number { last } else { 0 };
        let generation = self.word().map_or(0, |word| word.generation);
        for note in release.notes.iter().filter(|note| note.number > told) {
            self.tell_one(release, note, generation);
        }
    }

    /// The last note that is in the journal: a kill may have come between the file and it.
    async fn journalled(&self) -> (u64, u64) {
        let all = last_note(&self.machine);
        let Some(release) = &self.machine.release else {
            return all;
        };
        let wanted = Wanted {
            limit: JOURNALLED,
            since_ms: release.notes.first().map(|note| note.unix_ms),
            service: Some(self.service.clone()),
        };
        let journal = Arc::clone(&self.daemon);
        let read = spawn_blocking(move || journal.journal.last(&wanted)).await;
        // What cannot be read gets no line twice.
        let Ok(Ok(read)) = read else {
            return all;
        };
        let mut entries = read.entries.iter().rev();
        let newest = entries.find_map(|entry| {
            let is_of_release = entry.action == "release" && entry.service == self.service;
            is_of_release.then(|| last_of(release, &entry.detail))?
        });
        match newest {
            Some(note) => (release.number, note),
            // It was long ago.
            None if read.more || release.state().is_over() => all,
            None => (release.number, 0),
        }
    }

    fn tell_one(&self, release: &Release, note: &Note, generation: u16) {
        let detail = detail(release, note);
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
            self.progress.say(String::new());
        }
        let release = self.machine.release.as_ref();
        if !release.is_some_and(Release::is_looked_at) {
            self.rules = None;
        }
        self.hooks.retain(|run, hook| {
            let is_awaited = release.is_some_and(|release| release.awaits(*run));
            if !is_awaited {
                hook.abort();
            }
            is_awaited
        });
    }

    /// Runs a gate, or a hook: one behind a step runs aside.
    fn run_gate(&mut self, run: u32, gate: GatePlan, colour: Colour, when: Option<When>) {
        let (Some(mut target), mailbox) = (self.target(colour), self.mailbox.clone()) else {
            // The word's look says that the service is gone.
            return;
        };
        let is_aside = when.is_some_and(|when| !when.is_before());
        let progress = if is_aside {
            Progress::default()
        } else {
            self.progress.say(String::new());
            self.progress.clone()
        };
        let state = self.machine.state();
        let (daemon, service) = (Arc::clone(&self.daemon), self.service.clone());
        let gate = tokio::spawn(async move {
            if let Some(when) = when {
                target.hook = daemon.moment(&service, when, state).await;
            }
            let outcome = gates::run(&gate, &target, &progress).await;
            daemon.metrics.gate(&service, &gate.name, &outcome);
            // At the daemon's end, nobody waits for it.
            let _ = mailbox.send(Post::Event(Event::GateEnded { run, outcome }));
        });
        if is_aside {
            self.hooks.insert(run, gate.abort_handle());
        } else {
            self.gate = Some((run, gate.abort_handle()));
        }
    }

    /// What gates run against: the colour as it is configured now.
    fn target(&self, colour: Colour) -> Option<Target> {
        let release = self.machine.release.as_ref()?;
        let service = self.daemon.config().services.get(&self.service)?.clone();
        let mut versions = service.versions;
        versions[release.to as usize].clone_from(&release.version);
        Some(Target {
            plan: service.plan,
            colour,
            release: release.id(),
            versions,
            hook: None,
        })
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
        // No reload may come between this look and the flip.
        let _still = self.daemon.reloading.lock().await;
        self.may_store(release, to, force, unkept)?;
        let request = FlipRequest {
            to: Some(to.as_str().to_owned()),
            if_generation: Some(from_generation),
            if_share: Some(release.seen_share()),
            force,
            why: Some(why(release)),
            ..FlipRequest::default()
        };
        let order = self.order(release);
        let flipped = self.daemon.counted_flip(order, request).await?;
        self.warn(&flipped.warnings);
        Ok(())
    }

    /// Stores a share as `bgswitch canary` does, in the same name.
    async fn raise(
        &self,
        to: Colour,
        request: CanaryRequest,
        unkept: Option<&str>,
    ) -> Result<(), Refusal> {
        let Some(release) = &self.machine.release else {
            return Ok(());
        };
        let _still = self.daemon.reloading.lock().await;
        self.may_store(release, to, request.force, unkept)?;
        let request = CanaryRequest {
            if_share: Some(release.seen_share()),
            why: Some(why(release)),
            ..request
        };
        let order = self.order(release);
        let raised = Arc::clone(&self.daemon).canary(order, request).await?;
        self.warn(&raised.warnings);
        Ok(())
    }

    /// Refuses what was not kept, and what its gates have not seen.
    fn may_store(
        &self,
        release: &Release,
        to: Colour,
        force: bool,
        unkept: Option<&str>,
    ) -> Result<(), Refusal> {
        if let Some(warning) = unkept.filter(|_| !force) {
            return Err(Refusal::new(Kind::Failed, warning));
        }
        if self.daemon.tested(&self.service, to) != release.tested {
            let message = format!(
                "{}'s backends have changed since the release began, or listeners or its version: begin \
                 another one",
                to.as_str()
            );
            return Err(Refusal::new(Kind::Conflict, message));
        }
        Ok(())
    }

    /// In the name of who agreed to the flip.
    fn order<'a>(&'a self, release: &'a Release) -> Order<'a> {
        Order {
            actor: release.approved_by.as_ref().unwrap_or(&release.requester),
            trigger: Trigger::Release,
            service: &self.service,
            deadline_ns: Some(now_ns().saturating_add(FLIP_WITHIN_NS)),
        }
    }

    /// Rolls back as `bgswitch rollback` does. What went wrong shows in the word.
    async fn roll_back(&self, leave: Colour, from_generation: u16, drains: bool, why: String) {
        let order = Order {
            actor: "bgswitch",
            trigger: if drains {
                Trigger::Release
            } else {
                Trigger::Automatic
            },
            service: &self.service,
            deadline_ns: None,
        };
        let request = RollbackRequest {
            leave: Some(leave.as_str().to_owned()),
            if_generation: Some(from_generation),
            why: Some(why),
            mode: drains.then_some(FlipMode::Drain),
        };
        match self.daemon.counted_rollback(order, request).await {
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

/// Why a word is stored, for the journal.
fn why(release: &Release) -> String {
    let version = release.version.as_deref().unwrap_or("no version named");
    format!("release {} ({version})", release.id())
}

impl Daemon {
    /// What a hook is told of this moment.
    async fn moment(self: &Arc<Self>, service: &str, when: When, state: State) -> Option<Moment> {
        let word = self.datapath.word(service)?;
        let flows = Colour::ALL.map(|colour| self.count_flows(service, colour));
        let [blue, green] = flows;
        let (blue, green) = tokio::join!(blue, green);
        Some(Moment {
            when,
            state,
            active: word.active(),
            canary_percent: switch::percent(word.canary()),
            flows: [blue, green],
        })
    }
}

fn now() -> Now {
    Now {
        ms: time::since_boot_ms(),
        unix_ms: time::unix_ms(),
    }
}

/// A note, as the journal has it.
fn detail(release: &Release, note: &Note) -> String {
    format!("{} {}: {}", release.id(), note.state.as_str(), note.text)
}

/// The number of the newest note that is this in the journal.
fn last_of(release: &Release, journalled: &str) -> Option<u64> {
    let mut notes = release.notes.iter().rev();
    let same = notes.find(|note| detail(release, note) == journalled);
    same.map(|note| note.number)
}

fn last_note(machine: &Machine) -> (u64, u64) {
    let release = machine.release.as_ref();
    release.map_or((0, 0), |release| {
        let note = release.notes.last().map_or(0, |note| note.number);
        (release.number, note)
    })
}
