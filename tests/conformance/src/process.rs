//! A child process that cannot outlive its owner, with its output in a log file.
//!
//! **Limits** Waits poll every 5 ms and always end: with the text, with the end of the process, or
//! with the time-out.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

const POLL: Duration = Duration::from_millis(5);
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// A running child; dropped, it is killed by its own process id and reaped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// A command that the kernel kills when the thread that started it dies, so that an interrupted
/// test run leaves nothing behind.
#[must_use]
pub fn tied_command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    let _ = command.args(["--pdeathsig", "KILL", "--"]).arg(program);
    command
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// The command cannot be started, does not end in time, or fails: then with what it printed.
pub fn output(command: &mut Command, timeout: Duration) -> Result<String> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    let readers = (reader(child.stdout.take()), reader(child.stderr.take()));
    let Some(status) = wait(&mut child, timeout)? else {
        child.kill()?;
        let _ = child.wait()?;
        bail!("{shown} did not end in {timeout:?}");
    };
    let out = readers.0.join().unwrap_or_default();
    let err = readers.1.join().unwrap_or_default();
    if !status.success() {
        bail!("{shown} failed with {status}\n{out}{err}");
    }
    Ok(out)
}

fn reader<R: Read + Send + 'static>(source: Option<R>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            let _ = source.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

fn wait(child: &mut Child, timeout: Duration) -> Result<Option<ExitStatus>> {
    let start = Instant::now();
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if start.elapsed() >= timeout {
            return Ok(None);
        }
        sleep(POLL);
    }
}

impl Process {
    /// Starts `command`, which takes its input from [`Process::send`] and writes to `log`.
    ///
    /// # Errors
    /// The log cannot be made or the program cannot be started.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let out = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        let child = command
            .stdin(Stdio::piped())
            .stdout(out.try_clone()?)
            .stderr(out)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self { name: name.to_owned(), child, log: log.to_owned() })
    }

    /// The process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Writes one line to the standard input of the process.
    ///
    /// # Errors
    /// The process has closed its input.
    pub fn send(&mut self, line: &str) -> Result<()> {
        let stdin = self.child.stdin.as_mut().context("standard input is closed")?;
        writeln!(stdin, "{line}").with_context(|| format!("cannot write to {}", self.name))
    }

    /// Everything that the process has written from byte `from` of its log on.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn output_from(&self, from: u64) -> Result<String> {
        let mut file = File::open(&self.log)?;
        let _ = file.seek(SeekFrom::Start(from))?;
        let mut bytes = Vec::new();
        let _ = file.read_to_end(&mut bytes)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Where the log ends now.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn log_end(&self) -> Result<u64> {
        Ok(std::fs::metadata(&self.log)?.len())
    }

    /// Waits until `found` finds what it looks for in the output after `from`.
    ///
    /// # Errors
    /// The process ends first, or the time is over: then with the end of its log.
    pub fn wait_for<T>(
        &mut self,
        what: &str,
        from: u64,
        timeout: Duration,
        found: impl Fn(&str) -> Option<T>,
    ) -> Result<T> {
        let start = Instant::now();
        loop {
            // The status is taken before the text, or the last words of a process would be missed.
            let ended = self.child.try_wait()?;
            if let Some(value) = found(&self.output_from(from)?) {
                return Ok(value);
            }
            if let Some(status) = ended {
                bail!("{} ended ({status}) before {what}\n{}", self.name, self.tail());
            }
            if start.elapsed() >= timeout {
                bail!("{}: {what} did not come in {timeout:?}\n{}", self.name, self.tail());
            }
            sleep(POLL);
        }
    }

    /// Asks the process to end (SIGTERM) and returns how it did.
    ///
    /// # Errors
    /// It does not end within five seconds.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.child.try_wait()? {
            return Ok(status);
        }
        let id = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw);
        kill_process(id.context("no process id")?, Signal::TERM)?;
        self.finish(STOP_TIMEOUT)
    }

    /// Waits for the end of the process.
    ///
    /// # Errors
    /// It does not end in time.
    pub fn finish(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let status = wait(&mut self.child, timeout)?;
        status.with_context(|| format!("{} did not end in {timeout:?}\n{}", self.name, self.tail()))
    }

    /// The last lines of the log, for error messages.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = self.output_from(0).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let shown = lines.get(lines.len().saturating_sub(25)..).unwrap_or_default();
        format!("--- end of {}\n{}\n---", self.log.display(), shown.join("\n"))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it is gone already, which is the aim.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Scratch;

    #[test]
    fn output_reports_failure_with_what_was_printed() {
        let error = output(
            tied_command("sh").args(["-c", "echo reason >&2; exit 3"]),
            Duration::from_secs(5),
        )
        .unwrap_err();
        assert!(error.to_string().contains("reason"), "{error}");
    }

    #[test]
    fn a_command_that_hangs_is_ended() {
        let error = output(tied_command("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("did not end"), "{error}");
    }

    #[test]
    fn waits_see_output_and_the_end() {
        let scratch = Scratch::new("process").unwrap();
        let log = scratch.path("log");
        let mut cat = Process::spawn("cat", &mut tied_command("cat"), &log).unwrap();
        cat.send("hello").unwrap();
        let second = Duration::from_secs(1);
        cat.wait_for("hello", 0, second, |t| t.contains("hello").then_some(())).unwrap();
        assert!(!cat.stop().unwrap().success());
        let error = cat.wait_for("more", 0, second, |_| None::<()>).unwrap_err();
        assert!(error.to_string().contains("ended"), "{error}");
    }
}
