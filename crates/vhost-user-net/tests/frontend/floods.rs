//! What a neighbour waits for a front end that floods the control thread: counted, not timed. (What
//! a flood may take is CPU time, though: how much of it fits in is compared.)
//!
//! The test is the control thread. Each round of the event manager serves every connection once, so
//! a bound on what one round does for one of them is a bound on what the others wait.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use port::{Fabric, PortId, StatusCell};
use tempfile::TempDir;
use vhost_user_net::{PortLinks, PortSettings, VhostUserPort};
use virtio_net::features::{ACCESS_PLATFORM, VERSION_1};

use crate::fabric::Wire;

/// Messages of one front end that are handled before others get their turn.
const TURN: usize = 64;
/// Connections that wait to be accepted: more would block the test.
const OTHERS: usize = 4;
/// Bytes of a reply with one number.
const REPLY: usize = 20;

type Manager = EventManager<Arc<Mutex<dyn MutEventSubscriber>>>;

/// Two ports on a control thread that the test plays.
pub(crate) struct ByHand {
    dir: TempDir,
    pub(crate) manager: Manager,
    pub(crate) status: Vec<StatusCell>,
}

impl ByHand {
    pub(crate) fn new() -> Self {
        Self::on(&(Arc::new(Wire::default()) as Arc<dyn Fabric>))
    }

    pub(crate) fn on(fabric: &Arc<dyn Fabric>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut manager = Manager::new().unwrap();
        let status: Vec<_> = (0..2).map(|_| StatusCell::waiting("")).collect();
        for number in 0..2u16 {
            let settings = PortSettings::server("g", dir.path().join(number.to_string()));
            let links = PortLinks {
                id: PortId(number),
                fabric: Arc::clone(fabric),
                status: status[usize::from(number)].clone(),
                counters: Box::new(|_| Arc::default()),
            };
            let port = VhostUserPort::new(settings, links).unwrap();
            let _ = manager.add_subscriber(Arc::new(Mutex::new(port)));
        }
        Self { dir, manager, status }
    }

    pub(crate) fn connect(&self, number: usize) -> UnixStream {
        let stream = UnixStream::connect(self.dir.path().join(number.to_string())).unwrap();
        stream.set_nonblocking(true).unwrap();
        stream
    }

    /// Serves everybody who wants something once.
    pub(crate) fn round(&mut self) {
        let _ = self.manager.run_with_timeout(0).unwrap();
    }

    /// Serves until `stream` has its answer, and nothing is left to do.
    fn settle(&mut self, stream: &mut UnixStream) {
        let end = Instant::now() + Duration::from_secs(20);
        while answers(stream) == 0 {
            assert!(Instant::now() < end, "no answer");
            self.round();
        }
        while self.manager.run_with_timeout(0).unwrap() > 0 {}
    }
}

/// `GET_FEATURES`, so many times.
fn questions(count: usize) -> Vec<u8> {
    [1u32, 1, 0].iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<_>>().repeat(count)
}

/// Answers that have come since the last look.
fn answers(stream: &mut UnixStream) -> usize {
    let mut bytes = vec![0; 1 << 20];
    match stream.read(&mut bytes) {
        Ok(read) => {
            assert!(read > 0 && read.is_multiple_of(REPLY), "{read} bytes");
            read / REPLY
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::WouldBlock);
            0
        }
    }
}

#[test]
fn a_neighbour_waits_for_one_turn_of_a_flood() {
    let mut bench = ByHand::new();
    let (mut evil, mut good) = (bench.connect(0), bench.connect(1));
    for stream in [&mut evil, &mut good] {
        stream.write_all(&questions(1)).unwrap();
        bench.settle(stream);
    }
    // More than a turn has room for is always there; the neighbour asks again and again.
    let mut flooded = 0;
    for round in 0..20 {
        while flooded < 10 * TURN {
            evil.write_all(&questions(TURN)).unwrap();
            flooded += TURN;
        }
        good.write_all(&questions(1)).unwrap();
        bench.round();
        let handled = answers(&mut evil);
        assert!((1..=TURN).contains(&handled), "round {round}: {handled} of the flood");
        assert_eq!(answers(&mut good), 1, "round {round}: the neighbour waits");
        flooded -= handled;
    }
}

#[test]
fn connections_beside_its_own_cost_a_neighbour_one_each() {
    let mut bench = ByHand::new();
    let (mut evil, mut good) = (bench.connect(0), bench.connect(1));
    for stream in [&mut evil, &mut good] {
        stream.write_all(&questions(1)).unwrap();
        bench.settle(stream);
    }
    for round in 0..20 {
        let others: Vec<_> = (0..OTHERS).map(|_| bench.connect(0)).collect();
        good.write_all(&questions(1)).unwrap();
        bench.round();
        assert_eq!(answers(&mut good), 1, "round {round}: the neighbour waits");
        // One of them was sent away in that round, not all.
        let away = others.iter().filter(|other| {
            let mut other = *other;
            matches!(other.read(&mut [0]), Ok(0))
        });
        assert!(away.count() <= 1, "round {round}");
        while bench.manager.run_with_timeout(0).unwrap() > 0 {}
    }
}

