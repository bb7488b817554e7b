//! The control socket with clients of every kind.
#![expect(clippy::unwrap_used, reason = "test code")]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use control::server::{BindError, CLIENTS_MAX, ClientId, LINE_MAX, OUTPUT_MAX, Server};
use control::{Reply, Request};

struct Bed {
    server: Server,
    path: PathBuf,
    _folder: tempfile::TempDir,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/er/control.sock");
        Self { server: Server::bind(&path).unwrap(), path, _folder: folder }
    }

    fn connect(&mut self) -> (UnixStream, ClientId) {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        (stream, self.server.accept().unwrap().unwrap())
    }
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    let _ = BufReader::new(stream).read_line(&mut line).unwrap();
    line
}

#[test]
fn a_request_in_pieces_is_answered() {
    let mut bed = Bed::new();
    let (mut stream, id) = bed.connect();
    for piece in [&b"{\"comm"[..], b"and\":\"po", b"rts\"}\n{\"x\":1}\n"] {
        assert!(bed.server.take_requests().is_empty());
        stream.write_all(piece).unwrap();
        assert!(bed.server.ready(id));
    }
    let requests = bed.server.take_requests();
    assert_eq!(requests.len(), 2);
    assert_eq!(requests.first(), Some(&(id, Ok(Request::Ports))));
    assert!(matches!(requests.last(), Some((_, Err(text))) if text.contains("command")));
    assert!(bed.server.reply(id, &Reply::done("fine")));
    assert_eq!(line(&mut stream), "{\"ok\":{\"done\":\"fine\"}}\n");
}

