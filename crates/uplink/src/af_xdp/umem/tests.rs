use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::xdp::XdpRingOffset;

use super::{InFlight, Place, QUIET_TIME, Umem, Umems};
use crate::af_xdp::socket::{Fds, Opened};
use crate::af_xdp::testbed::Space;
use crate::af_xdp::{AfXdp, AfXdpError, AfXdpSettings, open};
use crate::sys::xdp::{Consumer, Desc, Producer};

/// Where the words stand in a file that plays two rings.
const AT: XdpRingOffset = XdpRingOffset { producer: 0, consumer: 64, flags: Some(128), desc: 256 };
const RING_BYTES: u64 = 64 * 1024;

/// Rings that a test plays the kernel on, all of whose numbers begin somewhere.
struct Rings {
    file: std::fs::File,
    start: u32,
}

impl Rings {
    fn at(start: u32) -> Self {
        let file = std::fs::File::from(memfd_create("rings", MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, 2 * RING_BYTES).unwrap();
        let rings = Self { file, start };
        rings.taken(0);
        rings.done(0);
        rings
    }

    /// The rings go first, as sockets do.
    fn in_flight(&self) -> InFlight {
        let tx = Producer::<Desc>::map(self.file.as_fd(), 0, &AT, 1024).unwrap();
        let completion = Consumer::<u64>::map(self.file.as_fd(), RING_BYTES, &AT, 1024).unwrap();
        InFlight::new(tx.positions(), completion.kernel_position())
    }

    fn set(&self, at: u64, count: u32) {
        let value = self.start.wrapping_add(count);
        self.file.write_all_at(&value.to_ne_bytes(), at).unwrap();
    }

    /// So many were put, and the kernel says that it took them.
    fn taken(&self, count: u32) {
        self.set(AT.producer, count);
        self.set(AT.consumer, count);
    }

    /// So many came back.
    fn done(&self, count: u32) {
        self.set(RING_BYTES + AT.producer, count);
    }
}

/// The kernel has frames of a queue that was closed: its place is nobody's until it gives them
/// back, however far the numbers are.
#[test]
fn a_place_is_free_when_the_kernel_has_sent_its_frames() {
    for start in [0, 7, u32::MAX - 1] {
        let rings = Rings::at(start);
        let umems = Umems::default();
        let umem = umems.get("u", 1).unwrap();
        let take =
            |patience| umem.take("eth0", 1, patience).map(|mut leases| leases.pop().unwrap());
        let lease = take(Duration::ZERO).unwrap();
        lease.watch(rings.in_flight());
        rings.taken(3);
        drop(lease);
        for sent in 0..3 {
            rings.done(sent);
            assert_eq!(
                take(Duration::ZERO).unwrap_err().to_string(),
                "UMEM u has room for 1 queues, 0 are free, and interface eth0 has 1 (the kernel \
                 still sends frames of 1 that were closed): its size is fixed while a port uses \
                 it, so start its first port with umem-queues=2, or use umem=OTHER"
            );
        }
        // Who may wait does.
        let waited = std::thread::scope(|scope| {
            let taker = scope.spawn(|| take(Duration::from_secs(60)).map(drop));
            std::thread::sleep(Duration::from_millis(20));
            assert!(!taker.is_finished());
            rings.done(3);
            taker.join().unwrap()
        });
        waited.unwrap();
        // Nobody may come for the place; who looks lets go of the rings, which hold the queue.
        let lease = take(Duration::ZERO).unwrap();
        lease.watch(rings.in_flight());
        rings.taken(4);
        drop(lease);
        umems.look();
        assert!(matches!(umem.state().places[..], [Place::Draining(_)]));
        rings.done(4);
        umems.look();
        assert!(matches!(umem.state().places[..], [Place::Free]));
    }
}

/// Where it does not say how many it took, more may come back than it took.
#[test]
fn frames_are_back_when_no_more_of_an_unknown_number_comes_for_a_while() {
    let began = Instant::now();
    let quiet = u64::try_from(QUIET_TIME.as_millis()).unwrap();
    for start in [0, 2, u32::MAX] {
        let rings = Rings::at(start);
        let mut frames = rings.in_flight();
        let mut back = |after_ms: u64| frames.are_back(began + Duration::from_millis(after_ms));
        rings.taken(2);
        assert!(!back(0), "{start}");
        assert!(!back(100 * quiet), "they stay for as long as they want");
        rings.set(AT.producer, 9);
        let mut at = 200 * quiet;
        for done in 2..6 {
            rings.done(done);
            assert!(!back(at), "{start}: {done}");
            at += quiet - 1;
            assert!(!back(at), "{start}: {done}");
        }
        assert!(back(at + 1), "{start}");
        // It says so after all.
        rings.set(AT.consumer, 9);
        assert!(!back(at + 2));
        rings.done(9);
        assert!(back(at + 3));
    }
}

#[test]
fn one_umem_has_so_many_queues_and_no_more() {
    let umem = Umem::of_interface("eth0", 1).unwrap();
    let _only = umem.take("eth0", 1, Duration::ZERO).unwrap();
    let error = umem.take("eth0", 64, Duration::ZERO).unwrap_err().to_string();
    assert!(error.ends_with(": use umem=OTHER, one has at most 64 queues"), "{error}");
}

/// Whoever comes binds to who is there, on whichever interface; if nobody has one, the kernel is
/// told anew.
#[test]
fn the_kernel_is_told_of_the_memory_once() {
    let space = Space::new("umem");
    let umems = Umems::default();
    umems.plan([("u".to_owned(), 4)].into());
    let uplink = |ifname: &str| -> AfXdp {
        space.ip(&["link", "add", ifname, "numrxqueues", "2", "type", "veth"]);
        let settings = AfXdpSettings { umem: Some("u".to_owned()), ..space.settings(ifname) };
        open(&settings, &umems, &[Arc::default()]).unwrap()
    };
    let mut there = vec![uplink("a0"), uplink("b0")];
    let umem = umems.get("u", 1).unwrap();
    let told = || umem.state().told;
    assert_eq!((told(), umem.sockets().len()), (1, 2));
    // The one that told it goes.
    drop(there.remove(0));
    there.push(uplink("c0"));
    assert_eq!((told(), umem.sockets().len()), (1, 2));
    for ifname in ["b0", "c0"] {
        space.ip(&["link", "del", ifname]);
    }
    there.extend([uplink("d0"), uplink("e0")]);
    assert_eq!((told(), umem.sockets().len()), (2, 4));
}

/// The rings of a closed queue keep it, so who waits for the queue looks whether they can go.
#[test]
fn who_waits_for_a_queue_lets_go_of_its_rings_when_the_kernel_has_sent_its_frames() {
    let space = Space::new("drain");
    space.ip(&["link", "add", "a0", "numrxqueues", "2", "type", "veth"]);
    let umems = Umems::default();
    umems.plan([("u".to_owned(), 2)].into());
    let settings = AfXdpSettings {
        umem: Some("u".to_owned()),
        patience: Duration::from_secs(20),
        ..space.settings("a0")
    };
    let uplink = open(&settings, &umems, &[Arc::default()]).unwrap();
    // Another port has the memory, too.
    let _stays = umems.get("u", 1).unwrap();
    // As if the driver had been given pages, and not sent them.
    let rings = Rings::at(0);
    let Fds { receive, send, .. } = uplink.control.sockets.first().unwrap();
    let [receive, send] = [receive, send].map(|fd| fd.try_clone().unwrap());
    let InFlight { done, .. } = Opened::anew(receive, Some(send)).unwrap().in_flight();
    let in_flight = InFlight { done, ..rings.in_flight() };
    uplink.control.leases.first().unwrap().watch(in_flight);
    rings.taken(3);
    drop(uplink);
    let start = Instant::now();
    let now = AfXdpSettings { patience: Duration::ZERO, ..settings.clone() };
    loop {
        let error = open(&now, &umems, &[Arc::default()]).map(drop).unwrap_err();
        if matches!(error, AfXdpError::Busy { .. }) {
            break;
        }
        // A program that another test starts holds our fds for a moment, too.
        assert!(start.elapsed() < Duration::from_secs(5), "{error}");
    }
    let again = std::thread::scope(|scope| {
        let waits = scope.spawn(|| open(&settings, &umems, &[Arc::default()]).map(drop));
        std::thread::sleep(Duration::from_millis(100));
        assert!(!waits.is_finished());
        rings.taken(0);
        waits.join().unwrap()
    });
    again.unwrap();
}

/// Who hands over waits for the kernel, and says what it is not done with; who takes over leaves
/// that alone.
#[test]
fn a_successor_does_not_get_what_the_kernel_still_sends() {
    let old = Umems::default();
    old.plan([("u".to_owned(), 4)].into());
    let umem = old.get("u", 4).unwrap();
    let mut leases = umem.take("eth0", 4, Duration::ZERO).unwrap();
    let goes_on = [Arc::new(leases.remove(0))];
    let rings = [Rings::at(0), Rings::at(0)];
    for (lease, rings) in leases.iter().zip(&rings) {
        lease.watch(rings.in_flight());
        rings.taken(3);
    }
    // One is closed before it hands over, the others after.
    drop(leases.remove(0));
    let shared = umem.shared(&goes_on).unwrap();
    let new = Umems::default();
    let adopted = new.adopt(&shared, umem.fd().try_clone_to_owned().unwrap()).unwrap();
    let _goes_on = adopted.claim(&shared.places).unwrap();
    drop(leases);
    let kept = std::thread::scope(|scope| {
        let waits = scope.spawn(|| old.drain(Duration::from_millis(200)));
        std::thread::sleep(Duration::from_millis(20));
        rings[1].done(3);
        waits.join().unwrap()
    });
    assert_eq!(kept, [("u".to_owned(), vec![1])].into());
    new.settle(&kept);
    let rest = adopted.take("eth1", 2, Duration::ZERO).unwrap();
    assert_eq!(rest.iter().map(|lease| lease.place).collect::<Vec<_>>(), [2, 3]);
    assert!(adopted.take("eth2", 1, Duration::ZERO).is_err());
    // A third one does not get it either, for nobody can see it any more.
    assert_eq!(new.drain(Duration::ZERO), kept);
    // Nobody waits when the kernel is done.
    rings[0].done(3);
    let start = Instant::now();
    assert_eq!(old.drain(Duration::from_secs(60)), [].into());
    assert!(start.elapsed() < Duration::from_secs(30));
    new.settle(&[].into());
    assert!(adopted.take("eth2", 1, Duration::ZERO).is_ok());
}
