#![doc = include_str!("../README.md")]

mod app;
mod cli;
mod ctl;
mod demo;
mod handover;
mod open_files;
mod run;
mod sandbox;
mod service;
mod signals;

use std::io::Write;
use std::process::ExitCode;

use cli::{Command, Unparsed};

/// Why a command did not do what it should.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Wrong use: exit code 2.
    Usage(String),
    /// It failed at run time: exit code 1.
    Runtime(String),
}

impl Failure {
    /// What went wrong, in words.
    pub(crate) fn text(&self) -> &str {
        match self {
            Self::Usage(text) | Self::Runtime(text) => text,
        }
    }
}

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Unparsed::Text(text)) => {
            print(&text);
            return ExitCode::SUCCESS;
        }
        Err(Unparsed::Wrong(text)) => return ended(Err(Failure::Usage(text))),
    };
    ended(match cli.command {
        Command::Run(arguments) => run::run(&arguments),
        Command::Ctl(arguments) => ctl::ctl(arguments),
        Command::Demo => demo::demo(),
    })
}

fn ended(result: Result<(), Failure>) -> ExitCode {
    let (code, text) = match result {
        Ok(()) => return ExitCode::SUCCESS,
        Err(Failure::Usage(text)) => (2, text),
        Err(Failure::Runtime(text)) => (1, text),
    };
    // Nobody may be left to read it.
    let _ = writeln!(std::io::stderr(), "causeway: {}", control::spec::one_line(&text));
    ExitCode::from(code)
}

/// Prints to standard output; a reader that went away is no failure.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
