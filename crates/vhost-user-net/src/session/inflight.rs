//! The in-flight file, for front ends that keep one (`INFLIGHT_SHMFD`): which chains the back end
//! has, so that another one goes on after a crash of this one.
//!
//! A region for each ring, one after the other, of the size that the file's queue size asks for.
//! Rings that start while there is a file use theirs, and have no record of our own then.
//!
//! **Trust.** The file comes from the front end: sizes are checked here, contents by [`virtq`].
//! **Limits.** No more of it is mapped than the regions need.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost::vhost_user::message::VhostUserProtocolFeatures as P;
use virtio_net::features::layout;
use virtq::mem::InflightArea;
use virtq::{Layout, QueueConfig, inflight_bytes};

use super::{Answer, FrontendReq, RingIndex, Rings, Session, SessionError};
use crate::codec::{CodecError, InflightSpec, Reply};
use crate::handover::{AdoptError, Incoming, InflightHandover, Outgoing};
use crate::memory::file_bytes;

/// Bytes of a page.
const PAGE: u64 = 4096;

/// The file and where the regions are in it.
#[derive(Debug)]
pub(super) struct InflightFile {
    file: File,
    spec: InflightSpec,
    area: InflightArea,
}

impl InflightFile {
    pub(super) fn is_lost(&self) -> bool {
        self.area.is_lost()
    }

    pub(super) fn file_bytes(&self) -> u64 {
        file_bytes(&self.file)
    }
}

impl Session {
    /// A new file, with nothing in flight.
    pub(super) fn make_inflight(&self, asked: InflightSpec) -> Result<Answer, SessionError> {
        self.needs(P::INFLIGHT_SHMFD, FrontendReq::GET_INFLIGHT_FD)?;
        self.check_inflight(&asked)?;
        let each = self.region_bytes(asked.queue_size);
        let bytes = each.saturating_mul(usize::from(asked.queues)) as u64;
        let failed = |error: rustix::io::Errno| wrong(&asked, error.to_string());
        let fd = memfd_create("causeway-inflight", MemfdFlags::CLOEXEC).map_err(failed)?;
        ftruncate(&fd, bytes).map_err(failed)?;
        let spec = InflightSpec { bytes, offset: 0, ..asked };
        Ok(Answer::WithFd(Reply::Inflight(spec), fd))
    }

    /// The front end gives the file that it kept.
    pub(super) fn set_inflight(
        &mut self,
        spec: InflightSpec,
        mut fds: Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<(), SessionError> {
        self.needs(P::INFLIGHT_SHMFD, FrontendReq::SET_INFLIGHT_FD)?;
        let fd = fds.pop().ok_or(CodecError::TooManyFds)?;
        self.check_inflight(&spec)?;
        let most = most_bytes(&spec);
        if spec.bytes > most {
            return Err(wrong(&spec, format!("{} bytes, at most {most} are allowed", spec.bytes)));
        }
        let file = map(spec, fd)?;
        self.swap_inflight(file, rings);
        Ok(())
    }

    fn check_inflight(&self, spec: &InflightSpec) -> Result<(), SessionError> {
        let rings = self.settings.queues.saturating_mul(2);
        if spec.queues == 0 || spec.queues > rings {
            return Err(wrong(spec, format!("1 to {rings} queues are allowed")));
        }
        let limit = self.settings.queue_size;
        if spec.queue_size == 0 || spec.queue_size > limit {
            return Err(wrong(spec, format!("queues of 1 to {limit} entries are allowed")));
        }
        Ok(())
    }

    /// Before features are agreed, as much as either format needs.
    fn region_bytes(&self, queue_size: u16) -> usize {
        inflight_bytes(self.features.map_or(Layout::Packed, layout), queue_size)
    }

    /// The region of a ring that starts now.
    pub(super) fn ring_inflight(
        &self,
        index: RingIndex,
        config: &QueueConfig,
    ) -> Option<InflightArea> {
        let InflightFile { spec, area, .. } = self.inflight.as_ref()?;
        let each = inflight_bytes(config.layout, spec.queue_size);
        let at = each.saturating_mul(usize::from(index.0));
        if index.0 >= spec.queues || config.size > spec.queue_size {
            return None;
        }
        area.part(at, each)
    }

    /// The file, for another process.
    pub(super) fn export_inflight(
        &self,
        fds: &mut Outgoing,
    ) -> io::Result<Option<InflightHandover>> {
        let Some(InflightFile { file, spec, .. }) = &self.inflight else { return Ok(None) };
        let InflightSpec { bytes, offset, queues, queue_size, .. } = *spec;
        Ok(Some(InflightHandover { fd: fds.add(file)?, bytes, offset, queues, queue_size }))
    }

    /// Goes on with the file of another process. No ring runs yet.
    pub(super) fn adopt_inflight(
        &mut self,
        state: InflightHandover,
        fds: &mut Incoming,
    ) -> Result<(), AdoptError> {
        let InflightHandover { fd, bytes, offset, queues, queue_size } = state;
        let spec = InflightSpec { bytes, offset, queues, queue_size, padded: false };
        let file = map(spec, fds.take(fd)?).map_err(|error| AdoptError::Io {
            what: "cannot map the in-flight file",
            error: io::Error::other(error.to_string()),
        })?;
        self.inflight = Some(file);
        Ok(())
    }
}

/// What the regions need in the format that needs more, in whole pages.
fn most_bytes(spec: &InflightSpec) -> u64 {
    let each = inflight_bytes(Layout::Packed, spec.queue_size) as u64;
    each.saturating_mul(u64::from(spec.queues)).next_multiple_of(PAGE)
}

fn map(spec: InflightSpec, fd: OwnedFd) -> Result<InflightFile, SessionError> {
    let file = File::from(fd);
    let bytes = usize::try_from(spec.bytes).unwrap_or(usize::MAX);
    let failed = |error: io::Error| wrong(&spec, error.to_string());
    let mapped = file.try_clone().map_err(failed)?;
    let area = InflightArea::from_file(mapped, spec.offset, bytes).map_err(failed)?;
    Ok(InflightFile { file, spec, area })
}

fn wrong(spec: &InflightSpec, error: String) -> SessionError {
    SessionError::Inflight { queues: spec.queues, queue_size: spec.queue_size, error }
}
