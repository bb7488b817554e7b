//! Messages that change something about rings that run: under traffic, nothing is lost.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread;

use port::PortState;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::VhostBackend;
use vhost_user_net::SocketMode;
use vhost_user_net::codec::{LogArea, Request};
use vhost_user_net::session::LOG_ALL;

use crate::frames::{PACKED, SPLIT, frame};
use crate::guest::{GUEST, Guest, MEMORY};
use crate::harness::{Bench, wait_for};
use crate::late::ask;

/// Frames on their way at once: fewer than the receiver has buffers.
pub(crate) const WINDOW: u32 = 40;

/// Sends `all` frames while `change` is done to their receiver over and over, which returns it.
/// None is lost or overtaken. Returns how often.
pub(crate) fn under_load<T>(
    sender: &mut Guest,
    receiver: &mut T,
    all: u32,
    change: impl Fn(&mut T) -> &mut Guest,
) -> u32 {
    let (received, failed) = (AtomicU32::new(0), AtomicBool::new(false));
    let mut rounds = 0;
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for number in 0..all {
                wait_for("the receiver", || {
                    number < received.load(Ordering::Acquire) + WINDOW
                        || failed.load(Ordering::Acquire)
                });
                wait_for("room to send", || sender.send(&frame(number)));
            }
        });
        while received.load(Ordering::Acquire) < all {
            let guest = change(receiver);
            rounds += 1;
            while let Some(got) = guest.receive() {
                let number = received.load(Ordering::Acquire);
                let is_next = got == frame(number);
                failed.store(!is_next, Ordering::Release);
                assert!(is_next, "frame {number} was lost or overtaken in round {rounds}");
                received.store(number + 1, Ordering::Release);
            }
        }
        sender.join().unwrap();
    });
    rounds
}

/// A guest, and the connection of its front end for what the `vhost` crate cannot say.
struct Bed {
    guest: Guest,
    stream: UnixStream,
    features: u64,
    log: std::os::fd::OwnedFd,
}

impl Bed {
    /// As a front end does whose guest begins to migrate, and stays after all.
    fn migrate(&mut self) {
        let area = LogArea { bytes: (GUEST + MEMORY as u64) / 4096 / 8 + 1, offset: 0 };
        let _ = ask(&mut self.stream, &Request::SetLogBase(area), Some(self.log.as_fd()), true);
        for (features, flags) in [(LOG_ALL, Some(GUEST)), (0, None)] {
            self.guest.front.set_features(self.features | features).unwrap();
            for ring in 0..2 {
                self.guest.say_addr(ring, flags);
            }
        }
    }
}

#[test]
fn no_frame_is_lost_while_the_log_goes_on_and_off() {
    for features in [SPLIT, PACKED] {
        let bench = Bench::new(SocketMode::Server);
        let connect = |port| UnixStream::connect(bench.socket(port)).unwrap();
        let stream = connect(1);
        let mut sender = Guest::new(connect(0), features);
        let guest = Guest::new(stream.try_clone().unwrap(), features);
        let log = memfd_create("log", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&log, 1 << 20).unwrap();
        let mut bed = Bed { guest, stream, features, log };
        for guest in [&mut sender, &mut bed.guest] {
            guest.fill();
            guest.start();
        }
        bench.wait(0, PortState::Up, "");
        bench.wait(1, PortState::Up, "");
        let rounds = under_load(&mut sender, &mut bed, 6000, |bed| {
            bed.migrate();
            &mut bed.guest
        });
        assert!(rounds > 20, "{rounds}");
        // Everything else that is changed while rings run.
        let rounds = under_load(&mut sender, &mut bed, 3000, |bed| {
            bed.guest.share();
            for (ring, queue) in bed.guest.queues.iter().enumerate() {
                bed.guest.front.set_vring_call(ring, &queue.call).unwrap();
                bed.guest.front.set_vring_kick(ring, &queue.kick).unwrap();
            }
            &mut bed.guest
        });
        assert!(rounds > 20, "{rounds}");
        assert_eq!(bench.drops(), 0);
    }
}
