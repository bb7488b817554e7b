//! The interface itself: brought up, watched, and left as it was found.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::sys::InterfaceSocket;

use super::TapError;

/// What an interface is able to do now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LinkState {
    /// It carries frames.
    Up,
    /// Somebody set it down.
    Down,
    /// Somebody deleted it: it has to be opened anew.
    Gone,
}

/// An open interface, seen from its name. Dropped before the queues, it sets an interface down
/// that was found down; one that was made goes with its queues.
#[derive(Debug)]
pub struct Link {
    name: String,
    socket: InterfaceSocket,
    /// The interface existed and was down.
    restore_down: bool,
    made: bool,
    mtu: Arc<AtomicU32>,
}

impl Link {
    pub(super) fn bring_up(
        name: &str,
        socket: InterfaceSocket,
        existed: bool,
    ) -> Result<Self, TapError> {
        let failed = |error| TapError::system(format!("bring interface {name} up"), error);
        let was_up = socket.is_up(name).map_err(failed)?;
        if !was_up {
            socket.set_up(name, true).map_err(failed)?;
        }
        let mtu = socket.mtu(name).map_err(failed)?;
        Ok(Self {
            name: name.to_owned(),
            socket,
            restore_down: existed && !was_up,
            made: !existed,
            mtu: Arc::new(AtomicU32::new(mtu)),
        })
    }

    /// Looks at the interface again: its state, and its MTU for the queues.
    pub fn check(&self) -> LinkState {
        // ORDERING: the MTU is a number of its own, nothing is published with it.
        match self.socket.mtu(&self.name) {
            Ok(mtu) => self.mtu.store(mtu, Ordering::Relaxed),
            Err(error) if is_gone(&error) => return LinkState::Gone,
            Err(_) => {}
        }
        match self.socket.is_up(&self.name) {
            Ok(false) => LinkState::Down,
            Err(error) if is_gone(&error) => LinkState::Gone,
            Ok(true) | Err(_) => LinkState::Up,
        }
    }

    /// Whether the interface exists now, perhaps as a new one of the same name.
    pub fn exists(&self) -> bool {
        self.socket.exists(&self.name).unwrap_or(false)
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether opening the tap made the interface.
    pub fn was_made(&self) -> bool {
        self.made
    }

    /// The MTU, kept up to date by [`Self::check`].
    pub(super) fn mtu(&self) -> &Arc<AtomicU32> {
        &self.mtu
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if self.restore_down
            && let Err(error) = self.socket.set_up(&self.name, false)
            && !is_gone(&error)
        {
            tracing::warn!(interface = self.name, %error, "cannot set the interface down again");
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENODEV)
}
