//! The configuration file, read again: the difference is applied, nothing else is touched.
//!
//! The difference is that between the ports that **run** and the file: a port of the file that was
//! removed by hand comes again, and one that was added by hand stays. A port that cannot be made
//! anew with other settings is put back as it was.

use std::path::PathBuf;

use control::config::{check_stations, check_unique};
use control::{Config, Difference, PortKind, PortSpec, Reply, SwitchSettings};

use super::App;
use super::ports::{Origin, Port};

/// What a reload has to know of the start.
#[derive(Debug)]
pub(crate) struct Source {
    /// The configuration file.
    pub(crate) file: PathBuf,
    /// The ports of the command line.
    pub(crate) given: Vec<PortSpec>,
    /// What the file said of the switch at start, which holds until the end.
    pub(crate) switch: SwitchSettings,
}

/// What was really done.
#[derive(Debug, Default)]
struct Done {
    removed: Vec<String>,
    added: Vec<String>,
    /// Ports whose limits were changed.
    limited: Vec<String>,
    failed: Vec<String>,
}

impl App {
    pub(super) fn reload(&mut self) -> Reply {
        if let Some(refused) = self.handing.refuses() {
            return refused;
        }
        let Some(source) = &self.source else {
            return Reply::Failed("there is nothing to reload: run got no --config".to_owned());
        };
        let mut new = match Config::load(&source.file, &self.beside(source)) {
            Ok(new) => new,
            Err(error) => return Reply::Usage(error.to_string()),
        };
        // Ports of the command line stay, perhaps with other static entries.
        let given = self.ports.iter().filter(|port| port.origin == Origin::CommandLine);
        let from_file = new.ports.len();
        new.ports.extend(given.map(|port| port.spec.clone()));
        let clients = self.ports.iter().filter(|port| port.origin == Origin::Client);
        let all = || clients.clone().map(|port| &port.spec).chain(&new.ports);
        let checked = check_unique(all())
            .and_then(|()| check_stations(all(), &new.statics).map_err(|clash| clash.message));
        if let Err(error) = checked {
            return Reply::Usage(format!("{}: {error}", source.file.display()));
        }
        self.plan(all());
        let difference = Difference::between(&self.running(source), &new);
        let given = new.ports.split_off(from_file);
        let done = self.apply(&difference, &new, &given);
        let words = summary(&done, &difference);
        if done.failed.is_empty() {
            Reply::done(words)
        } else {
            Reply::Failed(format!("{words}; failed: {}", done.failed.join("; ")))
        }
    }

    /// The ports that static entries of the file may name too: those of the command line. Of one
    /// that was removed nothing but its name counts.
    fn beside(&self, source: &Source) -> Vec<PortSpec> {
        let mut beside = source.given.clone();
        for spec in &mut beside {
            let runs = self.specs().any(|running| running == spec);
            if let PortKind::VhostUser(guest) = &mut spec.kind
                && !runs
            {
                guest.mac = None;
            }
        }
        beside
    }

    /// The running ports that a file can change, as a file would have them.
    fn running(&self, source: &Source) -> Config {
        let ports = || self.ports.iter().filter(|port| port.origin != Origin::Client);
        Config {
            switch: source.switch.clone(),
            ports: ports().map(|port| port.spec.clone()).collect(),
            statics: ports().flat_map(|port| port.statics.clone()).collect(),
        }
    }

    fn apply(&mut self, difference: &Difference, new: &Config, given: &[PortSpec]) -> Done {
        let mut done = Done::default();
        let mut before: Vec<Port> = Vec::new();
        for name in &difference.removed {
            before.extend(self.take_port(name).map(|port| self.remove(port)));
        }
        for spec in &difference.limits {
            if self.set_limits(spec) {
                done.limited.push(spec.name.clone());
            }
        }
        let mut refused = Vec::new();
        for spec in &difference.added {
            let statics = new.statics_of(&spec.name).cloned().collect();
            let is_given = given.iter().any(|port| port.name == spec.name);
            let origin = if is_given { Origin::CommandLine } else { Origin::File };
            match self.add(spec, statics, origin) {
                Ok(()) => done.added.push(spec.name.clone()),
                Err(error) => refused.push((&spec.name, error)),
            }
        }
        // Those that cannot be made anew stay as they were: the next reload tries again.
        for (name, error) in refused {
            let Some(index) = before.iter().position(|port| port.spec.name == *name) else {
                done.failed.push(error);
                continue;
            };
            let old = before.remove(index);
            done.failed.push(match self.place(&old.spec, old.statics, old.origin) {
                Ok(None) => format!("{error}; {name} stays as it was"),
                Ok(Some(reason)) => format!("{error}; {name} waits as it was: {reason}"),
                Err(reason) => format!("{error}; {name} is gone: {reason}"),
            });
        }
        for port in &before {
            self.forget_state(&port.spec);
        }
        done.removed.extend(before.into_iter().map(|port| port.spec.name));
        done
    }
}

fn summary(done: &Done, difference: &Difference) -> String {
    let switch: Vec<String> = difference.switch.iter().map(ToString::to_string).collect();
    let lists = [
        ("removed", &done.removed),
        ("added", &done.added),
        ("changed the limits of", &done.limited),
        ("a restart is needed for", &switch),
    ];
    let words = lists.iter().filter(|(_, list)| !list.is_empty());
    let words: Vec<_> = words.map(|(what, list)| format!("{what} {}", list.join(", "))).collect();
    if words.is_empty() { "nothing changed".to_owned() } else { words.join("; ") }
}
