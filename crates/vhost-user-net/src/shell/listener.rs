//! The server's socket file: made with its final permissions, replaced only if nobody serves it.
//!
//! The socket is bound under a temporary name, gets owner, permissions and backlog there, and is
//! then renamed: whoever finds it under its name may connect at once, and nobody else ever could.
//! A temporary name that is too long for a socket address is reached through its directory's fd.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Gid, Mode, OFlags, chmod, chown, lstat, open, rename, unlink};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    shutdown, socket_with,
};

use super::PortSettings;
use super::reconnect::connect;

/// One front end is served at a time; others wait here until they are sent away.
const BACKLOG: i32 = 8;

/// Why a port cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process serves the socket.
    #[error("{0} is served by another process")]
    Live(PathBuf),
    /// Something else has the socket's name.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// No such group.
    #[error("there is no group {0:?}")]
    NoSuchGroup(String),
    /// The kernel's answer.
    #[error("{what} {path}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The answer.
        error: io::Error,
    },
}

impl OpenError {
    pub(super) fn io(what: &'static str, path: &Path, error: impl Into<io::Error>) -> Self {
        Self::Io { what, path: path.to_owned(), error: error.into() }
    }
}

/// A listening socket and its file.
#[derive(Debug)]
pub(super) struct Listener {
    socket: OwnedFd,
    path: PathBuf,
    /// Device and inode of the file: whether it is still ours.
    file: (u64, u64),
    /// Whether the file is removed with the listener: not as long as another process listens too.
    held: bool,
}

impl Listener {
    pub(super) fn open(settings: &PortSettings) -> Result<Self, OpenError> {
        let path = &settings.socket;
        let group = settings.socket_group.as_deref().map(find_group).transpose()?;
        make_way(path)?;
        let temporary = temporary_name(path);
        let made = Self::make(settings, &temporary, group);
        if made.is_err() {
            let _ = unlink(&temporary);
        }
        made
    }

    fn make(
        settings: &PortSettings,
        temporary: &Path,
        group: Option<Gid>,
    ) -> Result<Self, OpenError> {
        let path = &settings.socket;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(|e| OpenError::io("cannot make a socket for", path, e))?;
        // Nobody could connect to a longer one.
        let _ = SocketAddrUnix::new(path)
            .map_err(|e| OpenError::io("the name is too long:", path, e))?;
        let _ = unlink(temporary);
        bind_in_directory(&socket, temporary).map_err(|e| OpenError::io("cannot make", path, e))?;
        if group.is_some() {
            chown(temporary, None, group)
                .map_err(|e| OpenError::io("cannot set the group of", path, e))?;
        }
        chmod(temporary, Mode::from_raw_mode(settings.socket_mode))
            .map_err(|e| OpenError::io("cannot set the permissions of", path, e))?;
        listen(&socket, BACKLOG).map_err(|e| OpenError::io("cannot listen on", path, e))?;
        let stat = lstat(temporary).map_err(|e| OpenError::io("cannot look at", temporary, e))?;
        rename(temporary, path).map_err(|e| OpenError::io("cannot make", path, e))?;
        Ok(Self { socket, path: path.clone(), file: (stat.st_dev, stat.st_ino), held: true })
    }

    /// The listening socket of another process, to which the file belongs until [`Self::hold`].
    pub(super) fn adopt(socket: OwnedFd, path: &Path, file: (u64, u64)) -> Self {
        Self { socket, path: path.to_owned(), file, held: false }
    }

    /// Whether the file is ours alone from now on, or that of another process.
    pub(super) fn hold(&mut self, held: bool) {
        self.held = held;
    }

    /// Device and inode of the socket's file.
    pub(super) fn file(&self) -> (u64, u64) {
        self.file
    }

    /// Lets nobody in any more, unless another process listens too. Returns whether it did:
    /// connections that wait already can still be accepted.
    pub(super) fn shut(&self) -> bool {
        self.held && shutdown(&self.socket, Shutdown::Both).is_ok()
    }

    /// The next connection, if one waits.
    pub(super) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        match accept_with(&self.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
            Ok(stream) => Ok(Some(stream)),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Somebody may have replaced the file by one of its own.
        if self.held && lstat(&self.path).is_ok_and(|stat| (stat.st_dev, stat.st_ino) == self.file)
        {
            let _ = unlink(&self.path);
        }
    }
}

/// Checks that nobody serves the socket; a stale file may be replaced.
fn make_way(path: &Path) -> Result<(), OpenError> {
    let stat = match lstat(path) {
        Ok(stat) => stat,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(OpenError::io("cannot look at", path, error)),
    };
    if FileType::from_raw_mode(stat.st_mode) != FileType::Socket {
        return Err(OpenError::NotASocket(path.to_owned()));
    }
    match connect(path) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        // A full backlog is one of somebody who is there.
        Ok(_) | Err(Errno::AGAIN) => Err(OpenError::Live(path.to_owned())),
        Err(error) => Err(OpenError::io("cannot find out who serves", path, error)),
    }
}

/// Binds to `path`, which may be longer than a socket address if its last part is short.
fn bind_in_directory(socket: &OwnedFd, path: &Path) -> Result<(), Errno> {
    if let Ok(address) = SocketAddrUnix::new(path) {
        return bind(socket, &address);
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(Errno::NAMETOOLONG);
    };
    let directory =
        open(parent, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut through = PathBuf::from("/proc/self/fd");
    through.push(directory.as_raw_fd().to_string());
    through.push(name);
    bind(socket, &SocketAddrUnix::new(&through)?)
}

/// A name in the same directory: files of one directory can be renamed into each other.
fn temporary_name(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(std::process::id().to_string());
    name.push("~");
    path.with_file_name(name)
}

/// Looks a group up in /etc/group; numbers stand for themselves.
fn find_group(name: &str) -> Result<Gid, OpenError> {
    if let Ok(number) = name.parse() {
        return Ok(Gid::from_raw(number));
    }
    let file = Path::new("/etc/group");
    let text = std::fs::read_to_string(file).map_err(|e| OpenError::io("cannot read", file, e))?;
    let found = text.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(name)).then(|| fields.nth(1)?.parse().ok()).flatten()
    });
    found.map(Gid::from_raw).ok_or_else(|| OpenError::NoSuchGroup(name.to_owned()))
}
