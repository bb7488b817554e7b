//! The log of pages that rings write, for the migration of the guest.
//!
//! The front end shares a bitmap (`SET_LOG_BASE`) and switches logging on and off with the feature
//! `LOG_ALL`, while rings run. Every ring that is started while both are there notes what it
//! writes: a message that changes either is answered after no worker uses what was before.
//!
//! **Trust.** Size and offset are the front end's; what it does to the bitmap harms its guest only.

use std::fs::File;
use std::io;
use std::mem::replace;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtq::mem::{DirtyLog, GuestPhysAddr};
use virtq::{Iova, Places, QueueConfig, RingLog};

use super::iotlb::parts;
use super::ring::{Ring, is_no_eventfd};
use super::{LOG_ALL, Rings, Session, SessionError};
use crate::codec::{LOG_FLAG, LogArea, VringAddr};
use crate::handover::{AdoptError, Incoming, LogHandover, Outgoing};
use crate::memory::{BYTES_MAX, FrontendAddr, file_bytes};

/// The most bytes of a log: a bit for every page that a front end may share.
const LOG_BYTES_MAX: u64 = BYTES_MAX / 4096 / 8;

/// What the front end said about logging.
#[derive(Debug, Default)]
pub(super) struct Logging {
    log: Option<DirtyLog>,
    source: Option<Source>,
    /// What is signalled after pages were noted.
    call: Option<Arc<OwnedFd>>,
}

/// A log's file and its place there, for another process that goes on.
type Source = (Arc<OwnedFd>, LogArea);

/// Where writes are noted.
pub(super) type Log = (DirtyLog, Source);

impl Logging {
    /// Notes writes there from now on. Returns what was in use before.
    pub(super) fn set(&mut self, (log, source): Log) -> (Option<DirtyLog>, Option<Source>) {
        (self.log.replace(log), self.source.replace(source))
    }

    /// Bytes of the log's file.
    pub(super) fn file_bytes(&self) -> Option<u64> {
        self.source.as_ref().map(|(file, _)| file_bytes(file))
    }

    /// Whether there is a log.
    pub(super) fn has_file(&self) -> bool {
        self.source.is_some()
    }

    /// Whether something is signalled after pages were noted.
    pub(super) fn has_call(&self) -> bool {
        self.call.is_some()
    }

    /// Whether the log's file was cut short.
    pub(super) fn is_lost(&self) -> bool {
        self.log.as_ref().is_some_and(DirtyLog::is_lost)
    }
}

impl Session {
    pub(super) fn set_log_base(
        &mut self,
        area: LogArea,
        fd: OwnedFd,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        self.swap_log(map(area, fd)?, rings);
        Ok(())
    }

    /// The log, for another process.
    pub(super) fn export_log(&self, fds: &mut Outgoing) -> io::Result<Option<LogHandover>> {
        let call = fds.add_some(self.logging.call.as_ref())?;
        let Some((file, area)) = &self.logging.source else {
            return Ok(call.map(|_| LogHandover { call, ..LogHandover::default() }));
        };
        let (bytes, offset) = (area.bytes, area.offset);
        Ok(Some(LogHandover { fd: Some(fds.add(file)?), bytes, offset, call }))
    }

    /// Goes on with the log of another process. No ring runs yet.
    pub(super) fn adopt_log(
        &mut self,
        state: LogHandover,
        fds: &mut Incoming,
    ) -> Result<(), AdoptError> {
        if let Some(fd) = state.fd {
            let area = LogArea { bytes: state.bytes, offset: state.offset };
            let log = map(area, fds.take(fd)?);
            let _ = self.logging.set(log.map_err(|error| AdoptError::Log(error.to_string()))?);
        }
        self.logging.call = fds.take_some(state.call)?;
        Ok(())
    }

    pub(super) fn set_log_call(
        &mut self,
        fd: Option<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        if fd.as_ref().is_some_and(is_no_eventfd) {
            return Err(SessionError::LogCall);
        }
        self.restart_all(rings, |session| {
            let old = replace(&mut session.logging.call, fd.map(Arc::new));
            session.let_go_of_event(old);
        });
        Ok(())
    }

    /// Changes something that all rings use: those that run stop, and go on with it. Frames for
    /// receiveqs wait meanwhile.
    pub(super) fn restart_all(&mut self, rings: &mut dyn Rings, change: impl FnOnce(&mut Self)) {
        for index in self.indexes() {
            self.park_ring(index, rings);
        }
        change(self);
        self.try_start_all(rings);
    }

    /// Whether rings that run note what they write, or would if they had a log.
    pub fn is_logging(&self) -> bool {
        self.features.is_some_and(|features| features & LOG_ALL != 0)
    }

    /// Where a ring that is started now notes what it writes, if it is to.
    pub(super) fn ring_log(&self, ring: &Ring, config: &QueueConfig) -> Option<RingLog> {
        if !self.is_logging() {
            return None;
        }
        let (log, addr) = (self.logging.log.clone()?, ring.addr.as_ref()?);
        let [(_, desc, _), _, (_, device, _)] = parts(config);
        Some(RingLog {
            log,
            memory: self.memory.map()?.clone(),
            device: self.device_places(addr, device)?,
            desc: self.places(addr.desc, desc)?,
            call: self.logging.call.clone(),
        })
    }

    /// The address at which the front end wants writes to the used ring noted, if it says so: where
    /// the guest has it, or behind a vIOMMU, where the device sees it.
    pub(super) fn log_addr(&self, addr: &VringAddr) -> Option<u64> {
        (self.is_logging() && addr.flags & LOG_FLAG != 0).then_some(addr.log)
    }

    /// Where the guest sees the used ring.
    fn device_places(&self, addr: &VringAddr, bytes: u64) -> Option<Places> {
        match (self.log_addr(addr), self.iotlb()) {
            (Some(log), Some(iotlb)) => iotlb.places(Iova(log), bytes),
            (Some(log), None) => Some(GuestPhysAddr(log).into()),
            (None, _) => self.places(addr.used, bytes),
        }
    }

    /// Where the guest has a part of a ring.
    fn places(&self, addr: FrontendAddr, bytes: u64) -> Option<Places> {
        match self.iotlb() {
            Some(iotlb) => iotlb.places(Iova(addr.0), bytes),
            None => self.memory.translate(addr).map(Places::from),
        }
    }
}

/// The bitmap in a file, and where it is, for another process that goes on.
fn map(area: LogArea, fd: OwnedFd) -> Result<Log, SessionError> {
    let wrong = |error: String| SessionError::Log { bytes: area.bytes, error };
    if area.bytes > LOG_BYTES_MAX {
        return Err(wrong(format!("at most {LOG_BYTES_MAX} bytes are allowed")));
    }
    let bytes = usize::try_from(area.bytes).unwrap_or(usize::MAX);
    let kept = fd.try_clone().map_err(|error| wrong(error.to_string()))?;
    let log = DirtyLog::from_file(File::from(fd), area.offset, bytes);
    let log = log.map_err(|error| wrong(error.to_string()))?;
    Ok((log, (Arc::new(kept), area)))
}
