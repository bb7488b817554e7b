//! The socket file, second front ends, half messages.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use port::{PortId, PortState, StatusCell};
use vhost_user_net::codec::{Header, Reply, Request};
use vhost_user_net::session::FEATURES;
use vhost_user_net::{OpenError, PortLinks, PortSettings, SocketMode, VhostUserPort};

use crate::fabric::Wire;
use crate::harness::{Bench, mode_of};

fn open(settings: PortSettings) -> Result<VhostUserPort, OpenError> {
    let links = PortLinks {
        id: PortId(0),
        fabric: Arc::new(Wire::default()),
        status: StatusCell::waiting(""),
        counters: Box::new(|_| Arc::default()),
    };
    VhostUserPort::new(settings, links)
}

#[test]
fn the_file_has_the_permissions_and_the_group_that_were_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let port = open(PortSettings::server("g", &path)).unwrap();
    assert_eq!(mode_of(&path), 0o660);
    drop(port);
    assert!(!path.exists(), "the file goes with the port");
    let own = std::fs::metadata(dir.path()).unwrap().gid();
    let settings = PortSettings {
        socket_mode: 0o600,
        socket_group: Some(own.to_string()),
        ..PortSettings::server("g", &path)
    };
    let _port = open(settings).unwrap();
    assert_eq!(mode_of(&path), 0o600);
    assert_eq!(std::fs::metadata(&path).unwrap().gid(), own);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "nothing temporary is left");
}

#[test]
fn a_path_as_long_as_a_socket_address_holds_works() {
    let dir = tempfile::tempdir().unwrap();
    let mut long = dir.path().to_owned();
    let used = long.as_os_str().len();
    long.push("d".repeat(107 - used - "//s".len()));
    std::fs::create_dir(&long).unwrap();
    let path = long.join("s");
    assert_eq!(path.as_os_str().len(), 107);
    let port = open(PortSettings::server("g", &path)).unwrap();
    assert_eq!(mode_of(&path), 0o660);
    drop(UnixStream::connect(&path).unwrap());
    assert_eq!(std::fs::read_dir(&long).unwrap().count(), 1, "nothing temporary is left");
    drop(port);
    assert!(!path.exists());
    let error = open(PortSettings::server("g", long.join("sss"))).unwrap_err();
    assert!(error.to_string().starts_with("the name is too long"), "{error}");
}

#[test]
fn groups_have_names() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let with = |group: &str| PortSettings {
        socket_group: Some(group.to_owned()),
        ..PortSettings::server("g", &path)
    };
    let error = open(with("no such group")).unwrap_err();
    assert_eq!(error.to_string(), "there is no group \"no such group\"");
    assert!(!path.exists());
    if rustix::process::geteuid().is_root() {
        let _port = open(with("daemon")).unwrap();
        assert_ne!(std::fs::metadata(&path).unwrap().gid(), 0);
    }
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    let port = open(PortSettings::server("g", &path)).unwrap();
    let error = open(PortSettings::server("h", &path)).unwrap_err();
    assert!(matches!(error, OpenError::Live(_)), "{error}");
    assert!(UnixStream::connect(&path).is_ok(), "the first one still listens");
    // Whoever replaced the file keeps it.
    std::fs::remove_file(&path).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(port);
    assert!(path.exists());
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("precious");
    std::fs::write(&path, "data").unwrap();
    let error = open(PortSettings::server("g", &path)).unwrap_err();
    assert!(error.to_string().ends_with("exists and is not a socket"));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "data");
    let nowhere = dir.path().join("no/such/dir/s");
    let error = open(PortSettings::server("g", nowhere)).unwrap_err();
    assert!(error.to_string().contains("No such file or directory"), "{error}");
}

#[test]
fn a_second_front_end_is_sent_away() {
    let bench = Bench::new(SocketMode::Server);
    let mut first = UnixStream::connect(bench.socket(0)).unwrap();
    bench.wait(0, PortState::Waiting, "connected");
    let mut second = UnixStream::connect(bench.socket(0)).unwrap();
    assert_eq!(second.read(&mut [0; 1]).unwrap(), 0);
    bench.wait_error(0, "a second front end");
    first.write_all(&Request::GetFeatures.write(false)).unwrap();
    let mut reply = [0; 20];
    first.read_exact(&mut reply).unwrap();
    assert_eq!(reply.to_vec(), Reply::U64(FEATURES).write(1));
}

