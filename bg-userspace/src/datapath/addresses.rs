//! Which interface an announced address belongs on, and the change of addresses
//! that follows from it: decided whole, made whole or undone (law 8).

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    net::IpAddr,
};

use nix::net::if_::{if_indextoname, if_nametoindex};

use super::{
    Error,
    host_addresses::Held,
    netlink::{self, Failure, Requests},
};

/// The addresses to announce, each with a service that asks for it.
pub type Wanted = BTreeMap<IpAddr, String>;

/// The addresses that the daemon noted as its own, with their interfaces: for
/// kernels that keep no mark.
pub type Noted = BTreeMap<IpAddr, String>;

/// An address and its interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Name of the interface.
    pub interface: String,
    /// Its index.
    pub ifindex: u32,
    /// We put the address there, and may remove it.
    pub ours: bool,
}

/// What a change of the announced addresses does; nothing is done yet.
#[derive(Debug, Default)]
pub struct Change {
    add: Vec<(IpAddr, Place)>,
    remove: Vec<(IpAddr, Place)>,
    /// Every wanted address, and where it is afterwards.
    pub places: BTreeMap<IpAddr, Place>,
}

/// The interfaces whose addresses are ours to change.
#[derive(Debug)]
pub struct Ours {
    /// Names by index.
    attached: BTreeMap<u32, String>,
    /// Those that we were attached to before, and let go.
    left: BTreeMap<u32, String>,
}

impl Ours {
    /// Those of these names that are there.
    pub fn new<'a>(attached: &'a [String], left: impl IntoIterator<Item = &'a String>) -> Self {
        let there = |name: &String| Some((if_nametoindex(name.as_str()).ok()?, name.clone()));
        Self {
            attached: attached.iter().filter_map(there).collect(),
            left: left.into_iter().filter_map(there).collect(),
        }
    }

    fn name(&self, ifindex: u32) -> Option<&String> {
        let names = [&self.attached, &self.left];
        names.into_iter().find_map(|names| names.get(&ifindex))
    }

    /// The address, where it is ours to remove.
    fn place_of(&self, held: &Held, noted: &Noted, marks: bool) -> Option<Place> {
        let interface = self.name(held.ifindex)?.clone();
        let noted = !marks && noted.get(&held.address) == Some(&interface);
        (held.marked || noted).then_some(Place {
            interface,
            ifindex: held.ifindex,
            ours: true,
        })
    }
}

/// Decides what has to change, and changes nothing.
pub async fn prepare(
    requests: &Requests,
    ours: &Ours,
    wanted: &Wanted,
    noted: &Noted,
) -> Result<Change, Error> {
    let marks = kernel_keeps_marks();
    let mut held = requests.addresses().await?;
    let mut change = Change::default();
    let mut kept = BTreeMap::new();
    held.retain(|held| {
        let Some(place) = ours.place_of(held, noted, marks) else {
            return true;
        };
        let stays = wanted.contains_key(&held.address)
            && ours.attached.contains_key(&held.ifindex)
            && !kept.contains_key(&held.address);
        if stays {
            kept.insert(held.address, place);
        } else {
            change.remove.push((held.address, place));
        }
        stays
    });
    let attached: BTreeSet<u32> = ours.attached.keys().copied().collect();
    for (address, service) in wanted {
        if let Some(place) = kept.remove(address) {
            change.places.insert(*address, place);
            continue;
        }
        let refused = |cause: String| Error::NoPlace {
            service: service.clone(),
            address: *address,
            cause,
        };
        let decision = decide(*address, &held, &attached);
        let (ifindex, is_there) = match decision {
            Decision::There(ifindex) => (ifindex, true),
            Decision::Subnet(ifindex) => (ifindex, false),
            Decision::Route => (route_to(requests, *address).await?.map_err(refused)?, false),
            Decision::Ambiguous(one, other) => {
                let (one, other) = (name_of(one), name_of(other));
                return Err(refused(format!("{one} and {other} both have its subnet")));
            }
            Decision::Elsewhere(ifindex) => {
                let name = name_of(ifindex);
                return Err(refused(format!("it is on {name} already")));
            }
        };
        let Some(interface) = ours.attached.get(&ifindex).cloned() else {
            let name = name_of(ifindex);
            return Err(refused(format!("it leads to {name}")));
        };
        let place = Place {
            interface,
            ifindex,
            ours: !is_there,
        };
        if is_there {
            tracing::info!("{address} is on {} already: left alone", place.interface);
        } else {
            change.add.push((*address, place.clone()));
        }
        change.places.insert(*address, place);
    }
    Ok(change)
}