#[test]
fn a_client_that_closes_its_side_still_gets_its_answer() {
    let mut bed = Bed::new();
    let (mut stream, id) = bed.connect();
    stream.write_all(b"{\"command\":\"stats\"}\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(bed.server.ready(id));
    assert_eq!(bed.server.take_requests().len(), 1);
    assert!(!bed.server.reply(id, &Reply::Failed("no".to_owned())));
    assert_eq!(line(&mut stream), "{\"failed\":\"no\"}\n");
}

#[test]
fn clients_that_overdo_it_are_disconnected_and_others_are_served() {
    let mut bed = Bed::new();
    let (mut long, id) = bed.connect();
    long.set_nonblocking(true).unwrap();
    let (mut slow, slow_id) = bed.connect();
    let start = Instant::now();
    while bed.server.ready(id) {
        let _ = long.write(&[b'x'; LINE_MAX]);
        assert!(start.elapsed() < Duration::from_secs(5));
    }
    bed.server.forget(id);
    // A reply that nobody reads waits, and one too many ends the connection.
    let reply = Reply::Failed("x".repeat(OUTPUT_MAX / 2));
    assert!(bed.server.reply(slow_id, &reply));
    assert!(bed.server.ready(slow_id));
    let _ = bed.server.reply(slow_id, &reply);
    assert!(!bed.server.reply(slow_id, &reply));
    assert!(slow.read(&mut [0; 10]).unwrap() > 0);
    bed.server.forget(slow_id);
    assert_eq!(bed.server.client_count(), 0);
    let (mut good, id) = bed.connect();
    assert!(bed.server.reply(id, &Reply::done("still here")));
    assert_eq!(line(&mut good), "{\"ok\":{\"done\":\"still here\"}}\n");
}

#[test]
fn a_large_reply_arrives_whole_at_a_slow_client() {
    let mut bed = Bed::new();
    let (mut stream, id) = bed.connect();
    let text = "y".repeat(OUTPUT_MAX / 2);
    assert!(bed.server.reply(id, &Reply::done(text.clone())));
    // The stream is closed only after the loop below has ended.
    let reader = std::thread::spawn(move || (line(&mut stream), stream));
    while !reader.is_finished() {
        assert!(bed.server.ready(id));
        std::thread::yield_now();
    }
    assert_eq!(reader.join().unwrap().0, format!("{{\"ok\":{{\"done\":\"{text}\"}}}}\n"));
}

#[test]
fn the_number_of_clients_is_bounded() {
    let mut bed = Bed::new();
    let mut streams: Vec<_> = (0..CLIENTS_MAX).map(|_| bed.connect()).collect();
    let mut refused = UnixStream::connect(&bed.path).unwrap();
    assert_eq!(bed.server.accept().unwrap(), None);
    assert_eq!(refused.read(&mut [0; 1]).unwrap(), 0);
    let (stream, id) = streams.pop().unwrap();
    assert!(bed.server.ready(id));
    drop(stream);
    assert!(!bed.server.ready(id));
    bed.server.forget(id);
    let _ = bed.connect();
}

#[test]
fn a_live_socket_is_refused_and_a_stale_one_replaced() {
    let bed = Bed::new();
    assert_eq!(bed.path.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let error = Server::bind(&bed.path).unwrap_err();
    assert_eq!(
        error.to_string(),
        format!("control socket {} is held by process {}", bed.path.display(), std::process::id())
    );
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("stale.sock");
    drop(UnixListener::bind(&path).unwrap());
    let old = path.metadata().unwrap().ino();
    let server = Server::bind(&path).unwrap();
    assert_ne!(path.metadata().unwrap().ino(), old);
    drop(server);
    assert!(!path.exists());
}

#[test]
fn what_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    std::fs::write(&path, "precious").unwrap();
    assert!(matches!(Server::bind(&path), Err(BindError::NotSocket(_))));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    let under = path.join("control.sock");
    let error = Server::bind(&under).unwrap_err().to_string();
    assert!(error.starts_with("cannot make folder "), "{error}");
}

#[test]
fn a_socket_that_somebody_replaced_is_not_removed() {
    let bed = Bed::new();
    std::fs::remove_file(&bed.path).unwrap();
    let _other = UnixListener::bind(&bed.path).unwrap();
    let path = bed.path.clone();
    drop(bed.server);
    assert!(path.exists());
}

#[test]
fn a_path_of_full_length_is_served() {
    let folder = tempfile::tempdir().unwrap();
    let place = folder.path().join("s");
    let short = place.as_os_str().len();
    let path = folder.path().join("s".repeat(108 - short));
    assert_eq!(path.as_os_str().len(), 107);
    let mut server = Server::bind(&path).unwrap();
    let _client = UnixStream::connect(&path).unwrap();
    assert!(server.accept().unwrap().is_some());
    let longer = folder.path().join("s".repeat(109 - short));
    let error = Server::bind(&longer).unwrap_err().to_string();
    assert!(error.starts_with(&format!("cannot listen at {}", longer.display())), "{error}");
    // In a folder with a long name, too.
    drop(server);
    let deep = folder.path().join("d".repeat(105 - short));
    let path = deep.join("s");
    assert_eq!(path.as_os_str().len(), 107 - 1);
    let mut server = Server::bind(&path).unwrap();
    let _client = UnixStream::connect(&path).unwrap();
    assert!(server.accept().unwrap().is_some());
}

#[test]
fn a_lock_that_somebody_holds_does_not_stop_a_start_for_ever() {
    use rustix::fs::{FlockOperation, flock};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("c.sock");
    let (done, bound) = std::sync::mpsc::channel();
    let bind = |path: PathBuf| {
        let done = done.clone();
        let _ = std::thread::spawn(move || {
            let result = Server::bind(&path).map(drop).map_err(|e| e.to_string());
            let _ = done.send(result);
        });
        bound.recv_timeout(Duration::from_secs(5)).expect("bind ends")
    };
    // The folder is nobody's business: whoever may read it can lock it.
    let held = std::fs::File::open(folder.path()).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    assert_eq!(bind(path.clone()), Ok(()));

    let lock = folder.path().join("c.sock.lock");
    assert!(!lock.exists(), "the lock goes with the start");
    let held = std::fs::File::create(&lock).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let text = "is held by another process: end it, or remove the file";
    assert_eq!(bind(path.clone()), Err(format!("lock {} {text}", lock.display())));
    drop(held);
    assert_eq!(bind(path), Ok(()));
    assert!(!lock.exists());
}
