//! A network namespace for one test.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// A namespace that is deleted in the end.
pub(crate) struct Namespace(String);

impl Namespace {
    pub(crate) fn unused_name() -> String {
        let root = rustix::process::geteuid().is_root();
        assert!(root, "this test makes network interfaces: run it as root");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        format!("cw-run-{}-{number}", std::process::id())
    }

    pub(crate) fn new() -> Self {
        Self::named(Self::unused_name())
    }

    pub(crate) fn named(name: String) -> Self {
        let _ = ip(&["netns", "add", &name]);
        Self(name)
    }

    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        let mut all = vec!["-n", &self.0];
        all.extend_from_slice(arguments);
        ip(&all)
    }

    pub(crate) fn has(&self, ifname: &str) -> bool {
        let links = self.ip(&["-o", "link"]);
        [':', '@'].iter().any(|end| links.contains(&format!(" {ifname}{end}")))
    }

    pub(crate) fn tap(&self, name: &str) -> String {
        format!("tap:name={name},ifname={name},netns={}", self.0)
    }

    pub(crate) fn udp(&self, address: &str) -> UdpSocket {
        let address = address.to_owned();
        let socket = self.inside(move || UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        socket
    }

    /// Runs `work` in a thread inside the namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.0)).unwrap();
        std::thread::scope(|scope| {
            let inside = || {
                rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
                work()
            };
            scope.spawn(inside).join().unwrap()
        })
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

pub(crate) fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}
