//! Names, capacities and sizes that the object and the daemon agree on.

use crate::{
    directory::Entry,
    flow::{Flow, Line, TableShape},
    key::{FragmentKeyV4, FragmentKeyV6},
    monitor::Pressure,
    port::Port,
    service::{Backend, ColourStats, Fragment, Interface},
    snat::{Lease, Source},
};

/// Version of the pinned layout: part of the pin directory's name. Raise it with
/// every change of a map's type, key, value or meaning.
pub const LAYOUT: u32 = 5;

/// Name of the XDP program in the object, for frames in one buffer.
pub const PROGRAM: &str = "bgswitch";

/// Name of the same program for frames in several buffers (`xdp.frags`).
pub const PROGRAM_LARGE: &str = "bgswitch_large";

/// Name of the XDP program that sets [`map::CLOCK`] right, in one test run.
pub const SET_CLOCK: &str = "set_clock";

/// Constants in the object that the daemon sets when it loads it: u32, 0 or 1.
pub mod global {
    /// The program is [`super::PROGRAM_LARGE`] (5.18). Unless set: 0.
    pub const LARGE_FRAMES: &str = "LARGE_FRAMES";
    /// The program is one for dry runs: it changes no table and counts nothing.
    pub const DRY_RUN: &str = "DRY_RUN";
}

/// Map names, as in the object and as file names of the pins.
pub mod map {
    /// Array of [`crate::service::CutoverWord`], mmapable; index: service id.
    pub const WORDS: &str = "WORDS";
    /// Array of [`crate::service::FirstFlow`], mmapable; index: service id.
    pub const FIRST_FLOWS: &str = "FIRST_FLOWS";
    /// Array of [`crate::service::PoolWord`], mmapable; index: [`crate::service::PoolWord::index`].
    pub const POOLS: &str = "POOLS";
    /// Array of [`super::MaglevRow`], mmapable: the arena of all pools.
    pub const MAGLEV: &str = "MAGLEV";
    /// Array of [`crate::service::Backend`], mmapable; index: backend id.
    pub const BACKENDS: &str = "BACKENDS";
    /// Array of [`crate::service::Interface`]; index: slot.
    pub const INTERFACES: &str = "INTERFACES";
    /// Hash: [`crate::port::Port`] to slot (u32): of interfaces with XDP and their VLANs,
    /// and of VLAN devices by their own index, as the kernel's routes name them.
    pub const SLOTS: &str = "SLOTS";
    /// Device map; index: slot.
    pub const PORTS: &str = "PORTS";
    /// Array of one [`crate::directory::DirectoryWord`], mmapable.
    pub const DIRECTORY: &str = "DIRECTORY";
    /// Array of [`crate::directory::PilotRow`], mmapable: both halves, one after the other.
    pub const PILOTS: &str = "PILOTS";
    /// Array of [`crate::directory::Entry`], mmapable: both halves, one after the other.
    pub const ENDPOINTS: &str = "ENDPOINTS";
    /// Array of [`crate::flow::Bucket`], mmapable: TCP with proof.
    pub const FLOWS: &str = "FLOWS";
    /// Array like [`FLOWS`]: TCP without proof.
    pub const HALF_OPEN: &str = "HALF_OPEN";
    /// Array like [`FLOWS`]: UDP.
    pub const UDP: &str = "UDP";
    /// Array of [`crate::flow::TableShape`]; index: [`crate::flow::FlowTable`].
    pub const SHAPES: &str = "SHAPES";
    /// Array of [`crate::flow::MarkRow`], mmapable: see [`crate::flow::TableShape::mark`].
    pub const MARKS: &str = "MARKS";
    /// Array of a spin lock and a count of changes (4 bytes each); index:
    /// [`crate::flow::FlowTable`] times [`crate::flow::REGIONS`] plus region, and
    /// behind all tables those of [`LEASES`], by the low bits of the port.
    pub const REGIONS: &str = "REGIONS";
    /// Array of maps; index: block. Each is an array of [`crate::snat::Lease`];
    /// index: [`crate::snat::index`] of the port.
    pub const LEASES: &str = "LEASES";
    /// Array like the inner ones of [`LEASES`], to make blocks of. Not pinned.
    pub const BLOCK: &str = "BLOCK";
    /// Array of [`crate::snat::Source`]; index: block.
    pub const SOURCES: &str = "SOURCES";
    /// LRU hash: [`crate::key::FragmentKeyV4`] to [`crate::service::Fragment`].
    pub const FRAGMENTS_V4: &str = "FRAGMENTS_V4";
    /// LRU hash: [`crate::key::FragmentKeyV6`] to [`crate::service::Fragment`].
    pub const FRAGMENTS_V6: &str = "FRAGMENTS_V6";
    /// Per-CPU array of u64; index: [`crate::reason::Reason`].
    pub const REASONS: &str = "REASONS";
    /// Per-CPU array of [`crate::service::ColourStats`]; index: service * 2 + colour.
    pub const STATS: &str = "STATS";
    /// Per-CPU array of [`crate::monitor::Pressure`]; index: [`crate::flow::FlowTable`].
    pub const PRESSURE: &str = "PRESSURE";

