//! Whose turn it is to run the driver's receive loop: with busy polling the worker's, if the kernel
//! holds back its own.
//!
//! `SO_PREFER_BUSY_POLL` alone polls the driver in our calls, but after each of them the driver
//! may be started by whoever sends, on the sender's CPU. Two settings of the interface hold it back
//! until nobody has polled for a while: `napi_defer_hard_irqs` and `gro_flush_timeout` (Linux,
//! `Documentation/networking/napi.rst`, "IRQ mitigation"). They are set through sysfs, by files
//! that stay open: the sandbox lets no other be opened when it is time to put them back.
//!
//! **Limits.** After `kill -9` the settings stay until somebody opens the interface with busy
//! polling again, and ends in order. Nobody is hurt: a driver that nobody polls is started
//! [`GRO_FLUSH_TIMEOUT_NS`] later, [`DEFER_HARD_IRQS`] times.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;

use rustix::mount::{MountFlags, mount};

use crate::interface::Link;
use crate::parts::{Collected, PartsError, Remaining};
use crate::sys::in_private_mounts;

/// How often a driver's loop that found nothing is started again by a timer.
const DEFER_HARD_IRQS: u64 = 2;
/// The timer.
const GRO_FLUSH_TIMEOUT_NS: u64 = 100_000;

/// The settings in the order in which they are made.
const SETTINGS: [(&str, u64); 2] =
    [("napi_defer_hard_irqs", DEFER_HARD_IRQS), ("gro_flush_timeout", GRO_FLUSH_TIMEOUT_NS)];

/// Settings of an interface that were changed. Dropped, they are as they were.
#[derive(Debug, Default)]
pub(super) struct Deferral {
    changed: Vec<Changed>,
}

#[derive(Debug)]
struct Changed {
    file: File,
    before: u64,
}

impl Deferral {
    /// Makes the settings of `link`, in whose namespace the calling thread is. What somebody else
    /// has set stays, but both as we would set them are what a killed predecessor left.
    pub(super) fn set(link: &Link) -> io::Result<Self> {
        let files = if link.is_here() {
            open_all(&link.name())?
        } else {
            in_private_mounts(|| {
                mount("sysfs", "/sys", "sysfs", MountFlags::empty(), None)?;
                open_all(&link.name())
            })??
        };
        let found = files.iter().map(read).collect::<io::Result<Vec<_>>>()?;
        let left_behind = found.iter().zip(SETTINGS).all(|(found, (_, ours))| *found == ours);
        let mut new = Self::default();
        for ((file, found), (_, value)) in files.into_iter().zip(found).zip(SETTINGS) {
            if found == 0 || left_behind {
                write(&file, value)?;
                new.changed.push(Changed { file, before: 0 });
            }
        }
        Ok(new)
    }

    /// Adds the files to `fds`; what they said before.
    pub(super) fn parts(&self, fds: &mut Collected) -> Result<Vec<u64>, PartsError> {
        self.changed.iter().map(|one| fds.add(&one.file).map(|()| one.before)).collect()
    }

    /// What [`Self::parts`] took apart.
    pub(super) fn from_parts(parts: &[u64], fds: &mut Remaining) -> Result<Self, PartsError> {
        let mut new = Self::default();
        for before in parts {
            match fds.next() {
                Ok(fd) => new.changed.push(Changed { file: fd.into(), before: *before }),
                Err(error) => {
                    // The other process goes on.
                    new.leave();
                    return Err(error);
                }
            }
        }
        Ok(new)
    }

    /// Nothing is put back: another process goes on.
    pub(super) fn leave(&mut self) {
        self.changed.clear();
    }
}

impl Drop for Deferral {
    fn drop(&mut self) {
        for Changed { file, before } in self.changed.iter().rev() {
            match write(file, *before) {
                // The interface is gone.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot put back how the interface's driver is started");
                }
                Ok(()) => {}
            }
        }
    }
}

fn open_all(interface: &str) -> io::Result<Vec<File>> {
    let open = |(setting, _)| {
        let file = format!("/sys/class/net/{interface}/{setting}");
        OpenOptions::new().read(true).write(true).open(file)
    };
    SETTINGS.into_iter().map(open).collect()
}

fn read(file: &File) -> io::Result<u64> {
    let mut bytes = [0; 24];
    let count = file.read_at(&mut bytes, 0)?;
    let text = bytes.get(..count).and_then(|bytes| std::str::from_utf8(bytes).ok());
    text.and_then(|text| text.trim().parse().ok())
        .ok_or_else(|| io::Error::other(format!("{text:?} is no number")))
}

fn write(file: &File, value: u64) -> io::Result<()> {
    file.write_at(value.to_string().as_bytes(), 0).map(drop)
}
