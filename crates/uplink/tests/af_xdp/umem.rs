//! Memory that several interfaces share.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{FrameBuf, Ingress, Offload, QueueCounters};
use rustix::fs::fstat;
use uplink::af_xdp::{AfXdp, AfXdpSettings, Mode, UMEM_QUEUES_MAX, Umems, from_parts};
use uplink::{Parts, PartsError};

use super::handover::{put, taken_apart};
use super::namespace::{open_among, open_with};
use super::{Namespace, frame, send, take, totals};

/// An interface of ours and the far end of its pair.
struct Way {
    near: AfXdp,
    far: AfXdp,
}

impl Way {
    /// Sends frames both ways and looks whether they arrive.
    fn carry(&mut self, frames: &[Vec<u8>]) {
        let mut ends = [&mut self.near, &mut self.far];
        for burst in frames.chunks(32) {
            for _ in 0..2 {
                let [from, to] = &mut ends;
                send(&mut from.queues[0].1, burst, Offload::default());
                let got = take(&mut to.queues[0].0, burst.len());
                assert!(got == burst, "{} of {} frames", got.len(), burst.len());
                ends.reverse();
            }
        }
    }
}

fn sized(seed: usize) -> Vec<Vec<u8>> {
    let sizes = (60..200).step_by(7);
    let sizes = sizes.chain([1514, 1518, 1791, 1792, 1793, 1983, 1984, 1985, 2048, 4096, 9000]);
    sizes.enumerate().map(|(i, len)| frame(len, seed + i, i % 3 == 0)).collect()
}

fn room(queues: u16) -> Umems {
    let umems = Umems::default();
    umems.plan(BTreeMap::from([("u".to_owned(), queues)]));
    umems
}

fn shared(namespace: &Namespace, ifname: &str) -> AfXdpSettings {
    AfXdpSettings { umem: Some("u".to_owned()), ..namespace.settings(ifname) }
}

/// Pair `number` with its near end here and its far end in `beyond`.
fn way(umems: &Umems, (here, beyond): (&Namespace, &Namespace), number: u32, mode: Mode) -> Way {
    let (near, far) = (format!("near{number}"), format!("far{number}"));
    here.veth(&near, (beyond, &far), 1, 9000);
    let near = open_among(umems, &AfXdpSettings { mode, ..shared(here, &near) }).unwrap();
    Way { near, far: open_with(&AfXdpSettings { mode, ..beyond.settings(&far) }).unwrap() }
}

/// Opens an interface that was closed. A test beside this one that starts a program holds our fds
/// for a moment too.
fn reopened(umems: &Umems, settings: &AfXdpSettings) -> AfXdp {
    let start = Instant::now();
    loop {
        match open_among(umems, settings) {
            Ok(open) => return open,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(5), "{error}"),
        }
    }
}

fn file(uplink: &AfXdp) -> (u64, i64) {
    let stat = fstat(uplink.control.umem()).unwrap();
    (stat.st_ino, stat.st_size)
}

#[test]
fn interfaces_share_one_memory_and_keep_their_frames_apart() {
    for mode in [Mode::Auto, Mode::Copy, Mode::Generic] {
        let (here, beyond, umems) = (Namespace::new(), Namespace::new(), room(2));
        let mut ways = [0, 1].map(|number| way(&umems, (&here, &beyond), number, mode));
        assert_eq!(file(&ways[0].near), file(&ways[1].near));
        assert_eq!(file(&ways[0].near).1, 2 * file(&ways[0].far).1);
        assert_eq!(ways[1].near.control.umem_name(), Some("u"));
        assert_eq!(ways[1].far.control.umem_name(), None);
        for (seed, way) in (1..).zip(&mut ways) {
            way.carry(&sized(seed));
        }
        // Both at once, with full rings of both in the memory: each has its own.
        let frames = |seed| -> Vec<_> { (0..64).map(|i| frame(60 + i, seed, false)).collect() };
        for round in 0..32 {
            for (seed, way) in (0..).zip(&mut ways) {
                send(&mut way.far.queues[0].1, &frames(2 * round + seed), Offload::default());
            }
        }
        for round in 0..32 {
            for (seed, way) in (0..).zip(&mut ways) {
                let got = take(&mut way.near.queues[0].0, 64);
                assert!(got == frames(2 * round + seed), "{mode:?}, round {round}, {seed}");
            }
        }
        for way in &ways {
            assert_eq!(totals(way.near.queues[0].0.counters()).dropped(), 0);
            let drops = way.near.control.kernel_drops().unwrap();
            assert_eq!(drops, [uplink::af_xdp::KernelDrops::default()]);
        }
    }
}

