//! Programs run one after the other, their time, and what their test runners said at the end.
//!
//! A failing step does not stop the next: one run shows everything that is wrong.

use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use conformance::scratch::repository;

/// Starts of the lines with which test runners close.
const CLOSING: [&str; 2] = ["test result: ", "tidy: "];

/// What ran so far.
#[derive(Debug, Default)]
pub(crate) struct Steps {
    done: Vec<Step>,
}

#[derive(Debug)]
struct Step {
    name: String,
    time: Duration,
    outcome: Outcome,
    closing: Vec<String>,
}

#[derive(Debug, Eq, PartialEq)]
enum Outcome {
    Passed,
    Failed(String),
    /// Not run, with the reason; whether that is a failure is for who says so.
    NotRun {
        reason: String,
        failure: bool,
    },
}

impl Steps {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Runs `cargo` with these arguments as the step `name`.
    pub(crate) fn cargo(&mut self, name: &str, arguments: &[&str]) -> Result<()> {
        let mut command = cargo();
        self.command(name, command.args(arguments))
    }

    /// Runs a command as the step `name`; its standard output is passed on as it comes.
    pub(crate) fn command(&mut self, name: &str, command: &mut Command) -> Result<()> {
        println!("\n=== {name}");
        let start = Instant::now();
        let mut closing = Vec::new();
        let status = stream(command, |line| {
            if CLOSING.iter().any(|start| line.starts_with(start)) {
                closing.push(line.to_owned());
            }
        })?;
        let failed = || Outcome::Failed(status.to_string());
        let outcome = if status.success() { Outcome::Passed } else { failed() };
        self.done.push(Step { name: name.to_owned(), time: start.elapsed(), outcome, closing });
        Ok(())
    }

    /// Notes a check that was made without a program.
    pub(crate) fn note(&mut self, name: &str, result: Result<String>) {
        let (outcome, closing) = match result {
            Ok(said) => (Outcome::Passed, vec![said]),
            Err(error) => (Outcome::Failed(format!("{error:#}")), Vec::new()),
        };
        self.done.push(Step { name: name.to_owned(), time: Duration::ZERO, outcome, closing });
    }

    /// Notes what did not run, and why.
    pub(crate) fn not_run(&mut self, name: &str, reason: &str, failure: bool) {
        let outcome = Outcome::NotRun { reason: reason.to_owned(), failure };
        let name = name.to_owned();
        self.done.push(Step { name, time: Duration::ZERO, outcome, closing: Vec::new() });
    }

    /// Prints every step with its closing lines; a failure if one failed.
    pub(crate) fn summary(&self) -> ExitCode {
        if self.done.is_empty() {
            return ExitCode::SUCCESS;
        }
        println!("\n=== summary");
        for step in &self.done {
            println!("{}", step.line());
            for line in &step.closing {
                println!("         {line}");
            }
        }
        let failed = self.done.iter().filter(|step| step.outcome.is_failure()).count();
        let not_run = |step: &&Step| matches!(step.outcome, Outcome::NotRun { .. });
        let not_run = self.done.iter().filter(not_run).count();
        println!("{} steps, {failed} failed, {not_run} not run", self.done.len());
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

impl Step {
    fn line(&self) -> String {
        let (name, seconds) = (&self.name, self.time.as_secs());
        match &self.outcome {
            Outcome::Passed => format!("ok       {name} ({seconds} s)"),
            Outcome::Failed(why) => format!("FAILED   {name} ({seconds} s): {why}"),
            Outcome::NotRun { reason, .. } => format!("NOT RUN  {name}: {reason}"),
        }
    }
}

impl Outcome {
    fn is_failure(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::NotRun { failure: true, .. })
    }
}

/// The cargo that runs us, at the root of the tree.
pub(crate) fn cargo() -> Command {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    let _ = command.current_dir(repository());
    command
}

/// Builds with cargo, and fails if that fails: what follows would make no sense.
pub(crate) fn build(arguments: &[&str]) -> Result<()> {
    let status = cargo().arg("build").args(arguments).status().context("cannot start cargo")?;
    anyhow::ensure!(status.success(), "cargo build {} failed", arguments.join(" "));
    Ok(())
}

fn stream(command: &mut Command, mut each: impl FnMut(&str)) -> Result<ExitStatus> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {shown}"))?;
    if let Some(out) = child.stdout.take() {
        let mut reader = BufReader::new(out);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line)? > 0 {
            let text = String::from_utf8_lossy(&line);
            print!("{text}");
            each(text.trim_end());
            line.clear();
        }
    }
    Ok(child.wait()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_are_kept_and_failures_counted() {
        let mut steps = Steps::new();
        let mut good = Command::new("sh");
        steps.command("good", good.args(["-c", "echo noise; echo test result: ok. 1"])).unwrap();
        assert_eq!(steps.done[0].closing, ["test result: ok. 1"]);
        assert_eq!(steps.summary(), ExitCode::SUCCESS);
        steps.command("bad", Command::new("sh").args(["-c", "exit 3"])).unwrap();
        assert_eq!(steps.summary(), ExitCode::FAILURE);
    }

    #[test]
    fn what_was_not_run_fails_only_if_said_so() {
        let mut steps = Steps::new();
        steps.not_run("a", "no root", false);
        assert_eq!(steps.summary(), ExitCode::SUCCESS);
        steps.not_run("b", "no root", true);
        assert_eq!(steps.summary(), ExitCode::FAILURE);
    }
}
