//! What unit tests need of the kernel.

use std::process::Command;
use std::time::Duration;

use super::{AfXdpSettings, Mode, Steer};

pub(super) fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?} (as root)");
}

/// A network namespace that is deleted in the end.
pub(super) struct Space(pub(super) String);

impl Space {
    /// One of this process, which has a `name` of its own.
    pub(super) fn new(name: &str) -> Self {
        let space = Self(format!("cw-xdp-{name}-{}", std::process::id()));
        ip(&["netns", "add", &space.0]);
        space
    }

    /// Runs `ip` in it.
    pub(super) fn ip(&self, arguments: &[&str]) {
        ip(&[&["-n", &self.0], arguments].concat());
    }

    /// One queue of an interface in it.
    pub(super) fn settings(&self, ifname: &str) -> AfXdpSettings {
        AfXdpSettings {
            ifname: ifname.to_owned(),
            queues: 1,
            mode: Mode::Auto,
            replace: false,
            steer: Steer::All,
            busy_poll: false,
            netns: Some(self.0.clone()),
            umem: None,
            patience: Duration::from_secs(2),
        }
    }
}

impl Drop for Space {
    fn drop(&mut self) {
        let _ended = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}
