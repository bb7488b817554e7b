//! Where a ring's parts are said to be.

use testkit::request::*;
use virtq::Layout;

use crate::evil::{Evil, MEMORY, SIZE, areas, words};
use crate::world::{Case, Stage, case};

/// A ring 1 that has everything but addresses.
fn without_addresses(stage: &Stage<'_>) -> Evil {
    let mut evil = Evil::shared(stage);
    assert!(evil.ack(SET_VRING_NUM, &words(&[1, SIZE.into()]), &[]));
    let fresh = evil.fresh();
    assert!(evil.set_base(1, fresh));
    assert!(evil.set_fds(1));
    assert!(evil.ack(SET_VRING_ENABLE, &words(&[1, 1]), &[]));
    evil
}

/// Addresses that are refused, with what is said.
fn refused(name: &str, change: fn([u64; 3]) -> [u64; 3], text: &'static str) -> Case {
    case(format!("addresses: {name}"), move |stage| {
        let mut evil = without_addresses(stage);
        assert!(!evil.set_addr(1, change(areas(1))), "accepted");
        let error = stage.world.port("evil")["last_error"]["text"].to_string();
        assert!(error.contains(text), "{error}");
        stage.answers(&mut evil);
    })
}

/// Addresses that no memory has: the ring waits for some.
fn waits(name: &str, change: fn([u64; 3]) -> [u64; 3]) -> Case {
    case(format!("addresses: {name}"), move |stage| {
        let mut evil = without_addresses(stage);
        let _ = evil.set_addr(1, change(areas(1)));
        evil.kick(1);
        stage.answers(&mut evil);
        assert_ne!(stage.world.port("evil")["state"], "up");
        assert_eq!(evil.used(1), 0);
    })
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = vec![
        refused("descriptors not aligned", |[a, b, c]| [a + 1, b, c], "not aligned to 16"),
        refused("descriptors aligned to 8", |[a, b, c]| [a + 8, b, c], "not aligned to 16"),
        refused("the used ring aligned to 2", |[a, b, c]| [a, b + 2, c], "not aligned to 4"),
        refused("the used ring at an odd address", |[a, b, c]| [a, b + 1, c], "not aligned to 4"),
        refused("the available ring at an odd address", |[a, b, c]| [a, b, c + 1], "not aligned"),
        refused("descriptors across the end", |[_, b, c]| [MEMORY - 16, b, c], "not in guest"),
        refused("the used ring across the end", |[a, _, c]| [a, MEMORY - 2, c], "not aligned"),
        case("addresses: the used ring's last byte outside", |stage| {
            let mut evil = without_addresses(stage);
            let [desc, _, driver] = areas(1);
            let accepted = evil.set_addr(1, [desc, MEMORY - 4, driver]);
            assert_eq!(accepted, stage.layout == Layout::Packed, "four bytes are enough there");
            stage.answers(&mut evil);
        }),
        waits("all zero, in another region's place", |_| [MEMORY, MEMORY, MEMORY]),
        waits("descriptors outside", |[_, b, c]| [MEMORY, b, c]),
        waits("the used ring outside", |[a, _, c]| [a, 1 << 40, c]),
        waits("the available ring outside", |[a, b, _]| [a, b, u64::MAX - 4095]),
        waits("the highest addresses", |_| [!15, !3, !1]),
    ];
    all.extend([
        case("addresses: all parts in one place", |stage| {
            let mut evil = without_addresses(stage);
            let [at, ..] = areas(1);
            let _ = evil.set_addr(1, [at, at, at]);
            evil.write(at, &[0x5a; 64]);
            evil.kick(1);
            stage.answers(&mut evil);
        }),
        case("addresses: used over descriptors", |stage| {
            let mut evil = without_addresses(stage);
            let [at, _, driver] = areas(1);
            assert!(evil.set_addr(1, [at, at + 16, driver]));
            evil.frame(&[0xff; 60]);
            evil.frame(&[0xff; 60]);
            stage.answers(&mut evil);
        }),
        case("addresses: both rings in one place", |stage| {
            let mut evil = Evil::up(stage);
            assert!(evil.set_addr(0, areas(1)));
            for _ in 0..4 {
                evil.frame(&[0xff; 60]);
            }
            stage.answers(&mut evil);
        }),
        case("addresses: they change while the ring runs", |stage| {
            let mut evil = Evil::up(stage);
            for offset in 0..8u64 {
                let [a, b, c] = areas(1);
                let by = offset * 0x100;
                let _ = evil.set_addr(1, [a + by, b + by, c + by]);
                evil.kick(1);
            }
            stage.answers(&mut evil);
        }),
        case("addresses: a larger ring that ends outside", |stage| {
            let mut evil = Evil::shared(stage);
            assert!(evil.ack(SET_VRING_NUM, &words(&[1, 32768]), &[]));
            let at = MEMORY - 16 * 32768 + 16;
            let _ = evil.set_addr(1, [at & !15, areas(1)[1], areas(1)[2]]);
            let accepted = evil.set_fds(1);
            stage.answers(&mut evil);
            assert!(!accepted || stage.world.port("evil")["state"] != "up");
        }),
    ]);
    all.extend(sizes_and_positions());
    all
}

fn sizes_and_positions() -> Vec<Case> {
    let sized = |size: u32, split: bool, packed: bool| {
        case(format!("a ring of {size}"), move |stage| {
            let mut evil = Evil::shared(stage);
            assert!(evil.ack(SET_VRING_NUM, &words(&[1, size]), &[]));
            let fresh = evil.fresh();
            assert!(evil.set_base(1, fresh));
            assert!(evil.set_addr(1, areas(1)));
            let _ = evil.set_fds(1);
            let enabled = evil.ack(SET_VRING_ENABLE, &words(&[1, 1]), &[]);
            assert_eq!(enabled, if stage.layout == Layout::Split { split } else { packed });
            stage.answers(&mut evil);
        })
    };
    let positioned = |name: &str, split: u32, packed: u32, text: [&'static str; 2]| {
        case(format!("a position {name}"), move |stage| {
            let mut evil = Evil::shared(stage);
            let (base, text) = match stage.layout {
                Layout::Split => (split, text[0]),
                Layout::Packed => (packed, text[1]),
            };
            assert!(evil.ack(SET_VRING_NUM, &words(&[1, SIZE.into()]), &[]));
            assert!(evil.set_base(1, base));
            assert!(evil.set_addr(1, areas(1)));
            let started = evil.set_fds(1) && evil.ack(SET_VRING_ENABLE, &words(&[1, 1]), &[]);
            evil.kick(1);
            if text.is_empty() {
                assert!(started);
            } else {
                let error = || stage.world.port("evil")["last_error"]["text"].to_string();
                crate::world::eventually("it is refused", || error().contains(text));
            }
            stage.answers(&mut evil);
        })
    };
    // A split ring that cannot be where it is said to be goes on at its used index.
    vec![
        sized(1, true, true),
        sized(3, false, true),
        sized(15, false, true),
        sized(255, false, true),
        positioned("ahead of an empty ring", 3, 0x8000_8003, ["", ""]),
        positioned("of more than 16 bits", 0x1_0000, 0x8001_8001, ["16 bits", ""]),
        positioned("behind the ring's end", 0xffff, 0xffff_ffff, ["", "not possible"]),
        positioned("in another lap", 0x8000, 0x0005_800a, ["", "not possible"]),
    ]
}
