//! The packet path: parse, look up, decide, rewrite, verdict.
//!
//! Generic over two traits, [`packet::Packet`] and [`tables::Tables`], and free
//! of I/O, so the same code runs in the kernel (over an XDP context and BPF
//! maps, see the binary) and on the host (over a byte buffer and hash maps).
#![no_std]
#![deny(unsafe_code)]

pub mod checksum;
pub mod errors;
pub mod exchange;
pub mod flows;
mod fragments;
pub mod leases;
pub mod packet;
pub mod parse;
pub mod pipeline;
pub mod preview;
mod resets;
pub mod rewrite;
pub mod stream;
pub mod tables;
mod vlan;
