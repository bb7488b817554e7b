//! What has to be done to get from one configuration to another.

use super::{Config, StaticEntry};
use crate::spec::PortSpec;

/// What has to be done; ports that are not named here stay untouched.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Difference {
    /// Ports to remove: gone, or to be made anew with other settings.
    pub removed: Vec<String>,
    /// Ports to add: new, or made anew.
    pub added: Vec<PortSpec>,
    /// Ports that stay, with other limits.
    pub limits: Vec<PortSpec>,
    /// Ports that stay.
    pub unchanged: Vec<String>,
    /// Keys of `[switch]` that changed.
    pub switch: Vec<&'static str>,
}

impl Difference {
    /// The way from `old` to `new`. A port has changed if its static entries have.
    pub fn between(old: &Config, new: &Config) -> Self {
        let mut difference = Self { switch: old.switch.changed(&new.switch), ..Self::default() };
        let same = |port: &&PortSpec| {
            let (before, after) = (old.statics_of(&port.name), new.statics_of(&port.name));
            old.ports.contains(port) && new.ports.contains(port) && before.eq(after)
        };
        let after = |port: &PortSpec| new.ports.iter().find(|other| other.name == port.name);
        let relimited = |port: &&PortSpec| {
            let (before, statics) = (old.statics_of(&port.name), new.statics_of(&port.name));
            let as_new = after(port).is_some_and(|after| port.with_limits_of(after) == *after);
            as_new && !same(port) && before.eq(statics)
        };
        let (relimit, others): (Vec<_>, Vec<_>) = old.ports.iter().partition(relimited);
        difference.limits = relimit.iter().filter_map(|port| after(port)).cloned().collect();
        let (kept, removed): (Vec<_>, Vec<_>) = others.into_iter().partition(same);
        difference.unchanged = kept.iter().map(|port| port.name.clone()).collect();
        difference.removed = removed.iter().map(|port| port.name.clone()).collect();
        difference.added = new.ports.iter().filter(|port| !same(port)).cloned().collect();
        let stays = |name: &str| relimit.iter().any(|port| port.name == name);
        difference.added.retain(|port| !stays(&port.name));
        difference
    }

    /// Whether nothing has to be done.
    pub fn is_empty(&self) -> bool {
        self.removed.is_empty()
            && self.added.is_empty()
            && self.limits.is_empty()
            && self.switch.is_empty()
    }
}

impl Config {
    /// The static entries of a port.
    pub fn statics_of<'a>(&'a self, port: &'a str) -> impl Iterator<Item = &'a StaticEntry> {
        self.statics.iter().filter(move |entry| entry.port == port)
    }
}
