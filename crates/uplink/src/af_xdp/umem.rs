//! The memory of frames, and who has which part of it.
//!
//! ```text
//!  Umems ─ by name ─► Umem: a memfd │ place 0 │ place 1 │ place 2 │ ...
//!                                   └────┬────┴────┬────┴────┬────┘
//!                              port a, queue 0     │        free
//!                                        port b, queue 0
//! ```
//!
//! A place has the chunks of one queue (`layout`). Without a name the memory is one port's own;
//! with one it is shared by all ports of a process that say the name, whatever their interfaces
//! and namespaces. The kernel knows the memory as long as a socket has it: who comes later binds
//! to a socket that is there (`XDP_SHARED_UMEM`), and if those that are there lost their
//! interfaces, it tells the kernel anew. So nobody has to stay because it was the first.
//!
//! A place is free again when its sockets are closed and the kernel is done with what they sent.
//! Most drivers get copies of frames, but some (`IFF_TX_SKB_NO_LINEAR`: virtio-net) get the pages
//! themselves, and read them when the socket is long gone. The rings tell: they stay mapped, and
//! the kernel writes the last completion there before it lets go of the frame. A ring that is
//! mapped keeps its socket bound, so whoever has a name looks now and then ([`Umems::look`]), and
//! who waits for a queue does; of devices that surely get copies, a peer that sits on a frame holds
//! nothing.
//!
//! A successor cannot see the rings of queues that its predecessor closed. So that one waits for
//! them before it goes ([`Umems::drain`]); a place that the kernel is not done with by then is
//! nobody's until the memory goes.
//!
//! **Limits.** The size is fixed when the memory is made; [`UMEM_QUEUES_MAX`] places.
//! **Not supported.** A device that writes into shared memory by itself (zero-copy): nobody can
//! see when it is done with the place of a queue that was closed.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fstat, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::net::sockopt;
use rustix::net::xdp::{XdpUmemReg, XdpUmemRegFlags};
use serde::{Deserialize, Serialize};
use virtq::mem::SharedMap;

use crate::parts::PartsError;
use crate::sys::map::map_fd;
use crate::sys::xdp::Position;

use super::AfXdpError;
use super::layout::{CHUNK, umem_bytes};
use super::socket::METADATA;

/// The most queues of one UMEM: the kernel keeps a note of every chunk for each of them.
pub const UMEM_QUEUES_MAX: u16 = 64;
/// The pause between two looks whether the kernel is done with a place.
const DRAIN_WAIT: Duration = Duration::from_millis(5);
/// How long no frame comes back before the kernel is held to be done with a place, if it may have
/// taken more than it says: less than anybody waits for a queue.
const QUIET_TIME: Duration = Duration::from_millis(30);

/// The UMEMs of a process that have names. A UMEM goes with the last port that says its name.
#[derive(Debug, Clone, Default)]
pub struct Umems(Arc<Mutex<Named>>);

#[derive(Debug, Default)]
struct Named {
    there: BTreeMap<String, Weak<Umem>>,
    rooms: BTreeMap<String, u16>,
}

impl Umems {
    /// Says for how many queues there is room in a UMEM that is made from now on, by its name. One
    /// that is not named here has room for the port that makes it.
    pub fn plan(&self, rooms: BTreeMap<String, u16>) {
        self.named().rooms = rooms;
    }

    /// What another process held when it handed over is free: it has let go of everything. But
    /// not what [`Self::drain`] said there: nobody here can see when the kernel is done with it.
    pub fn settle(&self, kept: &BTreeMap<String, Vec<u32>>) {
        for (name, umem) in &self.named().there {
            let Some(umem) = umem.upgrade() else { continue };
            let kept = kept.get(name).map_or(&[][..], Vec::as_slice);
            for (number, place) in (0..).zip(&mut umem.state().places) {
                if matches!(place, Place::Elsewhere) && !kept.contains(&number) {
                    *place = Place::Free;
                }
            }
        }
    }

