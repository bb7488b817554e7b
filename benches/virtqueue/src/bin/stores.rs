//! Two workers on two disjoint pairs of guests take turns, so that a trace of all loads and
//! stores tells which cache lines both of them touch: `cargo xtask bench two-workers`.
//!
//! ```text
//!  thread 0:  offer │ MARKS[0] │ serve │ MARKS[2] │ reclaim                       ...
//!  thread 1:                                        offer │ MARKS[1] │ serve │ MARKS[2] ...
//! ```
//!
//! Each worker is on a thread of its own, as always, and only one runs at a time: a store to a
//! mark says whose the loads and stores after it are. The addresses of the marks are printed, and
//! the rounds begin when a line comes in.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

use virtq::Layout;
use virtqueue::{Pair, Traffic, pairs};

/// Rounds of each worker that are traced.
const ROUNDS: u64 = 40;
/// Rounds before them, in which queues that stay empty are armed and all memory is allocated.
const WARM_UP: u64 = 200;
const BURST: u16 = 32;
/// Far more than a thread takes from a wake-up to its next wait.
const SETTLE: Duration = Duration::from_millis(10);
/// Whose turn begins, or none's.
static MARKS: [AtomicU64; 3] = [const { AtomicU64::new(0) }; 3];
/// Written by both with `--shared`: a trace must show it.
static SHARED: AtomicU64 = AtomicU64::new(0);

fn main() -> ExitCode {
    let args = std::env::args().skip(1);
    let args = args.collect::<Vec<_>>();
    let args = args.iter().map(String::as_str).collect::<Vec<_>>();
    let (kind, shared) = match *args {
        [kind] => (kind, false),
        [kind, "--shared"] => (kind, true),
        _ => ("", false),
    };
    let (layout, traffic) = match kind {
        "split" => (Layout::Split, Traffic::Plain),
        "packed" => (Layout::Packed, Traffic::Plain),
        "split-mixed" => (Layout::Split, Traffic::Mixed),
        "split-multiqueue" => (Layout::Split, Traffic::Multiqueue),
        _ => {
            eprintln!("usage: stores split|packed|split-mixed|split-multiqueue [--shared]");
            return ExitCode::from(2);
        }
    };
    match run(layout, traffic, shared) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("stores: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(layout: Layout, traffic: Traffic, shared: bool) -> anyhow::Result<()> {
    let mut pairs = pairs(layout, traffic, 2)?;
    for _ in 0..WARM_UP {
        for pair in &mut pairs {
            pair.round(BURST)?;
        }
        // Time for queues without frames to become cold.
        std::thread::sleep(Duration::from_micros(10));
    }
    println!("{ROUNDS} rounds, marks {:p} {:p} {:p}", &MARKS[0], &MARKS[1], &MARKS[2]);
    let _ = std::io::stdin().read_line(&mut String::new())?;
    let next = (Mutex::new(0), Condvar::new());
    std::thread::scope(|scope| {
        let mut threads = Vec::new();
        for (number, pair) in (0..).zip(&mut pairs) {
            let next = &next;
            threads.push(scope.spawn(move || turns(pair, number, next, shared)));
        }
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
        }
        Ok(())
    })
}

/// Every other round is of this worker.
fn turns(
    pair: &mut Pair,
    number: u64,
    (next, changed): &(Mutex<u64>, Condvar),
    shared: bool,
) -> anyhow::Result<()> {
    let [first, second, none] = &MARKS;
    let own = if number == 0 { first } else { second };
    let end = ROUNDS.saturating_mul(2);
    loop {
        let mut round = next.lock().unwrap_or_else(PoisonError::into_inner);
        while *round < end && *round % 2 != number {
            round = changed.wait(round).unwrap_or_else(PoisonError::into_inner);
        }
        if *round >= end {
            return Ok(());
        }
        // The other threads reach their waits, and stay there.
        std::thread::sleep(SETTLE);
        pair.offer(BURST)?;
        own.store(1, Ordering::SeqCst);
        let worked = pair.serve();
        if shared {
            let _ = SHARED.fetch_add(1, Ordering::Relaxed);
        }
        none.store(1, Ordering::SeqCst);
        let arrived = pair.reclaim()?;
        anyhow::ensure!(worked? && arrived == usize::from(BURST), "{arrived} frames arrived");
        *round = round.saturating_add(1);
        changed.notify_all();
    }
}
