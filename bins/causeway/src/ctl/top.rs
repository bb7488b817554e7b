//! `ctl top`: where time goes, between two looks at the counters, again and again.
//!
//! On a terminal each view replaces the one before, on a screen of its own that goes away in the
//! end; elsewhere the views follow each other.

use std::io::{IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use control::protocol::StatsView;
use control::top::TopView;
use control::{Request, table};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::termios::tcgetwinsize;

use super::{ask, read};
use crate::Failure;
use crate::cli::TopArgs;
use crate::signals::Signals;

/// Other screen, no cursor.
const ENTER: &str = "\x1b[?1049h\x1b[?25l";
/// Cursor and screen as they were.
const LEAVE: &str = "\x1b[?25h\x1b[?1049l";
/// To the upper left; what is right of a line; what is below.
const HOME: &str = "\x1b[H";
const CLEAR_RIGHT: &str = "\x1b[K";
const CLEAR_BELOW: &str = "\x1b[J";

pub(super) fn top(control: &Path, json: bool, arguments: &TopArgs) -> Result<(), Failure> {
    let out = Output { json, screen: !json && !arguments.once && std::io::stdout().is_terminal() };
    if arguments.once {
        let before = look(control)?;
        std::thread::sleep(arguments.interval);
        let view = TopView::between(&before, &look(control)?);
        let _ = out.show(&view);
        return Ok(());
    }
    let signals = Signals::take_over()
        .map_err(|error| Failure::Runtime(format!("cannot take signals over: {error}")))?;
    let before = look(control)?;
    out.enter();
    let result = repeat(control, before, (&out, arguments.interval), &signals);
    out.leave();
    result
}

/// Shows view after view until a signal ends it, or nobody reads.
fn repeat(
    control: &Path,
    mut before: StatsView,
    (out, interval): (&Output, Duration),
    signals: &Signals,
) -> Result<(), Failure> {
    let mut due = Instant::now();
    loop {
        // By the clock, so that the time that an answer takes does not add up.
        due = due.checked_add(interval).unwrap_or(due).max(Instant::now());
        if ended_before(due, signals) {
            return Ok(());
        }
        let after = look(control)?;
        if out.show(&TopView::between(&before, &after)).is_err() {
            return Ok(());
        }
        before = after;
    }
}

fn look(control: &Path) -> Result<StatsView, Failure> {
    read(ask(control, &Request::Stats)?)
        .map_err(|error| Failure::Runtime(format!("the switch gave an unknown answer: {error}")))
}

/// Waits. True if a signal came, whichever: a terminal that goes away ends it too.
fn ended_before(due: Instant, signals: &Signals) -> bool {
    loop {
        let asked = signals.take();
        if asked.stop || asked.reload {
            return true;
        }
        let left = due.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return false;
        }
        let mut fds = [PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN)];
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        // Interrupted by a signal, it is tried again.
        let _ = poll(&mut fds, Some(&timeout));
    }
}

/// Where views go.
#[derive(Debug)]
struct Output {
    json: bool,
    /// Whether each view replaces the one before.
    screen: bool,
}

impl Output {
    fn enter(&self) {
        if self.screen {
            let _ = write(ENTER);
        }
    }

    fn leave(&self) {
        if self.screen {
            let _ = write(LEAVE);
        }
    }

    fn show(&self, view: &TopView) -> std::io::Result<()> {
        if self.json {
            let line = serde_json::to_string(view).map_err(std::io::Error::other)?;
            return write(&format!("{line}\n"));
        }
        let text = table::top(view);
        if self.screen { write(&frame(&text, size())) } else { write(&format!("{text}\n")) }
    }
}

/// Lines and columns of the terminal.
fn size() -> (usize, usize) {
    let size = tcgetwinsize(std::io::stdout()).ok();
    let known = size.filter(|size| size.ws_row > 0 && size.ws_col > 0);
    known.map_or((24, 80), |size| (size.ws_row.into(), size.ws_col.into()))
}

/// A view as it is drawn over the one before: as much of it as there is room for.
fn frame(text: &str, (lines, columns): (usize, usize)) -> String {
    let mut frame = HOME.to_owned();
    for (index, line) in text.lines().take(lines).enumerate() {
        if index > 0 {
            frame.push_str("\r\n");
        }
        frame.extend(line.chars().take(columns));
        // At the right edge this would erase the last character.
        if line.chars().count() < columns {
            frame.push_str(CLEAR_RIGHT);
        }
    }
    frame.push_str(CLEAR_BELOW);
    frame
}

fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::{CLEAR_BELOW, CLEAR_RIGHT, HOME, frame};

    #[test]
    fn a_view_fits_its_terminal() {
        let drawn = frame("ab\nabcdef\nx\ny\n", (3, 4));
        let expected = format!("{HOME}ab{CLEAR_RIGHT}\r\nabcd\r\nx{CLEAR_RIGHT}{CLEAR_BELOW}");
        assert_eq!(drawn, expected);
    }
}
