//! What all uplinks have in common: an interface of a network namespace, found by its name,
//! followed by its index, and left as it was found.
//!
//! ```text
//!  Namespace::open(netns) ── run(|| ...) in it ──► Link::find(&namespace, ifname)
//!                                                    ├ bring_up, set_promiscuous (both undone)
//!                                                    ├ index, mtu, queues, driver
//!  control thread: event_fd readable ─► follow() ─►  └ check(): Up, NoCarrier, Down, Gone
//! ```
//!
//! **Limits.** An interface name has at most 15 bytes (the kernel's limit).

mod error;
mod finder;
mod handover;
mod namespace;
mod query;
mod watch;

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use port::OffloadSet;

use crate::sys::{InterfaceSocket, Promiscuous};

pub use error::InterfaceError;
pub use finder::Finder;
pub(crate) use handover::LinkParts;
pub(crate) use namespace::Namespace;
use query::{Facts, Query};
use watch::Watch;

/// What an interface is able to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// It carries frames.
    Up,
    /// It is set up, but its other end or its cable is missing.
    NoCarrier,
    /// Somebody set it down.
    Down,
    /// Somebody deleted it, or moved it to another namespace: it has to be opened anew.
    Gone,
    /// The name of its network namespace is gone, or names another one now: what is open has to
    /// be closed, because it keeps the old namespace alive.
    NamespaceGone,
}

/// An interface that a port holds, found by name and followed by its index, so that a new name
/// does not lose it.
///
/// For who writes an uplink: inside `Namespace::run`, `Link::find` the interface, then `bring_up`
/// and, unless the uplink has a socket of its own for it, `set_promiscuous`; ask for `index`,
/// `mtu`, `queues` and `driver`. Return the link beside the queues. Dropped (before the queues),
/// it undoes what was changed on the interface. What the control thread asks of an open uplink
/// (what the kernel dropped, the mode that was obtained, which stations to take) stands beside the
/// link too, not on the queues: workers have those.
#[derive(Debug)]
pub struct Link {
    namespace: Namespace,
    /// The name that it was opened by.
    ifname: String,
    index: u32,
    socket: InterfaceSocket,
    watch: Watch,
    query: Query,
    promiscuous: Option<Promiscuous>,
    /// It was down, and is to be down again.
    restore_down: bool,
    /// Its driver took tags out of frames, and is to do so again.
    restore_tags: bool,
    made: bool,
    deleted: bool,
    /// What the queues changed is theirs to put back: nobody else goes on.
    owned: Arc<AtomicBool>,
    mtu: Arc<AtomicU32>,
    carrier: Arc<AtomicBool>,
    cuts: Arc<Cuts>,
}

/// Which large frames a device takes: past its queueing discipline the kernel drops the others.
#[derive(Debug)]
pub(crate) struct Cuts {
    tcp: AtomicBool,
    udp: AtomicBool,
}

impl Default for Cuts {
    /// All.
    fn default() -> Self {
        Self { tcp: AtomicBool::new(true), udp: AtomicBool::new(true) }
    }
}

impl Cuts {
    /// What the device said; who does not say anything takes all.
    fn set(&self, said: io::Result<(bool, bool)>) {
        let (tcp, udp) = said.unwrap_or((true, true));
        // ORDERING: two hints: a frame beside a change may see either of each.
        self.tcp.store(tcp, Ordering::Relaxed);
        self.udp.store(udp, Ordering::Relaxed);
    }

    /// Those of `most` that the device takes.
    #[inline]
    pub(crate) fn of(&self, most: OffloadSet) -> OffloadSet {
        // ORDERING: as in `set`.
        let (tcp, udp) = (self.tcp.load(Ordering::Relaxed), self.udp.load(Ordering::Relaxed));
        let OffloadSet { csum, tso4, tso6, ecn, uso } = most;
        OffloadSet { csum, tso4: tso4 && tcp, tso6: tso6 && tcp, ecn: ecn && tcp, uso: uso && udp }
    }
}

