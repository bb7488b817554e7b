//! Each kind of uplink behind a port, with traffic, and what can happen to its interface. Needs
//! root; says so if it is missing.

mod places;
mod umem;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;

use crate::bed::{Bed, PROGRAM, eventually, ledger};
use crate::namespace::{Namespace, ip};

/// The kinds of uplinks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tap,
    AfXdp,
    PacketMmap,
}
use Kind::{AfXdp, PacketMmap, Tap};

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Tap => "tap",
            AfXdp => "af-xdp",
            PacketMmap => "packet-mmap",
        }
    }

    /// Makes interface `u0` of `outer` and what is at its other end in `peer`, which has the
    /// address 10.9.0.1. A tap's other end is its own namespace's stack.
    fn wire(self, outer: &Namespace, peer: &Namespace) {
        let (place, end) = self.end(outer, peer);
        if self == Tap {
            let _ = place.ip(&["tuntap", "add", "u0", "mode", "tap"]);
        } else {
            let ours = ["link", "add", "u0", "netns", outer.name(), "type", "veth"];
            let _ = ip(&[&ours[..], &["peer", "name", "p0", "netns", peer.name()]].concat());
            let _ = place.ip(&["link", "set", end, "up"]);
        }
        let _ = place.ip(&["address", "add", "10.9.0.1/24", "dev", end]);
    }

    /// Where the stack at the other end is, and the name of its interface.
    fn end<'a>(self, outer: &'a Namespace, peer: &'a Namespace) -> (&'a Namespace, &'static str) {
        if self == Tap { (outer, "u0") } else { (peer, "p0") }
    }
}

/// A switch with the uplink `u` and, as a guest with the address 10.9.0.2, a tap `g`.
struct Scene {
    kind: Kind,
    bed: Bed,
    outer: Namespace,
    peer: Namespace,
    guest: Namespace,
}

impl Scene {
    fn new(kind: Kind, more: &str) -> Self {
        let (outer, peer, guest) = (Namespace::new(), Namespace::new(), Namespace::new());
        kind.wire(&outer, &peer);
        let uplink = format!("{}:name=u,ifname=u0,netns={}{more}", kind.name(), outer.name());
        let bed = Bed::started(&["--port", &uplink, "--port", &guest.tap("g")]);
        let _ = guest.ip(&["address", "add", "10.9.0.2/24", "dev", "g"]);
        let _ = bed.wait_state("u", "up");
        Self { kind, bed, outer, peer, guest }
    }

    /// The stack at the other end of the uplink.
    fn other(&self) -> &Namespace {
        self.kind.end(&self.outer, &self.peer).0
    }

    fn set_mtu(&self, mtu: &str) {
        let (place, end) = self.kind.end(&self.outer, &self.peer);
        let _ = place.ip(&["link", "set", end, "mtu", mtu]);
        let _ = self.outer.ip(&["link", "set", "u0", "mtu", mtu]);
        let _ = self.guest.ip(&["link", "set", "g", "mtu", mtu]);
        let wanted: u32 = mtu.parse().unwrap();
        eventually("both ports know their MTU", || {
            ["u", "g"].iter().all(|port| self.bed.port(port)["interface"]["mtu"] == wanted)
        });
    }

    /// A datagram gets through each way.
    fn talk(&self) {
        let (a, b) = (self.other().udp("10.9.0.1:7"), self.guest.udp("10.9.0.2:7"));
        for (from, to, address) in [(&a, &b, "10.9.0.2:7"), (&b, &a, "10.9.0.1:7")] {
            say(from, to, address, b"through the uplink");
        }
    }

    fn settles(&self) {
        eventually("the ledger adds up", || {
            let (came, went, held) = ledger(&self.bed);
            came == went && held == 0
        });
    }
}

/// Sends a datagram until it arrives: neighbours have to be found first.
fn say(from: &UdpSocket, to: &UdpSocket, address: &str, bytes: &[u8]) {
    let mut got = vec![0; bytes.len() + 1];
    to.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    eventually(&format!("{} bytes to {address}", bytes.len()), || {
        let _ = from.send_to(bytes, address);
        matches!(to.recv(&mut got), Ok(count) if got[..count] == *bytes)
    });
}

