//! The device's state, which the front end takes along when the guest moves (`DEVICE_STATE`).
//!
//! ```text
//!  SET_DEVICE_STATE_FD ─► StateAsk::Save or Load (a pipe) ─► the shell: a thread copies
//!  CHECK_DEVICE_STATE  ─► StateAsk::Check ─► the shell: answers when the transfer has ended
//! ```

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, fstat};
use rustix::io::ioctl_fionbio;
use vhost::vhost_user::message::{FrontendReq, VhostUserProtocolFeatures};

use super::{Answer, Session, SessionError};
use crate::codec::{CodecError, Reply, StateDirection};

/// The reply to `SET_DEVICE_STATE_FD`: no fd of ours comes with it.
const NOFD: u64 = 0x100;

/// What the shell does for the session; it answers the request, too.
#[derive(Debug)]
pub enum StateAsk {
    /// Write the state, and close this.
    Save(OwnedFd),
    /// Read the state until this ends.
    Load(OwnedFd),
    /// Tell how the transfer ended.
    Check,
}

impl StateAsk {
    /// What a request is answered with.
    pub fn reply(request: u32, success: bool) -> Vec<u8> {
        let value = u64::from(!success);
        let sets = request == u32::from(FrontendReq::SET_DEVICE_STATE_FD);
        Reply::U64(if sets { value | NOFD } else { value }).write(request)
    }
}

impl Session {
    /// Whether this request is one whose refusal is a reply of its own.
    pub(super) fn answers_state(&self, request: u32) -> bool {
        let requests = [FrontendReq::SET_DEVICE_STATE_FD, FrontendReq::CHECK_DEVICE_STATE];
        self.has_protocol(VhostUserProtocolFeatures::DEVICE_STATE)
            && requests.map(u32::from).contains(&request)
    }

    pub(super) fn set_state_fd(
        &self,
        direction: StateDirection,
        fd: Option<OwnedFd>,
    ) -> Result<Answer, SessionError> {
        let request = FrontendReq::SET_DEVICE_STATE_FD;
        self.needs(VhostUserProtocolFeatures::DEVICE_STATE, request)?;
        if let Some((index, _)) = self.rings.iter().find(|(_, ring)| ring.started) {
            return Err(SessionError::RingRuns { request, ring: index.0.into() });
        }
        let fd = fd.ok_or(CodecError::TooManyFds)?;
        let kind = fstat(&fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        // What is full or empty is waited for, by a thread that can be told to stop. A socket could
        // hold fds, which are closed by who reads there.
        if kind != Ok(FileType::Fifo) || ioctl_fionbio(&fd, true).is_err() {
            return Err(SessionError::StateFd);
        }
        Ok(Answer::Shell(match direction {
            StateDirection::Save => StateAsk::Save(fd),
            StateDirection::Load => StateAsk::Load(fd),
        }))
    }

    pub(super) fn check_state(&self) -> Result<Answer, SessionError> {
        self.needs(VhostUserProtocolFeatures::DEVICE_STATE, FrontendReq::CHECK_DEVICE_STATE)?;
        Ok(Answer::Shell(StateAsk::Check))
    }
}
