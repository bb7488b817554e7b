//! One stream socket that never blocks: half messages in, half replies out.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::sockopt::set_socket_oobinline;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, send, sendmsg,
};

use super::channel::is_other_end;
use super::closer::{Closer, channels, hold, is_large};
use crate::codec::{CodecError, Decoder, Message};
use crate::session::{Gone, Lost, SessionError};

/// The most fds that the kernel hands over at once. All are taken, though no message has so many:
/// those without room the kernel would close here and now, and that may take its time.
const KERNEL_FDS_MAX: usize = 253;

/// How long half a message may wait for its other half, or a reply for its reader. What came with
/// it may be what keeps a connection alive whose front end is gone.
const STALL: Duration = Duration::from_secs(30);

/// Second fds that are kept until the end of a turn: with [`super::closer`]'s loads, fewer than a
/// process keeps apart for what passes through.
const HELD_MAX: usize = 128;

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
    /// Its calls go to very many who wait for them.
    #[error("calls of the front end's rings take very long: too many wait for its eventfds")]
    SlowCalls,
    /// It gave us what would keep the connection open when it is gone.
    #[error("the front end sent its own end of the connection, which could then never end")]
    Snare,
    /// It stopped in the middle of a message, or does not read what it asked for.
    #[error("the front end has let half a message or a reply wait for {} s", STALL.as_secs())]
    Stalled,
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

/// Second fds of what came with messages, to be let go of when nobody needs the first ones.
#[derive(Debug, Default)]
struct Held {
    fds: Vec<OwnedFd>,
    /// Those of channels, and what else goes with them.
    gone: Vec<Gone>,
    /// Bytes of all files.
    bytes: u64,
}

impl Held {
    fn absorb(&mut self, other: &mut Self) {
        self.fds.append(&mut other.fds);
        self.gone.append(&mut other.gone);
        self.bytes = self.bytes.saturating_add(std::mem::take(&mut other.bytes));
    }

    fn take(&mut self) -> Vec<Gone> {
        let Self { fds, mut gone, .. } = std::mem::take(self);
        if !fds.is_empty() {
            gone.push(Gone::Large(Box::new(fds)));
        }
        gone
    }
}

/// A connection to a front end.
#[derive(Debug)]
pub(super) struct Connection {
    stream: OwnedFd,
    decoder: Decoder,
    output: Vec<u8>,
    /// Since when it waits for the front end in the middle of something.
    stalled: Option<Instant>,
    closer: Closer,
    /// Of messages that are complete, since some was let go of, and of the one that is not.
    came: Held,
    comes: Held,
}

impl Connection {
    /// Takes a non-blocking stream.
    pub(super) fn new(stream: OwnedFd, closer: Closer) -> Self {
        inline(&stream);
        Self {
            stream,
            decoder: Decoder::default(),
            output: Vec::new(),
            stalled: None,
            closer,
            came: Held::default(),
            comes: Held::default(),
        }
    }

    /// Ends it, without waiting for what is in it.
    /// Returns what is to be let go of with it.
    pub(super) fn close(mut self) -> Vec<Gone> {
        let gone = self.take_gone();
        self.closer.close_stream(self.stream);
        gone
    }

    /// Lets go of it: it may be another process's now, so it is not shut down.
    pub(super) fn leave(mut self) -> Vec<Gone> {
        let gone = self.take_gone();
        self.closer.close_unread(self.stream);
        gone
    }

    fn take_gone(&mut self) -> Vec<Gone> {
        drop(std::mem::take(&mut self.decoder));
        self.came.absorb(&mut self.comes);
        self.came.take()
    }

    /// A message was handled. What is gone with it, and what it brought, is let go of elsewhere:
    /// now, if that may be much, or at the end of the turn.
    pub(super) fn settle(&mut self, gone: Vec<Gone>) {
        let large = gone.iter().any(|gone| !matches!(gone, Gone::Event(_)));
        self.came.gone.extend(gone);
        if large || is_large(self.came.bytes) || self.came.fds.len() >= HELD_MAX {
            self.end_turn();
        }
    }

    /// What was handled is let go of.
    pub(super) fn end_turn(&mut self) {
        let gone = self.came.take();
        self.closer.release(gone);
    }

