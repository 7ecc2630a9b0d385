//! What follows from probes: pools without those that fell, flips that are refused,
//! and the story of it.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::Duration,
};

use bg_common::service::{Colour, CutoverWord};

use super::{Daemon, monitor::Told};
use crate::{
    api::{HealthStatus, Kind, Refusal},
    config::Config,
    health::{Change, Known, verdict::Verdict},
    plan::{BackendName, ServicePlan, Standing},
    release::Health,
    time::Wall,
};

/// How soon a pool that could not be written is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// What a flip, or a canary, is about to do.
pub(super) struct Intent<'a> {
    pub(super) service: &'a str,
    /// The colour that new flows shall go to.
    pub(super) to: Colour,
    pub(super) force: bool,
    /// A sentence without its end: that it was not done.
    pub(super) undone: String,
    /// What does it all the same.
    pub(super) forcing: &'a str,
}

impl Daemon {
    /// Where those backends stand that are probed.
    fn standings(&self) -> BTreeMap<BackendName, Standing> {
        let known = self.health.known().into_iter();
        known
            .map(|(name, known)| (name, standing(known.verdict)))
            .collect()
    }

    /// The same for a configuration that is not applied yet: of what it wants probed in
    /// another way nothing is known.
    pub(super) fn standings_under(&self, config: &Config) -> BTreeMap<BackendName, Standing> {
        let verdicts = self.health.verdicts_under(config).into_iter();
        verdicts
            .map(|(name, verdict)| (name, standing(verdict)))
            .collect()
    }

    /// Takes backends out of their pools when they fall, and puts them in again when
    /// they rise.
    pub(super) async fn watch_health(self: Arc<Self>) {
        let mut settled = true;
        loop {
            let coming = self.health.changes();
            let changes = if settled {
                coming.await
            } else {
                let waited = tokio::time::timeout(RETRY, coming).await;
                waited.unwrap_or_default()
            };
            let daemon = Arc::clone(&self);
            let work = tokio::task::spawn_blocking(move || daemon.settle(&changes));
            settled = match work.await {
                Ok(settled) => settled,
                Err(error) => {
                    tracing::error!("changing pools: {error}");
                    false
                }
            };
        }
    }

    /// Makes the pools agree with what is known, and tells of `changes`. False when
    /// they could not be written.
    fn settle(&self, changes: &[Change]) -> bool {
        let before = self.datapath.out_of_pools();
        let settled = self.datapath.settle(|| self.standings());
        if let Err(error) = &settled {
            tracing::error!("pools stay as they are: {error}");
        }
        let out = self.datapath.out_of_pools();
        for change in changes {
            self.tell_of(change, &before, &out);
        }
        settled.is_ok()
    }

    fn tell_of(
        &self,
        change: &Change,
        before: &BTreeSet<BackendName>,
        out: &BTreeSet<BackendName>,
    ) {
        let name = &change.name;
        let colour = name.colour.as_str();
        let members = self.members(name);
        let left = members.iter().filter(|name| !out.contains(name)).count();
        let pool = |place: &str| format!("{place}, {left} of {} in it", members.len());
        let lasted = humantime::format_duration(Duration::from_secs(change.lasted.as_secs()));
        let (event, detail) = match change.now.verdict {
            Verdict::Unknown => return,
            Verdict::Unhealthy => {
                let why = change.now.why.as_deref().unwrap_or("unhealthy");
                let place = if out.contains(name) {
                    pool("out of the pool")
                } else {
                    "no healthy one is left: the pool keeps all of them".to_owned()
                };
                ("fall", format!("{colour} {name}: {why}; {place}"))
            }
            Verdict::Healthy if change.before == Verdict::Unhealthy || before.contains(name) => {
                let place = pool("in the pool");
                let detail = format!("{colour} {name} answers again after {lasted}; {place}");
                ("rise", detail)
            }
            Verdict::Healthy => {
                tracing::info!("{}: {colour} {name} is healthy", name.service);
                return;
            }
        };
        if event == "fall" {
            tracing::warn!("{}: {detail}", name.service);
        } else {
            tracing::info!("{}: {detail}", name.service);
        }
        let generation = self
            .datapath
            .word(&name.service)
            .map(CutoverWord::generation);
        let told = Told {
            generation,
            detail: detail.clone(),
            ..Told::default()
        };
        self.tell(change.at_ns, event, &name.service, told);
        self.note(event, &name.service, generation.unwrap_or(0), detail)
            .unattended();
    }