/// Says stop when it goes, however that comes.
struct Stops<'a>(&'a AtomicBool);

impl Drop for Stops<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn every_kind(test: impl Fn(Kind)) {
    for kind in [Tap, AfXdp, PacketMmap] {
        println!("{kind:?}");
        test(kind);
    }
}

#[test]
fn frames_of_all_sizes_pass_both_ways() {
    every_kind(|kind| {
        let scene = Scene::new(kind, "");
        scene.talk();
        let (a, b) = (scene.other().udp("10.9.0.1:8"), scene.guest.udp("10.9.0.2:8"));
        scene.set_mtu("9000");
        for len in [0, 1, 100, 1472, 5000, 8972] {
            let bytes: Vec<u8> = (0..len).map(|i: usize| i.to_le_bytes()[0]).collect();
            say(&a, &b, "10.9.0.2:8", &bytes);
            say(&b, &a, "10.9.0.1:8", &bytes);
        }
        scene.settles();
    });
}

#[test]
fn tcp_passes_with_the_offloads_that_interfaces_have_by_default() {
    const BYTES: usize = 4 << 20;
    let pattern = |i: usize| (i ^ (i >> 8) ^ (i >> 16)).to_le_bytes()[0];
    let send = |mut stream: TcpStream| {
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        let bytes: Vec<u8> = (0..BYTES).map(pattern).collect();
        stream.write_all(&bytes).unwrap();
    };
    let take = |mut stream: TcpStream| {
        let mut bytes = Vec::new();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let _ = stream.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), BYTES);
        assert!((0..BYTES).all(|i| bytes[i] == pattern(i)), "bytes changed on the way");
    };
    every_kind(|kind| {
        let scene = Scene::new(kind, "");
        scene.talk();
        for (server, address, client) in [
            (scene.other(), "10.9.0.1:9", &scene.guest),
            (&scene.guest, "10.9.0.2:9", scene.other()),
        ] {
            let listener = server.inside(|| TcpListener::bind(address).unwrap());
            std::thread::scope(|scope| {
                let _ = scope.spawn(|| take(listener.accept().unwrap().0));
                send(client.inside(|| TcpStream::connect(address).unwrap()));
            });
        }
        scene.settles();
    });
}

#[test]
fn the_mode_that_was_obtained_is_shown() {
    for (asked, obtained) in [("auto", "generic"), ("copy", "copy"), ("generic", "generic")] {
        let scene = Scene::new(AfXdp, &format!(",mode={asked}"));
        let interface = &scene.bed.port("u")["interface"];
        assert_eq!((&interface["mode"], &interface["driver"]), (&obtained.into(), &"veth".into()));
        assert!(scene.bed.ctl(&["ports"]).contains(&format!("u0 {obtained}")));
        scene.talk();
    }
    // No device here can do it.
    let (outer, peer) = (Namespace::new(), Namespace::new());
    AfXdp.wire(&outer, &peer);
    let bed = Bed::started(&[]);
    let spec = format!("af-xdp:name=u,ifname=u0,netns={},mode=zero-copy", outer.name());
    let (code, _, error) = bed.ctl_full(&["port", "add", &spec]);
    assert!(code == 1 && error.contains("zero-copy"), "{error}");
    assert!(!outer.ip(&["-d", "link", "show", "u0"]).contains("prog/xdp"));
}

