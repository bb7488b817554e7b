//! Why an interface cannot be used, in words that say what to do.

use std::io;

use super::Namespace;

/// Why an interface cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum InterfaceError {
    /// A name that the kernel cannot have.
    #[error("interface name {0:?} must have 1 to 15 bytes without '/', ':' and white space")]
    Name(String),
    /// There is no such interface.
    #[error("interface {name} does not exist{place}")]
    Missing {
        /// The name that was looked for.
        name: String,
        /// Where, if not in the namespace of this process.
        place: String,
    },
    /// The namespace does not exist.
    #[error("network namespace {name} cannot be opened: {error}")]
    Namespace {
        /// The namespace.
        name: String,
        /// The kernel's answer.
        error: io::Error,
    },
    /// The process lacks a right.
    #[error("no permission to {what}: {right} is needed (root has it)")]
    Permission {
        /// What was tried.
        what: String,
        /// The capability.
        right: &'static str,
    },
    /// Anything else.
    #[error("cannot {what}: {error}")]
    System {
        /// What was tried on what.
        what: String,
        /// The kernel's answer.
        error: io::Error,
    },
}

impl InterfaceError {
    /// What needs `CAP_NET_ADMIN` failed.
    pub(crate) fn system(what: impl Into<String>, error: io::Error) -> Self {
        Self::needs("CAP_NET_ADMIN", what, error)
    }

    /// What needs the capability `right` failed.
    pub(crate) fn needs(right: &'static str, what: impl Into<String>, error: io::Error) -> Self {
        let what = what.into();
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Permission { what, right },
            _ => Self::System { what, error },
        }
    }

    pub(crate) fn missing(name: &str, namespace: &Namespace) -> Self {
        let place = match namespace.name() {
            Some(namespace) => format!(" in network namespace {namespace}"),
            None => String::new(),
        };
        Self::Missing { name: name.to_owned(), place }
    }
}
