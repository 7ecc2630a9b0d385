//! The directory of endpoints: how it is hashed, and read and written in place.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, SocketAddr},
    thread,
    time::Duration,
};

use aya::maps::MapData;
use bg_common::{
    abi::map,
    directory::{self, DirectoryWord, Entry, LINES, Name, PILOTS},
    flow::FlowKey,
    service::{Listener, ReturnPath},
};

use super::{layout::protocol_of, maps::halves, mmap::Words};
use crate::plan::ListenerPlan;

/// Pilots, at least: 8 KB. The more there are of them, the more packets that are not
/// ours are told by a pilot alone.
const FEWEST_PILOTS: u32 = 4096;
/// Seeds to try. Lines are at most half taken, and the first one does.
const SEEDS: u32 = 64;

const ENTRY_WORDS: usize = size_of::<Entry>() / 8;

/// A directory that has its place in no half yet.
#[derive(Debug)]
pub struct Built {
    word: DirectoryWord,
    pilots: Vec<u16>,
    lines: Vec<Entry>,
}

impl Built {
    /// Hashes these entries, whose names differ; `None` when they are too many.
    pub fn of(entries: &[Entry]) -> Option<Self> {
        let count = u32::try_from(entries.len()).ok()?;
        let pilots = count.max(FEWEST_PILOTS).next_power_of_two();
        let lines = (2 * count.max(1)).next_power_of_two();
        if pilots > PILOTS || lines > LINES {
            return None;
        }
        let word = |seed| DirectoryWord::new(seed, pilots, lines);
        (1..=SEEDS).find_map(|seed| Self::place(entries, word(seed)))
    }

    /// Gives each entry its line: those that share a pilot find one together, the
    /// largest groups first.
    fn place(entries: &[Entry], word: DirectoryWord) -> Option<Self> {
        let mut groups: BTreeMap<u32, Vec<(u64, &Entry)>> = BTreeMap::new();
        for entry in entries {
            let hash = entry.name().hash(word.seed());
            let group = groups.entry(word.pilot(hash)).or_default();
            group.push((hash, entry));
        }
        let mut groups: Vec<_> = groups.into_iter().collect();
        groups.sort_by_key(|(_, group)| std::cmp::Reverse(group.len()));
        let mut pilots = vec![0; word.pilots() as usize];
        let mut lines = vec![Entry::default(); word.lines() as usize];
        for (index, group) in groups {
            pilots[index as usize] =
                (1..=u16::MAX).find(|pilot| settle(&mut lines, word, *pilot, &group))?;
        }
        Some(Self {
            word,
            pilots,
            lines,
        })
    }
}

/// Puts a group where `pilot` says, if all of its lines are free and none is meant
/// twice.
fn settle(lines: &mut [Entry], word: DirectoryWord, pilot: u16, group: &[(u64, &Entry)]) -> bool {
    for (done, (hash, entry)) in group.iter().enumerate() {
        let line = &mut lines[word.line(*hash, pilot) as usize];
        if line.tag == 0 {
            *line = **entry;
            continue;
        }
        for (hash, _) in &group[..done] {
            lines[word.line(*hash, pilot) as usize] = Entry::default();
        }
        return false;
    }
    true
}

impl directory::Directory for Built {
    fn word(&self) -> DirectoryWord {
        self.word
    }

    fn pilot(&self, index: u32) -> Option<u16> {
        self.pilots.get(index as usize).copied()
    }

    fn line(&self, index: u32) -> Option<&Entry> {
        self.lines.get(index as usize)
    }
}

/// What endpoints are: a listener's, a backend's that replies come from, or both.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Endpoints {
    /// Listeners by endpoint, previews among them.
    pub listeners: BTreeMap<ListenerPlan, Listener>,
    /// Return paths by backend endpoint.
    pub returns: BTreeMap<ListenerPlan, ReturnPath>,
    /// Return paths to previews by backend endpoint.
    pub previews: BTreeMap<ListenerPlan, ReturnPath>,
}

impl Endpoints {
    /// The service that listens at an endpoint, other than by a preview.
    pub fn service_at(&self, at: &ListenerPlan) -> Option<u32> {
        let listener = self.listeners.get(at);
        let listener = listener.filter(|listener| !listener.is_preview());
        listener.map(|listener| listener.service)
    }

