//! Behind a vIOMMU: translations that are missing, overlap, are huge, wrap around, lead elsewhere,
//! or are taken back while frames run.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use testkit::request::{
    GET_VRING_BASE, IOTLB_MSG, RESET_DEVICE, SET_BACKEND_REQ_FD, SET_FEATURES, SET_VRING_ENABLE,
};
use virtq::Layout;

use crate::evil::{BUFFERS, Desc, Evil, INDIRECT_DESC, MEMORY, NEXT, WRITE, areas, desc, longs};
use crate::evil::{PACKED, words};
use crate::world::{Case, EVIL, Stage, case, eventually};

/// `VIRTIO_F_ACCESS_PLATFORM`
const PLATFORM: u64 = 1 << 33;
const PAGE: u64 = 4096;
const READ_WRITE: u8 = 3;
const MISS: u8 = 1;
const UPDATE: u8 = 2;
const INVALIDATE: u8 = 3;
/// Where the buffers of the hostile guest are in the device's view, beside where they are.
const FAR: u64 = 1 << 40;
/// Where frames are received.
const RECEIVED: u64 = BUFFERS + (1 << 20);
/// Its station.
const ITSELF: [u8; 6] = [2, 0, 0, 0, 0, 0x66];
/// Frames that wait for a translation at most.
const HELD_MAX: u64 = 8 * 64;
/// Times that something is repeated.
const MANY: u64 = 300;

/// The body of a message about `[iova, iova + size)`.
fn message(iova: u64, size: u64, user: u64, perm: u8, kind: u8) -> Vec<u8> {
    let last = u64::from_le_bytes([perm, kind, 0, 0, 0, 0, 0, 0]);
    longs(&[iova, size, user, last])
}

fn update(iova: u64, size: u64, user: u64) -> Vec<u8> {
    message(iova, size, user, READ_WRITE, UPDATE)
}

fn invalidate(iova: u64, size: u64) -> Vec<u8> {
    message(iova, size, 0, 0, INVALIDATE)
}

/// Behind a vIOMMU.
struct Behind {
    evil: Evil,
    /// Where the switch asks.
    channel: UnixStream,
}

