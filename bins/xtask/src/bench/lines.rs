//! Cache lines that two workers on two disjoint pairs of guests both touch: there must be none
//! that one of them writes.
//!
//! valgrind's `lackey` prints every load and store of the program `stores` of the package
//! `virtqueue`, whose two workers take turns and store to a mark before and after each one.
//!
//! ```text
//!  I  04a1b2c3,4        an instruction
//!   S 1ffeffe7e,8       a store, as are all with an M
//!   L 1ffeffe80,8       a load
//! ```

use std::collections::{HashMap, HashSet};
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, bail, ensure};
use conformance::environment::host;
use conformance::scratch::target_folder;

use crate::steps::{Steps, build};

const LINE_BYTES: u64 = 64;
/// Lines that are named if there are some.
const NAMED: usize = 8;

pub(crate) fn run(steps: &mut Steps) -> Result<()> {
    let valgrind = host::install("valgrind", "valgrind")?;
    build(&["--release", "-p", "virtqueue", "--bin", "stores"])?;
    for kind in ["split", "packed", "split-mixed", "split-multiqueue"] {
        let name = format!("cache lines of two workers, {kind}");
        steps.note(&name, trace(&valgrind, &[kind]).and_then(|seen| seen.judge()));
    }
    // If the trace could not see a line that both write, it would prove nothing.
    let twin = trace(&valgrind, &["split", "--shared"]).and_then(|seen| match seen.judge() {
        Ok(said) => bail!("a line that both workers write was not seen: {said}"),
        Err(_) => Ok(format!("seen, as it must be: {} lines", seen.shared().len())),
    });
    steps.note("cache lines of two workers, with one that both write on purpose", twin);
    Ok(())
}

/// What each worker touched, by line.
#[derive(Debug, Default)]
struct Seen {
    /// Stored lines, and the last instruction that stored to each.
    stored: [HashMap<u64, u64>; 2],
    loaded: [HashSet<u64>; 2],
    /// Turns of each.
    turns: [u64; 2],
    rounds: u64,
}

/// Where the marks are.
#[derive(Debug)]
struct Marks {
    rounds: u64,
    addresses: [u64; 3],
}

fn trace(valgrind: &Path, arguments: &[&str]) -> Result<Seen> {
    let mut command = Command::new(valgrind);
    let _ = command
        .args(["--tool=lackey", "--trace-mem=yes", "--basic-counts=no"])
        .arg(target_folder().join("release/stores"))
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start valgrind")?;
    let seen = follow(&mut child);
    if seen.is_err() {
        let _ = child.kill();
    }
    let status = child.wait()?;
    let seen = seen?;
    ensure!(status.success(), "stores: {status}");
    ensure!(seen.turns == [seen.rounds; 2], "{:?} turns, not {} each", seen.turns, seen.rounds);
    Ok(seen)
}

fn follow(child: &mut Child) -> Result<Seen> {
    let (Some(mut input), Some(out), Some(trace)) =
        (child.stdin.take(), child.stdout.take(), child.stderr.take())
    else {
        bail!("valgrind has no pipes");
    };
    let marks = OnceLock::new();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(trace, &marks));
        let mut line = String::new();
        let _ = BufReader::new(out).read_line(&mut line)?;
        let parsed = Marks::parse(&line);
        if let Some(parsed) = parsed {
            let _ = marks.set(parsed);
            input.write_all(b"go\n")?;
        }
        // The program goes on, or ends for want of a line.
        drop(input);
        let seen = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        ensure!(marks.get().is_some(), "stores says: {line:?}");
        Ok(seen)
    })
}

impl Marks {
    /// The program says: "40 rounds, marks 0x10 0x18 0x20".
    fn parse(line: &str) -> Option<Self> {
        let (rounds, rest) = line.trim().split_once(" rounds, marks ")?;
        let hex = |word: &str| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok();
        let addresses: Option<Vec<_>> = rest.split(' ').map(hex).collect();
        Some(Self { rounds: rounds.parse().ok()?, addresses: addresses?.try_into().ok()? })
    }
}

/// Reads a trace to its end; what comes before the marks are known is not looked at.
fn read(trace: ChildStderr, marks: &OnceLock<Marks>) -> Result<Seen> {
    let mut seen = Seen::default();
    let mut reader = BufReader::with_capacity(1 << 20, trace);
    let mut line = Vec::new();
    let mut now = (None, 0);
    while reader.read_until(b'\n', &mut line)? > 0 {
        if let (Some(marks), Ok(text)) = (marks.get(), std::str::from_utf8(&line)) {
            seen.rounds = marks.rounds;
            seen.take(text, marks, &mut now);
        }
        line.clear();
    }
    Ok(seen)
}

