#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

pub mod capture;
pub mod client;
pub mod config;
pub mod handover;
mod keys;
pub mod metrics;
pub mod protocol;
pub mod scrape;
pub mod server;
pub mod spec;
mod suggest;
pub mod table;
pub mod top;
mod values;

pub use config::{Config, ConfigError, Difference, StaticEntry, SwitchSettings};
pub use protocol::{Reply, Request};
pub use spec::{
    AfXdpSpec, InterfaceSpec, LimitsSpec, PacketMmapSpec, PortKind, PortSpec, SpecError,
    VhostUserSpec, umem_rooms,
};
pub use values::{
    MacAddress, Poll, SocketMode, SocketRole, StateDir, Steer, VlanId, Workers, XdpMode,
};
