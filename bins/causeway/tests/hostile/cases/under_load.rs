//! Memory and rings that change while frames go through them, and floods that end in between.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use testkit::request::*;

use super::chains::STATION;
use crate::evil::{BUFFERS, Desc, Evil, INDIRECT, MEMORY, NEXT, WRITE, areas, desc, longs, words};
use crate::world::{Case, EVIL, Stage, case};

/// Where frames are received, apart from what is sent.
const RECEIVED: u64 = BUFFERS + (1 << 20);
/// The largest frame that the port takes.
const LARGE: u32 = 9014;

pub(crate) fn cases() -> Vec<Case> {
    let mut all = cut_short();
    all.extend(slots());
    all.extend(enables());
    all.extend(aliases());
    all.extend(floods());
    all
}

/// One region, as `ADD_MEM_REG` and `REM_MEM_REG` have it.
fn single([guest, size, user, offset]: [u64; 4]) -> Vec<u8> {
    longs(&[0, guest, size, user, offset])
}

fn its_memory(evil: &Evil) -> OwnedFd {
    evil.memory.as_fd().try_clone_to_owned().unwrap()
}

/// Frames of the evil guest: written before they are offered by whoever uses them.
fn frames(evil: &Evil) {
    let station = [2, 0, 0, 0, 0, 0x66];
    evil.write(BUFFERS, &[&[0; 12][..], &station, &station, &[0x88, 0xb5]].concat());
}

/// Its memory is cut short by another thread while something goes on until it is in quarantine.
fn cut_while(name: &'static str, what: fn(&Stage<'_>, &mut Evil)) -> Case {
    case(format!("memory cut short while {name}"), move |stage| {
        let mut evil = Evil::up(stage);
        frames(&evil);
        let file: File = its_memory(&evil).into();
        let goes_on = AtomicBool::new(true);
        std::thread::scope(|scope| {
            let _ = scope.spawn(|| {
                // At any moment of what happens meanwhile.
                std::thread::sleep(std::time::Duration::from_micros(300));
                file.set_len(0).unwrap();
                goes_on.store(false, Ordering::SeqCst);
            });
            while goes_on.load(Ordering::SeqCst) {
                what(stage, &mut evil);
            }
        });
        // What was written behind its end at the same moment has made it longer again.
        evil.file.set_len(0).unwrap();
        // Whoever looks at the ring now finds it gone, if nobody has before.
        evil.kick(1);
        evil.kick(0);
        stage.world.flood(STATION);
        stage.loses(&mut evil);
    })
}

/// Offers something without a look at what became of what was offered before: what is written
/// behind the file's new end makes it longer again, so nothing is.
fn offer_in_place(evil: &mut Evil, ring: u32, one: Desc) {
    if evil.file.metadata().unwrap().len() == MEMORY {
        evil.start_over(ring);
        evil.offer(ring, &[one]);
    }
}

fn cut_short() -> Vec<Case> {
    vec![
        cut_while("frames are copied from it", |_, evil| {
            offer_in_place(evil, 1, desc(LARGE, 0));
        }),
        cut_while("frames are copied to it", |stage, evil| {
            offer_in_place(evil, 0, Desc { addr: RECEIVED, ..desc(2048, WRITE) });
            stage.world.flood(STATION);
            // What is flooded is to find room with the good guests.
            stage.world.progress();
        }),
        cut_while("its rings stop and start", |_, evil| {
            for ring in [0u32, 1] {
                let _ = evil.front.send(SET_VRING_ENABLE, &words(&[ring, 0]), &[]);
                let _ = evil.front.send(SET_VRING_ENABLE, &words(&[ring, 1]), &[]);
            }
        }),
        cut_while("it is shared anew", |_, evil| {
            let memory = its_memory(evil);
            let table = testkit::SharedMemory::table(0, MEMORY);
            // Acknowledged: without that, a table whose file is too short already ends the session.
            let _ = evil.front.acknowledged(SET_MEM_TABLE, &table, &[memory.as_fd()]);
        }),
    ]
}

fn slots() -> Vec<Case> {
    vec![
        case("the rings' memory goes and comes while frames go both ways", |stage| {
            let mut evil = Evil::up(stage);
            frames(&evil);
            let memory = its_memory(&evil);
            for round in 0..30 {
                evil.offer(1, &[desc(100, 0)]);
                evil.offer(0, &[Desc { addr: RECEIVED, ..desc(2048, WRITE) }]);
                if round % 8 == 0 {
                    stage.world.flood(STATION);
                }
                let whole = single([0, MEMORY, 0, 0]);
                assert!(evil.ack(REM_MEM_REG, &whole, &[]));
                assert!(evil.ack(ADD_MEM_REG, &whole, &[memory.as_fd()]));
            }
            stage.answers(&mut evil);
        }),
        case("the slot of a buffer that waits is removed", |stage| {
            let mut evil = Evil::up(stage);
            let memory = its_memory(&evil);
            let far = single([1 << 32, MEMORY, 1 << 32, 0]);
            assert!(evil.ack(ADD_MEM_REG, &far, &[memory.as_fd()]));
            // Given for a frame that has not come.
            evil.offer(0, &[Desc { addr: (1 << 32) + RECEIVED, ..desc(2048, WRITE) }]);
            assert!(evil.ack(REM_MEM_REG, &far, &[]));
            stage.world.flood(STATION);
            stage.breaks(&mut evil, "is not in guest memory");
        }),
        case("hundreds of slots, and all of them gone again", |stage| {
            let mut evil = Evil::up(stage);
            let memory = its_memory(&evil);
            for add in [true, false, true] {
                for slot in 1..300u64 {
                    let body = single([slot << 32, 4096, slot << 32, slot * 4096]);
                    match add {
                        true => assert!(evil.ack(ADD_MEM_REG, &body, &[memory.as_fd()])),
                        false => assert!(evil.ack(REM_MEM_REG, &body, &[])),
                    }
                }
            }
            stage.is_up(&mut evil);
        }),
    ]
}

