//! Uplinks in other places than a veth's end, with more queues, and what else can happen to them.

use serde_json::Value;

use super::{AfXdp, PacketMmap, Tap};
use super::{Kind, Scene, every_kind, say};
use crate::bed::{Bed, eventually};
use crate::namespace::{Namespace, ip};

/// What `stats` says of the uplink's queues.
fn queues(bed: &Bed) -> Vec<Value> {
    let stats = bed.json(&["stats"]);
    let ports = stats["ports"].as_array().unwrap();
    let port = ports.iter().find(|port| port["name"] == "u").unwrap();
    port["queues"].as_array().unwrap().clone()
}

#[test]
fn one_two_and_four_queues_share_the_flows() {
    for (kind, count) in
        [(Tap, 2), (Tap, 4), (AfXdp, 1), (AfXdp, 2), (AfXdp, 4), (PacketMmap, 2), (PacketMmap, 4)]
    {
        println!("{kind:?} {count}");
        let (outer, peer, guest) = (Namespace::new(), Namespace::new(), Namespace::new());
        let number = count.to_string();
        let (far, end) = kind.end(&outer, &peer);
        if kind == Tap {
            let _ = outer.ip(&["tuntap", "add", "u0", "mode", "tap", "multi_queue"]);
        } else {
            let of = ["numrxqueues", &number, "numtxqueues", &number];
            let ours = [&["link", "add", "u0", "netns", outer.name()], &of[..]].concat();
            let peers = [&["type", "veth", "peer", "name", "p0"], &of[..]].concat();
            let _ = ip(&[&ours[..], &peers[..], &["netns", peer.name()]].concat());
            let _ = far.ip(&["link", "set", end, "up"]);
        }
        let _ = far.ip(&["address", "add", "10.9.0.1/24", "dev", end]);
        let spec =
            format!("{}:name=u,ifname=u0,queues={count},netns={}", kind.name(), outer.name());
        let bed = Bed::started(&["--port", &spec, "--port", &guest.tap("g")]);
        let _ = guest.ip(&["address", "add", "10.9.0.2/24", "dev", "g"]);
        let _ = bed.wait_state("u", "up");
        let receiver = guest.udp("10.9.0.2:7");
        // Flows go to queues by their hash: after enough of them each queue had some.
        let mut port = 3000;
        while queues(&bed).iter().any(|queue| queue["rx_frames"] == 0) {
            assert!(port < 3400, "{kind:?}: {:?}", queues(&bed));
            for _ in 0..10 {
                let sender = far.udp(&format!("10.9.0.1:{port}"));
                say(&sender, &receiver, "10.9.0.2:7", &[1; 200]);
                // And back, by the queue that the switch chooses.
                say(&receiver, &sender, &format!("10.9.0.1:{port}"), &[2; 300]);
                port += 1;
            }
        }
        assert_eq!(queues(&bed).len(), count);
        let interface = &bed.port("u")["interface"];
        let kernel = interface["kernel"].as_array().unwrap();
        // A tap's numbers are those of the interface.
        assert_eq!(kernel.len(), if kind == Tap { 1 } else { count }, "{interface}");
    }
}

/// `u0` in `outer` is something that stands on, or holds, one end of a veth pair.
fn on_top(kind: &str, outer: &Namespace, peer: &Namespace) {
    let ours = ["link", "add", "b0", "netns", outer.name(), "type", "veth"];
    let _ = ip(&[&ours[..], &["peer", "name", "p0", "netns", peer.name()]].concat());
    let _ = peer.ip(&["link", "set", "p0", "up"]);
    let _ = peer.ip(&["address", "add", "10.9.0.1/24", "dev", "p0"]);
    let _ = outer.ip(&["link", "set", "b0", "up"]);
    if kind == "bridge" {
        let _ = outer.ip(&["link", "add", "u0", "type", "bridge"]);
        let _ = outer.ip(&["link", "set", "b0", "master", "u0"]);
    } else {
        let more = ["type", "macvlan", "mode", "passthru"];
        let _ = outer.ip(&[&["link", "add", "u0", "link", "b0"], &more[..]].concat());
    }
}

#[test]
fn bridges_and_macvlans_are_uplinks() {
    for below in ["bridge", "macvlan"] {
        for (kind, more) in [(PacketMmap, ""), (AfXdp, ",mode=generic")] {
            println!("{below} {kind:?}");
            let (outer, peer, guest) = (Namespace::new(), Namespace::new(), Namespace::new());
            on_top(below, &outer, &peer);
            let uplink = format!("{}:name=u,ifname=u0,netns={}{more}", kind.name(), outer.name());
            let bed = Bed::started(&["--port", &uplink, "--port", &guest.tap("g")]);
            let _ = guest.ip(&["address", "add", "10.9.0.2/24", "dev", "g"]);
            let _ = bed.wait_state("u", "up");
            let scene = Scene { kind: Kind::PacketMmap, bed, outer, peer, guest };
            scene.talk();
            let (a, b) = (scene.other().udp("10.9.0.1:8"), scene.guest.udp("10.9.0.2:8"));
            for len in [0, 18, 600, 1472] {
                let bytes: Vec<u8> = (0..len).map(|i: usize| i.to_le_bytes()[0]).collect();
                say(&a, &b, "10.9.0.2:8", &bytes);
                say(&b, &a, "10.9.0.1:8", &bytes);
            }
            // What it stands on goes, and it with that, or the bridge stays without a port.
            if below == "macvlan" {
                let _ = scene.outer.ip(&["link", "del", "b0"]);
                let port = scene.bed.wait_state("u", "down");
                let reason = port["reason"].as_str().unwrap();
                assert!(reason.starts_with("interface u0 is lost"), "{reason}");
            }
            scene.settles();
        }
    }
}

#[test]
fn the_mtu_changes_under_load_and_frames_pass_that_fit() {
    every_kind(|kind| {
        let scene = Scene::new(kind, "");
        scene.talk();
        let (a, b) = (scene.other().udp("10.9.0.1:8"), scene.guest.udp("10.9.0.2:8"));
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            let _ = scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    let _ = a.send_to(&[0; 100], "10.9.0.2:99");
                    let _ = b.send_to(&[0; 100], "10.9.0.1:99");
                }
            });
            let _stops = super::Stops(&stop);
            for (mtu, len) in [("4000", 3972), ("1280", 1252), ("9000", 8972), ("1500", 1472)] {
                scene.set_mtu(mtu);
                let bytes: Vec<u8> = (0..len).map(|i: usize| i.to_le_bytes()[0]).collect();
                say(&a, &b, "10.9.0.2:8", &bytes);
                say(&b, &a, "10.9.0.1:8", &bytes);
            }
        });
        scene.settles();
    });
}

#[test]
fn what_the_kernel_counts_is_shown() {
    for (kind, names) in [
        (Tap, &["tx_dropped"][..]),
        (AfXdp, &["fill_ring_empty", "no_buffer", "refused", "ring_full", "tx_ring_empty"]),
        (PacketMmap, &["freezes", "packets"]),
    ] {
        let scene = Scene::new(kind, "");
        scene.talk();
        let counts = || scene.bed.port("u")["interface"]["kernel"][0].clone();
        let mut found: Vec<String> = counts().as_object().unwrap().keys().cloned().collect();
        found.sort();
        assert_eq!(found, names);
        if kind == PacketMmap {
            eventually("frames that came are counted", || counts()["packets"] != 0);
        }
    }
}
