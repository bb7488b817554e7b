//! The log of pages that rings write, for the migration of the guest.
//!
//! The front end shares a bitmap (`SET_LOG_BASE`) and switches logging on and off with the feature
//! `LOG_ALL`, while rings run. Every ring that is started while both are there notes what it
//! writes: a message that changes either is answered after no worker uses what was before.
//!
//! **Trust.** Size and offset are the front end's; what it does to the bitmap harms its guest only.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use virtq::RingLog;
use virtq::mem::{DirtyLog, GuestPhysAddr};

use super::ring::{Ring, is_no_eventfd};
use super::{LOG_ALL, Rings, Session, SessionError};
use crate::codec::{LOG_FLAG, LogArea, VringAddr};
use crate::memory::BYTES_MAX;

/// The most bytes of a log: a bit for every page that a front end may share.
const LOG_BYTES_MAX: u64 = BYTES_MAX / 4096 / 8;

/// What the front end said about logging.
#[derive(Debug, Default)]
pub(super) struct Logging {
    log: Option<DirtyLog>,
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
        let wrong = |error: String| SessionError::Log { bytes: area.bytes, error };
        if area.bytes > LOG_BYTES_MAX {
            return Err(wrong(format!("at most {LOG_BYTES_MAX} bytes are allowed")));
        }
        let bytes = usize::try_from(area.bytes).unwrap_or(usize::MAX);
        let log = DirtyLog::from_file(File::from(fd), area.offset, bytes);
        let log = log.map_err(|error| wrong(error.to_string()))?;
        self.restart_all(rings, |session| session.logging.log = Some(log));
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
            desc: self.memory.translate(addr.desc)?,
            call: self.logging.call.clone(),
        })
    }

    /// Where the guest sees the used ring: the front end may say so itself.
    fn device_area(&self, addr: &VringAddr) -> Option<GuestPhysAddr> {
        if addr.flags & LOG_FLAG != 0 {
            return Some(GuestPhysAddr(addr.log));
        }
        self.memory.translate(addr.used)
    }
}
