//! A tap or macvtap interface as a port: how guests reach the host, or its network.
//!
//! **Limits.** At most [`QUEUES_MAX`] queues (the kernel's own limit).
//! **Offloads.** The kernel may leave everything to us, checksums and segmentation: what an egress
//! does not take is made up for there. What guests leave undone is passed on to the kernel, which
//! takes all of it but USO before Linux 6.2. [`TapSettings::offloads`] allows less, both ways.

mod error;
mod found;
mod handover;
mod macvtap;
mod offloads;
mod queue;
mod raw;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use port::{OffloadSet, QueueCounters};
use rustix::fs::{Mode, OFlags};

use crate::interface::{Link, Namespace, check_name};
use crate::sys::{self, InterfaceSocket};
use crate::vnet::HEADER;
use found::{Found, Header};

pub use error::TapError;
pub use handover::{from_parts, parts};
pub use offloads::TapOffloads;
pub use queue::{TapEgress, TapIngress};
pub use raw::{RawQueue, RawTap, open_raw};

/// The most queues of an interface.
pub const QUEUES_MAX: u16 = 256;

/// Which interface to open, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapSettings {
    /// The interface: opened if it exists, else made (and gone when it is closed).
    pub ifname: String,
    /// Queue pairs.
    pub queues: u16,
    /// A network namespace: a name as `ip netns` knows it, or a path.
    pub netns: Option<String>,
    /// What may be left undone in both directions, as far as the kernel knows it.
    pub offloads: OffloadSet,
}

/// An open tap. Dropping the link before the queues restores what was changed.
#[derive(Debug)]
pub struct Tap {
    /// The interface.
    pub link: Link,
    /// Both halves of each queue pair.
    pub queues: Vec<(TapIngress, TapEgress)>,
}

impl Tap {
    /// What the kernel leaves to us; none without a queue. To be dropped before the queues.
    pub fn offloads(&self) -> Option<TapOffloads> {
        let (TapIngress { queue, .. }, _) = self.queues.first()?;
        Some(TapOffloads { fd: Arc::clone(&queue.fd), set: queue.takes })
    }
}

/// Opens or makes the interface and brings it up. Each queue pair counts in its own `counters`.
///
/// # Errors
///
/// [`TapError`] says what is missing.
pub fn open(settings: &TapSettings, counters: &[Arc<QueueCounters>]) -> Result<Tap, TapError> {
    check(settings)?;
    if counters.len() != usize::from(settings.queues) {
        return Err(TapError::Queues(settings.queues));
    }
    let namespace = Namespace::open(settings.netns.as_deref())?;
    let Opened { fds, link, found } = namespace.run(|| open_here(settings, &namespace))??;
    let queues = halves(fds, &link, settings.offloads, (counters, found)).map_err(|error| {
        TapError::system(format!("set up the queues of interface {}", settings.ifname), error)
    })?;
    Ok(Tap { link, queues })
}

/// An interface, and the fds of its queues.
struct Opened {
    fds: Vec<OwnedFd>,
    link: Link,
    /// What is to be put back; none if there is nothing.
    found: Option<Arc<Found>>,
}

/// Both halves of the queues behind `fds`; what may be left undone in both directions is `wanted`.
fn halves(
    fds: Vec<OwnedFd>,
    link: &Link,
    wanted: OffloadSet,
    (counters, found): (&[Arc<QueueCounters>], Option<Arc<Found>>),
) -> io::Result<Vec<(TapIngress, TapEgress)>> {
    let name: Arc<str> = link.name().into();
    let mut queues = Vec::with_capacity(fds.len());
    for (fd, counters) in fds.into_iter().zip(counters) {
        let takes = offloads::set(fd.as_fd(), wanted)?;
        let queue = queue::Queue {
            fd: Arc::new(fd),
            name: Arc::clone(&name),
            mtu: Arc::clone(link.mtu()),
            counters: Arc::clone(counters),
            takes,
            found: found.clone(),
        };
        let ingress = TapIngress::new(queue.clone()).map_err(io::Error::other)?;
        queues.push((ingress, TapEgress::new(queue)));
    }
    Ok(queues)
}

fn check(settings: &TapSettings) -> Result<(), TapError> {
    check_name(&settings.ifname)?;
    if settings.queues == 0 || settings.queues > QUEUES_MAX {
        return Err(TapError::Queues(settings.queues));
    }
    Ok(())
}

