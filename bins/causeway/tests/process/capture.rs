//! `ctl capture` on a switch that runs, read by tcpdump and tshark. Needs root, as taps do.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bed::{Bed, eventually};
use crate::namespace::Namespace;
use crate::taps::pair;

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

#[test]
fn large_frames_are_captured_whole() {
    const BYTES: usize = 3 << 20;
    let mut bed = Bed::new();
    let (left, right) = pair(&mut bed, &[]);
    for (namespace, name) in [(&left, "left"), (&right, "right")] {
        let _ = namespace.ip(&["link", "set", name, "mtu", "9000"]);
    }
    eventually("the ports know their MTU", || {
        ["left", "right"].iter().all(|port| bed.port(port)["interface"]["mtu"] == 9000)
    });
    acquainted(&left, &right);
    let file = bed.path("c.pcapng");
    // Once frames of the MTU, once what the stack leaves to be cut (TSO).
    let filter = "udp port 7 or tcp dst port 9";
    let child = begun(&bed, &["left", "-w", file.to_str().unwrap(), "--filter", filter]);
    let datagram: Vec<u8> = (0..8972).map(|i: usize| (i ^ (i >> 8)).to_le_bytes()[0]).collect();
    let (a, b) = (left.udp("10.9.0.1:7"), right.udp("10.9.0.2:7"));
    b.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = a.send_to(&datagram, "10.9.0.2:7").unwrap();
    let mut got = vec![0; 9000];
    assert_eq!(b.recv(&mut got).unwrap(), datagram.len());
    let listener = right.inside(|| std::net::TcpListener::bind("10.9.0.2:9").unwrap());
    std::thread::scope(|scope| {
        let _ = scope.spawn(|| {
            let mut stream = listener.accept().unwrap().0;
            stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
            let mut bytes = Vec::new();
            assert_eq!(std::io::Read::read_to_end(&mut stream, &mut bytes).unwrap(), BYTES);
        });
        let mut stream = left.inside(|| std::net::TcpStream::connect("10.9.0.2:9").unwrap());
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.write_all(&vec![7; BYTES]).unwrap();
    });
    interrupt(&child);
    let (_, summary) = ended(child);
    let bytes = std::fs::read(&file).unwrap();
    let fields = ["-r", "-", "-T", "fields", "-E", "separator=,", "-e", "frame.cap_len"];
    let more = ["-e", "frame.len", "-e", "udp.payload", "-e", "tcp.len"];
    let shown = read_by("tshark", &[&fields[..], &more[..]].concat(), &bytes);
    let rows: Vec<Vec<&str>> = shown.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(summary["captured"], rows.len(), "{summary}");
    let number = |text: &str| text.parse::<usize>().unwrap_or(0);
    assert!(rows.iter().all(|row| row[0] == row[1]), "a frame was cut: {shown}");
    let payload = hex(&datagram);
    assert!(rows.iter().any(|row| row[1] == "9014" && row[2] == payload));
    let largest = rows.iter().map(|row| number(row[1])).max().unwrap();
    assert!(largest > 9014, "the stack left nothing to be cut: {largest} bytes");
    let skipped = summary["skipped"].as_u64().unwrap();
    let captured: usize = rows.iter().map(|row| number(row[3])).sum();
    // All of it is there, or what is not was counted.
    assert!(captured >= BYTES || skipped > 0, "{captured} of {BYTES} bytes, {summary}");
}

/// What passed the port since it is there: into the switch, out of it.
fn passed(bed: &Bed, port: &str) -> (u64, u64) {
    let stats = bed.json(&["stats"]);
    let ports = stats["ports"].as_array().unwrap();
    let found = ports.iter().find(|one| one["name"] == port).unwrap();
    let queue = &found["queues"][0];
    (queue["rx_frames"].as_u64().unwrap(), queue["tx_frames"].as_u64().unwrap())
}

