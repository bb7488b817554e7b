//! Rings behind a vIOMMU: their own addresses and those of buffers come, and go, by messages.

use std::os::fd::OwnedFd;

use virtio_net::features::ACCESS_PLATFORM;
use virtq::mem::GuestPhysAddr;
use virtq::{Access, ChainBuf, Iova};

use super::front::{Event, Front, GUEST, PLAIN, REGION_BYTES, USER, event, region, ring_addr};
use crate::codec::{IotlbKind, IotlbMessage, Request, VringAddr, VringFd, VringState};
use crate::memory::FrontendAddr;
use crate::session::{LOG_ALL, RingIndex, Unready};

const FEATURES: u64 = PLAIN | ACCESS_PLATFORM;
/// Where the device sees the region that the front end has at `USER`.
const FAR: u64 = 0x10_0000_0000;
const PAGE: u64 = 4096;

fn message(iova: u64, size: u64, user: u64, kind: IotlbKind) -> Request {
    Request::Iotlb(IotlbMessage { iova: Iova(iova), size, user: FrontendAddr(user), kind })
}

fn update(from: u64, size: u64) -> Request {
    message(FAR + from, size, USER + from, IotlbKind::Update(Access::ReadWrite))
}

fn invalidate(from: u64, size: u64) -> Request {
    message(FAR + from, size, 0, IotlbKind::Invalidate)
}

fn far(ring: u32) -> VringAddr {
    let there = |addr: FrontendAddr| FrontendAddr(addr.0 - USER + FAR);
    let addr = ring_addr(ring);
    VringAddr { desc: there(addr.desc), used: there(addr.used), avail: there(addr.avail), ..addr }
}

/// What the session asks for, as offsets of pages in the region.
fn asked(front: &Front) -> Vec<u64> {
    let page = |message: Vec<u8>| {
        assert_eq!((message.len(), message[0], message[12 + 25]), (44, 1, 1));
        u64::from_le_bytes(message[12..20].try_into().unwrap()) - FAR
    };
    front.session.misses().into_iter().map(page).collect()
}

/// A pair whose rings are behind the vIOMMU, and what is known of it.
fn up(known: &[(u64, u64)]) -> Front {
    let mut front = Front::new();
    front.negotiate(FEATURES);
    front.share();
    for ring in 0..2 {
        front.say(Request::SetVringNum(VringState { ring, num: 256 }));
        front.say(Request::SetVringBase(VringState { ring, num: 0 }));
        front.say(Request::SetVringAddr(far(ring)));
        front.say_fd(Request::SetVringKick(VringFd { ring, has_fd: true }), event());
        front.enable(ring, true);
    }
    for (from, size) in known {
        assert_eq!(front.ack(update(*from, *size), Vec::new()), 0);
    }
    front
}

#[test]
fn a_ring_waits_for_its_own_addresses() {
    let mut front = up(&[]);
    assert!(front.running().is_empty());
    assert_eq!(front.session.ready(), Err(Unready::NoTranslation(RingIndex(0))));
    // Of ring 0: descriptors, available ring at 0x4000, used ring at 0x8000; ring 1 is 0x10000 on.
    assert_eq!(asked(&front), [0, 0x4000, 0x8000, 0x1_0000, 0x1_4000, 0x1_8000]);
    for page in [0, 0x4000, 0x8000] {
        assert!(front.running().is_empty());
        assert_eq!(front.ack(update(page, PAGE), Vec::new()), 0);
    }
    assert_eq!(front.running(), [0]);
    assert_eq!(front.rings.queues[&0].desc, GuestPhysAddr(FAR));
    assert_eq!(front.ack(update(0x1_0000, 0x1_0000), Vec::new()), 0);
    assert_eq!(front.running(), [0, 1]);
    assert_eq!(front.session.ready(), Ok(()));
}

#[test]
fn an_invalidation_is_answered_when_nobody_uses_what_was_there() {
    let mut front = up(&[(0, 0x2_0000), (0x5_0000, PAGE)]);
    let _ = front.events();
    assert_eq!(front.ack(invalidate(0x5_0000, PAGE), Vec::new()), 0);
    assert_eq!(front.events(), [Event::Quiesced], "buffers only: rings go on");
    assert_eq!(front.ack(invalidate(0x8000, 1), Vec::new()), 0);
    // Both rings are in the entry that is gone.
    let events = front.events();
    assert_eq!(events[..2], [Event::Parked(0), Event::Quiesced], "before the answer");
    assert!(!front.running().contains(&0));
    assert!(front.rings.parked.contains(&0), "its frames wait");
    assert_eq!(front.session.ready(), Err(Unready::NoTranslation(RingIndex(0))));
    assert_eq!(front.ack(update(0, 0x2_0000), Vec::new()), 0);
    assert_eq!(front.running(), [0, 1]);
    assert!(front.rings.parked.is_empty());
    assert_eq!(front.ack(invalidate(0, u64::MAX - FAR), Vec::new()), 0);
    assert!(front.running().is_empty(), "everything at once");
    assert!(front.rings.parked.contains(&0));
    assert_eq!(front.base(0), 0);
    assert!(front.rings.parked.is_empty(), "nobody goes on with it");
}

