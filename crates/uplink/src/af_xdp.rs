//! An interface by `AF_XDP`: the fastest way out that leaves the device to the kernel.
//!
//! ```text
//!  driver ─► our XDP program ─► rx ring ──► Frame (head copied, body stays in the UMEM)
//!                                 ▲                     │ release
//!  UMEM (memfd) of all queues     └──── fill ring ◄─────┘
//!  driver ◄── tx ring ◄── private head | body, copied once from the sender's memory
//!     └─────► completion ring ─► the chunk is free again
//! ```
//!
//! **Trust.** Frames came from the network; descriptors from the kernel are checked before use.
//! **Limits.** [`QUEUES_MAX`] queues; 4096 frames of a queue wait to be taken, 1024 to be sent;
//! frames of several chunks (above 1792 bytes) need Linux 6.6.
//! **Large frames** go by a packet socket beside the ring of a veth pair with one transmit queue;
//! elsewhere they are cut by us (`egress`). They come whole from such a pair with
//! [`Mode::Generic`], which [`Mode::Auto`] prefers there: a program in the driver makes the kernel
//! cut whatever its peer sends, at half the speed. How they are to be cut stands before each frame
//! (`program`, `cut`), from Linux 6.9 on.
//! **Not supported.** Zero-copy is there but **untested**: no device for it was at hand. Large
//! frames that a container encapsulates itself and leaves to be cut within.

mod attach;
mod btf;
mod cut;
mod deferral;
mod egress;
mod error;
mod handover;
#[cfg(any(test, fuzzing))]
mod hostile;
mod ingress;
mod layout;
mod program;
mod socket;
mod spare;
#[cfg(test)]
mod testbed;
mod umem;
mod unfinished;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use packet::MacAddr;
use port::{DropReason, QueueCounters};
use serde::{Deserialize, Serialize};

use crate::interface::{Link, Namespace};
use crate::vnet::kernel_is_since;
use attach::{Attachment, Hook};
use deferral::Deferral;
use program::Program;
use socket::{Abilities, Fds, Halves, Ours, Queues};
use umem::{Lease, Umem};

pub use egress::AfXdpEgress;
pub use error::AfXdpError;
pub use handover::{from_parts, parts};
pub use ingress::AfXdpIngress;
pub use program::MACS_MAX;
pub use spare::{SPARES_MAX, keep_spares};
pub use umem::{NoRoom, UMEM_QUEUES_MAX, Umems};

/// Lets `bytes` play the kernel on a queue's rings, for the fuzzer. How many frames came.
#[cfg(fuzzing)]
pub fn play_kernel(bytes: &[u8]) -> usize {
    hostile::play(bytes)
}

/// The most queues of an interface.
pub const QUEUES_MAX: u16 = 64;

/// How frames should come to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// The best that the device can do.
    #[default]
    Auto,
    /// The device writes frames straight into our memory.
    ZeroCopy,
    /// The driver runs our program, and the kernel copies frames.
    Copy,
    /// The kernel runs our program behind the driver, and copies frames: any device can.
    Generic,
}

/// How frames come to us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Obtained {
    /// [`Mode::ZeroCopy`].
    ZeroCopy,
    /// [`Mode::Copy`].
    Copy,
    /// [`Mode::Generic`].
    Generic,
}

impl Obtained {
    /// The name, as the key `mode` has it.
    pub fn name(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zero-copy",
            Self::Copy => "copy",
            Self::Generic => "generic",
        }
    }
}

/// Which frames are for us; the rest is for the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Steer {
    /// All.
    #[default]
    All,
    /// Those for group addresses and for the stations of [`AfXdpControl::set_macs`].
    Mac,
}

/// Which interface to open, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AfXdpSettings {
    /// The interface, which must exist.
    pub ifname: String,
    /// Queue pairs: the first ones of the device.
    pub queues: u16,
    /// How frames should come to us.
    pub mode: Mode,
    /// Another XDP program is replaced, and comes back in the end.
    pub replace: bool,
    /// Which frames are for us.
    pub steer: Steer,
    /// Workers run the driver's receive loop themselves. [`Mode::Auto`] prefers the driver then.
    pub busy_poll: bool,
    /// A network namespace: a name as `ip netns` knows it, or a path.
    pub netns: Option<String>,
    /// The memory for frames is that of this name, which other interfaces share.
    pub umem: Option<String>,
    /// How long a queue that is in use is asked for again, while the caller waits: the kernel lets
    /// go of one that was closed a moment ago behind our back.
    pub patience: Duration,
}