    /// The entries of a directory of them.
    pub fn entries(&self) -> Vec<Entry> {
        let mut whose: BTreeMap<&ListenerPlan, (Listener, ReturnPath)> = BTreeMap::new();
        for (endpoint, listener) in &self.listeners {
            whose.entry(endpoint).or_default().0 = *listener;
        }
        for (endpoint, path) in &self.returns {
            let previewed = self.previews.contains_key(endpoint);
            whose.entry(endpoint).or_default().1 = ReturnPath {
                previewed: previewed.into(),
                ..*path
            };
        }
        let entry = |(endpoint, (listener, path))| Entry::new(name_of(endpoint), listener, path);
        let previews = self.previews.iter();
        let preview = |(endpoint, path): (&ListenerPlan, &ReturnPath)| {
            Entry::new(name_of(endpoint).preview(), Listener::default(), *path)
        };
        let entries = whose.into_iter().map(entry);
        entries.chain(previews.map(preview)).collect()
    }

    /// How many endpoints they are.
    pub fn count(&self) -> usize {
        let is_new = |endpoint: &&ListenerPlan| !self.listeners.contains_key(endpoint);
        let returns = self.returns.keys().filter(is_new).count();
        self.listeners.len() + returns + self.previews.len()
    }

    fn add(&mut self, entry: &Entry) {
        let name = entry.name();
        let endpoint = endpoint_of(&name);
        if name.is_preview() {
            self.previews
                .extend(entry.path().map(|path| (endpoint, *path)));
            return;
        }
        if let Some(listener) = entry.listener() {
            self.listeners.insert(endpoint, listener);
        }
        if let Some(path) = entry.path() {
            // Said anew whenever a directory is made.
            let path = ReturnPath {
                previewed: 0,
                ..*path
            };
            self.returns.insert(endpoint, path);
        }
    }
}

/// The name of an endpoint in the directory.
pub fn name_of(endpoint: &ListenerPlan) -> Name {
    let port = endpoint.address.port().to_be_bytes();
    let protocol = endpoint.protocol.number();
    match endpoint.address.ip() {
        IpAddr::V4(ip) => Name::new(FlowKey::client_v4(ip.octets()), port, protocol, 4),
        IpAddr::V6(ip) => Name::new(FlowKey::client_v6(ip.octets()), port, protocol, 6),
    }
}

fn endpoint_of(name: &Name) -> ListenerPlan {
    let (port, protocol, family) = name.parts();
    let address = FlowKey::of(name.address, 0).address();
    let address = if family == 4 {
        let [.., a, b, c, d] = address;
        IpAddr::from([a, b, c, d])
    } else {
        IpAddr::from(address)
    };
    ListenerPlan {
        address: SocketAddr::new(address, u16::from_be_bytes(port)),
        protocol: protocol_of(protocol),
    }
}

/// The kernel's directory, mapped into this process.
#[derive(Debug)]
pub struct Directory {
    word: Words,
    pilots: Words,
    lines: Words,
}

impl Directory {
    /// Its arrays.
    pub const MAPS: [&str; 3] = [map::DIRECTORY, map::PILOTS, map::ENDPOINTS];

    /// Maps the arrays of [`Directory::MAPS`], in their order.
    pub fn map([word, pilots, lines]: [MapData; 3]) -> io::Result<Self> {
        Ok(Self {
            word: Words::map(word.fd(), 1)?,
            pilots: Words::map(pilots.fd(), 2 * PILOTS as usize / 4)?,
            lines: Words::map(lines.fd(), 2 * LINES as usize * ENTRY_WORDS)?,
        })
    }

    fn word(&self) -> DirectoryWord {
        DirectoryWord(self.word.load(0))
    }

    /// What packets find.
    pub fn read(&self) -> Endpoints {
        loop {
            let word = self.word();
            let endpoints = self.read_half(word);
            if self.word() == word {
                return endpoints; // nobody has put another one in its place meanwhile
            }
        }
    }

    fn read_half(&self, word: DirectoryWord) -> Endpoints {
        let mut endpoints = Endpoints::default();
        for line in 0..word.lines() {
            let at = (word.half() * LINES + line) as usize * ENTRY_WORDS;
            let entry = entry_of(std::array::from_fn(|n| self.lines.load(at + n)));
            if entry.tag != 0 {
                endpoints.add(&entry);
            }
        }
        endpoints
    }

