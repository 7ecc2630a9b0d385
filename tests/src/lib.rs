//! Frames, cases, namespaces and scenarios: how bgswitch is proven.

pub mod cases;
pub mod frame;
pub mod kernel;
pub mod world;
