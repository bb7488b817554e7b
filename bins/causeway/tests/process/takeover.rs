//! Another process takes the switch over, under load, and whatever it or somebody does wrong.

use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use control::handover::{Channel, Kind, Nothing, TakeOver, VERSION, ask};
use port::OffloadSet;
use rustix::process::Signal;
use serde_json::Value;
use testkit::FrontEnd;
use uplink::Parts;
use uplink::tap::from_parts;

use crate::bed::{Bed, causeway, eventually, ledger};
use crate::driver::{Driver, PACKED, SPLIT, Stream};
use crate::guest::Guest;
use crate::namespace::Namespace;

const PORTS: [&str; 4] =
    ["--port", "vhost-user:name=g0,socket=g0.sock", "--port", "vhost-user:name=g1,socket=g1.sock"];

/// How often the switch is taken over in a test.
fn rounds() -> usize {
    if std::env::var_os("CAUSEWAY_FULL").is_some_and(|full| full == "1") { 20 } else { 3 }
}

fn stream(bed: &Bed, features: u64) -> Stream {
    let from = Driver::join(bed, "g0.sock", features, 1);
    let to = Driver::join(bed, "g1.sock", features, 2);
    let _ = bed.wait_state("g0", "up");
    let _ = bed.wait_state("g1", "up");
    Stream::start(from, to)
}

fn frames_into(bed: &Bed, port: &str) -> u64 {
    let stats = bed.json(&["stats"]);
    let ports = stats["ports"].as_array().unwrap();
    let port = ports.iter().find(|one| one["name"] == port).unwrap();
    port["queues"].as_array().unwrap().iter().map(|q| q["rx_frames"].as_u64().unwrap()).sum()
}

fn settles(bed: &Bed) {
    eventually("the ledger adds up", || {
        let (came, went, held) = ledger(bed);
        came == went && held == 0
    });
}

#[test]
fn guests_lose_no_frame_and_see_nothing() {
    for features in [SPLIT, PACKED] {
        let mut bed = Bed::started(&PORTS);
        let stream = stream(&bed, features);
        let station = |bed: &Bed| bed.json(&["fdb"])["entries"].clone();
        eventually("both stations are known", || station(&bed).as_array().unwrap().len() == 2);
        let first = station(&bed);
        for round in 0..rounds() {
            let before = frames_into(&bed, "g0");
            let _ = stream.longest_gap();
            let old = bed.id();
            bed.take_over(&PORTS);
            assert_ne!(bed.id(), old);
            stream.goes_on("frames after the take-over");
            println!("round {round}: {:?} between two frames", stream.longest_gap());
            assert_eq!(bed.json(&["version"])["pid"], bed.id());
            assert!(frames_into(&bed, "g0") > before, "counters go on");
            let places = |entries: Value| {
                let entries = entries.as_array().unwrap().clone();
                entries
                    .into_iter()
                    .map(|e| (e["mac"].clone(), e["port"].clone()))
                    .collect::<Vec<_>>()
            };
            assert_eq!(places(station(&bed)), places(first.clone()));
            assert_eq!(bed.port("g0")["state"], "up");
        }
        let sent = stream.finish();
        settles(&bed);
        // The other guest makes itself known by two frames.
        assert_eq!(frames_into(&bed, "g0") + frames_into(&bed, "g1"), sent + 2);
        // A second switch still hears who is there, and the last one cleans up.
        let control = bed.control();
        let arguments = ["run", "--log", "off", "--control", control.to_str().unwrap()];
        let (code, _, error) = causeway(bed.folder.path(), &arguments);
        assert_eq!(code, 1);
        assert!(error.contains(&format!("is held by process {}", bed.id())), "{error}");
        assert_eq!(bed.end(Signal::TERM).code(), Some(0));
        assert!(!bed.control().exists() && !bed.path("g0.sock").exists());
        assert!(!bed.log().contains("panicked"), "{}", bed.log());
    }
}