    /// Puts another directory in this one's place, in one store. No packet may still
    /// read the half that was in use before: see [`Directory::replace`].
    pub fn write(&self, built: &Built) {
        let word = built.word.beside(self.word());
        let first = word.half() as usize * PILOTS as usize / 4;
        for (at, four) in (first..).zip(built.pilots.as_chunks::<4>().0) {
            self.pilots.store(at, words_of(*four));
        }
        let first = word.half() as usize * LINES as usize * ENTRY_WORDS;
        let words = built.lines.iter().flat_map(words_of_entry);
        for (at, word) in (first..).zip(words) {
            self.lines.store(at, word);
        }
        self.word.store(0, word.0);
    }

    /// The same, after every packet that is under way has left: milliseconds.
    pub fn replace(&self, built: &Built) {
        wait_for_packets();
        self.write(built);
    }
}

/// Four 16-bit numbers as they lie in memory.
fn words_of(four: [u16; 4]) -> u64 {
    let [a, b, c, d] = four.map(u16::to_ne_bytes);
    u64::from_ne_bytes([a[0], a[1], b[0], b[1], c[0], c[1], d[0], d[1]])
}

fn pair([a, b, c, d]: [u8; 4], [e, f, g, h]: [u8; 4]) -> u64 {
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

fn words_of_entry(entry: &Entry) -> [u64; ENTRY_WORDS] {
    let Entry { listener, path, .. } = entry;
    let [a, b] = listener.id.to_ne_bytes();
    let [c, d] = [listener.forward, listener.only];
    let [e, f, g, h] = listener.idle.to_ne_bytes();
    let [low, high] = halves(&path.address);
    let [[i, j], [k, l], [m, n]] = [path.listener, path.service, path.block].map(u16::to_ne_bytes);
    let [o, p] = path.port;
    let [q, r] = path.previewed.to_ne_bytes();
    [
        entry.address[0],
        entry.address[1],
        pair(entry.tag.to_ne_bytes(), listener.service.to_ne_bytes()),
        pair([a, b, c, d], [e, f, g, h]),
        low,
        high,
        pair([o, p, i, j], [k, l, m, n]),
        pair([q, r, 0, 0], [0; 4]),
    ]
}

fn entry_of(words: [u64; ENTRY_WORDS]) -> Entry {
    let halves = |n: usize| {
        let [a, b, c, d, e, f, g, h] = words[n].to_ne_bytes();
        ([a, b, c, d], [e, f, g, h])
    };
    let (tag, service) = halves(2);
    let ([a, b, c, d], idle) = halves(3);
    let ([o, p, i, j], [k, l, m, n]) = halves(6);
    let ([q, r, ..], _) = halves(7);
    let mut address = [0; 16];
    address[..8].copy_from_slice(&words[4].to_ne_bytes());
    address[8..].copy_from_slice(&words[5].to_ne_bytes());
    let name = Name {
        address: [words[0], words[1]],
        tag: u32::from_ne_bytes(tag),
    };
    let listener = Listener {
        service: u32::from_ne_bytes(service),
        id: u16::from_ne_bytes([a, b]),
        forward: c,
        only: d,
        idle: u32::from_ne_bytes(idle),
    };
    let path = ReturnPath {
        address,
        port: [o, p],
        listener: u16::from_ne_bytes([i, j]),
        service: u16::from_ne_bytes([k, l]),
        block: u16::from_ne_bytes([m, n]),
        previewed: u16::from_ne_bytes([q, r]),
    };
    Entry::new(name, listener, path)
}

/// `MEMBARRIER_CMD_GLOBAL` (kernel 4.3).
const GLOBAL: libc::c_int = 1;
/// A packet that is under way takes microseconds.
const LONG_ENOUGH: Duration = Duration::from_millis(100);

/// Waits until every packet that is in the packet path now has left it: a grace period
/// of RCU, under whose protection XDP runs.
pub(super) fn wait_for_packets() {
    // SAFETY: the call takes three numbers.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, GLOBAL, 0, 0) };
    if result < 0 {
        // A kernel with CPUs that have no tick (nohz_full) has no such call.
        tracing::debug!("membarrier: {}", io::Error::last_os_error());
        thread::sleep(LONG_ENOUGH);
    }
}

#[cfg(test)]
mod tests {
    use bg_common::{abi::capacity, directory::Directory as _};

    use super::*;
    use crate::datapath::layout::wide;

    /// Number `n` of many endpoints, of both families.
    fn endpoint(n: u32) -> ListenerPlan {
        let [_, a, b, c] = (n / 4).to_be_bytes();
        let port = 8000 + n / 2 % 2;
        let text = if n.is_multiple_of(2) {
            format!("tcp://10.{a}.{b}.{c}:{port}")
        } else {
            format!("udp://[2001:db8::{b:x}:{c:x}]:{port}")
        };
        text.parse().unwrap()
    }

    fn listener(n: u32) -> Listener {
        Listener {
            service: n ^ 0x5555,
            id: n as u16 + 1,
            forward: 2,
            only: n as u8 % 3,
            idle: n + 7,
        }
    }

    fn path(n: u32) -> ReturnPath {
        ReturnPath {
            address: wide(endpoint(n + 1).address.ip()),
            port: (n as u16).to_be_bytes(),
            listener: n as u16 + 1,
            service: n as u16,
            block: 3,
            previewed: 0,
        }
    }

    fn many(count: u32) -> Endpoints {
        let mut endpoints = Endpoints::default();
        for n in 0..count {
            if !n.is_multiple_of(3) {
                endpoints.returns.insert(endpoint(n), path(n));
            }
            if !n.is_multiple_of(5) || n.is_multiple_of(3) {
                endpoints.listeners.insert(endpoint(n), listener(n));
            }
        }
        endpoints
    }

    #[test]
    fn each_endpoint_is_found_and_nothing_else() {
        for count in [0, 1, 2, 7, 1000, capacity::ENDPOINTS as u32 - 1] {
            let endpoints = many(count);
            let built = Built::of(&endpoints.entries()).unwrap();
            for n in 0..count {
                let endpoint = endpoint(n);
                let entry = built.find(&name_of(&endpoint)).unwrap();
                assert_eq!(
                    entry.listener(),
                    endpoints.listeners.get(&endpoint).copied()
                );
                assert_eq!(entry.path(), endpoints.returns.get(&endpoint));
            }
            for n in count..count + 100_000 {
                assert_eq!(built.find(&name_of(&endpoint(n))), None);
            }
        }
    }

    #[test]
    fn most_of_what_is_not_ours_looks_at_no_line() {
        let built = Built::of(&many(100).entries()).unwrap();
        let strangers = (1000..11_000).map(|n| name_of(&endpoint(n)).hash(built.word.seed()));
        let told = strangers.filter(|hash| built.pilots[built.word.pilot(*hash) as usize] == 0);
        assert!(told.count() > 9000);
    }

    #[test]
    fn an_entry_is_the_same_in_words() {
        for n in 0..1000 {
            let path = ReturnPath {
                previewed: n as u16 % 2,
                ..path(n)
            };
            let entry = Entry::new(name_of(&endpoint(n)), listener(n), path);
            assert_eq!(entry_of(words_of_entry(&entry)), entry);
            assert_eq!(endpoint_of(&entry.name()), endpoint(n));
        }
    }

    #[test]
    fn a_backends_endpoint_has_a_way_back_to_each_of_listener_and_preview() {
        let mut endpoints = many(10);
        endpoints.previews.insert(endpoint(1), path(77));
        let built = Built::of(&endpoints.entries()).unwrap();
        let of = |n| name_of(&endpoint(n));
        let found = |name: Name| built.find(&name).and_then(Entry::path).copied();
        assert_eq!(found(of(1).preview()), Some(path(77)));
        assert_eq!(found(of(2).preview()), None);
        let previewed = [1, 2].map(|n| found(of(n)).unwrap().previewed);
        assert_eq!(previewed, [1, 0]);
        let mut read = Endpoints::default();
        for line in built.lines.iter().filter(|line| line.tag != 0) {
            read.add(line);
        }
        assert_eq!(read, endpoints);
        assert_eq!(endpoints.count(), endpoints.entries().len());
    }

    #[test]
    fn an_ipv6_packet_to_a_mapped_address_is_not_for_the_ipv4_listener() {
        let v4: ListenerPlan = "tcp://203.0.113.10:8000".parse().unwrap();
        let endpoints = Endpoints {
            listeners: [(v4, listener(1))].into(),
            ..Endpoints::default()
        };
        let built = Built::of(&endpoints.entries()).unwrap();
        let name = name_of(&v4);
        let (port, protocol, _) = name.parts();
        assert!(built.find(&name).is_some());
        let mapped = Name::new(name.address, port, protocol, 6);
        assert_eq!(built.find(&mapped), None);
    }

    #[test]
    fn what_does_not_fit_is_no_directory() {
        let entries = many(capacity::ENDPOINTS as u32 + 1).entries();
        assert_eq!(entries.len(), capacity::ENDPOINTS + 1);
        assert!(Built::of(&entries).is_none());
        assert!(Built::of(&entries[1..]).is_some());
    }
}
