//! One stream socket that never blocks: half messages in, half replies out.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};

use super::closer::Closer;
use crate::codec::{CodecError, Decoder, Message};
use crate::session::{Lost, SessionError};

/// The most fds that the kernel hands over at once. All are taken, though no message has so many:
/// those without room the kernel would close here and now, and that may take its time.
const KERNEL_FDS_MAX: usize = 253;

/// Why a connection ends.
#[derive(Debug, thiserror::Error)]
pub(super) enum Disconnect {
    /// The front end closed it between two messages.
    #[error("the front end disconnected")]
    Left,
    /// The front end closed it in the middle of a message.
    #[error("the front end disconnected in the middle of a message")]
    Torn,
    /// Somebody wants it to end.
    #[error("{0}")]
    Asked(String),
    /// The front end took memory away that it had shared.
    #[error(
        "the file of {0} lost pages that were shared: it was cut short, or \
         the host has no page left for it"
    )]
    MemoryLost(Lost),
    /// Its fds cannot be closed in a reasonable time.
    #[error("the front end sent fds that take very long to be closed")]
    SlowFds,
    /// It gave us what would keep the connection open when it is gone.
    #[error("the front end's channel could keep its connection from ending")]
    Snare,
    /// A message that cannot be answered with an error.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// The kernel's answer.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
}

impl From<CodecError> for Disconnect {
    fn from(error: CodecError) -> Self {
        Self::Session(error.into())
    }
}

/// A connection to a front end.
#[derive(Debug)]
pub(super) struct Connection {
    stream: OwnedFd,
    decoder: Decoder,
    output: Vec<u8>,
    closer: Closer,
}

impl Connection {
    /// Takes a non-blocking stream.
    pub(super) fn new(stream: OwnedFd, closer: Closer) -> Self {
        Self { stream, decoder: Decoder::default(), output: Vec::new(), closer }
    }

    /// Ends it, without waiting for what is in it.
    pub(super) fn close(self) {
        self.closer.close_stream(self.stream);
    }

    /// A stream of another process, with what it had read of a message and not written of replies.
    /// None if that is not the beginning of a message.
    pub(super) fn adopt(
        stream: OwnedFd,
        input: &[u8],
        fds: Vec<OwnedFd>,
        output: Vec<u8>,
        closer: Closer,
    ) -> Option<Self> {
        Some(Self { stream, decoder: Decoder::resume(input, fds)?, output, closer })
    }

    /// What was read of a message that is not complete, and the fds that came with it.
    pub(super) fn unfinished(&self) -> (Vec<u8>, &[OwnedFd]) {
        self.decoder.unfinished()
    }

    /// What was not written yet.
    pub(super) fn output(&self) -> &[u8] {
        &self.output
    }

    /// The next message if all of it has arrived.
    pub(super) fn receive(&mut self) -> Result<Option<Message>, Disconnect> {
        loop {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(KERNEL_FDS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let mut parts = [IoSliceMut::new(self.decoder.space())];
            let got = match recvmsg(&self.stream, &mut parts, &mut control, flags) {
                Ok(got) => got,
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::INTR) => continue,
                Err(Errno::CONNRESET) => return Err(self.end()),
                Err(error) => return Err(Disconnect::Io(error.into())),
            };
            let fds: Vec<OwnedFd> = control
                .drain()
                .filter_map(|message| {
                    let RecvAncillaryMessage::ScmRights(fds) = message else { return None };
                    Some(fds)
                })
                .flatten()
                .collect();
            let fds = self.closer.sort(fds);
            // The kernel has closed the fds for which there was no space.
            if got.flags.contains(ReturnFlags::CTRUNC) {
                return Err(CodecError::TooManyFds.into());
            }
            if got.bytes == 0 {
                return Err(self.end());
            }
            if let Some(message) = self.decoder.advance(got.bytes, fds)? {
                return Ok(Some(message));
            }
        }
    }

    /// Sends `bytes` after what still waits to be sent, or with an fd when nothing waits.
    pub(super) fn send(&mut self, bytes: &[u8], fd: Option<OwnedFd>) -> Result<(), Disconnect> {
        let Some(fd) = fd else {
            self.output.extend_from_slice(bytes);
            return self.flush();
        };
        // No message is read while a reply waits: this one is the first.
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !control.push(SendAncillaryMessage::ScmRights(&fds)) || self.has_output() {
            return Err(Disconnect::Io(io::ErrorKind::WouldBlock.into()));
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags);
        let count = sent.map_err(|error| Disconnect::Io(error.into()))?;
        self.output.extend_from_slice(bytes.get(count..).unwrap_or_default());
        self.flush()
    }

    /// Sends what the socket takes.
    pub(super) fn flush(&mut self) -> Result<(), Disconnect> {
        while !self.output.is_empty() {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(&self.stream, &self.output, flags) {
                Ok(count) => drop(self.output.drain(..count.min(self.output.len()))),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(self.end()),
                Err(error) => return Err(Disconnect::Io(error.into())),
            }
        }
        Ok(())
    }

    /// Whether something waits to be sent.
    pub(super) fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    fn end(&self) -> Disconnect {
        if self.decoder.is_partial() { Disconnect::Torn } else { Disconnect::Left }
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
