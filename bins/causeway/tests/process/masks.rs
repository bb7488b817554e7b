//! Guests that mask their interrupts while frames come, as Linux does when one goes to another CPU.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use packet::MacAddr;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use testkit::request::SET_VRING_CALL;
use testkit::{FrontEnd, Guest, GuestSettings, Remote, TestFrame, read_frame};
use virtio_net::notify::signal;
use virtq::Layout;

use crate::bed::Bed;

const MACS: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2])];
/// An interrupt that comes after so long is another one's.
const PATIENCE: Timespec = Timespec { tv_sec: 5, tv_nsec: 0 };
/// Frames in each direction, at least.
const FRAMES: u64 = 4000;
/// Each guest masks so often, at least.
const TIMES: u64 = 21;
/// For so long they may take for it.
const LIMIT: Duration = Duration::from_secs(60);
/// The frame after which no other comes.
const LAST: u64 = u64::MAX;
/// The control thread leaves alone whose messages take too much of it.
const PAUSE: Duration = Duration::from_millis(2);
/// For so long every seventh time, workers fall asleep meanwhile.
const NAP: Duration = Duration::from_micros(300);

/// Who says no more, however it ends, that the others may end.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        // ORDERING: a flag of its own.
        self.0.store(true, Ordering::Relaxed);
    }
}

/// As QEMU does, which waits for no answer: calls go elsewhere for a moment, and who was called
/// there meanwhile is interrupted afterwards.
fn mask_and_unmask(front_end: &mut FrontEnd, calls: [&OwnedFd; 2], masked: &OwnedFd) {
    for (ring, call) in (0u64..).zip(calls) {
        for fd in [masked, call] {
            front_end.send(SET_VRING_CALL, &ring.to_le_bytes(), &[fd.as_fd()]).unwrap();
        }
        if rustix::io::read(masked, &mut [0; 8]).is_ok() {
            signal(call);
        }
    }
}

/// Masks and unmasks until `over`, and counts.
fn mask(
    front_end: &mut FrontEnd,
    calls: &[Arc<OwnedFd>; 2],
    (over, times): (&AtomicBool, &AtomicU64),
) {
    let masked = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    // ORDERING: a flag and a count of their own.
    while !over.load(Ordering::Relaxed) {
        mask_and_unmask(front_end, [&calls[0], &calls[1]], &masked);
        let _ = times.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(PAUSE);
    }
}

/// Takes the next frame, and looks for it only after an interrupt.
fn next_frame(guest: &mut Guest, call: &OwnedFd) -> Option<u64> {
    loop {
        let frames = guest.receive().unwrap();
        if let Some(frame) = frames.iter().find_map(|bytes| read_frame(bytes)) {
            return Some(frame.id);
        }
        if guest.enable_calls() {
            continue;
        }
        if poll(&mut [PollFd::new(call, PollFlags::IN)], Some(&PATIENCE)).unwrap() == 0 {
            return None;
        }
        assert!(guest.take_call());
    }
}

fn send(guest: &mut Guest, from: usize, id: u64) {
    let frame = TestFrame { dst: MACS[1 - from], src: MACS[from], tci: None, id, len: 60 };
    assert!(guest.send(&frame.bytes(), 1).unwrap());
    let _ = guest.flush();
}

/// One frame goes to and fro, until both guests have masked often.
fn talk([a, b]: [&mut Guest; 2], over: &AtomicBool, times: &[AtomicU64; 2]) {
    let [from_a, from_b] = [&*a, &*b].map(|guest| Arc::clone(&guest.event_fds()[0].1));
    std::thread::scope(|scope| {
        let echo = scope.spawn(move || {
            let _ends = Ends(over);
            // So that it is known where this one is.
            send(b, 1, 0);
            for id in 1.. {
                let came = next_frame(b, &from_b);
                if came == Some(LAST) {
                    break;
                }
                assert_eq!(came, Some(id), "it was not interrupted");
                send(b, 1, id);
            }
        });
        let _ends = Ends(over);
        assert_eq!(next_frame(a, &from_a), Some(0), "it was not interrupted");
        let start = Instant::now();
        // ORDERING: counts of their own.
        let often = || times.iter().all(|times| times.load(Ordering::Relaxed) >= TIMES);
        for id in (1..).take_while(|id| *id <= FRAMES || !often() && start.elapsed() < LIMIT) {
            if id % 7 == 0 {
                std::thread::sleep(NAP);
            }
            send(a, 0, id);
            assert_eq!(next_frame(a, &from_a), Some(id), "it was not interrupted");
        }
        send(a, 0, LAST);
        echo.join().unwrap();
    });
}

#[test]
fn who_masks_interrupts_misses_none() {
    for layout in [Layout::Split, Layout::Packed] {
        let specs = ["g0", "g1"].map(|name| format!("vhost-user:name={name},socket={name}.sock"));
        let bed = Bed::started(&["--port", &specs[0], "--port", &specs[1], "--workers", "0,1"]);
        let mut guests = ["g0", "g1"].map(|name| {
            let path = bed.path(&format!("{name}.sock"));
            let remote = Remote::join(&path, GuestSettings::new(layout)).unwrap();
            let _ = bed.wait_state(name, "up");
            remote
        });
        let (over, times) = (AtomicBool::new(false), [const { AtomicU64::new(0) }; 2]);
        std::thread::scope(|scope| {
            let parts = guests.each_mut().map(|remote| {
                let calls = remote.guest.event_fds().map(|(_, call)| call);
                (&mut remote.front_end, calls, &mut remote.guest)
            });
            let (over, [times_a, times_b]) = (&over, &times);
            let [(front_a, calls_a, a), (front_b, calls_b, b)] = parts;
            let _ = scope.spawn(move || mask(front_a, &calls_a, (over, times_a)));
            let _ = scope.spawn(move || mask(front_b, &calls_b, (over, times_b)));
            talk([a, b], over, &times);
        });
        assert!(times.iter().all(|times| times.load(Ordering::Relaxed) >= TIMES), "{times:?}");
    }
}
