//! Interfaces behind ports, with traffic. Needs root; says so if it is missing.

use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::bed::{Bed, eventually, ledger};
use crate::namespace::Namespace;

/// Datagrams on their way at once, so that no socket buffer overflows.
const WINDOW: u64 = 64;

/// Two namespaces with a tap each on one switch: 10.9.0.1 and 10.9.0.2.
pub(crate) fn pair(bed: &mut Bed, more: &[&str]) -> (Namespace, Namespace) {
    let (left, right) = (Namespace::new(), Namespace::new());
    let (a, b) = (left.tap("left"), right.tap("right"));
    let mut arguments = vec!["--port", &a, "--port", &b];
    arguments.extend_from_slice(more);
    bed.start(&arguments);
    let _ = left.ip(&["address", "add", "10.9.0.1/24", "dev", "left"]);
    let _ = right.ip(&["address", "add", "10.9.0.2/24", "dev", "right"]);
    (left, right)
}

#[test]
fn ports_that_stay_lose_no_frame_while_others_come_and_go() {
    let mut bed = Bed::new();
    std::fs::write(bed.path("c.toml"), "").unwrap();
    let (left, right) = pair(&mut bed, &["--config", "c.toml"]);
    let (sender, receiver) = (left.udp("10.9.0.1:7"), right.udp("10.9.0.2:7"));
    receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let (stop, next) = (AtomicBool::new(false), AtomicU64::new(0));
    let count = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let mut number = 0u64;
            while !stop.load(Ordering::Relaxed) {
                let received = next.load(Ordering::Relaxed);
                // Those that wait for the neighbour's address are overtaken by those that do not.
                if number - received < if received == 0 { 1 } else { WINDOW } {
                    let _ = sender.send_to(&number.to_le_bytes(), "10.9.0.2:7").unwrap();
                    number += 1;
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            number
        });
        let receiving = scope.spawn(|| {
            let mut bytes = [0; 8];
            loop {
                if let Err(error) = receiver.recv(&mut bytes) {
                    assert_eq!(error.kind(), ErrorKind::Interrupted, "a frame was lost");
                    continue;
                }
                let number = u64::from_le_bytes(bytes);
                let expected = next.load(Ordering::Relaxed);
                if number == u64::MAX {
                    return expected;
                }
                assert_eq!(number, expected, "a frame was lost or came twice");
                next.store(expected + 1, Ordering::Relaxed);
            }
        });
        for round in 0..5 {
            let text = format!(
                "[[port]]\nkind = \"vhost-user\"\nname = \"g\"\nsocket = \"g{round}.sock\"\n"
            );
            std::fs::write(bed.path("c.toml"), text).unwrap();
            let _ = bed.ctl(&["reload"]);
            let tap = format!("tap:name=more,ifname=more,netns={}", left.name());
            let _ = bed.ctl(&["port", "add", &tap]);
            std::thread::sleep(Duration::from_millis(50));
            let _ = bed.ctl(&["port", "del", "more"]);
        }
        stop.store(true, Ordering::Relaxed);
        let sent = sending.join().unwrap();
        let _ = sender.send_to(&u64::MAX.to_le_bytes(), "10.9.0.2:7").unwrap();
        assert_eq!(receiving.join().unwrap(), sent);
        sent
    });
    assert!(count > 100);
    // Ports that are gone have taken part too.
    eventually("the ledger adds up", || {
        let (came, went, held) = ledger(&bed);
        came == went && held == 0 && came >= count
    });
}

