//! Another process goes on with a session.

use std::time::{Duration, Instant};

use port::OffloadSet;
use virtio_net::features::{OFFLOADS, offload_features};
use virtq::RingPosition;

use super::front::{Event, Front, PACKED, PLAIN, REGION_BYTES, event, memory, region, socket};
use crate::codec::{LogArea, Request, VringFd};
use crate::fds::FdPool;
use crate::handover::{Incoming, Outgoing, SessionHandover};
use crate::session::{RingIndex, Session, SessionSettings};

const SETTINGS: SessionSettings = SessionSettings {
    queues: 4,
    queue_size: 1024,
    mtu: 9000,
    ring_reset: false,
    offloads: OffloadSet::ALL,
    postcopy: false,
};

/// What the front end has, with the session of another process, to which the state went as text.
fn hand_over(front: &mut Front, settings: SessionSettings) -> Result<SessionHandover, String> {
    for transmitqs in [true, false] {
        front.session.pause(transmitqs, &mut front.rings);
    }
    let now = Instant::now();
    let mut fds = Outgoing::default();
    let state = front.session.export(&mut fds, now).unwrap();
    let mut fds = Incoming::from(fds.into_fds());
    front.session =
        Session::adopt(settings, &state, &mut fds, now).map_err(|error| error.to_string())?;
    let _ = front.events();
    for transmitqs in [false, true] {
        front.session.resume(transmitqs, &mut front.rings);
    }
    Ok(state)
}

#[test]
fn rings_go_on_where_they_stopped() {
    for features in [PLAIN, PACKED] {
        let mut front = Front::new();
        front.up(features, 2);
        front.say_fd(Request::SetVringCall(VringFd { ring: 1, has_fd: true }), event());
        front.enable(3, false);
        front.say_fd(Request::SetBackendReqFd, socket());
        let log = Request::SetLogBase(LogArea { bytes: 1 << 16, offset: 0 });
        assert!(front.ask(&log, vec![memory(1 << 16)]).is_some());
        let state = hand_over(&mut front, SETTINGS).unwrap();
        let start = RingPosition::start(virtio_net::features::layout(features));
        let started = |ring, enabled| Event::Started { ring, enabled, position: start };
        // Receiveqs before transmitqs, so that frames find their way out.
        assert_eq!(
            front.events(),
            [started(0, true), started(2, true), started(1, true), started(3, false)]
        );
        for (ring, queue) in &front.rings.queues {
            assert!(queue.resumed, "a call may be due on ring {ring}");
            assert!(queue.kick.is_some());
            assert_eq!(queue.call.is_some(), *ring == 1);
        }
        assert!(front.session.ready().is_ok());
        assert_eq!(front.session.features(), Some(features));
        // Nothing is forgotten, wherever it is told again.
        let again = hand_over(&mut front, SETTINGS).unwrap();
        assert_eq!(again, state);
        assert_eq!(again.log.map(|log| log.bytes), Some(1 << 16));
        // It answers as before.
        assert_eq!(front.base(1), start.to_vhost_base());
        assert_eq!(front.running(), [0, 2, 3]);
        assert_eq!(front.ack(Request::AddMemReg(region(1)), vec![memory(REGION_BYTES)]), 0);
        assert_eq!(front.ack(Request::RemMemReg(region(1)), vec![]), 0);
    }
}

#[test]
fn positions_that_come_later_count() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let mut state = hand_over(&mut front, SETTINGS).unwrap();
    for transmitqs in [true, false] {
        front.session.pause(transmitqs, &mut front.rings);
    }
    let mut positions = front.session.positions();
    assert_eq!(positions.len(), 2);
    positions[1].base = Some(7);
    front.session.set_positions(&positions);
    let _ = front.events();
    front.session.resume(true, &mut front.rings);
    let position = RingPosition::Split { avail: 7, used: 7 };
    assert_eq!(front.events(), [Event::Started { ring: 1, enabled: true, position }]);
    // An older or a newer program knows other fields.
    let mut json = serde_json::to_value(&state).unwrap();
    json["weather"] = "fine".into();
    let _ = json["rings"][0].as_object_mut().unwrap().remove("held_ms").unwrap();
    assert_eq!(serde_json::from_value::<SessionHandover>(json).unwrap(), state);
    state.rings.clear();
    assert_ne!(serde_json::to_value(&state).unwrap()["rings"], serde_json::Value::Null);
}