/// An open uplink. Dropping control and link before the queues restores what was changed.
#[derive(Debug)]
pub struct AfXdp {
    /// What was obtained, and what can be asked and set while workers have the queues.
    pub control: AfXdpControl,
    /// The interface.
    pub link: Link,
    /// Both halves of each queue pair.
    pub queues: Vec<(AfXdpIngress, AfXdpEgress)>,
}

/// What the control thread holds of an open uplink: everything of which another process could
/// make it anew. Dropped, it takes the XDP program off the interface.
#[derive(Debug)]
pub struct AfXdpControl {
    attachment: Attachment,
    program: Program,
    umem: Arc<Umem>,
    sockets: Vec<Fds>,
    mode: Obtained,
    can: Abilities,
    deferral: Deferral,
    /// Another process goes on with the queues.
    left: Arc<AtomicBool>,
    /// After the sockets.
    leases: Vec<Arc<Lease>>,
}

/// Frames for one queue that the kernel dropped, since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KernelDrops {
    /// The receive ring was full.
    pub ring_full: u64,
    /// There was no free chunk, or the frame had more parts than the kernel takes.
    pub no_buffer: u64,
    /// Descriptors of ours that the kernel refused: none, unless there is a bug.
    pub refused: u64,
}

impl KernelDrops {
    /// The numbers by the reason that they are counted under.
    pub fn by_reason(&self) -> [(DropReason, u64); 2] {
        [(DropReason::KernelRingFull, self.ring_full), (DropReason::KernelNoBuffer, self.no_buffer)]
    }
}

/// What the kernel counts of one queue, since it was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct KernelCounts {
    /// What it dropped.
    pub drops: KernelDrops,
    /// How often a frame came and the fill ring had no chunk for it.
    pub fill_ring_empty: u64,
    /// How often it looked for frames to send and there were none.
    pub tx_ring_empty: u64,
}

impl KernelCounts {
    /// The numbers by their names.
    pub fn by_name(&self) -> [(&'static str, u64); 5] {
        let KernelDrops { ring_full, no_buffer, refused } = self.drops;
        [
            ("ring_full", ring_full),
            ("no_buffer", no_buffer),
            ("refused", refused),
            ("fill_ring_empty", self.fill_ring_empty),
            ("tx_ring_empty", self.tx_ring_empty),
        ]
    }
}

impl AfXdpControl {
    /// How frames come to us.
    pub fn mode(&self) -> Obtained {
        self.mode
    }

    /// What the kernel dropped so far, by queue.
    ///
    /// # Errors
    ///
    /// The kernel refuses to tell.
    pub fn kernel_drops(&self) -> io::Result<Vec<KernelDrops>> {
        let drops = |socket| socket::counts(socket).map(|counts| counts.drops);
        self.sockets.iter().map(drops).collect()
    }

    /// What the kernel counted so far, by queue.
    ///
    /// # Errors
    ///
    /// The kernel refuses to tell.
    pub fn kernel_counts(&self) -> io::Result<Vec<KernelCounts>> {
        self.sockets.iter().map(socket::counts).collect()
    }

    /// Lets the kernel look at frames that it had no room for: a net below the workers, who sleep
    /// while nothing arrives. To be called now and then.
    pub fn nudge(&self) {
        for socket in &self.sockets {
            let _ = socket.nudge_tx();
        }
    }

    /// Says which stations are attached, for [`Steer::Mac`]; at most [`MACS_MAX`].
    ///
    /// # Errors
    ///
    /// The kernel refuses: too many, or the right is gone.
    pub fn set_macs(&mut self, stations: &[MacAddr]) -> io::Result<()> {
        self.program.set_macs(stations)
    }

    /// Lets go of the interface without undoing what was changed on it: another process goes on.
    pub fn leave(mut self) {
        self.attachment.leave();
        self.deferral.leave();
        // ORDERING: the queues are dropped after this, by this thread or one that it tells to.
        self.left.store(true, Ordering::Relaxed);
    }

    /// The memory of all frames.
    pub fn umem(&self) -> BorrowedFd<'_> {
        self.umem.fd()
    }

    /// The name that other interfaces share it by, if they may.
    pub fn umem_name(&self) -> Option<&str> {
        self.umem.name()
    }

    /// The sockets that receive, by queue.
    pub fn sockets(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.sockets.iter().map(|socket| socket.receive.as_fd())
    }

    /// What keeps the XDP program on the interface.
    pub fn program_link(&self) -> Option<BorrowedFd<'_>> {
        self.attachment.link_fd()
    }
}

