//! The configuration file: the same keys as SPECs and options, in TOML.
//!
//! ```toml
//! [switch]
//! workers = "0-3"
//! ageing = 300
//!
//! [[port]]
//! kind = "vhost-user"
//! name = "g0"
//! socket = "/run/g0.sock"
//!
//! [[static]]
//! mac = "02:00:00:00:00:01"
//! port = "g0"
//! ```

mod difference;
mod settings;
mod stations;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeArray, DeTable, DeValue};

use crate::keys::{self, KeyError};
use crate::spec::{PortSpec, one_line};

pub use difference::Difference;
pub use settings::{StaticEntry, SwitchSettings};
pub use stations::{Clash, Station, check_stations, stations};

/// The sections of a file.
const SECTIONS: [&str; 3] = ["switch", "port", "static"];

/// Everything that a configuration file can say.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// The `[switch]` table.
    pub switch: SwitchSettings,
    /// The `[[port]]` tables, in their order.
    pub ports: Vec<PortSpec>,
    /// The `[[static]]` tables, in their order.
    pub statics: Vec<StaticEntry>,
}

impl Config {
    /// Reads a file. Its static entries may name ports `beside` it too: those of the command line.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] with the file's name, and with the line if it was the text that was wrong.
    pub fn load(path: &Path, beside: &[PortSpec]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|error| ConfigError {
            file: Some(path.to_owned()),
            line: None,
            message: error.to_string(),
        })?;
        let read = Self::parse_beside(&text, beside);
        read.map_err(|e| ConfigError { file: Some(path.to_owned()), ..e })
    }

    /// Reads a file's text, which is all that there is.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first thing that is wrong.
    pub fn parse(text: &str) -> Result<Self, ConfigError> {
        Self::parse_beside(text, &[])
    }

    /// Reads a file's text; there are ports `beside` it.
    ///
    /// # Errors
    ///
    /// [`ConfigError`] for the first thing that is wrong.
    pub fn parse_beside(text: &str, beside: &[PortSpec]) -> Result<Self, ConfigError> {
        let file = File { text };
        let table = DeTable::parse(text).map_err(|error| {
            let message = error.message().to_owned();
            file.error(error.span().map_or(0, |s| s.start), message)
        })?;
        let mut config = Self::default();
        for (at, key, value) in in_order(table.get_ref()) {
            match (key, value.get_ref()) {
                ("switch", DeValue::Table(table)) => config.switch = file.switch(table)?,
                ("port", DeValue::Array(array)) => config.ports = file.ports(array)?,
                ("static", DeValue::Array(array)) => config.statics = file.statics(array)?,
                ("switch", _) => return Err(file.error(at, "switch is a table: [switch]")),
                ("port", _) => return Err(file.error(at, "port is a list of tables: [[port]]")),
                ("static", _) => {
                    return Err(file.error(at, "static is a list of tables: [[static]]"));
                }
                _ => {
                    let error = KeyError::unknown(key, "the file", &SECTIONS);
                    return Err(file.error(at, error.to_string()));
                }
            }
        }
        config.check_statics(&file, table.get_ref(), beside)?;
        Ok(config)
    }

    /// Static entries name ports that exist, in VLANs that they are in, and do not contradict.
    fn check_statics(
        &self,
        file: &File<'_>,
        table: &DeTable<'_>,
        beside: &[PortSpec],
    ) -> Result<(), ConfigError> {
        let place = |section: &str, index: usize| {
            let tables = table.get(section).and_then(|v| v.get_ref().as_array());
            tables.and_then(|tables| tables.get(index)).map_or(0, |value| value.span().start)
        };
        let ports = || self.ports.iter().chain(beside);
        for (index, entry) in self.statics.iter().enumerate() {
            let Some(port) = ports().find(|port| port.name == entry.port) else {
                let message = format!("static entry for port {:?}, which is not here", entry.port);
                return Err(file.error(place("static", index), message));
            };
            entry.check(port).map_err(|message| file.error(place("static", index), message))?;
        }
        check_stations(ports(), &self.statics).map_err(|clash| {
            let port = self.ports.iter().position(|port| port.name == clash.port);
            match (clash.entry, port) {
                (Some(index), _) => file.error(place("static", index), clash.message),
                (None, Some(index)) => file.error(place("port", index), clash.message),
                (None, None) => ConfigError { file: None, line: None, message: clash.message },
            }
        })
    }
}

/// Checks that names, sockets and interfaces are each used once.
///
/// # Errors
///
/// A sentence that names what is used twice.
pub fn check_unique<'a>(ports: impl IntoIterator<Item = &'a PortSpec>) -> Result<(), String> {
    let mut resources = BTreeMap::new();
    let mut names = std::collections::BTreeSet::new();
    for port in ports {
        if !names.insert(&port.name) {
            return Err(format!("two ports have the name {}", port.name));
        }
        let resource = port.resource();
        if let Some(other) = resources.get(&resource) {
            return Err(format!(
                "{resource} belongs to port {other} already, not to {}",
                port.name
            ));
        }
        let _ = resources.insert(resource, &port.name);
    }
    Ok(())
}

/// What is wrong with a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError {
    /// The file, if it came from one.
    pub file: Option<PathBuf>,
    /// The line, from 1.
    pub line: Option<usize>,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.file, self.line) {
            (Some(file), Some(line)) => write!(f, "{}:{line}: ", file.display())?,
            (Some(file), None) => write!(f, "{}: ", file.display())?,
            (None, Some(line)) => write!(f, "line {line}: ")?,
            (None, None) => {}
        }
        f.write_str(&one_line(&self.message))
    }
}

