//! Frames, cases, namespaces and scenarios: how bgswitch is proven.
//!
//! Without the feature `lab` only what runs on any host is here: frames, the case
//! table, and the packet path's twin.

pub mod cases;
pub mod flow_table;
pub mod frame;
pub mod world;

#[cfg(feature = "lab")]
pub mod api;
#[cfg(feature = "lab")]
pub mod conversation;
#[cfg(feature = "lab")]
pub mod exchange;
#[cfg(feature = "lab")]
pub mod flipper;
#[cfg(feature = "lab")]
pub mod flows;
#[cfg(feature = "lab")]
pub mod generator;
#[cfg(feature = "lab")]
pub mod kernel;
#[cfg(feature = "lab")]
pub mod lab;
#[cfg(feature = "lab")]
pub mod load;
#[cfg(feature = "lab")]
pub mod pass;
#[cfg(feature = "lab")]
pub mod picture;
#[cfg(feature = "lab")]
pub mod scrape;
#[cfg(feature = "lab")]
pub mod terminal;
#[cfg(feature = "lab")]
pub mod wire;