impl Drop for AfXdpControl {
    fn drop(&mut self) {
        // ORDERING: a number of its own; `leave` was called by this thread.
        if self.left.load(Ordering::Relaxed) {
            return;
        }
        // A process that was started by this one may hold duplicates of everything for a while: the
        // kernel is to write no more frames into memory that will be another port's.
        for (queue, _) in (0u32..).zip(&self.sockets) {
            let _gone = self.program.clear_socket(queue);
        }
        self.attachment.detach();
        spare::give_back(&self.program);
    }
}

/// Opens an interface and brings it up. Each queue pair counts in its own `counters`; `umems` are
/// what it may share with others of this process.
///
/// # Errors
///
/// [`AfXdpError`] says what is missing.
pub fn open(
    settings: &AfXdpSettings,
    umems: &Umems,
    counters: &[Arc<QueueCounters>],
) -> Result<AfXdp, AfXdpError> {
    let wrong = settings.queues == 0 || settings.queues > QUEUES_MAX;
    if wrong || counters.len() != usize::from(settings.queues) {
        return Err(AfXdpError::QueueCount(settings.queues));
    }
    let namespace = Namespace::open(settings.netns.as_deref())?;
    namespace.run(|| open_here(settings, (&namespace, umems), counters))?
}

/// Opens the interface in the namespace of the calling thread.
fn open_here(
    settings: &AfXdpSettings,
    (namespace, umems): (&Namespace, &Umems),
    counters: &[Arc<QueueCounters>],
) -> Result<AfXdp, AfXdpError> {
    let mut link = Link::find(namespace, &settings.ifname)?;
    let (receive, transmit) = link.queues();
    let (name, queues) = (link.name(), settings.queues);
    if u32::from(queues) > receive.min(transmit) {
        return Err(AfXdpError::Queues { name, queues, receive, transmit });
    }
    if receive > u32::from(queues) {
        tracing::warn!(
            interface = name,
            receive,
            queues,
            "frames of the other receive queues go to the kernel: use queues={receive} or \
             `ethtool -L`"
        );
    }
    // What is refused each second while a port waits comes before what takes much to make.
    let attachment = Attachment::prepare(&link, settings.replace)?;
    let program = program_for(&link, settings)?;
    let attached = memory_for(&name, settings, umems).and_then(|(umem, leases)| {
        let memory = (umems, umem, leases);
        attach((&program, attachment), memory, &mut link, (settings, counters))
    });
    let attached = attached.inspect_err(|_| {
        // As when a port is closed.
        (0..queues.into()).for_each(|queue| drop(program.clear_socket(queue)));
        spare::give_back(&program);
    })?;
    let Attached { attachment, hook, umem, sockets, can, leases, halves } = attached;
    let mode = match hook {
        _ if can.zero_copy => Obtained::ZeroCopy,
        Hook::Native => Obtained::Copy,
        Hook::Generic => Obtained::Generic,
    };
    let (queues, left) = halves;
    let deferral = if settings.busy_poll { defer(&link, hook) } else { Deferral::default() };
    let control =
        AfXdpControl { attachment, program, umem, sockets, mode, can, deferral, left, leases };
    Ok(AfXdp { control, link, queues })
}

/// An interface with the program on it, and its queues.
struct Attached {
    attachment: Attachment,
    hook: Hook,
    umem: Arc<Umem>,
    sockets: Vec<Fds>,
    can: Abilities,
    leases: Vec<Arc<Lease>>,
    halves: Halves,
}

/// Attaches a program to the interface, and opens its queues in the places that it has.
fn attach(
    (program, mut attachment): (&Program, Attachment),
    (umems, umem, leases): (&Umems, Arc<Umem>, Vec<Lease>),
    link: &mut Link,
    (settings, counters): (&AfXdpSettings, &[Arc<QueueCounters>]),
) -> Result<Attached, AfXdpError> {
    let marked = program.cutting.is_some();
    attachment.make_room(link)?;
    link.bring_up()?;
    link.set_promiscuous()?;
    link.leave_tags();
    let hook = attach_best(&mut attachment, program, link, settings.mode)?;
    let opened = Queues::open((umems, &umem, leases), link, settings, (hook, marked))?;
    let can = opened.can;
    let mut sockets = Vec::with_capacity(counters.len());
    for (queue, socket) in (0u32..).zip(opened.sockets()) {
        let name = link.name();
        let failed = |e| AfXdpError::bpf(format!("give queue {queue} of {name} to a socket"), e);
        program.set_socket(queue, &socket.receive).map_err(failed)?;
        sockets.push(socket.clone());
    }
    let ours = sockets.iter().map(|_| Ours::all()).collect();
    let leases = opened.leases().to_vec();
    let halves = opened.into_halves(&umem, link, (counters, ours)).map_err(|error| {
        AfXdpError::raw("divide the memory for frames", io::Error::other(error))
    })?;
    Ok(Attached { attachment, hook, umem, sockets, can, leases, halves })
}

