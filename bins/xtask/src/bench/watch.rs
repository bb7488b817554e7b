//! Whether a run was disturbed: its programs waited for their CPUs, or the host took them.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// What `/proc/stat` counts in: a hundredth of a second on every Linux that matters.
const TICK: Duration = Duration::from_millis(10);
/// CPUs of the back end and of the guest.
const CPUS: usize = 2;

/// Looks at programs while they are measured.
#[derive(Debug)]
pub(crate) struct Watch {
    programs: Vec<(u32, Threads)>,
    stolen: [Duration; CPUS],
    start: Instant,
}

/// What the programs of a run did not get, as shares of its time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Disturbance {
    /// For how long the busiest thread of one of the programs, the one with more of it, could
    /// have run and another program had its CPU.
    pub(crate) waited: f64,
    /// For how long the host had one of the two CPUs for others, the one with more of it.
    pub(crate) stolen: f64,
}

impl Disturbance {
    /// The larger share.
    pub(crate) fn share(self) -> f64 {
        self.waited.max(self.stolen)
    }
}

impl Watch {
    /// Looks at these processes from now on.
    pub(crate) fn start(programs: &[u32]) -> Result<Self> {
        let threads = |id: &u32| Ok((*id, Threads::of(*id)?));
        let programs = programs.iter().map(threads).collect::<Result<_>>()?;
        Ok(Self { programs, stolen: stolen(), start: Instant::now() })
    }

    /// What they did not get since the start. A process that has ended is left out.
    pub(crate) fn finish(&self) -> Disturbance {
        let time = self.start.elapsed().as_secs_f64().max(f64::MIN_POSITIVE);
        let waited = self
            .programs
            .iter()
            .map(|(id, before)| Threads::of(*id).unwrap_or_default().busiest_waited(before));
        let lost = stolen().into_iter().zip(self.stolen).map(|(now, was)| now.saturating_sub(was));
        let share =
            |time_lost: Option<Duration>| time_lost.unwrap_or_default().as_secs_f64() / time;
        Disturbance { waited: share(waited.max()), stolen: share(lost.max()) }
    }
}

/// The time that the host has given to others, for each of the two CPUs.
fn stolen() -> [Duration; CPUS] {
    let text = fs::read_to_string("/proc/stat").unwrap_or_default();
    std::array::from_fn(|cpu| parse_stolen(&text, cpu).unwrap_or_default())
}

/// Reads `cpu0 user nice system idle iowait irq softirq steal guest guest_nice`.
fn parse_stolen(text: &str, cpu: usize) -> Option<Duration> {
    let start = format!("cpu{cpu} ");
    let line = text.lines().find_map(|line| line.strip_prefix(&start))?;
    let ticks: u32 = line.split_whitespace().nth(7)?.parse().ok()?;
    TICK.checked_mul(ticks)
}

/// What the scheduler gave to each thread of a process, by the thread's id.
#[derive(Clone, Debug, Default, Eq, PartialEq)]
pub(crate) struct Threads(BTreeMap<OsString, CpuTime>);

/// What the scheduler gave to a thread.
#[derive(Clone, Copy, Debug, Default, Eq, PartialEq)]
struct CpuTime {
    running: Duration,
    /// It could have run, and another program had its CPU.
    waiting: Duration,
}

impl Threads {
    /// The times of a process so far.
    pub(crate) fn of(process: u32) -> Result<Self> {
        let folder = format!("/proc/{process}/task");
        let mut threads = BTreeMap::new();
        for entry in fs::read_dir(folder).context("the process has ended")? {
            let entry = entry?;
            // A thread may end meanwhile.
            if let Ok(text) = fs::read_to_string(entry.path().join("schedstat")) {
                let time = parse_times(&text).with_context(|| format!("schedstat says {text}"))?;
                let _ = threads.insert(entry.file_name(), time);
            }
        }
        Ok(Self(threads))
    }

    /// CPU time of all threads.
    pub(crate) fn running(&self) -> Duration {
        self.0.values().map(|time| time.running).sum()
    }

    /// How long the thread that has run most since `earlier`, the one that moves frames, waited
    /// for its CPU.
    pub(crate) fn busiest_waited(&self, earlier: &Self) -> Duration {
        let since = |(thread, time): (&OsString, &CpuTime)| {
            let before = earlier.0.get(thread).copied().unwrap_or_default();
            let running = time.running.saturating_sub(before.running);
            (running, time.waiting.saturating_sub(before.waiting))
        };
        let times: Vec<_> = self.0.iter().map(since).collect();
        let Some((running, waiting)) = times.iter().copied().max() else { return Duration::ZERO };
        let all: Duration = times.iter().map(|(running, _)| *running).sum();
        // For its own threads a program waits by its own choice.
        waiting.saturating_sub(all.saturating_sub(running))
    }
}

