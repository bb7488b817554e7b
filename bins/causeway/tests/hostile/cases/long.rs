//! Rings of 32768 entries in which every chain is as long as the ring: who walks them all has no
//! time for anybody else.

use std::os::unix::fs::FileExt;

use testkit::request::{SET_VRING_ENABLE, SET_VRING_NUM};
use virtq::Layout;

use super::chains::STATION;
use crate::evil::{AVAIL, BUFFERS, Desc, Evil, INDIRECT, NEXT, USED, WRITE, words};
use crate::world::{Case, EVIL, Stage, case, eventually};

/// Entries of the ring, and the most descriptors of a chain.
const LONG: u16 = 32768;
/// Where its parts are: descriptors, device, driver. Behind what other rings use.
const RING: [u64; 3] = [2 << 20, 3 << 20, (3 << 20) + (512 << 10)];
/// An indirect table as long as the ring.
const TABLE: u64 = (2 << 20) + (512 << 10);

pub(crate) fn cases() -> Vec<Case> {
    let nothing = |flags| move |_| Desc { addr: u64::MAX, len: 0, flags, next: 0 };
    let byte = |flags| move |_| Desc { addr: BUFFERS, len: 1, flags, next: 0 };
    // One more than a header.
    let few =
        |index: u16| Desc { addr: BUFFERS, len: u32::from(index < 13), flags: WRITE, next: 0 };
    // A frame to everybody, and nothing behind it.
    let frame = |index: u16| Desc {
        addr: BUFFERS + u64::from(index),
        len: u32::from(index < 1000),
        flags: 0,
        next: 0,
    };
    vec![
        long("sent: no bytes", 1, LONG, nothing(0)),
        long("sent: a byte each", 1, LONG, byte(0)),
        long("sent: a frame in 1000 pieces", 1, LONG, frame),
        long("received: no bytes", 0, LONG, nothing(WRITE)),
        long("received: one byte more than a header", 0, LONG, few),
        long("received: a byte each", 0, LONG, byte(WRITE)),
        long("received: many that are useless", 0, 1, nothing(WRITE)),
        long("received: many that are short", 0, 13, byte(WRITE)),
    ]
}

/// All entries of `ring` are the same chain: `count` descriptors, as `each` has them.
fn long(name: &str, ring: u32, count: u16, each: impl Fn(u16) -> Desc + 'static) -> Case {
    case(format!("long chains, {name}"), move |stage| {
        let mut evil = Evil::shared(stage);
        evil.set_ring(1 - ring);
        evil.write(BUFFERS, &[&[0; 12][..], &[0xff; 1000]].concat());
        let descs: Vec<u8> = (0..count)
            .flat_map(|index| {
                let more =
                    if index + 1 < count && stage.layout == Layout::Split { NEXT } else { 0 };
                let desc = each(index);
                evil.encode(Desc { flags: desc.flags | more, next: index + 1, ..desc })
            })
            .collect();
        fill(&evil, &descs, &each(0));
        assert!(evil.ack(SET_VRING_NUM, &words(&[ring, LONG.into()]), &[]));
        assert!(evil.set_base(ring, evil.fresh()));
        assert!(evil.set_addr(ring, RING));
        assert!(evil.set_fds(ring));
        assert!(evil.ack(SET_VRING_ENABLE, &words(&[ring, 1]), &[]));
        evil.kick(ring);
        works(stage, &evil, ring);
        stage.world.progress();
        stage.answers(&mut evil);
        assert_eq!(stage.world.port(EVIL)["state"], "up");
    })
}

/// Writes the ring: one chain of `descs`, which is in every entry.
fn fill(evil: &Evil, descs: &[u8], first: &Desc) {
    if evil.layout == Layout::Split {
        evil.write(RING[0], descs);
        evil.write(RING[2], &[0; 4 + 2 * LONG as usize]);
        evil.write(RING[2] + 2, &LONG.to_le_bytes());
        return;
    }
    evil.write(TABLE, descs);
    let one = if descs.len() == 16 {
        *first
    } else {
        Desc { addr: TABLE, len: descs.len() as u32, flags: INDIRECT, next: 0 }
    };
    let ring = evil.encode(Desc { flags: one.flags | AVAIL, next: 0, ..one });
    evil.write(RING[0], &ring.repeat(LONG.into()));
}

/// The ring is walked: what is sent is taken, what is to be received met by frames.
fn works(stage: &Stage<'_>, evil: &Evil, ring: u32) {
    let before = stage.world.drops("no_buffer");
    if ring == 0 {
        (0..20).for_each(|_| stage.world.flood(STATION));
    }
    eventually("the ring is looked at", || {
        stage.world.drops("no_buffer") > before || has_used(evil)
    });
}

/// Whether a chain was given back.
fn has_used(evil: &Evil) -> bool {
    let at = match evil.layout {
        Layout::Split => RING[1] + 2,
        Layout::Packed => RING[0] + 14,
    };
    let mut word = [0; 2];
    evil.file.read_exact_at(&mut word, at).unwrap();
    let word = u16::from_le_bytes(word);
    match evil.layout {
        Layout::Split => word != 0,
        Layout::Packed => word & (AVAIL | USED) == AVAIL | USED,
    }
}
