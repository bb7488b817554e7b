//! The thread of a half, and how control tells it to rest and to end.

use std::any::Any;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

use crate::QueueFault;

/// Called by a thread that rests now, or has ended, after it was asked to.
pub type Notice = Arc<dyn Fn() + Send + Sync>;

/// How a thread is to be started.
#[derive(Clone)]
pub struct Plan {
    /// The thread's name.
    pub name: String,
    /// Whether it rests at first.
    pub rests: bool,
    /// Who is told.
    pub notice: Notice,
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a thread does, over and over.
pub(super) trait Work: Send + 'static {
    /// Does what is there to do. Returns whether there was something.
    ///
    /// # Errors
    ///
    /// The fault that ends it.
    fn turn(&mut self) -> Result<bool, QueueFault>;

    /// Waits until there is something, or `wake` becomes readable.
    fn wait(&mut self, wake: BorrowedFd<'_>);

    /// Tells the other side that something has ended.
    fn faulted(&self);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Wish {
    Run,
    Rest,
    End,
}

#[derive(Debug)]
struct State {
    wish: Wish,
    /// It touches nothing, and will not before the wish is another one.
    rests: bool,
    ended: bool,
    fault: Option<QueueFault>,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Makes the thread look at the wish.
    wake: OwnedFd,
    notice: Notice,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wish(&self, wish: Wish) {
        self.state().wish = wish;
        self.changed.notify_all();
        // It fails only when the count is full, and then the fd is readable.
        let _ = rustix::io::write(&self.wake, &1u64.to_ne_bytes());
    }

    /// Rests as long as it is to. Returns whether to go on.
    fn goes_on(&self) -> bool {
        let mut state = self.state();
        loop {
            match state.wish {
                Wish::Run => {
                    state.rests = false;
                    return true;
                }
                Wish::End => return false,
                Wish::Rest if state.rests => {}
                Wish::Rest => {
                    state.rests = true;
                    (self.notice)();
                }
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn ended(&self, fault: Option<QueueFault>) {
        let mut state = self.state();
        state.ended = true;
        state.fault = fault;
        (self.notice)();
    }
}

/// Makes a thread rest and go on; whoever owns its half may be somebody else.
#[derive(Clone)]
pub struct Pacer(Arc<Shared>);

impl Pacer {
    /// Asks the thread to rest. Returns whether it does: if not, the notice is given when it does.
    pub fn rest(&self) -> bool {
        self.0.wish(Wish::Rest);
        let state = self.0.state();
        state.rests || state.ended
    }

    /// Lets the thread go on.
    pub fn go_on(&self) {
        self.0.wish(Wish::Run);
    }
}

impl fmt::Debug for Pacer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Pacer").field(&*self.0.state()).finish()
    }
}

/// What a thread leaves.
pub(super) struct Ended<W> {
    pub(super) work: W,
    /// Whether there was no bug.
    pub(super) is_sound: bool,
}

/// A thread and what it works on. Dropping it asks the thread to end, and waits for nothing.
pub(super) struct Helper<W> {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Ended<W>>>,
}

impl<W: Work> Helper<W> {
    pub(super) fn start(plan: Plan, work: W) -> io::Result<Self> {
        let state = State {
            wish: if plan.rests { Wish::Rest } else { Wish::Run },
            // It has touched nothing yet.
            rests: plan.rests,
            ended: false,
            fault: None,
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            notice: plan.notice,
        });
        let of_thread = Arc::clone(&shared);
        let job = move || run(work, &of_thread);
        let thread = std::thread::Builder::new().name(plan.name).spawn(job)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    pub(super) fn pacer(&self) -> Pacer {
        Pacer(Arc::clone(&self.shared))
    }

    /// What ended it by itself, if something did.
    pub(super) fn fault(&self) -> Option<QueueFault> {
        self.shared.state().fault.clone()
    }

    /// Ends the thread and waits for that, which takes as long as the memory that it touches; no
    /// time if it rests.
    pub(super) fn end(mut self) -> Option<Ended<W>> {
        self.shared.wish(Wish::End);
        self.thread.take()?.join().ok()
    }
}

impl<W> Drop for Helper<W> {
    fn drop(&mut self) {
        self.shared.wish(Wish::End);
    }
}

impl<W> fmt::Debug for Helper<W> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Helper").field("state", &*self.shared.state()).finish_non_exhaustive()
    }
}

fn run<W: Work>(mut work: W, shared: &Shared) -> Ended<W> {
    let mut fault = None;
    let done = catch_unwind(AssertUnwindSafe(|| {
        while fault.is_none() && shared.goes_on() {
            match work.turn() {
                Ok(true) => {}
                Ok(false) => {
                    work.wait(shared.wake.as_fd());
                    let _ = rustix::io::read(&shared.wake, &mut [0; 8]);
                }
                Err(found) => fault = Some(found),
            }
        }
    }));
    let panicked = done.err().map(|panic| bug(&*panic));
    let is_sound = panicked.is_none();
    let fault = panicked.or(fault);
    let faulted = fault.is_some();
    shared.ended(fault);
    if faulted {
        work.faulted();
    }
    Ended { work, is_sound }
}

fn bug(panic: &(dyn Any + Send)) -> QueueFault {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
    let what = "a bug in the thread that serves the queue".to_owned();
    QueueFault::Host { what, error: text.unwrap_or_else(|| "a panic".to_owned()) }
}

/// Waits until one of the fds is readable.
pub(super) fn wait_for(fds: &[BorrowedFd<'_>]) {
    let mut polled: Vec<_> =
        fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    // A signal is a reason to look, too.
    let _ = poll(&mut polled, None);
}
