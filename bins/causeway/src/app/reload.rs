//! The configuration file, read again: the difference is applied, nothing else is touched.

use control::config::check_unique;
use control::{Config, Difference, Reply};

use super::App;

impl App {
    pub(super) fn reload(&mut self) -> Reply {
        let Some(file) = self.file.clone() else {
            return Reply::Failed("there is nothing to reload: run got no --config".to_owned());
        };
        let mut new = match Config::load(&file) {
            Ok(new) => new,
            Err(error) => return Reply::Usage(error.to_string()),
        };
        let difference = Difference::between(&self.config, &new);
        let old = &self.config.ports;
        let others = self.specs().filter(|spec| !old.iter().any(|port| port.name == spec.name));
        if let Err(error) = check_unique(others.chain(&new.ports)) {
            return Reply::Usage(format!("{}: {error}", file.display()));
        }
        for name in &difference.removed {
            if let Some(port) = self.take_port(name) {
                self.remove(port);
            }
        }
        let mut failed = Vec::new();
        for spec in &difference.added {
            let statics: Vec<_> = new.statics_of(&spec.name).cloned().collect();
            if let Err(error) = self.add(spec, statics.iter()) {
                failed.push(error);
                // The next reload tries again.
                new.ports.retain(|port| port.name != spec.name);
            }
        }
        let words = summary(&difference);
        // Keys of the switch keep the values that they had at start.
        new.switch = self.config.switch.clone();
        self.config = new;
        if failed.is_empty() {
            Reply::done(words)
        } else {
            Reply::Failed(format!("{words}; failed: {}", failed.join("; ")))
        }
    }
}

fn summary(difference: &Difference) -> String {
    if difference.is_empty() {
        return "nothing changed".to_owned();
    }
    let added: Vec<&str> = difference.added.iter().map(|port| port.name.as_str()).collect();
    let removed: Vec<&str> = difference.removed.iter().map(String::as_str).collect();
    let lists = [
        ("removed", removed),
        ("added", added),
        ("a restart is needed for", difference.switch.clone()),
    ];
    let words = lists.iter().filter(|(_, list)| !list.is_empty());
    words.map(|(what, list)| format!("{what} {}", list.join(", "))).collect::<Vec<_>>().join("; ")
}