impl Behind {
    /// Memory is shared and the rings are set up; nothing is translated.
    fn set_up(stage: &Stage<'_>) -> Self {
        let mut evil = Evil::connect(stage);
        evil.features = INDIRECT_DESC | PLATFORM;
        evil.negotiate();
        let (channel, theirs) = UnixStream::pair().unwrap();
        channel.set_nonblocking(true).unwrap();
        assert!(evil.ack(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
        assert!(evil.share());
        for ring in 0..2 {
            evil.set_ring(ring);
        }
        Self { evil, channel }
    }

    /// Both rings run: the rings' part of the memory is where it is, and nothing else is known.
    fn up(stage: &Stage<'_>) -> Self {
        let mut behind = Self::set_up(stage);
        assert!(behind.say(&update(0, BUFFERS, 0)));
        eventually("the port is up", || stage.world.port(EVIL)["state"] == "up");
        behind
    }

    /// The whole memory is where it is.
    fn known(stage: &Stage<'_>) -> Self {
        let mut behind = Self::up(stage);
        assert!(behind.say(&update(BUFFERS, MEMORY - BUFFERS, BUFFERS)));
        behind
    }

    fn say(&mut self, body: &[u8]) -> bool {
        self.evil.ack(IOTLB_MSG, body, &[])
    }

    /// Waits until the switch has asked for something.
    fn is_asked(&self) {
        let mut byte = [0];
        eventually("it asks", || {
            let asked = rustix::net::recv(&self.channel, &mut byte, rustix::net::RecvFlags::PEEK);
            asked.is_ok_and(|(_, count)| count > 0)
        });
    }

    /// Offers a frame of 60 bytes at this address of the device. It is to where it comes from: what
    /// fills the queues of the good guests is another matter.
    fn frame_at(&mut self, addr: u64) {
        let header = [0; 12];
        self.evil.write(BUFFERS, &[&header[..], &ITSELF, &ITSELF, &[0xff; 48]].concat());
        self.evil.offer(1, &[Desc { addr, next: 0, ..desc(72, 0) }]);
    }
}

fn refused(name: &str, body: Vec<u8>, text: &'static str) -> Case {
    case(format!("a translation {name}"), move |stage| {
        let mut behind = Behind::known(stage);
        stage.refuses(&mut behind.evil, IOTLB_MSG, &body, text);
        // What was known before still is.
        behind.frame_at(BUFFERS);
        behind.evil.wait_used(1, 1);
    })
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = messages();
    all.extend(ranges());
    all.extend(misses());
    all.extend(unanswered());
    all.extend(never_answered());
    all.extend(revoked());
    all.extend(under_way());
    all
}

fn messages() -> Vec<Case> {
    let outside = "is not within the memory";
    vec![
        refused("into nowhere", update(FAR, PAGE, 1 << 50), outside),
        refused("that begins within and ends outside", update(FAR, MEMORY + 1, 0), outside),
        refused("of everything", update(0, u64::MAX, 0), outside),
        refused("of nothing", update(FAR, 0, 0), outside),
        refused("that wraps around", update(u64::MAX - PAGE + 1, 2 * PAGE, 0), outside),
        refused("whose target wraps around", update(FAR, PAGE, u64::MAX - 100), outside),
        refused("for no access", message(FAR, PAGE, 0, 0, UPDATE), "the permission is 0x0"),
        refused("for more than there is", message(FAR, PAGE, 0, 4, UPDATE), "the permission is"),
        refused("of no kind", message(FAR, PAGE, 0, 3, 0), "the type is 0x0"),
        refused("of an unknown kind", message(FAR, PAGE, 0, 3, 5), "the type is 0x5"),
        refused("that asks us", message(FAR, PAGE, 0, 3, MISS), "which only back ends have"),
        refused("of half a message", vec![0; 31], "31 bytes instead of 32"),
        case("a translation without a vIOMMU", |stage| {
            let mut evil = Evil::up(stage);
            stage.refuses(&mut evil, IOTLB_MSG, &update(0, PAGE, 0), "without ACCESS_PLATFORM");
            stage.is_up(&mut evil);
        }),
        case("a vIOMMU that comes while its rings run", |stage| {
            let mut evil = Evil::up(stage);
            let packed = if stage.layout == Layout::Packed { PACKED } else { 0 };
            let bits = 1 << 32 | 1 << 15 | 1 << 30 | packed | INDIRECT_DESC | PLATFORM;
            let text = "with other features while ring 0 runs";
            stage.refuses(&mut evil, SET_FEATURES, &u64::to_le_bytes(bits), text);
            stage.is_up(&mut evil);
        }),
    ]
}

fn one_byte_each(stage: &Stage<'_>) {
    const BYTES: u32 = 4000;
    let mut behind = Behind::up(stage);
    for n in 0..u64::from(BYTES) {
        assert!(behind.say(&update(FAR + n, 1, BUFFERS + 2 * n)));
    }
    // Each buffer is so many pieces, and a chain could have one for each entry.
    let buffer = Desc { addr: FAR, len: BYTES, flags: 0, next: 1 };
    behind.evil.offer(1, &[Desc { flags: NEXT, ..buffer }, buffer]);
    stage.breaks(&mut behind.evil, "a chain in 8000 or more pieces of memory");
}

fn ranges() -> Vec<Case> {
    vec![
        case("translations of one byte each", one_byte_each),
        case("translations that overlap, in every way", |stage| {
            let mut behind = Behind::known(stage);
            let mut noise = testkit::Rng::new(11);
            for _ in 0..MANY {
                let at = BUFFERS + noise.below(64) * PAGE + noise.below(3);
                let size = 1 + noise.below(16 * PAGE);
                let user = noise.below(MEMORY - size);
                assert!(behind.say(&update(at, size, user)));
                if noise.below(4) == 0 {
                    assert!(behind.say(&invalidate(at + noise.below(size), noise.below(PAGE))));
                }
            }
            stage.answers(&mut behind.evil);
            assert!(behind.say(&invalidate(BUFFERS, MEMORY)));
            assert!(behind.say(&update(BUFFERS, MEMORY - BUFFERS, BUFFERS)));
            behind.frame_at(BUFFERS);
            behind.evil.wait_used(1, 1);
        }),
        case("many translations of a byte each", |stage| {
            let mut behind = Behind::known(stage);
            // Each costs as much as there are already: 4096 at most, which a debug build feels.
            for n in 0..600 {
                behind.evil.front.send(IOTLB_MSG, &update(FAR + n * 2, 1, n), &[]).unwrap();
            }
            stage.answers(&mut behind.evil);
            let known = &stage.world.port(EVIL)["front_end"]["translations"];
            assert_eq!(known.as_u64(), Some(602));
        }),
        case("one page at every address there is", |stage| {
            let mut behind = Behind::known(stage);
            for bit in 12..64 {
                let iova = 1u64 << bit;
                if iova >= MEMORY {
                    assert!(behind.say(&update(iova, PAGE, BUFFERS)));
                }
            }
            assert!(behind.say(&update(u64::MAX - PAGE + 1, PAGE, BUFFERS)));
            behind.frame_at(u64::MAX - PAGE + 1);
            behind.evil.wait_used(1, 1);
        }),
        case("both rings on one page", |stage| {
            let mut behind = Behind::set_up(stage);
            let [base, ..] = areas(0);
            for page in (0..BUFFERS).step_by(PAGE as usize) {
                assert!(behind.say(&update(page, PAGE, base)));
            }
            behind.evil.kick(0);
            behind.evil.kick(1);
            stage.answers(&mut behind.evil);
        }),
        case("buffers that are its rings", |stage| {
            let mut behind = Behind::known(stage);
            assert!(behind.say(&update(FAR, BUFFERS, 0)));
            for _ in 0..4 {
                behind.evil.offer(0, &[Desc { addr: FAR + areas(0)[0], ..desc(0x10000, WRITE) }]);
            }
            stage.world.flood(packet::MacAddr([2, 9, 9, 9, 9, 9]));
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
    ]
}

fn misses() -> Vec<Case> {
    vec![
        case("a missing translation is asked for, and its chain waits", |stage| {
            let mut behind = Behind::up(stage);
            behind.frame_at(BUFFERS);
            behind.is_asked();
            stage.world.progress();
            assert_eq!(behind.evil.used(1), 0);
            assert!(behind.say(&update(BUFFERS, PAGE, BUFFERS)));
            behind.evil.wait_used(1, 1);
        }),
        case("a question that is answered with something else", |stage| {
            let mut behind = Behind::up(stage);
            behind.frame_at(BUFFERS);
            behind.is_asked();
            for n in 0..MANY {
                assert!(behind.say(&update(FAR + n * PAGE, PAGE, BUFFERS)));
                behind.evil.kick(1);
            }
            assert_eq!(behind.evil.used(1), 0);
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
        case("a question that is answered with what may not be read", |stage| {
            let mut behind = Behind::up(stage);
            behind.frame_at(BUFFERS);
            behind.is_asked();
            assert!(behind.say(&message(BUFFERS, PAGE, BUFFERS, 2, UPDATE)));
            stage.breaks(&mut behind.evil, "");
        }),
        case("questions without end, which nobody reads or answers", |stage| {
            let mut behind = Behind::up(stage);
            // Each round another address is next in the ring, and another one is taken back.
            for n in 0..MANY {
                behind.evil.start_over(1);
                behind.frame_at(FAR + n * 7 * PAGE);
                assert!(behind.say(&invalidate(FAR + n * 7 * PAGE, PAGE)));
            }
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
    ]
}

/// Frames to the hostile port: as many wait as may, the others are dropped and counted.
fn more_than_may_wait(stage: &Stage<'_>) {
    let before = stage.world.drops("not_translated");
    for _ in 0..(HELD_MAX + 88) / 8 {
        (0..8).for_each(|_| stage.world.flood(packet::MacAddr([2, 9, 9, 9, 9, 9])));
        // They reach the good guests too: not more than these have room for.
        stage.world.progress();
    }
    eventually("what may not wait", || stage.world.drops("not_translated") == before + 88);
}

/// The front end never answers, or with noise.
fn never_answered() -> Vec<Case> {
    vec![
        case("rings whose places are never told, and frames for them", |stage| {
            let mut behind = Behind::set_up(stage);
            behind.is_asked();
            more_than_may_wait(stage);
            let port = stage.world.port(EVIL);
            assert_eq!(port["state"], "waiting", "{port}");
            // Nobody will have what waits.
            let before = stage.world.drops("port_down");
            assert!(behind.evil.ack(SET_VRING_ENABLE, &words(&[0, 0]), &[]));
            assert_eq!(stage.world.drops("port_down"), before + HELD_MAX);
            stage.answers(&mut behind.evil);
        }),
        case("rings whose places are taken back and never told again", |stage| {
            let mut behind = Behind::known(stage);
            behind.evil.offer(0, &[Desc { addr: RECEIVED, ..desc(2048, WRITE) }]);
            assert!(behind.say(&invalidate(0, BUFFERS)));
            behind.is_asked();
            let before = stage.world.drops("port_down");
            more_than_may_wait(stage);
            assert_eq!(behind.evil.used(0), 0, "it is not written to");
            drop(behind);
            eventually("it is lost", || stage.world.drops("port_down") == before + HELD_MAX);
        }),
        case("a buffer whose address is never told, and frames for it", |stage| {
            let mut behind = Behind::up(stage);
            behind.evil.offer(0, &[Desc { addr: FAR, ..desc(2048, WRITE) }]);
            more_than_may_wait(stage);
            behind.is_asked();
            assert_eq!(behind.evil.used(0), 0);
            stage.is_up(&mut behind.evil);
        }),
        case("a question that is answered with noise on its channel", |stage| {
            let mut behind = Behind::up(stage);
            behind.frame_at(BUFFERS);
            behind.is_asked();
            // Nobody reads there: it is full at some time.
            let mut noise = testkit::Rng::new(12);
            let mut bytes = [0; 4096];
            loop {
                bytes.fill_with(|| noise.below(256) as u8);
                if std::io::Write::write(&mut behind.channel, &bytes).is_err() {
                    break;
                }
            }
            stage.world.progress();
            assert_eq!(behind.evil.used(1), 0);
            assert!(behind.say(&update(BUFFERS, PAGE, BUFFERS)), "the answer counts all the same");
            behind.evil.wait_used(1, 1);
        }),
        case("questions that are all answered with refused translations", |stage| {
            let mut behind = Behind::up(stage);
            behind.frame_at(FAR);
            behind.is_asked();
            let text = "is not within the memory";
            for user in [MEMORY, u64::MAX, 1 << 50] {
                stage.refuses(&mut behind.evil, IOTLB_MSG, &update(FAR, PAGE, user), text);
                behind.evil.kick(1);
            }
            stage.world.progress();
            assert_eq!(behind.evil.used(1), 0, "it waits on");
            assert!(behind.say(&update(FAR, PAGE, BUFFERS)));
            behind.evil.wait_used(1, 1);
        }),
    ]
}

fn unanswered() -> Vec<Case> {
    vec![
        case("a channel that nobody reads is full", |stage| {
            let mut behind = Behind::up(stage);
            // Thousands of questions, by buffers of many pages each.
            for n in 0..MANY {
                behind.evil.start_over(1);
                let addr = FAR + n * 64 * PAGE;
                behind.evil.offer(1, &[Desc { addr, next: 0, ..desc(60 << 10, 0) }]);
                behind.evil.kick(1);
                assert!(behind.say(&invalidate(addr, 64 * PAGE)));
            }
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
        case("questions whose channel is closed", |stage| {
            let mut behind = Behind::up(stage);
            behind.channel = UnixStream::pair().unwrap().0;
            behind.frame_at(BUFFERS);
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
        case("an indirect table that nobody translates", |stage| {
            let mut behind = Behind::up(stage);
            let table = Desc { addr: FAR, ..desc(64, crate::evil::INDIRECT) };
            behind.evil.offer(1, &[Desc { next: 0, ..table }]);
            behind.is_asked();
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
        case("a chain half of which is translated", |stage| {
            let mut behind = Behind::up(stage);
            assert!(behind.say(&update(BUFFERS, PAGE, BUFFERS)));
            let first = Desc { addr: BUFFERS, ..desc(72, NEXT) };
            let second = Desc { addr: FAR, next: 1, ..desc(100, 0) };
            behind.evil.offer(1, &[first, second]);
            behind.is_asked();
            assert_eq!(behind.evil.used(1), 0);
            stage.world.progress();
        }),
    ]
}

fn revoked() -> Vec<Case> {
    vec![
        case("the translations of its rings are taken back and come again", |stage| {
            let mut behind = Behind::known(stage);
            for _ in 0..50 {
                assert!(behind.say(&invalidate(0, BUFFERS)));
                assert_ne!(stage.world.port(EVIL)["state"], "up");
                assert!(behind.say(&update(0, BUFFERS, 0)));
                stage.is_up(&mut behind.evil);
            }
            behind.frame_at(BUFFERS);
            behind.evil.wait_used(1, 1);
        }),
        case("everything is taken back while frames go both ways", |stage| {
            let mut behind = Behind::known(stage);
            for n in 0..MANY {
                behind.evil.start_over(1);
                behind.frame_at(BUFFERS);
                // Not where it sends from: with the good ones' frames it would take their place.
                behind.evil.offer(0, &[Desc { addr: RECEIVED, ..desc(2048, WRITE) }]);
                if n % 8 == 0 {
                    stage.world.flood(packet::MacAddr([2, 9, 9, 9, 9, 9]));
                }
                assert!(behind.say(&invalidate(BUFFERS, MEMORY)));
                assert!(behind.say(&update(BUFFERS, MEMORY - BUFFERS, BUFFERS)));
            }
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
        case("what is taken back is not read afterwards", |stage| {
            let mut behind = Behind::known(stage);
            assert!(behind.say(&invalidate(BUFFERS, MEMORY)));
            // Acknowledged: whatever is offered from now on waits.
            behind.frame_at(BUFFERS);
            behind.is_asked();
            stage.world.progress();
            assert_eq!(behind.evil.used(1), 0);
        }),
        case("invalidations of everything, without end", |stage| {
            let mut behind = Behind::known(stage);
            for n in 0..2000 {
                let body = if n % 2 == 0 { invalidate(0, u64::MAX) } else { invalidate(n, 0) };
                behind.evil.front.send(IOTLB_MSG, &body, &[]).unwrap();
            }
            stage.answers(&mut behind.evil);
            stage.world.progress();
        }),
        case("translations that nobody asked for, without end", |stage| {
            let mut behind = Behind::known(stage);
            for n in 0..4000 {
                let body = update(FAR + (n % 64) * PAGE, PAGE, BUFFERS);
                behind.evil.front.send(IOTLB_MSG, &body, &[]).unwrap();
            }
            stage.answers(&mut behind.evil);
            stage.world.progress();
        }),
        case("it leaves in the middle of a flood of translations", |stage| {
            let mut behind = Behind::known(stage);
            for n in 0..2000 {
                let body = if n % 2 == 0 { update(FAR, PAGE, 0) } else { invalidate(FAR, PAGE) };
                behind.evil.front.send(IOTLB_MSG, &body, &[]).unwrap();
            }
        }),
        case("an invalidation that wraps around", |stage| {
            let mut behind = Behind::known(stage);
            let _ = behind.say(&invalidate(u64::MAX - 5, u64::MAX));
            let _ = behind.say(&invalidate(BUFFERS, 0));
            behind.frame_at(BUFFERS);
            behind.evil.wait_used(1, 1);
        }),
    ]
}

fn under_way() -> Vec<Case> {
    vec![
        case("its memory goes while it is translated", |stage| {
            let mut behind = Behind::known(stage);
            // Translations lead into what is not there any more.
            let table = testkit::SharedMemory::table(1 << 30, MEMORY);
            assert!(behind.evil.table(&table));
            behind.frame_at(BUFFERS);
            stage.world.progress();
            stage.answers(&mut behind.evil);
        }),
        case("its translated memory is cut short", |stage| {
            let mut behind = Behind::known(stage);
            behind.evil.file.set_len(0).unwrap();
            behind.evil.kick(1);
            stage.loses(&mut behind.evil);
        }),
        case("it is reset behind its vIOMMU", |stage| {
            let mut behind = Behind::known(stage);
            assert!(behind.evil.ack(RESET_DEVICE, &[], &[]));
            stage.refuses(&mut behind.evil, IOTLB_MSG, &update(0, PAGE, 0), "without ACCESS");
        }),
        case("its rings end while their chains wait for answers", |stage| {
            let mut behind = Behind::up(stage);
            behind.frame_at(FAR);
            behind.is_asked();
            for ring in [0u32, 1] {
                let _ = behind.evil.front.ask(GET_VRING_BASE, &words(&[ring, 0])).unwrap();
            }
            assert!(behind.say(&update(FAR, PAGE, BUFFERS)));
            stage.answers(&mut behind.evil);
        }),
        case("it leaves while its chains wait for answers", |stage| {
            let mut behind = Behind::up(stage);
            behind.frame_at(FAR);
            behind.is_asked();
        }),
        case("a missing translation without a channel to ask on", |stage| {
            // No channel at all.
            let mut evil = Evil::connect(stage);
            evil.features = INDIRECT_DESC | PLATFORM;
            evil.negotiate();
            assert!(evil.share());
            for ring in 0..2 {
                evil.set_ring(ring);
            }
            assert!(evil.ack(IOTLB_MSG, &update(0, BUFFERS, 0), &[]));
            evil.offer(1, &[Desc { addr: FAR, next: 0, ..desc(72, 0) }]);
            stage.world.progress();
            stage.answers(&mut evil);
        }),
    ]
}
