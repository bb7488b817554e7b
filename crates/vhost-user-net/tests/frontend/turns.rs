//! A front end for which the control thread waits for workers' turns all the time.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use port::{Egress, Fabric, Ingress, PortId, PortSnapshot, PortState, QueueId, Restored};
use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_user_net::codec::{Request, VringAddr, VringFd, VringState};
use vhost_user_net::memory::{FrontendAddr, RegionSpec};
use virtio_net::features::VERSION_1;
use virtq::mem::GuestPhysAddr;

use crate::fabric::Wire;
use crate::floods::ByHand;
use crate::freed::send;

/// A worker whose turns take long.
#[derive(Debug, Default)]
struct Slow {
    wire: Wire,
    stops: AtomicUsize,
}

impl Fabric for Slow {
    fn attach_ingress(&self, at: QueueId, ingress: Box<dyn Ingress>) {
        self.wire.attach_ingress(at, ingress);
    }

    fn detach_ingress(&self, at: QueueId) -> Option<Box<dyn Ingress>> {
        let _ = self.stops.fetch_add(1, Ordering::Relaxed);
        sleep(Duration::from_millis(2));
        self.wire.detach_ingress(at)
    }

    fn attach_egress(&self, at: QueueId, egress: Box<dyn Egress>) {
        self.wire.attach_egress(at, egress);
    }

    fn exchange_egress(
        &self,
        at: QueueId,
        change: &mut dyn FnMut(Box<dyn Egress>) -> Box<dyn Egress>,
    ) -> bool {
        self.wire.exchange_egress(at, change)
    }

    fn detach_egress(&self, at: QueueId) -> Option<Box<dyn Egress>> {
        self.wire.detach_egress(at)
    }

    fn resume_egress(&self, at: QueueId) {
        self.wire.resume_egress(at);
    }

    fn busy(&self) -> Duration {
        self.wire.busy()
    }

    fn quiesce(&self) {
        self.wire.quiesce();
    }

    fn snapshot(&self, port: PortId) -> PortSnapshot {
        self.wire.snapshot(port)
    }

    fn restore(&self, port: PortId, snapshot: &PortSnapshot) -> Restored {
        self.wire.restore(port, snapshot)
    }

    fn originate(&self, from: PortId, frame: &[u8]) {
        self.wire.originate(from, frame);
    }
}

/// A transmitq that runs, in messages with and without an fd.
fn set_up() -> Vec<(Request, Option<OwnedFd>)> {
    const SIZE: u64 = 1 << 16;
    let file = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&file, SIZE).unwrap();
    let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let user = FrontendAddr(1 << 40);
    let spec = RegionSpec { guest: GuestPhysAddr(0), size: SIZE, user, mmap_offset: 0 };
    let part = |n: u64| FrontendAddr(user.0 + n * 4096);
    let (desc, used, avail) = (part(0), part(1), part(2));
    vec![
        (Request::SetFeatures(VERSION_1 | 1 << 30), None),
        (Request::SetMemTable(vec![spec]), Some(file)),
        (Request::SetVringNum(VringState { ring: 1, num: 16 }), None),
        (Request::SetVringBase(VringState { ring: 1, num: 0 }), None),
        (Request::SetVringAddr(VringAddr { ring: 1, flags: 0, desc, used, avail, log: 0 }), None),
        (Request::SetVringKick(VringFd { ring: 1, has_fd: true }), Some(kick)),
    ]
}

fn say(stream: &UnixStream, requests: Vec<(Request, Option<OwnedFd>)>) {
    for (request, fd) in requests {
        match fd {
            Some(fd) => send(stream, &request.write(false), &fd),
            None => drop(rustix::io::write(stream, &request.write(false)).unwrap()),
        }
    }
}

/// Two messages, after each of which the ring starts again.
fn flips() -> Vec<u8> {
    let flip = |enable| Request::SetVringEnable { ring: 1, enable }.write(false);
    [flip(true), flip(false)].concat()
}

/// Hardly any CPU time is used for it, but nobody else is served meanwhile.
#[test]
fn waits_for_workers_use_a_share_up_as_well() {
    let slow = Arc::new(Slow::default());
    let mut bench = ByHand::on(&(slow.clone() as Arc<dyn Fabric>));
    let stream = bench.connect(0);
    say(&stream, set_up());
    let flips = flips();
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < end, "it is served for ever");
        while rustix::io::write(&stream, &flips).is_ok_and(|count| count == flips.len()) {}
        if bench.manager.run_with_timeout(0).unwrap() == 0 {
            break;
        }
    }
    let stops = slow.stops.load(Ordering::Relaxed);
    assert!(stops > 100, "left alone after {stops} stops of 2 ms");
}

/// Each ring that starts again is called once, whoever else waits for its eventfd.
#[test]
fn who_hangs_very_many_waiters_on_a_call_is_quarantined() {
    let mut bench = ByHand::new();
    let stream = bench.connect(0);
    let call = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let fds: Vec<_> = (0..200).map(|_| call.try_clone().unwrap()).collect();
    let sets = (0..100).map(|_| {
        let set = epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        for fd in &fds {
            let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
            epoll::add(&set, fd, epoll::EventData::new_u64(0), flags).unwrap();
        }
        set
    });
    let sets: Vec<_> = sets.collect();
    say(&stream, set_up());
    let with = Request::SetVringCall(VringFd { ring: 1, has_fd: true });
    say(&stream, vec![(with, Some(call))]);
    let flips = flips();
    let end = Instant::now() + Duration::from_secs(60);
    while bench.status[0].read().state != PortState::Quarantined {
        assert!(Instant::now() < end, "it is called for ever");
        // There may be no room for it.
        let _ = rustix::io::write(&stream, &flips);
        let _ = bench.manager.run_with_timeout(20).unwrap();
    }
    let reason = bench.status[0].read().reason;
    assert!(reason.starts_with("calls of the front end's rings take very long"), "{reason}");
    drop((stream, sets));
    // The next one is not to blame.
    bench.status[0].reset("the next one");
    let next = bench.connect(0);
    say(&next, set_up());
    for _ in 0..10 {
        bench.round();
    }
    assert_ne!(bench.status[0].read().state, PortState::Quarantined);
}