impl Link {
    /// Finds an interface of `namespace`, in which the calling thread has to be.
    pub(crate) fn find(namespace: &Namespace, ifname: &str) -> Result<Self, InterfaceError> {
        check_name(ifname)?;
        // Watched before it is looked at, so that no change falls between the two.
        let watch = Watch::open().map_err(|e| InterfaceError::system("watch interfaces", e))?;
        let socket =
            InterfaceSocket::new().map_err(|e| InterfaceError::system("open a socket", e))?;
        let query = Query::open().map_err(|e| InterfaceError::system("ask for interfaces", e))?;
        let index = socket
            .index(ifname)
            .map_err(|e| InterfaceError::system(format!("look for interface {ifname}"), e))?
            .ok_or_else(|| InterfaceError::missing(ifname, namespace))?;
        let mtu = socket
            .mtu(ifname)
            .map_err(|e| InterfaceError::system(format!("ask for the MTU of {ifname}"), e))?;
        let cuts = Arc::new(Cuts::default());
        cuts.set(socket.cuts(ifname));
        Ok(Self {
            namespace: namespace.clone(),
            ifname: ifname.to_owned(),
            index,
            socket,
            watch,
            query,
            promiscuous: None,
            restore_down: false,
            restore_tags: false,
            made: false,
            deleted: false,
            owned: Arc::new(AtomicBool::new(true)),
            mtu: Arc::new(AtomicU32::new(mtu)),
            carrier: Arc::new(AtomicBool::new(true)),
            cuts,
        })
    }

    /// Says that opening the uplink made the interface: nothing of it has to be restored.
    pub(crate) fn set_made(&mut self) {
        self.made = true;
    }

    /// What tells the queues whether to put back what they changed.
    pub(crate) fn set_owned(&mut self, owned: Arc<AtomicBool>) {
        self.owned = owned;
    }

    /// The same.
    pub(crate) fn owned(&self) -> &Arc<AtomicBool> {
        &self.owned
    }

    /// Sets the interface up, until the link is dropped.
    pub(crate) fn bring_up(&mut self) -> Result<(), InterfaceError> {
        let name = self.name();
        let failed = |e| InterfaceError::system(format!("bring interface {name} up"), e);
        let (was_up, _) = self.socket.is_up(&name).map_err(failed)?;
        if !was_up {
            self.socket.set_up(&name, true).map_err(failed)?;
            self.restore_down = !self.made;
        }
        Ok(())
    }

    /// Leaves VLAN tags within frames, until the link is dropped: an `AF_XDP` socket never sees one
    /// that the driver took out.
    pub(crate) fn leave_tags(&mut self) {
        let (name, (driver, _)) = (self.name(), self.driver());
        if driver == "veth" {
            tracing::warn!(
                interface = name,
                "VLAN tags that the peer leaves to its end of the veth pair are lost: use \
                 `ethtool -K PEER txvlan off` there if it sends tagged frames"
            );
        }
        // Who cannot tell has no such thing.
        if !self.socket.takes_tags(&name).unwrap_or(false) {
            return;
        }
        match self.socket.set_takes_tags(&name, false) {
            Ok(()) => self.restore_tags = true,
            Err(error) => tracing::warn!(
                interface = name,
                %error,
                "its driver takes VLAN tags out of frames, which AF_XDP then does not see: try \
                 `ethtool -K {name} rxvlan off`"
            ),
        }
    }

    /// Makes the interface take frames for all stations, until the link is dropped or the process
    /// ends in whatever way. The calling thread has to be in the interface's namespace.
    ///
    /// # Errors
    ///
    /// The process lacks `CAP_NET_RAW`, or the kernel refuses.
    pub fn set_promiscuous(&mut self) -> Result<(), InterfaceError> {
        let promiscuous = Promiscuous::new(self.index).map_err(|error| {
            let what = format!("make interface {} promiscuous", self.ifname);
            InterfaceError::needs("CAP_NET_RAW", what, error)
        })?;
        self.promiscuous = Some(promiscuous);
        Ok(())
    }

