//! The in-flight file: made, taken back, refused, and used by rings.

use std::os::fd::OwnedFd;

use rustix::fs::fstat;
use virtq::{Layout, inflight_bytes};

use super::front::{Front, PACKED, PLAIN, memory};
use crate::codec::{InflightSpec, Request};
use crate::handover::{Incoming, Outgoing};
use crate::session::Session;

const SPEC: InflightSpec =
    InflightSpec { bytes: 0, offset: 0, queues: 2, queue_size: 256, padded: false };

/// Asks for a file; the reply's payload, and the file.
fn get(front: &mut Front, spec: InflightSpec) -> (Vec<u8>, OwnedFd) {
    let outcome = front.bytes(&Request::GetInflightFd(spec).write(false), Vec::new()).unwrap();
    (outcome.reply.unwrap()[12..].to_vec(), outcome.fd.unwrap())
}

#[test]
fn the_file_has_a_region_for_each_queue() {
    for (features, layout) in [(PLAIN, Layout::Split), (PACKED, Layout::Packed)] {
        for padded in [false, true] {
            let mut front = Front::new();
            front.negotiate(features);
            let (payload, fd) = get(&mut front, InflightSpec { padded, ..SPEC });
            let bytes = 2 * inflight_bytes(layout, 256) as u64;
            assert_eq!(u64::try_from(fstat(&fd).unwrap().st_size).unwrap(), bytes);
            assert_eq!(payload, InflightSpec { bytes, padded, ..SPEC }.write());
            assert_eq!(payload.len(), if padded { 24 } else { 20 });
        }
    }
}

#[test]
fn rings_use_their_regions() {
    let mut front = Front::new();
    front.negotiate(PACKED);
    let (payload, fd) = get(&mut front, SPEC);
    let bytes = u64::from_le_bytes(payload[..8].try_into().unwrap());
    front.up(PACKED, 2);
    assert!(front.rings.queues[&0].inflight.is_none());
    front.say_fd(Request::SetInflightFd(InflightSpec { bytes, ..SPEC }), fd);
    let len = |front: &Front, ring: u16| {
        front.rings.queues[&ring].inflight.as_ref().map(virtq::mem::InflightArea::len)
    };
    let each = inflight_bytes(Layout::Packed, 256);
    assert_eq!([0, 1, 2].map(|ring| len(&front, ring)), [Some(each), Some(each), None]);
    // Another process has it, too.
    let (mut fds, now) = (Outgoing::default(), std::time::Instant::now());
    let state = front.session.export(&mut fds, now).unwrap();
    assert_eq!(state.inflight.map(|file| (file.queues, file.bytes)), Some((2, bytes)));
    let mut fds = Incoming::from(fds.into_fds());
    let heir = Session::adopt(front.session.settings, &state, &mut fds, now).unwrap();
    let again = heir.export(&mut Outgoing::default(), now).unwrap().inflight;
    assert_eq!(again.map(|file| file.bytes), Some(bytes));
}

#[test]
fn what_does_not_fit_is_refused() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    for (spec, file, text) in [
        (InflightSpec { queues: 0, ..SPEC }, 4096, "1 to 8 queues are allowed"),
        (InflightSpec { queues: 9, ..SPEC }, 4096, "1 to 8 queues are allowed"),
        (InflightSpec { queue_size: 0, ..SPEC }, 4096, "queues of 1 to 1024 entries are allowed"),
        (InflightSpec { queue_size: 1025, ..SPEC }, 4096, "1 to 1024 entries are allowed"),
        (InflightSpec { bytes: 4097, ..SPEC }, 4096, "a part at 0 to 4097 of a file of 4096"),
        (InflightSpec { bytes: 20481, ..SPEC }, 1 << 40, "at most 20480 are allowed"),
        (
            InflightSpec { bytes: 64, offset: 32, ..SPEC },
            4096,
            "a region at 32, which is no multiple of 64",
        ),
        (InflightSpec { bytes: 64, offset: u64::MAX, ..SPEC }, 4096, "no multiple of 64"),
    ] {
        let said = front.refused(Request::SetInflightFd(spec), vec![memory(file)]);
        assert!(said.contains(text), "{said}");
    }
    let mut silent = Front::new();
    let said = silent.refused(Request::GetInflightFd(SPEC), Vec::new());
    assert!(said.ends_with("without its protocol feature"), "{said}");
}