    /// Waits for the kernel to be done with queues that were closed, for `patience`. Which places,
    /// by the name of their UMEM, it may be not done with then: a successor leaves them alone.
    pub fn drain(&self, patience: Duration) -> BTreeMap<String, Vec<u32>> {
        let start = Instant::now();
        let there: Vec<_> = self.named().there.values().filter_map(Weak::upgrade).collect();
        let draining = || there.iter().any(|umem| umem.state().look().1 > 0);
        while draining() && start.elapsed() < patience {
            std::thread::sleep(DRAIN_WAIT);
        }
        let left = there.iter().map(|umem| {
            let state = umem.state();
            let open = |place: &Place| matches!(place, Place::Draining(_) | Place::Elsewhere);
            let left = (0..).zip(&state.places).filter(|(_, place)| open(place));
            let left = left.map(|(number, _)| number).collect();
            (umem.name().unwrap_or_default().to_owned(), left)
        });
        left.filter(|(_, places): &(_, Vec<_>)| !places.is_empty()).collect()
    }

    /// Looks which places the kernel is done with, and lets go of their queues: to be called now
    /// and then, and while a queue that is in use is waited for.
    pub fn look(&self) {
        for umem in self.named().there.values().filter_map(Weak::upgrade) {
            let _ = umem.state().look();
        }
    }

    /// The UMEM of that name; a new one has room for `queues` queues at least.
    pub(super) fn get(&self, name: &str, queues: u16) -> Result<Arc<Umem>, AfXdpError> {
        let mut named = self.named();
        if let Some(umem) = named.there.get(name).and_then(Weak::upgrade) {
            return Ok(umem);
        }
        let planned = named.rooms.get(name).copied().unwrap_or(queues);
        let room = planned.clamp(queues, UMEM_QUEUES_MAX.max(queues));
        let umem = Umem::make(Of::Name(name.to_owned()), room)?;
        named.keep(name, &umem);
        Ok(umem)
    }

    /// The UMEM that another process had, whose memory `fd` is.
    pub(super) fn adopt(&self, shared: &Shared, fd: OwnedFd) -> Result<Arc<Umem>, PartsError> {
        let failed = |error| PartsError::System { what: "map a UMEM", error };
        let mut named = self.named();
        if let Some(umem) = named.there.get(&shared.name).and_then(Weak::upgrade) {
            let file = |fd: &OwnedFd| fstat(fd).map(|stat| (stat.st_dev, stat.st_ino));
            let same = file(&fd).and_then(|new| Ok(new == file(&umem.fd)?));
            return match same.map_err(|error| failed(error.into()))? {
                true => Ok(umem),
                false => Err(PartsError::state(format!("another UMEM {} is here", shared.name))),
            };
        }
        let of = Of::Name(shared.name.clone());
        let umem = Umem::map(of, fd, shared.room).map_err(failed)?;
        for place in &shared.others {
            umem.state().set(*place, Place::Elsewhere);
        }
        named.keep(&shared.name, &umem);
        Ok(umem)
    }

    fn named(&self) -> MutexGuard<'_, Named> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Named {
    fn keep(&mut self, name: &str, umem: &Arc<Umem>) {
        self.there.retain(|_, umem| umem.strong_count() > 0);
        let _ = self.there.insert(name.to_owned(), Arc::downgrade(umem));
    }
}

/// Whose memory it is.
#[derive(Debug)]
pub(super) enum Of {
    /// One interface's own.
    Interface(String),
    /// That of all ports that say the name.
    Name(String),
}

/// The memory of frames.
#[derive(Debug)]
pub(super) struct Umem {
    of: Of,
    fd: OwnedFd,
    map: SharedMap,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    places: Vec<Place>,
    /// Sockets that were bound to the memory.
    sockets: Vec<Weak<OwnedFd>>,
    knows: Option<Knows>,
    /// How often the kernel was told of the memory: each time it pins it.
    told: u32,
}