    /// Becomes readable when something happens to an interface of the namespace: call
    /// [`Self::follow`].
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.watch.fd()
    }

    /// Reads what happened to interfaces; true if it may concern this one, or another one that
    /// has its name now.
    pub fn follow(&mut self) -> bool {
        let news = self.watch.read(self.index);
        self.deleted |= news.deleted;
        news.any
    }

    /// Looks at the interface: its state, and for the queues its MTU and whether it has a carrier.
    pub fn check(&self) -> LinkState {
        if !self.namespace.is_current() {
            return LinkState::NamespaceGone;
        }
        let name = match self.socket.name_of(self.index) {
            Ok(Some(name)) if !self.deleted => name,
            Err(_) => return LinkState::Up,
            Ok(_) => return LinkState::Gone,
        };
        if let Ok(mtu) = self.socket.mtu(&name) {
            // ORDERING: the MTU is a number of its own, nothing is published with it.
            self.mtu.store(mtu, Ordering::Relaxed);
        }
        self.cuts.set(self.socket.cuts(&name));
        // Who cannot tell has one. ORDERING: a hint for frames.
        self.carrier.store(self.socket.carrier(&name).unwrap_or(true), Ordering::Relaxed);
        match self.socket.is_up(&name) {
            Ok((true, true)) => LinkState::Up,
            Ok((true, false)) => LinkState::NoCarrier,
            Ok((false, _)) => LinkState::Down,
            Err(error) if is_gone(&error) => LinkState::Gone,
            Err(_) => LinkState::Up,
        }
    }

    /// The interface's name now; the one that it was opened by if it is gone.
    pub fn name(&self) -> String {
        let name = self.socket.name_of(self.index).ok().flatten();
        name.unwrap_or_else(|| self.ifname.clone())
    }

    /// The interface's index in its namespace.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Whether the interface is in the namespace of this process.
    pub(crate) fn is_here(&self) -> bool {
        self.namespace.name().is_none()
    }

    /// Whether opening the uplink made the interface.
    pub fn was_made(&self) -> bool {
        self.made
    }

    /// The MTU in bytes, kept up to date by [`Self::check`].
    pub fn mtu(&self) -> &Arc<AtomicU32> {
        &self.mtu
    }

    /// Whether the kernel would hand frames to the device, kept up to date by [`Self::check`].
    pub(crate) fn carrier(&self) -> &Arc<AtomicBool> {
        &self.carrier
    }

    /// Which large frames the device takes, kept up to date by [`Self::check`].
    pub(crate) fn cuts(&self) -> &Arc<Cuts> {
        &self.cuts
    }

    /// The MTU in bytes, as it was when it was looked at last.
    pub fn current_mtu(&self) -> u32 {
        // ORDERING: a number of its own.
        self.mtu.load(Ordering::Relaxed)
    }

    /// The driver's name, and what it says about its bus; empty if it does not tell.
    pub fn driver(&self) -> (String, String) {
        self.socket.driver(&self.name()).unwrap_or_default()
    }

    /// Frames that were lost on their way out of the interface since it was made. None if it is
    /// unknown.
    pub fn tx_dropped(&self) -> Option<u64> {
        self.facts().dropped.map(|(tx, _)| tx)
    }

    /// Of a tap or macvtap: frames for us that found its queues full, since it was made, and what
    /// the kernel calls that number. Who holds a tap's queues is behind the interface, who holds a
    /// macvtap's before it: there `tx_dropped` are frames of ours that it refused.
    pub fn queue_drops(&self) -> Option<(&'static str, u64)> {
        let facts = self.facts();
        let (tx, rx) = facts.dropped?;
        Some(if facts.is_macvtap { ("rx_dropped", rx) } else { ("tx_dropped", tx) })
    }

    /// Whether it is a macvtap.
    pub fn is_macvtap(&self) -> bool {
        self.facts().is_macvtap
    }

    /// What rtnetlink says; nothing if it does not answer.
    pub(crate) fn facts(&self) -> Facts {
        self.query.ask(self.index).unwrap_or_else(|error| {
            tracing::debug!(interface = self.ifname, %error, "cannot ask for the interface");
            Facts::default()
        })
    }

    /// How many queues receive and how many transmit now; one each if the driver does not tell.
    pub fn queues(&self) -> (u32, u32) {
        let (rx, tx) = self.socket.channels(&self.name()).unwrap_or((1, 1));
        (rx.max(1), tx.max(1))
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if !(self.restore_down || self.restore_tags) || self.deleted {
            return;
        }
        // Another interface may have the name by now: that one is not ours to change.
        let Ok(Some(name)) = self.socket.name_of(self.index) else { return };
        let failed = |what: &str, error: &io::Error| {
            if !is_gone(error) {
                tracing::warn!(interface = name, %error, "cannot {what} again");
            }
        };
        if self.restore_tags
            && let Err(error) = self.socket.set_takes_tags(&name, true)
        {
            failed("let it take VLAN tags out of frames", &error);
        }
        if self.restore_down
            && let Err(error) = self.socket.set_up(&name, false)
        {
            failed("set it down", &error);
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}

/// Whether the kernel can have an interface of that name.
pub(crate) fn check_name(name: &str) -> Result<(), InterfaceError> {
    let bad = |b: u8| b == b'/' || b == b':' || b == b'%' || b == 0 || b.is_ascii_whitespace();
    if name.is_empty() || name.len() > 15 || matches!(name, "." | "..") || name.bytes().any(bad) {
        return Err(InterfaceError::Name(name.to_owned()));
    }
    Ok(())
}
