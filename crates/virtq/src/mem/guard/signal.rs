//! The handler of SIGBUS.

use std::io;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use libc::{c_int, c_void, siginfo_t};

use super::rescue;

/// What SIGBUS did before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// Takes SIGBUS over for the whole process. What is not ours goes to the handler that was there
/// before, or ends the process as it would have. Calling it again changes nothing.
///
/// # Errors
///
/// The kernel's answer to `sigaction`.
pub fn install() -> io::Result<()> {
    let mut failed = None;
    let _ = BEFORE.get_or_init(|| {
        let before = replace_action().inspect_err(|_| failed = Some(io::Error::last_os_error()));
        before.unwrap_or_else(|()| default_action())
    });
    failed.map_or(Ok(()), Err)
}

fn replace_action() -> Result<libc::sigaction, ()> {
    let mut action = default_action();
    let handler: extern "C" fn(c_int, *mut siginfo_t, *mut c_void) = on_sigbus;
    action.sa_sigaction = handler as usize;
    // On the alternate stack, as Rust's own handler is, and others may run with it.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_RESTART;
    let mut before = default_action();
    // SAFETY: both structs are complete; the handler does only what handlers may.
    let result = unsafe { libc::sigaction(libc::SIGBUS, &raw const action, &raw mut before) };
    if result == 0 { Ok(before) } else { Err(()) }
}

fn default_action() -> libc::sigaction {
    // SAFETY: a struct of integers, of which zeros are values: SIG_DFL, no flags, no signals.
    unsafe { std::mem::zeroed() }
}

/// What the signal is about; none if it was sent by somebody, or is about no address.
fn fault_address(info: *const siginfo_t) -> Option<usize> {
    // SAFETY: the kernel hands a valid struct to a handler that was set with SA_SIGINFO.
    let info = unsafe { info.as_ref() }?;
    match info.si_code {
        libc::BUS_ADRERR | libc::BUS_OBJERR | libc::BUS_MCEERR_AR => {
            // SAFETY: these codes come with an address.
            Some(unsafe { info.si_addr() }.addr())
        }
        _ => None,
    }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut siginfo_t, context: *mut c_void) {
    if fault_address(info).is_some_and(rescue) {
        return;
    }
    let before = BEFORE.get().copied().unwrap_or_else(default_action);
    match before.sa_sigaction {
        libc::SIG_IGN if was_sent(info) => return,
        libc::SIG_DFL | libc::SIG_IGN => set_default(signal),
        handler if before.sa_flags & libc::SA_SIGINFO != 0 => {
            // SAFETY: SA_SIGINFO says that it is a function of this type.
            let handler = unsafe {
                std::mem::transmute::<usize, extern "C" fn(c_int, *mut siginfo_t, *mut c_void)>(
                    handler,
                )
            };
            handler(signal, info, context);
        }
        handler => {
            // SAFETY: without SA_SIGINFO it is a function of this type.
            let handler = unsafe { std::mem::transmute::<usize, extern "C" fn(c_int)>(handler) };
            handler(signal);
        }
    }
    // A failed access is repeated after this, and ends the process if the default is to. What was
    // sent has to be sent again: Rust's own handler only restores the default and returns.
    if was_sent(info) && is_default(signal) {
        // SAFETY: no memory is involved.
        let _ = unsafe { libc::raise(signal) };
    }
}

/// Whether somebody sent the signal, instead of a failed access.
fn was_sent(info: *const siginfo_t) -> bool {
    // SAFETY: as in `fault_address`.
    unsafe { info.as_ref() }.is_some_and(|info| info.si_code <= 0)
}

fn set_default(signal: c_int) {
    let default = default_action();
    // SAFETY: the struct is complete.
    let _ = unsafe { libc::sigaction(signal, &raw const default, null_mut()) };
}

fn is_default(signal: c_int) -> bool {
    let mut now = default_action();
    // SAFETY: the struct is complete.
    let result = unsafe { libc::sigaction(signal, null(), &raw mut now) };
    result == 0 && now.sa_sigaction == libc::SIG_DFL
}
