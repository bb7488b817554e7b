//! What `top` and the metrics say is what happened, and scrapers of every kind are served.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::bed::{Bed, causeway, eventually};
use crate::guest::{Guest, SIZE};

const GUESTS: [&str; 4] =
    ["--port", "vhost-user:name=g0,socket=g0.sock", "--port", "vhost-user:name=g1,socket=g1.sock"];

/// A switch with two guests.
fn started(more: &[&str]) -> (Bed, Guest, Guest) {
    let bed = Bed::started(&[&GUESTS, more].concat());
    let guests = (Guest::join(&bed, "g0.sock", 1), Guest::join(&bed, "g1.sock", 2));
    for name in ["g0", "g1"] {
        let _ = bed.wait_state(name, "up");
    }
    (bed, guests.0, guests.1)
}

/// A port of `stats` or `top`.
fn port<'a>(view: &'a Value, name: &str) -> &'a Value {
    let ports = view["ports"].as_array().unwrap();
    ports.iter().find(|port| port["name"] == name).unwrap()
}

fn sum(list: &Value, key: &str) -> u64 {
    list.as_array().unwrap().iter().map(|item| item[key].as_u64().unwrap()).sum()
}

/// The counter `key` of all queues of all ports.
fn all_queues(stats: &Value, key: &str) -> u64 {
    stats["ports"].as_array().unwrap().iter().map(|port| sum(&port["queues"], key)).sum()
}

fn batches(worker: &Value) -> u64 {
    worker["batches"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).sum()
}

/// Whether a view's counters of the same frames are near each other: they are read one after the
/// other, while frames move.
fn is_even(view: &Value) -> bool {
    let (from, to) = (port(view, "g0"), port(view, "g1"));
    let frames = from["rx_frames"].as_u64().unwrap();
    let no_buffer = to["drops"]["no_buffer"].as_u64().unwrap_or(0);
    let ended = no_buffer + to["tx_frames"].as_u64().unwrap();
    let near = |other: u64| frames.abs_diff(other) <= 320;
    near(ended) && near(sum(&view["workers"], "frames"))
}

/// The counters once nothing moves.
fn rested(bed: &Bed) -> Value {
    let mut before = Value::Null;
    let mut stats = Value::Null;
    eventually("the counters are at rest", || {
        (before, stats) = (stats.take(), bed.json(&["stats"]));
        let same =
            |key: &str| !before.is_null() && all_queues(&before, key) == all_queues(&stats, key);
        ["rx_frames", "tx_frames", "rx_calls", "tx_calls_suppressed"].into_iter().all(same)
            && sum(&before["workers"], "bursts") == sum(&stats["workers"], "bursts")
    });
    stats
}

#[test]
fn workers_and_queues_count_the_same_and_what_guests_see() {
    let (bed, mut g0, g1) = started(&[]);
    let before = rested(&bed);
    let _ = (g0.calls(), g1.calls());
    for _ in 0..5 {
        g0.send(7);
        // Time enough to fall asleep.
        std::thread::sleep(Duration::from_millis(20));
    }
    let stats = rested(&bed);
    let queue = |name: &str, key: &str| {
        let of = |stats: &Value| port(stats, name)["queues"][0][key].as_u64().unwrap();
        of(&stats) - of(&before)
    };
    assert_eq!((queue("g0", "rx_frames"), queue("g1", "tx_frames")), (35, 35));
    // A kick that comes while the queue is hot anyhow wakes nobody, or wakes once more later.
    assert!((3..=7).contains(&queue("g0", "kicks")), "{stats}");
    // A worker that looks early splits a burst; each part of it is called for.
    let sent = (queue("g0", "rx_calls"), queue("g1", "tx_calls"));
    assert!(sent.0 >= 5 && sent.1 >= 5, "{sent:?}");
    assert_eq!((g0.calls()[1], g1.calls()[0]), sent);
    assert_eq!((queue("g0", "tx_calls"), queue("g1", "rx_calls")), (0, 0));

    g0.want_calls(false);
    g1.want_calls(false);
    g0.send(7);
    let quiet = rested(&bed);
    let queue = |name: &str, key: &str| port(&quiet, name)["queues"][0][key].as_u64().unwrap();
    assert_eq!((g0.calls(), g1.calls()), ([0, 0], [0, 0]));
    assert!(queue("g0", "rx_calls_suppressed") > 0 && queue("g1", "tx_calls_suppressed") > 0);

    let workers = &quiet["workers"];
    assert_eq!(sum(workers, "frames"), all_queues(&quiet, "rx_frames"));
    assert_eq!(sum(workers, "kicks"), all_queues(&quiet, "kicks"));
    let calls = all_queues(&quiet, "rx_calls") + all_queues(&quiet, "tx_calls");
    assert_eq!(sum(workers, "calls"), calls);
    let suppressed =
        all_queues(&quiet, "rx_calls_suppressed") + all_queues(&quiet, "tx_calls_suppressed");
    assert_eq!(sum(workers, "calls_suppressed"), suppressed);
    for worker in workers.as_array().unwrap() {
        assert_eq!(batches(worker), worker["bursts"].as_u64().unwrap());
        assert_eq!(worker["frames"] == 0, worker["busy_ns"] == 0, "{worker}");
    }
    assert!(sum(workers, "sleeps") >= 3);
}

