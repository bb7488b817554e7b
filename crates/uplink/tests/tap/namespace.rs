//! A network namespace for one test.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use port::OffloadSet;
use uplink::tap::{Tap, TapError, TapSettings, open};

/// A namespace that is deleted in the end.
pub(crate) struct Namespace(String);

impl Namespace {
    pub(crate) fn new() -> Self {
        let root = rustix::process::geteuid().is_root();
        assert!(root, "this test makes network interfaces: run it as root");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self::named(&format!("cw-uplink-{}-{number}", std::process::id()))
    }

    pub(crate) fn named(name: &str) -> Self {
        let _ = ip(&["netns", "add", name]);
        Self(name.to_owned())
    }

    pub(crate) fn name(&self) -> &str {
        &self.0
    }

    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        let mut all = vec!["-n", &self.0];
        all.extend_from_slice(arguments);
        ip(&all)
    }

    /// Keeps the kernel from sending frames of its own.
    pub(crate) fn quiet(&self) {
        self.inside(|| {
            for name in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
                let _ = std::fs::write(path, "1");
            }
        });
    }

    pub(crate) fn has(&self, ifname: &str) -> bool {
        let links = self.ip(&["-o", "link"]);
        [':', '@'].iter().any(|end| links.contains(&format!(" {ifname}{end}")))
    }

    pub(crate) fn settings(&self, ifname: &str, queues: u16) -> TapSettings {
        let (ifname, netns) = (ifname.to_owned(), Some(self.0.clone()));
        TapSettings { ifname, queues, netns, offloads: OffloadSet::ALL }
    }

    pub(crate) fn open(&self, ifname: &str, queues: u16) -> Result<Tap, TapError> {
        let counters: Vec<_> = (0..queues).map(|_| Arc::default()).collect();
        open(&self.settings(ifname, queues), &counters)
    }

    pub(crate) fn address(&self, ifname: &str, mac: &str, address: &str, mtu: u32) {
        let mtu = mtu.to_string();
        let _ = self.ip(&["link", "set", ifname, "address", mac, "mtu", &mtu]);
        let _ = self.ip(&["address", "add", address, "dev", ifname]);
    }

    pub(crate) fn neighbour(&self, ifname: &str, address: &str, mac: &str) {
        let _ = self.ip(&["neigh", "replace", address, "lladdr", mac, "dev", ifname]);
    }

    /// A socket in the namespace that gives up after a short wait.
    pub(crate) fn udp(&self, address: &str) -> UdpSocket {
        let address = address.to_owned();
        let socket = self.inside(move || UdpSocket::bind(address).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        socket
    }

    /// Runs `work` in a thread inside the namespace.
    pub(crate) fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let namespace = File::open(format!("/run/netns/{}", self.0)).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                rustix::thread::move_into_link_name_space(namespace.as_fd(), None).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().expect("the ip program (iproute2)");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}
