//! The far end of a link that counts what comes in, and drops it.

use std::{fs::File, net::Ipv4Addr};

use anyhow::{Context as _, Result, ensure};
use aya::{
    Ebpf, EbpfLoader, Pod,
    maps::Array,
    programs::{Xdp, XdpMode},
};
use bg_common::{abi::map, flow::buckets_for};
use bg_ebpf::stream::Arrivals;
use bg_tests::kernel::in_namespace;

use crate::packets::INTENDED;

/// Flows that the object's flow table is made for, which nobody uses here.
const FEW: u32 = 1000;

/// A program at the end of a link, until it is dropped.
pub struct FarEnd {
    ebpf: Ebpf,
}

impl FarEnd {
    /// Attaches it to an interface of a namespace, with room for the times of
    /// `times` frames.
    pub fn attach(namespace: &File, interface: &str, times: u32) -> Result<Self> {
        let mut ebpf = EbpfLoader::new()
            .map_max_entries(map::FLOWS, buckets_for(FEW))
            .map_max_entries("TIMES", times.max(1))
            .load(bg_userspace::object::BENCH)?;
        let program: &mut Xdp = ebpf
            .program_mut("arrive")
            .context("no program arrive")?
            .try_into()?;
        program.load()?;
        in_namespace(namespace, || {
            program.attach(interface, XdpMode::Driver).map(drop)
        })
        .with_context(|| format!("attaching to {interface}"))?;
        Ok(Self { ebpf })
    }

    /// Begins anew: counts frames for an address, or one of its 24-bit network, and a
    /// port.
    pub fn expect(&mut self, address: &str, port: u16, timed: bool) -> Result<()> {
        let [a, b, c, _] = address.parse::<Ipv4Addr>()?.octets();
        let arrivals = Arrivals {
            network: [a, b, c],
            port: port.to_be_bytes(),
            timed: u8::from(timed),
            ..Arrivals::default()
        };
        let map = self.ebpf.map_mut("ARRIVALS").context("no map ARRIVALS")?;
        Ok(Array::<_, Entry>::try_from(map)?.set(0, Entry(arrivals), 0)?)
    }

    /// How many intended frames came in.
    ///
    /// # Errors
    /// When more than one in a thousand was for somebody else: then the figure would
    /// be of something else, too.
    pub fn arrived(&self) -> Result<u64> {
        let map = self.ebpf.map("ARRIVALS").context("no map ARRIVALS")?;
        let Arrivals {
            intended, others, ..
        } = Array::<_, Entry>::try_from(map)?.get(&0, 0)?.0;
        ensure!(
            intended * 1000 >= (intended + others) * INTENDED,
            "{others} of {} frames arrived that were for somebody else",
            intended + others
        );
        Ok(intended)
    }

    /// When intended frames came in, `CLOCK_MONOTONIC` ns, in order; the first ones
    /// that there is room for.
    pub fn times(&self) -> Result<Vec<u64>> {
        let map = self.ebpf.map("TIMES").context("no map TIMES")?;
        let times: Array<_, u64> = map.try_into()?;
        let count = self.arrived()?.min(u64::from(times.len()));
        (0..count as u32)
            .map(|number| Ok(times.get(&number, 0)?))
            .collect()
    }
}

#[derive(Clone, Copy)]
#[repr(transparent)]
struct Entry(Arrivals);

// SAFETY: repr(C), Copy, 'static, integers only: two u64, six bytes and a u16, so
// no padding.
unsafe impl Pod for Entry {}
