//! What rings hold: chains, indirect tables, indexes, wrap counters; of a transmitq and, met by a
//! good guest's frame, of a receiveq.

use packet::MacAddr;
use testkit::request::SET_VRING_ENABLE;
use virtq::Layout;

use crate::evil::{
    AVAIL, BUFFERS, Desc, EVENT_IDX, Evil, INDIRECT, INDIRECT_DESC, MEMORY, NEXT, SIZE, USED,
    WRITE, areas, desc,
};
use crate::world::{Case, EVIL, Stage, case, eventually};

/// Where an indirect table is.
const TABLE: u64 = 2 << 20;

/// What comes of a chain.
#[derive(Clone, Copy)]
enum End {
    /// The ring is broken, and why: split, packed.
    Breaks(&'static str, &'static str),
    /// Only a split ring is broken by it: packed ones have no links, or say it otherwise.
    Split(&'static str),
    /// Only a packed ring is broken by it.
    Packed(&'static str),
    /// It is taken, and its frame dropped for this reason.
    Drops(&'static str),
    /// It is taken.
    Taken,
}
use End::{Breaks, Drops, Packed, Split, Taken};

pub(crate) fn cases() -> Vec<Case> {
    let mut all = chains();
    all.extend(tables());
    all.extend(split_indexes());
    all.extend(packed_flags());
    all.extend(receive());
    all.extend(events());
    all
}

/// A chain on the transmitq.
fn chain(name: &str, descs: Vec<Desc>, end: End) -> Case {
    case(format!("chain: {name}"), move |stage| {
        let mut evil = Evil::up(stage);
        evil.write(BUFFERS, &[0; 12]);
        evil.write(BUFFERS + 12, &[0xff; 200]);
        offer(stage, &mut evil, &descs, end);
    })
}

fn drops(stage: &Stage<'_>, end: End) -> u64 {
    if let Drops(reason) = end { stage.world.drops(reason) } else { 0 }
}

fn offer(stage: &Stage<'_>, evil: &mut Evil, descs: &[Desc], end: End) {
    let before = drops(stage, end);
    evil.offer(1, descs);
    match end {
        Split(text) if stage.layout == Layout::Split => stage.breaks(evil, text),
        Packed(text) if stage.layout == Layout::Packed => stage.breaks(evil, text),
        Split(_) | Packed(_) => stage.answers(evil),
        Breaks(split, packed) => {
            let text = if stage.layout == Layout::Split { split } else { packed };
            stage.breaks(evil, text);
        }
        Drops(reason) => {
            eventually(&format!("dropped as {reason}"), || stage.world.drops(reason) > before);
            stage.is_up(evil);
        }
        Taken => {
            evil.wait_used(1, 1);
            stage.is_up(evil);
        }
    }
}

fn at(addr: u64, len: u32, flags: u16) -> Desc {
    Desc { addr, len, flags, next: 1 }
}

/// `count` descriptors that follow each other.
fn long(count: u16, len: u32) -> Vec<Desc> {
    let one = |i: u16| {
        let flags = if i + 1 < count { NEXT } else { 0 };
        Desc { addr: BUFFERS, len, flags, next: (i + 1) % SIZE }
    };
    (0..count).map(one).collect()
}

fn chains() -> Vec<Case> {
    let unmapped = "is not in guest memory";
    let both = |text| Breaks(text, text);
    vec![
        chain("a buffer outside", vec![at(MEMORY, 72, 0)], both(unmapped)),
        chain("a buffer across the end", vec![at(MEMORY - 71, 72, 0)], both(unmapped)),
        chain("a buffer far away", vec![at(1 << 60, 72, 0)], both(unmapped)),
        chain("a buffer at the highest address", vec![at(u64::MAX, 1, 0)], both(unmapped)),
        chain("a buffer that wraps", vec![at(u64::MAX - 9, 72, 0)], both("wraps around")),
        chain("a buffer of 4 GiB", vec![at(BUFFERS, u32::MAX, 0)], both(unmapped)),
        chain("a buffer that is all memory", vec![at(0, MEMORY as u32, 0)], Drops("oversize")),
        chain(
            "the second buffer outside",
            vec![desc(12, NEXT), Desc { addr: MEMORY + 9, len: 60, flags: 0, next: 2 }],
            both(unmapped),
        ),
        chain("no bytes", vec![desc(0, 0)], Drops("runt")),
        chain("no bytes, many times", long(8, 0), Drops("runt")),
        chain("one byte at a time", long(16, 1), Drops("runt")),
        chain("as long as the ring", long(SIZE, 60), Taken),
        chain("only writable", vec![desc(72, WRITE)], Drops("runt")),
        chain("only writable, and outside", vec![at(MEMORY, 72, WRITE)], both(unmapped)),
        chain(
            "readable behind writable",
            vec![desc(72, WRITE | NEXT), Desc { next: 2, ..desc(60, 0) }],
            both("stands behind a writable one"),
        ),
        chain("the ring itself as a buffer", vec![at(areas(1)[0], 72, 0)], Taken),
        chain("the used ring as a buffer", vec![at(areas(1)[1], 72, 0)], Taken),
        chain("flags without meaning", vec![desc(72, 0x7f78 & !AVAIL)], Taken),
        chain(
            "indirect with a next one",
            vec![at(TABLE, 16, INDIRECT | NEXT), Desc { next: 2, ..desc(60, 0) }],
            both("is indirect and has a next one"),
        ),
        case("chain: indirect without leave", |stage| {
            let mut evil = Evil::up_with(stage, 0);
            let end = Breaks("not negotiated", "not negotiated");
            offer(stage, &mut evil, &[at(TABLE, 16, INDIRECT)], end);
        }),
        case("chain: the same buffer thousands of times", |stage| {
            let mut evil = Evil::up(stage);
            for round in 0..2u16 {
                evil.offer(1, &long(SIZE / 2, 100));
                if stage.layout == Layout::Split {
                    evil.wait_used(1, round + 1);
                }
            }
            stage.answers(&mut evil);
        }),
    ]
}

/// An indirect table of these descriptors, said to have `len` bytes.
fn table(name: &str, descs: Vec<Desc>, len: u32, end: End) -> Case {
    case(format!("indirect: {name}"), move |stage| {
        let mut evil = Evil::up(stage);
        evil.write(BUFFERS + 12, &[0xff; 200]);
        for (index, desc) in (0u64..).zip(&descs) {
            let bytes = evil.encode(*desc);
            evil.write(TABLE + index * 16, &bytes);
        }
        offer(stage, &mut evil, &[at(TABLE, len, INDIRECT)], end);
    })
}

fn tables() -> Vec<Case> {
    let both = |text| Breaks(text, text);
    let many = (0..400u16).map(|i| Desc { next: i + 1, ..desc(1, NEXT) }).collect::<Vec<_>>();
    vec![
        table("no bytes", vec![], 0, both("an indirect table of 0 bytes")),
        table("half a descriptor", vec![], 8, both("an indirect table of 8 bytes")),
        table("one byte more", vec![desc(72, 0)], 17, both("an indirect table of 17 bytes")),
        table("a table of 4 GiB", vec![], !15, both("table")),
        table("more than an index reaches", vec![], 16 << 16, Packed("")),
        table("indirect in it", vec![at(TABLE, 16, INDIRECT)], 16, both("is indirect itself")),
        table(
            "indirect as the last of it",
            vec![desc(12, NEXT), at(TABLE, 16, INDIRECT)],
            32,
            both("is indirect itself"),
        ),
        table("a buffer outside", vec![at(MEMORY, 72, 0)], 16, both("is not in guest memory")),
        table("longer than the ring", many, 16 * 400, both("the queue allows")),
        table(
            "readable behind writable",
            vec![desc(72, WRITE | NEXT), desc(72, 0)],
            32,
            Split("stands behind a writable one"),
        ),
        // Packed tables have no links: every descriptor of it counts.
        table("a loop of one", vec![Desc { next: 0, ..desc(9, NEXT) }], 16, Split("loop")),
        table(
            "a loop of two",
            vec![Desc { next: 1, ..desc(9, NEXT) }, Desc { next: 0, ..desc(9, NEXT) }],
            32,
            Split("loop"),
        ),
        table("a next one outside", vec![Desc { next: 9, ..desc(9, NEXT) }], 16, Split("next")),
        case("indirect: a table outside", |stage| {
            let mut evil = Evil::up(stage);
            let end = Breaks("is not in guest memory", "is not in guest memory");
            offer(stage, &mut evil, &[at(MEMORY, 32, INDIRECT)], end);
        }),
        case("indirect: a table across the end", |stage| {
            let mut evil = Evil::up(stage);
            let end = Breaks("is not in guest memory", "is not in guest memory");
            evil.write(MEMORY - 16, &evil.encode(desc(72, NEXT)));
            offer(stage, &mut evil, &[at(MEMORY - 16, 32, INDIRECT)], end);
        }),
        case("indirect: a table that wraps", |stage| {
            let mut evil = Evil::up(stage);
            let end = Breaks("wraps around", "wraps around");
            offer(stage, &mut evil, &[at(u64::MAX - 15, 32, INDIRECT)], end);
        }),
        case("indirect: a table that is not aligned", |stage| {
            let mut evil = Evil::up(stage);
            evil.write(TABLE + 3, &evil.encode(Desc { next: 0, ..desc(72, 0) }));
            offer(stage, &mut evil, &[at(TABLE + 3, 16, INDIRECT)], Taken);
        }),
    ]
}

/// What comes of something that only one kind of ring has; with the other kind the same bytes must
/// only be survived.
#[derive(Clone, Copy)]
enum Then {
    Up,
    Broken(&'static str),
    Either,
}

fn only(layout: Layout, name: &str, then: Then, act: fn(&mut Evil)) -> Case {
    case(format!("{layout:?}: {name}"), move |stage| {
        let mut evil = Evil::up(stage);
        act(&mut evil);
        evil.kick(1);
        match then {
            Then::Broken(text) if stage.layout == layout => stage.breaks(&mut evil, text),
            Then::Up if stage.layout == layout => stage.is_up(&mut evil),
            Then::Broken(_) | Then::Up | Then::Either => stage.answers(&mut evil),
        }
    })
}

fn split_indexes() -> Vec<Case> {
    let split = |name, then, act| only(Layout::Split, name, then, act);
    let broken = Then::Broken;
    vec![
        split("one more than the ring has", broken("is 17 ahead"), |evil| {
            evil.avail(1, 0, 0, SIZE + 1);
        }),
        split("half the numbers ahead", broken("is 32768 ahead"), |evil| {
            evil.avail(1, 0, 0, 0x8000);
        }),
        split("one back", broken("is 65535 ahead"), |evil| evil.avail(1, 0, 0, 0xffff)),
        split("back after some", broken("ahead"), |evil| {
            evil.frame(&[0xff; 60]);
            if evil.layout == Layout::Split {
                evil.wait_used(1, 1);
            }
            evil.avail(1, 0, 0, 0);
        }),
        split("a head outside", broken("head index 16"), |evil| evil.avail(1, 0, SIZE, 1)),
        split("the highest head", broken("head index 65535"), |evil| {
            evil.avail(1, 0, u16::MAX, 1);
        }),
        split("a loop of one", broken("has a loop"), |evil| {
            evil.offer(1, &[Desc { next: 0, ..desc(1, NEXT) }]);
        }),
        split("a loop of two", broken("has a loop"), |evil| {
            evil.offer(1, &[desc(1, NEXT), Desc { next: 0, ..desc(1, NEXT) }]);
        }),
        split("a next one outside", broken("next index 16"), |evil| {
            evil.offer(1, &[Desc { next: SIZE, ..desc(1, NEXT) }]);
        }),
        split("the highest next one", broken("next index 65535"), |evil| {
            evil.offer(1, &[Desc { next: u16::MAX, ..desc(1, NEXT) }]);
        }),
        split("the same head in every entry", Then::Up, |evil| {
            evil.write(BUFFERS + 12, &[0xff; 60]);
            evil.raw_desc(1, 0, desc(72, 0));
            (0..SIZE).for_each(|slot| evil.avail(1, slot, 0, slot + 1));
        }),
        split("garbage in the used ring", Then::Up, |evil| {
            evil.write(areas(1)[1], &[0xee; 134]);
            evil.frame(&[0xff; 60]);
        }),
        split("flags without meaning", Then::Up, |evil| {
            evil.write(areas(1)[2], &[0xfe, 0xff]);
            evil.frame(&[0xff; 60]);
        }),
    ]
}

fn packed_flags() -> Vec<Case> {
    let packed = |name, then, act| only(Layout::Packed, name, then, act);
    let broken = Then::Broken;
    vec![
        packed("an identifier outside", broken("buffer id 16"), |evil| {
            evil.offer(1, &[Desc { next: SIZE, ..desc(72, 0) }]);
        }),
        packed("the highest identifier", broken("buffer id 65535"), |evil| {
            evil.offer(1, &[Desc { next: u16::MAX, ..desc(72, 0) }]);
        }),
        packed("a chain that is not all there", broken("which is not available"), |evil| {
            evil.offer(1, &[desc(72, NEXT)]);
        }),
        packed("used in this lap", broken("marked used"), |evil| {
            evil.raw_desc(1, 0, desc(72, AVAIL | USED));
        }),
        packed("used in another lap", Then::Up, |evil| evil.raw_desc(1, 0, desc(72, USED))),
        packed("longer than the ring", broken("the driver broke the ring"), |evil| {
            (0..u64::from(SIZE)).for_each(|i| evil.raw_desc(1, i, desc(1, AVAIL | NEXT)));
        }),
        packed("the same identifier in all", Then::Up, |evil| {
            evil.write(BUFFERS + 12, &[0xff; 60]);
            (0..4).for_each(|i| evil.raw_desc(1, i, desc(72, AVAIL)));
        }),
        packed("event flags without meaning", Then::Up, |evil| {
            evil.write(areas(1)[2], &[0xff; 4]);
            evil.frame(&[0xff; 60]);
        }),
        packed("a pattern in the whole ring", Then::Either, |evil| {
            evil.write(areas(1)[0], &[0x5a; 256]);
        }),
        packed("ones in the whole ring", Then::Either, |evil| {
            evil.write(areas(1)[0], &[0xff; 256]);
        }),
    ]
}

/// The hostile guest's address: frames to it are met by its receiveq.
pub(crate) const STATION: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x66]);

/// Something on the receiveq, while good guests flood a frame.
fn receiving(name: &str, descs: Vec<Desc>, end: End) -> Case {
    case(format!("receive: {name}"), move |stage| {
        let mut evil = Evil::up(stage);
        let before = drops(stage, end);
        evil.offer(0, &descs);
        stage.world.flood(STATION);
        match end {
            Split(_) | Packed(_) => stage.answers(&mut evil),
            Breaks(split, packed) => {
                let text = if stage.layout == Layout::Split { split } else { packed };
                stage.breaks(&mut evil, text);
            }
            Drops(reason) => {
                let more = || stage.world.drops(reason) > before;
                eventually(&format!("dropped as {reason}"), more);
                stage.answers(&mut evil);
            }
            Taken => {
                evil.wait_used(0, 1);
                stage.is_up(&mut evil);
            }
        }
    })
}

fn receive() -> Vec<Case> {
    let both = |text| Breaks(text, text);
    let unmapped = "is not in guest memory";
    vec![
        receiving("a good buffer", vec![desc(2048, WRITE)], Taken),
        receiving("no buffer", vec![], Drops("no_buffer")),
        receiving("a buffer outside", vec![at(MEMORY, 2048, WRITE)], both(unmapped)),
        receiving("a buffer across the end", vec![at(MEMORY - 9, 2048, WRITE)], both(unmapped)),
        receiving("a buffer that wraps", vec![at(u64::MAX, 2048, WRITE)], both("wraps around")),
        receiving("a buffer of 4 GiB", vec![at(BUFFERS, u32::MAX, WRITE)], both(unmapped)),
        receiving("the ring itself", vec![at(areas(0)[0], 256, WRITE)], Taken),
        receiving("the other ring", vec![at(areas(1)[0], 2048, WRITE)], Taken),
        receiving("a buffer to read", vec![desc(2048, 0)], Taken),
        receiving("no bytes", vec![desc(0, WRITE)], Taken),
        receiving("less than a header", vec![desc(11, WRITE)], Taken),
        receiving("a header and no more", vec![desc(12, WRITE)], Drops("no_buffer")),
        receiving(
            "readable behind writable",
            vec![desc(72, WRITE | NEXT), Desc { next: 2, ..desc(60, 0) }],
            both("stands behind a writable one"),
        ),
        receiving("indirect outside", vec![at(MEMORY, 16, INDIRECT)], both(unmapped)),
        receiving("indirect of no bytes", vec![at(TABLE, 0, INDIRECT)], both("table of 0 bytes")),
        receiving("as long as the ring", long_writable(), Taken),
        case("receive: an index far ahead", |stage| {
            let mut evil = Evil::up(stage);
            evil.avail(0, 0, 0, 1000);
            stage.world.flood(STATION);
            match stage.layout {
                Layout::Split => stage.breaks(&mut evil, "is 1000 ahead"),
                Layout::Packed => stage.answers(&mut evil),
            }
        }),
        case("receive: memory cut short under the buffers", |stage| {
            let mut evil = Evil::up(stage);
            evil.offer(0, &[desc(2048, WRITE)]);
            evil.file.set_len(BUFFERS).unwrap();
            stage.world.flood(STATION);
            stage.loses(&mut evil);
        }),
        case("receive: memory cut short under the ring", |stage| {
            let mut evil = Evil::up(stage);
            evil.file.set_len(areas(0)[0]).unwrap();
            stage.world.flood(STATION);
            stage.loses(&mut evil);
        }),
        case("receive: disabled in between", |stage| {
            let mut evil = Evil::up(stage);
            evil.offer(0, &[desc(2048, WRITE)]);
            let body = |on: u32| crate::evil::words(&[0, on]);
            for on in [0, 1, 0, 1, 0] {
                assert!(evil.ack(SET_VRING_ENABLE, &body(on), &[]));
                stage.world.flood(STATION);
            }
            assert_ne!(stage.world.port(EVIL)["state"], "up");
        }),
    ]
}

fn long_writable() -> Vec<Desc> {
    long(SIZE, 100).into_iter().map(|desc| Desc { flags: desc.flags | WRITE, ..desc }).collect()
}

/// Event positions that mean nothing.
fn events() -> Vec<Case> {
    [0u16, 1, 15, 16, 0x7fff, 0x8000, 0x8001, 0xffff]
        .map(|position| {
            case(format!("event position {position:#x}"), move |stage| {
                let mut evil = Evil::up_with(stage, EVENT_IDX | INDIRECT_DESC);
                let [_, _, driver] = areas(1);
                let split = driver + 4 + u64::from(SIZE) * 2;
                for flags in [0u8, 1, 2, 3, 0xff] {
                    match stage.layout {
                        Layout::Split => evil.write(split, &position.to_le_bytes()),
                        Layout::Packed => {
                            let [low, high] = position.to_le_bytes();
                            evil.write(driver, &[low, high, flags, 0xff]);
                        }
                    }
                    evil.frame(&[0xff; 60]);
                }
                evil.wait_used(1, 5);
                stage.is_up(&mut evil);
            })
        })
        .into()
}
