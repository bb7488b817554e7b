//! How a running switch is handed over: the connection, and what goes over it.
//!
//! ```text
//!  new ─► old  take-over {version, program}      a request on the control socket, as any other
//!  new ◄─ old  its reply; from then on the connection belongs to the hand-over:
//!
//!  message:  "CWHO" │ kind 1 │ 0 0 0 │ fds 4 │ bytes 4 │ one byte for every FDS_AT_ONCE fds │ JSON
//!                                    (big endian)         (the fds beside these)
//! ```
//!
//! What stands in the JSON is up to the two programs; [`VERSION`] tells whether they understand
//! each other. Fields may be added without a new version: they are ignored by who does not know
//! them, and have a default for who misses them.
//!
//! **Trust.** Both ends belong to the same user, or to root. **Limits.** [`BYTES_MAX`] bytes and
//! [`FDS_MAX`] fds a message.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::protocol::{Reply, Request};
use crate::server::LINE_MAX;

/// The version of what is said over the connection.
pub const VERSION: u32 = 1;
/// The most bytes of a message.
pub const BYTES_MAX: u32 = 256 << 20;
/// The most fds of a message.
pub const FDS_MAX: u32 = 1 << 20;
/// Fds beside one byte; the kernel takes 253.
const FDS_AT_ONCE: usize = 128;
/// How long the running process may take to answer.
const ANSWER_TIME: Duration = Duration::from_secs(10);
const MAGIC: [u8; 4] = *b"CWHO";
const HEADER: usize = 16;

/// Asks for the running switch. Fields that are not known are ignored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TakeOver {
    /// The hand-over version that the new process speaks.
    pub version: u32,
    /// The new program's own version, for people.
    #[serde(default)]
    pub program: String,
}

/// The answer to [`TakeOver`] of a process that agrees.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// The hand-over version that the running process speaks.
    pub version: u32,
    /// The running program's own version, for people.
    #[serde(default)]
    pub program: String,
    /// The running process.
    pub pid: u32,
}

/// What a message is. In the order in which they are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Old to new: everything, with its fds; the old one goes on serving.
    Offer,
    /// New to old: everything is prepared.
    Ready,
    /// Old to new: it serves no more; where everything stopped.
    State,
    /// New to old: that is understood, nothing runs yet.
    Confirm,
    /// Old to new: go on. From now on the old one touches nothing.
    Leave,
    /// New to old: it runs; the old one may end.
    Running,
    /// Old to new, if there is any: what of the old one's is not to be touched when it has ended.
    Rest,
    /// Either way, instead of the next one: it goes no further, and why.
    Abort,
}

impl Kind {
    const ALL: [(Self, u8); 8] = [
        (Self::Offer, b'O'),
        (Self::Ready, b'R'),
        (Self::State, b'S'),
        (Self::Confirm, b'C'),
        (Self::Leave, b'L'),
        (Self::Running, b'U'),
        (Self::Rest, b'E'),
        (Self::Abort, b'A'),
    ];

    fn byte(self) -> u8 {
        Self::ALL.iter().find(|(kind, _)| *kind == self).map_or(0, |(_, byte)| *byte)
    }
}

/// Why a message did not come or go.
#[derive(Debug, thiserror::Error)]
pub enum HandoverError {
    /// The other process is gone.
    #[error("the other process went away")]
    Gone,
    /// The other process says why it goes no further.
    #[error("{0}")]
    Aborted(String),
    /// It took too long.
    #[error("the other process took too long")]
    Late,
    /// Something else than what was due.
    #[error("the other process said something else than what was due")]
    Unexpected,
    /// A message beyond the limits.
    #[error("a message of {bytes} bytes and {fds} fds is too large")]
    TooLarge {
        /// Its bytes.
        bytes: u64,
        /// Its fds.
        fds: u64,
    },
    /// A message that cannot be read.
    #[error("the other process's state cannot be read: {0}")]
    Unreadable(#[from] serde_json::Error),
    /// The kernel's answer.
    #[error("the connection failed: {0}")]
    Io(io::Error),
}

impl From<io::Error> for HandoverError {
    fn from(error: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, TimedOut, UnexpectedEof, WouldBlock};
        let is = |kinds: &[io::ErrorKind]| kinds.contains(&error.kind());
        if is(&[WouldBlock, TimedOut]) {
            Self::Late
        } else if is(&[UnexpectedEof, BrokenPipe, ConnectionReset]) {
            Self::Gone
        } else {
            Self::Io(error)
        }
    }
}

