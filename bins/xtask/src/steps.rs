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

/// Lines that are kept of what a failed step's test runners say of failed tests, and characters of
/// such a line: enough for a panic's text, short enough for who reads only the end of a log.
const REPORT: (usize, usize) = (120, 400);

/// Failed tests of one step that are tried once more; more of them are no accident.
const SECOND_TRIES: usize = 2;

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
    said: Said,
}

/// What a step's test runners said that is worth repeating at the end.
#[derive(Debug, Default)]
struct Said {
    closing: Vec<String>,
    /// What stands between `failures:` and the result, of each runner that had failures.
    report: Vec<String>,
    /// Names of the tests that failed.
    failed: Vec<String>,
    /// Runners that began.
    began: usize,
    /// Lines that may still be kept until the next `failures:`; `None` outside of a report.
    room: Option<usize>,
}

#[derive(Debug, Eq, PartialEq)]
enum Outcome {
    Passed,
    Failed(String),
    /// Tests failed and passed when they ran once more, by themselves: the machine was busy, or
    /// the test or the code has a race. A failure all the same, shown with what they said.
    Unsteady,
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
        let mut said = Said::default();
        let status = stream(command, |line| said.hear(line))?;
        let failed = || Outcome::Failed(status.to_string());
        let outcome = if status.success() { Outcome::Passed } else { failed() };
        self.done.push(Step { name: name.to_owned(), time: start.elapsed(), outcome, said });
        Ok(())
    }

    /// Runs a step of tests; one or two that failed are tried once more, to tell what fails always
    /// from what fails at times. `command` gets the names of the tests that it shall run, or none
    /// for all of them.
    pub(crate) fn tests(
        &mut self,
        name: &str,
        command: impl Fn(&[String]) -> Command,
    ) -> Result<()> {
        self.command(name, &mut command(&[]))?;
        let Some(first) = self.done.last_mut() else { return Ok(()) };
        let names = first.said.failed.clone();
        // A runner that ended in the middle names nothing that failed.
        let ended = first.said.began == first.said.closing.len();
        let few = (1..=SECOND_TRIES).contains(&names.len());
        if !first.outcome.is_failure() || !few || !ended {
            return Ok(());
        }
        println!("\n=== {name}: once more {}", names.join(", "));
        let mut again = Said::default();
        let status = stream(&mut command(&names), |line| again.hear(line))?;
        // A runner that finds nothing to run succeeds, too.
        let passed: u64 = again.closing.iter().filter_map(|line| tests_passed(line)).sum();
        if status.success() && passed >= names.len() as u64 {
            first.outcome = Outcome::Unsteady;
        }
        first
            .said
            .closing
            .extend(again.closing.into_iter().filter(|line| tests_passed(line) != Some(0)));
        first.said.report.extend(again.report);
        Ok(())
    }

    /// Notes a check that was made without a program.
    pub(crate) fn note(&mut self, name: &str, result: Result<String>) {
        let (outcome, closing) = match result {
            Ok(said) => (Outcome::Passed, vec![said]),
            Err(error) => (Outcome::Failed(format!("{error:#}")), Vec::new()),
        };
        let said = Said { closing, ..Said::default() };
        self.done.push(Step { name: name.to_owned(), time: Duration::ZERO, outcome, said });
    }

    /// Notes what did not run, and why.
    pub(crate) fn not_run(&mut self, name: &str, reason: &str, failure: bool) {
        let outcome = Outcome::NotRun { reason: reason.to_owned(), failure };
        let name = name.to_owned();
        self.done.push(Step { name, time: Duration::ZERO, outcome, said: Said::default() });
    }

    /// Prints every step with its closing lines, then what failed and what was said of it; a
    /// failure if one failed.
    pub(crate) fn summary(&self) -> ExitCode {
        if self.done.is_empty() {
            return ExitCode::SUCCESS;
        }
        println!("\n=== summary");
        for step in &self.done {
            println!("{}", step.line());
            for line in &step.said.closing {
                println!("         {line}");
            }
        }
        for step in self.done.iter().filter(|step| !step.said.report.is_empty()) {
            println!("\n{}", step.line());
            for line in &step.said.report {
                println!("         {line}");
            }
        }
        let failed = self.done.iter().filter(|step| step.outcome.is_failure()).count();
        let unsteady = self.done.iter().filter(|step| step.outcome == Outcome::Unsteady).count();
        let not_run = |step: &&Step| matches!(step.outcome, Outcome::NotRun { .. });
        let not_run = self.done.iter().filter(not_run).count();
        let steps = self.done.len();
        println!("{steps} steps, {failed} failed ({unsteady} unsteady), {not_run} not run");
        if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

impl Said {
    /// Takes the next line of a runner: libtest and libtest-mimic print `failures:`, what each
    /// failed test said, `failures:` with their names, and the result.
    fn hear(&mut self, line: &str) {
        let closes = CLOSING.iter().any(|start| line.starts_with(start));
        if closes {
            self.closing.push(line.to_owned());
        }
        let begins = line.strip_prefix("running ").is_some_and(|rest| rest.contains(" test"));
        self.began = self.began.saturating_add(usize::from(begins));
        let (lines, characters) = REPORT;
        if closes {
            self.room = None;
        } else if line == "failures:" {
            self.room = Some(lines);
        } else if let Some(name) = line.strip_prefix("    ").filter(|_| self.room == Some(lines)) {
            self.room = Some(lines);
            self.failed.push(name.to_owned());
            self.report.push(line.to_owned());
        } else if let Some(room @ 1..) = &mut self.room
            && !line.is_empty()
        {
            *room = room.saturating_sub(1);
            self.report.push(line.chars().take(characters).collect());
        }
    }
}

impl Step {
    fn line(&self) -> String {
        let (name, seconds) = (&self.name, self.time.as_secs());
        match &self.outcome {
            Outcome::Passed => format!("ok       {name} ({seconds} s)"),
            Outcome::Failed(why) => format!("FAILED   {name} ({seconds} s): {why}"),
            Outcome::Unsteady => {
                let names = self.said.failed.join(", ");
                format!("UNSTEADY {name} ({seconds} s): failed, then passed alone: {names}")
            }
            Outcome::NotRun { reason, .. } => format!("NOT RUN  {name}: {reason}"),
        }
    }
}

impl Outcome {
    fn is_failure(&self) -> bool {
        matches!(self, Self::Failed(_) | Self::Unsteady | Self::NotRun { failure: true, .. })
    }
}

/// How many tests passed by a runner's closing line.
fn tests_passed(line: &str) -> Option<u64> {
    let (before, _) = line.split_once(" passed")?;
    before.rsplit(' ').next()?.parse().ok()
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
        assert_eq!(steps.done[0].said.closing, ["test result: ok. 1"]);
        assert_eq!(steps.summary(), ExitCode::SUCCESS);
        steps.command("bad", Command::new("sh").args(["-c", "exit 3"])).unwrap();
        assert_eq!(steps.summary(), ExitCode::FAILURE);
    }

    #[test]
    fn what_a_runner_said_of_its_failures_is_kept() {
        let mut said = Said::default();
        let lines =
            ["a ... FAILED", "", "failures:", "", "---- a ----", "2 frames are missing", ""];
        let names = ["failures:", "    a", "", "test result: FAILED. 1 passed", "noise"];
        lines.into_iter().chain(names).for_each(|line| said.hear(line));
        assert_eq!(said.report, ["---- a ----", "2 frames are missing", "    a"]);
        assert_eq!(said.closing, ["test result: FAILED. 1 passed"]);
        assert_eq!(said.failed, ["a"]);
    }

    /// A runner whose test fails if `fails` says so, at its first and at its second try.
    fn runner(names: &[String], fails: (bool, bool)) -> Command {
        let (fails, result) = if names.is_empty() { (fails.0, 9) } else { (fails.1, 1) };
        let said =
            if fails { "failures:\n\n---- a ----\nlost\n\nfailures:\n    a\n\n" } else { "" };
        let mut command = Command::new("sh");
        let script = format!(
            "printf 'running 1 test\n{said}test result: x. {result} passed'; exit {}",
            u8::from(fails)
        );
        let _ = command.args(["-c", &script]);
        command
    }

    #[test]
    fn a_test_that_fails_once_is_unsteady_and_one_that_fails_twice_has_failed() {
        let cases = [
            ((false, false), Outcome::Passed),
            ((true, false), Outcome::Unsteady),
            ((true, true), Outcome::Failed("exit status: 1".into())),
        ];
        for (fails, outcome) in cases {
            let mut steps = Steps::new();
            steps.tests("s", |names| runner(names, fails)).unwrap();
            assert_eq!(steps.done[0].outcome, outcome, "{fails:?}");
            let code = if fails.0 { ExitCode::FAILURE } else { ExitCode::SUCCESS };
            assert_eq!(steps.summary(), code, "a failure stays one");
        }
    }

    #[test]
    fn what_is_not_found_again_has_failed() {
        let mut steps = Steps::new();
        let nothing = "echo test result: ok. 0 passed";
        steps
            .tests("s", |names| {
                let mut command = Command::new("sh");
                let _ = command.args(["-c", nothing]);
                if names.is_empty() { runner(names, (true, true)) } else { command }
            })
            .unwrap();
        assert!(matches!(steps.done[0].outcome, Outcome::Failed(_)));
    }

    #[test]
    fn what_died_is_not_tried_again() {
        let mut steps = Steps::new();
        let died = |names: &[String]| {
            let both = "echo running 1 test; $0 \"$@\"";
            let runner = runner(names, (true, false));
            let mut command = Command::new("sh");
            let _ = command.args(["-c", both]).arg(runner.get_program()).args(runner.get_args());
            command
        };
        steps.tests("s", died).unwrap();
        assert!(matches!(steps.done[0].outcome, Outcome::Failed(_)));
    }

    #[test]
    fn a_long_report_is_cut_but_the_names_are_kept() {
        let mut said = Said::default();
        said.hear("failures:");
        (0..200).for_each(|_| said.hear(&"x".repeat(1000)));
        ["failures:", "    a"].into_iter().for_each(|line| said.hear(line));
        assert_eq!(said.report.len(), REPORT.0 + 1);
        assert_eq!(said.report[0].len(), REPORT.1);
        assert_eq!(said.report[REPORT.0], "    a");
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
