//! Pinned state: where it lies, what shape it must have, how it is removed.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use aya::{
    EbpfLoader,
    maps::{MapInfo, MapType},
};
use bg_common::{
    abi::{LAYOUT, MAGLEV_ROW, Room, capacity, map},
    directory::{Entry, LINES, PILOT_ROW, PILOTS, PilotRow},
    flow::{Bucket, FlowTable, MARK_ROW, MARKS, MarkRow, REGIONS, TableShape, buckets_for},
    key::{FragmentKeyV4, FragmentKeyV6},
    monitor::Pressure,
    port::Port,
    reason::REASONS,
    service::{Backend, ColourStats, Fragment, Interface},
    snat::Source,
};
use nix::fcntl::{Flock, FlockArg};

use super::{error::Error, inspect::is_on_bpffs};

/// The directories of one gateway's pins.
#[derive(Clone, Debug)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    /// Pins below `bpffs`.
    pub fn new(bpffs: &Path) -> Self {
        Self {
            root: bpffs.to_owned(),
        }
    }

    fn layout(&self) -> PathBuf {
        self.root.join(format!("v{LAYOUT}"))
    }

    /// The pin of a map.
    pub fn map(&self, name: &str) -> PathBuf {
        self.layout().join("maps").join(name)
    }

    /// Loads the object over the maps whose pins are here, and pins those that are new.
    pub fn loader(&self) -> EbpfLoader<'static> {
        let mut loader = EbpfLoader::new();
        for name in map::ALL {
            loader.map_pin_path(name, self.map(name));
        }
        if let Some(buckets) = self.flow_buckets() {
            loader.map_max_entries(map::FLOWS, buckets);
        }
        if let Some(room) = self.room() {
            make_room(&mut loader, room);
        }
        loader
    }

    /// The pin of the program.
    pub fn program(&self) -> PathBuf {
        self.layout().join("program")
    }

    /// The pin of an interface's link. The BPF file system allows no dots, as in
    /// `eth0.100`; no interface's name holds a colon.
    pub fn link(&self, interface: &str) -> PathBuf {
        self.layout()
            .join("links")
            .join(interface.replace('.', ":"))
    }

    /// Names of the interfaces with a pinned link, of any layout.
    pub fn links(&self) -> Vec<String> {
        self.layouts()
            .iter()
            .filter_map(|layout| fs::read_dir(layout.join("links")).ok())
            .flatten()
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .map(|name| name.replace(':', "."))
            .collect()
    }

    /// Makes the root directory and locks it against a second daemon.
    pub fn lock(&self) -> Result<Lock, Error> {
        if is_on_bpffs(&self.root) != Ok(true) {
            return Err(Error::NoBpffs {
                path: self.root.clone(),
            });
        }
        fs::create_dir_all(&self.root)
            .map_err(Error::io(format!("making {}", self.root.display())))?;
        let directory = fs::File::open(&self.root)
            .map_err(Error::io(format!("opening {}", self.root.display())))?;
        let directory = Flock::lock(directory, FlockArg::LockExclusiveNonblock)
            .map_err(|_| Error::Locked(self.root.clone()))?;
        Ok(Lock {
            pins: self.clone(),
            _directory: directory,
        })
    }

    /// The directories of all layouts. Whatever else lies below the root is not
    /// ours.
    fn layouts(&self) -> Vec<PathBuf> {
        let is_layout = |name: &str| {
            name.strip_prefix('v')
                .is_some_and(|version| version.parse::<u32>().is_ok())
        };
        fs::read_dir(&self.root)
            .into_iter()
            .flatten()
            .flatten()
            .filter(|entry| entry.file_name().to_str().is_some_and(is_layout))
            .map(|entry| entry.path())
            .collect()
    }

    /// Refuses state of another layout, and maps that are not what their names
    /// say. `max_flows` and `max_services` are not checked here: see
    /// [`Pins::flow_buckets`] and [`Pins::room`].
    pub fn check(&self) -> Result<(), Error> {
        let ours = self.layout();
        if let Some(other) = self.layouts().into_iter().find(|layout| *layout != ours) {
            return Err(Error::OtherLayout(other));
        }
        for (name, kind, key, value, entries, flags) in shapes(self.room().unwrap_or(Room::LEAST)) {
            let path = self.map(name);
            if !path.exists() {
                continue;
            }
            let info = MapInfo::from_pin(&path)
                .map_err(|error| Error::bpf(format!("reading {}", path.display()), &error))?;
            let describe = |kind: &MapType, key, value, entries: u32, flags| {
                format!(
                    "type {kind:?}, key {key}, value {value}, {entries} entries, flags {flags:#x}"
                )
            };
            let found_kind = info.map_type().unwrap_or(MapType::Unspecified);
            // The table of established flows is as large as was asked for when it was made.
            let wanted = if entries == 0 {
                info.max_entries()
            } else {
                entries
            };
            let found = (
                found_kind,
                info.key_size(),
                info.value_size(),
                info.max_entries(),
                info.map_flags(),
            );
            if found != (kind, key, value, wanted, flags) {
                return Err(Error::WrongShape {
                    path,
                    found: describe(&found.0, found.1, found.2, found.3, found.4),
                    expected: describe(&kind, key, value, wanted, flags),
                });
            }
        }
        Ok(())
    }

    /// Buckets of the pinned table of established flows, if there is one.
    pub fn flow_buckets(&self) -> Option<u32> {
        MapInfo::from_pin(self.map(map::FLOWS))
            .ok()
            .map(|info| info.max_entries())
    }

    /// Room for services in the pinned tables, if there are any.
    pub fn room(&self) -> Option<Room> {
        // The first one that can be ours says it: a start may have been killed before it
        // made all of them.
        Room::LEAST.maps().into_iter().find_map(|(name, least)| {
            let info = MapInfo::from_pin(self.map(name)).ok()?;
            let services = info.max_entries() / (least / Room::LEAST.services);
            let can_be = Room::LEAST.services..=Room::MOST.services;
            can_be.contains(&services).then_some(Room { services })
        })
    }

    /// Makes the directories of this layout.
    pub fn make(&self) -> Result<(), Error> {
        for directory in ["maps", "links"] {
            let path = self.layout().join(directory);
            fs::create_dir_all(&path).map_err(Error::io(format!("making {}", path.display())))?;
        }
        Ok(())
    }

    /// Removes every pin of every layout; links first, so that no program runs
    /// on half of its maps. Returns what was removed.
    pub fn remove(&self) -> Result<Vec<PathBuf>, Error> {
        let mut removed = Vec::new();
        let layouts = self.layouts();
        for part in ["links", "program", "maps"] {
            for layout in &layouts {
                remove_tree(&layout.join(part), &mut removed)?;
            }
        }
        for layout in layouts {
            remove_tree(&layout, &mut removed)?;
        }
        Ok(removed)
    }

    /// True when there is something to adopt.
    pub fn hold_state(&self) -> Result<bool, Error> {
        let path = self.map(map::WORDS);
        match fs::symlink_metadata(&path) {
            Ok(_) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(Error::io(format!("reading {}", path.display()))(error)),
        }
    }
}

