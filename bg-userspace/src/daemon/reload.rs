//! A reload: validate whole, journal the intent, apply, journal the result.

use std::{fmt::Display, sync::Arc};

use bg_common::service::Colour;

use super::{Daemon, http::beside, metrics::Rebinding, monitor::Told};
use crate::{
    api::{Kind, Refusal},
    config::{Config, Gateway, ReleasePlan, Service},
    datapath::{self, Change},
    journal::Entry,
    keeper::{INTENT_WAIT, RESULT_WAIT},
};

impl Daemon {
    /// Applies the file: whole, or not at all (law 8). Returns the difference.
    pub(super) async fn reload(
        self: &Arc<Self>,
        actor: &str,
        dry_run: bool,
    ) -> Result<Vec<String>, Refusal> {
        let _reloading = self.reloading.lock().await;
        let daemon = Arc::clone(self);
        let (new, change, metrics) = beside(move || daemon.prepare()).await?;
        let changes = difference(&self.config(), &new);
        if dry_run || changes.is_empty() {
            return Ok(changes);
        }
        let entry = |phase, detail| Entry::new(actor, "*", "reload", phase, 0, detail);
        let intent = self.keeper.entry(entry("intent", changes.join("; ")));
        if let Some(warning) = intent.within(INTENT_WAIT).await {
            return Err(refused(Kind::Failed, &warning));
        }
        // Flips go on meanwhile: they change words, this changes tables.
        self.datapath.introduce(&change).await?;
        let daemon = Arc::clone(self);
        let plan = new.plan();
        let applied = beside(move || {
            let applied = daemon.datapath.apply(change);
            daemon.datapath.warn_of_settings(&plan);
            applied?;
            Ok(daemon.datapath.noted())
        });
        let announced = match applied.await {
            Ok(announced) => announced,
            Err(refusal) => {
                let failed = entry("result", format!("failed: {refusal}"));
                self.keeper.entry(failed).unattended();
                return Err(refusal);
            }
        };
        let told = Told {
            detail: changes.join("; "),
            actor: Some(actor),
            ..Told::default()
        };
        self.tell(datapath::now_ns(), "reload", "*", told);
        self.datapath.advertise().await;
        *self.config_mut() = new;
        self.rebind_metrics(metrics);
        self.health.follow(&self.config());
        self.listen_to_servers();
        self.remember_services(announced);
        self.releases.services_changed();
        let result = self.keeper.entry(entry("result", changes.join("; ")));
        result.within(RESULT_WAIT).await;
        for warning in self.unreachable_backends() {
            tracing::warn!("{warning}");
        }
        Ok(changes)
    }

    /// What of the configuration cannot be reached, a sentence each.
    pub(super) fn unreachable_backends(&self) -> Vec<String> {
        let names: Vec<String> = self.config().services.keys().cloned().collect();
        let mut sentences = Vec::new();
        for name in names {
            let Some(word) = self.datapath.word(&name) else {
                continue;
            };
            for colour in Colour::ALL {
                let silent = self.unreachable(&name, colour);
                if silent.is_empty() {
                    continue;
                }
                let share = if colour == word.active() {
                    ", the ACTIVE colour: its share of new flows may go nowhere"
                } else {
                    ""
                };
                sentences.push(format!(
                    "no next hop is known for {} of {name} {}{share}",
                    silent.join(", "),
                    colour.as_str()
                ));
            }
        }
        sentences
    }

    /// Reads the file and lays it out, changing nothing.
    fn prepare(&self) -> Result<(Config, Change, Rebinding), Refusal> {
        let usage = |trouble: &dyn Display| refused(Kind::Usage, trouble);
        let new = Config::load(&self.file).map_err(|e| usage(&e))?;
        if let Some(keys) = restart_keys(&self.config().gateway, &new.gateway) {
            let pinned = if keys.contains("gateway.max_") {
                ". Tables that are pinned keep their size until `bgswitch detach`, which ends forwarding until \
                 the next start"
            } else {
                ""
            };
            return Err(usage(&format!(
                "{}: {keys} changed, which is read at the start only: restart the daemon (forwarding goes \
                 on), or take the change back{pinned}",
                self.file.display()
            )));
        }
        datapath::interfaces_exist(&new.gateway.interfaces).map_err(|e| usage(&e))?;
        let before = self.config().gateway.metrics;
        let metrics = Rebinding::prepare(before, new.gateway.metrics).map_err(|e| usage(&e))?;
        let known = self.state().known();
        let mut plan = new.plan();
        plan.standings.extend(self.standings_under(&new));
        let change = self.datapath.prepare(&plan, &known);
        let change = change.map_err(|e| refused(Kind::Datapath, &e))?;
        Ok((new, change, metrics))
    }
}

fn refused(kind: Kind, trouble: &dyn Display) -> Refusal {
    Refusal::new(kind, format!("{trouble}. Nothing was applied"))
}

/// The keys of `[gateway]` that differ, if any do.
fn restart_keys(old: &Gateway, new: &Gateway) -> Option<String> {
    let keys: Vec<&str> = [
        ("gateway.interfaces", old.interfaces != new.interfaces),
        ("gateway.xdp", old.xdp != new.xdp),
        ("gateway.max_flows", old.max_flows != new.max_flows),
        ("gateway.max_services", old.max_services != new.max_services),
        ("gateway.socket", old.paths.socket != new.paths.socket),
        (
            "gateway.state_dir",
            old.paths.state_dir != new.paths.state_dir,
        ),
        ("gateway.bpffs", old.paths.bpffs != new.paths.bpffs),
        ("gateway.journal_max", old.journal_max != new.journal_max),
    ]
    .into_iter()
    .filter_map(|(key, differs)| differs.then_some(key))
    .collect();
    (!keys.is_empty()).then(|| keys.join(", "))
}