/// Memory for the frames of an interface, and the places of its queues in it.
fn memory_for(
    name: &str,
    settings: &AfXdpSettings,
    umems: &Umems,
) -> Result<(Arc<Umem>, Vec<Lease>), AfXdpError> {
    let queues = settings.queues;
    let umem = match &settings.umem {
        None => Umem::of_interface(name, queues)?,
        Some(umem) if settings.mode == Mode::ZeroCopy => {
            return Err(AfXdpError::SharedZeroCopy { name: name.into(), umem: umem.clone() });
        }
        Some(umem) => umems.get(umem, queues)?,
    };
    let leases = umem.take(name, queues, settings.patience)?;
    Ok((umem, leases))
}

/// Holds the driver back while workers poll it. Where that cannot be, frames come all the same.
fn defer(link: &Link, hook: Hook) -> Deferral {
    let name = link.name();
    if hook == Hook::Generic {
        tracing::warn!(
            interface = name,
            "busy-poll=on does nothing with mode=generic: there is no receive loop of the driver's"
        );
        return Deferral::default();
    }
    let said = |error: &io::Error| {
        tracing::warn!(
            interface = name,
            %error,
            "the driver is polled by workers, and started by senders too: cannot set \
             napi_defer_hard_irqs and gro_flush_timeout of the interface"
        );
    };
    Deferral::set(link).inspect_err(said).unwrap_or_default()
}

/// A program for the interface: one that was kept if large frames should come whole.
fn program_for(link: &Link, settings: &AfXdpSettings) -> Result<Program, AfXdpError> {
    let large = wants_large(link, settings);
    let spare = if large { spare::take(settings.steer) } else { None };
    let program =
        spare.map_or_else(|| Program::load(settings.queues, settings.steer, large), Ok)?;
    if large && program.cutting.is_none() {
        let interface = link.name();
        tracing::warn!(
            interface,
            "large frames do not come whole: it takes CAP_PERFMON and /sys/kernel/btf to load the \
             program that says how they are to be cut, and none was kept"
        );
    }
    Ok(program)
}

/// Whether large frames should come whole: those of a veth pair, where one queue has all of the
/// peer's, unless workers are to run its driver's loop, which has none of them. Since Linux 6.9 a
/// program is shown them in pages; before, as one piece, if there is one.
fn wants_large(link: &Link, settings: &AfXdpSettings) -> bool {
    let mode = matches!(settings.mode, Mode::Auto | Mode::Generic);
    mode && !(settings.busy_poll && settings.mode == Mode::Auto)
        && settings.queues == 1
        && link.queues() == (1, 1)
        && link.driver().0 == "veth"
        && kernel_is_since(6, 9)
}

/// Attaches the program where `mode` wants it, or where the device can.
fn attach_best(
    attachment: &mut Attachment,
    program: &Program,
    link: &Link,
    mode: Mode,
) -> Result<Hook, AfXdpError> {
    let hooks: &[Hook] = match mode {
        Mode::Auto if program.cutting.is_some() => &[Hook::Generic, Hook::Native],
        Mode::Auto => &[Hook::Native, Hook::Generic],
        Mode::ZeroCopy | Mode::Copy => &[Hook::Native],
        Mode::Generic => &[Hook::Generic],
    };
    let mut result = Err(AfXdpError::QueueCount(0));
    for hook in hooks {
        let program = match (hook, &program.cutting) {
            (Hook::Generic, Some(cutting)) => cutting,
            _ => &program.program,
        };
        let attached = attachment.attach(program.as_fd(), link.index(), *hook);
        result = match attached {
            Ok(()) => return Ok(*hook),
            Err(error) => Err(refused(link, *hook, error)),
        };
    }
    result
}

/// Why the program could not be attached.
fn refused(link: &Link, hook: Hook, error: io::Error) -> AfXdpError {
    let name = link.name();
    match (hook, error.raw_os_error()) {
        (Hook::Native, Some(libc::EOPNOTSUPP)) => {
            let (what, instead) = ("XDP of its own", "generic");
            AfXdpError::Mode { name, driver: link.driver().0, what, instead }
        }
        (Hook::Native, Some(libc::ERANGE)) => {
            // ORDERING: a number of its own.
            let mtu = link.mtu().load(Ordering::Relaxed);
            AfXdpError::Mtu { name, mtu }
        }
        (Hook::Native, Some(libc::ENOSPC)) => {
            AfXdpError::PeerQueues { name, receive: link.queues().0 }
        }
        _ => AfXdpError::bpf(format!("attach the XDP program to {name}"), error),
    }
}
