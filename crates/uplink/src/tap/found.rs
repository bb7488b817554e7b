//! What a tap that was there before us is given back with.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde::{Deserialize, Serialize};

use crate::sys;

/// How frames stood in a tap before it was ours. All of its queues hold it: dropped with the last
/// of them, so that nobody takes one header for another, it puts that back.
#[derive(Debug)]
pub(super) struct Found {
    fd: OwnedFd,
    header: Header,
    /// The interface is ours to put back.
    owned: Arc<AtomicBool>,
}

/// The header before frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    bytes: i32,
    little_endian: bool,
}

impl Header {
    /// That of the tap that `fd` is a queue of.
    pub(super) fn read(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let (bytes, little_endian) = sys::tun_header(fd)?;
        Ok(Self { bytes, little_endian })
    }
}

impl Found {
    /// Of the tap that `fd` is a queue of; `owned` says whether it is to be put back.
    pub(super) fn new(
        fd: BorrowedFd<'_>,
        header: Header,
        owned: &Arc<AtomicBool>,
    ) -> io::Result<Self> {
        Ok(Self { fd: fd.try_clone_to_owned()?, header, owned: Arc::clone(owned) })
    }

    pub(super) fn header(&self) -> Header {
        self.header
    }
}

impl Drop for Found {
    fn drop(&mut self) {
        // ORDERING: set by who drops the queues, or tells others to.
        if !self.owned.load(Ordering::Relaxed) {
            return;
        }
        let Header { bytes, little_endian } = self.header;
        match sys::tun_set_header(self.fd.as_fd(), (bytes, little_endian), 0) {
            // The interface is gone.
            Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {}
            Err(error) => tracing::warn!(%error, "cannot put back the frame header of a tap"),
            Ok(()) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::process::Command;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use port::OffloadSet;
    use rustix::fs::{Mode, OFlags};

    use super::Header;
    use crate::interface::Namespace;
    use crate::tap::{SINGLE_QUEUE, Tap, TapError, TapSettings, from_parts, open, open_raw, parts};

    const ALL: OffloadSet = OffloadSet::ALL;
    const PATIENCE: Duration = Duration::from_secs(5);

    fn ip(arguments: &[&str]) {
        let status = Command::new("ip").args(arguments).status().unwrap();
        assert!(status.success(), "ip {arguments:?} (as root)");
    }

    /// A namespace with a persistent tap, deleted in the end.
    struct Place(String);

    impl Place {
        fn new() -> Self {
            let place = Self(format!("cw-tap-found-{}", std::process::id()));
            ip(&["netns", "add", &place.0]);
            ip(&["-n", &place.0, "tuntap", "add", "kept0", "mode", "tap"]);
            place
        }

        fn settings(&self) -> TapSettings {
            TapSettings {
                ifname: "kept0".to_owned(),
                queues: 1,
                netns: Some(self.0.clone()),
                offloads: ALL,
            }
        }

        /// The tap, opened; a program that another test starts holds our fds for a moment, too.
        fn taken<T>(&self, open: impl Fn(&TapSettings) -> Result<T, TapError>) -> T {
            let start = Instant::now();
            loop {
                match open(&self.settings()) {
                    Err(TapError::Busy(_)) if start.elapsed() < PATIENCE => {}
                    opened => return opened.unwrap(),
                }
            }
        }

        /// As the next one finds it.
        fn header(&self) -> Header {
            let read = || {
                let flags = OFlags::RDWR | OFlags::CLOEXEC;
                let fd = rustix::fs::open("/dev/net/tun", flags, Mode::empty()).unwrap();
                let attach = || crate::sys::tun_attach(fd.as_fd(), "kept0", SINGLE_QUEUE);
                let start = Instant::now();
                while attach().is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY)) {
                    assert!(start.elapsed() < PATIENCE, "it stays taken");
                }
                Header::read(fd.as_fd()).unwrap()
            };
            Namespace::open(Some(&self.0)).unwrap().run(read).unwrap()
        }
    }

    impl Drop for Place {
        fn drop(&mut self) {
            let _ended = Command::new("ip").args(["netns", "del", &self.0]).status();
        }
    }

    /// The same tap in other hands; the old one is let go.
    fn other_hands(mut tap: Tap) -> Tap {
        let both = tap.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
        let new = from_parts(parts(&tap.link, both).unwrap(), ALL, &[Arc::default()]).unwrap();
        tap.link.leave();
        drop(tap.queues);
        new
    }

    #[test]
    fn the_header_is_put_back_by_the_last_owner() {
        let place = Place::new();
        let before = place.header();
        assert_ne!(before, Header { bytes: 12, little_endian: true });
        let tap = other_hands(place.taken(|settings| open(settings, &[Arc::default()])));
        let (ingress, _) = tap.queues.first().unwrap();
        let now = Header::read(ingress.queue.fd.as_fd()).unwrap();
        assert_eq!(now, Header { bytes: 12, little_endian: true }, "it is the new one's");
        drop(tap);
        assert_eq!(place.header(), before);
        drop(place.taken(open_raw));
        assert_eq!(place.header(), before);
        // Who fails to take it over changes nothing, and who gave it up in order puts it back.
        let mut tap = place.taken(|settings| open(settings, &[Arc::default()]));
        let both = tap.queues.iter_mut().map(|(ingress, egress)| (ingress, egress));
        let taken = parts(&tap.link, both).unwrap();
        drop(from_parts(taken, ALL, &[]).unwrap_err());
        let (ingress, _) = tap.queues.first().unwrap();
        assert_eq!(Header::read(ingress.queue.fd.as_fd()).unwrap(), now);
        drop(tap);
        assert_eq!(place.header(), before);
    }
}
