//! Hearing what servers do, in the kernel: the counts and the connections on their way.

use core::ptr;

use aya_ebpf::helpers::generated::bpf_ktime_get_ns;
use bg_ebpf::exchange::{self, Clock};

use crate::{maps, remembered, watch};

/// Hears a segment of this CPU's packet, whose flow was sought and which was counted for a
/// colour. Returns 0: see [`remembered`].
#[inline(never)]
#[unsafe(no_mangle)]
pub extern "C" fn hear(kind: u32, sequence: u32, payload: u32) -> u64 {
    let Some(scratch) = remembered::scratch() else {
        return 0;
    };
    let Some((service, colour)) = watch::owner(scratch) else {
        return 0;
    };
    // The number of a pair of rows, plus 1.
    let Some(Some(pair)) = maps::LISTENED.get(service).map(|pair| pair.checked_sub(1)) else {
        return 0;
    };
    // SAFETY: this CPU's own value.
    let hash = unsafe { (*scratch).hash };
    let (Some(counts), Some(place)) = (
        maps::SIGNALS.get_ptr_mut(pair as u32 * 2 + colour),
        maps::EXCHANGES.get_ptr_mut(exchange::place(hash)),
    ) else {
        return 0;
    };
    // SAFETY: this CPU's own counts. Another CPU may write the connection's place at this
    // moment, of integers for which every bit pattern is valid: then a time is lost.
    let (counts, place) = unsafe { (&mut *counts, &mut *place) };
    exchange::hear(place, hash, (kind, sequence, payload), &Monotonic, counts);
    0
}

/// `CLOCK_MONOTONIC`.
struct Monotonic;

impl Clock for Monotonic {
    #[inline(always)]
    fn now(&self) -> u32 {
        // SAFETY: the helper takes nothing.
        (unsafe { bpf_ktime_get_ns() } >> 10) as u32
    }

    #[inline(always)]
    fn hide(&self, number: usize) -> usize {
        // SAFETY: a local.
        unsafe { ptr::read_volatile(&raw const number) }
    }
}
