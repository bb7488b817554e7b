//! What a switch knows of a guest goes with it to another switch (`DEVICE_STATE`).

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;

use serde_json::{Value, json};
use testkit::FrontEnd;
use testkit::request::{CHECK_DEVICE_STATE, SET_DEVICE_STATE_FD};

use crate::bed::{Bed, eventually, ledger};
use crate::driver::{Driver, PACKED, SPLIT};

const SAVE: [u8; 8] = [0; 8];
const LOAD: [u8; 8] = [1, 0, 0, 0, 0, 0, 0, 0];
/// Success, and no fd of the back end's.
const DONE: u64 = 0x100;

fn number(reply: &[u8]) -> u64 {
    u64::from_le_bytes(reply.try_into().unwrap())
}

fn save(front: &mut FrontEnd) -> Vec<u8> {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    front.send(SET_DEVICE_STATE_FD, &SAVE, &[writer.as_fd()]).unwrap();
    assert_eq!(number(&front.reply(SET_DEVICE_STATE_FD).unwrap()), DONE);
    drop(writer);
    let mut stream = Vec::new();
    let _ = File::from(reader).read_to_end(&mut stream).unwrap();
    assert_eq!(number(&front.ask(CHECK_DEVICE_STATE, &[]).unwrap()), 0);
    stream
}

/// Whether the switch took it.
fn load(front: &mut FrontEnd, stream: &[u8]) -> bool {
    let (reader, writer) = rustix::pipe::pipe().unwrap();
    front.send(SET_DEVICE_STATE_FD, &LOAD, &[reader.as_fd()]).unwrap();
    assert_eq!(number(&front.reply(SET_DEVICE_STATE_FD).unwrap()), DONE);
    drop(reader);
    File::from(writer).write_all(stream).unwrap();
    number(&front.ask(CHECK_DEVICE_STATE, &[]).unwrap()) == 0
}

fn bed() -> Bed {
    let port = |name: &str| format!("vhost-user:name={name},socket={name}.sock");
    let ports = ["a", "b", "c"].map(port);
    let arguments: Vec<&str> = ports.iter().flat_map(|port| ["--port", port]).collect();
    Bed::started(&arguments)
}

fn stations(bed: &Bed) -> Vec<(Value, Value)> {
    let entries = bed.json(&["fdb"])["entries"].clone();
    let place = |entry: &Value| (entry["mac"].clone(), entry["port"].clone());
    entries.as_array().unwrap().iter().map(place).collect()
}

fn of_port(bed: &Bed, name: &str) -> Value {
    let stats = bed.json(&["stats"]);
    let ports = stats["ports"].as_array().unwrap();
    ports.iter().find(|port| port["name"] == name).unwrap().clone()
}

#[test]
fn the_switch_that_a_guest_moves_to_knows_it_at_once() {
    for features in [SPLIT, PACKED] {
        let (before, after) = (bed(), bed());
        let mut moved = Driver::join(&before, "a.sock", features, 1);
        let _ = before.wait_state("a", "up");
        assert!(moved.send(0xff, 0));
        let place = vec![(json!("02:00:00:00:00:01"), json!("a"))];
        eventually("it is known where it was", || stations(&before) == place);
        let state = save(moved.stop());
        drop(moved);

        let mut known = Vec::new();
        let mut moved = Driver::join_after(&after, "b.sock", (features, 1), |front| {
            assert!(load(front, &state));
            known = stations(&after);
        });
        // Before it sent anything, and on the port where it is now.
        assert_eq!(known, [(json!("02:00:00:00:00:01"), json!("b"))]);
        let _ = after.wait_state("b", "up");
        let mut others = ["a", "c"].map(|name| {
            let driver = Driver::join(&after, &format!("{name}.sock"), features, 7);
            let _ = after.wait_state(name, "up");
            driver
        });
        let [from, bystander] = &mut others;
        assert!(from.send(1, 5));
        eventually("the frame arrives", || moved.receive() == Some((5, true)));
        assert_eq!(bystander.receive(), None);
        assert_eq!(after.json(&["stats"])["switch"]["flood_copies"], 0, "nothing was flooded");

        // What was counted before is told, and counted nowhere.
        let elsewhere = &of_port(&after, "b")["elsewhere"];
        assert_eq!((&elsewhere["rx_frames"], &elsewhere["tx_frames"]), (&json!(1), &json!(0)));
        assert_eq!(of_port(&after, "a")["elsewhere"], Value::Null);
        eventually("the ledger adds up", || {
            let (came, went, held) = ledger(&after);
            came == went && held == 0
        });
        let both = "goes on with its state port=b stations=1 refused=0 flows=0";
        assert!(after.log().contains(both), "{}", after.log());
    }
}

#[test]
fn a_state_that_no_switch_wrote_is_refused_with_a_line_in_the_log() {
    let bed = bed();
    let (mut reply, mut again) = (true, false);
    let _guest = Driver::join_after(&bed, "a.sock", (SPLIT, 1), |front| {
        reply = load(front, b"somebody else's");
        let state = save(front);
        again = load(front, &state);
    });
    assert!(!reply && again);
    assert!(bed.log().contains("the state has 15 bytes, its header alone has 64"), "{}", bed.log());
    // The guest is served all the same.
    let _ = bed.wait_state("a", "up");
}

#[test]
fn who_takes_a_switch_over_knows_what_was_counted_elsewhere() {
    let mut bed = Bed::started(&["--port", "vhost-user:name=a,socket=a.sock"]);
    let mut totals = b"CSWYPORT\x01\0\0\0\x40\0\0\0\0\0\0\0\0\0\0\0".to_vec();
    totals.extend([7u64, 700, 9, 900, 1].iter().flat_map(|number| number.to_le_bytes()));
    let _guest = Driver::join_after(&bed, "a.sock", (SPLIT, 1), |front| {
        assert!(load(front, &totals));
    });
    let _ = bed.wait_state("a", "up");
    let told = json!({
        "rx_frames": 7, "rx_bytes": 700, "tx_frames": 9, "tx_bytes": 900, "drops": 1
    });
    assert_eq!(of_port(&bed, "a")["elsewhere"], told);
    bed.take_over(&["--port", "vhost-user:name=a,socket=a.sock"]);
    assert_eq!(of_port(&bed, "a")["elsewhere"], told);
}
