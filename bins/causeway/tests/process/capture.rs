//! `ctl capture` on a switch that runs, read by tcpdump and tshark. Needs root, as taps do.

use std::io::Write;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bed::{Bed, eventually};
use crate::taps::{Namespace, pair};

/// A capture that has begun: it is running when the switch says so.
fn begun(bed: &Bed, arguments: &[&str]) -> Child {
    let before = bed.log().matches("capture began").count();
    let child = bed.spawn_ctl(&[&["--json", "capture"], arguments].concat());
    eventually("the capture begins", || bed.log().matches("capture began").count() > before);
    child
}

fn interrupt(child: &Child) {
    kill_process(Pid::from_raw(child.id().try_into().unwrap()).unwrap(), Signal::INT).unwrap();
}

/// Waits for the end, and returns what was captured and the summary.
fn ended(child: Child) -> (Output, Value) {
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8(output.stderr.clone()).unwrap();
    let summary = error.lines().find(|line| line.starts_with('{'));
    let summary = summary.unwrap_or_else(|| panic!("no summary: {error}"));
    let value = serde_json::from_str(summary).unwrap();
    (output, value)
}

/// Both talk to each other once, so that neither has to ask for the other's address.
fn acquainted(left: &Namespace, right: &Namespace) {
    let (a, b) = (left.udp("10.9.0.1:9"), right.udp("10.9.0.2:9"));
    b.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    a.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut got = [0; 16];
    let _ = a.send_to(b"hello", "10.9.0.2:9").unwrap();
    let _ = b.recv(&mut got).unwrap();
    let _ = b.send_to(b"hello", "10.9.0.1:9").unwrap();
    let _ = a.recv(&mut got).unwrap();
}

/// What a reader of capture files makes of one. These readers belong to the test machine.
fn read_by(program: &str, arguments: &[&str], file: &[u8]) -> String {
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("this test needs {program}: {error}"));
    let mut input = child.stdin.take().unwrap();
    let file = file.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&file));
    let output = child.wait_with_output().unwrap();
    let _ = writer.join().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

const FIELDS: [&str; 15] = [
    "-r",
    "-",
    "-T",
    "fields",
    "-E",
    "separator=,",
    "-e",
    "frame.interface_id",
    "-e",
    "frame.packet_flags_direction",
    "-e",
    "frame.len",
    "-e",
    "udp.payload",
    "-e",
];

fn tshark(file: &[u8]) -> Vec<String> {
    let text = read_by("tshark", &[&FIELDS[..], &["frame.comment"]].concat(), file);
    text.lines().map(str::to_owned).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_file_holds_both_directions_with_their_contents() {
    let mut bed = Bed::new();
    let (left, right) = pair(&mut bed, &[]);
    acquainted(&left, &right);
    let file = bed.path("c.pcapng");
    let arguments = ["left", "-w", file.to_str().unwrap(), "--filter", "udp port 7"];
    let child = begun(&bed, &arguments);
    let (a, b) = (left.udp("10.9.0.1:7"), right.udp("10.9.0.2:7"));
    b.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    a.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut expected = Vec::new();
    let mut got = [0; 2000];
    for len in [18usize, 100, 1400] {
        let there: Vec<u8> = (0..len).map(|i| i.to_le_bytes()[0]).collect();
        let back: Vec<u8> = there.iter().map(|byte| !byte).collect();
        let _ = a.send_to(&there, "10.9.0.2:7").unwrap();
        let count = b.recv(&mut got).unwrap();
        assert_eq!(&got[..count], &there[..]);
        let _ = b.send_to(&back, "10.9.0.1:7").unwrap();
        let count = a.recv(&mut got).unwrap();
        assert_eq!(&got[..count], &back[..]);
        expected.push(format!("0,1,{},{},", len + 42, hex(&there)));
        expected.push(format!("1,2,{},{},", len + 42, hex(&back)));
    }
    interrupt(&child);
    let (output, summary) = ended(child);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!((&summary["captured"], &summary["skipped"]), (&6.into(), &0.into()), "{summary}");
    assert_eq!(summary["in"]["captured"], 3);
    assert_eq!(summary["reason"], Value::Null);
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!(
        tshark(&bytes)
            .iter()
            .map(|l| l.replace("0x00000001", "1").replace("0x00000002", "2"))
            .collect::<Vec<_>>(),
        expected
    );
    let shown = read_by("tcpdump", &["-nn", "-r", "-"], &bytes);
    assert_eq!(shown.lines().count(), 6, "{shown}");
    assert!(shown.lines().next().unwrap().contains("10.9.0.1.7 > 10.9.0.2.7: UDP, length 18"));
}
