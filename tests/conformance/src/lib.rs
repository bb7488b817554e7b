//! Runners of the real peers that Causeway must agree with, for the conformance tests and the demo.
//!
//! ```text
//!  Environment ── finds or fetches ──► QEMU 10, QEMU 7.2, guest image, DPDK, OVS, hugepages
//!       │
//!       ├──► Guest        a QEMU virtual machine with a shell on its console
//!       ├──► VirtioUser   dpdk-testpmd, a vhost-user front end without a VM
//!       ├──► Forwarder    dpdk-testpmd as the back end, which decides nothing
//!       ├──► OvsDpdk      the switch that is built on the same library
//!       ├──► VhostUserNet cloud-hypervisor's back end: one guest, one tap
//!       ├──► Netns        a network namespace with veth pairs, as a container has one
//!       ├──► Looped       two uplinks of the switch, wired to each other
//!       └──► Switch       `causeway run`, asked through `causeway ctl --json`
//! ```
//!
//! **Limits** Every wait has a time-out, every process ends with the value that started it, and
//! every test works in a folder of its own.
#![forbid(unsafe_code)]

pub mod environment;
pub mod forwarder;
pub mod guest;
pub mod looped;
pub mod netns;
pub mod ovs;
pub mod pairwise;
pub mod process;
pub mod qmp;
pub mod scratch;
pub mod switch;
pub mod tap;
pub mod testpmd;
pub mod vhost_user_net;
pub mod virtio_user;

pub use environment::{Environment, QemuVersion};
pub use forwarder::Forwarder;
pub use guest::{Guest, GuestSpec, Side};
pub use looped::Looped;
pub use netns::Netns;
pub use ovs::OvsDpdk;
pub use process::Process;
pub use scratch::Scratch;
pub use switch::{Ledger, Switch};
pub use tap::HostTap;
pub use testpmd::{Cycles, Forwarded};
pub use vhost_user_net::VhostUserNet;
pub use virtio_user::{Topology, VirtioUser, VirtioUserSpec};

/// Whether a conformance test configures the machine (hugepages, taps, namespaces): needs root.
#[must_use]
pub fn needs_root(test: &str) -> bool {
    let hugepages = ["runners/", "virtio-user/", "configs/hugepages"];
    let taps = ["switch/guest-reaches-host", "switch/ports-come-and-go", "uplinks/", "migration/"];
    hugepages.iter().chain(&taps).chain(&["tcp/"]).any(|prefix| test.starts_with(prefix))
}