    /// Per-CPU array of one value: the packet path's memory for the packet at hand.
    /// Of no meaning to others, and so not pinned.
    pub const SCRATCH: &str = "SCRATCH";
    /// Array of one [`super::Clock`], of one loaded program, and so not pinned.
    pub const CLOCK: &str = "CLOCK";
    /// Array of one [`crate::monitor::Watch`], mmapable. Like the next two it belongs to
    /// one loaded program, and is not pinned: a new daemon's program is watched by
    /// nobody, whatever the one before it left.
    pub const MONITOR: &str = "MONITOR";
    /// Ring buffer of [`crate::monitor::Sighting`].
    pub const SIGHTINGS: &str = "SIGHTINGS";
    /// Per-CPU array of one u64: sightings that found no room.
    pub const LOST: &str = "LOST";
    /// Array of u64, mmapable; index: service id. The number of the service's pair of rows
    /// in [`SIGNALS`], plus 1; 0: it is not listened to. Of one loaded program, too, as the
    /// next two.
    pub const LISTENED: &str = "LISTENED";
    /// Per-CPU array of [`crate::signals::Signals`]; index: twice the number of the
    /// service's pair, and colour.
    pub const SIGNALS: &str = "SIGNALS";
    /// Array of [`crate::signals::Exchange`]; index: by the flow's hash.
    pub const EXCHANGES: &str = "EXCHANGES";

    /// The map of a flow table.
    pub const fn of(table: crate::flow::FlowTable) -> &'static str {
        match table {
            crate::flow::FlowTable::Established => FLOWS,
            crate::flow::FlowTable::HalfOpen => HALF_OPEN,
            crate::flow::FlowTable::Udp => UDP,
        }
    }

    /// Every map that is pinned.
    pub const ALL: &[&str] = &[
        WORDS,
        FIRST_FLOWS,
        POOLS,
        MAGLEV,
        BACKENDS,
        INTERFACES,
        SLOTS,
        PORTS,
        DIRECTORY,
        PILOTS,
        ENDPOINTS,
        FLOWS,
        HALF_OPEN,
        UDP,
        SHAPES,
        MARKS,
        REGIONS,
        LEASES,
        SOURCES,
        FRAGMENTS_V4,
        FRAGMENTS_V6,
        REASONS,
        STATS,
        PRESSURE,
    ];
}

/// Arena slots in one row of the Maglev array (array values are padded to 8
/// bytes, so one `u32` a row would waste half of the memory).
pub const MAGLEV_ROW: u32 = 16;

/// A row of the Maglev arena: backend ids.
pub type MaglevRow = [u32; MAGLEV_ROW as usize];

/// Room for services: what the tables hold that grow with how many there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Services.
    pub services: u32,
}

impl Room {
    /// As compiled into the object, and the least.
    pub const LEAST: Self = Self { services: 1024 };
    /// The most: each takes three of [`capacity::ENDPOINTS`] at least.
    pub const MOST: Self = Self { services: 20_000 };

    /// Words of pools: two colours, two address families.
    pub const fn pools(self) -> u32 {
        self.services * 4
    }

    /// Backends of all services and colours.
    pub const fn backends(self) -> u32 {
        self.services * 16
    }

    /// Rows of the Maglev arena: of the smallest table of several backends for every
    /// pool.
    pub const fn maglev_rows(self) -> u32 {
        self.services * 64
    }

    /// Statistics: two colours.
    pub const fn stats(self) -> u32 {
        self.services * 2
    }