#[test]
fn each_queue_of_each_interface_has_its_own_place() {
    let (here, umems) = (Namespace::new(), room(4));
    let mut pairs = ["0", "1"].map(|number| {
        let (near, far) = (format!("near{number}"), format!("far{number}"));
        here.veth(&near, (&here, &far), 2, 1500);
        let near = AfXdpSettings { queues: 2, ..shared(&here, &near) };
        let far = AfXdpSettings { queues: 2, ..here.settings(&far) };
        [open_among(&umems, &near).unwrap(), open_with(&far).unwrap()]
    });
    let burst = |seed| -> Vec<_> { (0..64).map(|i| frame(60 + i, seed, false)).collect() };
    for round in 0..2 {
        let ends = || (0..4).map(|number| (number, number / 2, number % 2));
        for (seed, pair, queue) in ends() {
            send(&mut pairs[pair][0].queues[queue].1, &burst(4 * round + seed), Offload::default());
        }
        for (seed, pair, queue) in ends() {
            let got = take(&mut pairs[pair][1].queues[queue].0, 64);
            assert!(got == burst(4 * round + seed), "round {round}, {pair}, queue {queue}");
        }
        // The other way.
        pairs.iter_mut().for_each(|ends| ends.reverse());
    }
}

#[test]
fn who_comes_binds_to_who_has_an_interface() {
    let (here, beyond, umems) = (Namespace::new(), Namespace::new(), room(3));
    let mut ways: Vec<_> =
        (0..2).map(|number| way(&umems, (&here, &beyond), number, Mode::Auto)).collect();
    let _ = here.ip(&["link", "del", "near0"]);
    ways.push(way(&umems, (&here, &beyond), 2, Mode::Auto));
    ways[1].carry(&sized(1));
    ways[2].carry(&sized(2));
    assert_eq!(file(&ways[1].near), file(&ways[2].near));
    // Nobody has one, and the memory is still that of the name.
    let _ = here.ip(&["link", "del", "near1"]);
    let _ = here.ip(&["link", "del", "near2"]);
    let before = file(&ways[1].near);
    ways.truncate(2);
    let mut last = way(&umems, (&here, &beyond), 3, Mode::Auto);
    assert_eq!(file(&last.near), before);
    last.carry(&sized(3));
}

#[test]
fn interfaces_of_several_namespaces_share() {
    let spaces: [_; 3] = std::array::from_fn(|_| Namespace::new());
    let [first, second, beyond] = &spaces;
    let umems = room(2);
    let mut ways =
        [way(&umems, (first, beyond), 0, Mode::Auto), way(&umems, (second, beyond), 1, Mode::Auto)];
    assert_eq!(file(&ways[0].near), file(&ways[1].near));
    for _ in 0..2 {
        ways.iter_mut().for_each(|way| way.carry(&sized(5)));
    }
}