#[test]
fn a_broken_ring_stays_broken_and_a_held_one_held() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    front.break_ring(1);
    assert!(front.session.ring_fault(RingIndex(1), &mut front.rings));
    let _ = hand_over(&mut front, SETTINGS).unwrap();
    assert_eq!(front.running(), [0]);
    assert!(front.session.ready().unwrap_err().to_string().contains('1'));

    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    front.describe(1, 0);
    front.kick(1);
    let until = Instant::now() + Duration::from_secs(30);
    assert_eq!(front.session.hold_rings(until), Some(until));
    let state = hand_over(&mut front, SETTINGS).unwrap();
    let held = state.rings[0].held_ms.unwrap();
    assert!((25_000..=30_000).contains(&held), "{held}");
    assert!(front.running().is_empty());
    let later = Instant::now() + Duration::from_secs(60);
    assert!(front.session.hold_rings(later).is_some_and(|end| end < later));
    front.session.release_held_rings(later, &mut front.rings);
    assert_eq!(front.running(), [1]);
}

/// What a front end was offered it may use as long as its connection lasts, whatever the successor
/// offers to others.
#[test]
fn the_offer_is_that_of_the_connection() {
    let none = SessionSettings { offloads: OffloadSet::NONE, ..SETTINGS };
    let tso = PLAIN | offload_features(OffloadSet::ALL);
    let mut front = Front::new();
    front.up(tso, 1);
    let offered = front.session.offered();
    assert_eq!(offered & OFFLOADS, OFFLOADS);
    let mut state = hand_over(&mut front, none).unwrap();
    assert_eq!((front.session.offered(), front.session.features()), (offered, Some(tso)));
    assert_eq!(front.running(), [0, 1]);
    // Not even a driver that negotiates anew is refused.
    front.say(Request::SetFeatures(tso));
    assert_eq!(front.session.features(), Some(tso));
    assert_eq!(hand_over(&mut front, none).unwrap().offloads, Some(OFFLOADS));
    assert_eq!(Session::new(none).offered() & OFFLOADS, 0);
    // An older program does not say what it offered: what is in use was.
    let adopted = |state: &SessionHandover| {
        let mut fds = Outgoing::default();
        let _ = front.session.export(&mut fds, Instant::now()).unwrap();
        let mut fds = Incoming::from(fds.into_fds());
        Session::adopt(none, state, &mut fds, Instant::now()).unwrap().offered() & OFFLOADS
    };
    state.offloads = None;
    assert_eq!(adopted(&state), OFFLOADS);
    state.features = Some(PLAIN);
    assert_eq!(adopted(&state), 0);
}

#[test]
fn what_this_program_does_not_allow_is_named() {
    let refused = |features, settings| {
        let mut front = Front::new();
        front.up(features, 2);
        hand_over(&mut front, settings).unwrap_err()
    };
    assert_eq!(
        refused(PLAIN, SessionSettings { queues: 1, ..SETTINGS }),
        "ring 2 is in use, 2 rings are possible"
    );
    assert_eq!(
        refused(PLAIN, SessionSettings { queue_size: 128, ..SETTINGS }),
        "ring 0 has 256 entries, at most 128 are allowed"
    );
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let mut fds = Outgoing::default();
    let good = front.session.export(&mut fds, Instant::now()).unwrap();
    let fails = |state: &SessionHandover| {
        let adopted = Session::adopt(SETTINGS, state, &mut Incoming::default(), Instant::now());
        adopted.unwrap_err().to_string()
    };
    assert_eq!(fails(&good), "fd 2 did not come along");
    let state = SessionHandover { features: Some(1 << 63), ..good.clone() };
    assert!(fails(&state).starts_with("feature bits 0x8000000000000000 are in use"));
    let state = SessionHandover { protocol_features: Some(1 << 62), ..good };
    assert!(fails(&state).starts_with("protocol feature bits 0x4000000000000000 are in use"));
}

#[test]
fn more_fds_than_are_kept_here_come_along_and_none_beside_them() {
    let mut front = Front::new();
    front.up(PLAIN, 2);
    let _ = hand_over(&mut front, SETTINGS).unwrap();
    // A region and four kicks; two are allowed.
    let pool = FdPool::of_limit(6);
    front.session.set_fd_pool(&pool);
    assert_eq!((pool.part(), front.running()), (2, vec![0, 1, 2, 3]));
    let call = |ring| Request::SetVringCall(VringFd { ring, has_fd: true });
    let said = front.bytes(&call(0).write(true), vec![event()]).unwrap().refused.unwrap();
    assert!(said.to_string().starts_with("6 fds of this front end to keep, at most 5"), "{said}");
    front.kick(1);
    for ring in [0, 1, 2, 3] {
        let _ = front.base(ring);
    }
    assert_eq!(front.ack(call(0), vec![event()]), 0);
    assert_ne!(front.ack(call(1), vec![event()]), 0);
}
