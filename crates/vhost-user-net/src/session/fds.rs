//! Which of the front end's fds a session keeps: see [`crate::fds`].

use super::{Postcopy, RingIndex, Session, SessionError};
use crate::codec::Request;
use crate::fds::{FdPool, Kept};

/// What is kept of a file that is mapped: it, and what the mapping holds.
const MAPPED: usize = 2;

impl Session {
    /// Has it keep no more fds than `pool` allows, beside all others of it.
    pub fn set_fd_pool(&mut self, pool: &FdPool) {
        self.kept = Kept::of(pool);
        self.count_fds();
    }

    /// Notes what is kept now.
    pub(super) fn count_fds(&mut self) {
        self.kept.set(self.kept_fds());
    }

    /// Whether what `request` brings can be kept.
    pub(super) fn admit(&self, request: &Request) -> Result<(), SessionError> {
        Ok(self.kept.admit(self.keeps_more(request))?)
    }

    fn kept_fds(&self) -> usize {
        let some = |kept: bool, count: usize| if kept { count } else { 0 };
        let rings = self.rings.values().flat_map(|ring| [&ring.kick, &ring.call, &ring.err]);
        let (told, late) = match &self.postcopy {
            Postcopy::Off => (0, false),
            Postcopy::Advised(_) => (0, true),
            Postcopy::Listening { told, .. } => {
                (told.as_ref().map_or(0, |table| table.fds_beyond(&self.memory)), true)
            }
        };
        let others = [
            self.memory.len(),
            told,
            some(late, 1),
            some(self.logging.has_file(), MAPPED),
            some(self.logging.has_call(), 1),
            some(self.inflight.is_some(), MAPPED),
            some(self.backend_channel.is_some(), 1),
        ];
        others.into_iter().fold(rings.flatten().count(), usize::saturating_add)
    }

    /// How many more are kept when `request` is done than before. What comes in the place of
    /// another does not count.
    fn keeps_more(&self, request: &Request) -> usize {
        let new = |known: bool, count: usize| if known { 0 } else { count };
        let ring = |ring: u32| {
            let index = u16::try_from(ring).ok().map(RingIndex);
            index.and_then(|index| self.rings.get(&index))
        };
        match request {
            Request::SetMemTable(specs) => specs.len().saturating_sub(self.memory.len()),
            Request::AddMemReg(spec) => new(self.coming_memory().mapped(spec).is_some(), 1),
            Request::SetVringKick(v) => {
                new(!v.has_fd || ring(v.ring).is_some_and(|ring| ring.kick.is_some()), 1)
            }
            Request::SetVringCall(v) => {
                new(!v.has_fd || ring(v.ring).is_some_and(|ring| ring.call.is_some()), 1)
            }
            Request::SetVringErr(v) => {
                new(!v.has_fd || ring(v.ring).is_some_and(|ring| ring.err.is_some()), 1)
            }
            Request::SetLogBase(_) => new(self.logging.has_file(), MAPPED),
            Request::SetLogFd => new(self.logging.has_call(), 1),
            Request::SetInflightFd(_) => new(self.inflight.is_some(), MAPPED),
            Request::SetBackendReqFd => new(self.backend_channel.is_some(), 1),
            Request::PostcopyAdvise => new(!matches!(self.postcopy, Postcopy::Off), 1),
            Request::GetFeatures | Request::SetFeatures(_) => 0,
            Request::GetProtocolFeatures | Request::SetProtocolFeatures(_) => 0,
            Request::SetOwner | Request::ResetOwner | Request::ResetDevice => 0,
            Request::GetQueueNum | Request::GetMaxMemSlots | Request::RemMemReg(_) => 0,
            Request::SetVringNum(_) | Request::SetVringAddr(_) | Request::SetVringBase(_) => 0,
            Request::GetVringBase { .. } | Request::SetVringEnable { .. } => 0,
            Request::GetInflightFd(_) | Request::Iotlb(_) => 0,
            Request::SendRarp(_) | Request::NetSetMtu(_) => 0,
            Request::SetStatus(_) | Request::GetStatus => 0,
            Request::SetDeviceStateFd(_) | Request::CheckDeviceState => 0,
            Request::PostcopyListen | Request::PostcopyEnd | Request::MemoryHeard => 0,
            Request::NotOffered(_) => 0,
        }
    }
}