/// What this process logged.
static LOG: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct ToLog;

impl Write for ToLog {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        LOG.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_crowd_of_front_ends_does_not_fill_the_log() {
    tracing_subscriber::fmt().with_ansi(false).with_writer(|| ToLog).init();
    let bench = Bench::with(|settings| "crowded".clone_into(&mut settings.name));
    let _first = UnixStream::connect(bench.socket(0)).unwrap();
    bench.wait(0, PortState::Waiting, "connected");
    for _ in 0..50 {
        let mut other = UnixStream::connect(bench.socket(0)).unwrap();
        assert_eq!(other.read(&mut [0; 1]).unwrap(), 0);
    }
    let log = String::from_utf8(LOG.lock().unwrap().clone()).unwrap();
    let about_them = |line: &&str| line.contains("crowded") && line.contains("sent away");
    assert_eq!(log.lines().filter(about_them).count(), 10);
}

#[test]
fn a_message_may_come_byte_by_byte_and_nobody_waits_for_it() {
    let bench = Bench::new(SocketMode::Server);
    let mut slow = UnixStream::connect(bench.socket(0)).unwrap();
    let mut quick = UnixStream::connect(bench.socket(1)).unwrap();
    let mut reply = [0; 20];
    for byte in Request::GetFeatures.write(false) {
        slow.write_all(&[byte]).unwrap();
        quick.write_all(&Request::GetQueueNum.write(false)).unwrap();
        quick.read_exact(&mut reply).unwrap();
        assert_eq!(reply.to_vec(), Reply::U64(128).write(17));
    }
    slow.read_exact(&mut reply).unwrap();
    assert_eq!(reply.to_vec(), Reply::U64(FEATURES).write(1));
}

#[test]
fn half_a_message_and_then_nothing_is_told_apart_from_leaving() {
    let bench = Bench::new(SocketMode::Server);
    let mut torn = UnixStream::connect(bench.socket(0)).unwrap();
    torn.write_all(&Request::SetOwner.write(false)[..7]).unwrap();
    drop(torn);
    bench.wait_error(0, "in the middle of a message");
}

#[test]
fn garbage_ends_the_connection_with_its_reason() {
    let bench = Bench::new(SocketMode::Server);
    let mut stream = UnixStream::connect(bench.socket(0)).unwrap();
    let header = Header { request: 5, need_reply: false, reply: false, size: 5000 };
    stream.write_all(&header.write()).unwrap();
    assert_eq!(stream.read(&mut [0; 1]).unwrap(), 0);
    bench.wait_error(0, "SET_MEM_TABLE with 5000 bytes, at most 4096 are allowed");
    let mut stream = UnixStream::connect(bench.socket(0)).unwrap();
    stream.write_all(b"GET / HTTP/1.1\r\n").unwrap();
    // What was not read any more makes this a reset.
    assert!(stream.read(&mut [0; 1]).is_ok_and(|n| n == 0) || stream.take_error().is_ok());
    bench.wait_error(0, "message version 3, only 1 is known");
}

#[test]
fn a_front_end_that_never_reads_is_not_listened_to_and_nobody_else_suffers() {
    let bench = Bench::new(SocketMode::Server);
    let mut deaf = UnixStream::connect(bench.socket(0)).unwrap();
    deaf.set_nonblocking(true).unwrap();
    let question = Request::GetFeatures.write(false);
    let mut asked = 0u32;
    let full = loop {
        match deaf.write_all(&question) {
            Ok(()) => asked += 1,
            Err(error) => break error,
        }
        if asked.is_multiple_of(1000) {
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(asked < 1_000_000, "it reads for ever");
    };
    assert_eq!(full.kind(), ErrorKind::WouldBlock);
    let mut other = UnixStream::connect(bench.socket(1)).unwrap();
    other.write_all(&question).unwrap();
    other.read_exact(&mut [0; 20]).unwrap();
    // As soon as it reads, all answers come.
    deaf.set_nonblocking(false).unwrap();
    for _ in 0..asked {
        deaf.read_exact(&mut [0; 20]).unwrap();
    }
}
