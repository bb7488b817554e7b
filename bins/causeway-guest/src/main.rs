#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod checker;
mod cli;
mod clock;
mod frame;
mod generator;
mod idle;
mod jobs;
mod mac;
mod memory;
mod offloads;
mod port;
mod rings;
mod session;
mod stop;
mod totals;
mod tracker;

use std::io::{IsTerminal, Write};
use std::process::ExitCode;

use crate::cli::{Cli, Unparsed};
use crate::jobs::tap::Namespace;
use crate::port::GuestPort;
use crate::stop::Stop;
use crate::totals::Totals;
use anyhow::Context;

/// Wrong use of the command line.
const WRONG_USE: u8 = 2;

fn main() -> ExitCode {
    let cli = match cli::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(Unparsed::Text(text)) => {
            // Nobody may be left to read it.
            let _ = write!(std::io::stdout(), "{text}");
            return ExitCode::SUCCESS;
        }
        Err(Unparsed::Wrong(wrong)) => {
            report(&wrong);
            return ExitCode::from(WRONG_USE);
        }
    };
    match run(&cli) {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(complaint)) => {
            report(&complaint);
            ExitCode::FAILURE
        }
        Err(error) => {
            report(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn report(text: &str) {
    let bold = std::io::stderr().is_terminal();
    let (on, off) = if bold { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    let _ = writeln!(std::io::stderr(), "{on}causeway-guest:{off} {text}");
}

/// Connects, does the job, prints the totals; returns what `--verify` found wrong.
fn run(cli: &Cli) -> anyhow::Result<Option<String>> {
    let stop = Stop::on_signals()?;
    let namespace = Namespace::open(cli)?;
    let uso = namespace.as_ref().is_some_and(|namespace| namespace.uso);
    let mut ports = Vec::new();
    for (index, path) in cli.socket.iter().enumerate() {
        let mac = match cli.mac {
            Some(first) => mac::plus(first, index),
            None => mac::derived(path),
        };
        let port = GuestPort::open(cli, path, mac, uso, &stop)
            .with_context(|| format!("port {}", path.display()))?;
        // Stopped while it waited: there is nothing to report.
        let Some(port) = port else { return Ok(None) };
        ports.push(port);
    }
    let totals = work(cli, namespace.as_ref(), &mut ports, &stop)?;
    for (port, path) in ports.iter_mut().zip(&cli.socket) {
        port.stop().with_context(|| format!("port {}", path.display()))?;
    }
    let Some(totals) = totals else { return Ok(None) };
    print(cli, &totals)?;
    Ok(if cli.verify { totals.complaint() } else { None })
}

fn work(
    cli: &Cli,
    namespace: Option<&Namespace>,
    ports: &mut [GuestPort],
    stop: &Stop,
) -> anyhow::Result<Option<Totals>> {
    if let Some(namespace) = namespace {
        namespace.run(cli, ports, stop)
    } else if cli.generate {
        jobs::generate::run(cli, ports, stop)
    } else if cli.latency {
        jobs::latency::run(cli, ports, stop)
    } else {
        jobs::receive::run(cli, ports, stop)
    }
}

fn print(cli: &Cli, totals: &Totals) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let text = if cli.json { serde_json::to_string(totals)? } else { totals.table() };
    writeln!(out, "{}", text.trim_end()).context("cannot print the totals")
}