/// Also the one that made the memory.
#[test]
fn each_goes_and_comes_back_while_the_other_carries_frames() {
    let (here, beyond, umems) = (Namespace::new(), Namespace::new(), room(2));
    let mut ways: Vec<_> =
        (0..2).map(|number| way(&umems, (&here, &beyond), number, Mode::Auto)).collect();
    let memory = file(&ways[0].near);
    for round in 0..6 {
        // What waits in the rings of the one that stays is in nobody's way.
        let waits: Vec<_> = (0..64).map(|i| frame(60 + 20 * i, round, false)).collect();
        send(&mut ways[1].far.queues[0].1, &waits, Offload::default());
        put(&mut ways[1].near.queues[0].1, &waits[..32]);
        let Way { near, mut far } = ways.remove(0);
        let ifname = near.link.name();
        drop(near);
        ways[0].carry(&[]);
        let mut near = reopened(&umems, &shared(&here, &ifname));
        // It fills all of its chunks.
        for _ in 0..8 {
            send(&mut far.queues[0].1, &waits[..32], Offload::default());
            assert!(take(&mut near.queues[0].0, 32) == waits[..32]);
            send(&mut near.queues[0].1, &waits, Offload::default());
            assert!(take(&mut far.queues[0].0, 64) == waits);
        }
        let stays = &mut ways[0];
        assert!(take(&mut stays.near.queues[0].0, 64) == waits, "round {round}");
        send(&mut stays.near.queues[0].1, &waits[32..], Offload::default());
        assert!(take(&mut stays.far.queues[0].0, 64) == waits, "round {round}");
        stays.carry(&sized(round));
        let mut back = Way { near, far };
        back.carry(&sized(round + 1));
        ways.push(back);
        assert_eq!((file(&ways[0].near), file(&ways[1].near)), (memory, memory));
    }
    // It goes with the last one.
    ways.clear();
    let anew = way(&umems, (&here, &beyond), 9, Mode::Auto);
    assert_ne!(file(&anew.near).0, memory.0);
}

#[test]
fn without_room_the_error_says_what_would_be_right() {
    let namespace = Namespace::new();
    namespace.veth("near0", (&namespace, "far0"), 2, 1500);
    namespace.veth("near1", (&namespace, "far1"), 2, 1500);
    namespace.veth("near2", (&namespace, "far2"), 2, 1500);
    let umems = room(3);
    let settings = |name: &str| AfXdpSettings { queues: 2, ..shared(&namespace, name) };
    let first = open_among(&umems, &settings("near0")).unwrap();
    let refused =
        |umems: &Umems, name: &str| open_among(umems, &settings(name)).unwrap_err().to_string();
    assert_eq!(
        refused(&umems, "near1"),
        "UMEM u has room for 3 queues, 1 are free, and interface near1 has 2: its size is fixed \
         while a port uses it, so start its first port with umem-queues=4, or use umem=OTHER"
    );
    assert!(!namespace.ip(&["link", "show", "near1"]).contains("xdp"), "nothing was touched");
    let one = AfXdpSettings { queues: 1, ..settings("near1") };
    let fits = open_among(&umems, &one).unwrap();
    drop(first);
    drop(fits);
    let _second = reopened(&umems, &settings("near1"));
    // Without a plan there is room for who makes it, and never for less.
    for umems in [Umems::default(), room(1)] {
        let own = AfXdpSettings { ..settings("near0") };
        let only = reopened(&umems, &own);
        let error = refused(&umems, "near2");
        assert!(error.starts_with("UMEM u has room for 2 queues, 0 are free, "), "{error}");
        drop(only);
    }
    let umems = room(u16::MAX);
    let near = reopened(&umems, &settings("near0"));
    let whole = file(&near).1 / i64::from(UMEM_QUEUES_MAX);
    drop(near);
    let own = AfXdpSettings { umem: None, ..settings("near0") };
    assert_eq!(file(&reopened(&umems, &own)).1, 2 * whole);
    let zero_copy = AfXdpSettings { mode: Mode::ZeroCopy, ..settings("near0") };
    assert_eq!(
        open_among(&umems, &zero_copy).unwrap_err().to_string(),
        "interface near0 cannot share UMEM u with mode=zero-copy: use mode=copy, or no umem"
    );
}

