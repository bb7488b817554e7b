//! A guest behind a vIOMMU whose rings lose their places under traffic, and get them back.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use port::{DropReason, PortState};
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_user_net::SocketMode;
use vhost_user_net::codec::{IotlbKind, IotlbMessage, Request};
use vhost_user_net::memory::FrontendAddr;
use virtio_net::features::ACCESS_PLATFORM;
use virtq::{Access, Iova};

use crate::changes::{WINDOW, under_load};
use crate::frames::{PACKED, SPLIT, frame};
use crate::guest::{GUEST, Guest, MEMORY, USER};
use crate::harness::{Bench, wait_for};

const BOTH: [u64; 2] = [SPLIT, PACKED];
/// What waits for a ring.
const HELD_MAX: u32 = 8 * 64;

/// A plain guest at port 0, and one behind a vIOMMU at port 1.
struct Bed {
    bench: Bench,
    plain: Guest,
    behind: Guest,
    /// The connection of `behind`, for what the `vhost` crate cannot say.
    stream: UnixStream,
}

impl Bed {
    fn new(features: u64) -> Self {
        let bench = Bench::new(SocketMode::Server);
        let connect = |port| UnixStream::connect(bench.socket(port)).unwrap();
        let stream = connect(1);
        let mut plain = Guest::new(connect(0), features);
        let behind = Guest::new(stream.try_clone().unwrap(), features | ACCESS_PLATFORM);
        plain.fill();
        plain.start();
        bench.wait(0, PortState::Up, "");
        let mut bed = Self { bench, plain, behind, stream };
        bed.behind.fill();
        bed.behind.start();
        bed.bench.wait(1, PortState::Waiting, "translat");
        bed
    }

    /// One that is up.
    fn up(features: u64) -> Self {
        let mut bed = Self::new(features);
        bed.say(GUEST, IotlbKind::Update(Access::ReadWrite));
        bed.rings_come();
        bed.bench.wait(1, PortState::Up, "");
        bed
    }

    fn say(&mut self, iova: u64, kind: IotlbKind) {
        let (size, user) = (MEMORY as u64, FrontendAddr(USER));
        let message = IotlbMessage { iova: Iova(iova), size, user, kind };
        self.stream.write_all(&Request::Iotlb(message).write(true)).unwrap();
        let mut answer = [0; 20];
        self.stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0; 8], "it is accepted");
    }

    /// Both rings have no place any more.
    fn rings_go(&mut self) {
        self.say(USER, IotlbKind::Invalidate);
    }

    fn rings_come(&mut self) {
        self.say(USER, IotlbKind::Update(Access::ReadWrite));
    }

    fn send(&mut self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            wait_for("room to send", || self.plain.send(&frame(number)));
        }
        wait_for("all was taken", || self.plain.reclaim());
    }

    fn arrives(&mut self, numbers: std::ops::Range<u32>) {
        for number in numbers {
            let mut got = None;
            wait_for("a frame", || {
                got = self.behind.receive();
                got.is_some()
            });
            assert_eq!(got, Some(frame(number)));
        }
    }

    /// What the port behind the vIOMMU has dropped for a reason on the way out.
    fn dropped(&self, reason: DropReason) -> u64 {
        self.bench.counters[1].egress.dropped_by_reason()[reason as usize]
    }
}

#[test]
fn frames_wait_for_a_ring_until_its_place_is_known_again() {
    for features in BOTH {
        let mut bed = Bed::up(features);
        for round in 0..20 {
            let first = round * 3 * WINDOW / 2;
            bed.rings_go();
            bed.bench.wait(1, PortState::Waiting, "translat");
            bed.send(first..first + WINDOW);
            assert_eq!(bed.behind.receive(), None, "nobody writes there now");
            // What the guest sends waits in its ring.
            assert!(bed.behind.send(&frame(round)));
            bed.rings_come();
            bed.send(first + WINDOW..first + WINDOW * 3 / 2);
            bed.arrives(first..first + WINDOW * 3 / 2);
            let mut got = None;
            wait_for("the guest's own frame", || {
                got = bed.plain.receive();
                got.is_some()
            });
            assert_eq!(got, Some(frame(round)));
        }
        assert_eq!(bed.bench.drops(), 0);
    }
}

#[test]
fn frames_wait_before_the_first_place_is_known() {
    for features in BOTH {
        let mut bed = Bed::new(features);
        bed.say(GUEST, IotlbKind::Update(Access::ReadWrite));
        bed.send(0..WINDOW);
        bed.rings_come();
        bed.arrives(0..WINDOW);
        assert_eq!(bed.bench.drops(), 0);
    }
}

#[test]
fn nothing_is_lost_or_overtaken_while_places_come_and_go_under_load() {
    const ALL: u32 = 6000;
    for features in BOTH {
        let mut bed = Bed::up(features);
        let mut plain = std::mem::replace(&mut bed.plain, Guest::alone(features));
        let rounds = under_load(&mut plain, &mut bed, ALL, |bed| {
            bed.rings_go();
            bed.rings_come();
            &mut bed.behind
        });
        assert!(rounds > 20, "{rounds}");
        assert_eq!(bed.bench.drops(), 0);
    }
}

#[test]
fn what_waits_is_bounded_and_lost_with_the_ring() {
    for features in BOTH {
        for ends in 0..4 {
            let mut bed = Bed::up(features);
            bed.rings_go();
            bed.send(0..HELD_MAX + 100);
            assert_eq!(bed.dropped(DropReason::NotTranslated), 100);
            assert_eq!(bed.dropped(DropReason::PortDown), 0, "the others wait");
            match ends {
                0 => bed.behind.front.set_vring_enable(0, false).unwrap(),
                1 => drop(bed.behind.front.get_vring_base(0).unwrap()),
                2 => bed.behind.front.reset_device().unwrap(),
                _ => {
                    let (_, other) = UnixStream::pair().unwrap();
                    bed.stream = other;
                    bed.behind.leave();
                }
            }
            wait_for("it is gone", || bed.dropped(DropReason::PortDown) == u64::from(HELD_MAX));
            assert_eq!(bed.bench.drops(), u64::from(HELD_MAX) + 100);
        }
    }
}

#[test]
fn what_waits_stays_when_the_front_end_changes_something_else() {
    for features in BOTH {
        let mut bed = Bed::up(features);
        bed.rings_go();
        bed.send(0..10);
        let call = vmm_sys_util::eventfd::EventFd::new(0).unwrap();
        bed.behind.front.set_vring_call(0, &call).unwrap();
        bed.behind.share();
        bed.send(10..20);
        bed.rings_come();
        // The memory was shared anew.
        bed.say(GUEST, IotlbKind::Update(Access::ReadWrite));
        bed.arrives(0..20);
        assert_eq!(bed.bench.drops(), 0);
        assert!(call.read().unwrap() > 0, "the new one is called");
    }
}