    /// All that share a pool with a backend, itself included.
    fn members(&self, of: &BackendName) -> Vec<BackendName> {
        let config = self.config();
        let service = config.services.get(&of.service);
        let names = service.into_iter().flat_map(|service| service.plan.names());
        names
            .filter(|name| name.colour == of.colour)
            .filter(|name| name.address.is_ipv4() == of.address.is_ipv4())
            .collect()
    }

    /// Refuses new flows for a colour that has no healthy backend in a pool that is
    /// probed, unless they are forced there: then, what was passed over.
    pub(super) fn check_health(&self, intent: &Intent<'_>) -> Result<Option<String>, Refusal> {
        let Some(trouble) = self.ailing(intent.service, intent.to).trouble else {
            return Ok(None);
        };
        if intent.force {
            return Ok(Some(trouble));
        }
        let message = format!(
            "{}: {trouble}. {} all the same",
            intent.undone, intent.forcing
        );
        Err(Refusal::new(Kind::Unhealthy, message))
    }

    /// What whoever sends new flows to a colour should know, a sentence each.
    pub(super) fn health_warnings(&self, service: &str, colour: Colour) -> Vec<String> {
        let Ailing { trouble, warning } = self.ailing(service, colour);
        trouble.into_iter().chain(warning).collect()
    }

    /// True when a pool of a colour that is probed has no backend that is known to be healthy.
    pub(super) fn has_no_healthy(&self, service: &str, colour: Colour) -> bool {
        self.ailing(service, colour).trouble.is_some()
    }

    fn ailing(&self, service: &str, colour: Colour) -> Ailing {
        let backends = self.probed(service, colour).unwrap_or_default();
        ailing(colour, &backends, &self.health.known())
    }

    /// What a release goes by: the health of a colour, `None` where it is not probed.
    pub(super) fn colour_health(&self, service: &str, colour: Colour) -> Option<Health> {
        let backends = self.probed(service, colour)?;
        Some(colour_health(&backends, &self.health.known()))
    }

    /// The backends of a colour, if they are probed.
    fn probed(&self, service: &str, colour: Colour) -> Option<Vec<BackendName>> {
        let config = self.config();
        let service = config.services.get(service);
        let probed = service.filter(|service| service.health.is_some())?;
        Some(names_of(&probed.plan, colour))
    }

    /// What is known now.
    pub(super) fn health_now(&self) -> Now {
        Now {
            known: self.health.known(),
            out: self.datapath.out_of_pools(),
            wall: Wall::now(),
        }
    }

    /// Those addresses of a service's colour whose backends get new flows.
    pub(super) fn in_pools(
        &self,
        service: &str,
        colour: Colour,
        mut addresses: Vec<IpAddr>,
    ) -> Vec<IpAddr> {
        if addresses.is_empty() {
            return addresses;
        }
        let out = self.datapath.out_of_pools();
        let config = self.config();
        let service = config.services.get(service);
        let names = service.map_or_else(Vec::new, |service| names_of(&service.plan, colour));
        addresses.retain(|address| {
            let mut same = names
                .iter()
                .filter(|name| name.address == *address)
                .peekable();
            same.peek().is_none() || same.any(|name| !out.contains(name))
        });
        addresses
    }
}

/// What is known of all backends at one moment.
pub(super) struct Now {
    pub(super) known: BTreeMap<BackendName, Known>,
    /// Those that are out of their pools.
    pub(super) out: BTreeSet<BackendName>,
    wall: Wall,
}

impl Now {
    /// What is known of a backend, as `status` tells it.
    pub(super) fn status(&self, known: &Known) -> HealthStatus {
        HealthStatus {
            kind: known.kind.to_owned(),
            since: self.wall.at(known.since_ns),
            why: known.why.clone(),
        }
    }