    /// Whether so much is to be freed that it is not listened to.
    pub(super) fn is_full(&self) -> bool {
        self.closer.is_full()
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
        let decoder = Decoder::resume(input, fds)?;
        inline(&stream);
        let mut comes = Held { gone: channels(decoder.unfinished().1), ..Held::default() };
        comes.fds = hold(decoder.unfinished().1, &mut comes.bytes);
        let came = Held::default();
        Some(Self { stream, decoder, output, stalled: None, closer, came, comes })
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
            let (fds, channels) = self.closer.sort(fds);
            self.comes.gone.extend(channels);
            self.comes.fds.extend(hold(&fds, &mut self.comes.bytes));
            if fds.iter().any(|fd| is_other_end(fd.as_fd(), self.stream.as_fd())) {
                return Err(Disconnect::Snare);
            }
            // The kernel has closed the fds for which there was no space, or no number.
            if got.flags.contains(ReturnFlags::CTRUNC) {
                return Err(match fds.len() < KERNEL_FDS_MAX {
                    true => Disconnect::Io(Errno::MFILE.into()),
                    false => CodecError::TooManyFds.into(),
                });
            }
            if got.bytes == 0 {
                return Err(self.end());
            }
            if let Some(message) = self.decoder.advance(got.bytes, fds)? {
                self.stalled = None;
                self.came.absorb(&mut self.comes);
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

    /// When it has waited for too long for the front end in the middle of something. While it is
    /// not `listened` to, the rest of a message may be there.
    pub(super) fn stalls_at(&mut self, now: Instant, listened: bool) -> Option<Instant> {
        if self.has_output() || (self.decoder.is_partial() && listened) {
            return self.stalled.get_or_insert(now).checked_add(STALL);
        }
        self.stalled = None;
        None
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

/// Has the kernel hand out what is sent out of band as part of the stream. Otherwise it drops that
/// when the rest is read, and closes the fds that came with it, on the thread that reads.
fn inline(stream: &OwnedFd) {
    // It is there for every socket.
    let _ = set_socket_oobinline(stream, true);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use rustix::fs::{FallocateFlags, MemfdFlags, fallocate, memfd_create};

    use super::*;
    use crate::memory::LARGE;

    #[test]
    fn half_a_message_and_a_reply_may_wait_for_some_time() {
        let (stream, mut front) = UnixStream::pair().unwrap();
        stream.set_nonblocking(true).unwrap();
        let mut connection = Connection::new(stream.into(), Closer::default());
        let start = Instant::now();
        let later = |secs| start + Duration::from_secs(secs);
        assert_eq!(connection.stalls_at(start, true), None);
        let owner = [3u32, 1, 0].map(u32::to_ne_bytes).concat();
        front.write_all(&owner[..5]).unwrap();
        assert!(connection.receive().unwrap().is_none());
        assert_eq!(connection.stalls_at(later(1), true), Some(later(31)));
        assert_eq!(connection.stalls_at(later(29), true), Some(later(31)));
        front.write_all(&owner[5..]).unwrap();
        assert!(connection.receive().unwrap().is_some());
        assert_eq!(connection.stalls_at(later(30), true), None);
        // Nor is it the front end's fault while nobody listens.
        front.write_all(&owner[..5]).unwrap();
        assert!(connection.receive().unwrap().is_none());
        assert_eq!(connection.stalls_at(later(30), true), Some(later(60)));
        assert_eq!(connection.stalls_at(later(31), false), None);
        assert_eq!(connection.stalls_at(later(32), true), Some(later(62)));
        front.write_all(&owner[5..]).unwrap();
        assert!(connection.receive().unwrap().is_some());
        // The next half one begins anew.
        front.write_all(&[&owner[..], &owner[..5]].concat()).unwrap();
        while connection.receive().unwrap().is_some() {}
        assert_eq!(connection.stalls_at(later(40), true), Some(later(70)));
        front.write_all(&owner[5..]).unwrap();
        assert!(connection.receive().unwrap().is_some());

        connection.send(&[7; 1 << 22], None).unwrap();
        assert_eq!(connection.stalls_at(later(50), true), Some(later(80)));
        let mut taken = vec![0; 1 << 20];
        while connection.has_output() {
            let _ = front.read(&mut taken).unwrap();
            connection.flush().unwrap();
        }
        assert_eq!(connection.stalls_at(later(60), true), None);
    }

    /// The kernel hands out what is in band beyond it.
    #[test]
    fn what_is_sent_out_of_band_is_part_of_the_stream() {
        let (stream, mut front) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(stream.into(), Closer::default());
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let fds = [writer.as_fd()];
        assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
        let owner = [3u32, 1, 0].map(u32::to_ne_bytes).concat();
        let _ =
            sendmsg(&front, &[IoSlice::new(&owner[..1])], &mut control, SendFlags::OOB).unwrap();
        drop(writer);
        front.write_all(&owner[1..]).unwrap();
        let message = connection.receive().unwrap().unwrap();
        assert_eq!(message.fds.len(), 1);
        drop(message);
        connection.end_turn();
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
    }

    /// Of a message that has no use for it, too. A small one may have grown when it is closed.
    #[test]
    fn what_came_is_let_go_of_after_its_message_or_turn() {
        let (stream, front) = UnixStream::pair().unwrap();
        let mut connection = Connection::new(stream.into(), Closer::default());
        let file = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        let send = |bytes: &[u8]| {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let fds = [file.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
            let bytes = [IoSlice::new(bytes)];
            let _ = sendmsg(&front, &bytes, &mut control, SendFlags::NOSIGNAL).unwrap();
        };
        let owner = [3u32, 1, 0].map(u32::to_ne_bytes).concat();
        for _ in 0..2 {
            send(&owner);
            drop(connection.receive().unwrap().unwrap());
            connection.settle(Vec::new());
        }
        let held = |of: &Connection| (of.came.fds.len(), of.comes.fds.len());
        assert_eq!(held(&connection), (2, 0), "they may be closed together");
        // Those of a message that is not complete stay, and nothing else.
        send(&owner[..5]);
        assert!(connection.receive().unwrap().is_none());
        assert_eq!(held(&connection), (2, 1));
        connection.end_turn();
        assert_eq!(held(&connection), (0, 1));
        let _ = rustix::io::write(&front, &owner[5..]).unwrap();
        drop(connection.receive().unwrap().unwrap());
        assert_eq!(held(&connection), (1, 0));
        for _ in 1..HELD_MAX {
            assert!(!connection.came.fds.is_empty());
            send(&owner);
            drop(connection.receive().unwrap().unwrap());
            connection.settle(Vec::new());
        }
        assert_eq!(held(&connection), (0, 0), "so many do not wait");
        fallocate(&file, FallocateFlags::empty(), 0, LARGE).unwrap();
        send(&owner);
        drop(connection.receive().unwrap().unwrap());
        connection.settle(Vec::new());
        assert_eq!(held(&connection), (0, 0), "nor so much");
    }
}
