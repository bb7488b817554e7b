//! Why an `AF_XDP` uplink could not be opened, in words that say what to do.

use std::io;

use crate::interface::InterfaceError;

use super::umem::NoRoom;

/// Why an `AF_XDP` uplink could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum AfXdpError {
    /// The interface cannot be used at all.
    #[error(transparent)]
    Interface(#[from] InterfaceError),
    /// No queue at all, or more than the device has.
    #[error(
        "interface {name} has {receive} receive and {transmit} transmit queues, {queues} of each \
        were asked for: use queues={} or change the device with `ethtool -L`",
        receive.min(transmit)
    )]
    Queues {
        /// The interface.
        name: String,
        /// What was asked for.
        queues: u16,
        /// What receives.
        receive: u32,
        /// What transmits.
        transmit: u32,
    },
    /// A number of queues that cannot be.
    #[error("queues {0} must be 1 to {max}", max = super::QUEUES_MAX)]
    QueueCount(u16),
    /// Another XDP program is there.
    #[error(
        "interface {name} has an XDP program already: {program}; remove it with \
        `ip link set dev {name} {mode} off`, or let it be replaced with xdp=replace"
    )]
    OtherProgram {
        /// The interface.
        name: String,
        /// The program's id and name.
        program: String,
        /// How it is attached: `xdpdrv`, `xdpgeneric` or `xdpoffload`.
        mode: &'static str,
    },
    /// Another XDP program is there, and cannot be taken away.
    #[error(
        "interface {name} has an XDP program already: {program}, which BPF link {link} of another \
        process holds; it cannot be replaced: end that process"
    )]
    HeldByLink {
        /// The interface.
        name: String,
        /// The program's id and name.
        program: String,
        /// The link's id.
        link: u32,
    },
    /// Another XDP program is there, and we may not see who holds it.
    #[error(
        "interface {name} has an XDP program already: {program} ({mode}); CAP_SYS_ADMIN is needed \
        to see who holds it and to replace it (root has it; a switch in its sandbox, which a port \
        is opened in that comes later, has given it up): end who holds it, or use `--sandbox off`"
    )]
    UnknownHolder {
        /// The interface.
        name: String,
        /// The program's id.
        program: String,
        /// How it is attached.
        mode: &'static str,
    },
    /// Another socket has the queue.
    #[error("queue {queue} of interface {name} is in use by another AF_XDP socket")]
    Busy {
        /// The interface.
        name: String,
        /// The queue.
        queue: u32,
    },
    /// The driver cannot do what the mode asks for.
    #[error("interface {name} (driver {driver}) has no {what}: use mode={instead} or mode=auto")]
    Mode {
        /// The interface.
        name: String,
        /// Its driver.
        driver: String,
        /// What is missing.
        what: &'static str,
        /// What may work.
        instead: &'static str,
    },
    /// Frames of the interface's MTU do not fit.
    #[error(
        "the MTU of interface {name} ({mtu}), or of its peer, is too large for XDP in this mode: \
        use a smaller one or mode=generic"
    )]
    Mtu {
        /// The interface.
        name: String,
        /// Its MTU in bytes.
        mtu: u32,
    },
    /// A veth whose peer transmits on more queues than this end receives on.
    #[error(
        "interface {name} receives on {receive} queues, fewer than its peer transmits on: make \
        them alike with `ethtool -L`, or use mode=generic"
    )]
    PeerQueues {
        /// The interface.
        name: String,
        /// What receives.
        receive: u32,
    },
    /// The kernel refused our own XDP program.
    #[error("cannot load the XDP program: {error}; the verifier says: {log}")]
    Program {
        /// The kernel's answer.
        error: io::Error,
        /// The verifier's log.
        log: String,
    },
    /// The process may not pin as much memory.
    #[error(
        "cannot pin {bytes} bytes for frames of {of}: raise `ulimit -l` or give the process \
        CAP_IPC_LOCK"
    )]
    Locked {
        /// The interface or the UMEM.
        of: String,
        /// What was to be pinned.
        bytes: usize,
    },
    /// The UMEM is full.
    #[error("{0}")]
    NoRoom(NoRoom),
    /// Zero-copy with memory that others share.
    #[error(
        "interface {name} cannot share UMEM {umem} with mode=zero-copy: use mode=copy, or no umem"
    )]
    SharedZeroCopy {
        /// The interface.
        name: String,
        /// The UMEM.
        umem: String,
    },
}

impl AfXdpError {
    /// What needs `CAP_NET_RAW` failed.
    pub(super) fn raw(what: impl Into<String>, error: io::Error) -> Self {
        Self::Interface(InterfaceError::needs("CAP_NET_RAW", what, error))
    }

    /// What needs `CAP_NET_ADMIN` failed.
    pub(super) fn admin(what: impl Into<String>, error: io::Error) -> Self {
        Self::Interface(InterfaceError::system(what, error))
    }

    /// What needs `CAP_BPF` failed.
    pub(super) fn bpf(what: impl Into<String>, error: io::Error) -> Self {
        Self::Interface(InterfaceError::needs("CAP_BPF (with CAP_NET_ADMIN)", what, error))
    }
}
