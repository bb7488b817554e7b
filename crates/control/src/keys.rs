//! One table of keys serves SPECs, the configuration file and every message about them.

use crate::suggest::did_you_mean;

/// One key of a `T`.
pub(crate) struct Key<T: 'static> {
    pub(crate) name: &'static str,
    /// What may stand after `=`, for messages.
    pub(crate) allowed: &'static str,
    /// Takes a value over; `None` if it is not allowed.
    pub(crate) set: fn(&mut T, &str) -> Option<()>,
    /// The value, if it is not the default.
    pub(crate) show: fn(&T) -> Option<String>,
}

/// Whether `key` is in the table, and whether its value was right.
pub(crate) fn set<T>(
    keys: &[Key<T>],
    target: &mut T,
    key: &str,
    value: &str,
) -> Option<Result<(), KeyError>> {
    let found = keys.iter().find(|k| k.name == key)?;
    Some((found.set)(target, value).ok_or_else(|| KeyError::Value {
        key: found.name,
        value: value.to_owned(),
        allowed: found.allowed,
    }))
}

/// Every key that does not have its default, with its value.
pub(crate) fn shown<'a, T>(
    keys: &'a [Key<T>],
    source: &'a T,
) -> impl Iterator<Item = (&'static str, String)> + 'a {
    keys.iter().filter_map(move |key| Some((key.name, (key.show)(source)?)))
}

/// The names in the table.
pub(crate) fn names<T>(keys: &[Key<T>]) -> impl Iterator<Item = &'static str> {
    keys.iter().map(|key| key.name)
}

/// What is wrong with one key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// There is no such key.
    #[error("unknown key {key:?}{hint}; {of} has {known}")]
    Unknown {
        /// What was written.
        key: String,
        /// A suggestion, or nothing.
        hint: String,
        /// What it was written for.
        of: &'static str,
        /// The known keys.
        known: String,
    },
    /// The value is not allowed.
    #[error("{key}={value} is not allowed: {key} is {allowed}")]
    Value {
        /// The key.
        key: &'static str,
        /// What was written.
        value: String,
        /// What may be written.
        allowed: &'static str,
    },
    /// Others of its kind have the key.
    #[error("{of} has no {key}: {why}")]
    NotOf {
        /// The key.
        key: &'static str,
        /// What it was written for.
        of: &'static str,
        /// Why it cannot have it.
        why: &'static str,
    },
    /// The key stands twice.
    #[error("{0} is given twice")]
    Twice(String),
    /// A key that has no default.
    #[error("{of} needs {key}={allowed}")]
    Missing {
        /// The kind of thing.
        of: &'static str,
        /// The key.
        key: &'static str,
        /// What may be written.
        allowed: &'static str,
    },
    /// A value of the configuration file that no key takes.
    #[error("{key} is {what}; write a text, a number, true, false or a list of them")]
    Type {
        /// The key.
        key: String,
        /// What stands there.
        what: &'static str,
    },
}

impl KeyError {
    pub(crate) fn unknown(key: &str, of: &'static str, known: &[&'static str]) -> Self {
        Self::Unknown {
            key: key.to_owned(),
            hint: did_you_mean(key, known.iter().copied()),
            of,
            known: known.join(", "),
        }
    }
}
