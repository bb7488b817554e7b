//! Programs of others, attached as `ip link set ... xdp` does it.

use std::os::fd::AsFd;
use std::process::Command;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{DRV_MODE, SKB_MODE, query, set};
use crate::af_xdp::program::Program;
use crate::af_xdp::{AfXdpError, AfXdpSettings, Mode, Obtained, Steer, open};
use crate::interface::Namespace;

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?} (as root)");
}

/// A namespace with a veth pair, deleted in the end.
struct Place(String);

impl Place {
    fn new(number: u32) -> Self {
        let place = Self(format!("cw-xdp-attach-{}-{number}", std::process::id()));
        ip(&["netns", "add", &place.0]);
        let pair = ["link", "add", "left0", "type", "veth", "peer", "name", "right0"];
        ip(&[["-n", &place.0].as_slice(), &pair].concat());
        ip(&["-n", &place.0, "link", "set", "left0", "up"]);
        place
    }

    fn settings(&self, replace: bool) -> AfXdpSettings {
        AfXdpSettings {
            ifname: "left0".to_owned(),
            queues: 1,
            mode: Mode::Auto,
            replace,
            steer: Steer::All,
            busy_poll: false,
            netns: Some(self.0.clone()),
            patience: std::time::Duration::from_secs(2),
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ended = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

#[test]
fn a_program_without_a_link_is_named_and_comes_back_after_it_was_replaced() {
    for (number, (flags, word)) in (0..).zip([(DRV_MODE, "xdpdrv"), (SKB_MODE, "xdpgeneric")]) {
        let place = Place::new(number);
        let namespace = Namespace::open(Some(&place.0)).unwrap();
        let here = || {
            let socket = Socket::new(NETLINK_ROUTE).unwrap();
            let index = crate::sys::InterfaceSocket::new().unwrap().index("left0").unwrap();
            (socket, index.unwrap())
        };
        // With the addresses' map, it is another one than ours.
        let other = Program::load(1, Steer::Mac, false).unwrap();
        let now = || {
            let (socket, index) = namespace.run(here).unwrap();
            query(&socket, index).unwrap().map(|found| (found.program, found.flags))
        };
        assert_eq!(now(), None);
        let (socket, index) = namespace.run(here).unwrap();
        set(&socket, index, Some(other.program.as_fd()), flags).unwrap();
        let before = now().unwrap();
        assert_eq!(before.1, flags);
        let error = open(&place.settings(false), &[std::sync::Arc::default()]).unwrap_err();
        assert!(matches!(&error, AfXdpError::OtherProgram { .. }), "{error}");
        assert_eq!(
            error.to_string(),
            format!(
                "interface left0 has an XDP program already: program {} (causeway); remove it \
                 with `ip link set dev left0 {word} off`, or let it be replaced with xdp=replace",
                before.0
            )
        );
        assert_eq!(now(), Some(before));
        let uplink = open(&place.settings(true), &[std::sync::Arc::default()]).unwrap();
        assert_eq!(uplink.control.mode(), Obtained::Generic);
        let ours = now().unwrap();
        assert_ne!(ours.0, before.0);
        drop(uplink);
        assert_eq!(now(), Some(before), "it came back");
        set(&socket, index, None, flags).unwrap();
        assert_eq!(now(), None);
    }
}
