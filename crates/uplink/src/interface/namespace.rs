//! The network namespace that an interface is in.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::sys;

use super::InterfaceError;

/// Where `ip netns` has the names.
const FOLDER: &str = "/run/netns";

/// A network namespace, held open: that of this process, or one that has a name.
#[derive(Debug, Clone)]
pub(crate) struct Namespace(Option<Arc<Named>>);

#[derive(Debug)]
struct Named {
    name: String,
    path: PathBuf,
    file: File,
}

impl Namespace {
    /// Opens a namespace: none is that of this process, a name is one of `ip netns`, and what
    /// begins with a slash is a path.
    pub(crate) fn open(netns: Option<&str>) -> Result<Self, InterfaceError> {
        let Some(name) = netns else { return Ok(Self(None)) };
        // An absolute path replaces the folder.
        let path = Path::new(FOLDER).join(name);
        let name = name.to_owned();
        match File::open(&path) {
            Ok(file) => Ok(Self(Some(Arc::new(Named { name, path, file })))),
            Err(error) => Err(InterfaceError::Namespace { name, error }),
        }
    }

    /// A namespace that another process opened; none is that of this process.
    pub(crate) fn from_parts(netns: Option<(String, OwnedFd)>) -> Self {
        Self(netns.map(|(name, fd)| {
            let path = Path::new(FOLDER).join(&name);
            Arc::new(Named { name, path, file: fd.into() })
        }))
    }

    /// The open file that names it; none is that of this process.
    pub(crate) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|named| named.file.as_fd())
    }

    /// Runs `work` inside: in a thread of its own if that is elsewhere.
    pub(crate) fn run<T: Send>(
        &self,
        work: impl FnOnce() -> T + Send,
    ) -> Result<T, InterfaceError> {
        match &self.0 {
            None => Ok(work()),
            Some(named) => sys::in_namespace(&named.file, work).map_err(|error| {
                let what = format!("enter network namespace {}", named.name);
                InterfaceError::needs("CAP_SYS_ADMIN", what, error)
            }),
        }
    }

    /// Whether the name still names the namespace that was opened. A name that cannot be looked at
    /// does: the sandbox hides those of /proc.
    pub(crate) fn is_current(&self) -> bool {
        let Some(named) = &self.0 else { return true };
        match (std::fs::metadata(&named.path), named.file.metadata()) {
            (Ok(now), Ok(then)) => (now.dev(), now.ino()) == (then.dev(), then.ino()),
            (Err(error), _) => !is_gone(&error),
            (_, Err(_)) => true,
        }
    }

    /// Its name; none if it is that of this process.
    pub(crate) fn name(&self) -> Option<&str> {
        self.0.as_ref().map(|named| named.name.as_str())
    }
}

/// Whether there is nothing of that name. The process whose namespace it was is no more: ESRCH.
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR | libc::ESRCH))
}