/// Workers are made to end a turn if one of them may still use what is gone, and only then.
#[test]
fn an_invalidation_of_nothing_makes_nobody_wait() {
    let mut front = up(&[(0, 0x2_0000), (0x5_0000, PAGE)]);
    let quiesced = |front: &mut Front, from: u64| {
        let _ = front.events();
        assert_eq!(front.ack(invalidate(from, PAGE), Vec::new()), 0);
        front.events() == [Event::Quiesced]
    };
    assert!(quiesced(&mut front, 0x5_0000));
    assert!(!quiesced(&mut front, 0x5_0000), "it is gone already");
    assert!(!quiesced(&mut front, 0x9_0000), "it was never there");
    // Another translation took its place, which a worker may not have seen.
    for _ in 0..2 {
        assert_eq!(front.ack(update(0x6_0000, PAGE), Vec::new()), 0);
    }
    assert!(quiesced(&mut front, 0x9_0000));
    // The same of what had to make room.
    let _ = front.events();
    let rw = IotlbKind::Update(Access::ReadWrite);
    for n in 0..5000 {
        let one = message(FAR + REGION_BYTES + n * 2 * PAGE, PAGE, USER, rw);
        assert_eq!(front.ack(one, Vec::new()), 0);
    }
    assert_eq!(front.events(), []);
    assert!(quiesced(&mut front, 0x5_0000));
    assert!(!quiesced(&mut front, 0x5_0000));
    // A device that begins anew knows nothing of the one before.
    for _ in 0..2 {
        assert_eq!(front.ack(Request::ResetDevice, Vec::new()), 0);
        front.negotiate(FEATURES);
        front.share();
        for _ in 0..4 {
            assert_eq!(front.ack(update(0x6_0000, PAGE), Vec::new()), 0);
        }
        assert!(quiesced(&mut front, 0x6_0000));
    }
}

#[test]
fn buffers_are_where_the_front_end_says() {
    let mut front = up(&[(0, 0x2_0000)]);
    let mut desc = (FAR + 200 * PAGE).to_le_bytes().to_vec();
    desc.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    front.poke(0x1_0000, &desc);
    front.poke(0x1_4002, &[1, 0]);
    front.poke(201 * PAGE, b"there");
    let _ = asked(&front);
    let mut chains = ChainBuf::with_capacity(1);
    let mut pop = |front: &mut Front| {
        let queue = &mut front.rings.queues.get_mut(&1).unwrap().queue;
        let burst = queue.pop(&mut chains, 1);
        assert_eq!(burst.fault(), None);
        let mut bytes = vec![0; burst.readable(0).len() as usize];
        let _ = burst.readable(0).reader().read(&mut bytes);
        bytes
    };
    assert_eq!(pop(&mut front), b"");
    assert_eq!(asked(&front), [200 * PAGE]);
    let kind = IotlbKind::Update(Access::Read);
    let other = message(FAR + 200 * PAGE, PAGE, USER + 201 * PAGE, kind);
    assert_eq!(front.ack(other, Vec::new()), 0);
    let kick = front.rings.queues[&1].kick.clone().unwrap();
    let mut count = [0; 8];
    assert_eq!(rustix::io::read(&kick, &mut count).unwrap(), 8, "who sleeps is woken");
    assert_eq!(pop(&mut front), b"there");
}

#[test]
fn hostile_translations_are_refused() {
    let mut front = up(&[(0, 0x2_0000)]);
    let refused = |front: &mut Front, request: Request| {
        let outcome = front.bytes(&request.write(true), Vec::new()).unwrap();
        outcome.refused.expect("refused").to_string()
    };
    let rw = IotlbKind::Update(Access::ReadWrite);
    for (iova, size, user) in [
        (FAR, PAGE, 0),
        (FAR, REGION_BYTES + 1, USER),
        (FAR, u64::MAX, USER),
        (FAR, 0, USER),
        (u64::MAX, 2, USER),
        (FAR, PAGE, USER + REGION_BYTES - 1),
        (FAR, PAGE, u64::MAX),
    ] {
        let said = refused(&mut front, message(iova, size, user, rw));
        assert!(said.contains("is not within the memory"), "{said}");
    }
    let miss = message(FAR, 0, 0, IotlbKind::Miss(Access::Read));
    assert!(refused(&mut front, miss).contains("only back ends have"));
    assert_eq!(front.running(), [0, 1], "and nothing changed");
    let mut front = Front::new();
    front.up(PLAIN, 1);
    assert!(refused(&mut front, update(0, PAGE)).contains("without ACCESS_PLATFORM"));
}