#[test]
fn one_view_for_programs_adds_up_with_the_counters() {
    let (bed, mut g0, _g1) = started(&[]);
    let before = rested(&bed);
    let stop = AtomicBool::new(false);
    let view = std::thread::scope(|scope| {
        let _ = scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                g0.send(SIZE);
            }
        });
        let look = || bed.json(&["top", "--once", "--interval", "0.5"]);
        let mut view = look();
        // More frames move between two reads when the reader has to wait there, and few when the
        // switch has to.
        for _ in 1..5 {
            if is_even(&view) && port(&view, "g1")["drops"]["no_buffer"].is_u64() {
                break;
            }
            view = look();
        }
        stop.store(true, Ordering::Relaxed);
        view
    });
    let stats = rested(&bed);
    let interval = view["interval_s"].as_f64().unwrap();
    assert!((0.5..5.0).contains(&interval), "{interval}");
    let moved = |key: &str| all_queues(&stats, key) - all_queues(&before, key);
    let (from, to) = (port(&view, "g0"), port(&view, "g1"));
    let frames = from["rx_frames"].as_u64().unwrap();
    assert!(frames > 0 && frames <= moved("rx_frames"), "{view}");
    let per_s = from["rx_frames_per_s"].as_f64().unwrap();
    assert!((per_s * interval - frames as f64).abs() < 0.01, "{view}");
    let bits = from["rx_bits_per_s"].as_f64().unwrap();
    assert!((bits - per_s * 60.0 * 8.0).abs() < 1.0, "{view}");
    // The buffers of the other guest are soon used up.
    let no_buffer = to["drops"]["no_buffer"].as_u64().unwrap();
    assert!(no_buffer > 0 && to["drops_per_s"].as_f64().unwrap() > 0.0, "{view}");
    assert!(is_even(&view), "{view}");
    for worker in view["workers"].as_array().unwrap() {
        assert_eq!(batches(worker), worker["bursts"].as_u64().unwrap());
        let idle = worker["frames"] == 0;
        assert_eq!(idle, worker["ns_per_frame"].is_null(), "{worker}");
        let busy = worker["busy_ratio"].as_f64().unwrap();
        assert!((0.0..=1.0).contains(&busy) && idle == (busy == 0.0), "{worker}");
    }
    let quiet = bed.json(&["top", "--once", "--interval", "0.1"]);
    assert_eq!((sum(&quiet["workers"], "frames"), sum(&quiet["ports"], "rx_frames")), (0, 0));
    assert_eq!(port(&quiet, "g1")["drops"], serde_json::json!({}));
}

