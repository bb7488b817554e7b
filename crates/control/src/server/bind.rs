//! How the control socket comes into being and goes.
//!
//! ```text
//!  lock NAME.lock ─► is somebody there? ─► bind a short name, 0600 ─► rename to NAME ─► unlock
//! ```
//!
//! The socket is made under another name and moved into place, so that nobody ever meets it with
//! wrong permissions or before it listens. That name is short and reached through the open folder:
//! it needs no room beside a path of full length. A lock file keeps two starts apart; whoever may
//! write in the folder can hold it, so it is tried for a second and not waited for.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags};

/// How often the lock is tried, and the pause between.
const LOCK_TRIES: u32 = 20;
const LOCK_PAUSE: Duration = Duration::from_millis(50);

/// Why there is no control socket.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another process serves it.
    #[error("control socket {path} is held by process {pid}", path = path.display())]
    Live {
        /// The socket.
        path: PathBuf,
        /// Who holds it.
        pid: i32,
    },
    /// Something else is in the place.
    #[error("{} exists and is not a socket", .0.display())]
    NotSocket(PathBuf),
    /// Somebody else starts here, or only holds the lock.
    #[error("lock {} is held by another process: end it, or remove the file", .0.display())]
    Locked(PathBuf),
    /// A call failed.
    #[error("cannot {what} {path}: {error}", path = path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        error: io::Error,
    },
}

/// `/run/causeway/control.sock`, or the place for a user who is not root.
///
/// # Errors
///
/// A sentence, if the user has no runtime folder.
pub fn default_path() -> Result<PathBuf, String> {
    if rustix::process::geteuid().is_root() {
        return Ok(PathBuf::from("/run/causeway/control.sock"));
    }
    std::env::var_os("XDG_RUNTIME_DIR")
        .filter(|folder| !folder.is_empty())
        .map(|folder| Path::new(&folder).join("causeway/control.sock"))
        .ok_or_else(|| "XDG_RUNTIME_DIR is not set: use --control SOCKET".to_owned())
}

/// `/run/causeway/state`, or the place for a user who is not root; none if that user has no runtime
/// folder.
pub fn default_state_dir() -> Option<PathBuf> {
    default_path().ok().map(|socket| socket.with_file_name("state"))
}

pub(super) fn bind(path: &Path) -> Result<(UnixListener, (u64, u64)), BindError> {
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    };
    let failed = |what, path: &Path| {
        let path = path.to_owned();
        move |error| BindError::Io { what, path, error }
    };
    let mut builder = DirBuilder::new();
    let _ = builder.recursive(true).mode(0o755);
    builder.create(folder).map_err(failed("make folder", folder))?;
    let open = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = rustix::fs::open(folder, open, Mode::empty());
    let opened: OwnedFd = opened.map_err(|e| failed("open folder", folder)(e.into()))?;
    // Its limit holds for those who connect.
    let _ = SocketAddr::from_pathname(path).map_err(failed("listen at", path))?;
    let _lock = Lock::take(path)?;
    refuse_live(path)?;
    let inside = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    let own = inside.join(format!(".cw-{}", std::process::id()));
    let _ = fs::remove_file(&own);
    let listener = UnixListener::bind(&own).map_err(failed("listen at", path))?;
    let placed = fs::set_permissions(&own, Permissions::from_mode(0o600))
        .and_then(|()| listener.set_nonblocking(true))
        .and_then(|()| fs::rename(&own, path))
        .and_then(|()| fs::symlink_metadata(path));
    match placed {
        Ok(data) => Ok((listener, (data.dev(), data.ino()))),
        Err(error) => {
            let _ = fs::remove_file(&own);
            Err(failed("listen at", path)(error))
        }
    }
}

/// A locked file beside the socket. It goes with the lock.
struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    fn take(socket: &Path) -> Result<Self, BindError> {
        let mut path = socket.as_os_str().to_owned();
        path.push(".lock");
        let path = PathBuf::from(path);
        for _ in 0..LOCK_TRIES {
            match Self::attempt(&path) {
                Ok(Some(file)) => return Ok(Self { path, _file: file }),
                Ok(None) => std::thread::sleep(LOCK_PAUSE),
                Err(error) => return Err(BindError::Io { what: "lock", path, error }),
            }
        }
        Err(BindError::Locked(path))
    }

    /// The locked file, or `None` if another process has it.
    fn attempt(path: &Path) -> io::Result<Option<File>> {
        let no_link = i32::try_from(OFlags::NOFOLLOW.bits()).unwrap_or(0);
        let mut options = OpenOptions::new();
        let options = options.write(true).create(true).truncate(false).mode(0o600);
        let file = options.custom_flags(no_link).open(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Ok(None),
            Err(errno) => return Err(errno.into()),
        }
        // The process before may have removed this file after it was opened here.
        let ours = file.metadata()?;
        let named = fs::symlink_metadata(path);
        let same = named.is_ok_and(|n| (n.dev(), n.ino()) == (ours.dev(), ours.ino()));
        Ok(same.then_some(file))
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // While it is locked: nobody removes another process's file.
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the lock");
        }
    }
}

fn refuse_live(path: &Path) -> Result<(), BindError> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => {
            return Err(BindError::Io { what: "look at", path: path.to_owned(), error });
        }
        Ok(data) if !data.file_type().is_socket() => {
            return Err(BindError::NotSocket(path.to_owned()));
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path) {
        Ok(stream) => {
            let peer = rustix::net::sockopt::socket_peercred(&stream);
            let pid = peer.map_or(0, |peer| peer.pid.as_raw_nonzero().get());
            Err(BindError::Live { path: path.to_owned(), pid })
        }
        // Nobody listens: it is stale, and the new one replaces it.
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(BindError::Io { what: "connect to", path: path.to_owned(), error }),
    }
}

/// Removes the socket file if it is still the one that was made.
pub(super) fn remove(path: &Path, file: (u64, u64)) {
    let ours = fs::symlink_metadata(path).is_ok_and(|data| (data.dev(), data.ino()) == file);
    if ours && let Err(error) = fs::remove_file(path) {
        tracing::warn!(path = %path.display(), %error, "cannot remove the control socket");
    }
}
