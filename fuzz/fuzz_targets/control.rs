//! The control socket: any bytes in any pieces from a client. Each line gets at most one answer,
//! whole and in JSON, and a client that is sent away leaves nothing.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use control::server::{LINE_MAX, Server};
use control::{Reply, Request};
use libfuzzer_sys::fuzz_target;

fn path() -> PathBuf {
    std::env::temp_dir().join(format!("fuzz-control-{}", std::process::id()))
}

/// Answers what was asked. Returns how many lines that were.
fn answer(server: &mut Server) -> usize {
    let requests = server.take_requests();
    for (from, request) in &requests {
        let reply = match request {
            Ok(Request::PortAdd { spec }) => match spec.parse::<control::PortSpec>() {
                Ok(spec) => Reply::done(spec.to_string()),
                Err(error) => Reply::Usage(error.to_string()),
            },
            Ok(request) => Reply::done(format!("{request:?}")),
            Err(text) => Reply::Usage(text.clone()),
        };
        let _ = server.reply(*from, &reply);
    }
    requests.len()
}

fuzz_target!(|data: &[u8]| {
    let mut server = Server::bind(&path()).expect("a socket");
    let mut stream = UnixStream::connect(path()).expect("a client");
    let id = server.accept().expect("no error").expect("a client");
    stream.set_nonblocking(true).expect("a socket");
    let (&step, data) = data.split_first().unwrap_or((&0, &[]));
    let (mut asked, mut alive) = (0, true);
    let mut answers = Vec::new();
    for piece in data.chunks(usize::from(step) * 16 + 1) {
        if stream.write_all(piece).is_err() {
            break;
        }
        alive = server.ready(id);
        asked += answer(&mut server);
        let _ = stream.read_to_end(&mut answers);
        if !alive {
            break;
        }
    }
    let longest = data.split(|byte| *byte == b'\n').map(<[u8]>::len).max().unwrap_or(0);
    assert!(alive || longest > LINE_MAX, "sent away for nothing");
    assert!(asked <= data.iter().filter(|byte| **byte == b'\n').count());
    let lines = answers.split(|byte| *byte == b'\n').filter(|line| !line.is_empty());
    let whole = lines.map(|line| serde_json::from_slice::<Reply>(line).expect("an answer"));
    assert!(whole.count() <= asked);
    server.forget(id);
    assert_eq!(server.client_count(), 0);
});
