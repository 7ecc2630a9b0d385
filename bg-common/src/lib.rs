//! The words shared by the packet path and the daemon.
//!
//! **Byte order.** Addresses and ports are byte arrays in network byte order,
//! as they stand in a packet: `[u8; 4]`, `[u8; 16]`, `[u8; 2]`. Everything
//! else (ids, ticks, words) is native-endian, because it never leaves the host.
//!
//! **Layout.** Every type that crosses the kernel boundary is `repr(C)`, has no
//! padding and only fields for which every bit pattern is valid; `abi` asserts
//! the sizes. Change one, and [`abi::LAYOUT`] must change with it.
#![cfg_attr(not(test), no_std)]

pub mod abi;
pub mod directory;
pub mod flow;
pub mod key;
pub mod maglev;
pub mod monitor;
pub mod port;
pub mod reason;
pub mod service;
pub mod signals;
pub mod snat;