impl Seen {
    /// Takes one line of the trace. `turn` is whose turn it is, and the last instruction.
    fn take(&mut self, text: &str, marks: &Marks, turn: &mut (Option<usize>, u64)) {
        let Some((kind, rest)) = text.split_at_checked(3) else { return };
        let Some((address, size)) = rest.trim().split_once(',') else { return };
        let (Ok(address), Ok(size)) = (u64::from_str_radix(address, 16), size.parse::<u64>())
        else {
            return;
        };
        if kind == "I  " {
            turn.1 = address;
            return;
        }
        let stores = matches!(kind, " S " | " M ");
        if stores && let Some(mark) = marks.addresses.iter().position(|mark| *mark == address) {
            turn.0 = (mark < 2).then_some(mark);
            if let Some(turns) = self.turns.get_mut(mark) {
                *turns = turns.saturating_add(1);
            }
            return;
        }
        let Some(worker) = turn.0 else { return };
        let last = address.saturating_add(size.saturating_sub(1)) / LINE_BYTES;
        for number in address / LINE_BYTES..=last {
            if !stores {
                let _ = self.loaded.get_mut(worker).is_some_and(|lines| lines.insert(number));
            } else if let Some(lines) = self.stored.get_mut(worker) {
                let _ = lines.insert(number, turn.1);
            }
        }
    }

    /// Lines that one worker stores to and the other loads from or stores to, with the
    /// instruction that stored.
    fn shared(&self) -> Vec<(u64, u64)> {
        let [first, second] = &self.stored;
        let [first_loads, second_loads] = &self.loaded;
        let touched = |line: &u64, stored: &HashMap<u64, u64>, loaded: &HashSet<u64>| {
            stored.contains_key(line) || loaded.contains(line)
        };
        let mut lines: Vec<_> = first
            .iter()
            .filter(|(line, _)| touched(line, second, second_loads))
            .chain(second.iter().filter(|(line, _)| touched(line, first, first_loads)))
            .map(|(line, at)| (*line, *at))
            .collect();
        lines.sort_unstable();
        lines.dedup_by_key(|(line, _)| *line);
        lines
    }

    fn judge(&self) -> Result<String> {
        let shared = self.shared();
        let [first, second] = &self.stored;
        if shared.is_empty() {
            ensure!(first.len().min(second.len()) > 10, "hardly any stores were seen");
            return Ok(format!(
                "{} lines written by one worker, {} by the other; none of them is read or \
                 written by both",
                first.len(),
                second.len()
            ));
        }
        let name = |(line, at): &(u64, u64)| {
            format!("{:#x} (by the instruction at {at:#x})", line.saturating_mul(LINE_BYTES))
        };
        let names: Vec<_> = shared.iter().take(NAMED).map(name).collect();
        bail!(
            "{} lines are written by one worker and touched by both: {}",
            shared.len(),
            names.join(", ")
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(trace: &str) -> Seen {
        let marks = Marks::parse("1 rounds, marks 0x1000 0x1008 0x1010\n").unwrap();
        let (mut seen, mut now) = (Seen::default(), (None, 0));
        for line in trace.lines() {
            seen.take(line, &marks, &mut now);
        }
        seen
    }

    #[test]
    fn a_line_that_both_touch_is_found_if_one_writes_it() {
        let first =
            "I  00400000,3\n S 00001000,8\n S 2000,8\n L 4000,8\n S 00001010,8\n S 9000,1\n";
        let of_second =
            |what: &str| seen(&format!("{first} S 00001008,8\n{what}\n S 00001010,8\n")).shared();
        assert_eq!(of_second(" S 3000,8\n L 4000,8\n S 9000,1"), []);
        assert_eq!(of_second(" L 2038,4"), [(0x2000 / 64, 0x40_0000)]);
        assert_eq!(of_second(" M 2000,1").len(), 1);
        assert_eq!(of_second(" S 3ffe,4").len(), 1, "across the end of a line");
        assert_eq!(of_second(" L 1ffe,2"), []);
        assert_eq!(seen(first).turns, [1, 0]);
    }

    #[test]
    fn other_lines_are_no_trace() {
        assert_eq!(seen("==1== lackey\n\n S zz,8\n S 10\nI\n").stored[0].len(), 0);
        assert!(Marks::parse("3 rounds, marks 0x1 0x2").is_none());
    }
}