fn enables() -> Vec<Case> {
    vec![
        case("rings enabled and disabled without end, beside frames", |stage| {
            let mut evil = Evil::up(stage);
            frames(&evil);
            for n in 0..400u32 {
                let body = words(&[n % 4, n / 4 % 2]);
                evil.front.send(SET_VRING_ENABLE, &body, &[]).unwrap();
                if n % 40 == 0 {
                    evil.offer(1, &[desc(100, 0)]);
                    stage.world.flood(STATION);
                }
            }
            stage.world.progress();
            stage.answers(&mut evil);
        }),
        case("rings that are not there are enabled", |stage| {
            let mut evil = Evil::up(stage);
            for ring in [4u32, 255, 256, 65536, u32::MAX] {
                assert!(!evil.ack(SET_VRING_ENABLE, &words(&[ring, 1]), &[]));
                let body = [words(&[ring, 0]), longs(&[0, 0, 0, 0])].concat();
                assert!(!evil.ack(SET_VRING_ADDR, &body, &[]));
            }
            stage.is_up(&mut evil);
        }),
    ]
}

fn aliases() -> Vec<Case> {
    vec![
        case("it receives into the ring that it sends from", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..4 {
                evil.offer(0, &[Desc { addr: areas(1)[0], ..desc(2048, WRITE) }]);
                stage.world.flood(STATION);
                evil.kick(1);
            }
            stage.world.progress();
            stage.answers(&mut evil);
        }),
        case("it receives into the ring that it receives by", |stage| {
            let mut evil = Evil::up(stage);
            for area in areas(0) {
                evil.offer(0, &[Desc { addr: area, ..desc(2048, WRITE) }]);
                stage.world.flood(STATION);
            }
            stage.world.progress();
            stage.answers(&mut evil);
        }),
        case("an indirect table that is the ring itself", |stage| {
            let mut evil = Evil::up(stage);
            let [ring, ..] = areas(1);
            evil.offer(1, &[Desc { addr: ring, ..desc(64, INDIRECT) }]);
            stage.breaks(&mut evil, "is indirect itself");
        }),
        case("an indirect table that is received into", |stage| {
            let mut evil = Evil::up(stage);
            let table = 2 << 20;
            let own = evil.encode(Desc { addr: table, next: 0, ..desc(2048, WRITE) });
            for _ in 0..4 {
                evil.write(table, &own);
                evil.offer(0, &[Desc { addr: table, ..desc(16, INDIRECT) }]);
                stage.world.flood(STATION);
            }
            stage.world.progress();
            stage.answers(&mut evil);
        }),
        case("it sends what it is receiving", |stage| {
            let mut evil = Evil::up(stage);
            frames(&evil);
            for _ in 0..4 {
                evil.offer(0, &[Desc { addr: BUFFERS + 40, ..desc(2048, WRITE) }]);
                evil.offer(1, &[desc(26, NEXT), Desc { next: 1, ..desc(1400, 0) }]);
                stage.world.flood(STATION);
            }
            stage.world.progress();
            stage.answers(&mut evil);
        }),
    ]
}

/// So many messages, without a look at the answers, as far as there is room for them.
fn flood(evil: &mut Evil, count: u32, request: u32, body: &[u8]) {
    for _ in 0..count {
        evil.front.send(request, body, &[]).unwrap();
    }
}

fn floods() -> Vec<Case> {
    vec![
        case("it leaves in the middle of a flood of messages", |stage| {
            let mut evil = Evil::up(stage);
            flood(&mut evil, 30_000, SET_OWNER, &[]);
        }),
        case("it leaves in the middle of a flood of changes", |stage| {
            let mut evil = Evil::up(stage);
            for n in 0..1000u32 {
                flood(&mut evil, 1, SET_VRING_ENABLE, &words(&[n % 2, n / 2 % 2]));
            }
        }),
        case("its memory is cut short in the middle of a flood", |stage| {
            let mut evil = Evil::up(stage);
            flood(&mut evil, 20_000, SET_OWNER, &[]);
            evil.file.set_len(0).unwrap();
            evil.kick(1);
            stage.loses(&mut evil);
        }),
        case("a ring breaks in the middle of a flood", |stage| {
            let mut evil = Evil::up(stage);
            flood(&mut evil, 20_000, SET_OWNER, &[]);
            evil.offer(1, &[Desc { addr: u64::MAX, ..desc(9, 0) }]);
            stage.breaks(&mut evil, "wraps around");
        }),
        case("a flood of refusals", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..3000 {
                let _ = evil.ack(SET_VRING_NUM, &words(&[0, 0]), &[]);
            }
            stage.is_up(&mut evil);
            assert_eq!(stage.world.port(EVIL)["state"], "up");
        }),
    ]
}
