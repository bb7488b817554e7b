//! Dirty logging: on and off under running rings, at the addresses that the front end says.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use rustix::io::{dup, pread, pwrite};
use virtq::ChainBuf;

use super::front::{Event, Front, GUEST, PACKED, PLAIN, USER, event, memory, ring_addr};
use crate::codec::{LogArea, Request, VringAddr};
use crate::session::LOG_ALL;

const LOG_BYTES: u64 = 1 << 16;
/// The bit of the guest's first page.
const FIRST: u64 = GUEST / 4096;
/// Pages of the used rings of a pair.
const USED: [u64; 2] = [8, 24];

fn set_log(front: &mut Front, log: &OwnedFd) {
    let base = Request::SetLogBase(LogArea { bytes: LOG_BYTES, offset: 0 });
    let reply = front.ask(&base, vec![dup(log).unwrap()]).expect("it is answered");
    assert_eq!(reply.len(), 12, "with nothing");
}

/// Pages that are noted, counted from the guest's first one, and forgets them.
fn noted(log: &OwnedFd) -> BTreeSet<u64> {
    let mut bytes = vec![0; usize::try_from(LOG_BYTES).unwrap()];
    assert_eq!(pread(log, &mut bytes, 0).unwrap(), bytes.len());
    let zeros = vec![0; bytes.len()];
    let _ = pwrite(log, &zeros, 0).unwrap();
    let bits =
        (0..LOG_BYTES * 8).filter(|n| bytes[usize::try_from(n / 8).unwrap()] >> (n % 8) & 1 == 1);
    bits.map(|n| n - FIRST).collect()
}

impl Front {
    /// The driver of ring 0, which is split, makes a buffer in page `page` available, the device
    /// fills it.
    fn receive(&mut self, page: u64, round: u16) {
        let ring = ring_addr(0);
        let at = |addr: u64| addr - USER;
        let mut desc = (GUEST + page * 4096).to_le_bytes().to_vec();
        desc.extend([100, 0, 0, 0, 2, 0, 0, 0]);
        self.poke(at(ring.desc.0), &desc);
        self.poke(at(ring.avail.0) + 2, &(round + 1).to_le_bytes());
        let queue = &mut self.rings.queues.get_mut(&0).unwrap().queue;
        let mut chains = ChainBuf::with_capacity(1);
        let burst = queue.pop(&mut chains, 1);
        assert_eq!((burst.len(), burst.fault()), (1, None));
        assert_eq!(burst.writable(0).writer().write(&[7; 60]), 60);
        queue.complete_written(&chains, &[60]);
        queue.publish();
    }
}

#[test]
fn logging_goes_on_and_off_under_running_rings() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let log = memory(LOG_BYTES);
    front.receive(200, 0);
    set_log(&mut front, &log);
    front.receive(201, 1);
    assert_eq!(noted(&log), BTreeSet::new(), "not before LOG_ALL");
    let _ = front.events();
    front.say(Request::SetFeatures(PLAIN | LOG_ALL));
    let stopped = [Event::Parked(0), Event::Stopped(1)];
    assert_eq!(front.events()[..2], stopped, "nobody goes on without the log");
    // The used rings are at 0x8000 and 0x18000.
    assert_eq!(
        noted(&log),
        BTreeSet::from(USED),
        "what they had written may have been noted by nobody"
    );
    front.receive(202, 2);
    assert_eq!(noted(&log), BTreeSet::from([8, 202]));
    // The migration failed, or was cancelled.
    front.say(Request::SetFeatures(PLAIN));
    front.receive(203, 3);
    assert_eq!(noted(&log), BTreeSet::new(), "not after it");
    front.say(Request::SetFeatures(PLAIN | LOG_ALL));
    let other = memory(LOG_BYTES);
    set_log(&mut front, &other);
    assert_eq!((noted(&log), noted(&other)), (USED.into(), USED.into()));
    front.receive(204, 4);
    assert_eq!((noted(&log), noted(&other)), (BTreeSet::new(), BTreeSet::from([8, 204])));
    assert_eq!(front.running(), [0, 1]);
    assert_eq!(front.base(0), 5, "no descriptor was lost on the way");
}

#[test]
fn the_used_ring_is_noted_where_the_front_end_says() {
    let mut front = Front::new();
    front.up(PLAIN | LOG_ALL, 1);
    let log = memory(LOG_BYTES);
    set_log(&mut front, &log);
    let addr = VringAddr { flags: 1, log: GUEST + 0x5_0000, ..ring_addr(0) };
    assert_eq!(noted(&log), BTreeSet::from(USED));
    front.say(Request::SetVringAddr(addr));
    front.receive(210, 0);
    assert_eq!(noted(&log), BTreeSet::from([0x50, 210]));
    front.say(Request::SetVringAddr(ring_addr(0)));
    assert_eq!(noted(&log), BTreeSet::from([8]));
    front.receive(211, 1);
    assert_eq!(noted(&log), BTreeSet::from([8, 211]));
}

#[test]
fn packed_rings_note_their_descriptors_and_the_event_area() {
    let mut front = Front::new();
    front.up(PACKED | LOG_ALL, 1);
    let log = memory(LOG_BYTES);
    set_log(&mut front, &log);
    assert_eq!(noted(&log), BTreeSet::from([0, 8, 16, 24]));
    let at = ring_addr(0).desc.0 - USER;
    let mut desc = (GUEST + 220 * 4096).to_le_bytes().to_vec();
    desc.extend([100, 0, 0, 0, 0, 0, 0x82, 0]);
    front.poke(at, &desc);
    let queue = &mut front.rings.queues.get_mut(&0).unwrap().queue;
    let mut chains = ChainBuf::with_capacity(1);
    assert_eq!(queue.pop(&mut chains, 1).len(), 1);
    queue.complete_written(&chains, &[60]);
    queue.publish();
    assert_eq!(noted(&log), BTreeSet::from([0, 220]));
    queue.disable_kicks();
    assert_eq!(noted(&log), BTreeSet::from([8]));
}

#[test]
fn a_log_that_cannot_be_used_is_refused() {
    let refusal = |bytes: u64, offset: u64| {
        let mut front = Front::new();
        front.up(PLAIN | LOG_ALL, 1);
        let base = Request::SetLogBase(LogArea { bytes, offset });
        front.refused(base, vec![memory(LOG_BYTES)])
    };
    assert!(refusal(LOG_BYTES + 1, 0).contains("a file of 65536 bytes"));
    assert!(refusal(LOG_BYTES, 1).contains("a part at 1 to 65537"));
    assert!(refusal(0, 0).contains("a log of 0 bytes"));
    assert!(refusal(u64::MAX, 0).contains("at most"));
    assert!(refusal(4096, u64::MAX).contains("a part at"));
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let said = front.refused(Request::SetLogFd, vec![memory(4096)]);
    assert!(said.contains("no eventfd"), "{said}");
    front.say_fd(Request::SetLogFd, event());
    assert_eq!(front.running(), [0, 1]);
}
