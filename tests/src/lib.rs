//! Frames, cases, namespaces and scenarios: how bgswitch is proven.

pub mod cases;
pub mod conversation;
pub mod exchange;
pub mod flipper;
pub mod flow_table;
pub mod flows;

pub mod frame;
pub mod generator;
pub mod kernel;
pub mod lab;
pub mod load;
pub mod pass;
pub mod wire;
pub mod world;