    /// Maps whose size this is, and how many entries they have.
    pub const fn maps(self) -> [(&'static str, u32); 7] {
        [
            (map::WORDS, self.services),
            (map::FIRST_FLOWS, self.services),
            (map::LISTENED, self.services),
            (map::POOLS, self.pools()),
            (map::MAGLEV, self.maglev_rows()),
            (map::BACKENDS, self.backends()),
            (map::STATS, self.stats()),
        ]
    }
}

/// Capacities compiled into the object; the daemon may set larger ones at load.
pub mod capacity {
    /// Endpoints: of listeners, and of backends that replies come from.
    pub const ENDPOINTS: usize = 65_536;
    /// Interfaces, and VLANs of them.
    pub const INTERFACES: usize = 256;
    /// Established TCP flows; the daemon sets `max_flows`.
    pub const FLOWS: usize = 1_000_000;
    /// TCP flows without proof.
    pub const HALF_OPEN: usize = 262_144;
    /// UDP flows.
    pub const UDP: usize = 262_144;
    /// Blocks of source ports, 0 being nobody's: backend addresses with `snat`.
    pub const BLOCKS: usize = 4096;
    /// Packets in fragments, on their way at one time, per address family.
    pub const FRAGMENTS: usize = 16_384;
}

/// A tick is 2^26 ns (67 ms) of `CLOCK_MONOTONIC`, to the kernel's last jiffy: 32 bits
/// last 9 years.
pub const TICK_SHIFT: u32 = 26;

/// What makes ticks of the kernel's jiffies. It counts them by `CLOCK_MONOTONIC`, so
/// they do not drift apart.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Clock {
    /// Nanoseconds of a jiffy: the kernel's `TICK_NSEC`.
    pub jiffy: u64,
    /// All jiffies together are so many nanoseconds more than `CLOCK_MONOTONIC`.
    pub ahead: u64,
}

impl Clock {
    /// The tick at a count of jiffies.
    #[inline(always)]
    pub const fn tick(&self, jiffies: u64) -> u32 {
        let ns = jiffies.wrapping_mul(self.jiffy).wrapping_sub(self.ahead);
        (ns >> TICK_SHIFT) as u32
    }
}

/// Ticks in `ns` nanoseconds, rounded up, at least 1.
pub const fn ticks(ns: u64) -> u32 {
    let ticks = (ns >> TICK_SHIFT) as u32;
    ticks.saturating_add(1)
}

/// Later fragments follow their first one for so long, in ticks: 30 seconds, as long
/// as Linux keeps what it cannot put together.
pub const FRAGMENT_TICKS: u32 = ticks(30_000_000_000);

/// Nanoseconds in `ticks`.
pub const fn tick_ns(ticks: u32) -> u64 {
    (ticks as u64) << TICK_SHIFT
}

const _: () = {
    assert!(size_of::<Entry>() == 64);
    assert!(size_of::<Flow>() == 40 && size_of::<Line>() == 64);
    assert!(size_of::<TableShape>() == 24);
    assert!(size_of::<FragmentKeyV4>() == 24 && size_of::<FragmentKeyV6>() == 48);
    assert!(size_of::<Fragment>() == 56);
    assert!(size_of::<Backend>() == 32);
    assert!(size_of::<Interface>() == 32 && size_of::<Port>() == 16);
    assert!(size_of::<ColourStats>() == 56);
    assert!(size_of::<Lease>() == 32 && size_of::<Source>() == 16);
    assert!(size_of::<Pressure>() == 16 && size_of::<Clock>() == 16);
};

#[cfg(feature = "user")]
mod pod {
    use super::{
        Backend, Clock, ColourStats, Entry, Fragment, FragmentKeyV4, FragmentKeyV6, Interface,
        Lease, Port, Pressure, Source, TableShape,
    };

    macro_rules! pod {
        ($($name:ty),+) => {$(
            // SAFETY: repr(C), Copy, 'static, integers and byte arrays only, and no
            // padding: the size asserts above equal the sums of the fields.
            unsafe impl aya::Pod for $name {}
        )+};
    }
    pod!(
        Backend,
        Clock,
        ColourStats,
        Entry,
        Fragment,
        FragmentKeyV4,
        FragmentKeyV6,
        Interface,
        Lease,
        Port,
        Pressure,
        Source,
        TableShape
    );
}
