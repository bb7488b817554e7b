//! The log of pages that rings write, for the migration of the guest.
//!
//! The front end shares a bitmap (`SET_LOG_BASE`) and switches logging on and off with the feature
//! `LOG_ALL`, while rings run. Every ring that is started while both are there notes what it
//! writes: a message that changes either is answered after no worker uses what was before.
//!
//! **Trust.** Size and offset are the front end's; what it does to the bitmap harms its guest only.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtq::mem::{DirtyLog, GuestPhysAddr};
use virtq::{Iova, RingLog};

use super::ring::{Ring, is_no_eventfd};
use super::{LOG_ALL, Rings, Session, SessionError};
use crate::codec::{LOG_FLAG, LogArea, VringAddr};
use crate::handover::{AdoptError, Incoming, LogHandover, Outgoing};
use crate::memory::{BYTES_MAX, FrontendAddr};

/// The most bytes of a log: a bit for every page that a front end may share.
const LOG_BYTES_MAX: u64 = BYTES_MAX / 4096 / 8;

/// What the front end said about logging.
#[derive(Debug, Default)]
pub(super) struct Logging {
    log: Option<DirtyLog>,
    /// The bitmap's file and its place there, for another process that goes on.
    source: Option<(Arc<OwnedFd>, LogArea)>,
    /// What is signalled after pages were noted.
    call: Option<Arc<OwnedFd>>,
}

impl Logging {
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
        let (log, source) = map(area, fd)?;
        self.restart_all(rings, |session| {
            session.logging.log = Some(log);
            session.logging.source = Some(source);
        });
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
            let (log, source) =
                map(area, fds.take(fd)?).map_err(|error| AdoptError::Log(error.to_string()))?;
            self.logging.log = Some(log);
            self.logging.source = Some(source);
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
        self.restart_all(rings, |session| session.logging.call = fd.map(Arc::new));
        Ok(())
    }

    /// Changes something that all rings use: those that run stop, and go on with it.
    pub(super) fn restart_all(&mut self, rings: &mut dyn Rings, change: impl FnOnce(&mut Self)) {
        for index in self.indexes() {
            let _ = self.stop_ring(index, rings);
        }
        change(self);
        self.try_start_all(rings);
    }

    /// Whether rings that run note what they write, or would if they had a log.
    pub fn is_logging(&self) -> bool {
        self.features.is_some_and(|features| features & LOG_ALL != 0)
    }

    /// Where a ring that is started now notes what it writes, if it is to.
    pub(super) fn ring_log(&self, ring: &Ring) -> Option<RingLog> {
        if !self.is_logging() {
            return None;
        }
        let (log, addr) = (self.logging.log.clone()?, ring.addr.as_ref()?);
        Some(RingLog {
            log,
            memory: self.memory.map()?.clone(),
            device: self.device_area(addr)?,
            desc: self.guest_addr(addr.desc)?,
            call: self.logging.call.clone(),
        })
    }

    /// Where the guest sees the used ring: the front end may say so itself.
    fn device_area(&self, addr: &VringAddr) -> Option<GuestPhysAddr> {
        if addr.flags & LOG_FLAG != 0 {
            return Some(GuestPhysAddr(addr.log));
        }
        self.guest_addr(addr.used)
    }

    /// Where the guest has a part of a ring.
    fn guest_addr(&self, addr: FrontendAddr) -> Option<GuestPhysAddr> {
        match self.iotlb() {
            Some(iotlb) => iotlb.translate(Iova(addr.0)),
            None => self.memory.translate(addr),
        }
    }
}

/// The bitmap in a file, and where it is, for another process that goes on.
fn map(area: LogArea, fd: OwnedFd) -> Result<(DirtyLog, (Arc<OwnedFd>, LogArea)), SessionError> {
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
