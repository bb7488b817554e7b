//! A folder for one test's sockets and logs, and the paths of the tree.
//!
//! **Limits** Names are short, because the path of a unix socket ends at 107 bytes.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result};

/// A folder under the system's temporary folder that goes when the value goes, unless the thread
/// panics or [`Scratch::keep`] was called: then its logs stay for who looks for the reason.
#[derive(Debug)]
pub struct Scratch {
    folder: PathBuf,
    keep: bool,
}

impl Scratch {
    /// Makes an empty folder whose name starts with `name`.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn new(name: &str) -> Result<Self> {
        Self::below(&std::env::temp_dir(), name)
    }

    /// The same on tmpfs, where writing costs no more than memory does.
    ///
    /// # Errors
    /// The folder cannot be made.
    pub fn in_memory(name: &str) -> Result<Self> {
        Self::below(Path::new("/dev/shm"), name)
    }

    fn below(root: &Path, name: &str) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // ORDERING: relaxed, a counter that only has to give each caller another number.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("cw-{name}-{}-{count}", std::process::id());
        let folder = root.join(name);
        fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(Self { folder, keep: false })
    }

    /// The path of `name` in the folder.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Leaves the folder where it is and returns its path.
    pub fn keep(&mut self) -> &Path {
        self.keep = true;
        &self.folder
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.keep && !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}

/// The root of the source tree.
#[must_use]
pub fn repository() -> PathBuf {
    // This crate lives in `tests/conformance` of the tree.
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.ancestors().nth(2).unwrap_or(here).to_owned()
}

/// The folder that cargo builds into: `CARGO_TARGET_DIR`, or `target` in the tree.
#[must_use]
pub fn target_folder() -> PathBuf {
    let root = repository();
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}