/// Where the time of a program's busiest thread went, as the scheduler's ticks saw it.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Spent {
    own: Duration,
    kernel: Duration,
}

/// The same for each frame, in nanoseconds.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct SpentPerFrame {
    /// In its own code, waiting for frames included.
    pub(crate) own_ns: f64,
    /// In the kernel, which it called.
    pub(crate) kernel_ns: f64,
}

impl Spent {
    /// Of all threads of a process so far: those that move no frames hardly run.
    pub(crate) fn of(process: u32) -> Result<Self> {
        let path = format!("/proc/{process}/stat");
        let text = fs::read_to_string(&path).context("the process has ended")?;
        parse_spent(&text).with_context(|| format!("{path} says {text}"))
    }

    pub(crate) fn since(self, before: Self) -> Self {
        let own = self.own.saturating_sub(before.own);
        Self { own, kernel: self.kernel.saturating_sub(before.kernel) }
    }

    pub(crate) fn per_frame(self, frames: f64) -> Option<SpentPerFrame> {
        let each = |time: Duration| time.as_secs_f64() * 1e9 / frames;
        let spent = SpentPerFrame { own_ns: each(self.own), kernel_ns: each(self.kernel) };
        (frames > 0.0).then_some(spent)
    }
}

/// Reads user and system time behind the program's name, which may have blanks in it.
fn parse_spent(text: &str) -> Option<Spent> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut numbers = rest.split_whitespace().skip(11);
    let mut next = || TICK.checked_mul(numbers.next()?.parse().ok()?);
    Some(Spent { own: next()?, kernel: next()? })
}

/// Reads a line of `schedstat`: nanoseconds on a CPU, nanoseconds waiting for one, time slices.
fn parse_times(text: &str) -> Option<CpuTime> {
    let mut numbers = text.split_whitespace().map(|word| word.parse().ok());
    let mut next = || numbers.next().flatten().map(Duration::from_nanos);
    Some(CpuTime { running: next()?, waiting: next()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stolen_time_is_that_of_one_cpu() {
        let text = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 1 2 3 4 5 6 7 80 0 0\n\
                    cpu1 1 2 3 4 5 6 7 3 0 0\ncpu10 0 0 0 0 0 0 0 0 0 0\n";
        assert_eq!(parse_stolen(text, 0), Some(Duration::from_millis(800)));
        assert_eq!(parse_stolen(text, 1), Some(Duration::from_millis(30)));
        assert_eq!(parse_stolen(text, 2), None);
    }

    #[test]
    fn a_program_that_ended_has_not_waited() {
        let gone = Watch {
            programs: vec![(u32::MAX, Threads::default())],
            stolen: stolen(),
            start: Instant::now(),
        };
        assert!(gone.finish().waited.abs() < 1e-9);
        assert!(Watch::start(&[u32::MAX]).is_err());
        let (waited, stolen) = (0.25, 0.5);
        assert!((Disturbance { waited, stolen }.share() - 0.5).abs() < 1e-9);
    }

    #[test]
    fn this_process_has_run() {
        assert!(Threads::of(std::process::id()).unwrap().running() > Duration::ZERO);
        assert!(Threads::of(u32::MAX).is_err());
    }

    #[test]
    fn time_is_divided_into_own_and_kernel() {
        let text = "7 (a (b) c) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0 3 0";
        let spent = parse_spent(text).unwrap().per_frame(1e6).unwrap();
        assert!((spent.own_ns - 1500.0).abs() < 1e-6 && (spent.kernel_ns - 500.0).abs() < 1e-6);
        assert!(parse_spent("7 (x) S 1").is_none());
    }

    #[test]
    fn only_the_busiest_thread_waits() {
        let threads = |times: [&str; 2]| {
            let times = times.map(|text| parse_times(text).unwrap());
            Threads(["1", "2"].map(OsString::from).into_iter().zip(times).collect())
        };
        // The first has started the program, the second moves frames.
        let (before, after) =
            (threads(["9000 5 1", "100 20 2"]), threads(["9010 900 3", "900 60 4"]));
        assert_eq!(after.busiest_waited(&before), Duration::from_nanos(30));
        assert_eq!(after.running(), Duration::from_nanos(9910));
        assert_eq!(parse_times("none"), None);
    }
}