#[test]
fn views_follow_each_other_until_a_signal_or_a_reader_that_goes() {
    let bed = Bed::started(&GUESTS);
    let control = bed.control();
    let top = |json: &[&str]| {
        Command::new(env!("CARGO_BIN_EXE_causeway"))
            .args(["ctl", "--control", control.to_str().unwrap(), "top", "--interval", "0.1"])
            .args(json)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    for signal in [Signal::INT, Signal::TERM, Signal::HUP] {
        let mut child = top(&["--json"]);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for _ in 0..3 {
            let view: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
            assert!(view["interval_s"].as_f64().unwrap() > 0.05, "{view}");
        }
        let id = Pid::from_raw(child.id().try_into().unwrap()).unwrap();
        kill_process(id, signal).unwrap();
        drop(lines);
        let output = child.wait_with_output().unwrap();
        assert_eq!((output.status.code(), output.stderr.as_slice()), (Some(0), &[][..]));
    }
    // Tables for people, without control characters when that is no terminal.
    let mut child = top(&[]);
    let mut start = [0; 40];
    child.stdout.as_mut().unwrap().read_exact(&mut start).unwrap();
    assert!(start.starts_with(b"0 frames/s over 0.1 s\n\nWORKER"), "{start:?}");
    drop(child.stdout.take());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(0));
    // The switch goes away.
    let mut child = top(&["--json"]);
    let mut line = String::new();
    let _ = BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    drop(bed);
    let output = child.wait_with_output().unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
}

