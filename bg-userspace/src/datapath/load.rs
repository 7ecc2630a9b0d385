//! Loading: one object, for kernels that have different things.

use std::fs;

use aya::{
    Ebpf, EbpfLoader,
    maps::{Array, MapError},
    programs::{ProgramType, TestRun as _, TestRunAttrs, TestRunOptions, Xdp},
    sys::{BpfHelper, is_helper_supported},
};
use bg_common::abi::{Clock, PROGRAM, PROGRAM_LARGE, SET_CLOCK, global, map};
use nix::{
    sys::time::TimeValLike as _,
    time::{ClockId, clock_getres},
};

use super::{Error, error::describe};
use crate::object::OBJECT;

/// What the running kernel has, of what not every kernel has that the packet path
/// runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Features {
    /// XDP on frames in several buffers, `xdp.frags`, and their redirect (kernel 6.3).
    /// Without it
    /// drivers refuse XDP where the MTU does not fit one page.
    pub large_frames: bool,
}

impl Features {
    /// Asks the kernel.
    pub fn probe() -> Result<Self, Error> {
        let has = |helper| {
            is_helper_supported(ProgramType::Xdp, helper)
                .map_err(|e| Error::bpf("asking the kernel for its BPF helpers", &e))
        };
        Ok(Self {
            // It came with the flag that such programs are loaded with, in 5.18; but
            // before 6.3 a frame in several buffers is lost on its way to another
            // interface.
            large_frames: has(BpfHelper::BPF_FUNC_xdp_get_buff_len)? && release() >= (6, 3),
        })
    }

    /// Loads the object as the kernel can run it, its program too.
    pub fn load(self, loader: &mut EbpfLoader<'_>) -> Result<Loaded, Error> {
        let ebpf = loader
            .override_global(global::LARGE_FRAMES, number(self.large_frames), true)
            .load(OBJECT)
            .map_err(|e| Error::bpf("loading the eBPF object", &e))?;
        let mut loaded = Loaded {
            ebpf,
            features: self,
        };
        loaded.set_clock()?;
        loaded
            .program()?
            .load()
            .map_err(|e| Error::step("the kernel's verifier", describe(&e)))?;
        Ok(loaded)
    }

    /// Says what this kernel lacks, and what it means.
    pub fn tell(self) {
        if self.large_frames {
            tracing::info!("frames may lie in several buffers (xdp.frags): any MTU");
        } else {
            tracing::warn!(
                "this kernel has no XDP on frames in several buffers (6.3 has): the MTU of every \
                 interface must fit one page, about 3 500 bytes"
            );
        }
    }
}

/// The running kernel's release: its first two numbers.
pub fn release() -> (u32, u32) {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = text
        .split(|c: char| !c.is_ascii_digit())
        .map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

const fn number(has: bool) -> &'static u32 {
    if has { &1 } else { &0 }
}

/// The object, loaded for this kernel.
#[derive(Debug)]
pub struct Loaded {
    /// Its maps, and its programs.
    pub ebpf: Ebpf,
    /// What it was loaded for.
    pub features: Features,
}

impl Loaded {
    /// The program that is in use.
    pub fn program(&mut self) -> Result<&mut Xdp, Error> {
        let name = if self.features.large_frames {
            PROGRAM_LARGE
        } else {
            PROGRAM
        };
        self.program_called(name)
    }

    fn program_called(&mut self, name: &str) -> Result<&mut Xdp, Error> {
        self.ebpf
            .program_mut(name)
            .ok_or_else(|| Error::step("the eBPF object", format!("has no program {name}")))?
            .try_into()
            .map_err(|e| Error::step("the eBPF object", describe(&e)))
    }

    /// Lets the program tell ticks by the kernel's jiffies.
    fn set_clock(&mut self) -> Result<(), Error> {
        let failed = |e: &(dyn std::error::Error + 'static)| Error::bpf("setting the clock", e);
        let jiffy = clock_getres(ClockId::CLOCK_MONOTONIC_COARSE).map_err(|e| failed(&e))?;
        let clock = Clock {
            jiffy: jiffy.num_nanoseconds() as u64,
            ahead: 0,
        };
        let map = self.ebpf.map_mut(map::CLOCK);
        let map = map.ok_or_else(|| Error::step("the eBPF object", "has no CLOCK"))?;
        let mut clocks: Array<_, Clock> = map.try_into().map_err(|e: MapError| failed(&e))?;
        clocks.set(0, clock, 0).map_err(|e| failed(&e))?;
        let program = self.program_called(SET_CLOCK)?;
        program.load().map_err(|e| failed(&e))?;
        let frame = [0; 64];
        let mut out = [0; 64];
        program
            .test_run(TestRunOptions {
                data_in: Some(&frame),
                data_out: Some(&mut out),
                ctx_in: None,
                ctx_out: None,
                repeat: 1,
                attrs: TestRunAttrs::new(),
            })
            .map_err(|e| failed(&e))?;
        program.unload().map_err(|e| failed(&e))
    }
}
