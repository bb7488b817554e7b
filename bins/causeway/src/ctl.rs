//! `causeway ctl`: one question to a running switch.

mod capture;
mod top;

use std::path::{Path, PathBuf};

use control::protocol::{Done, FdbView, MetricsView, PortsView, StatsView, VersionView};
use control::{PortKind, Reply, Request, client, server, table};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cli::{CaptureArgs, CtlArgs, CtlCommand, FdbCommand, PortCommand, TopArgs};
use crate::{Failure, print};

pub(crate) fn ctl(arguments: CtlArgs) -> Result<(), Failure> {
    let path = match arguments.control {
        Some(path) => path,
        None => default_socket()?,
    };
    let (request, show) = match job(arguments.command)? {
        Job::Ask(request, show) => (request, show),
        Job::Capture(options) => return capture::capture(&path, arguments.json, options),
        Job::Top(options) => return top::top(&path, arguments.json, &options),
    };
    let answer = ask(&path, &request)?;
    if arguments.json {
        print(&format!("{answer}\n"));
    } else {
        let text = show(answer).map_err(|error| {
            Failure::Runtime(format!("the switch gave an unknown answer: {error}"))
        })?;
        print(&text);
    }
    Ok(())
}

pub(crate) fn default_socket() -> Result<PathBuf, Failure> {
    server::default_path().map_err(Failure::Usage)
}

fn ask(control: &Path, request: &Request) -> Result<Value, Failure> {
    match client::ask(control, request).map_err(Failure::Runtime)? {
        Reply::Ok(value) => Ok(value),
        Reply::Usage(text) => Err(Failure::Usage(text)),
        Reply::Failed(text) => Err(Failure::Runtime(text)),
    }
}

/// How an answer is shown to people.
type Show = fn(Value) -> Result<String, serde_json::Error>;

/// What a command comes down to.
enum Job {
    Ask(Request, Show),
    Top(TopArgs),
    Capture(CaptureArgs),
}

fn job(command: CtlCommand) -> Result<Job, Failure> {
    let (request, show): (Request, Show) = match command {
        CtlCommand::Capture(options) => return Ok(Job::Capture(options)),
        CtlCommand::Top(options) => return Ok(Job::Top(options)),
        CtlCommand::Ports => (Request::Ports, |v| Ok(table::ports(&read::<PortsView>(v)?))),
        CtlCommand::Stats => (Request::Stats, |v| Ok(table::stats(&read::<StatsView>(v)?))),
        CtlCommand::Metrics => (Request::Metrics, |v| Ok(read::<MetricsView>(v)?.text)),
        CtlCommand::Fdb { command: None } => {
            (Request::Fdb, |v| Ok(table::fdb(&read::<FdbView>(v)?)))
        }
        CtlCommand::Version => (Request::Version, |v| Ok(table::version(&read::<VersionView>(v)?))),
        CtlCommand::Fdb { command: Some(FdbCommand::Flush) } => (Request::FdbFlush, done),
        CtlCommand::Reload => (Request::Reload, done),
        CtlCommand::Port { command: PortCommand::Add { spec } } => {
            // The switch has another current folder.
            let spec = spec.absolute().map_err(|error| {
                Failure::Runtime(format!("cannot find the current folder: {error}"))
            })?;
            if let PortKind::VhostUser(guest) = &spec.kind
                && guest.socket.as_os_str().as_encoded_bytes().contains(&b',')
            {
                return Err(Failure::Usage(format!(
                    "the whole path of a socket must be without ',': {}",
                    guest.socket.display()
                )));
            }
            (Request::PortAdd { spec: spec.to_string() }, done)
        }
        CtlCommand::Port { command: PortCommand::Del { name } } => {
            (Request::PortDel { name }, done)
        }
        CtlCommand::Port { command: PortCommand::Reset { name } } => {
            (Request::PortReset { name }, done)
        }
    };
    Ok(Job::Ask(request, show))
}

fn read<T: DeserializeOwned>(value: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(value)
}

fn done(value: Value) -> Result<String, serde_json::Error> {
    Ok(format!("{}\n", read::<Done>(value)?.done))
}
