//! Packets on several CPUs in the same moment.

use std::{
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use anyhow::Result;

use super::{Context, Kernel, Ran, once, pin};

impl Kernel {
    /// Runs frames on several CPUs, as many on each: frame n of all in the same moment, as
    /// far as that can be had. Returns what became of them, by CPU.
    pub fn run_together(&mut self, frames: &[Vec<Vec<u8>>], ingress: u32) -> Result<Vec<Vec<Ran>>> {
        let says_ingress = self.says_ingress;
        let program = &*self.loaded.program()?;
        let run = |frame: &[u8]| -> Result<Ran> {
            let context = says_ingress.then(|| Context::new(frame.len(), ingress));
            once(program, frame, context)
        };
        // How often any of them was ready for its next frame.
        let ready = AtomicUsize::new(0);
        thread::scope(|scope| {
            let on = |(cpu, own): (usize, &'_ Vec<Vec<u8>>)| {
                let (ready, run) = (&ready, &run);
                let own = own.clone();
                scope.spawn(move || -> Result<Vec<Ran>> {
                    let pinned = pin(cpu); // whoever fails leaves nobody waiting
                    let mut ran = Vec::new();
                    for (round, frame) in own.iter().enumerate() {
                        ready.fetch_add(1, Ordering::AcqRel);
                        while ready.load(Ordering::Acquire) < (round + 1) * frames.len() {
                            std::hint::spin_loop();
                        }
                        ran.push(run(frame));
                    }
                    pinned?;
                    ran.into_iter().collect()
                })
            };
            let threads: Vec<_> = frames.iter().enumerate().map(on).collect();
            let joined = threads.into_iter().map(thread::ScopedJoinHandle::join);
            joined
                .map(|ran| ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
                .collect()
        })
    }
}
