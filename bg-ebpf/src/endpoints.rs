//! The directory of endpoints in the kernel.

use core::ptr;

use aya_ebpf::{bindings::BPF_F_MMAPABLE, btf_maps::Array, macros::btf_map};
use bg_common::directory::{
    Directory, DirectoryWord, Entry, LINES, Name, PILOT_ROW, PILOTS as PILOT_COUNT, PilotRow,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;

#[btf_map]
pub static DIRECTORY: Array<u64, 1, MMAPABLE> = Array::new();
#[btf_map]
pub static PILOTS: Array<PilotRow, { (2 * PILOT_COUNT / PILOT_ROW) as usize }, MMAPABLE> =
    Array::new();
#[btf_map]
pub static ENDPOINTS: Array<Entry, { 2 * LINES as usize }, MMAPABLE> = Array::new();

struct Halves;

impl Directory for Halves {
    #[inline(always)]
    fn word(&self) -> DirectoryWord {
        // SAFETY: a valid map value, 8-byte aligned; volatile, so that it is one load.
        DirectoryWord(
            DIRECTORY
                .get_ptr(0)
                .map_or(0, |word| unsafe { ptr::read_volatile(word) }),
        )
    }

    #[inline(always)]
    fn pilot(&self, index: u32) -> Option<u16> {
        let row = PILOTS.get(index / PILOT_ROW)?;
        row.get((index % PILOT_ROW) as usize).copied()
    }

    #[inline(always)]
    fn line(&self, index: u32) -> Option<&Entry> {
        ENDPOINTS.get(index)
    }
}

/// Whose an endpoint is. What is found does not change: the daemon writes the half
/// that no packet reads.
#[inline(always)]
pub fn whose(name: &Name) -> Option<&'static Entry> {
    let entry = Halves.find(name)?;
    // SAFETY: the values of an array map are never freed while the program runs.
    Some(unsafe { &*ptr::from_ref(entry) })
}