#[test]
fn a_steered_uplink_takes_what_is_for_stations_and_leaves_the_rest() {
    let scene = Scene::new(AfXdp, ",steer=mac");
    let mac = "02:00:00:00:00:03";
    let _ = scene.outer.ip(&["link", "set", "u0", "address", mac]);
    let _ = scene.outer.ip(&["address", "add", "10.9.0.3/24", "dev", "u0"]);
    // Who asks for neighbours asks all stations, and those frames are the switch's.
    let _ = scene.peer.ip(&["neigh", "replace", "10.9.0.3", "lladdr", mac, "dev", "p0"]);
    // The guest's answers are for a station that the switch has just learned.
    scene.talk();
    let frames = || {
        let stats = scene.bed.json(&["stats"]);
        let ports = stats["ports"].as_array().unwrap();
        let port = ports.iter().find(|port| port["name"] == "u").unwrap();
        port["queues"][0]["rx_frames"].as_u64().unwrap()
    };
    // The interface's own address is not the switch's: the kernel answers there.
    let (here, peer) = (scene.outer.udp("10.9.0.3:7"), scene.peer.udp("10.9.0.1:9"));
    say(&peer, &here, "10.9.0.3:7", b"for the kernel");
    let before = frames();
    for number in 0..100u8 {
        say(&peer, &here, "10.9.0.3:7", &[number; 64]);
    }
    assert!(frames() < before + 50, "{} frames went to the switch", frames() - before);
    scene.talk();
}

/// Large frames take a right that a sandboxed switch has given up by then.
#[test]
fn ports_that_come_later_and_come_back_take_large_frames_too() {
    for steer in ["all", "mac"] {
        let scene = Scene::new(AfXdp, &format!(",steer={steer}"));
        assert_eq!(scene.bed.json(&["version"])["sandbox"]["on"], true);
        let mode = |port: &str| scene.bed.port(port)["interface"]["mode"].clone();
        assert_eq!(mode("u"), "generic");
        // It comes back as another interface of that name.
        for _ in 0..3 {
            let _ = scene.outer.ip(&["link", "del", "u0"]);
            let _ = scene.bed.wait_state("u", "down");
            scene.kind.wire(&scene.outer, &scene.peer);
            let _ = scene.bed.wait_state("u", "up");
            assert_eq!(mode("u"), "generic", "{}", scene.bed.log());
        }
        scene.talk();
    }
    // More of them than were kept, one after the other, each with traffic.
    let scene = Scene::new(AfXdp, "");
    let _ = scene.bed.ctl(&["port", "del", "u"]);
    for round in 0..20 {
        let spec = format!("af-xdp:name=late{round},ifname=u0,netns={}", scene.outer.name());
        let _ = scene.bed.ctl(&["port", "add", &spec]);
        let name = format!("late{round}");
        let port = scene.bed.wait_state(&name, "up");
        assert_eq!(port["interface"]["mode"], "generic", "{}", scene.bed.log());
        scene.talk();
        let _ = scene.bed.ctl(&["port", "del", &name]);
    }
}

#[test]
fn an_interface_that_is_taken_is_refused() {
    let scene = Scene::new(AfXdp, "");
    let other = Bed::started(&[]);
    let spec = format!("af-xdp:name=v,ifname=u0,netns={}", scene.outer.name());
    let (code, _, error) = other.ctl_full(&["port", "add", &spec]);
    assert_eq!(code, 1);
    assert!(error.contains("XDP program") && error.contains("u0"), "{error}");
    scene.talk();
}

#[test]
fn states_of_the_interface_are_followed_at_once() {
    every_kind(|kind| {
        let scene = Scene::new(kind, "");
        let _ = scene.outer.ip(&["link", "set", "u0", "down"]);
        let port = scene.bed.wait_state("u", "down");
        assert_eq!(port["reason"], "interface u0 is set down");
        let _ = scene.outer.ip(&["link", "set", "u0", "up"]);
        let _ = scene.bed.wait_state("u", "up");
        if kind != Tap {
            let _ = scene.peer.ip(&["link", "set", "p0", "down"]);
            let port = scene.bed.wait_state("u", "down");
            assert_eq!(port["reason"], "interface u0 has no carrier");
            let _ = scene.peer.ip(&["link", "set", "p0", "up"]);
            let _ = scene.bed.wait_state("u", "up");
        }
        let _ = scene.outer.ip(&["link", "set", "u0", "name", "renamed"]);
        eventually("the new name is shown", || {
            scene.bed.port("u")["interface"]["name"] == "renamed"
        });
        scene.talk();
    });
}