impl std::error::Error for ConfigError {}

/// A key with its place, its name and its value.
type Entry<'t, 'i> = (usize, &'t str, &'t Spanned<DeValue<'i>>);

/// The entries of a table in the order of the text, so that the first error is the one named.
fn in_order<'t, 'i>(table: &'t DeTable<'i>) -> Vec<Entry<'t, 'i>> {
    let entry = |(key, value): (&'t Spanned<_>, &'t Spanned<DeValue<'i>>)| {
        let name: &std::borrow::Cow<'i, str> = key.get_ref();
        (key.span().start, name.as_ref(), value)
    };
    let mut entries: Vec<_> = table.iter().map(entry).collect();
    entries.sort_by_key(|(at, ..)| *at);
    entries
}

/// The text, to find lines in.
struct File<'t> {
    text: &'t str,
}

impl File<'_> {
    fn error(&self, at: usize, message: impl Into<String>) -> ConfigError {
        let before = self.text.as_bytes().get(..at).unwrap_or_default();
        let line = before.iter().filter(|b| **b == b'\n').count().saturating_add(1);
        ConfigError { file: None, line: Some(line), message: message.into() }
    }

    fn switch(&self, table: &DeTable<'_>) -> Result<SwitchSettings, ConfigError> {
        let mut switch = SwitchSettings::default();
        self.fill("[switch]", settings::SWITCH, table, &mut switch)?;
        Ok(switch)
    }

    fn statics(&self, array: &DeArray<'_>) -> Result<Vec<StaticEntry>, ConfigError> {
        let mut entries = Vec::with_capacity(array.len());
        for value in array {
            let at = value.span().start;
            let DeValue::Table(table) = value.get_ref() else {
                return Err(self.error(at, "static is a list of tables: [[static]]"));
            };
            let mut draft = settings::StaticDraft::default();
            self.fill("[[static]]", settings::STATIC, table, &mut draft)?;
            entries.push(draft.complete().map_err(|e| self.error(at, e.to_string()))?);
        }
        Ok(entries)
    }

    fn fill<T>(
        &self,
        of: &'static str,
        known: &[keys::Key<T>],
        table: &DeTable<'_>,
        target: &mut T,
    ) -> Result<(), ConfigError> {
        for (at, key, value) in in_order(table) {
            let result = text_of(key, value.get_ref()).and_then(|value| {
                let names: Vec<_> = keys::names(known).collect();
                keys::set(known, target, key, &value)
                    .unwrap_or_else(|| Err(KeyError::unknown(key, of, &names)))
            });
            result.map_err(|error| self.error(at, error.to_string()))?;
        }
        Ok(())
    }

    fn ports(&self, array: &DeArray<'_>) -> Result<Vec<PortSpec>, ConfigError> {
        let mut ports: Vec<PortSpec> = Vec::with_capacity(array.len());
        for value in array {
            let DeValue::Table(table) = value.get_ref() else {
                return Err(self.error(value.span().start, "port is a list of tables: [[port]]"));
            };
            ports.push(self.port(value.span().start, table)?);
            check_unique(&ports).map_err(|message| self.error(value.span().start, message))?;
        }
        Ok(ports)
    }

    fn port(&self, start: usize, table: &DeTable<'_>) -> Result<PortSpec, ConfigError> {
        let mut kind = None;
        let mut settings = Vec::with_capacity(table.len());
        for (at, key, value) in in_order(table) {
            let text = text_of(key, value.get_ref());
            let text = text.map_err(|error| self.error(at, error.to_string()))?;
            if key == "kind" {
                kind = Some((at, text));
            } else {
                settings.push((at, key, text));
            }
        }
        let Some((kind_at, kind)) = kind else {
            return Err(
                self.error(start, "a port needs kind=tap, vhost-user, af-xdp or packet-mmap")
            );
        };
        let pairs = settings.iter().map(|(_, key, text)| (*key, text.as_str()));
        PortSpec::build(&kind, pairs).map_err(|error| {
            let named = error.key();
            let place = settings.iter().find(|(_, key, _)| Some(*key) == named);
            let at = place.map_or(if named.is_none() { kind_at } else { start }, |(at, ..)| *at);
            self.error(at, error.to_string())
        })
    }
}

/// A value as it would stand in a SPEC.
fn text_of(key: &str, value: &DeValue<'_>) -> Result<String, KeyError> {
    let wrong = |what| KeyError::Type { key: key.to_owned(), what };
    Ok(match value {
        DeValue::String(text) => text.to_string(),
        DeValue::Boolean(true) => "on".to_owned(),
        DeValue::Boolean(false) => "off".to_owned(),
        // Octal is for permission bits only, and they are read as octal.
        DeValue::Integer(number) if number.radix() == 8 => format!("0o{}", number.as_str()),
        DeValue::Integer(number) => i64::from_str_radix(number.as_str(), number.radix())
            .map_err(|_| wrong("a number out of range"))?
            .to_string(),
        DeValue::Array(items) => {
            let texts: Result<Vec<_>, _> =
                items.iter().map(|item| text_of(key, item.get_ref())).collect();
            texts?.join("+")
        }
        DeValue::Float(_) => return Err(wrong("a number with a fraction")),
        DeValue::Datetime(_) => return Err(wrong("a date")),
        DeValue::Table(_) => return Err(wrong("a table")),
    })
}
