//! The device's state: pipes that are slow, half closed, endless, or lie about what they are, and
//! streams that no switch wrote.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionbio;
use rustix::pipe::pipe;
use testkit::request::{CHECK_DEVICE_STATE, GET_FEATURES, SET_DEVICE_STATE_FD};

use crate::evil::{Evil, longs, words};
use crate::world::{Case, Stage, case, eventually};

const SAVE: u32 = 0;
const LOAD: u32 = 1;

/// A state of version 1 with one station, and what the case makes of it.
fn stream(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
    let mut stream = b"CSWYPORT\x01\0\0\0\x4c\0\0\0\x01\0\0\0\0\0\0\0".to_vec();
    stream.extend(longs(&[1, 60, 0, 0, 0]));
    stream.extend([2, 0, 0, 0, 0, 0x66, 0, 0, 1, 0, 0, 0]);
    change(&mut stream);
    stream
}

/// Asks for a transfer; whether it is accepted.
fn begin(evil: &mut Evil, direction: u32, pipe: &OwnedFd) -> bool {
    let body = words(&[direction, 0]);
    evil.front.send(SET_DEVICE_STATE_FD, &body, &[pipe.as_fd()]).unwrap();
    number(&evil.front.reply(SET_DEVICE_STATE_FD).unwrap()) == 0x100
}

fn number(reply: &[u8]) -> u64 {
    u64::from_le_bytes(reply.try_into().unwrap())
}

/// Whether the state arrived, as the switch says.
fn arrived(evil: &mut Evil) -> bool {
    number(&evil.front.ask(CHECK_DEVICE_STATE, &[]).unwrap()) == 0
}

fn refused(name: &str, stream: Vec<u8>, text: &'static str) -> Case {
    case(format!("a state {name}"), move |stage| {
        let mut evil = Evil::negotiated(stage);
        let (reader, writer) = pipe().unwrap();
        assert!(begin(&mut evil, LOAD, &reader));
        drop(reader);
        // It may be refused before its end.
        let _ = File::from(writer).write_all(&stream);
        assert!(!arrived(&mut evil));
        stage.complains(text);
        stage.answers(&mut evil);
    })
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = streams();
    all.extend(pipes());
    all.extend(wrong_requests());
    all.extend(departures());
    all
}

fn streams() -> Vec<Case> {
    vec![
        refused("of nothing", Vec::new(), "the state has 0 bytes"),
        refused("of somebody else", vec![0x55; 4096], "no Causeway wrote it"),
        refused("of a later version", stream(|s| s[8] = 9), "is of version 9"),
        refused("that is cut off", stream(|s| s.truncate(70)), "its header says 76"),
        refused("that goes on", stream(|s| s.extend([0; 12])), "its header says 76"),
        refused("with more stations than bytes", stream(|s| s[19] = 0xff), "do not hold"),
        refused("with a group's address", stream(|s| s[64] = 1), "which no station can be"),
        refused("in no VLAN", stream(|s| s[71] = 0x10), "in VLAN 4096, which no station can be"),
        refused("without an end", vec![0; 4 << 20], "more than 1048576 bytes"),
        case("a state that is as it should be", |stage| {
            let mut evil = Evil::negotiated(stage);
            let (reader, writer) = pipe().unwrap();
            assert!(begin(&mut evil, LOAD, &reader));
            let mut file = File::from(writer);
            file.write_all(&stream(|s| s[69] = 0x77)).unwrap();
            drop((reader, file));
            assert!(arrived(&mut evil));
        }),
    ]
}