#[test]
fn an_interface_deleted_and_made_again_under_load_comes_back() {
    every_kind(|kind| {
        let scene = Scene::new(kind, "");
        scene.talk();
        let stop = AtomicBool::new(false);
        let sender = scene.guest.udp("10.9.0.2:0");
        std::thread::scope(|scope| {
            // A failure below must end the thread too.
            let _stops = Stops(&stop);
            let _ = scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    let _ = sender.send_to(&[7; 500], "10.9.0.1:99");
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            for _ in 0..3 {
                let _ = scene.outer.ip(&["link", "del", "u0"]);
                let port = scene.bed.wait_state("u", "down");
                let reason = port["reason"].as_str().unwrap();
                assert!(reason.starts_with("interface u0 is lost: "), "{port}");
                kind.wire(&scene.outer, &scene.peer);
                let _ = scene.bed.wait_state("u", "up");
            }
        });
        scene.talk();
        scene.settles();
    });
}

#[test]
fn a_namespace_that_was_removed_is_let_go_and_found_again() {
    every_kind(|kind| {
        let scene = Scene::new(kind, "");
        let _ = ip(&["netns", "del", scene.outer.name()]);
        let port = scene.bed.wait_state("u", "down");
        let reason = "interface u0 is lost: its network namespace was removed";
        assert_eq!(port["reason"], reason);
        if kind != Tap {
            // The peer goes when nobody holds the namespace any more.
            eventually("the namespace is gone", || !scene.peer.has("p0"));
        }
        let _ = ip(&["netns", "add", scene.outer.name()]);
        kind.wire(&scene.outer, &scene.peer);
        let _ = scene.bed.wait_state("u", "up");
        scene.talk();
    });
}

#[test]
fn a_killed_switch_leaves_nothing_on_the_interface() {
    for kind in [AfXdp, PacketMmap] {
        let mut scene = Scene::new(kind, "");
        let shown = || scene.outer.ip(&["-d", "link", "show", "u0"]);
        assert!(shown().contains("promiscuity 1"), "{}", shown());
        assert_eq!(kind == AfXdp, shown().contains("prog/xdp"), "{}", shown());
        let _ = scene.bed.end(Signal::KILL);
        let shown = || scene.outer.ip(&["-d", "link", "show", "u0"]);
        eventually("it is as it was", || {
            !shown().contains("prog/xdp") && shown().contains("promiscuity 0")
        });
    }
}

#[test]
fn a_stop_leaves_the_interface_as_it_was_found() {
    every_kind(|kind| {
        let mut scene = Scene::new(kind, "");
        assert!(scene.outer.ip(&["link", "show", "u0"]).contains(",UP"));
        assert_eq!(scene.bed.end(Signal::TERM).code(), Some(0));
        let shown = scene.outer.ip(&["-d", "link", "show", "u0"]);
        assert!(!shown.contains(",UP") && shown.contains("promiscuity 0"), "{shown}");
        assert!(!shown.contains("prog/xdp"), "{shown}");
    });
}

#[test]
fn what_the_kernel_drops_while_nobody_reads_is_counted() {
    every_kind(|kind| {
        let scene = Scene::new(kind, "");
        scene.talk();
        let sender = scene.other().udp("10.9.0.1:0");
        scene.bed.signal(Signal::STOP);
        for _ in 0..60_000 {
            let _ = sender.send_to(&[1; 1400], "10.9.0.2:99");
        }
        scene.bed.signal(Signal::CONT);
        let dropped = || {
            let stats = scene.bed.json(&["stats"]);
            let ports = stats["ports"].as_array().unwrap();
            let port = ports.iter().find(|port| port["name"] == "u").unwrap();
            let drops = &port["queues"][0]["drops"];
            ["kernel_ring_full", "kernel_no_buffer"].map(|reason| drops[reason].as_u64().unwrap())
        };
        eventually("the drops are counted", || dropped().iter().sum::<u64>() > 10_000);
        scene.settles();
    });
}

