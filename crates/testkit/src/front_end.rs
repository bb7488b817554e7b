//! A vhost-user front end that may say anything: any message, any order, any descriptors.
//!
//! It is written from the specification alone, so that neither a mistake of our codec nor the
//! manners of a well-behaved front end hide what a back end does with such input.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{
    RecvAncillaryBuffer, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg,
    sendmsg,
};

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;
const HEADER: usize = 12;

/// How long a reply may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why there was no reply.
#[derive(Debug, thiserror::Error)]
pub enum FrontEndError {
    /// The socket failed, or the back end closed it.
    #[error(transparent)]
    Socket(#[from] io::Error),
    /// Something that is no reply to what was asked.
    #[error("request {asked} was answered with request {got}, flags {flags:#x}")]
    Reply {
        /// What was asked.
        asked: u32,
        /// What the answer says that it answers.
        got: u32,
        /// Its flags.
        flags: u32,
    },
}

/// The front end's end of a connection.
#[derive(Debug)]
pub struct FrontEnd {
    stream: UnixStream,
}

impl FrontEnd {
    /// Connects to a back end that listens.
    ///
    /// # Errors
    ///
    /// If it does not.
    pub fn connect(path: &Path) -> io::Result<Self> {
        Self::from_stream(UnixStream::connect(path)?)
    }

    /// Speaks over `stream`: an accepted one, or one end of a socket pair.
    ///
    /// # Errors
    ///
    /// If the socket takes no timeout.
    pub fn from_stream(stream: UnixStream) -> io::Result<Self> {
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Self { stream })
    }

    /// The connection.
    pub fn stream(&self) -> &UnixStream {
        &self.stream
    }

    /// Sends bytes as they are, with descriptors.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.send_with(bytes, fds, SendFlags::NOSIGNAL)
    }

    /// The same out of band: a reader of the stream meets neither the last byte nor its fds.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn send_urgent(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<usize> {
        self.send_with(bytes, fds, SendFlags::NOSIGNAL | SendFlags::OOB)
    }

    fn send_with(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd<'_>],
        flags: SendFlags,
    ) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(io::Error::other("more than 253 descriptors"));
        }
        Ok(sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut control, flags)?)
    }

    /// Sends a request.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn send(&mut self, request: u32, body: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        self.send_flags(request, VERSION, body, fds)
    }

    fn send_flags(
        &mut self,
        request: u32,
        flags: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut message = Vec::with_capacity(HEADER.saturating_add(body.len()));
        message.extend_from_slice(&request.to_le_bytes());
        message.extend_from_slice(&flags.to_le_bytes());
        message.extend_from_slice(&u32::try_from(body.len()).unwrap_or(0).to_le_bytes());
        message.extend_from_slice(body);
        self.send_raw(&message, fds).map(|_| ())
    }

    /// Sends a request that has an answer, and waits for it.
    ///
    /// # Errors
    ///
    /// [`FrontEndError`] if none or a wrong one comes.
    pub fn ask(&mut self, request: u32, body: &[u8]) -> Result<Vec<u8>, FrontEndError> {
        self.send(request, body, &[])?;
        self.reply(request)
    }

    /// Sends a request with `NEED_REPLY` and returns whether the back end accepted it.
    ///
    /// # Errors
    ///
    /// [`FrontEndError`] if no answer or a wrong one comes.
    pub fn acknowledged(
        &mut self,
        request: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<bool, FrontEndError> {
        self.send_flags(request, VERSION | NEED_REPLY, body, fds)?;
        Ok(self.reply(request)?.iter().all(|byte| *byte == 0))
    }

    /// Whether the back end has closed the connection, or does so soon.
    pub fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        loop {
            match self.receive(&mut byte) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }

    /// Waits for the reply to a request that was sent.
    ///
    /// # Errors
    ///
    /// [`FrontEndError`] if none or a wrong one comes.
    pub fn reply(&mut self, asked: u32) -> Result<Vec<u8>, FrontEndError> {
        let mut header = [0; HEADER];
        self.receive_exact(&mut header)?;
        let [a, b, c, d, e, f, g, h, i, j, k, l] = header;
        let got = u32::from_le_bytes([a, b, c, d]);
        let flags = u32::from_le_bytes([e, f, g, h]);
        if got != asked || flags != VERSION | REPLY {
            return Err(FrontEndError::Reply { asked, got, flags });
        }
        let mut body = vec![0; u32::from_le_bytes([i, j, k, l]) as usize];
        self.receive_exact(&mut body)?;
        Ok(body)
    }

    /// Fills `out` with what comes next.
    ///
    /// # Errors
    ///
    /// If the socket fails, or the back end closes it before.
    pub fn receive_exact(&mut self, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0usize;
        while let Some(rest) = out.get_mut(done..).filter(|rest| !rest.is_empty()) {
            match self.receive(rest)? {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                count => done = done.saturating_add(count),
            }
        }
        Ok(())
    }

    fn receive(&mut self, out: &mut [u8]) -> io::Result<usize> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = [IoSliceMut::new(out)];
        let got = recvmsg(&self.stream, &mut bytes, &mut control, RecvFlags::CMSG_CLOEXEC)?;
        Ok(got.bytes)
    }
}

/// A file that can be given to a back end as guest memory.
#[derive(Debug)]
pub struct SharedMemory {
    fd: OwnedFd,
    len: u64,
}

impl SharedMemory {
    /// A file of `len` bytes.
    ///
    /// # Errors
    ///
    /// If the kernel refuses it.
    pub fn new(len: u64) -> io::Result<Self> {
        let fd = memfd_create("testkit", MemfdFlags::CLOEXEC)?;
        ftruncate(&fd, len)?;
        Ok(Self { fd, len })
    }

    /// Another one's file of `len` bytes.
    pub fn of(fd: OwnedFd, len: u64) -> Self {
        Self { fd, len }
    }

    /// Its size.
    pub fn bytes(&self) -> u64 {
        self.len
    }

    /// The body of a `SET_MEM_TABLE` with one region that claims `claimed` bytes at guest and
    /// front end address `base`.
    pub fn table(base: u64, claimed: u64) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend_from_slice(&1u32.to_le_bytes());
        body.extend_from_slice(&0u32.to_le_bytes());
        for field in [base, claimed, base, 0] {
            body.extend_from_slice(&field.to_le_bytes());
        }
        body
    }
}

impl AsFd for SharedMemory {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
