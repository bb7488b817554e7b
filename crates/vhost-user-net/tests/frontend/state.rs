//! The device's state through a pipe, with the `vhost` crate's front end at its other end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use packet::{MacAddr, VlanId};
use port::{Fabric, FlowPlace, PortId, PortSnapshot, PortState, PortTotals, Station};
use vhost::VhostBackend;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost_user_net::SocketMode;
use vhost_user_net::codec::Request;
use vhost_user_net::state::{STREAM_MAX, encode};
use virtio_net::features::VERSION_1;

use crate::guest::{Guest, front_end};
use crate::harness::{Bench, wait_for};

const STOPPED: VhostTransferStatePhase = VhostTransferStatePhase::STOPPED;
const SAVE: VhostTransferStateDirection = VhostTransferStateDirection::SAVE;
const LOAD: VhostTransferStateDirection = VhostTransferStateDirection::LOAD;

fn snapshot(stations: u64) -> PortSnapshot {
    let station = |n| Station {
        vlan: VlanId::new(7).unwrap(),
        mac: MacAddr::from_u64(0x0200_0000_0000 | n),
        age_secs: 3,
    };
    PortSnapshot {
        stations: (0..stations).map(station).collect(),
        flows: vec![FlowPlace { hash: 0xdead_beef, pair: 1, age_ms: 9 }],
        totals: PortTotals { rx_frames: 5, ..PortTotals::default() },
    }
}

/// A front end that has agreed on everything.
fn agreed(bench: &Bench, port: usize) -> Frontend {
    agreed_on(UnixStream::connect(bench.socket(port)).unwrap())
}

fn agreed_on(stream: UnixStream) -> Frontend {
    let mut front = front_end(stream);
    let offered = front.get_protocol_features().unwrap();
    front.set_protocol_features(offered).unwrap();
    front
}

fn pipe() -> (File, OwnedFd) {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    (File::from(reader), writer)
}

/// Gives the state to a port, and ends.
fn load(front: &Frontend, stream: &[u8]) -> bool {
    let (reader, writer) = pipe();
    assert!(front.set_device_state_fd(LOAD, STOPPED, reader.into()).unwrap().is_none());
    // Who refuses it may have gone already.
    let _ = File::from(writer).write_all(stream);
    front.check_device_state().is_ok()
}

fn save(front: &Frontend) -> Vec<u8> {
    let (mut reader, writer) = pipe();
    assert!(front.set_device_state_fd(SAVE, STOPPED, writer).unwrap().is_none());
    let mut stream = Vec::new();
    let _ = reader.read_to_end(&mut stream).unwrap();
    front.check_device_state().unwrap();
    stream
}

#[test]
fn what_one_port_saves_another_one_loads() {
    let bench = Bench::new(SocketMode::Server);
    // Larger than a pipe, so that both sides have to wait.
    let known = snapshot(20_000);
    let _ = bench.wire.restore(PortId(0), &known);
    let (from, to) = (agreed(&bench, 0), agreed(&bench, 1));
    let stream = save(&from);
    assert_eq!(stream, encode(&known));
    assert!(load(&to, &stream));
    assert_eq!(bench.wire.snapshot(PortId(1)), known);
    // And again, as after a migration that failed.
    assert_eq!(save(&from), stream);
    assert!(load(&to, &encode(&snapshot(1))));
    assert_eq!(bench.wire.snapshot(PortId(1)), snapshot(1));
}

#[test]
fn a_unix_socket_is_no_pipe() {
    let bench = Bench::new(SocketMode::Server);
    let front = agreed(&bench, 0);
    let (_ours, theirs) = UnixStream::pair().unwrap();
    assert!(front.set_device_state_fd(LOAD, STOPPED, theirs.into()).is_err());
    bench.wait_error(0, "SET_DEVICE_STATE_FD with an fd that is no pipe");
    assert!(load(&front, &encode(&snapshot(3))), "the session goes on");
}