    /// True when no backend of a pool of the colour is healthy, one has fallen, and so
    /// all of them are kept.
    pub(super) fn all_down(&self, plan: &ServicePlan, colour: Colour) -> bool {
        let names = names_of(plan, colour);
        [true, false].into_iter().any(|v4| {
            let mut pool = names.iter().filter(|name| name.address.is_ipv4() == v4);
            let is = |name: &BackendName, verdict| {
                let known = self.known.get(name);
                known.is_some_and(|known| known.verdict == verdict)
            };
            let fell = |name| is(name, Verdict::Unhealthy);
            let is_kept = |name| !is(name, Verdict::Healthy) && !self.out.contains(name);
            pool.clone().any(fell) && pool.all(is_kept)
        })
    }
}

const fn standing(verdict: Verdict) -> Standing {
    match verdict {
        Verdict::Unknown => Standing::AsItWas,
        Verdict::Healthy => Standing::In,
        Verdict::Unhealthy => Standing::Out,
    }
}

fn names_of(plan: &ServicePlan, colour: Colour) -> Vec<BackendName> {
    let names = plan.names();
    names.filter(|name| name.colour == colour).collect()
}

/// What is wrong with a colour.
#[derive(Debug, Default, PartialEq, Eq)]
struct Ailing {
    /// Why no new flow should go there.
    trouble: Option<String>,
    /// What does not keep them from going there.
    warning: Option<String>,
}

/// What is wrong with the pools that these backends of a colour form, one per address
/// family.
fn ailing(
    colour: Colour,
    backends: &[BackendName],
    known: &BTreeMap<BackendName, Known>,
) -> Ailing {
    let colour = colour.as_str();
    let is_healthy = |name: &&BackendName| {
        let known = known.get(name);
        known.is_some_and(|known| known.verdict == Verdict::Healthy)
    };
    let text = |name: &BackendName| {
        let why = known.get(name).and_then(|known| known.why.clone());
        format!(
            "{name} ({})",
            why.unwrap_or_else(|| "not probed yet".to_owned())
        )
    };
    let mut ailing = Ailing::default();
    let mut some_ill = Vec::new();
    for v4 in [true, false] {
        let pool = backends.iter().filter(|name| name.address.is_ipv4() == v4);
        let pool: Vec<&BackendName> = pool.collect();
        let ill: Vec<String> = pool
            .iter()
            .filter(|name| !is_healthy(name))
            .map(|name| text(name))
            .collect();
        if ill.is_empty() {
            continue;
        }
        if ill.len() < pool.len() {
            some_ill.extend(ill);
            continue;
        }
        let of = match v4 {
            _ if backends.len() == pool.len() => "",
            true => " over IPv4",
            false => " over IPv6",
        };
        let ill = ill.join(", ");
        ailing.trouble.get_or_insert(format!(
            "no backend of {colour}{of} is known to be healthy: {ill}"
        ));
    }
    if !some_ill.is_empty() {
        ailing.warning = Some(format!(
            "{} of {} backends of {colour} are healthy, not {}",
            backends.iter().filter(is_healthy).count(),
            backends.len(),
            some_ill.join(", ")
        ));
    }
    ailing
}