#[test]
fn translations_follow_the_memory_table() {
    let mut front = up(&[(0, 0x2_0000)]);
    assert_eq!(front.running(), [0, 1]);
    front.say(Request::SetMemTable(vec![]));
    assert!(front.running().is_empty());
    front.share();
    assert_eq!(front.running(), [0, 1], "the same memory again");
    front.say_fd(Request::SetMemTable(vec![region(5)]), super::front::memory(REGION_BYTES));
    assert!(front.running().is_empty());
    front.say(Request::ResetDevice);
    front.say(Request::SetFeatures(PLAIN));
    assert_eq!(front.session.misses(), Vec::<Vec<u8>>::new());
}

#[test]
fn pages_are_logged_where_the_guest_has_them() {
    let mut front = up(&[(0, 0x2_0000)]);
    front.say(Request::SetFeatures(FEATURES | LOG_ALL));
    assert_eq!(front.running(), [0, 1]);
    let log = super::front::memory(1 << 16);
    let file = rustix::io::dup(&log).unwrap();
    let base = crate::codec::LogArea { bytes: 1 << 16, offset: 0 };
    let _ = front.ask(&Request::SetLogBase(base), vec![file]);
    front.rings.queues.get_mut(&1).unwrap().queue.disable_kicks();
    let mut byte = [0];
    let bit = (GUEST + 0x1_8000) / PAGE;
    let _ = rustix::io::pread(&log, &mut byte, bit / 8).unwrap();
    assert_eq!(byte[0], 1 << (bit % 8), "the used ring of ring 1");
}

/// Front ends say the used ring's own address there: where the device sees it.
#[test]
fn the_used_ring_is_noted_where_its_address_leads_to() {
    let mut front = up(&[(0, 0x2_0000)]);
    front.say(Request::SetFeatures(FEATURES | LOG_ALL));
    let log = super::front::memory(1 << 16);
    let base = crate::codec::LogArea { bytes: 1 << 16, offset: 0 };
    let _ = front.ask(&Request::SetLogBase(base), vec![rustix::io::dup(&log).unwrap()]);
    let noted = |front: &mut Front, page: u64| {
        front.rings.queues.get_mut(&1).unwrap().queue.disable_kicks();
        let mut byte = [0];
        let bit = (GUEST + page) / PAGE;
        let _ = rustix::io::pread(&log, &mut byte, bit / 8).unwrap();
        byte[0] & 1 << (bit % 8) != 0
    };
    let used = far(1).used.0;
    front.say(Request::SetVringAddr(VringAddr { flags: 1, log: used, ..far(1) }));
    assert!(noted(&mut front, 0x1_8000), "the used ring of ring 1");
    // Somewhere else, which is not known yet: nobody writes what cannot be noted.
    let addr = VringAddr { flags: 1, log: FAR + 0x3_0000, ..far(1) };
    front.say(Request::SetVringAddr(addr));
    assert_eq!((front.running(), asked(&front)), (vec![0], vec![0x3_0000]));
    assert_eq!(front.ack(update(0x3_0000, PAGE), Vec::new()), 0);
    assert_eq!(front.running(), [0, 1]);
    assert!(noted(&mut front, 0x3_0000));
    assert_eq!(front.ack(invalidate(0x3_0000, PAGE), Vec::new()), 0);
    assert_eq!(front.running(), [0]);
}

/// The descriptors of 512 entries take two pages, which may be anywhere; those of 256 take one.
#[test]
fn a_ring_in_pieces_that_are_apart_is_named_and_a_smaller_one_runs() {
    let mut front = up(&[]);
    front.say(Request::SetVringNum(VringState { ring: 0, num: 512 }));
    let apart = message(FAR + PAGE, PAGE, USER + 0x9_0000, IotlbKind::Update(Access::ReadWrite));
    assert_eq!(front.ack(apart, Vec::new()), 0);
    for page in [0, 0x4000, 0x8000, 0x9000] {
        assert_eq!(front.ack(update(page, PAGE), Vec::new()), 0);
    }
    assert!(front.running().is_empty() && front.rings.parked.is_empty());
    let reason = front.session.ready().unwrap_err().to_string();
    assert_eq!(
        reason,
        "ring 0 cannot be started: the descriptor area at 0x1000000000 with 8192 bytes is in \
         pieces that are apart in memory, which is not supported; a smaller queue size may keep it \
         in one"
    );
    assert_eq!(front.session.take_complaints().len(), 1, "it is said in the log, once");
    front.say(Request::SetVringNum(VringState { ring: 0, num: 256 }));
    assert_eq!(front.running(), [0]);
}

