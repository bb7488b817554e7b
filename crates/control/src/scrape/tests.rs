use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{CLIENTS_MAX, CPU_A_SECOND, ClientId, RECEIVED_MAX, Ready, Scrape};

const GET: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";

struct Bed {
    scrape: Scrape,
}

impl Bed {
    fn new() -> Self {
        Self { scrape: Scrape::bind("127.0.0.1:0".parse().unwrap()).unwrap() }
    }

    fn connect(&mut self) -> (TcpStream, ClientId) {
        let stream = TcpStream::connect(self.scrape.address().unwrap()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut id = None;
        within(|| {
            id = self.scrape.accept();
            id.is_some()
        });
        (stream, id.unwrap())
    }

    /// Serves until it is so.
    fn until(&mut self, id: ClientId, ready: Ready) {
        within(|| self.scrape.ready(id) == ready);
    }
}

fn within(mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(5), "not so after 5 s");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn rest(stream: &mut TcpStream) -> String {
    let mut text = String::new();
    let _ = stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn a_request_in_pieces_is_answered_and_the_connection_ends() {
    let mut bed = Bed::new();
    let (mut stream, id) = bed.connect();
    for byte in &GET[..GET.len() - 1] {
        stream.write_all(&[*byte]).unwrap();
        assert_eq!(bed.scrape.ready(id), Ready::Waits);
    }
    stream.write_all(b"\n").unwrap();
    bed.until(id, Ready::Asked);
    assert!(bed.scrape.answer(id, "x 1\n"));
    let text = rest(&mut stream);
    assert!(text.starts_with("HTTP/1.1 200 OK\r\n"), "{text}");
    assert!(text.contains("version=0.0.4") && text.ends_with("\r\n\r\nx 1\n"), "{text}");
    drop(stream);
    bed.until(id, Ready::Gone);
}

#[test]
fn a_client_that_closes_its_side_still_gets_its_answer() {
    let mut bed = Bed::new();
    let (mut stream, id) = bed.connect();
    stream.write_all(GET).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    bed.until(id, Ready::Asked);
    assert!(!bed.scrape.answer(id, "x 1\n"), "it has all and says nothing more");
    assert!(rest(&mut stream).ends_with("\r\n\r\nx 1\n"));
}

#[test]
fn what_is_no_request_for_metrics_is_refused() {
    let cases: [(&[u8], &str); 4] = [
        (b"GET / HTTP/1.1\r\n\r\n", "HTTP/1.1 404 "),
        (b"DELETE /metrics HTTP/1.1\r\n\r\n", "HTTP/1.1 405 "),
        (b"\0\0\0\n\n", "HTTP/1.1 400 "),
        (&[b'a'; 10_000], "HTTP/1.1 431 "),
    ];
    for (request, start) in cases {
        let mut bed = Bed::new();
        let (mut stream, id) = bed.connect();
        stream.write_all(request).unwrap();
        let mut text = String::new();
        within(|| {
            assert_eq!(bed.scrape.ready(id), Ready::Waits);
            let mut chunk = [0; 4096];
            stream.set_nonblocking(true).unwrap();
            if let Ok(count) = stream.read(&mut chunk) {
                text.push_str(str::from_utf8(&chunk[..count]).unwrap());
            }
            text.ends_with('\n') && text.contains("\r\n\r\n")
        });
        assert!(text.starts_with(start), "{text}");
        assert!(text.contains("\r\nConnection: close\r\n"));
    }
}

#[test]
fn a_client_that_never_stops_is_cut_off() {
    let mut bed = Bed::new();
    let (mut stream, id) = bed.connect();
    stream.set_nonblocking(true).unwrap();
    let mut sent = 0;
    within(|| {
        if sent <= RECEIVED_MAX {
            sent += stream.write(&[b'a'; 4096]).unwrap_or(0);
        }
        bed.scrape.ready(id) == Ready::Gone
    });
    assert!(sent > RECEIVED_MAX);
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    let mut bed = Bed::new();
    let (mut slow, slow_id) = bed.connect();
    slow.write_all(GET).unwrap();
    bed.until(slow_id, Ready::Asked);
    let large = "x 1\n".repeat(5_000_000);
    assert!(bed.scrape.answer(slow_id, &large), "most of it waits");
    let (mut quick, quick_id) = bed.connect();
    quick.write_all(GET).unwrap();
    bed.until(quick_id, Ready::Asked);
    assert!(bed.scrape.answer(quick_id, "x 2\n"));
    assert!(rest(&mut quick).ends_with("x 2\n"));
    // It gets the rest when it reads on.
    let reader = std::thread::spawn(move || rest(&mut slow).len());
    within(|| bed.scrape.ready(slow_id) == Ready::Gone || reader.is_finished());
    assert!(reader.join().unwrap() > large.len());
}

#[test]
fn one_client_too_many_takes_the_place_of_the_oldest() {
    let mut bed = Bed::new();
    let all: Vec<_> = (0..CLIENTS_MAX).map(|_| bed.connect()).collect();
    assert_eq!(bed.scrape.unwelcome(), None);
    let (_newest, _) = bed.connect();
    assert_eq!(bed.scrape.unwelcome(), Some(all[0].1));
    bed.scrape.forget(all[0].1);
    assert_eq!((bed.scrape.unwelcome(), bed.scrape.client_count()), (None, CLIENTS_MAX));
}

#[test]
fn who_comes_when_all_took_too_much_time_waits_until_it_is_paid() {
    let mut bed = Bed::new();
    let _ = bed.connect();
    bed.scrape.charge(CPU_A_SECOND - Duration::from_nanos(1));
    let _ = bed.connect();
    bed.scrape.charge(CPU_A_SECOND * 2);
    let waits = TcpStream::connect(bed.scrape.address().unwrap()).unwrap();
    for _ in 0..2 {
        std::thread::sleep(Duration::from_millis(10));
        assert_eq!(bed.scrape.accept(), None);
        bed.scrape.second();
    }
    within(|| bed.scrape.accept().is_some());
    drop(waits);
}