/// The difference of two configurations, a line each.
fn difference(old: &Config, new: &Config) -> Vec<String> {
    let gone = |name: &&String| !new.services.contains_key(*name);
    let mut lines: Vec<String> = old
        .services
        .keys()
        .filter(gone)
        .map(|name| format!("- service {name}"))
        .collect();
    let (before, after) = (old.gateway.metrics, new.gateway.metrics);
    if before != after {
        lines.extend(before.map(|address| format!("- gateway metrics {address}")));
        lines.extend(after.map(|address| format!("+ gateway metrics {address}")));
    }
    for (name, service) in &new.services {
        let Some(before) = old.services.get(name) else {
            lines.push(format!("+ service {name}"));
            continue;
        };
        let (before, after) = (describe(name, before), describe(name, service));
        let left = before.iter().filter(|line| !after.contains(line));
        lines.extend(left.map(|line| format!("- {line}")));
        let came = after.iter().filter(|line| !before.contains(line));
        lines.extend(came.map(|line| format!("+ {line}")));
    }
    lines
}

/// All that a service's tables say, a line each.
fn describe(name: &str, service: &Service) -> Vec<String> {
    let mut lines: Vec<String> = service
        .plan
        .listeners
        .iter()
        .map(|listener| format!("{name} listener {listener}"))
        .collect();
    for colour in Colour::ALL {
        let label = colour.as_str();
        lines.extend(
            service
                .plan
                .backends(colour)
                .iter()
                .map(|b| format!("{name} {label} backend {b} weight {}", b.weight)),
        );
        let previews = service.plan.previews[colour as usize].iter();
        lines.extend(previews.map(|address| format!("{name} {label} preview {address}")));
        if let Some(version) = &service.versions[colour as usize] {
            lines.push(format!("{name} {label} version {version}"));
        }
    }
    lines.push(format!("{name} forward {}", service.plan.forward.as_str()));
    if service.plan.announce {
        lines.push(format!("{name} announce"));
    }
    let duration = humantime::format_duration;
    lines.extend(release(name, &service.release));
    lines.push(format!("{name} on_flip {}", service.on_flip.as_str()));
    let drain = service.drain;
    lines.push(format!("{name} drain {}", duration(drain.deadline)));
    lines.push(format!("{name} drain_end {}", drain.end.as_str()));
    lines.push(format!("{name} reset_over {}", duration(drain.reset_over)));
    lines.push(format!(
        "{name} udp_idle {}",
        duration(service.plan.udp_idle)
    ));
    if let Some(health) = &service.health {
        lines.push(format!("{name} health {health}"));
    }
    lines
}

/// What a service's releases go through, a line each.
fn release(name: &str, plan: &ReleasePlan) -> Vec<String> {
    let duration = humantime::format_duration;
    let usual = ReleasePlan::default();
    let gates = plan.gates.iter().enumerate();
    let mut lines: Vec<String> = gates
        .map(|(index, gate)| {
            let (kind, timeout) = (gate.kind.as_str(), duration(gate.timeout));
            format!(
                "{name} gate {} {} {kind} timeout {timeout}: {}",
                index + 1,
                gate.name,
                gate.kind
            )
        })
        .collect();
    if plan.approval != usual.approval {
        let approval = plan.approval;
        lines.push(format!(
            "{name} approval required {} not_requester {} expires {} on_expiry {}",
            approval.required,
            approval.not_requester,
            duration(approval.expires),
            approval.on_expiry.as_str()
        ));
    }
    let steps = plan.canary.iter().enumerate();
    lines.extend(steps.map(|(index, step)| {
        let (percent, time) = (step.percent, duration(step.time));
        format!("{name} canary {}: {percent} for {time}", index + 1)
    }));
    if plan.bake != usual.bake {
        let bake = plan.bake;
        lines.push(format!(
            "{name} bake {} settle {} on_fail {} on_inconclusive {} cooldown {}",
            duration(bake.duration),
            duration(bake.settle),
            bake.on_fail.as_str(),
            bake.on_inconclusive.as_str(),
            duration(bake.cooldown)
        ));
        if let Some(signals) = bake.signals {
            let (errors, slower) = (signals.errors(), signals.slower());
            lines.push(format!(
                "{name} bake signals errors {errors} slower {slower}"
            ));
        }
    }
    if let Some(prometheus) = &plan.prometheus {
        lines.push(format!("{name} bake prometheus {}", prometheus.url));
        let rules = prometheus.rules.iter().enumerate();
        lines.extend(rules.map(|(index, rule)| format!("{name} bake rule {}: {rule}", index + 1)));
    }
    if plan.standby != usual.standby {
        let standby = &plan.standby;
        lines.push(format!("{name} standby hold {}", duration(standby.hold)));
    }
    let hooks = plan.hooks.iter().enumerate();
    lines.extend(hooks.map(|(index, hook)| {
        let run = &hook.run;
        format!(
            "{name} hook {} {} {} {} timeout {} on_failure {}: {}",
            index + 1,
            run.name,
            hook.when.as_str(),
            run.kind.as_str(),
            duration(run.timeout),
            hook.on_failure.as_str(),
            run.kind
        )
    }));
    lines
}