/// Its guest has moved to another host, which is behind a tap here.
#[test]
fn a_guest_that_is_elsewhere_is_there_for_a_successor_too() {
    let mut bed = Bed::new();
    let away = "vhost-user:name=away,socket=away.sock,mac=02:00:00:00:00:05";
    let (left, right) = pair(&mut bed, &["--port", away]);
    let (sender, _receiver) = (left.udp("10.9.0.1:7"), right.udp("10.9.0.2:7"));
    let is_left = |bed: &Bed| {
        let known = bed.json(&["fdb"]);
        let of_it = |entry: &&serde_json::Value| entry["mac"] == "02:00:00:00:00:05";
        let entry = known["entries"].as_array().unwrap().iter().find(of_it).unwrap();
        entry["port"] == "left" && entry["static"] == true
    };
    assert!(!is_left(&bed));
    // From now on its kernel may send something by itself.
    let _ = left.ip(&["link", "set", "left", "address", "02:00:00:00:00:05"]);
    eventually("it was seen", || {
        let _ = sender.send_to(&[0], "10.9.0.2:7");
        is_left(&bed)
    });
    drop(sender);
    let _ = left.ip(&["link", "set", "left", "down"]);
    bed.take_over(&[]);
    assert!(is_left(&bed));
}

#[test]
fn large_and_small_frames_reach_the_other_side() {
    let mut bed = Bed::new();
    let (left, right) = pair(&mut bed, &[]);
    for (namespace, name) in [(&left, "left"), (&right, "right")] {
        let _ = namespace.ip(&["link", "set", name, "mtu", "9000"]);
    }
    let (sender, receiver) = (left.udp("10.9.0.1:7"), right.udp("10.9.0.2:7"));
    receiver.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let mut got = [0; 9000];
    eventually("the switch knows the MTU", || {
        ["left", "right"].iter().all(|port| bed.port(port)["interface"]["mtu"] == 9000)
    });
    for len in [0usize, 1, 100, 1472, 8972] {
        let sent: Vec<u8> = (0..len).map(|i| i.to_le_bytes()[0]).collect();
        let _ = sender.send_to(&sent, "10.9.0.2:7").unwrap();
        let count = receiver.recv(&mut got).unwrap();
        assert_eq!(&got[..count], &sent[..]);
    }
}