/// Floods until the front end is left alone, beside a neighbour that never waits. Returns how many
/// messages were handled.
fn until_rest(bench: &mut ByHand, evil: &mut UnixStream, good: &mut UnixStream) -> usize {
    let end = Instant::now() + Duration::from_secs(60);
    let (mut flooded, mut total) = (0, 0);
    loop {
        assert!(Instant::now() < end, "it is served for ever");
        while flooded < 10 * TURN {
            evil.write_all(&questions(TURN)).unwrap();
            flooded += TURN;
        }
        good.write_all(&questions(1)).unwrap();
        bench.round();
        assert_eq!(answers(good), 1, "the neighbour waits");
        let handled = answers(evil);
        if handled == 0 {
            return total;
        }
        (flooded, total) = (flooded - handled, total + handled);
    }
}

/// A flood is left alone sooner or later, its neighbour never; and it is served again.
#[test]
fn a_flood_uses_its_share_up_and_its_neighbours_do_not() {
    let mut bench = ByHand::new();
    let (mut evil, mut good) = (bench.connect(0), bench.connect(1));
    for stream in [&mut evil, &mut good] {
        stream.write_all(&questions(1)).unwrap();
        bench.settle(stream);
    }
    let end = Instant::now() + Duration::from_secs(60);
    let _ = until_rest(&mut bench, &mut evil, &mut good);
    // Others that come to its socket wait as well; nobody is told to go.
    let mut third = bench.connect(0);
    good.write_all(&questions(1)).unwrap();
    bench.round();
    assert_eq!((answers(&mut good), answers(&mut third)), (1, 0));
    // A timer ends its rest.
    while answers(&mut evil) == 0 {
        assert!(Instant::now() < end, "it is never served again");
        let _ = bench.manager.run_with_timeout(20).unwrap();
    }
}

/// Who leaves while it is left alone is let go, and the next one is served in the end.
#[test]
fn a_front_end_that_comes_and_goes_without_end_waits_for_its_turn() {
    let mut bench = ByHand::new();
    let mut good = bench.connect(1);
    good.write_all(&questions(1)).unwrap();
    bench.settle(&mut good);
    let end = Instant::now() + Duration::from_secs(60);
    let mut evil = loop {
        assert!(Instant::now() < end, "it is served for ever");
        let mut evil = bench.connect(0);
        evil.write_all(&questions(TURN)).unwrap();
        good.write_all(&questions(1)).unwrap();
        // It is accepted, answered, and gone: one of them finds nobody.
        let mut handled = 0;
        for _ in 0..4 {
            bench.round();
            handled += answers(&mut evil);
        }
        assert_eq!(answers(&mut good), 1, "the neighbour waits");
        if handled == 0 {
            break evil;
        }
    };
    while answers(&mut evil) == 0 {
        assert!(Instant::now() < end, "it is never served again");
        let _ = bench.manager.run_with_timeout(20).unwrap();
    }
}

/// Whoever only says that it is behind a vIOMMU gets no larger share for that.
#[test]
fn a_feature_bit_buys_no_share() {
    let flood = |features: u64| {
        let mut bench = ByHand::new();
        let (mut evil, mut good) = (bench.connect(0), bench.connect(1));
        evil.write_all(&[2u32, 1, 8].map(u32::to_le_bytes).concat()).unwrap();
        evil.write_all(&features.to_le_bytes()).unwrap();
        for stream in [&mut evil, &mut good] {
            stream.write_all(&questions(1)).unwrap();
            bench.settle(stream);
        }
        until_rest(&mut bench, &mut evil, &mut good)
    };
    let plain = VERSION_1 | 1 << 30;
    // It is about CPU time, so not the same number twice.
    let (without, with) = (flood(plain), flood(plain | ACCESS_PLATFORM));
    assert!(with < 4 * without, "{with} messages with the bit, {without} without");
}

/// Floods with what has no answer until the front end is left alone: a reply that cannot be sent
/// would tell that it is gone.
fn until_rest_unanswered(bench: &mut ByHand, evil: &mut UnixStream) {
    let owners = [3u32, 1, 0].map(u32::to_le_bytes).concat().repeat(10 * TURN);
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        assert!(Instant::now() < end, "it is served for ever");
        // As much as there is room for. Nothing is torn: the last one of it is just not whole.
        while evil.write(&owners).is_ok_and(|count| count == owners.len()) {}
        if bench.manager.run_with_timeout(0).unwrap() == 0 {
            return;
        }
    }
}

/// A front end that is left alone may leave, or be killed: nobody waits for its rest to end.
#[test]
fn who_goes_while_it_is_left_alone_is_gone_at_once() {
    let mut bench = ByHand::new();
    let (mut evil, mut good) = (bench.connect(0), bench.connect(1));
    for stream in [&mut evil, &mut good] {
        stream.write_all(&questions(1)).unwrap();
        bench.settle(stream);
    }
    until_rest_unanswered(&mut bench, &mut evil);
    assert_eq!(bench.status[0].read().reason, "connected, the driver has not set up its rings");
    drop(evil);
    bench.round();
    let reason = bench.status[0].read().reason;
    assert!(reason.starts_with("waiting for the front end to connect"), "{reason}");
    // What it left unread costs nothing any more, and the next one waits for its turn, no longer.
    let mut next = bench.connect(0);
    next.write_all(&questions(1)).unwrap();
    good.write_all(&questions(1)).unwrap();
    bench.round();
    assert_eq!((answers(&mut good), answers(&mut next)), (1, 0));
    let end = Instant::now() + Duration::from_secs(60);
    while answers(&mut next) == 0 {
        assert!(Instant::now() < end, "it is never served");
        let _ = bench.manager.run_with_timeout(20).unwrap();
    }
}
