//! Memory files that shrink under the switch: only that guest's port goes out of service.

use std::os::fd::AsFd;
use std::time::Duration;

use packet::MacAddr;
use rustix::fs::ftruncate;
use testkit::request::GET_FEATURES;
use testkit::{Guest, GuestSettings, Remote, TestFrame, read_frame};
use virtq::Layout;

use crate::bed::{Bed, eventually};

const GOOD: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2])];
const EVIL: MacAddr = MacAddr([2, 0, 0, 0, 0, 3]);

fn bed() -> Bed {
    let ports =
        ["good0", "good1", "evil"].map(|name| format!("vhost-user:name={name},socket={name}.sock"));
    let [a, b, c] = ports.each_ref().map(String::as_str);
    Bed::started(&["--port", a, "--port", b, "--port", c])
}

fn join(bed: &Bed, name: &str, layout: Layout) -> Remote {
    let path = bed.path(&format!("{name}.sock"));
    let remote = Remote::join(&path, GuestSettings::new(layout)).unwrap();
    let _ = bed.wait_state(name, "up");
    remote
}

fn send(guest: &mut Guest, src: MacAddr, dst: MacAddr, id: u64, len: usize) {
    let frame = TestFrame { dst, src, tci: None, id, len };
    eventually("there is room", || guest.send(&frame.bytes(), 1).unwrap());
    let _ = guest.flush();
}

/// Waits for frame `id`; others may come before it.
fn expect(guest: &mut Guest, id: u64) {
    eventually(&format!("frame {id} arrives"), || {
        let frames = guest.receive().unwrap();
        frames.iter().filter_map(|bytes| read_frame(bytes)).any(|frame| frame.id == id)
    });
}

/// Both good guests still reach each other, at once and without a loss.
fn still_good(good: &mut [Remote; 2], ids: std::ops::Range<u64>) {
    let [a, b] = good;
    for id in ids {
        send(&mut a.guest, GOOD[0], GOOD[1], id, 1400);
        expect(&mut b.guest, id);
        send(&mut b.guest, GOOD[1], GOOD[0], id, 60);
        expect(&mut a.guest, id);
    }
}

fn is_quarantined(bed: &Bed) {
    let port = bed.wait_state("evil", "quarantined");
    let reason = port["reason"].as_str().unwrap();
    assert!(reason.contains("memory region at 0x0"), "{port}");
    assert_eq!(bed.port("good0")["state"], "up");
    assert_eq!(bed.port("good1")["state"], "up");
}

/// The file is cut to `pages` pages before something that uses what is gone.
fn shrink(remote: &Remote, bytes: u64) {
    ftruncate(remote.memory.as_fd(), bytes).unwrap();
}

/// The rings themselves go away: met by the worker that serves the transmitq.
#[test]
fn rings_that_shrink_away() {
    for layout in [Layout::Split, Layout::Packed] {
        let bed = bed();
        let mut good = [join(&bed, "good0", layout), join(&bed, "good1", layout)];
        let mut evil = join(&bed, "evil", layout);
        still_good(&mut good, 0..3);
        send(&mut evil.guest, EVIL, GOOD[0], 1000, 60);
        expect(&mut good[0].guest, 1000);
        shrink(&evil, 0);
        evil.guest.kick();
        is_quarantined(&bed);
        still_good(&mut good, 3..20);
        comes_back(&bed, layout);
        still_good(&mut good, 20..30);
    }
}

/// Only buffers go: the body of a frame while it is copied to a good guest.
#[test]
fn a_body_that_is_gone_while_it_is_copied_from() {
    for layout in [Layout::Split, Layout::Packed] {
        let bed = bed();
        let mut good = [join(&bed, "good0", layout), join(&bed, "good1", layout)];
        let mut evil = join(&bed, "evil", layout);
        still_good(&mut good, 0..3);
        // Offered and not published yet: the buffers go, then the kick comes.
        let frame = TestFrame { dst: GOOD[0], src: EVIL, tci: None, id: 5, len: 8000 };
        assert!(evil.guest.send(&frame.bytes(), 1).unwrap());
        shrink(&evil, (24 << 20) + 4096);
        let _ = evil.guest.flush();
        evil.guest.kick();
        is_quarantined(&bed);
        still_good(&mut good, 3..20);
        comes_back(&bed, layout);
    }
}

