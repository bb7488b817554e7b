//! Queues of a macvtap, which a device file of its own gives.
//!
//! The file is `/dev/tapN` for the interface with index N, but only its number says which one it
//! is: two namespaces can have interfaces of one index. sysfs, as seen from the interface's
//! namespace, tells the number; a file that is missing or another one's is made in a folder that
//! nobody else sees.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{CWD, Dev, FileType, Mode, OFlags, makedev, mknodat};
use rustix::mount::{MountFlags, mount};

use crate::interface::Link;
use crate::sys::in_private_mounts;

/// Opens queues of the macvtap behind `link`, in whose namespace the calling thread is.
pub(super) fn open_queues(link: &Link, queues: u16) -> io::Result<Vec<OwnedFd>> {
    let (name, index) = (link.name(), link.index());
    let number = if link.is_here() {
        device_number(&name, index)?
    } else {
        in_private_mounts(|| {
            mount("sysfs", "/sys", "sysfs", MountFlags::RDONLY, None)?;
            device_number(&name, index)
        })??
    };
    let file = format!("/dev/tap{index}");
    if std::fs::metadata(&file).is_ok_and(|found| found.rdev() == number) {
        return open_all(&file, queues);
    }
    in_private_mounts(|| {
        mount("tmpfs", "/sys", "tmpfs", MountFlags::NOSUID | MountFlags::NOEXEC, None)?;
        let mode = Mode::RUSR | Mode::WUSR;
        mknodat(CWD, "/sys/tap", FileType::CharacterDevice, mode, number)?;
        open_all("/sys/tap", queues)
    })?
}

/// The number of the device file, as sysfs has it.
fn device_number(name: &str, index: u32) -> io::Result<Dev> {
    let file = format!("/sys/class/net/{name}/macvtap/tap{index}/dev");
    let text = std::fs::read_to_string(Path::new(&file))?;
    let numbers = text.trim().split_once(':');
    let numbers = numbers.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    let (major, minor) = numbers
        .ok_or_else(|| io::Error::other(format!("{file} says {text:?}, not two numbers")))?;
    Ok(makedev(major, minor))
}

fn open_all(file: &str, queues: u16) -> io::Result<Vec<OwnedFd>> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let open = |_| Ok(rustix::fs::open(file, flags, Mode::empty())?);
    (0..queues).map(open).collect()
}