/// What a place is.
#[derive(Debug)]
enum Place {
    Free,
    Used,
    /// The queue is closed, and the kernel still has frames of it.
    Draining(InFlight),
    /// Another process had it when it handed over.
    Elsewhere,
}

/// What the kernel knows of the memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Knows {
    /// Frames to send have metadata.
    pub(super) metadata: bool,
    /// Frames can have several chunks.
    pub(super) spread: bool,
}

impl Umem {
    /// Memory for all queues of an interface.
    pub(super) fn of_interface(name: &str, queues: u16) -> Result<Arc<Self>, AfXdpError> {
        Self::make(Of::Interface(name.to_owned()), queues)
    }

    fn make(of: Of, room: u16) -> Result<Arc<Self>, AfXdpError> {
        let made = || -> io::Result<OwnedFd> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let fd = memfd_create("causeway-umem", flags)?;
            ftruncate(&fd, umem_bytes(room))?;
            // Whoever gets the fd cannot take the memory away from under us.
            fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
            Ok(fd)
        };
        let what = format!("make the memory for frames of {}", of.text());
        made().and_then(|fd| Self::map(of, fd, room)).map_err(|error| AfXdpError::raw(what, error))
    }

    /// Maps the memory of `room` queues, which another process may have made.
    pub(super) fn map(of: Of, fd: OwnedFd, room: u16) -> io::Result<Arc<Self>> {
        let len = usize::try_from(umem_bytes(room)).unwrap_or(usize::MAX);
        // Behind a file's end there is nothing to touch.
        if usize::try_from(fstat(&fd)?.st_size).unwrap_or(0) < len {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let map = map_fd(fd.as_fd(), len, 0, true)?;
        let places = (0..room).map(|_| Place::Free).collect();
        let state = Mutex::new(State { places, sockets: Vec::new(), knows: None, told: 0 });
        Ok(Arc::new(Self { of, fd, map, state }))
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(super) fn memory(&self) -> &SharedMap {
        &self.map
    }

    /// The name that ports share it by.
    pub(super) fn name(&self) -> Option<&str> {
        match &self.of {
            Of::Interface(_) => None,
            Of::Name(name) => Some(name),
        }
    }

    /// Places for the queues of an interface; those that the kernel still has something of are
    /// waited for, for `patience`.
    pub(super) fn take(
        self: &Arc<Self>,
        interface: &str,
        queues: u16,
        patience: Duration,
    ) -> Result<Vec<Lease>, AfXdpError> {
        let start = Instant::now();
        loop {
            let mut state = self.state();
            let (free, draining) = state.look();
            if let Some(found) = free.get(..usize::from(queues)) {
                found.iter().for_each(|place| state.set(*place, Place::Used));
                drop(state);
                return Ok(found.iter().map(|place| Lease::of(self, *place)).collect());
            }
            if draining == 0 || start.elapsed() >= patience {
                let (room, free) = (state.places.len(), free.len());
                let name = self.name().unwrap_or(interface).to_owned();
                let interface = interface.to_owned();
                let full = NoRoom { name, interface, room, free, draining, queues };
                return Err(AfXdpError::NoRoom(full));
            }
            drop(state);
            std::thread::sleep(DRAIN_WAIT);
        }
    }

    /// The places that an uplink had in another process.
    pub(super) fn claim(self: &Arc<Self>, places: &[u32]) -> Result<Vec<Lease>, PartsError> {
        let mut leases = Vec::with_capacity(places.len());
        for place in places {
            let mut state = self.state();
            if !matches!(state.get(*place), Some(Place::Free | Place::Elsewhere)) {
                let text = format!("place {place} of its UMEM does not exist or is in use");
                return Err(PartsError::state(text));
            }
            state.set(*place, Place::Used);
            drop(state);
            leases.push(Lease::of(self, *place));
        }
        Ok(leases)
    }

    /// What another process has to know, if the memory is shared; `leases` are what it gets.
    pub(super) fn shared(&self, leases: &[Arc<Lease>]) -> Option<Shared> {
        let places: Vec<u32> = leases.iter().map(|lease| lease.place).collect();
        let state = self.state();
        let held = (0..)
            .zip(&state.places)
            .filter(|(place, is)| !matches!(is, Place::Free) && !places.contains(place));
        let others = held.map(|(place, _)| place).collect();
        let room = u16::try_from(state.places.len()).unwrap_or(u16::MAX);
        Some(Shared { name: self.name()?.to_owned(), room, places, others })
    }

    /// Sockets that were bound to the memory and are not closed.
    pub(super) fn sockets(&self) -> Vec<Arc<OwnedFd>> {
        self.state().sockets.iter().filter_map(Weak::upgrade).collect()
    }

    /// A socket is bound to the memory.
    pub(super) fn bound(&self, socket: &Arc<OwnedFd>) {
        let mut state = self.state();
        state.sockets.retain(|socket| socket.strong_count() > 0);
        state.sockets.push(Arc::downgrade(socket));
    }

    /// What the kernel knows of it, if it knows it at all.
    pub(super) fn knows(&self) -> Option<Knows> {
        self.state().knows
    }

    pub(super) fn set_knows(&self, knows: Knows) {
        self.state().knows = Some(knows);
    }

    /// Makes `socket` the owner of the memory. Returns whether frames to send have metadata.
    pub(super) fn register(&self, socket: &OwnedFd) -> Result<bool, AfXdpError> {
        let mut state = self.state();
        state.told = state.told.saturating_add(1);
        drop(state);
        let plain = XdpUmemReg {
            addr: self.map.as_ptr().expose_provenance() as u64,
            len: self.map.len() as u64,
            chunk_size: CHUNK,
            headroom: 0,
            flags: XdpUmemRegFlags::empty(),
            tx_metadata_len: 0,
        };
        let flags = XdpUmemRegFlags::from_bits_retain(libc::XDP_UMEM_TX_METADATA_LEN);
        let with_metadata = XdpUmemReg { flags, tx_metadata_len: METADATA, ..plain };
        // Before Linux 6.11 frames have no metadata.
        let registered = match sockopt::set_xdp_umem_reg(socket, with_metadata) {
            Ok(()) => Ok(true),
            Err(Errno::INVAL) => sockopt::set_xdp_umem_reg(socket, plain).map(|()| false),
            Err(error) => Err(error),
        };
        registered.map_err(|error| match error {
            Errno::NOBUFS | Errno::NOMEM => {
                AfXdpError::Locked { of: self.of.text(), bytes: self.map.len() }
            }
            error => {
                let what = format!("register the memory for frames of {}", self.of.text());
                AfXdpError::raw(what, error.into())
            }
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Of {
    fn text(&self) -> String {
        match self {
            Self::Interface(name) => format!("interface {name}"),
            Self::Name(name) => format!("UMEM {name}"),
        }
    }
}

impl State {
    fn get(&self, place: u32) -> Option<&Place> {
        self.places.get(usize::try_from(place).ok()?)
    }

    fn set(&mut self, place: u32, is: Place) {
        let at = usize::try_from(place).unwrap_or(usize::MAX);
        if let Some(it) = self.places.get_mut(at) {
            *it = is;
        }
    }

    /// The places that are free, with those that the kernel is done with by now, and how many it
    /// is not done with.
    fn look(&mut self) -> (Vec<u32>, usize) {
        let (mut free, mut draining) = (Vec::new(), 0usize);
        for (number, place) in (0..).zip(&mut self.places) {
            if let Place::Draining(frames) = place {
                if frames.are_back(Instant::now()) {
                    *place = Place::Free;
                } else {
                    draining = draining.saturating_add(1);
                }
            }
            if let Place::Free = place {
                free.push(number);
            }
        }
        (free, draining)
    }
}

/// A place that is in use; dropped after the sockets of its queue.
#[derive(Debug)]
pub(super) struct Lease {
    umem: Arc<Umem>,
    pub(super) place: u32,
    in_flight: OnceLock<InFlight>,
}

impl Lease {
    fn of(umem: &Arc<Umem>, place: u32) -> Self {
        Self { umem: Arc::clone(umem), place, in_flight: OnceLock::new() }
    }

    /// What tells when the kernel is done with the place.
    pub(super) fn watch(&self, in_flight: InFlight) {
        let _first = self.in_flight.set(in_flight);
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut in_flight = self.in_flight.take();
        let in_flight = in_flight.take_if(|frames| !frames.are_back(Instant::now()));
        let is = in_flight.map_or(Place::Free, Place::Draining);
        self.umem.state().set(self.place, is);
    }
}

/// Chunks that the kernel took to send, and may not have given back yet.
#[derive(Debug)]
pub(super) struct InFlight {
    /// How far we were in the ring of frames to send.
    put: Position,
    /// How far the kernel is there.
    taken: Position,
    /// How far it is in the completion ring.
    done: Position,
    /// Where that was when a frame came back last, as far as anybody looked.
    last: Option<(u32, Instant)>,
}

impl InFlight {
    pub(super) fn new((put, taken): (Position, Position), done: Position) -> Self {
        Self { put, taken, done, last: None }
    }

    /// Whether the kernel has given all of them back by `now`.
    ///
    /// It may have taken more than it says: before Linux 6.17, when a call ends with an error, it
    /// says so with the next call, which never comes if the queue is closed. Then as many as it
    /// says have come back, or more, and there may be others: none, if none comes for a while.
    /// There is no such doubt if it has taken all that was put.
    fn are_back(&mut self, now: Instant) -> bool {
        // In this order: what is taken in between is not missed, for nobody puts more.
        let done = self.done.read();
        let taken = self.taken.read();
        let since = match self.last {
            Some((last, since)) if last == done => since,
            _ => now,
        };
        self.last = Some((done, since));
        match taken.wrapping_sub(done).cast_signed() {
            0 if taken == self.put.read() => true,
            ..=0 => now.saturating_duration_since(since) >= QUIET_TIME,
            _ => false,
        }
    }
}

/// What a successor has to know of memory that several ports share.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Shared {
    pub(super) name: String,
    room: u16,
    /// The uplink's, by queue.
    pub(super) places: Vec<u32>,
    /// Those of other uplinks, and those that the kernel still has something of.
    others: Vec<u32>,
}

/// A UMEM has no room for the queues of one more interface.
#[derive(Debug)]
pub struct NoRoom {
    /// The UMEM's name.
    pub name: String,
    /// The interface that came.
    pub interface: String,
    /// For how many queues there is room in all.
    pub room: usize,
    /// For how many there is room still.
    pub free: usize,
    /// Queues that are closed, and of which the kernel has frames that are not sent yet.
    pub draining: usize,
    /// How many queues came.
    pub queues: u16,
}

impl std::fmt::Display for NoRoom {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { name, interface, room, free, draining, queues } = self;
        write!(
            f,
            "UMEM {name} has room for {room} queues, {free} are free, and interface {interface} \
             has {queues}"
        )?;
        if *draining > 0 {
            write!(f, " (the kernel still sends frames of {draining} that were closed)")?;
        }
        let right = room.saturating_sub(*free).saturating_add(usize::from(*queues));
        if right > usize::from(UMEM_QUEUES_MAX) {
            return write!(f, ": use umem=OTHER, one has at most {UMEM_QUEUES_MAX} queues");
        }
        write!(
            f,
            ": its size is fixed while a port uses it, so start its first port with \
             umem-queues={right}, or use umem=OTHER"
        )
    }
}

#[cfg(test)]
mod tests;
