//! The control socket, client side: one question, one answer.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::protocol::{Reply, Request};

/// How long the switch may take to answer.
const TIMEOUT: Duration = Duration::from_secs(30);

/// Bytes that are read at once: captures bring many.
const BUFFER: usize = 128 * 1024;

/// Asks the switch whose control socket is `path`.
///
/// # Errors
///
/// A sentence that says what could not be reached or understood.
pub fn ask(path: &Path, request: &Request) -> Result<Reply, String> {
    ask_on(path, request).map(|question| question.reply)
}

/// An answer, and the connection on which more may come.
pub(crate) struct Question {
    pub(crate) reply: Reply,
    pub(crate) from: BufReader<UnixStream>,
}

/// As [`ask`]; the connection stays.
pub(crate) fn ask_on(path: &Path, request: &Request) -> Result<Question, String> {
    let shown = path.display();
    let mut stream = UnixStream::connect(path).map_err(|error| {
        format!("cannot reach the switch at {shown}: {error}; does `causeway run` run?")
    })?;
    let timeouts = stream
        .set_read_timeout(Some(TIMEOUT))
        .and_then(|()| stream.set_write_timeout(Some(TIMEOUT)));
    let failed = |error: std::io::Error| format!("no answer from the switch at {shown}: {error}");
    timeouts.map_err(failed)?;
    let mut line = serde_json::to_string(request).map_err(|e| e.to_string())?;
    line.push('\n');
    stream.write_all(line.as_bytes()).map_err(failed)?;
    let mut answer = String::new();
    let mut from = BufReader::with_capacity(BUFFER, stream);
    let count = from.read_line(&mut answer).map_err(failed)?;
    if count == 0 {
        return Err(format!("the switch at {shown} closed the connection without an answer"));
    }
    let reply = serde_json::from_str(&answer)
        .map_err(|error| format!("the switch at {shown} gave an unknown answer: {error}"))?;
    Ok(Question { reply, from })
}
