//! The network namespace that an interface is in.

use std::fs::File;
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

    /// Whether the name still names the namespace that was opened.
    pub(crate) fn is_current(&self) -> bool {
        let Some(named) = &self.0 else { return true };
        let (Ok(now), Ok(then)) = (std::fs::metadata(&named.path), named.file.metadata()) else {
            return false;
        };
        (now.dev(), now.ino()) == (then.dev(), then.ino())
    }

    /// Its name; none if it is that of this process.
    pub(crate) fn name(&self) -> Option<&str> {
        self.0.as_ref().map(|named| named.name.as_str())
    }
}
