//! Frames, cases, namespaces and scenarios: how bgswitch is proven.

pub mod cases;
pub mod frame;
pub mod kernel;
pub mod lab;
pub mod load;
pub mod world;