/// Opens the queues in the namespace of the calling thread.
fn open_here(settings: &TapSettings, namespace: &Namespace) -> Result<Opened, TapError> {
    let name = settings.ifname.as_str();
    let socket = InterfaceSocket::new().map_err(|e| TapError::system("open a socket", e))?;
    let existed = socket
        .index(name)
        .map_err(|e| TapError::system(format!("look for interface {name}"), e))?
        .is_some();
    if existed && let Some((fds, link)) = open_macvtap(settings, namespace)? {
        // What was set is the queues' own.
        return Ok(Opened { fds, link, found: None });
    }
    let mut fds = Vec::with_capacity(usize::from(settings.queues));
    let (mut found, owned) = (None, Arc::new(AtomicBool::new(true)));
    for _ in 0..settings.queues {
        let fd = open_queue(settings, &socket)?;
        if existed && found.is_none() {
            let read = Header::read(fd.as_fd());
            let new = read.and_then(|header| Found::new(fd.as_fd(), header, &owned));
            let what = || format!("ask for the frame header of interface {name}");
            found = Some(Arc::new(new.map_err(|e| TapError::system(what(), e))?));
        }
        set_header(fd.as_fd(), name)?;
        fds.push(fd);
    }
    let mut link = Link::find(namespace, name)?;
    if !existed {
        link.set_made();
    }
    link.set_owned(owned);
    link.bring_up()?;
    Ok(Opened { fds, link, found })
}

/// Opens the queues of a macvtap; none if the interface is none.
fn open_macvtap(
    settings: &TapSettings,
    namespace: &Namespace,
) -> Result<Option<(Vec<OwnedFd>, Link)>, TapError> {
    let name = settings.ifname.as_str();
    let mut link = Link::find(namespace, name)?;
    if !link.facts().is_macvtap {
        return Ok(None);
    }
    let fds = macvtap::open_queues(&link, settings.queues)
        .map_err(|error| TapError::macvtap(name, error))?;
    for fd in &fds {
        sys::tun_attach(fd.as_fd(), name, SINGLE_QUEUE)
            .map_err(|e| TapError::system(format!("attach to macvtap {name}"), e))?;
        set_header(fd.as_fd(), name)?;
    }
    link.bring_up()?;
    Ok(Some((fds, link)))
}

fn open_queue(settings: &TapSettings, socket: &InterfaceSocket) -> Result<OwnedFd, TapError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let open = || rustix::fs::open("/dev/net/tun", flags, Mode::empty());
    let fd = open().map_err(|e| TapError::device(e.into()))?;
    let name = settings.ifname.as_str();
    let attached = if settings.queues > 1 {
        sys::tun_attach(fd.as_fd(), name, MULTI_QUEUE)
    } else {
        // An existing interface that was made for several queues takes one of them too.
        sys::tun_attach(fd.as_fd(), name, SINGLE_QUEUE).or_else(|error| {
            let again = error.raw_os_error() == Some(libc::EINVAL);
            if again { sys::tun_attach(fd.as_fd(), name, MULTI_QUEUE) } else { Err(error) }
        })
    };
    attached.map_err(|error| TapError::attach(settings, socket, error))?;
    Ok(fd)
}

fn set_header(fd: BorrowedFd<'_>, name: &str) -> Result<(), TapError> {
    #[expect(clippy::cast_possible_truncation, clippy::cast_possible_wrap, reason = "12 fits")]
    const HEADER_BYTES: i32 = HEADER as i32;
    sys::tun_set_header(fd, (HEADER_BYTES, true), 0)
        .map_err(|e| TapError::system(format!("set the frame header of interface {name}"), e))
}

#[expect(clippy::cast_possible_truncation, reason = "the kernel's field has 16 bits")]
const SINGLE_QUEUE: i16 = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as i16;
#[expect(clippy::cast_possible_truncation, reason = "the kernel's field has 16 bits")]
const MULTI_QUEUE: i16 = SINGLE_QUEUE | libc::IFF_MULTI_QUEUE as i16;

#[cfg(test)]
mod tests {
    use port::OffloadSet;

    use super::{TapSettings, open};

    fn settings(ifname: &str, queues: u16, netns: Option<&str>) -> TapSettings {
        let (ifname, netns) = (ifname.to_owned(), netns.map(str::to_owned));
        TapSettings { ifname, queues, netns, offloads: OffloadSet::ALL }
    }

    fn message(ifname: &str, queues: u16) -> String {
        open(&settings(ifname, queues, None), &[]).unwrap_err().to_string()
    }

    #[test]
    fn wrong_settings_are_named() {
        let text = "must have 1 to 15 bytes without '/', ':' and white space";
        assert_eq!(message("", 1), format!("interface name \"\" {text}"));
        assert_eq!(
            message("sixteen-bytes-xx", 1),
            format!("interface name \"sixteen-bytes-xx\" {text}")
        );
        assert_eq!(message("a/b", 1), format!("interface name \"a/b\" {text}"));
        assert_eq!(message("t0", 0), "queues 0 must be 1 to 256");
        assert_eq!(message("t0", 257), "queues 257 must be 1 to 256");
    }

    #[test]
    fn a_missing_namespace_is_named() {
        let settings = settings("t0", 1, Some("cw-none"));
        let counters = [std::sync::Arc::default()];
        assert_eq!(
            open(&settings, &counters).unwrap_err().to_string(),
            "network namespace cw-none cannot be opened: No such file or directory (os error 2)"
        );
    }
}