/// The right to change a gateway's packet path. A root directory that is still
/// empty at its end goes with it.
#[derive(Debug)]
pub struct Lock {
    pins: Pins,
    _directory: Flock<fs::File>,
}

impl Lock {
    /// What is locked.
    pub const fn pins(&self) -> &Pins {
        &self.pins
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.pins.root);
    }
}

fn remove_tree(path: &Path, removed: &mut Vec<PathBuf>) -> Result<(), Error> {
    let failed = || Error::io(format!("removing {}", path.display()));
    if path.is_dir() && !path.is_symlink() {
        for entry in fs::read_dir(path).map_err(failed())? {
            remove_tree(&entry.map_err(failed())?.path(), removed)?;
        }
        fs::remove_dir(path).map_err(failed())
    } else if path.symlink_metadata().is_ok() {
        fs::remove_file(path).map_err(failed())?;
        removed.push(path.to_owned());
        Ok(())
    } else {
        Ok(())
    }
}

type Shape = (&'static str, MapType, u32, u32, u32, u32);

/// Makes what is loaded without pins as large as there is room for services.
pub fn make_room(loader: &mut EbpfLoader<'_>, room: Room) {
    for (name, entries) in room.maps() {
        loader.map_max_entries(name, entries);
    }
}

/// Name, type, key size, value size, entries (0 = any), flags.
fn shapes(room: Room) -> Vec<Shape> {
    const MMAPABLE: u32 = 1 << 10;
    const fn of<T>() -> u32 {
        size_of::<T>() as u32
    }
    let services = room.services;
    let slots = capacity::INTERFACES as u32;
    let half_open = buckets_for(capacity::HALF_OPEN as u32);
    let udp = buckets_for(capacity::UDP as u32);
    let bucket = of::<Bucket>();
    let tables = FlowTable::ALL.len() as u32;
    let blocks = capacity::BLOCKS as u32;
    vec![
        (map::WORDS, MapType::Array, 4, 8, services, MMAPABLE),
        (map::FIRST_FLOWS, MapType::Array, 4, 8, services, MMAPABLE),
        (map::POOLS, MapType::Array, 4, 8, room.pools(), MMAPABLE),
        (
            map::MAGLEV,
            MapType::Array,
            4,
            MAGLEV_ROW * 4,
            room.maglev_rows(),
            MMAPABLE,
        ),
        (
            map::BACKENDS,
            MapType::Array,
            4,
            of::<Backend>(),
            room.backends(),
            MMAPABLE,
        ),
        (
            map::INTERFACES,
            MapType::Array,
            4,
            of::<Interface>(),
            slots,
            0,
        ),
        (
            map::SLOTS,
            MapType::Hash,
            size_of::<Port>() as u32,
            4,
            2 * slots,
            0,
        ),
        (
            map::FRAGMENTS_V4,
            MapType::LruHash,
            size_of::<FragmentKeyV4>() as u32,
            of::<Fragment>(),
            capacity::FRAGMENTS as u32,
            0,
        ),
        (
            map::FRAGMENTS_V6,
            MapType::LruHash,
            size_of::<FragmentKeyV6>() as u32,
            of::<Fragment>(),
            capacity::FRAGMENTS as u32,
            0,
        ),
        // The kernel sets BPF_F_RDONLY_PROG on device maps by itself.
        (map::PORTS, MapType::DevMap, 4, 8, slots, 1 << 7),
        (map::DIRECTORY, MapType::Array, 4, 8, 1, MMAPABLE),
        (
            map::PILOTS,
            MapType::Array,
            4,
            of::<PilotRow>(),
            2 * PILOTS / PILOT_ROW,
            MMAPABLE,
        ),
        (
            map::ENDPOINTS,
            MapType::Array,
            4,
            of::<Entry>(),
            2 * LINES,
            MMAPABLE,
        ),
        (map::FLOWS, MapType::Array, 4, bucket, 0, MMAPABLE),
        (
            map::HALF_OPEN,
            MapType::Array,
            4,
            bucket,
            half_open,
            MMAPABLE,
        ),
        (map::UDP, MapType::Array, 4, bucket, udp, MMAPABLE),
        (
            map::SHAPES,
            MapType::Array,
            4,
            of::<TableShape>(),
            tables,
            0,
        ),
        (
            map::MARKS,
            MapType::Array,
            4,
            of::<MarkRow>(),
            tables * MARKS / MARK_ROW,
            MMAPABLE,
        ),
        (
            map::REGIONS,
            MapType::Array,
            4,
            8,
            (tables + 1) * REGIONS,
            0,
        ),
        (map::LEASES, MapType::ArrayOfMaps, 4, 4, blocks, 0),
        (
            map::SOURCES,
            MapType::Array,
            4,
            of::<Source>(),
            blocks,
            MMAPABLE,
        ),
        (map::REASONS, MapType::PerCpuArray, 4, 8, REASONS, 0),
        (
            map::STATS,
            MapType::PerCpuArray,
            4,
            of::<ColourStats>(),
            room.stats(),
            0,
        ),
        (
            map::PRESSURE,
            MapType::PerCpuArray,
            4,
            of::<Pressure>(),
            tables,
            0,
        ),
    ]
}