/// The interface that packets for an address which no interface has would leave
/// by; or why there is none.
async fn route_to(requests: &Requests, address: IpAddr) -> Result<Result<u32, String>, Error> {
    match requests.route(address).await {
        Ok(Some(route)) => Ok(Ok(route.ifindex)),
        Ok(None) => Ok(Err(
            "no interface has its subnet or a route to it".to_owned()
        )),
        Err(Failure::Refused(error, _) | Failure::Broken(error)) => Err(error),
    }
}

/// The addresses that are ours on these interfaces, removed.
pub async fn remove_all(
    requests: &Requests,
    ours: &Ours,
    noted: &Noted,
) -> Result<Vec<IpAddr>, Error> {
    let change = prepare(requests, ours, &Wanted::new(), noted).await?;
    let removed = change.remove.iter().map(|(address, _)| *address).collect();
    change.make(requests).await?;
    Ok(removed)
}

impl Change {
    /// Makes the change, whole; what fails is undone, and named. Addresses that
    /// are no longer wanted go first.
    pub async fn make(&self, requests: &Requests) -> Result<(), Error> {
        let mut done = Self::default();
        let made = self.steps(requests, &mut done).await;
        if made.is_err() {
            done.undo(requests).await;
        }
        made
    }

    async fn steps(&self, requests: &Requests, done: &mut Self) -> Result<(), Error> {
        for (address, place) in &self.remove {
            let removed = requests.remove_address(place.ifindex, *address).await;
            removed.map_err(|failure| place.failed("taken from", *address, failure))?;
            tracing::info!("took {address} from {}", place.interface);
            done.remove.push((*address, place.clone()));
        }
        for (address, place) in &self.add {
            let added = requests.add_address(place.ifindex, *address).await;
            if added.map_err(|failure| place.failed("put on", *address, failure))? {
                tracing::info!("put {address} on {}", place.interface);
                done.add.push((*address, place.clone()));
            }
        }
        Ok(())
    }

    /// Takes back what was made; what cannot be is in the log.
    pub async fn undo(&self, requests: &Requests) {
        for (address, place) in &self.add {
            if let Err(failure) = requests.remove_address(place.ifindex, *address).await {
                tracing::error!("{}", place.failed("taken from", *address, failure));
            }
        }
        for (address, place) in &self.remove {
            if let Err(failure) = requests.add_address(place.ifindex, *address).await {
                tracing::error!("{}", place.failed("put back on", *address, failure));
            }
        }
    }

    /// Makes the change from outside of a runtime; undone when what is returned
    /// is dropped without [`Made::keep`].
    pub fn make_blocking(self) -> Result<Made, Error> {
        netlink::block_on(|| async { self.make(&Requests::open()?).await })?;
        Ok(Made(Some(self)))
    }
}

/// A change that was made, and is undone unless it is kept.
#[derive(Debug)]
#[must_use = "dropping it undoes the change"]
pub struct Made(Option<Change>);

impl Made {
    /// What comes after it succeeded, too.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        let Some(change) = self.0.take() else {
            return;
        };
        let undone = netlink::block_on(|| async {
            change.undo(&Requests::open()?).await;
            Ok(())
        });
        if let Err(error) = undone {
            tracing::error!("addresses were not put back: {error}");
        }
    }
}

impl Place {
    fn failed(&self, done: &'static str, address: IpAddr, failure: Failure) -> Error {
        Error::Address {
            address,
            done,
            interface: self.interface.clone(),
            cause: Error::from(failure).to_string(),
        }
    }
}

/// Where an address belongs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Decision {
    /// This interface has it.
    There(u32),
    /// This interface, attached or not, has its subnet.
    Subnet(u32),
    /// These have equal subnets.
    Ambiguous(u32, u32),
    /// An interface that is none of ours has it.
    Elsewhere(u32),
    /// No interface has its subnet: the routes decide.
    Route,
}

fn decide(address: IpAddr, held: &[Held], attached: &BTreeSet<u32>) -> Decision {
    let same: Vec<u32> = held
        .iter()
        .filter(|held| held.address == address)
        .map(|held| held.ifindex)
        .collect();
    if let Some(ifindex) = same.iter().find(|ifindex| attached.contains(ifindex)) {
        return Decision::There(*ifindex);
    }
    if let Some(ifindex) = same.first() {
        return Decision::Elsewhere(*ifindex);
    }
    let subnets = || held.iter().filter(|held| is_within(address, held));
    let Some(longest) = subnets().map(|held| held.prefix).max() else {
        return Decision::Route;
    };
    let best = subnets().filter(|held| held.prefix == longest);
    let best: BTreeSet<u32> = best.map(|held| held.ifindex).collect();
    let mut best = best.into_iter();
    match (best.next(), best.next()) {
        (Some(one), Some(other)) => Decision::Ambiguous(one, other),
        (Some(one), None) => Decision::Subnet(one),
        (None, _) => Decision::Route,
    }
}