impl From<rustix::io::Errno> for HandoverError {
    fn from(error: rustix::io::Errno) -> Self {
        io::Error::from(error).into()
    }
}

/// One end of the connection. Every call waits, but not for ever.
#[derive(Debug)]
pub struct Channel {
    stream: UnixStream,
}

/// What a message without content carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Nothing {}

#[derive(Debug, Serialize, Deserialize)]
struct Reason {
    reason: String,
}

impl Channel {
    /// Goes on with the connection on which [`TakeOver`] was agreed.
    ///
    /// # Errors
    ///
    /// The socket cannot be made to wait.
    pub fn new(stream: UnixStream) -> io::Result<Self> {
        stream.set_nonblocking(false)?;
        Ok(Self { stream })
    }

    /// How long each call waits for the other process from now on.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    pub fn patience(&self, time: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(time))?;
        self.stream.set_write_timeout(Some(time))
    }

    /// Sends a message without fds.
    ///
    /// # Errors
    ///
    /// [`HandoverError`] if the other process does not take it.
    pub fn send(&mut self, kind: Kind, content: &impl Serialize) -> Result<(), HandoverError> {
        self.send_with(kind, content, &[])
    }

    /// Sends a message with fds.
    ///
    /// # Errors
    ///
    /// See [`Self::send`].
    pub fn send_with(
        &mut self,
        kind: Kind,
        content: &impl Serialize,
        fds: &[OwnedFd],
    ) -> Result<(), HandoverError> {
        let bytes = serde_json::to_vec(content)?;
        let too_large = HandoverError::TooLarge {
            bytes: u64::try_from(bytes.len()).unwrap_or(u64::MAX),
            fds: u64::try_from(fds.len()).unwrap_or(u64::MAX),
        };
        let (Ok(byte_count), Ok(fd_count)) = (u32::try_from(bytes.len()), u32::try_from(fds.len()))
        else {
            return Err(too_large);
        };
        if byte_count > BYTES_MAX || fd_count > FDS_MAX {
            return Err(too_large);
        }
        let mut message = Vec::with_capacity(HEADER.saturating_add(bytes.len()));
        message.extend_from_slice(&MAGIC);
        message.extend_from_slice(&[kind.byte(), 0, 0, 0]);
        message.extend_from_slice(&fd_count.to_be_bytes());
        message.extend_from_slice(&byte_count.to_be_bytes());
        if fds.is_empty() {
            // One write for small messages: every wake-up counts while nobody serves.
            message.extend_from_slice(&bytes);
            return Ok(self.stream.write_all(&message)?);
        }
        self.stream.write_all(&message)?;
        for some in fds.chunks(FDS_AT_ONCE) {
            self.send_fds(some)?;
        }
        Ok(self.stream.write_all(&bytes)?)
    }

    fn send_fds(&self, fds: &[OwnedFd]) -> Result<(), HandoverError> {
        let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_AT_ONCE))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
            return Err(HandoverError::Unexpected);
        }
        loop {
            match sendmsg(&self.stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL) {
                Ok(_) => return Ok(()),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for a message of `kind`, with the fds that came with it.
    ///
    /// # Errors
    ///
    /// [`HandoverError`] if another one comes, or none.
    pub fn receive<T: DeserializeOwned>(
        &mut self,
        kind: Kind,
    ) -> Result<(T, Vec<OwnedFd>), HandoverError> {
        let mut head = [0; HEADER];
        self.stream.read_exact(&mut head)?;
        let [m0, m1, m2, m3, byte, _, _, _, f0, f1, f2, f3, b0, b1, b2, b3] = head;
        let (fds, bytes) =
            (u32::from_be_bytes([f0, f1, f2, f3]), u32::from_be_bytes([b0, b1, b2, b3]));
        if [m0, m1, m2, m3] != MAGIC {
            return Err(HandoverError::Unexpected);
        }
        if bytes > BYTES_MAX || fds > FDS_MAX {
            return Err(HandoverError::TooLarge { bytes: bytes.into(), fds: fds.into() });
        }
        let count = usize::try_from(fds).unwrap_or(0);
        let mut beside = Vec::new();
        while beside.len() < count {
            self.receive_fds(&mut beside)?;
        }
        // As it comes, not as it claims: memory is taken for what arrived only.
        let mut content = Vec::new();
        let whole = usize::try_from(bytes).unwrap_or(0);
        let _ = (&mut self.stream).take(u64::from(bytes)).read_to_end(&mut content)?;
        if content.len() < whole {
            return Err(HandoverError::Gone);
        }
        if byte == Kind::Abort.byte() {
            return Err(HandoverError::Aborted(serde_json::from_slice::<Reason>(&content)?.reason));
        }
        if byte != kind.byte() {
            return Err(HandoverError::Unexpected);
        }
        Ok((serde_json::from_slice(&content)?, beside))
    }

    fn receive_fds(&self, to: &mut Vec<OwnedFd>) -> Result<(), HandoverError> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_AT_ONCE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let mut parts = [IoSliceMut::new(&mut byte)];
        let got = loop {
            match recvmsg(&self.stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC) {
                Ok(got) => break got,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        let before = to.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                to.extend(fds);
            }
        }
        if got.flags.contains(ReturnFlags::CTRUNC) {
            let text = "not all file descriptors arrived: the limit of open files is too low";
            return Err(HandoverError::Io(io::Error::other(text)));
        }
        if got.bytes == 0 || to.len() == before {
            return Err(HandoverError::Gone);
        }
        Ok(())
    }

    /// Says why it goes no further. The other process may be gone already.
    pub fn abort(&mut self, reason: &str) {
        let _ = self.send(Kind::Abort, &Reason { reason: reason.to_owned() });
    }

    /// Whether the other process has closed its end, which it does when it has let go of all that
    /// it had, or ends.
    pub fn is_closed(&self) -> bool {
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(&self.stream, &mut [0u8; 1], flags) {
            Ok((_, count)) => count == 0,
            Err(error) => error == rustix::io::Errno::CONNRESET,
        }
    }
}

