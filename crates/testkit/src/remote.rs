//! A guest in shared memory behind a front end: a [`Guest`] that joins a back end by its socket.
//!
//! Front end addresses are guest addresses. What a hostile one does beyond that, its test does by
//! hand: the front end, the memory's file and the driver are all reachable.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use virtq::mem::GuestMap;
use virtq::mem::guard::Watch;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

use crate::request::{
    SET_FEATURES, SET_MEM_TABLE, SET_OWNER, SET_VRING_ADDR, SET_VRING_BASE, SET_VRING_CALL,
    SET_VRING_KICK, SET_VRING_NUM,
};
use crate::{FrontEnd, FrontEndError, Guest, GuestError, GuestSettings, SharedMemory};

/// Why a guest could not join.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// Of its driver.
    #[error(transparent)]
    Guest(#[from] GuestError),
    /// Of its front end.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// Of its socket or memory.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// See the module's text.
#[derive(Debug)]
pub struct Remote {
    /// The driver.
    pub guest: Guest,
    /// Whom it is introduced by.
    pub front_end: FrontEnd,
    /// The file that the back end is given.
    pub memory: SharedMemory,
    /// The file may be cut short: this process lives on if it installed `virtq::mem::guard`.
    _watches: Vec<Watch>,
}

impl Remote {
    /// Connects to a back end and says nothing yet.
    ///
    /// # Errors
    ///
    /// [`RemoteError`] if the socket or the memory cannot be had.
    pub fn connect(path: &Path, settings: GuestSettings) -> Result<Self, RemoteError> {
        let memory = SharedMemory::new(Guest::BYTES)?;
        let file = File::from(memory.as_fd().try_clone_to_owned()?);
        let bytes = usize::try_from(Guest::BYTES).map_err(io::Error::other)?;
        let range = (GuestAddress(0), bytes, Some(FileOffset::new(file, 0)));
        let mapped = GuestMemoryMmap::from_ranges_with_files([range]).map_err(io::Error::other)?;
        let mapped = Arc::new(mapped);
        let map = GuestMap::new(Arc::clone(&mapped)).map_err(GuestError::from)?;
        let guest = Guest::on(settings, mapped)?;
        let front_end = FrontEnd::connect(path)?;
        Ok(Self { guest, front_end, memory, _watches: Watch::all(&map) })
    }

    /// Connects and sets everything up: the back end starts both rings.
    ///
    /// # Errors
    ///
    /// As [`Self::connect`], and if the connection is closed meanwhile.
    pub fn join(path: &Path, settings: GuestSettings) -> Result<Self, RemoteError> {
        let mut remote = Self::connect(path, settings)?;
        remote.set_up()?;
        Ok(remote)
    }

    /// Sets everything up on a new connection.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn set_up(&mut self) -> io::Result<()> {
        self.introduce(0)?;
        self.share_memory()?;
        self.set_ring(0)?;
        self.set_ring(1)
    }

    /// Owner and features, with `more` bits than the settings stand for.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn introduce(&mut self, more: u64) -> io::Result<()> {
        self.front_end.send(SET_OWNER, &[], &[])?;
        let features = self.guest.settings().bits() | more;
        self.front_end.send(SET_FEATURES, &features.to_le_bytes(), &[])
    }

    /// Shares all of the memory, as one region.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn share_memory(&mut self) -> io::Result<()> {
        let table = SharedMemory::table(0, self.memory.bytes());
        self.front_end.send(SET_MEM_TABLE, &table, &[self.memory.as_fd()])
    }

    /// Size, position, addresses, call and kick of a ring: 0 is the receiveq, 1 the transmitq.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn set_ring(&mut self, ring: u32) -> io::Result<()> {
        let [receive, transmit] = self.guest.queue_configs();
        let config = if ring == 0 { receive } else { transmit };
        let base = config.position.to_vhost_base();
        let addresses = [config.desc.0, config.device.0, config.driver.0];
        self.set_num(ring, config.size.into())?;
        self.front_end.send(SET_VRING_BASE, &words([ring, base]), &[])?;
        self.set_addr(ring, addresses)?;
        self.set_fds(ring)
    }

    /// A ring's size.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn set_num(&mut self, ring: u32, size: u32) -> io::Result<()> {
        self.front_end.send(SET_VRING_NUM, &words([ring, size]), &[])
    }

    /// A ring's descriptor, used (device) and available (driver) area.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn set_addr(&mut self, ring: u32, areas: [u64; 3]) -> io::Result<()> {
        let mut body = words([ring, 0]);
        for address in areas.into_iter().chain([0]) {
            body.extend_from_slice(&address.to_le_bytes());
        }
        self.front_end.send(SET_VRING_ADDR, &body, &[])
    }

    /// A ring's call and kick: the last that it needs to start.
    ///
    /// # Errors
    ///
    /// If the socket fails.
    pub fn set_fds(&mut self, ring: u32) -> io::Result<()> {
        let [receive, transmit] = self.guest.event_fds();
        let (kick, call) = if ring == 0 { receive } else { transmit };
        let number = u64::from(ring).to_le_bytes();
        self.front_end.send(SET_VRING_CALL, &number, &[call.as_fd()])?;
        self.front_end.send(SET_VRING_KICK, &number, &[kick.as_fd()])
    }
}

fn words(words: [u32; 2]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
