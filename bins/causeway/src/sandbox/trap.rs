//! What happens when a filter refuses a system call: it fails with EPERM, and the log says which
//! call it was.
//!
//! The kernel sends SIGSYS to the thread instead of making the call. The handler writes one line
//! and puts the error where the call's result is expected, so that the caller reports it like any
//! other error of the kernel.
//!
//! **Limits.** [`LOGGED_MAX`] lines in the life of the process: a call that is tried again and
//! again fills no disk.
#![expect(unsafe_code, reason = "a signal handler reads and writes the interrupted thread's state")]

use std::io::{self, Write};
use std::sync::atomic::{AtomicU32, Ordering};

use libc::{c_int, c_void, siginfo_t, ucontext_t};
use vmm_sys_util::signal::register_signal_handler;

/// The most refusals that are logged.
pub(super) const LOGGED_MAX: u32 = 32;
/// `si_code` of a SIGSYS that a seccomp filter caused.
const SYS_SECCOMP: c_int = 1;
/// How the kernel says EPERM.
const REFUSAL: i64 = i64::wrapping_neg(libc::EPERM as i64);

static REFUSED: AtomicU32 = AtomicU32::new(0);

/// Installs the handler, for all threads.
pub(super) fn install() -> io::Result<()> {
    register_signal_handler(libc::SIGSYS, on_refusal)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// How many calls were refused so far.
pub(super) fn refused() -> u32 {
    // ORDERING: Relaxed: a count for people.
    REFUSED.load(Ordering::Relaxed)
}

extern "C" fn on_refusal(_: c_int, info: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel gives a handler of this kind (SA_SIGINFO) a pointer to the signal's
    // description on its own stack; nobody else knows it. No guest can reach it.
    let Some(info) = (unsafe { info.as_ref() }) else { return };
    if info.si_code != SYS_SECCOMP {
        // Somebody's `kill -SYS`: there is no call to answer.
        return;
    }
    // SAFETY: as above: the state of the interrupted thread, which is this one, and which is
    // resumed from here when the handler returns.
    let Some(context) = (unsafe { context.cast::<ucontext_t>().as_mut() }) else { return };
    let first = first_argument(context);
    let Some(call) = fail(context) else { return };
    // ORDERING: Relaxed: a count of its own.
    if REFUSED.fetch_add(1, Ordering::Relaxed) < LOGGED_MAX {
        say(call, first);
    }
}

/// The first argument of the interrupted call.
#[cfg(target_arch = "x86_64")]
fn first_argument(context: &ucontext_t) -> i64 {
    let register = usize::try_from(libc::REG_RDI).ok();
    register.and_then(|at| context.uc_mcontext.gregs.get(at).copied()).unwrap_or(-1)
}

#[cfg(target_arch = "aarch64")]
fn first_argument(context: &ucontext_t) -> i64 {
    context.uc_mcontext.regs.first().map_or(-1, |value| value.cast_signed())
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn first_argument(_: &ucontext_t) -> i64 {
    -1
}

/// Makes the interrupted call fail with EPERM. Returns its number.
#[cfg(target_arch = "x86_64")]
fn fail(context: &mut ucontext_t) -> Option<i64> {
    let register = usize::try_from(libc::REG_RAX).ok()?;
    let result = context.uc_mcontext.gregs.get_mut(register)?;
    Some(std::mem::replace(result, REFUSAL))
}

#[cfg(target_arch = "aarch64")]
fn fail(context: &mut ucontext_t) -> Option<i64> {
    let call = *context.uc_mcontext.regs.get(8)?;
    *context.uc_mcontext.regs.first_mut()? = REFUSAL.cast_unsigned();
    Some(call.cast_signed())
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn fail(_: &mut ucontext_t) -> Option<i64> {
    // No filter is installed there.
    None
}

/// Writes a line with one system call, without memory from the heap or a lock: either may be what
/// was interrupted.
fn say(call: i64, first: i64) {
    let mut line = [0u8; 160];
    let mut rest = line.as_mut_slice();
    let thread = rustix::thread::name().ok();
    let thread = thread.as_ref().and_then(|name| name.to_str().ok()).unwrap_or("?");
    let written = writeln!(
        rest,
        "causeway: the sandbox refused system call {call} ({first:#x}, ..) in thread {thread}: it \
         fails with EPERM (--sandbox off allows it)"
    );
    let left = rest.len();
    let len = line.len().saturating_sub(left);
    if let (Ok(()), Some(line)) = (written, line.get(..len)) {
        let _ = rustix::io::write(io::stderr(), line);
    }
}