/// The receive buffers of the hostile guest go: met by a good guest's worker.
#[test]
fn a_buffer_that_is_gone_while_it_is_copied_to() {
    for layout in [Layout::Split, Layout::Packed] {
        let bed = bed();
        let mut good = [join(&bed, "good0", layout), join(&bed, "good1", layout)];
        let mut evil = join(&bed, "evil", layout);
        send(&mut evil.guest, EVIL, GOOD[0], 1, 60);
        expect(&mut good[0].guest, 1);
        shrink(&evil, 8 << 20);
        send(&mut good[0].guest, GOOD[0], EVIL, 2, 1500);
        is_quarantined(&bed);
        still_good(&mut good, 3..20);
        comes_back(&bed, layout);
    }
}

/// The control thread meets it: a ring is started at a position that it reads from memory.
#[test]
fn a_ring_that_is_gone_when_it_is_started() {
    let bed = bed();
    let mut good = [join(&bed, "good0", Layout::Split), join(&bed, "good1", Layout::Packed)];
    let settings = GuestSettings::new(Layout::Split);
    let mut evil = Remote::connect(&bed.path("evil.sock"), settings).unwrap();
    evil.introduce(0).unwrap();
    evil.share_memory().unwrap();
    // An answer to the next message: the table was taken. A file that is too short is refused.
    let _ = evil.front_end.ask(GET_FEATURES, &[]).unwrap();
    shrink(&evil, 0);
    for ring in [1, 0] {
        let _ = evil.set_ring(ring);
    }
    is_quarantined(&bed);
    still_good(&mut good, 0..10);
    comes_back(&bed, Layout::Packed);
}

/// A region that is larger than its file is refused, and the session goes on or ends: no
/// quarantine.
#[test]
fn a_file_that_is_too_short_from_the_beginning() {
    let bed = bed();
    let settings = GuestSettings::new(Layout::Split);
    let mut evil = Remote::connect(&bed.path("evil.sock"), settings).unwrap();
    evil.introduce(0).unwrap();
    shrink(&evil, 4096);
    evil.share_memory().unwrap();
    assert!(evil.front_end.is_closed());
    let port = bed.port("evil");
    assert_eq!(port["state"], "waiting", "{port}");
    let text = port["last_error"]["text"].as_str().unwrap();
    assert!(text.contains("0x1000 bytes, 0x2800000 are needed"), "{text}");
}

/// While frames run both ways between the hostile guest and a good one, at any moment.
#[test]
fn shrinking_while_frames_run() {
    // Our own driver loses the memory too.
    virtq::mem::guard::install().unwrap();
    let layouts = [Layout::Split, Layout::Packed].into_iter().cycle();
    let left = [0, 9 << 20, 24 << 20, (24 << 20) + 4096];
    for ((round, left), layout) in (0..).zip(left).zip(layouts) {
        let bed = bed();
        let mut good = [join(&bed, "good0", layout), join(&bed, "good1", layout)];
        let mut evil = join(&bed, "evil", layout);
        let file = evil.memory.as_fd().try_clone_to_owned().unwrap();
        let shrinker = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20 + 13 * round));
            ftruncate(&file, left).unwrap();
        });
        let mut id = 0;
        while !shrinker.is_finished() || id % 64 != 0 || bed.port("evil")["state"] == "up" {
            id += 1;
            let frame = TestFrame { dst: GOOD[0], src: EVIL, tci: None, id, len: 9000 };
            // What it sees now and then makes no sense to it.
            let _ = evil.guest.send(&frame.bytes(), 1);
            let _ = evil.guest.flush();
            let _ = evil.guest.receive();
            send(&mut good[0].guest, GOOD[0], EVIL, id, 1500);
            let _ = good[0].guest.receive().unwrap();
        }
        shrinker.join().unwrap();
        is_quarantined(&bed);
        still_good(&mut good, (1 << 50)..(1 << 50) + 20);
        comes_back(&bed, layout);
    }
}

/// A front end that is in quarantine is sent away until the reset.
fn comes_back(bed: &Bed, layout: Layout) {
    let path = bed.path("evil.sock");
    let mut early = Remote::join(&path, GuestSettings::new(layout));
    assert!(early.as_mut().map_or(true, |remote| remote.front_end.is_closed()));
    assert_eq!(bed.port("evil")["state"], "quarantined");
    assert_eq!(bed.ctl(&["port", "reset", "evil"]), "port evil is in service again\n");
    let mut again = join(bed, "evil", layout);
    send(&mut again.guest, EVIL, MacAddr::BROADCAST, 77, 60);
    eventually("the frame is taken", || again.guest.all_sent().unwrap());
}