/// Speaks for a successor up to some step.
fn channel(bed: &Bed) -> Channel {
    let request = TakeOver { version: VERSION, program: "test".to_owned() };
    let (agreed, channel) = ask(&bed.control(), &request).unwrap();
    assert_eq!(agreed.pid, bed.id());
    channel.patience(Duration::from_secs(20)).unwrap();
    channel
}

#[test]
fn whatever_step_a_successor_dies_at_the_old_one_goes_on() {
    for features in [SPLIT, PACKED] {
        let bed = Bed::started(&PORTS);
        let stream = stream(&bed, features);
        for step in 0..=4 {
            let before = bed.log().matches("this process goes on").count();
            let mut channel = channel(&bed);
            if step >= 1 {
                let _: (Value, _) = channel.receive(Kind::Offer).unwrap();
            }
            if step >= 2 {
                channel.send(Kind::Ready, &Nothing {}).unwrap();
            }
            if step >= 3 {
                let (state, _): (Value, _) = channel.receive(Kind::State).unwrap();
                assert_eq!(state["ports"].as_array().unwrap().len(), 2);
            }
            if step >= 4 {
                channel.send(Kind::Confirm, &Nothing {}).unwrap();
                let (Nothing {}, _) = channel.receive(Kind::Leave).unwrap();
            }
            drop(channel);
            eventually("the old one goes on", || {
                bed.log().matches("this process goes on").count() > before
            });
            stream.goes_on(&format!("frames after step {step}"));
        }
        // One that says why.
        let mut channel = channel(&bed);
        let _: (Value, _) = channel.receive(Kind::Offer).unwrap();
        channel.abort("the test wants it so");
        eventually("the reason is logged", || bed.log().contains("the test wants it so"));
        let _ = stream.finish();
        settles(&bed);
    }
}

/// What a successor sets on a tap that it does not go on with.
#[test]
fn a_tap_is_as_it_was_when_a_successor_fails() {
    let namespace = Namespace::new();
    let bed = Bed::started(&["--port", &namespace.tap("t0")]);
    let finishes_checksums = || {
        let of = ["netns", "exec", namespace.name(), "ethtool", "-k", "t0"];
        let shown = Command::new("ip").args(of).output().unwrap();
        String::from_utf8_lossy(&shown.stdout).contains("tx-checksumming: off")
    };
    assert!(!finishes_checksums());
    let mut channel = channel(&bed);
    let _: (Value, _) = channel.receive(Kind::Offer).unwrap();
    channel.send(Kind::Ready, &Nothing {}).unwrap();
    let (state, fds): (Value, _) = channel.receive(Kind::State).unwrap();
    let stop = &state["ports"][0]["uplink"];
    let device: Value = serde_json::from_str(stop["state"].as_str().unwrap()).unwrap();
    let of_tap: Vec<usize> = serde_json::from_value(stop["fds"].clone()).unwrap();
    let parts = Parts {
        state: device["uplink"].as_str().unwrap().to_owned(),
        fds: of_tap.iter().map(|fd| fds[*fd].try_clone().unwrap()).collect(),
    };
    let tap = from_parts(parts, OffloadSet::NONE, &[Arc::default()]).unwrap();
    tap.link.leave();
    assert!(finishes_checksums());
    channel.abort("the test wants it so");
    eventually("the old one has its own", || !finishes_checksums());
}