fn pipes() -> Vec<Case> {
    vec![
        case("the state is asked after while its pipe is open", |stage| {
            let mut evil = Evil::negotiated(stage);
            let (reader, writer) = pipe().unwrap();
            assert!(begin(&mut evil, LOAD, &reader));
            let began = Instant::now();
            assert!(!arrived(&mut evil));
            assert!(began.elapsed() >= Duration::from_secs(2));
            stage.complains("the pipe was not closed 2 s after CHECK_DEVICE_STATE");
            stage.world.progress();
            stage.answers(&mut evil);
            drop(writer);
        }),
        case("a pipe is made to block behind our back", |stage| {
            let mut evil = Evil::negotiated(stage);
            let (reader, writer) = pipe().unwrap();
            assert!(begin(&mut evil, LOAD, &reader));
            let mut file = File::from(writer);
            for _ in 0..200 {
                ioctl_fionbio(&reader, false).unwrap();
                file.write_all(&[0x55; 64]).unwrap();
                // What is taken away after it was announced is waited for.
                ioctl_fionbio(&reader, true).unwrap();
                let _ = rustix::io::read(&reader, &mut [0u8; 32]);
            }
            drop((file, reader));
            assert!(!arrived(&mut evil));
        }),
        case("what nobody reads is saved", |stage| {
            let mut evil = Evil::negotiated(stage);
            let (reader, writer) = pipe().unwrap();
            // Full, so that not a byte fits.
            ioctl_fionbio(&writer, true).unwrap();
            while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
            assert!(begin(&mut evil, SAVE, &writer));
            assert!(!arrived(&mut evil));
            stage.complains("the pipe was not closed");
            drop(reader);
        }),
    ]
}

fn wrong_requests() -> Vec<Case> {
    vec![
        case("the wrong end of a pipe", |stage| {
            let mut evil = Evil::negotiated(stage);
            let (reader, writer) = pipe().unwrap();
            assert!(begin(&mut evil, SAVE, &reader));
            assert!(!arrived(&mut evil));
            assert!(begin(&mut evil, LOAD, &writer));
            drop(reader);
            assert!(!arrived(&mut evil));
            stage.complains("the device's state: ");
        }),
        case("the state through an fd that is no pipe", |stage| {
            let mut evil = Evil::negotiated(stage);
            let event = crate::evil::event();
            assert!(!begin(&mut evil, LOAD, &event));
            stage.complains("with an fd that is no pipe");
            assert!(!arrived(&mut evil));
            stage.complains("without a transfer");
        }),
        case("one transfer after the other, none of which ends", |stage| {
            let mut evil = Evil::negotiated(stage);
            let pipes: Vec<_> = (0..50).map(|_| pipe().unwrap()).collect();
            for (reader, _) in &pipes {
                // More than a few at a time are refused.
                let _ = begin(&mut evil, LOAD, reader);
            }
            stage.world.progress();
            drop(pipes);
            stage.answers(&mut evil);
        }),
        case("the state while the rings run", |stage| {
            let mut evil = Evil::up(stage);
            let (reader, _writer) = pipe().unwrap();
            assert!(!begin(&mut evil, LOAD, &reader));
            stage.complains("SET_DEVICE_STATE_FD while ring 0 runs");
            stage.is_up(&mut evil);
        }),
    ]
}

/// It leaves while a transfer is under way; the pipe's other end is let go.
fn leaves(name: &str, direction: u32, asks: bool) -> Case {
    case(format!("it leaves while its state {name}"), move |stage: &Stage<'_>| {
        let mut evil = Evil::negotiated(stage);
        let (reader, writer) = pipe().unwrap();
        ioctl_fionbio(&writer, true).unwrap();
        let fill = || while rustix::io::write(&writer, &[0; 4096]).is_ok() {};
        if direction == SAVE {
            fill();
            assert!(begin(&mut evil, SAVE, &writer));
        } else {
            assert!(begin(&mut evil, LOAD, &reader));
        }
        if asks {
            evil.front.send(CHECK_DEVICE_STATE, &[], &[]).unwrap();
            evil.front.send(GET_FEATURES, &[], &[]).unwrap();
        }
        drop(evil);
        if direction == LOAD {
            drop(reader);
            let gone = || rustix::io::write(&writer, &[0]) == Err(rustix::io::Errno::PIPE);
            eventually("the reader is gone", gone);
        }
    })
}

fn departures() -> Vec<Case> {
    vec![
        leaves("is saved", SAVE, false),
        leaves("is saved, and it has asked", SAVE, true),
        leaves("is loaded", LOAD, false),
        leaves("is loaded, and it has asked", LOAD, true),
    ]
}
