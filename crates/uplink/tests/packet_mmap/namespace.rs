//! Two ends of a veth pair in network namespaces of one test.

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use uplink::packet_mmap::{PacketMmap, PacketMmapError, PacketMmapSettings, open};

/// A namespace that is deleted in the end.
pub(crate) struct Namespace(pub(crate) String);

impl Namespace {
    pub(crate) fn new() -> Self {
        let root = rustix::process::geteuid().is_root();
        assert!(root, "this test makes network interfaces: run it as root");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = Self(format!("cw-pmmap-{}-{number}", std::process::id()));
        let _ = ip(&["netns", "add", &namespace.0]);
        namespace.inside(|| {
            for name in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
                let _ = std::fs::write(path, "1");
            }
        });
        namespace
    }

    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        let mut all = vec!["-n", &self.0];
        all.extend_from_slice(arguments);
        ip(&all)
    }

    /// A pair `name` in this namespace, and `peer` in `other`; both up.
    pub(crate) fn pair(&self, name: &str, other: &Self, peer: &str, mtu: u32) {
        let mtu = mtu.to_string();
        let _ = self.ip(&[
            "link",
            "add",
            name,
            "mtu",
            &mtu,
            "numtxqueues",
            "4",
            "numrxqueues",
            "4",
            "type",
            "veth",
            "peer",
            "name",
            peer,
            "mtu",
            &mtu,
            "netns",
            &other.0,
        ]);
        let _ = self.ip(&["link", "set", name, "up"]);
        let _ = other.ip(&["link", "set", peer, "up"]);
    }

    /// Gives an interface an address, and the one address that it talks to a station.
    pub(crate) fn address(&self, ifname: &str, own: (&str, &str), other: (&str, &str)) {
        let _ = self.ip(&["link", "set", ifname, "address", own.0]);
        let _ = self.ip(&["address", "add", &format!("{}/24", own.1), "dev", ifname]);
        let _ = self.ip(&["neigh", "replace", other.1, "lladdr", other.0, "dev", ifname]);
    }

    pub(crate) fn settings(&self, ifname: &str, queues: u16) -> PacketMmapSettings {
        PacketMmapSettings {
            ifname: ifname.to_owned(),
            queues,
            netns: Some(self.0.clone()),
            ..PacketMmapSettings::default()
        }
    }

    pub(crate) fn open(&self, ifname: &str, queues: u16) -> Result<PacketMmap, PacketMmapError> {
        open_with(&self.settings(ifname, queues))
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

pub(crate) fn open_with(settings: &PacketMmapSettings) -> Result<PacketMmap, PacketMmapError> {
    let counters: Vec<_> = (0..settings.queues).map(|_| Arc::default()).collect();
    open(settings, &counters)
}

pub(crate) fn ip(arguments: &[&str]) -> String {
    let output = Command::new("ip").args(arguments).output().expect("the ip program (iproute2)");
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "ip {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}
