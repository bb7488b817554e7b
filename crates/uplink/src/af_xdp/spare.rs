//! Programs that were loaded while the process had the right to, for interfaces that are opened
//! when it has not any more.
//!
//! ```text
//!  keep_spares ─► spare ─► take ─► port ─► give_back (closed, lost, not opened) ─► spare
//! ```
//!
//! To load a program that sees how a frame is to be cut takes `CAP_PERFMON`, with which one can
//! read the kernel's memory; to attach it again does not. So a process that gives the right up
//! loads some before, and uses those of ports that were closed again.
//!
//! **Limits.** [`SPARES_MAX`] programs are loaded ahead, and [`KEPT_MAX`] wait; those for
//! `steer=mac` only come from ports.

use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Steer;
use super::program::Program;

/// The most programs that are loaded ahead.
pub const SPARES_MAX: usize = 16;
/// The most programs that wait for an interface, with those that interfaces gave back.
const KEPT_MAX: usize = 256;

/// Those that wait; none in a process that may load programs as long as it lives.
static SPARES: Mutex<Option<Vec<Program>>> = Mutex::new(None);

fn spares() -> MutexGuard<'static, Option<Vec<Program>>> {
    SPARES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Loads programs for large frames of interfaces that will be opened when the process may not do
/// that any more, at most [`SPARES_MAX`]. How many there are.
pub fn keep_spares() -> usize {
    let mut spares = spares();
    let spares = spares.get_or_insert_default();
    let there = spares.iter().filter(|program| program.steer() == Steer::All).count();
    let wanted = SPARES_MAX.saturating_sub(there);
    spares.extend(Program::load_spares(wanted));
    spares.len()
}

/// A program for one queue that was kept. Sockets went with their interface; here stations go.
pub(super) fn take(steer: Steer) -> Option<Program> {
    let mut spares = spares();
    let spares = spares.as_mut()?;
    let at = spares.iter().position(|program| program.steer() == steer)?;
    let mut program = spares.swap_remove(at);
    program.set_macs(&[]).is_ok().then_some(program)
}

/// Keeps the program of an interface that is closed, or was not opened, if this process keeps any.
pub(super) fn give_back(program: &Program) {
    if let Some(spares) = spares().as_mut()
        && program.cutting.is_some()
        && spares.len() < KEPT_MAX
    {
        spares.extend(program.again());
    }
}