#[test]
fn a_pipe_brings_frames_at_once_and_ends_with_its_reader() {
    let mut bed = Bed::new();
    let (left, right) = pair(&mut bed, &[]);
    acquainted(&left, &right);
    let mut child = begun(&bed, &["left", "-w", "-", "--filter", "udp port 7"]);
    let mut reader = Command::new("tcpdump")
        .args(["-l", "-nn", "-r", "-"])
        .stdin(child.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap_or_else(|error| panic!("this test needs tcpdump: {error}"));
    let mut lines = BufReader::new(reader.stdout.take().unwrap()).lines();
    let sender = left.udp("10.9.0.1:7");
    for len in [10, 20, 30] {
        let _ = sender.send_to(&vec![1; len], "10.9.0.2:7").unwrap();
        let line = lines.next().unwrap().unwrap();
        let end = format!("10.9.0.1.7 > 10.9.0.2.7: UDP, length {len}");
        assert!(line.ends_with(&end), "{line}");
    }
    // The reader goes away while nothing passes.
    reader.kill().unwrap();
    let _ = reader.wait().unwrap();
    let (output, summary) = ended(child);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(summary["in"]["accepted"], 3);
    // Nothing is left of it in the switch.
    eventually("its thread ends", || {
        let tasks = std::fs::read_dir(format!("/proc/{}/task", bed.id())).unwrap();
        let name = |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm"));
        !tasks.flatten().any(|task| name(task).is_ok_and(|name| name.trim() == "capture"))
    });
}

#[test]
fn a_slow_reader_costs_frames_of_its_own_and_they_are_counted_exactly() {
    let mut bed = Bed::new();
    let (left, right) = pair(&mut bed, &[]);
    acquainted(&left, &right);
    let before = passed(&bed, "left");
    let slow = begun(&bed, &["left", "-w", "-"]);
    let file = bed.path("fast.pcapng");
    let fast = begun(&bed, &["left", "-w", file.to_str().unwrap(), "--snaplen", "60"]);
    let sender = left.udp("10.9.0.1:7");
    // More than the ring and all buffers on the way hold; nobody reads.
    for round in 1..=60 {
        // Fewer at a time than the interface's queue holds.
        for _ in 0..200 {
            let _ = sender.send_to(&[7; 1400], "10.9.0.2:7").unwrap();
        }
        eventually("all passed", || passed(&bed, "left").0 >= before.0 + 200 * round);
    }
    interrupt(&slow);
    interrupt(&fast);
    let (slow, summary) = ended(slow);
    let (_, fast_summary) = ended(fast);
    let after = passed(&bed, "left");
    for summary in [&summary, &fast_summary] {
        let of = |key: &str| summary["in"][key].as_u64().unwrap();
        assert_eq!(of("captured") + of("skipped"), of("accepted"), "{summary}");
        assert_eq!(of("seen"), of("accepted"));
        assert!(of("seen") >= 12_000 && of("seen") <= after.0 - before.0, "{summary}");
    }
    assert!(summary["skipped"].as_u64().unwrap() > 0, "{summary}");
    assert!(summary["captured"].as_u64().unwrap() > 0, "{summary}");
    let text = read_by("tshark", &["-r", "-", "-T", "fields", "-e", "frame.len"], &slow.stdout);
    assert_eq!(text.lines().count() as u64, summary["captured"].as_u64().unwrap());
    let bytes = std::fs::read(&file).unwrap();
    let text = read_by("tshark", &["-r", "-", "-T", "fields", "-e", "frame.cap_len"], &bytes);
    assert_eq!(text.lines().count() as u64, fast_summary["captured"].as_u64().unwrap());
    assert!(text.lines().all(|len| len == "60" || len.parse::<u32>().unwrap() < 60));
}

#[test]
fn dropped_frames_are_shown_with_their_reason_if_that_is_asked_for() {
    let namespace = Namespace::new();
    let spec = format!("{},trunk=5", namespace.tap("t0"));
    let bed = Bed::started(&["--port", &spec]);
    let _ = namespace.ip(&["address", "add", "10.9.0.1/24", "dev", "t0"]);
    let quiet = begun(&bed, &["t0", "-w", "-"]);
    let child = begun(&bed, &["t0", "--drops", "-w", "-", "--count", "3", "--filter", "arp"]);
    let sender = namespace.udp("10.9.0.1:7");
    eventually("three frames are captured", || {
        let _ = sender.send_to(b"x", "10.9.0.2:7").unwrap();
        bed.log().contains("capture ended")
    });
    let (output, summary) = ended(child);
    assert_eq!((output.status.code(), &summary["captured"]), (Some(0), &3.into()));
    let lines = tshark(&output.stdout);
    assert_eq!(lines.len(), 3);
    let end = "dropped: vlan_untagged: An untagged frame on a port that takes tagged frames only.";
    assert!(lines.iter().all(|line| line.ends_with(end)), "{lines:?}");
    interrupt(&quiet);
    let (output, summary) = ended(quiet);
    assert_eq!((tshark(&output.stdout).len(), &summary["in"]["seen"]), (0, &0.into()));
    // The same without a file.
    let child = begun(&bed, &["t0", "--drops", "--count", "1", "--filter", "arp"]);
    let before = bed.log().matches("capture ended").count();
    eventually("a frame is shown", || {
        let _ = sender.send_to(b"x", "10.9.0.2:7").unwrap();
        bed.log().matches("capture ended").count() > before
    });
    let (output, _) = ended(child);
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&line["direction"], &line["ether_type"]), (&"in".into(), &0x0806.into()));
    assert!(line["dropped"].as_str().unwrap().starts_with("vlan_untagged: An untagged"), "{line}");
}

