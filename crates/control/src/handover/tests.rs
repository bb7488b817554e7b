use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};

use super::{Channel, FDS_AT_ONCE, HandoverError, Kind, Nothing, TakeOver};
use crate::Request;

fn pair() -> (Channel, Channel) {
    let (a, b) = UnixStream::pair().unwrap();
    let channels = [a, b].map(|stream| Channel::new(stream).unwrap());
    channels.iter().for_each(|channel| channel.patience(Duration::from_secs(5)).unwrap());
    let [a, b] = channels;
    (a, b)
}

/// Eventfds with the numbers from 1 in them.
fn numbered(count: usize) -> Vec<OwnedFd> {
    let new = |number: usize| eventfd(u32::try_from(number).unwrap(), EventfdFlags::NONBLOCK);
    (1..=count).map(|number| new(number).unwrap()).collect()
}

fn number(fd: &OwnedFd) -> u64 {
    let mut bytes = [0; 8];
    let _ = rustix::io::read(fd.as_fd(), &mut bytes).unwrap();
    u64::from_ne_bytes(bytes)
}

#[test]
fn fds_come_with_their_message_in_order() {
    for count in [0, 1, FDS_AT_ONCE, FDS_AT_ONCE * 2 + 3] {
        let (mut a, mut b) = pair();
        let fds = numbered(count);
        // More than a socket buffer holds.
        let content = json!({"text": "x".repeat(1 << 20), "count": count});
        let sender = std::thread::spawn(move || {
            a.send_with(Kind::Offer, &content, &fds).unwrap();
            a.send(Kind::Leave, &Nothing {}).unwrap();
            content
        });
        let (got, fds) = b.receive::<Value>(Kind::Offer).unwrap();
        let _: (Nothing, _) = b.receive(Kind::Leave).unwrap();
        assert_eq!(got, sender.join().unwrap());
        let numbers: Vec<u64> = fds.iter().map(number).collect();
        assert_eq!(numbers, (1..=count as u64).collect::<Vec<_>>());
        assert!(b.is_closed());
    }
}

#[test]
fn what_goes_wrong_is_told() {
    let (mut a, mut b) = pair();
    assert!(!a.is_closed());
    a.abort("no port g0");
    let error = b.receive::<Nothing>(Kind::State).unwrap_err();
    assert_eq!(error.to_string(), "no port g0");
    a.send(Kind::Ready, &Nothing {}).unwrap();
    let error = b.receive::<Nothing>(Kind::State).unwrap_err();
    assert!(matches!(error, HandoverError::Unexpected));
    b.patience(Duration::from_millis(10)).unwrap();
    assert!(matches!(b.receive::<Nothing>(Kind::State).unwrap_err(), HandoverError::Late));
    drop(a);
    assert!(matches!(b.receive::<Nothing>(Kind::State).unwrap_err(), HandoverError::Gone));
    assert!(matches!(b.send(Kind::Ready, &Nothing {}).unwrap_err(), HandoverError::Gone));
}

#[test]
fn hostile_messages_are_refused() {
    use std::io::Write;
    let bytes = |bytes: &[u8]| {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(bytes).unwrap();
        drop(a);
        Channel::new(b).unwrap().receive::<Nothing>(Kind::Offer).unwrap_err()
    };
    assert!(matches!(bytes(b"HTTP/1.1 200 OK\r\n\r\n"), HandoverError::Unexpected));
    let head = |fds: u32, length: u32| {
        [&b"CWHOO\0\0\0"[..], &fds.to_be_bytes(), &length.to_be_bytes()].concat()
    };
    assert!(matches!(bytes(&head(u32::MAX, 0)), HandoverError::TooLarge { .. }));
    assert!(matches!(bytes(&head(0, u32::MAX)), HandoverError::TooLarge { .. }));
    assert!(matches!(bytes(&head(1, 0)), HandoverError::Gone));
    assert!(matches!(bytes(&head(0, 5)), HandoverError::Gone));
    let text = [&head(0, 1)[..], b"7"].concat();
    assert!(matches!(bytes(&text), HandoverError::Unreadable(_)));
    // A byte without the fd that should be beside it.
    assert!(matches!(bytes(&[&head(1, 2)[..], b"\0{}"].concat()), HandoverError::Gone));
}

#[test]
fn the_request_may_say_more_than_is_known() {
    let line = r#"{"command":"take-over","version":7,"program":"9.1","colour":"blue"}"#;
    let request: Request = serde_json::from_str(line).unwrap();
    let known = TakeOver { version: 7, program: "9.1".to_owned() };
    assert_eq!(request, Request::TakeOver(known));
    let short: Request = serde_json::from_str(r#"{"command":"take-over","version":1}"#).unwrap();
    assert!(matches!(short, Request::TakeOver(TakeOver { version: 1, .. })));
}