#[test]
fn a_port_takes_little_memory_even_after_the_largest_frames() {
    let mut bed = Bed::new();
    let (left, _right) = pair(&mut bed, &[]);
    let _ = left.ip(&["link", "set", "left", "mtu", "65000"]);
    let peer = "02:00:00:00:00:02";
    let _ = left.ip(&["neigh", "replace", "10.9.0.2", "lladdr", peer, "dev", "left"]);
    let memory = || {
        let status = std::fs::read_to_string(format!("/proc/{}/status", bed.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap()
    };
    let before = memory();
    let read = |bed: &Bed| ledger(bed).0;
    let frames = read(&bed);
    // All frames of a burst wait at once.
    bed.signal(rustix::process::Signal::STOP);
    for port in 2000..2070 {
        let sender = left.udp(&format!("10.9.0.1:{port}"));
        let _ = sender.send_to(&[1; 60_000], "10.9.0.2:7").unwrap();
    }
    bed.signal(rustix::process::Signal::CONT);
    eventually("the burst was taken", || read(&bed) >= frames + 70);
    let grown = memory().saturating_sub(before);
    assert!(grown < 2048, "{grown} KiB more");
}

#[test]
fn an_interface_that_goes_takes_its_port_down_until_it_returns() {
    let namespace = Namespace::new();
    let _ = namespace.ip(&["tuntap", "add", "t0", "mode", "tap"]);
    let bed = Bed::started(&["--port", &namespace.tap("t0")]);
    let _ = bed.wait_state("t0", "up");
    let _ = namespace.ip(&["link", "set", "t0", "down"]);
    assert_eq!(bed.wait_state("t0", "down")["reason"], "interface t0 is set down");
    let _ = namespace.ip(&["link", "set", "t0", "up"]);
    let _ = bed.wait_state("t0", "up");
    let _ = namespace.ip(&["link", "del", "t0"]);
    let port = bed.wait_state("t0", "down");
    assert!(port["reason"].as_str().unwrap().starts_with("interface t0 is lost"), "{port}");
    let _ = namespace.ip(&["tuntap", "add", "t0", "mode", "tap"]);
    let port = bed.wait_state("t0", "up");
    assert!(port["last_error"]["text"].as_str().unwrap().contains("t0"), "{port}");
}

#[test]
fn a_port_that_may_wait_comes_when_its_namespace_does() {
    let name = Namespace::unused_name();
    let spec = format!("tap:name=t0,ifname=t0,netns={name},wait=on");
    let bed = Bed::started(&["--port", &spec]);
    let port = bed.port("t0");
    assert_eq!(port["state"], "waiting");
    assert!(port["reason"].as_str().unwrap().contains(&name), "{port}");
    let namespace = Namespace::named(name);
    let _ = bed.wait_state("t0", "up");
    assert!(namespace.has("t0"));
    let _ = bed.ctl(&["port", "del", "t0"]);
    assert!(!namespace.has("t0"));
}

#[test]
fn a_stop_leaves_no_interface_behind() {
    let namespace = Namespace::new();
    let mut bed = Bed::started(&["--port", &namespace.tap("t0")]);
    assert!(namespace.has("t0"));
    assert_eq!(bed.end(rustix::process::Signal::TERM).code(), Some(0));
    assert!(!namespace.has("t0"));
}

/// The sandbox hides what is behind a process's links in /proc: that is no reason to let go.
#[test]
fn a_namespace_of_a_process_is_kept_in_the_sandbox_while_the_process_lives() {
    let namespace = Namespace::new();
    let mut process = std::process::Command::new("ip")
        .args(["netns", "exec", namespace.name(), "sleep", "30"])
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    let path = format!("/proc/{}/ns/net", process.id());
    let ours = std::fs::read_link("/proc/self/ns/net").unwrap();
    eventually("the process is in the namespace", || {
        std::fs::read_link(&path).is_ok_and(|other| other != ours)
    });
    let bed = Bed::started(&["--port", &format!("tap:name=t,ifname=t0,netns={path}")]);
    let _ = bed.wait_state("t", "up");
    for mtu in [1400, 1300] {
        // Each change makes the switch look at the interface, and at the name of its namespace.
        let _ = namespace.ip(&["link", "set", "t0", "mtu", &mtu.to_string()]);
        eventually("the MTU is seen", || bed.port("t")["interface"]["mtu"] == mtu);
        assert_eq!(bed.port("t")["state"], "up", "{}", bed.log());
    }
    process.kill().unwrap();
    let _ = process.wait().unwrap();
    let _ = namespace.ip(&["link", "set", "t0", "mtu", "1200"]);
    let text = bed.wait_state("t", "down").to_string();
    assert!(text.contains("its network namespace was removed"), "{text}");
}

/// It is opened in mounts of its own, which the sandbox of a switch without one does not have.
#[test]
fn a_macvtap_that_comes_after_the_start_is_refused_in_words_that_help() {
    let namespace = Namespace::new();
    let kinds = ["--allow-kind", "tap", "--allow-kind", "netns"];
    let bed = Bed::started(&kinds);
    let _ = namespace.ip(&["link", "add", "below0", "type", "veth", "peer", "name", "p0"]);
    let _ = namespace.ip(&["link", "add", "mv0", "link", "below0", "type", "macvtap"]);
    let spec = format!("tap:name=m,ifname=mv0,netns={}", namespace.name());
    let (code, _, error) = bed.ctl_full(&["port", "add", &spec]);
    assert_eq!(code, 1);
    assert!(error.contains("CAP_MKNOD") && !error.contains("CAP_NET_ADMIN"), "{error}");
    assert!(error.contains("let it be there at the start, or use `--sandbox off`"), "{error}");
    // As it says.
    let _ = namespace.ip(&["link", "set", "below0", "up"]);
    let _ = namespace.ip(&["link", "set", "p0", "up"]);
    for late in [false, true] {
        let start = if late { ["--sandbox", "off"] } else { ["--port", &spec] };
        let bed = Bed::started(&start);
        if late {
            let _ = bed.ctl(&["port", "add", &spec]);
        }
        let _ = bed.wait_state("m", "up");
    }
}
