//! Memory that several `af-xdp` ports share.

use rustix::process::Signal;
use serde_json::Value;

use super::say;
use crate::bed::{Bed, eventually};
use crate::namespace::{Namespace, ip};

/// Containers, each with the far end of a veth pair, and the near ends in namespaces of their own.
struct Place {
    near: [Namespace; 2],
    far: [Namespace; 3],
}

impl Place {
    fn new() -> Self {
        let near = [Namespace::new(), Namespace::new()];
        let far = [Namespace::new(), Namespace::new(), Namespace::new()];
        let place = Self { near, far };
        (0..3).for_each(|number| place.wire(number));
        place
    }

    fn wire(&self, number: usize) {
        let (near, far) = (&self.near[number % 2], &self.far[number]);
        let (u, p) = (format!("u{number}"), format!("p{number}"));
        let ours = ["link", "add", &u, "netns", near.name(), "mtu", "9000"];
        let theirs = ["type", "veth", "peer", "name", &p, "netns", far.name(), "mtu", "9000"];
        let _ = ip(&[&ours[..], &theirs[..]].concat());
        // Whoever talked to it before still finds it.
        let mac = format!("02:00:00:00:00:0{number}");
        let _ = far.ip(&["link", "set", &p, "address", &mac, "up"]);
        let _ = far.ip(&["address", "add", &format!("10.9.0.{}/24", number + 1), "dev", &p]);
    }

    fn port(&self, number: usize, more: &str) -> String {
        let netns = self.near[number % 2].name();
        format!("af-xdp:name=x{number},ifname=u{number},netns={netns},umem=mem{more}")
    }

    /// Datagrams of all sizes cross between two containers, both ways.
    fn talk(&self, one: usize, other: usize) {
        let address = |number: usize| format!("10.9.0.{}:7", number + 1);
        let [a, b] = [one, other].map(|number| self.far[number].udp(&address(number)));
        for size in [1, 60, 1400, 1472, 1473, 1800, 2000, 4000, 8972] {
            let bytes: Vec<u8> = (0..=255).cycle().skip(size % 251).take(size).collect();
            say(&a, &b, &address(other), &bytes);
            say(&b, &a, &address(one), &bytes);
        }
    }
}

fn umem(bed: &Bed, port: &str) -> Value {
    bed.port(port)["interface"]["umem"].clone()
}

/// Memories for frames that the process has.
fn memories(bed: &Bed) -> usize {
    let fds = std::fs::read_dir(format!("/proc/{}/fd", bed.id())).unwrap();
    let names = fds.filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    names.filter(|name| name.to_string_lossy().contains("causeway-umem")).count()
}

#[test]
fn ports_on_one_umem_carry_frames_between_containers() {
    let place = Place::new();
    let (first, second) = (place.port(0, ""), place.port(1, ""));
    let mut bed = Bed::started(&["--port", &first, "--port", &second]);
    for port in ["x0", "x1"] {
        assert_eq!(umem(&bed, port), "mem");
    }
    assert!(bed.ctl(&["ports"]).contains("u0 generic umem=mem"), "{}", bed.ctl(&["ports"]));
    assert_eq!(memories(&bed), 1);
    place.talk(0, 1);
    // There is room for those that it began with, whichever they are.
    let third = place.port(2, "");
    let (code, _, error) = bed.ctl_full(&["port", "add", &third]);
    assert_eq!(code, 1);
    assert_eq!(
        error.trim_end(),
        "causeway: port x2: UMEM mem has room for 2 queues, 0 are free, and interface u2 has 1: \
         its size is fixed while a port uses it, so start its first port with umem-queues=3, or \
         use umem=OTHER"
    );
    let _ = bed.ctl(&["port", "del", "x0"]);
    let _ = bed.ctl(&["port", "add", &third]);
    place.talk(2, 1);
    // An interface that is lost gives its place back, and finds it again.
    let _ = place.near[1].ip(&["link", "del", "u1"]);
    let _ = bed.wait_state("x1", "down");
    place.wire(1);
    let _ = bed.wait_state("x1", "up");
    place.talk(1, 2);
    // It goes with the last port; the next one makes one of the size that it asks for.
    for port in ["x1", "x2"] {
        let _ = bed.ctl(&["port", "del", port]);
    }
    assert_eq!(memories(&bed), 0);
    for (number, more) in [(0, ",umem-queues=3"), (1, ""), (2, "")] {
        let _ = bed.ctl(&["port", "add", &place.port(number, more)]);
    }
    place.talk(0, 1);
    place.talk(2, 0);
    // Whoever is killed leaves nothing behind.
    let _ = bed.end(Signal::KILL);
    for (number, ifname) in ["u0", "u1", "u2"].into_iter().enumerate() {
        eventually("its program is gone", || {
            !place.near[number % 2].ip(&["-d", "link", "show", ifname]).contains("prog/xdp")
        });
    }
    bed.start(&["--port", &first, "--port", &second, "--port", &third]);
    place.talk(2, 1);
}

#[test]
fn ports_share_on_in_a_successor() {
    let place = Place::new();
    let (first, second) = (place.port(0, ",umem-queues=3"), place.port(1, ""));
    let mut bed = Bed::started(&["--port", &first, "--port", &second]);
    place.talk(0, 1);
    for _ in 0..2 {
        bed.take_over(&["--port", &second, "--port", &first]);
        assert_eq!(
            (memories(&bed), umem(&bed, "x0"), umem(&bed, "x1")),
            (1, "mem".into(), "mem".into())
        );
        place.talk(0, 1);
    }
    // A port that is opened anew, and one that is new, come to the memory that was taken over: at
    // the first look, since the old process says when it has let go.
    let changed = place.port(1, ",steer=mac");
    let third = place.port(2, "");
    bed.take_over(&["--port", &changed, "--port", &third, "--port", &first]);
    for port in ["x0", "x1", "x2"] {
        assert_eq!(bed.port(port)["state"], "up", "{}", bed.ctl(&["ports"]));
        assert_eq!(umem(&bed, port), "mem");
    }
    assert_eq!(memories(&bed), 1);
    place.talk(0, 1);
    place.talk(2, 1);
}