#[test]
fn a_missing_right_is_named() {
    for (kind, without, needed, elsewhere) in [
        (Tap, "-net_admin", "CAP_NET_ADMIN", false),
        (AfXdp, "-net_raw", "CAP_NET_RAW", false),
        (AfXdp, "-net_admin", "CAP_NET_ADMIN", false),
        (AfXdp, "-bpf,-sys_admin", "CAP_BPF", false),
        (PacketMmap, "-net_raw", "CAP_NET_RAW", false),
        (PacketMmap, "-net_admin", "CAP_NET_ADMIN", false),
        (PacketMmap, "-sys_admin", "CAP_SYS_ADMIN", true),
    ] {
        let (outer, peer) = (Namespace::new(), Namespace::new());
        kind.wire(&outer, &peer);
        let bed = Bed::new();
        let mut spec = format!("{}:name=u,ifname=u0", kind.name());
        let here = if elsewhere { &peer } else { &outer };
        if elsewhere {
            spec += &format!(",netns={}", outer.name());
        }
        let control = bed.control();
        let output = Command::new("timeout")
            .args(["10", "ip", "netns", "exec", here.name(), "setpriv", "--bounding-set", without])
            .args([PROGRAM, "run", "--port", &spec, "--control", control.to_str().unwrap()])
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        let last = error.lines().last().unwrap_or_default();
        assert_eq!(output.status.code(), Some(1), "{kind:?} {without}: {error}");
        let named = last.starts_with("causeway: port u: ") && last.contains(needed);
        assert!(named, "{kind:?} {without}: {error}");
        let shown = outer.ip(&["-d", "link", "show", "u0"]);
        assert!(!shown.contains(",UP") && !shown.contains("prog/xdp"), "{shown}");
    }
}

#[test]
fn what_is_not_there_is_named() {
    let outer = Namespace::new();
    let bed = Bed::new();
    for kind in [AfXdp, PacketMmap] {
        let spec = format!("{}:name=u,ifname=none0,netns={}", kind.name(), outer.name());
        let control = bed.control();
        let arguments = ["run", "--control", control.to_str().unwrap(), "--port", &spec];
        let output =
            Command::new("timeout").args(["10", PROGRAM]).args(arguments).output().unwrap();
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{error}");
        let text = format!(
            "causeway: port u: interface none0 does not exist in network namespace {}",
            outer.name()
        );
        assert_eq!(error.lines().last(), Some(text.as_str()));
    }
}

#[test]
fn a_macvtap_is_an_uplink_like_a_tap() {
    let scene_of = |outer: &Namespace, peer: &Namespace| {
        PacketMmap.wire(outer, peer);
        let _ = outer.ip(&["link", "set", "u0", "up"]);
        let _ =
            outer.ip(&["link", "add", "m0", "link", "u0", "type", "macvtap", "mode", "passthru"]);
    };
    let (outer, peer, guest) = (Namespace::new(), Namespace::new(), Namespace::new());
    scene_of(&outer, &peer);
    let spec = format!("tap:name=u,ifname=m0,queues=2,netns={}", outer.name());
    let bed = Bed::started(&["--port", &spec, "--port", &guest.tap("g")]);
    let _ = guest.ip(&["address", "add", "10.9.0.2/24", "dev", "g"]);
    let scene = Scene { kind: PacketMmap, bed, outer, peer, guest };
    scene.talk();
    let _ = scene.outer.ip(&["link", "del", "u0"]);
    let port = scene.bed.wait_state("u", "down");
    assert!(port["reason"].as_str().unwrap().starts_with("interface m0 is lost"), "{port}");
    eventually("the other end is gone", || !scene.peer.has("p0"));
    scene_of(&scene.outer, &scene.peer);
    let _ = scene.bed.wait_state("u", "up");
    scene.talk();
    scene.settles();
}
