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
    /// Ports that stay.
    pub unchanged: Vec<String>,
    /// Static entries to remove.
    pub statics_removed: Vec<StaticEntry>,
    /// Static entries to add.
    pub statics_added: Vec<StaticEntry>,
    /// Keys of `[switch]` that changed.
    pub switch: Vec<&'static str>,
}

impl Difference {
    /// The way from `old` to `new`.
    pub fn between(old: &Config, new: &Config) -> Self {
        let mut difference = Self { switch: old.switch.changed(&new.switch), ..Self::default() };
        for port in &old.ports {
            if new.ports.contains(port) {
                difference.unchanged.push(port.name.clone());
            } else {
                difference.removed.push(port.name.clone());
            }
        }
        let added = new.ports.iter().filter(|port| !old.ports.contains(port));
        difference.added = added.cloned().collect();
        // A port that is made anew has lost its entries: they are added with it.
        let kept = |entry: &&StaticEntry| difference.unchanged.contains(&entry.port);
        let lost = old.statics.iter().filter(kept).filter(|e| !new.statics.contains(e));
        difference.statics_removed = lost.cloned().collect();
        let had = |entry: &&StaticEntry| kept(entry) && old.statics.contains(entry);
        difference.statics_added = new.statics.iter().filter(|e| !had(e)).cloned().collect();
        difference
    }

    /// Whether nothing has to be done.
    pub fn is_empty(&self) -> bool {
        let ports = self.removed.is_empty() && self.added.is_empty();
        let statics = self.statics_removed.is_empty() && self.statics_added.is_empty();
        ports && statics && self.switch.is_empty()
    }
}