/// Asks the process whose control socket is `path` for its switch.
///
/// # Errors
///
/// A sentence that says why it is not to be had.
pub fn ask(path: &Path, request: &TakeOver) -> Result<(Agreed, Channel), String> {
    let shown = path.display();
    let stream = UnixStream::connect(path).map_err(|error| {
        format!("cannot reach the switch at {shown}: {error}; does `causeway run` run?")
    })?;
    let failed = |error: io::Error| format!("no answer from the switch at {shown}: {error}");
    let (reply, channel) = ask_on(stream, request).map_err(failed)?;
    let value = match reply {
        Reply::Ok(value) => value,
        Reply::Failed(text) => return Err(text),
        Reply::Usage(text) => {
            return Err(format!(
                "the process at {shown} cannot be taken over, its version does not know how: {text}"
            ));
        }
    };
    let agreed = serde_json::from_value(value)
        .map_err(|error| format!("the process at {shown} gave an unknown answer: {error}"))?;
    Ok((agreed, channel))
}

fn ask_on(mut stream: UnixStream, request: &TakeOver) -> io::Result<(Reply, Channel)> {
    stream.set_read_timeout(Some(ANSWER_TIME))?;
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    let mut line = serde_json::to_vec(&Request::TakeOver(request.clone()))?;
    line.push(b'\n');
    stream.write_all(&line)?;
    // Not a byte more than the answer: fds follow it.
    let mut answer = Vec::new();
    let mut byte = [0];
    while !answer.ends_with(b"\n") && answer.len() < LINE_MAX {
        stream.read_exact(&mut byte)?;
        answer.extend_from_slice(&byte);
    }
    Ok((serde_json::from_slice(&answer)?, Channel::new(stream)?))
}

#[cfg(test)]
mod tests;