/// Frames wait in a queue behind a bridge when their socket has long been closed. The kernel has
/// copies of them, so their place is another port's at once. The interface's own queue it keeps
/// (a socket ends when its last frame does), whatever we do.
#[test]
fn a_peer_that_sits_on_frames_holds_its_own_queue_and_no_place() {
    let (namespace, umems) = (Namespace::new(), room(2));
    for (one, other) in [("near0", "far0"), ("near1", "far1"), ("near2", "far2"), ("out0", "out1")]
    {
        namespace.veth(one, (&namespace, other), 1, 1500);
    }
    let _ = namespace.ip(&["link", "add", "br0", "up", "type", "bridge"]);
    for ifname in ["far0", "out0"] {
        let _ = namespace.ip(&["link", "set", ifname, "master", "br0"]);
    }
    let slow = ["rate", "8bit", "burst", "2000", "limit", "1000000"];
    let add = ["qdisc", "add", "dev", "out0", "root", "tbf"];
    let _ = namespace.exec("tc", &[&add[..], &slow[..]].concat());
    let _stays = open_among(&umems, &shared(&namespace, "near2")).unwrap();
    let mut near = open_among(&umems, &shared(&namespace, "near0")).unwrap();
    let burst: Vec<_> = (0..32).map(|seed| frame(1000, seed, false)).collect();
    send(&mut near.queues[0].1, &burst, Offload::default());
    drop(near);
    let other = reopened(&umems, &shared(&namespace, "near1"));
    let shown = namespace.exec("tc", &["-s", "qdisc", "show", "dev", "out0"]);
    assert!(!shown.contains("backlog 0b 0p"), "they still wait: {shown}");
    drop(other);
    let now = AfXdpSettings { patience: Duration::ZERO, ..shared(&namespace, "near0") };
    let error = open_among(&umems, &now).map(drop).unwrap_err().to_string();
    assert!(error.contains("is in use by another AF_XDP socket"), "{error}");
    let _ = namespace.exec("tc", &["qdisc", "del", "dev", "out0", "root"]);
    let _near = reopened(&umems, &shared(&namespace, "near0"));
}

/// A process that was started meanwhile, and has not let go of what it got.
#[test]
fn whoever_holds_a_closed_port_too_writes_nothing_into_the_next_one() {
    let (here, beyond, umems) = (Namespace::new(), Namespace::new(), room(2));
    let _stays = way(&umems, (&here, &beyond), 2, Mode::Auto);
    for mode in [Mode::Copy, Mode::Generic] {
        let number = if mode == Mode::Copy { 0 } else { 3 };
        let Way { near, mut far } = way(&umems, (&here, &beyond), number, mode);
        let link = near.control.program_link().unwrap().try_clone_to_owned().unwrap();
        let sockets: Vec<_> =
            near.control.sockets().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        drop(near);
        let mut next = way(&umems, (&here, &beyond), number + 1, mode);
        let waits: Vec<_> = (0..64).map(|seed| frame(600, seed, false)).collect();
        send(&mut next.far.queues[0].1, &waits, Offload::default());
        let others: Vec<_> = (64..128).map(|seed| frame(600, seed, false)).collect();
        for _ in 0..64 {
            send(&mut far.queues[0].1, &others, Offload::default());
        }
        assert!(take(&mut next.near.queues[0].0, 64) == waits, "{mode:?}");
        drop((link, sockets));
    }
}

fn left(uplink: AfXdp) {
    let AfXdp { control, link, queues } = uplink;
    control.leave();
    link.leave();
    drop(queues);
}

fn adopted(parts: Parts, umems: &Umems) -> Result<AfXdp, PartsError> {
    let counters: [Arc<QueueCounters>; 1] = [Arc::default()];
    from_parts(parts, umems, &counters)
}