#[test]
fn an_answer_wakes_whoever_waits_for_it() {
    let mut front = up(&[(0, 0x2_0000)]);
    // A buffer of the receiveq that nobody knows.
    let mut desc = (FAR + 200 * PAGE).to_le_bytes().to_vec();
    desc.extend([5, 0, 0, 0, 2, 0, 0, 0]);
    front.poke(0, &desc);
    front.poke(0x4002, &[1, 0]);
    let mut chains = ChainBuf::with_capacity(1);
    let queue = &mut front.rings.queues.get_mut(&0).unwrap().queue;
    assert!(queue.pop(&mut chains, 1).is_empty());
    let _ = front.events();
    assert_eq!(front.ack(update(100 * PAGE, PAGE), Vec::new()), 0);
    assert_eq!(front.events(), [], "that is about something else");
    assert_eq!(front.ack(update(200 * PAGE, PAGE), Vec::new()), 0);
    assert_eq!(front.events(), [Event::Resumed(0)]);
    let kick = front.rings.queues[&1].kick.clone().unwrap();
    assert!(rustix::io::read(&kick, &mut [0; 8]).is_err(), "ring 1 does not wait");
    assert_eq!(front.ack(update(200 * PAGE, PAGE), Vec::new()), 0);
    assert_eq!(front.events(), [], "once");
}

#[test]
fn whoever_waits_is_woken_once_for_all_that_was_said() {
    let mut front = up(&[(0, 0x2_0000)]);
    let mut desc = (FAR + 200 * PAGE).to_le_bytes().to_vec();
    desc.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    front.poke(0x1_0000, &desc);
    front.poke(0x1_4002, &[1, 0]);
    let mut chains = ChainBuf::with_capacity(1);
    let mut pop =
        |front: &mut Front| front.rings.queues.get_mut(&1).unwrap().queue.pop(&mut chains, 1).len();
    let kick = front.rings.queues[&1].kick.clone().unwrap();
    let read = |kick: &OwnedFd| {
        let mut count = [0; 8];
        rustix::io::read(kick, &mut count).map(|_| u64::from_ne_bytes(count))
    };
    assert_eq!(pop(&mut front), 0);
    let _ = asked(&front);
    for step in 0..6 {
        // Each answer is taken back, and the ring asks anew.
        let (answer, taken_back) = (update(200 * PAGE, PAGE), invalidate(200 * PAGE, PAGE));
        let message = if step % 2 == 0 { answer } else { taken_back };
        assert!(front.part(&message.write(true), Vec::new()).unwrap().refused.is_none());
        assert!(read(&kick).is_err(), "more may be to come");
        if step % 2 == 1 {
            assert_eq!(pop(&mut front), 0);
            assert_eq!(asked(&front), [200 * PAGE]);
        }
    }
    front.session.end_turn(&mut front.rings);
    assert_eq!(read(&kick), Ok(1));
    front.session.end_turn(&mut front.rings);
    assert!(read(&kick).is_err());
}

/// The front end does not say any more what is taken back, and what was asked may have no answer.
#[test]
fn a_ring_that_has_ended_takes_its_questions_along_and_the_last_one_all_translations() {
    let mut front = up(&[(0, 0x2_0000)]);
    let mut desc = (FAR + 200 * PAGE).to_le_bytes().to_vec();
    desc.extend([5, 0, 0, 0, 0, 0, 0, 0]);
    front.poke(0x1_0000, &desc);
    front.poke(0x1_4002, &[1, 0]);
    let mut chains = ChainBuf::with_capacity(1);
    let mut pop = |front: &mut Front| {
        let queue = &mut front.rings.queues.get_mut(&1).unwrap().queue;
        assert!(queue.pop(&mut chains, 1).is_empty());
    };
    pop(&mut front);
    assert_eq!(asked(&front), [200 * PAGE]);
    let kick = front.rings.queues[&1].kick.clone().unwrap();
    let _ = front.base(0);
    assert_eq!(rustix::io::read(&kick, &mut [0; 8]), Ok(8), "ring 1 is to ask again");
    pop(&mut front);
    assert_eq!(asked(&front), [200 * PAGE]);
    assert_eq!(front.session.translations(), Some(1));
    let _ = front.base(1);
    assert_eq!(front.session.translations(), Some(0));
}
