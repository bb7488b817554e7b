//! What a session has done with, and may take long to be let go of.
//!
//! If we are the last who have a file, its pages are freed when we close it, which takes a second
//! for ten gigabytes; an eventfd that very many epolls watch is taken out of each of them then. So
//! what is large, and each eventfd of a ring, is kept until the shell takes it, for a thread to let
//! go of; and so is a session that has ended.
//!
//! Nor is the channel of the back end closed here: what waits in it is closed with it, and nobody
//! can see all of that (a byte that was sent out of band and taken leaves its fds there).
//!
//! **Trust.** A file can be larger than what is used of it, and grow at any time; while it does,
//! somebody else has it, and then nothing is freed by us.

use std::any::Any;
use std::mem::{replace, take};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use super::inflight::InflightFile;
use super::log::Log;
use super::{Rings, Session};
use crate::memory::{LARGE, RegionTable};

/// What is to be dropped by somebody who may wait.
#[derive(Debug)]
pub enum Gone {
    /// Something large: to free it takes time.
    Large(Box<dyn Any + Send>),
    /// What others may answer for: to close it may take as long as they like.
    Channel(OwnedFd),
    /// An eventfd, which is small.
    Event(Arc<OwnedFd>),
}

impl Session {
    /// What is to be let go of since this was asked last.
    pub fn take_gone(&mut self) -> Vec<Gone> {
        take(&mut self.gone)
    }

    /// The same of a session that has ended.
    pub fn into_gone(mut self) -> Vec<Gone> {
        let mut gone = self.take_gone();
        gone.push(Gone::Large(Box::new(self)));
        gone
    }

    /// What is running stops, changes over, and goes on if its addresses are still mapped.
    pub(super) fn swap_memory(&mut self, table: RegionTable, rings: &mut dyn Rings) {
        self.restart_all(rings, |session| {
            let old = replace(&mut session.memory, table);
            session.translate_into();
            session.let_go(old.bytes_beyond(&session.memory), old);
        });
    }

    pub(super) fn swap_inflight(&mut self, file: InflightFile, rings: &mut dyn Rings) {
        self.restart_all(rings, |session| {
            if let Some(old) = session.inflight.replace(file) {
                session.let_go(old.file_bytes(), old);
            }
        });
    }

    pub(super) fn swap_log(&mut self, log: Log, rings: &mut dyn Rings) {
        self.restart_all(rings, |session| {
            let bytes = session.logging.file_bytes();
            let old = session.logging.set(log);
            session.let_go(bytes.unwrap_or(0), old);
        });
    }

    /// Another channel of the back end, or none.
    pub(super) fn swap_channel(&mut self, channel: Option<OwnedFd>) {
        let old = replace(&mut self.backend_channel, channel);
        self.gone.extend(old.map(Gone::Channel));
    }

    /// Lets go of an eventfd that a ring had.
    pub(super) fn let_go_of_event(&mut self, event: Option<Arc<OwnedFd>>) {
        self.gone.extend(event.map(Gone::Event));
    }

    /// Lets go of something whose files have so many bytes.
    fn let_go(&mut self, bytes: u64, what: impl Any + Send) {
        if bytes >= LARGE {
            self.gone.push(Gone::Large(Box::new(what)));
        }
    }
}
