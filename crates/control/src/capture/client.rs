//! The client's side of a capture.

use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;

use super::{CaptureEnd, CaptureRequest, FINISH, PIECE};
use crate::client::{Question, ask_on};
use crate::{Reply, Request};

/// The longest end.
const END_MAX: u32 = 64 * 1024;
/// Bytes of a part before its contents.
const HEAD: usize = 5;

/// What comes from the switch.
#[derive(Debug, PartialEq, Eq)]
pub enum Part<'a> {
    /// More of a pcapng file.
    Piece(&'a [u8]),
    /// The end.
    End(CaptureEnd),
}

/// A capture that runs.
#[derive(Debug)]
pub struct Stream {
    from: BufReader<UnixStream>,
    /// Bytes of a piece that are still to come.
    left: u32,
    space: Vec<u8>,
}

/// Begins a capture.
///
/// # Errors
///
/// The switch cannot be reached: a sentence. It refuses: its reply.
pub fn begin(control: &Path, request: &CaptureRequest) -> Result<Stream, Reply> {
    let Question { reply, from } =
        ask_on(control, &Request::Capture(request.clone())).map_err(Reply::Failed)?;
    match reply {
        Reply::Ok(_) => {}
        refused @ (Reply::Usage(_) | Reply::Failed(_)) => return Err(refused),
    }
    // From now on it comes when it comes.
    let silent = from.get_ref().set_read_timeout(None);
    silent.map_err(|error| Reply::Failed(format!("cannot wait for frames: {error}")))?;
    Ok(Stream { from, left: 0, space: vec![0; 64 * 1024] })
}

impl Stream {
    /// Whether there is something to read without waiting for the socket.
    pub fn has_some(&self) -> bool {
        !self.from.buffer().is_empty()
    }

    /// The socket: readable when there is more.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.from.get_ref().as_fd()
    }

    /// Asks the switch to end the capture: the rest and the end follow.
    ///
    /// # Errors
    ///
    /// The connection is gone.
    pub fn ask_for_end(&self) -> io::Result<()> {
        self.from.get_ref().shutdown(std::net::Shutdown::Write)
    }

    /// The next part, or some of it; waits for it.
    ///
    /// # Errors
    ///
    /// The switch went away without an end, or said what nobody understands.
    pub fn part(&mut self) -> io::Result<Part<'_>> {
        if self.left == 0 {
            let mut head = [0; HEAD];
            self.from.read_exact(&mut head)?;
            let [kind, len @ ..] = head;
            let len = u32::from_be_bytes(len);
            match kind {
                PIECE => self.left = len,
                FINISH if len <= END_MAX => return self.end(len),
                _ => return Err(io::Error::other(format!("part {kind} of {len} bytes"))),
            }
        }
        let most = self.space.len().min(self.left as usize);
        let space = self.space.get_mut(..most).unwrap_or_default();
        // What is there already; else what comes next.
        let there = self.from.fill_buf()?;
        let count = there.len().min(space.len());
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let (Some(space), Some(there)) = (space.get_mut(..count), there.get(..count)) {
            space.copy_from_slice(there);
        }
        self.from.consume(count);
        self.left = self.left.saturating_sub(u32::try_from(count).unwrap_or(u32::MAX));
        Ok(Part::Piece(self.space.get(..count).unwrap_or_default()))
    }

    fn end(&mut self, len: u32) -> io::Result<Part<'_>> {
        let mut json = vec![0; len as usize];
        self.from.read_exact(&mut json)?;
        Ok(Part::End(serde_json::from_slice(&json)?))
    }
}