#[test]
fn a_port_that_is_removed_ends_its_captures_and_a_lost_interface_does_not() {
    let mut bed = Bed::new();
    let (left, right) = pair(&mut bed, &[]);
    acquainted(&left, &right);
    let kept = begun(&bed, &["right", "-w", "-", "--filter", "udp port 7"]);
    let file = bed.path("c.pcapng");
    let child = begun(&bed, &["left", "-w", file.to_str().unwrap(), "--filter", "udp port 7"]);
    let sender = left.udp("10.9.0.1:7");
    let before = passed(&bed, "right").1;
    let _ = sender.send_to(b"there", "10.9.0.2:7").unwrap();
    eventually("the frame passes", || passed(&bed, "right").1 > before);
    let _ = bed.ctl(&["port", "del", "left"]);
    let (output, summary) = ended(child);
    assert_eq!(output.status.code(), Some(1));
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("causeway: the capture ended: port left was removed"), "{error}");
    assert_eq!(summary["reason"], "port left was removed");
    assert_eq!(tshark(&std::fs::read(&file).unwrap()).len(), 1);
    assert_eq!(bed.end(Signal::TERM).code(), Some(0));
    let (output, summary) = ended(kept);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!((&summary["out"]["captured"], tshark(&output.stdout).len()), (&1.into(), 1));
    assert_eq!(summary["reason"], "port right was removed");
}

#[test]
fn wrong_use_says_what_would_be_right() {
    let namespace = Namespace::new();
    let bed = Bed::started(&["--port", &namespace.tap("t0")]);
    let wrong = |arguments: &[&str], code: i32, text: &str| {
        let (got, out, error) = bed.ctl_full(&[&["capture"], arguments].concat());
        assert_eq!((got, out.as_str()), (code, ""), "{error}");
        assert!(error.contains(text), "{error}");
    };
    wrong(&["t1"], 1, "there is no port \"t1\"; ports are: t0");
    let unknown = "filter \"arp and hots\": \"hots\" is not understood (word 3, at character 9): ";
    wrong(&["t0", "--filter", "arp and hots"], 2, unknown);
    wrong(&["t0", "--count", "0"], 2, "0 is not in 1..");
    wrong(&["t0", "--snaplen", "0"], 2, "snaplen is 1 to 65663 bytes, not 0");
    wrong(&["t0", "-w", "no/such/c.pcapng"], 1, "cannot write to no/such/c.pcapng: No such file");
    let full = "cannot write to /dev/full: No space left on device";
    wrong(&["t0", "-w", "/dev/full"], 1, full);
    let many: Vec<_> = (0..16).map(|_| begun(&bed, &["t0", "-w", "-"])).collect();
    wrong(&["t0"], 1, "16 captures run already");
    assert_eq!(bed.json(&["version"])["pid"], bed.id());
    for child in many {
        interrupt(&child);
        let (output, _) = ended(child);
        assert!(output.status.success());
    }
}