#[test]
fn a_successor_that_hangs_is_not_waited_for() {
    let bed = Bed::started(&PORTS);
    let stream = stream(&bed, SPLIT);
    let mut channel = channel(&bed);
    let _: (Value, _) = channel.receive(Kind::Offer).unwrap();
    // As long as it prepares everything goes on, but nothing changes, and nobody else may.
    stream.goes_on("frames while it prepares");
    let (code, _, error) = bed.ctl_full(&["port", "del", "g0"]);
    let me = std::process::id();
    assert_eq!(code, 1);
    assert!(error.contains(&format!("process {me} is taking over just now")), "{error}");
    let control = bed.control();
    let arguments = ["run", "--log", "off", "--take-over", control.to_str().unwrap()];
    let (code, _, error) = causeway(bed.folder.path(), &arguments);
    assert!(code == 1 && error.contains("is taking over just now"), "{error}");
    channel.send(Kind::Ready, &Nothing {}).unwrap();
    let _: (Value, _) = channel.receive(Kind::State).unwrap();
    eventually("it goes on", || bed.log().contains("took too long"));
    stream.goes_on("frames after all");
    let _ = stream.finish();
    settles(&bed);
}

#[test]
fn what_cannot_be_taken_over_leaves_the_old_one_alone() {
    let mut bed = Bed::started(&PORTS);
    let stream = stream(&bed, SPLIT);
    let try_it = |bed: &Bed, arguments: &[&str]| {
        let control = bed.control();
        let mut all = vec!["run", "--log", "error", "--take-over", control.to_str().unwrap()];
        all.extend_from_slice(arguments);
        causeway(bed.folder.path(), &all)
    };
    // A wrong configuration is not even asked with.
    std::fs::write(bed.path("bad.toml"), "[switch]\npoll = \"lazy\"\n").unwrap();
    let (code, _, error) = try_it(&bed, &["--config", "bad.toml"]);
    assert!(code == 2 && error.contains("bad.toml:2"), "{error}");
    // A port that cannot be opened.
    let missing = ["--port", "packet-mmap:name=u,ifname=cw-none"];
    let (code, _, error) = try_it(&bed, &[&PORTS[..], &missing].concat());
    assert!(code == 1 && error.contains("cw-none"), "{error}");
    eventually("the old one knows", || bed.log().contains("cw-none"));
    // Fewer queues than the guest uses: that port begins anew, so it is no reason to refuse; but
    // another version of the hand-over is.
    for (version, says) in [(0, "version 0"), (2, "version 2")] {
        let request = TakeOver { version, program: "9.9.9".to_owned() };
        let error = ask(&bed.control(), &request).unwrap_err();
        assert!(error.contains("causeway 9.9.9") && error.contains(says), "{error}");
        assert!(error.contains(&format!("version {VERSION}")), "{error}");
    }
    // A program that knows nothing of hand-overs, or nobody.
    let listener = std::os::unix::net::UnixListener::bind(bed.path("old.sock")).unwrap();
    let old = std::thread::spawn(move || {
        use std::io::{BufRead, Write};
        let (stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        let _ = std::io::BufReader::new(&stream).read_line(&mut line).unwrap();
        (&stream).write_all(b"{\"usage\":\"not a request: unknown variant\"}\n").unwrap();
    });
    let (code, _, error) = causeway(bed.folder.path(), &["run", "--take-over", "old.sock"]);
    assert!(code == 1 && error.contains("does not know how"), "{error}");
    old.join().unwrap();
    let (code, _, error) = causeway(bed.folder.path(), &["run", "--take-over", "none.sock"]);
    assert!(code == 1 && error.contains("cannot reach the switch at none.sock"), "{error}");
    stream.goes_on("frames all the while");
    // And one that is right.
    bed.take_over(&PORTS);
    stream.goes_on("frames in the end");
    let _ = stream.finish();
    settles(&bed);
}

#[test]
fn the_new_configuration_wins() {
    let mut bed = Bed::started(
        &[
            &PORTS[..],
            &["--port", "vhost-user:name=gone,socket=gone.sock"],
            &["--port", "vhost-user:name=other,socket=other.sock"],
        ]
        .concat(),
    );
    let _ = bed.ctl(&[
        "port",
        "add",
        &format!("vhost-user:name=added,socket={}", bed.path("a.sock").display()),
    ]);
    let stream = stream(&bed, SPLIT);
    let _ = FrontEnd::connect(&bed.path("gone.sock")).unwrap();
    let capture = bed.spawn_ctl(&["capture", "g0", "--count", "1000000", "--write", "/dev/null"]);
    eventually("the capture runs", || bed.log().contains("capture began"));
    let fewer = "vhost-user:name=other,socket=other.sock,queues=2";
    bed.take_over(
        &[&PORTS[..], &["--port", fewer, "--port", "vhost-user:name=new,socket=new.sock"]].concat(),
    );
    stream.goes_on("frames of the ports that stay");
    let view = bed.json(&["ports"]);
    let names: Vec<_> = view["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["name"].as_str().unwrap().to_owned())
        .collect();
    let mut sorted = names.clone();
    sorted.sort();
    assert_eq!(sorted, ["added", "g0", "g1", "new", "other"]);
    eventually("the changed port listens again", || {
        let port = bed.port("other");
        port["reason"].as_str().unwrap().contains("waiting for the front end")
    });
    assert!(bed.port("other")["spec"].as_str().unwrap().contains("queues=2"));
    for socket in ["g0.sock", "other.sock", "new.sock", "a.sock"] {
        let _ = UnixStream::connect(bed.path(socket)).unwrap();
    }
    eventually("the socket of the port that went is gone", || !bed.path("gone.sock").exists());
    let ended = capture.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&ended.stderr).into_owned();
    assert!(text.contains(&format!("process {} took over", bed.id())), "{text}");
    let _ = stream.finish();
    settles(&bed);
    // Without ports of its own the next one keeps those that are there.
    bed.take_over(&[]);
    let view = bed.json(&["ports"]);
    assert_eq!(view["ports"].as_array().unwrap().len(), 5);
    assert_eq!(bed.port("added")["state"], "waiting");
    settles(&bed);
}

/// Half a message goes on in the new process, and states with their reasons do.
#[test]
fn connections_and_states_go_on() {
    let mut bed = Bed::started(&PORTS);
    let mut front = FrontEnd::connect(&bed.path("g0.sock")).unwrap();
    let features = |front: &mut FrontEnd| {
        let reply = front.ask(1, &[]).unwrap();
        u64::from_le_bytes(reply.try_into().unwrap())
    };
    let offered = features(&mut front);
    // GET_FEATURES in two halves: request 1, version 1, no payload.
    let message = [1u32, 1, 0].map(u32::to_le_bytes).concat();
    assert_eq!(front.send_raw(&message[..7], &[]).unwrap(), 7);
    let mut broken = FrontEnd::connect(&bed.path("g1.sock")).unwrap();
    broken.send(99, &[], &[]).unwrap();
    eventually("the wrong message is noted", || !bed.port("g1")["last_error"].is_null());
    let error = bed.port("g1")["last_error"]["text"].clone();
    bed.take_over(&PORTS);
    assert_eq!(front.send_raw(&message[7..], &[]).unwrap(), 5);
    assert_eq!(front.reply(1).unwrap(), offered.to_le_bytes());
    assert_eq!(features(&mut front), offered);
    assert_eq!(bed.port("g1")["last_error"]["text"], error);
    assert!(bed.port("g0")["since_ms"].as_u64().unwrap() > 0);
    assert!(!bed.log().contains("second front end"));
}

#[test]
fn metrics_and_their_address_go_on() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    drop(taken);
    let mut bed = Bed::started(&[&PORTS[..], &["--metrics", &address]].concat());
    let scrape = || {
        use std::io::{Read, Write};
        let mut stream = std::net::TcpStream::connect(&address).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
        let mut text = String::new();
        let _ = stream.read_to_string(&mut text).unwrap();
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    };
    scrape();
    bed.take_over(&[&PORTS[..], &["--metrics", &address]].concat());
    scrape();
}

