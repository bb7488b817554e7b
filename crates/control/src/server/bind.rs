//! How the control socket comes into being and goes.
//!
//! The socket is made under another name and moved into place, so that nobody ever meets it with
//! wrong permissions or before it listens. A lock on the folder keeps two starts apart.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;

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
    let lock = File::open(folder).map_err(failed("open folder", folder))?;
    rustix::fs::flock(&lock, FlockOperation::LockExclusive)
        .map_err(|e| failed("lock folder", folder)(e.into()))?;
    refuse_live(path)?;
    let own = folder.join(format!(".causeway-{}.sock", std::process::id()));
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
