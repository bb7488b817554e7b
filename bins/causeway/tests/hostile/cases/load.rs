//! Load: what is not taken, and what is asked for again and again.

use packet::MacAddr;
use testkit::request::GET_FEATURES;

use super::chains::STATION;
use crate::evil::{Desc, Evil, WRITE, desc};
use crate::world::{Case, EVIL, Stage, case};

/// Frames that are flooded to everybody before somebody looks whether the good guests go on.
const BURST: u64 = 20;

/// Buffers on the receiveq, each of one descriptor.
fn buffers(evil: &mut Evil, count: u16) {
    for buffer in 0..count {
        let next = if evil.layout == virtq::Layout::Packed { buffer } else { 0 };
        evil.offer(0, &[Desc { next, ..desc(2048, WRITE) }]);
    }
}

/// The good guests flood so much; all of it arrived at the switch when this returns.
fn flooded(stage: &Stage<'_>, to: MacAddr, rounds: u64) -> u64 {
    for _ in 0..rounds {
        for _ in 0..BURST {
            stage.world.flood(to);
        }
        stage.world.progress();
    }
    rounds * BURST
}

fn never_refilled(count: u16) -> Case {
    case(format!("a receiveq with {count} buffers that is never refilled"), move |stage| {
        let mut evil = Evil::up(stage);
        buffers(&mut evil, count);
        let before = stage.world.drops("no_buffer");
        let sent = flooded(stage, STATION, 5);
        let dropped = || stage.world.drops("no_buffer") - before;
        let all = sent - u64::from(count);
        crate::world::eventually("what finds no buffer is dropped", || dropped() >= all);
        assert_eq!((dropped(), evil.used(0)), (all, count));
        stage.is_up(&mut evil);
        // Its own frames are taken all the same.
        evil.frame(&[0xff; 60]);
        evil.wait_used(1, 1);
    })
}

/// Kicks without end beside frames: each frame is taken, and the good guests go on in between.
fn kicked(stage: &Stage<'_>, ring: u32) {
    let mut evil = Evil::up(stage);
    for round in 0..8u16 {
        for _ in 0..5_000 {
            evil.kick(ring);
        }
        evil.frame(&[0xff; 60]);
        stage.world.progress();
        evil.wait_used(1, round + 1);
    }
    stage.is_up(&mut evil);
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        never_refilled(0),
        never_refilled(3),
        case("kicks of the transmitq beside frames", |stage| kicked(stage, 1)),
        case("kicks of the receiveq beside frames", |stage| kicked(stage, 0)),
        case("messages beside the good guests' frames", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..10 {
                for _ in 0..500 {
                    let _ = evil.front.ask(GET_FEATURES, &[]).unwrap();
                }
                stage.world.progress();
            }
            stage.is_up(&mut evil);
        }),
        case("its buffers go and come back while it is flooded", |stage| {
            let mut evil = Evil::up(stage);
            for round in 1..=4 {
                buffers(&mut evil, 1);
                let _ = flooded(stage, STATION, 1);
                evil.wait_used(0, round);
            }
            assert_eq!(stage.world.port(EVIL)["state"], "up");
        }),
    ]
}