/// The service manager, of which only the first process was told, hears who goes on before that
/// process ends, as `NotifyAccess=main` needs it.
#[test]
fn the_service_manager_hears_who_goes_on() {
    let mut bed = Bed::new();
    let manager = std::os::unix::net::UnixDatagram::bind(bed.path("notify")).unwrap();
    manager.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let said = || {
        let mut bytes = [0; 100];
        let count = manager.recv(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    };
    let path = bed.path("notify").to_str().unwrap().to_owned();
    bed.environment = vec![("NOTIFY_SOCKET".to_owned(), path)];
    bed.start(&PORTS);
    assert_eq!(said(), format!("READY=1\nMAINPID={}", bed.id()));
    for _ in 0..2 {
        bed.take_over(&PORTS);
        // The old one and the new one say so at the same time.
        let mut both = [said(), said()];
        both.sort();
        let main = format!("MAINPID={}", bed.id());
        assert_eq!(both, [main.clone(), format!("READY=1\n{main}")]);
    }
    assert_eq!(bed.end(Signal::TERM).code(), Some(0));
    assert_eq!(said(), "STOPPING=1");
    // A manager that is gone, or none, is no reason not to serve.
    drop(manager);
    bed.start(&PORTS);
    assert!(bed.log().contains("cannot reach NOTIFY_SOCKET"), "{}", bed.log());
}

/// Keys that are the switch's own change without a word to the front end.
#[test]
fn limits_and_offloads_change_while_guests_stay() {
    let mut bed = Bed::started(&PORTS);
    let stream = stream(&bed, SPLIT);
    let with = |keys: &str| {
        let first = format!("vhost-user:name=g0,socket=g0.sock{keys}");
        ["--port".to_owned(), first, PORTS[2].to_owned(), PORTS[3].to_owned()]
    };
    let mut take_over = |keys: &str| {
        let ports = with(keys);
        bed.take_over(&ports.each_ref().map(String::as_str));
        let spec = bed.port("g0")["spec"].as_str().unwrap().to_owned();
        assert!(spec.ends_with(keys), "{spec}");
        // A port that is opened anew would wait for its front end.
        assert_eq!(bed.port("g0")["state"], "up");
    };
    take_over(",rate-mbps=900,burst-kb=512,storm-kpps=1");
    stream.goes_on("frames at a high rate");
    take_over(",offloads=off");
    stream.goes_on("frames of a guest that was offered more");
    let _ = stream.finish();
    settles(&bed);
    let connected = bed.log().matches("front end connected").count();
    assert_eq!(connected, 2, "nobody was sent away: {}", bed.log());
}

#[test]
fn a_guest_may_not_say_any_more_what_its_port_forbids_now() {
    let mut bed = Bed::started(&PORTS);
    let (mut g0, _g1) = (Guest::join(&bed, "g0.sock", 1), Guest::join(&bed, "g1.sock", 2));
    let _ = (bed.wait_state("g0", "up"), bed.wait_state("g1", "up"));
    let spoofed = |bed: &Bed| {
        let stats = bed.json(&["stats"]);
        let ports = stats["ports"].as_array().unwrap();
        let port = ports.iter().find(|port| port["name"] == "g0").unwrap();
        port["queues"][0]["drops"]["spoofed"].as_u64().unwrap()
    };
    g0.send(5);
    assert_eq!(spoofed(&bed), 0);
    let strict = "vhost-user:name=g0,socket=g0.sock,antispoof=on,mac=02:00:00:00:00:77";
    bed.take_over(&["--port", strict, PORTS[2], PORTS[3]]);
    assert_eq!(bed.port("g0")["state"], "up");
    g0.send(3);
    assert_eq!(spoofed(&bed), 3);
    bed.take_over(&PORTS);
    g0.send(3);
    assert_eq!(spoofed(&bed), 3);
    let connected = bed.log().matches("front end connected").count();
    assert_eq!(connected, 2, "nobody was sent away: {}", bed.log());
    settles(&bed);
}