/// The health of the pools that these backends of a colour form. One is ill when half
/// of it has fallen: what is left could not carry what all of them do.
fn colour_health(backends: &[BackendName], known: &BTreeMap<BackendName, Known>) -> Health {
    let mut health = Health::Well;
    for v4 in [true, false] {
        let pool = backends.iter().filter(|name| name.address.is_ipv4() == v4);
        let pool: Vec<&BackendName> = pool.collect();
        // What is not asked any more is not known.
        let asked = |name: &BackendName| known.get(name).filter(|known| known.asked);
        let verdict = |name: &BackendName| asked(name).map(|known| known.verdict);
        let count = |wanted| {
            pool.iter()
                .filter(|name| verdict(name) == Some(wanted))
                .count()
        };
        let (healthy, fallen) = (count(Verdict::Healthy), count(Verdict::Unhealthy));
        if fallen > 0 && 2 * fallen >= pool.len() {
            let fell = pool
                .iter()
                .filter(|name| verdict(name) == Some(Verdict::Unhealthy));
            let why = fell.map(|name| {
                let why = known.get(name).and_then(|known| known.why.as_deref());
                format!("{name} ({})", why.unwrap_or("unhealthy"))
            });
            let why = why.collect::<Vec<_>>().join(", ");
            return Health::Ill(format!("{fallen} of {} have fallen: {why}", pool.len()));
        }
        if !pool.is_empty() && 2 * healthy <= pool.len() {
            health = Health::Unknown;
        }
    }
    health
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(address: &str) -> BackendName {
        BackendName {
            service: "llm".to_owned(),
            colour: Colour::Green,
            address: address.parse().unwrap(),
            port: None,
        }
    }

    fn is(verdict: Verdict) -> Known {
        Known {
            kind: "tcp",
            verdict,
            since_ns: 0,
            why: (verdict != Verdict::Healthy).then(|| "refused".to_owned()),
            asked: true,
        }
    }

    type Pools = (Vec<BackendName>, BTreeMap<BackendName, Known>);

    fn pools(of: &[(&str, Verdict)]) -> Pools {
        let names: Vec<BackendName> = of.iter().map(|(address, _)| name(address)).collect();
        let verdicts = of.iter().map(|(_, verdict)| is(*verdict));
        let known = names.iter().cloned().zip(verdicts).collect();
        (names, known)
    }

    fn found(of: &[(&str, Verdict)]) -> Ailing {
        let (names, known) = pools(of);
        ailing(Colour::Green, &names, &known)
    }

    #[test]
    fn a_pool_with_one_healthy_backend_is_good_enough_and_the_ill_are_named() {
        use Verdict::{Healthy, Unhealthy, Unknown};
        let well = [("10.0.0.1", Healthy), ("10.0.0.2", Healthy)];
        assert_eq!(found(&well), Ailing::default());
        let some = found(&[("10.0.0.1", Healthy), ("10.0.0.2", Unhealthy)]);
        assert_eq!(some.trouble, None);
        assert_eq!(
            some.warning.unwrap(),
            "1 of 2 backends of green are healthy, not 10.0.0.2 (refused)"
        );
        for verdict in [Unknown, Unhealthy] {
            let none = found(&[("10.0.0.1", verdict)]);
            assert_eq!(
                none.trouble.unwrap(),
                "no backend of green is known to be healthy: 10.0.0.1 (refused)"
            );
            assert_eq!(none.warning, None);
        }
    }

    #[test]
    fn each_address_family_is_a_pool() {
        use Verdict::{Healthy, Unhealthy};
        let found = found(&[("10.0.0.1", Healthy), ("fd00::1", Unhealthy)]);
        assert_eq!(
            found.trouble.unwrap(),
            "no backend of green over IPv6 is known to be healthy: fd00::1 (refused)"
        );
    }

    #[test]
    fn a_colour_is_ill_when_half_of_a_pool_has_fallen() {
        use Verdict::{Healthy, Unhealthy, Unknown};
        let health = |of: &[(&str, Verdict)]| {
            let (names, known) = pools(of);
            colour_health(&names, &known)
        };
        let [a, b, c] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
        assert_eq!(health(&[(a, Healthy)]), Health::Well);
        assert_eq!(
            health(&[(a, Healthy), (b, Healthy), (c, Unhealthy)]),
            Health::Well
        );
        assert_eq!(
            health(&[(a, Healthy), (b, Healthy), (c, Unknown)]),
            Health::Well
        );
        assert_eq!(health(&[(a, Unknown)]), Health::Unknown);
        assert_eq!(health(&[(a, Healthy), (b, Unknown)]), Health::Unknown);
        assert_eq!(
            health(&[(a, Healthy), (b, Unknown), (c, Unhealthy)]),
            Health::Unknown
        );
        let ill = |why: &str| Health::Ill(why.to_owned());
        assert_eq!(
            health(&[(a, Unhealthy)]),
            ill("1 of 1 have fallen: 10.0.0.1 (refused)")
        );
        assert_eq!(
            health(&[(a, Healthy), (b, Unhealthy)]),
            ill("1 of 2 have fallen: 10.0.0.2 (refused)")
        );
        // Each family is a pool.
        assert_eq!(
            health(&[
                (a, Healthy),
                (b, Healthy),
                (c, Healthy),
                ("fd00::1", Unhealthy)
            ]),
            ill("1 of 1 have fallen: fd00::1 (refused)")
        );
    }
}
