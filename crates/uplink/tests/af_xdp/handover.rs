//! An uplink goes on in other hands: from duplicates of its fds, with mappings of its own.

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{Egress, FrameBuf, Ingress, Offload, QueueCounters};
use uplink::af_xdp::{AfXdp, Umems, from_parts, parts};
use uplink::{Parts, PartsError};
use virtq::mem::Pool;

use super::namespace::open_with;
use super::{Namespace, frame, pair, send, take, totals};

pub(crate) fn taken_apart(uplink: &mut AfXdp) -> Parts {
    let queues = uplink.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
    parts(&uplink.control, &uplink.link, queues).unwrap()
}

/// The same uplink, made of duplicates in another thread; the old one is let go.
pub(crate) fn other_hands(uplink: AfXdp) -> AfXdp {
    changed_hands(uplink, |_| {})
}

/// The same uplink, which does not know that its kernel takes metadata.
pub(crate) fn without_metadata(uplink: AfXdp) -> AfXdp {
    changed_hands(uplink, |parts| {
        let (with, without) = ("\"metadata\":true", "\"metadata\":false");
        assert!(parts.state.contains(with), "this kernel has none");
        parts.state = parts.state.replace(with, without);
    })
}

fn changed_hands(mut uplink: AfXdp, change: impl Fn(&mut Parts)) -> AfXdp {
    let mut parts = taken_apart(&mut uplink);
    change(&mut parts);
    let count = uplink.queues.len();
    let new = std::thread::spawn(move || {
        let counters: Vec<Arc<QueueCounters>> = (0..count).map(|_| Arc::default()).collect();
        from_parts(parts, &Umems::default(), &counters).unwrap()
    });
    let new = new.join().unwrap();
    let AfXdp { control, link, queues } = uplink;
    control.leave();
    link.leave();
    drop(queues);
    new
}

/// Puts frames into the ring without telling the kernel.
pub(crate) fn put(egress: &mut impl Egress, wanted: &[Vec<u8>]) {
    let mut pool = Pool::new(64, 2048).unwrap();
    let mut frames = FrameBuf::default();
    for (slot, bytes) in (0..).zip(wanted) {
        pool.slot_mut(slot).unwrap()[..bytes.len()].copy_from_slice(bytes);
        let span = Pool::span(slot, 0, bytes.len() as u32);
        assert!(frames.slot().unwrap().fill(pool.store().reader(span), span, Offload::default()));
        frames.keep();
    }
    let picked: Vec<u16> = (0..wanted.len() as u16).collect();
    egress.send(&frames.batch(pool.store(), None), &picked).unwrap();
}

#[test]
fn what_is_in_the_rings_arrives_once_whoever_has_them() {
    for queues in [1, 2] {
        let (_namespace, [mut left, mut right]) = pair(queues, 9000, |_| {});
        for round in 0..20 {
            for queue in 0..usize::from(queues) {
                let burst: Vec<_> = (0..60).map(|i| frame(60 + 30 * i, round, false)).collect();
                send(&mut left.queues[queue].1, &burst[..40], Offload::default());
                // Some were taken and given back, some were taken, some wait in the ring; the last
                // ones are in the sender's ring, and the kernel has not been told.
                let mut got = take(&mut right.queues[queue].0, 1);
                put(&mut left.queues[queue].1, &burst[40..]);
                left = other_hands(left);
                right = other_hands(right);
                // An empty look moves on what was left behind.
                let mut frames = FrameBuf::default();
                assert!(left.queues[queue].0.receive(&mut frames).is_empty());
                let rest = burst.len() - got.len();
                got.extend(take(&mut right.queues[queue].0, rest));
                assert!(got == burst, "round {round}: {} frames", got.len());
                assert!(right.queues[queue].0.receive(&mut frames).is_empty(), "not twice");
            }
        }
        // No chunk was lost on the way: full rings go and come at once.
        for queue in 0..usize::from(queues) {
            let burst: Vec<_> = (0..64).map(|i| frame(60 + i, 1, false)).collect();
            for _ in 0..32 {
                send(&mut left.queues[queue].1, &burst, Offload::default());
            }
            assert_eq!(take(&mut right.queues[queue].0, 2048).len(), 2048);
            assert_eq!(totals(left.queues[queue].1.counters()).dropped(), 0);
        }
    }
}

