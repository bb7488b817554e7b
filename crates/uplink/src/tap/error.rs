//! Why a tap could not be opened, in words that say what to do.

use std::io;

use crate::interface::InterfaceError;
use crate::sys::InterfaceSocket;

use super::TapSettings;

/// Why a tap could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The kernel has no tun driver, or the container hides it.
    #[error("/dev/net/tun is missing: load the tun module or pass the device to the container")]
    NoDevice,
    /// The process lacks a right.
    #[error("no permission to {what}: CAP_NET_ADMIN is needed (root has it)")]
    Permission {
        /// What was tried.
        what: String,
    },
    /// Somebody else has the interface open.
    #[error("interface {0} is in use by another process")]
    Busy(String),
    /// The interface has another number of queues than asked for.
    #[error(
        "interface {name} exists with one queue, {queues} were asked for: \
        use queues=1 or create it with `ip tuntap add mode tap multi_queue`"
    )]
    SingleQueue {
        /// The interface.
        name: String,
        /// What was asked for.
        queues: u16,
    },
    /// No queue at all, or more than the kernel has.
    #[error("queues {0} must be 1 to {max}", max = super::QUEUES_MAX)]
    Queues(u16),
    /// Others hold queues of it.
    #[error(
        "interface {name} has no {queues} queues left: other processes hold some of its {max}",
        max = super::QUEUES_MAX
    )]
    QueuesTaken {
        /// The interface.
        name: String,
        /// What was asked for.
        queues: u16,
    },
    /// A macvtap, opened by who may not.
    #[error(
        "cannot open the device file of macvtap {name}: {error}; it takes CAP_SYS_ADMIN and \
        CAP_MKNOD (root has them), and in the sandbox only a switch that had a macvtap when it \
        started opens more: let it be there at the start, or use `--sandbox off`"
    )]
    Macvtap {
        /// The interface.
        name: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The interface exists, but as another kind.
    #[error("interface {0} exists and is not a tap")]
    NotTap(String),
    /// The interface or its namespace.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// Anything else.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried on what.
        what: String,
        /// The kernel's answer.
        error: io::Error,
    },
}

impl TapError {
    pub(super) fn system(what: impl Into<String>, error: io::Error) -> Self {
        let what = what.into();
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Permission { what },
            _ => Self::System { what, error },
        }
    }

    /// What `/dev/net/tun` answered when it was opened.
    pub(super) fn device(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Self::NoDevice,
            _ => Self::system("open /dev/net/tun", error),
        }
    }

    /// What came of opening the device file of a macvtap.
    pub(super) fn macvtap(name: &str, error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Macvtap { name: name.to_owned(), error },
            _ => Self::system(format!("open the device file of macvtap {name}"), error),
        }
    }

    /// What TUNSETIFF answered.
    pub(super) fn attach(
        settings: &TapSettings,
        sockets: &InterfaceSocket,
        error: io::Error,
    ) -> Self {
        let name = settings.ifname.clone();
        match error.raw_os_error() {
            Some(libc::EPERM) => Self::Permission { what: format!("attach to interface {name}") },
            Some(libc::EBUSY) => Self::Busy(name),
            Some(libc::E2BIG) => Self::QueuesTaken { name, queues: settings.queues },
            Some(libc::EINVAL) if is_tap(sockets, &name) && settings.queues > 1 => {
                Self::SingleQueue { name, queues: settings.queues }
            }
            Some(libc::EINVAL) if matches!(sockets.index(&name), Ok(Some(_))) => Self::NotTap(name),
            _ => Self::system(format!("attach to interface {name}"), error),
        }
    }
}

/// Whether the interface is a tap, as `ethtool -i` says it.
fn is_tap(sockets: &InterfaceSocket, name: &str) -> bool {
    let driver = sockets.driver(name);
    driver.is_ok_and(|(driver, bus)| driver == "tun" && bus == "tap")
}
