//! Views of `BPF_F_MMAPABLE` arrays: a store instead of a syscall.

use std::{
    io,
    num::NonZeroUsize,
    os::fd::AsFd,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};

/// The values of an mmapable array map as 64-bit words. Array values are padded
/// to 8 bytes, so a value of N bytes takes up N / 8 words, rounded up.
#[derive(Debug)]
pub struct Words {
    base: NonNull<AtomicU64>,
    words: usize,
}

impl Words {
    /// Maps `words` words of the array behind `fd`.
    pub fn map(fd: impl AsFd, words: usize) -> io::Result<Self> {
        let length = NonZeroUsize::new(words * 8).ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: a fresh shared mapping of a map whose size has been checked;
        // it is never resized, and unmapped only in `drop`.
        let base = unsafe {
            mmap(
                None,
                length,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
                MapFlags::MAP_SHARED,
                fd,
                0,
            )
        }?;
        Ok(Self {
            base: base.cast(),
            words,
        })
    }

    /// Number of words.
    pub const fn len(&self) -> usize {
        self.words
    }

    /// The word at `index`.
    ///
    /// # Panics
    /// When there is none: ids come from the same maps.
    pub fn at(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.words, "word {index} of {}", self.words);
        // SAFETY: inside the mapping (checked above), page-aligned base, and
        // every access of both sides to these words is a whole aligned word.
        unsafe { self.base.add(index).as_ref() }
    }

    /// Loads the word at `index`.
    pub fn load(&self, index: usize) -> u64 {
        self.at(index).load(Ordering::Acquire)
    }

    /// Stores the word at `index`.
    pub fn store(&self, index: usize, value: u64) {
        self.at(index).store(value, Ordering::Release);
    }
}

impl Drop for Words {
    fn drop(&mut self) {
        // SAFETY: the mapping made in `map`; no reference outlives `self`.
        // A failure leaves the mapping to the end of the process.
        let _ = unsafe { munmap(self.base.cast(), self.words * 8) };
    }
}

// SAFETY: the words are atomics, shared with the kernel anyway.
unsafe impl Send for Words {}
// SAFETY: as above.
unsafe impl Sync for Words {}