#[test]
fn the_interface_is_left_to_the_last_owner() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let _ = namespace.ip(&["link", "set", "left0", "down"]);
    let mut uplink = open_with(&namespace.settings("left0")).unwrap();
    let state = |namespace: &Namespace| {
        let text = namespace.ip(&["-d", "link", "show", "left0"]);
        let has = |word: &str| text.contains(word);
        (has("state UP"), has("prog/xdp"), has("promiscuity 1"))
    };
    let before = state(&namespace);
    assert_eq!(before, (true, true, true));
    // Who took parts may go on if nobody else does, or nobody else can.
    let mut parts = taken_apart(&mut uplink);
    let last = parts.fds.pop().unwrap();
    drop(from_parts(parts, &Umems::default(), &[Arc::default()]).unwrap_err());
    drop(last);
    assert_eq!(state(&namespace), before);
    let uplink = other_hands(uplink);
    assert_eq!((state(&namespace), uplink.link.was_made()), (before, false));
    drop(uplink);
    // Another test that starts a program holds our fds for a moment too.
    let start = Instant::now();
    while state(&namespace) != (false, false, false) {
        assert!(start.elapsed() < Duration::from_secs(5), "{:?}", state(&namespace));
    }
}

#[test]
fn parts_that_do_not_fit_are_refused() {
    // With all that an uplink can hold.
    let (_namespace, [mut left, _right]) = pair(1, 1500, |settings| settings.busy_poll = true);
    let counters = [Arc::default()];
    let mut of = |change: &dyn Fn(&mut Parts)| {
        let mut parts = taken_apart(&mut left);
        change(&mut parts);
        from_parts(parts, &Umems::default(), &counters).map(drop)
    };
    assert!(of(&|_| {}).is_ok());
    let replace = |from: &str, to: &str| {
        let (from, to) = (from.to_owned(), to.to_owned());
        move |parts: &mut Parts| {
            assert!(parts.state.contains(&from), "{}", parts.state);
            parts.state = parts.state.replacen(&from, &to, 1);
        }
    };
    let error = of(&replace("\"af-xdp\"", "\"tap\"")).unwrap_err().to_string();
    assert_eq!(
        error,
        "the state of the uplink cannot be read: it is of kind \"tap\", not \"af-xdp\""
    );
    assert!(matches!(of(&replace("{", "[")), Err(PartsError::State(_))));
    let error = of(&replace("\"chunk\":2048", "\"chunk\":4096")).unwrap_err().to_string();
    assert_eq!(error, "the uplink's bytes a chunk is 4096, this version knows 2048 only");
    // Chunks behind the end, and more than there are. Those of frames that arrived are with the
    // kernel, all to send with the uplink.
    for (right, wrong) in [
        ("\"taken\":[]", "\"taken\":[4096]"),
        ("\"free\":[1023,", "\"free\":[1024,"),
        ("\"free\":[1023,", "\"free\":[1023,1023,"),
    ] {
        let error = of(&replace(right, wrong)).unwrap_err().to_string();
        assert!(error.ends_with("it names chunks that do not exist"), "{wrong}: {error}");
    }
    assert!(of(&replace("\"taken\":[]", "\"taken\":[4095]")).is_ok());
    for count in 0..taken_apart(&mut left).fds.len() {
        let mut parts = taken_apart(&mut left);
        parts.fds.truncate(count);
        let error = from_parts(parts, &Umems::default(), &counters).unwrap_err();
        assert!(matches!(error, PartsError::Fds(_)), "{error}");
    }
}