/// True when the address is a neighbour in the subnet of another one.
fn is_within(address: IpAddr, held: &Held) -> bool {
    match (address, held.address) {
        (IpAddr::V4(one), IpAddr::V4(other)) if held.prefix < 32 => {
            let differ = one.to_bits() ^ other.to_bits();
            differ.leading_zeros() >= u32::from(held.prefix)
        }
        (IpAddr::V6(one), IpAddr::V6(other)) if held.prefix < 128 => {
            let differ = one.to_bits() ^ other.to_bits();
            differ.leading_zeros() >= u32::from(held.prefix)
        }
        _ => false,
    }
}

/// Name of any interface, for messages.
fn name_of(ifindex: u32) -> String {
    if_indextoname(ifindex).map_or_else(
        |_| format!("interface {ifindex}"),
        |name| name.to_string_lossy().into_owned(),
    )
}

/// True where the kernel keeps `IFA_PROTO`: since 5.18.
fn kernel_keeps_marks() -> bool {
    fs::read_to_string("/proc/sys/kernel/osrelease").is_ok_and(|release| keeps_marks(&release))
}

fn keeps_marks(release: &str) -> bool {
    let number = |part: &str| part.parse::<u32>().ok();
    let mut parts = release.split(|c: char| !c.is_ascii_digit());
    let version = (parts.next().and_then(number), parts.next().and_then(number));
    version >= (Some(5), Some(18))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(ifindex: u32, text: &str) -> Held {
        let (address, prefix) = text.split_once('/').unwrap();
        Held {
            ifindex,
            address: address.parse().unwrap(),
            prefix: prefix.parse().unwrap(),
            marked: false,
        }
    }

    fn decision(address: &str, held: &[Held]) -> Decision {
        decide(address.parse().unwrap(), held, &[1, 2].into())
    }

    #[test]
    fn the_longest_subnet_decides() {
        let host = [
            held(1, "10.0.0.1/8"),
            held(2, "10.1.0.1/16"),
            held(3, "192.0.2.1/24"),
            held(1, "2001:db8::1/64"),
            held(1, "fe80::1/64"),
        ];
        assert_eq!(decision("10.1.9.9", &host), Decision::Subnet(2));
        assert_eq!(decision("10.2.9.9", &host), Decision::Subnet(1));
        assert_eq!(decision("192.0.2.9", &host), Decision::Subnet(3));
        assert_eq!(decision("2001:db8::10", &host), Decision::Subnet(1));
        assert_eq!(decision("203.0.113.10", &host), Decision::Route);
        assert_eq!(decision("2001:db8:1::10", &host), Decision::Route);
        let twice = [held(1, "10.0.0.1/24"), held(2, "10.0.0.2/24")];
        assert_eq!(decision("10.0.0.9", &twice), Decision::Ambiguous(1, 2));
    }

    #[test]
    fn what_is_there_stays_there() {
        let host = [held(1, "10.0.0.1/24"), held(2, "10.0.0.9/32")];
        assert_eq!(decision("10.0.0.9", &host), Decision::There(2));
        let host = [held(1, "10.0.0.1/24"), held(3, "10.0.0.9/32")];
        assert_eq!(decision("10.0.0.9", &host), Decision::Elsewhere(3));
    }

    #[test]
    fn a_note_counts_only_where_the_kernel_keeps_no_mark() {
        let ours = Ours {
            attached: [(1, "eth0".to_owned())].into(),
            left: [(2, "eth1".to_owned())].into(),
        };
        let bare = held(1, "10.0.0.9/32");
        let noted: Noted = [(bare.address, "eth0".to_owned())].into();
        let is_ours = |held: &Held, marks| ours.place_of(held, &noted, marks).is_some();
        assert!(is_ours(&bare, false) && !is_ours(&bare, true));
        assert!(!is_ours(&held(2, "10.0.0.9/32"), false));
        let marked = |ifindex| Held {
            ifindex,
            marked: true,
            ..bare
        };
        assert!(is_ours(&marked(1), true) && is_ours(&marked(2), true));
        assert!(!is_ours(&marked(3), true), "another gateway's");
    }

    #[test]
    fn kernels_keep_marks_since_5_18() {
        for (release, keeps) in [
            ("5.10.0-28-amd64", false),
            ("5.17.15", false),
            ("5.18.0", true),
            ("6.1.0-18-cloud-amd64\n", true),
            ("strange", false),
        ] {
            assert_eq!(keeps_marks(release), keeps, "{release}");
        }
    }
}
