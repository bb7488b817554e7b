//! Programs of others, attached as `ip link set ... xdp` does it.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use super::{DRV_MODE, SKB_MODE, query, set};
use crate::af_xdp::program::Program;
use crate::af_xdp::testbed::Space;
use crate::af_xdp::{AfXdpError, AfXdpSettings, Obtained, Steer, Umems, open};
use crate::interface::Namespace;

/// A namespace with a veth pair.
fn space(number: u32) -> Space {
    let space = Space::new(&format!("attach-{number}"));
    space.ip(&["link", "add", "left0", "type", "veth", "peer", "name", "right0"]);
    space.ip(&["link", "set", "left0", "up"]);
    space
}

#[test]
fn a_program_without_a_link_is_named_and_comes_back_after_it_was_replaced() {
    for (number, (flags, word)) in (0..).zip([(DRV_MODE, "xdpdrv"), (SKB_MODE, "xdpgeneric")]) {
        let place = space(number);
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
        let open = |replace| {
            let settings = AfXdpSettings { replace, ..place.settings("left0") };
            open(&settings, &Umems::default(), &[Arc::default()])
        };
        let error = open(false).unwrap_err();
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
        // Who waits for it makes no memory meanwhile; and what has no room replaces nothing.
        let umems = Umems::default();
        let umem = umems.get("u", 1).unwrap();
        let _full = umem.take("eth0", 1, Duration::ZERO).unwrap();
        let open_in_full = |replace| {
            let umem = Some("u".to_owned());
            let settings = AfXdpSettings { umem, replace, ..place.settings("left0") };
            super::super::open(&settings, &umems, &[Arc::default()]).unwrap_err()
        };
        let error = open_in_full(false);
        assert!(matches!(&error, AfXdpError::OtherProgram { .. }), "{error}");
        let error = open_in_full(true);
        assert!(matches!(&error, AfXdpError::NoRoom(_)), "{error}");
        assert_eq!(now(), Some(before));
        let uplink = open(true).unwrap();
        assert_eq!(uplink.control.mode(), Obtained::Generic);
        let ours = now().unwrap();
        assert_ne!(ours.0, before.0);
        drop(uplink);
        assert_eq!(now(), Some(before), "it came back");
        set(&socket, index, None, flags).unwrap();
        assert_eq!(now(), None);
    }
}