#[test]
fn interfaces_share_on_in_other_hands() {
    let (here, beyond, umems) = (Namespace::new(), Namespace::new(), room(3));
    let mut ways = [0, 1].map(|number| way(&umems, (&here, &beyond), number, Mode::Auto));
    let memory = file(&ways[0].near);
    let waits: Vec<_> = (0..60).map(|i| frame(60 + 30 * i, 1, false)).collect();
    for _ in 0..3 {
        // The next process has a table of its own.
        let umems = Umems::default();
        for way in &mut ways {
            send(&mut way.far.queues[0].1, &waits, Offload::default());
            put(&mut way.near.queues[0].1, &waits);
        }
        let [first, second] = ways;
        // In the other order, too.
        let moved = [second, first].map(|Way { mut near, far }| {
            let new = adopted(taken_apart(&mut near), &umems).unwrap();
            left(near);
            Way { near: new, far }
        });
        ways = moved;
        for way in &mut ways {
            assert!(take(&mut way.near.queues[0].0, 60) == waits);
            // An empty look moves on what was left behind.
            assert!(way.near.queues[0].0.receive(&mut FrameBuf::default()).is_empty());
            assert!(take(&mut way.far.queues[0].0, 60) == waits);
            way.carry(&sized(3));
            assert_eq!(file(&way.near), memory);
        }
        // There is room for one more, as there was before.
        here.veth("more0", (&beyond, "more1"), 1, 1500);
        here.veth("full0", (&beyond, "full1"), 1, 1500);
        let more = open_among(&umems, &shared(&here, "more0")).unwrap();
        assert_eq!(file(&more), memory);
        let error = open_among(&umems, &shared(&here, "full0")).unwrap_err().to_string();
        assert!(error.starts_with("UMEM u has room for 3 queues, 0 are free"), "{error}");
        drop(more);
        let _ = here.ip(&["link", "del", "more0"]);
        let _ = here.ip(&["link", "del", "full0"]);
    }
}

#[test]
fn a_successor_leaves_alone_what_it_does_not_take_until_that_is_gone() {
    let (here, beyond, umems) = (Namespace::new(), Namespace::new(), room(2));
    let [mut stays, Way { mut near, far }] =
        [0, 1].map(|number| way(&umems, (&here, &beyond), number, Mode::Auto));
    let next = Umems::default();
    let parts = taken_apart(&mut near);
    let state = parts.state.clone();
    let new = adopted(parts, &next).unwrap();
    left(near);
    here.veth("more0", (&beyond, "more1"), 1, 1500);
    let more = || open_among(&next, &shared(&here, "more0"));
    assert!(more().unwrap_err().to_string().contains(", 0 are free, "));
    stays.carry(&sized(1));
    drop(stays);
    next.settle(&BTreeMap::new());
    let _more = more().unwrap();
    let mut back = Way { near: new, far };
    back.carry(&sized(2));
    // What does not fit is refused: places that are in use or that there are not, other memory.
    let mut wrong = |from: &str, to: &str| {
        let mut parts = taken_apart(&mut back.near);
        assert!(parts.state.contains(from), "{}", parts.state);
        parts.state = parts.state.replacen(from, to, 1);
        adopted(parts, &next).unwrap_err().to_string()
    };
    let used = "the state of the uplink cannot be read: place 1 of its UMEM does not exist or is \
                in use";
    assert!(state.contains("\"places\":[1]"), "{state}");
    assert_eq!(wrong("\"places\":[1]", "\"places\":[1]"), used);
    assert!(wrong("\"places\":[1]", "\"places\":[2]").contains("place 2 of its UMEM"));
    assert!(wrong("\"places\":[1]", "\"places\":[]").contains("0 queues, counters came for 1"));
    assert!(wrong("\"name\":\"u\",\"room\":2", "\"name\":\"v\",\"room\":3").contains("cannot map"));
    let other = room(2);
    let _other = way(&other, (&here, &beyond), 7, Mode::Auto);
    let error = adopted(taken_apart(&mut back.near), &other).unwrap_err().to_string();
    assert!(error.ends_with("another UMEM u is here"), "{error}");
}
