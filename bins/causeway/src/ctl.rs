//! `causeway ctl`: one question to a running switch.

use std::path::PathBuf;

use control::protocol::{Done, FdbView, PortsView, StatsView, VersionView};
use control::{PortKind, Reply, Request, client, server, table};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::cli::{CtlArgs, CtlCommand, FdbCommand, PortCommand};
use crate::{Failure, print};

pub(crate) fn ctl(arguments: CtlArgs) -> Result<(), Failure> {
    let path = match arguments.control {
        Some(path) => path,
        None => default_socket()?,
    };
    let (request, show) = question(arguments.command)?;
    let answer = match client::ask(&path, &request).map_err(Failure::Runtime)? {
        Reply::Ok(value) => value,
        Reply::Usage(text) => return Err(Failure::Usage(text)),
        Reply::Failed(text) => return Err(Failure::Runtime(text)),
    };
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

/// How an answer is shown to people.
type Show = fn(Value) -> Result<String, serde_json::Error>;

fn question(command: CtlCommand) -> Result<(Request, Show), Failure> {
    Ok(match command {
        CtlCommand::Ports => (Request::Ports, |v| Ok(table::ports(&read::<PortsView>(v)?))),
        CtlCommand::Stats => (Request::Stats, |v| Ok(table::stats(&read::<StatsView>(v)?))),
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
    })
}

fn read<T: DeserializeOwned>(value: Value) -> Result<T, serde_json::Error> {
    serde_json::from_value(value)
}

fn done(value: Value) -> Result<String, serde_json::Error> {
    Ok(format!("{}\n", read::<Done>(value)?.done))
}