/// Every sample of a text: name with labels, and value.
fn samples(text: &str) -> Vec<(String, f64)> {
    let mut samples = Vec::new();
    for line in text.lines() {
        if let Some(comment) = line.strip_prefix("# ") {
            assert!(comment.starts_with("HELP causeway_") || comment.starts_with("TYPE causeway_"));
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let plain = |c: char| c.is_ascii_lowercase() || c == '_';
        assert!(name.starts_with("causeway_") && name.chars().all(plain), "{line}");
        let labels = labels.strip_suffix('}').unwrap();
        for label in labels.split(',').filter(|label| !label.is_empty()) {
            let (key, value) = label.split_once('=').unwrap();
            assert!(key.chars().all(plain), "{line}");
            let inner = value.strip_prefix('"').and_then(|v| v.strip_suffix('"')).unwrap();
            assert!(!inner.contains(['"', '\\']), "{line}");
        }
        samples.push((series.to_owned(), value.parse().unwrap()));
    }
    samples
}

fn value(samples: &[(String, f64)], series: &str) -> f64 {
    let found = samples.iter().find(|(name, _)| name == series);
    found.unwrap_or_else(|| panic!("no {series}")).1
}

#[test]
fn metrics_say_what_stats_say() {
    let (bed, mut g0, _g1) = started(&["--metrics", "0"]);
    g0.send(30);
    g0.send(40);
    let stats = rested(&bed);
    let printed = bed.ctl(&["metrics"]);
    assert_eq!(
        bed.json(&["metrics"])["text"].as_str().unwrap().lines().count(),
        printed.lines().count()
    );
    let scraped = scrape(&bed, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n");
    let (head, body) = scraped.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 OK\r\n"), "{head}");
    assert!(head.contains(&format!("Content-Length: {}", body.len())), "{head}");
    for text in [printed.as_str(), body] {
        let samples = samples(text);
        for port in stats["ports"].as_array().unwrap() {
            let name = port["name"].as_str().unwrap();
            for (state, is) in [("up", 1.0), ("broken", 0.0)] {
                let labels = format!("port=\"{name}\",kind=\"vhost-user\",state=\"{state}\"");
                assert_eq!(value(&samples, &format!("causeway_port_state{{{labels}}}")), is);
            }
            let queue = port["queues"][0].as_object().unwrap();
            for (key, count) in queue.iter().filter(|(key, _)| *key != "index" && *key != "drops") {
                let series = format!("causeway_port_{key}_total{{port=\"{name}\",queue=\"0\"}}");
                assert_eq!(value(&samples, &series), count.as_f64().unwrap(), "{series}");
            }
            for (reason, count) in queue["drops"].as_object().unwrap() {
                let labels = format!("port=\"{name}\",queue=\"0\",reason=\"{reason}\"");
                let series = format!("causeway_port_drops_total{{{labels}}}");
                assert_eq!(value(&samples, &series), count.as_f64().unwrap(), "{series}");
            }
        }
        let of_workers = |name: &str| -> f64 {
            let named = samples.iter().filter(|(series, _)| series.starts_with(name));
            named.map(|(_, value)| value).sum()
        };
        assert_eq!(of_workers("causeway_worker_frames_total{"), 70.0);
        assert_eq!(of_workers("causeway_worker_burst_frames_sum{"), 70.0);
        let bursts = sum(&stats["workers"], "bursts") as f64;
        assert_eq!(of_workers("causeway_worker_burst_frames_count{"), bursts);
        assert!(of_workers("causeway_worker_busy_seconds_total{") > 0.0);
    }
}

fn address(bed: &Bed) -> SocketAddr {
    let log = bed.log();
    let (_, rest) = log.split_once("metrics address=").unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

fn connect(bed: &Bed) -> TcpStream {
    let stream = TcpStream::connect(address(bed)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream
}

fn scrape(bed: &Bed, request: &[u8]) -> String {
    let mut stream = connect(bed);
    stream.write_all(request).unwrap();
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text).unwrap();
    text
}

/// CPU time that the control thread has taken.
fn control_time(bed: &Bed) -> Duration {
    let path = format!("/proc/{0}/task/{0}/schedstat", bed.id());
    let text = std::fs::read_to_string(path).unwrap();
    Duration::from_nanos(text.split_whitespace().next().unwrap().parse().unwrap())
}

#[test]
fn scrapers_without_end_take_a_small_share_of_the_control_thread() {
    const GET: &[u8] = b"GET /metrics HTTP/1.1\r\n\r\n";
    let bed = Bed::started(&[&GUESTS[..], &["--metrics", "127.0.0.1:0"]].concat());
    let (before, start) = (control_time(&bed), Instant::now());
    let greedy = || {
        let mut served = 0;
        while start.elapsed() < Duration::from_secs(3) {
            served += u32::from(scrape(&bed, GET).starts_with("HTTP/1.1 200 OK\r\n"));
        }
        served
    };
    let served: u32 = std::thread::scope(|scope| {
        let both = [scope.spawn(greedy), scope.spawn(greedy)];
        both.into_iter().map(|one| one.join().unwrap()).sum()
    });
    let (took, wall) = (control_time(&bed) - before, start.elapsed());
    assert!(served > 0 && took < wall / 6, "{served} answers in {took:?} of {wall:?}");
}

#[test]
fn hostile_scrapers_get_nothing_and_hold_nobody_up() {
    let bed = Bed::started(&[&GUESTS[..], &["--metrics", "127.0.0.1:0"]].concat());
    assert!(address(&bed).ip().is_loopback());
    let open_files = || std::fs::read_dir(format!("/proc/{}/fd", bed.id())).unwrap().count();
    let before = open_files();
    let cases: [(&[u8], &str); 5] = [
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404 "),
        (b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "HTTP/1.1 405 "),
        (b"GET /metrics HTTP/9.1\r\n\r\n", "HTTP/1.1 400 "),
        (b"\x16\x03\x01\x00\xff\xff\n\n", "HTTP/1.1 400 "),
        (&[b'a'; 20_000], "HTTP/1.1 431 "),
    ];
    for (request, start) in cases {
        let text = scrape(&bed, request);
        assert!(text.starts_with(start), "{text}");
    }
    // More than there is room for: some silent, some in the middle, some that never read.
    let crowd: Vec<TcpStream> = (0..100)
        .map(|number| {
            let mut stream = connect(&bed);
            let part: &[u8] = match number % 3 {
                0 => b"",
                1 => b"GET /metr",
                _ => b"GET /metrics HTTP/1.1\r\n\r\n",
            };
            let _ = stream.write_all(part);
            stream
        })
        .collect();
    // One that never stops.
    let mut endless = connect(&bed);
    let mut sent = 0;
    while endless.write_all(&[b'a'; 4096]).is_ok() {
        sent += 4096;
        assert!(sent < 64 << 20, "nobody stops it");
    }
    let text = scrape(&bed, b"GET /metrics HTTP/1.1\r\n\r\n");
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.ends_with('\n'));
    assert_eq!(bed.json(&["version"])["pid"], bed.id());
    assert!(open_files() <= before + 20, "{} open files", open_files());
    drop((crowd, endless));
    eventually("all are closed", || open_files() == before);
    let (code, _, error) = causeway(
        bed.folder.path(),
        &[
            "run",
            "--log",
            "off",
            "--control",
            "other.sock",
            "--metrics",
            &address(&bed).to_string(),
        ],
    );
    let taken = format!("cannot serve metrics at {}: Address already in use", address(&bed));
    assert!(code == 1 && error.contains(&taken), "{error}");
}
