//! Network namespaces for one test, and veth pairs between them.

use std::fs::File;
use std::net::{TcpListener, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use uplink::af_xdp::{AfXdp, AfXdpError, AfXdpSettings, Mode, Steer, Umems, open};

/// A namespace that is deleted in the end.
pub(crate) struct Namespace(pub(crate) String);

impl Namespace {
    pub(crate) fn new() -> Self {
        let root = rustix::process::geteuid().is_root();
        assert!(root, "this test makes network interfaces: run it as root");
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = Self(format!("cw-xdp-{}-{number}", std::process::id()));
        let _ = run("ip", &["netns", "add", &namespace.0]);
        namespace.inside(|| {
            for name in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
                let _ = std::fs::write(path, "1");
            }
        });
        let _ = namespace.ip(&["link", "set", "lo", "up"]);
        namespace
    }

    pub(crate) fn ip(&self, arguments: &[&str]) -> String {
        let mut all = vec!["-n", &self.0];
        all.extend_from_slice(arguments);
        run("ip", &all)
    }

    /// Runs a program inside.
    pub(crate) fn exec(&self, program: &str, arguments: &[&str]) -> String {
        let mut all = vec!["netns", "exec", &self.0, program];
        all.extend_from_slice(arguments);
        run("ip", &all)
    }

    /// A veth pair of `queues` queues and an MTU: `name` here, `peer_name` in `peer`.
    pub(crate) fn veth(&self, name: &str, (peer, peer_name): (&Self, &str), queues: u16, mtu: u32) {
        let (queues, mtu) = (queues.to_string(), mtu.to_string());
        let of = ["numrxqueues", &queues, "numtxqueues", &queues];
        let mut all = vec!["link", "add", name, "mtu", &mtu];
        all.extend(of);
        all.extend(["type", "veth", "peer", "name", peer_name, "mtu", &mtu]);
        all.extend(of);
        all.extend(["netns", &peer.0]);
        let _ = self.ip(&all);
        let _ = self.ip(&["link", "set", name, "up"]);
        let _ = peer.ip(&["link", "set", peer_name, "up"]);
    }

    pub(crate) fn settings(&self, ifname: &str) -> AfXdpSettings {
        AfXdpSettings {
            ifname: ifname.to_owned(),
            queues: 1,
            mode: Mode::Auto,
            replace: false,
            steer: Steer::All,
            busy_poll: false,
            netns: Some(self.0.clone()),
            umem: None,
            patience: std::time::Duration::from_secs(2),
        }
    }

    pub(crate) fn open(&self, ifname: &str) -> Result<AfXdp, AfXdpError> {
        open_with(&self.settings(ifname))
    }

    pub(crate) fn address(&self, ifname: &str, mac: &str, address: &str) {
        let _ = self.ip(&["link", "set", ifname, "address", mac]);
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

    pub(crate) fn tcp(&self, address: &str) -> TcpListener {
        self.inside(|| TcpListener::bind(address).unwrap())
    }

    /// A number of `/proc/net/snmp`.
    pub(crate) fn snmp(&self, protocol: &str, field: &str) -> u64 {
        let text = self.exec("cat", &["/proc/net/snmp"]);
        let mut lines = text.lines().filter(|line| line.starts_with(&format!("{protocol}:")));
        let (names, values) = (lines.next().unwrap(), lines.next().unwrap());
        let at = names.split_whitespace().position(|name| name == field).unwrap();
        values.split_whitespace().nth(at).unwrap().parse().unwrap()
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

pub(crate) fn open_with(settings: &AfXdpSettings) -> Result<AfXdp, AfXdpError> {
    open_among(&Umems::default(), settings)
}

/// Opens an interface that may share memory with others.
pub(crate) fn open_among(umems: &Umems, settings: &AfXdpSettings) -> Result<AfXdp, AfXdpError> {
    let counters: Vec<_> = (0..settings.queues).map(|_| Arc::default()).collect();
    open(settings, umems, &counters)
}

pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().expect(program);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}
