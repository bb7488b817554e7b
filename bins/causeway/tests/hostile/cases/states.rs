//! It leaves, in every state that there is.

use std::os::fd::AsFd;

use testkit::request::*;
use virtq::Layout;

use crate::evil::{BUFFERS, Desc, Evil, NEXT, SIZE, WRITE, areas, desc, longs, words};
use crate::world::{Case, Stage, case};

fn leaves(name: &str, at: fn(&Stage<'_>) -> Evil) -> Case {
    case(format!("it leaves {name}"), move |stage| drop(at(stage)))
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = set_up();
    all.extend(at_work());
    all.extend(afterwards());
    all.extend(again_and_again());
    all
}

fn set_up() -> Vec<Case> {
    vec![
        leaves("at once", Evil::connect),
        leaves("after its features", Evil::negotiated),
        leaves("after its memory", Evil::shared),
        leaves("after a ring's size", |stage| {
            let mut evil = Evil::shared(stage);
            assert!(evil.ack(SET_VRING_NUM, &words(&[1, SIZE.into()]), &[]));
            evil
        }),
        leaves("after a ring's addresses", |stage| {
            let mut evil = Evil::shared(stage);
            assert!(evil.set_addr(1, areas(1)));
            evil
        }),
        leaves("after one ring", |stage| {
            let mut evil = Evil::shared(stage);
            evil.set_ring(1);
            evil
        }),
        leaves("when both rings run", Evil::up),
    ]
}

fn at_work() -> Vec<Case> {
    vec![
        leaves("with frames under way", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..14 {
                evil.frame(&[0xff; 60]);
            }
            evil
        }),
        leaves("with buffers given", |stage| {
            let mut evil = Evil::up(stage);
            evil.offer(0, &[desc(2048, WRITE)]);
            evil
        }),
        leaves("with a broken ring", |stage| {
            let mut evil = Evil::up(stage);
            evil.offer(1, &[Desc { addr: u64::MAX, ..desc(9, 0) }]);
            stage.breaks(&mut evil, "wraps around");
            evil
        }),
        leaves("while a ring breaks", |stage| {
            let mut evil = Evil::up(stage);
            evil.offer(1, &[Desc { addr: u64::MAX, ..desc(9, NEXT) }]);
            evil
        }),
    ]
}

fn afterwards() -> Vec<Case> {
    vec![
        leaves("after a reset", |stage| {
            let mut evil = Evil::up(stage);
            assert!(evil.ack(RESET_DEVICE, &[], &[]));
            evil
        }),
        leaves("after it stopped its rings", |stage| {
            let mut evil = Evil::up(stage);
            for ring in [0u32, 1] {
                let _ = evil.front.ask(GET_VRING_BASE, &words(&[ring, 0])).unwrap();
            }
            evil
        }),
        leaves("with a ring disabled", |stage| {
            let mut evil = Evil::up(stage);
            assert!(evil.ack(SET_VRING_ENABLE, &words(&[1, 0]), &[]));
            evil.frame(&[0xff; 60]);
            evil
        }),
        leaves("with a channel of its own", |stage| {
            let mut evil = Evil::negotiated(stage);
            let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
            assert!(evil.ack(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]));
            drop(ours);
            evil
        }),
        leaves("in the middle of an answer", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..100 {
                evil.front.send(GET_FEATURES, &[], &[]).unwrap();
            }
            evil
        }),
        leaves("after its memory was cut short", |stage| {
            let evil = Evil::up(stage);
            evil.file.set_len(0).unwrap();
            evil.kick(1);
            evil
        }),
    ]
}

fn again_and_again() -> Vec<Case> {
    vec![
        case("it breaks its ring, resets it, and breaks it again", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..5 {
                evil.write(areas(1)[0], &[0; 256]);
                evil.write(areas(1)[1], &[0; 256]);
                evil.write(areas(1)[2], &[0; 256]);
                evil.start_over(1);
                evil.offer(1, &[Desc { addr: u64::MAX, ..desc(9, 0) }]);
                stage.breaks(&mut evil, "wraps around");
                let _ = evil.front.ask(GET_VRING_BASE, &words(&[1, 0])).unwrap();
                let fresh = evil.fresh();
                assert!(evil.set_base(1, fresh));
                evil.write(areas(1)[0], &[0; 256]);
                evil.write(areas(1)[2], &[0; 256]);
                let (kick, number) = (evil.fds[1][0].try_clone().unwrap(), longs(&[1]));
                assert!(evil.ack(SET_VRING_KICK, &number, &[kick.as_fd()]));
                stage.is_up(&mut evil);
            }
        }),
        case("its ring is scribbled over while it runs", |stage| {
            let mut evil = Evil::up(stage);
            let mut noise = testkit::Rng::new(7);
            let full = std::env::var_os("CAUSEWAY_FULL").is_some_and(|value| value == "1");
            for _ in 0..if full { 200_000 } else { 500 } {
                let mut bytes = [0; 64];
                noise.fill(&mut bytes);
                let ring = areas(noise.below(2) as u32);
                evil.write(ring[noise.below(3) as usize] + noise.below(16) * 16, &bytes);
                evil.kick(1);
            }
            evil.write(BUFFERS, &[0; 4]);
            assert_eq!(evil.layout == Layout::Split, stage.layout == Layout::Split);
            stage.answers(&mut evil);
        }),
    ]
}