#[test]
fn a_stream_that_is_no_state_changes_nothing() {
    let bench = Bench::new(SocketMode::Server);
    let front = agreed(&bench, 0);
    assert!(load(&front, &encode(&snapshot(3))));
    let good = encode(&snapshot(4));
    let newer = [&good[..8], &[2], &good[9..]].concat();
    for (stream, text) in [
        (Vec::new(), "the state has 0 bytes, its header alone has 64"),
        (b"#!/bin/sh\n".repeat(10), "no Causeway wrote it"),
        (newer, "the state is of version 2, this Causeway reads version 1"),
        (good[..good.len() - 1].to_vec(), "bytes, its header says"),
        ([&good[..], &[0]].concat(), "bytes, its header says"),
        (vec![0; STREAM_MAX + 1], "more than 1048576 bytes"),
    ] {
        assert!(!load(&front, &stream), "{text}");
        bench.wait_error(0, text);
        assert_eq!(bench.wire.snapshot(PortId(0)), snapshot(3));
    }
    assert!(load(&front, &good), "the session goes on");
    assert!(front.check_device_state().is_err(), "it was asked already");
    bench.wait_error(0, "CHECK_DEVICE_STATE without a transfer");
}

#[test]
fn a_pipe_that_stays_open_is_given_up_and_nobody_waits_for_it() {
    let bench = Bench::new(SocketMode::Server);
    let front = agreed(&bench, 0);
    let (reader, writer) = pipe();
    let mut writer = File::from(writer);
    assert!(front.set_device_state_fd(LOAD, STOPPED, reader.into()).unwrap().is_none());
    writer.write_all(&encode(&snapshot(3))[..70]).unwrap();
    let began = Instant::now();
    let asked = std::thread::spawn(move || (front.check_device_state().is_ok(), front));
    // The other port's front end is served meanwhile.
    let other = agreed(&bench, 1);
    let served = began.elapsed();
    assert!(load(&other, &encode(&snapshot(2))));
    let (arrived, front) = asked.join().unwrap();
    assert!(!arrived);
    let waited = began.elapsed();
    assert!(waited >= Duration::from_secs(2) && served < waited, "{served:?}, {waited:?}");
    bench.wait_error(0, "the pipe was not closed 2 s after CHECK_DEVICE_STATE");
    // Its end of the pipe is closed by who read it.
    wait_for("the reader is gone", || writer.write_all(&[0; 64]).is_err());
    assert_eq!(bench.wire.snapshot(PortId(0)), PortSnapshot::default());
    assert!(load(&front, &encode(&snapshot(1))));
}

#[test]
fn a_front_end_that_leaves_takes_its_transfer_along() {
    let bench = Bench::new(SocketMode::Server);
    let _ = bench.wire.restore(PortId(0), &snapshot(80_000));
    for direction in [SAVE, LOAD] {
        let mut stream = UnixStream::connect(bench.socket(0)).unwrap();
        let front = agreed_on(stream.try_clone().unwrap());
        let (reader, writer) = pipe();
        let (theirs, mut ours) = match direction {
            SAVE => (writer, reader),
            LOAD => (reader.into(), File::from(writer)),
        };
        assert!(front.set_device_state_fd(direction, STOPPED, theirs).unwrap().is_none());
        if direction == LOAD {
            // It is asked for what cannot have arrived, and does not wait for the answer.
            stream.write_all(&Request::CheckDeviceState.write(false)).unwrap();
        }
        drop((front, stream));
        bench.wait(0, PortState::Waiting, "waiting for the front end to connect to");
        wait_for("the pipe is let go", || match direction {
            SAVE => ours.read(&mut [0; 4096]).unwrap() == 0,
            LOAD => ours.write_all(&[0]).is_err(),
        });
    }
}

#[test]
fn more_transfers_than_there_may_be_are_refused_and_running_rings_too() {
    let bench = Bench::new(SocketMode::Server);
    let mut guest = Guest::new(UnixStream::connect(bench.socket(0)).unwrap(), VERSION_1 | 1 << 30);
    guest.fill();
    guest.start();
    bench.wait(0, PortState::Up, "");
    assert!(guest.front.set_device_state_fd(SAVE, STOPPED, pipe().1).is_err());
    bench.wait_error(0, "SET_DEVICE_STATE_FD while ring 0 runs");
    for ring in 0..2 {
        let _ = guest.front.get_vring_base(ring).unwrap();
    }
    let _ = save(&guest.front);
    // One that is begun anew ends the one before.
    let mut held = Vec::new();
    for _ in 0..20 {
        let (reader, writer) = pipe();
        held.push(writer);
        wait_for("the threads before have ended", || {
            let again = reader.try_clone().unwrap();
            guest.front.set_device_state_fd(LOAD, STOPPED, again.into()).is_ok()
        });
    }
}
