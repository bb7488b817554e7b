//! Least privilege: once everything is set up, the process gives up what it no longer needs.
//!
//! ```text
//!  start ── no_new_privs ── workers: no capability, few system calls, no files ── ports open
//!        ── control thread: capabilities of its ports' kinds, its files, its system calls ── serve
//! ```
//!
//! A guest that takes a thread over by a bug of ours gets what that thread may do and nothing
//! else. What is restricted follows from the ports at start; what comes later must fit into it,
//! and else is refused with an error that says so. Set-up itself is not restricted: it ends before
//! the first guest can connect.
//!
//! **Not supported**: Landlock beside a macvtap port (it is opened in mounts of its own, and
//! Landlock forbids mounting); the log says so.

mod capabilities;
mod files;
mod filter;
mod grants;
mod trap;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use control::protocol::SandboxView;
use control::{PortKind, PortSpec, SocketRole};
use switch::AtStart;

use files::{Places, Restricted};
pub(crate) use grants::Grants;

/// What `run` says about the sandbox and the files that it needs.
#[derive(Debug)]
pub(crate) struct Asked<'a> {
    /// Whether there is one.
    pub(crate) on: bool,
    /// Folders for sockets of ports that come later.
    pub(crate) allow_dirs: &'a [PathBuf],
    /// Kinds of ports that come later.
    pub(crate) allow_kinds: &'a [String],
    /// The control socket.
    pub(crate) control: &'a Path,
    /// The configuration file.
    pub(crate) config: Option<&'a Path>,
    /// Where state is kept.
    pub(crate) state_dir: Option<&'a Path>,
}

/// What the process may still do.
#[derive(Debug, Default)]
pub(crate) struct Sandbox {
    on: bool,
    grants: Grants,
    places: Places,
    view: SandboxView,
    /// What workers could not give up.
    troubles: Arc<Mutex<BTreeSet<String>>>,
}

impl Sandbox {
    /// Decides what is kept, and begins: nothing can be gained any more, workers that start from
    /// now on give up what they do not need.
    ///
    /// # Errors
    ///
    /// A folder of `--allow-dir` is not there.
    pub(crate) fn begin(asked: &Asked<'_>, ports: &[&PortSpec]) -> Result<Self, String> {
        if !asked.on {
            return Ok(Self::default());
        }
        for folder in asked.allow_dirs {
            let found = std::fs::metadata(folder);
            let found = found.map_err(|e| format!("--allow-dir {}: {e}", folder.display()))?;
            if !found.is_dir() {
                return Err(format!("--allow-dir {} is no directory", folder.display()));
            }
        }
        let grants = Grants::of(asked, ports);
        let places = places(asked, ports, &grants);
        let mut view = SandboxView { on: true, ..SandboxView::default() };
        view.no_new_privs =
            done("no_new_privs", rustix::thread::set_no_new_privs(true).map_err(|e| e.to_string()));
        view.seccomp = done("a handler of SIGSYS", trap::install().map_err(|e| e.to_string()));
        Ok(Self { on: true, grants, places, view, troubles: Arc::default() })
    }

    /// What workers run before they serve.
    pub(crate) fn at_start(&self) -> AtStart {
        if !self.on {
            return AtStart::default();
        }
        let troubles = Arc::clone(&self.troubles);
        AtStart(Some(Arc::new(move || {
            let mut all = troubles.lock().unwrap_or_else(PoisonError::into_inner);
            all.extend(restrict_worker());
        })))
    }

    /// Whether rights are given up, and `af-xdp` ports may come later all the same.
    pub(crate) fn keeps_af_xdp(&self) -> bool {
        self.on && self.grants.af_xdp
    }

    /// Gives up what the control thread does not need for the ports that it has. Threads that it
    /// starts later inherit that.
    pub(crate) fn enter(&mut self, has_macvtap: bool) {
        if !self.on {
            tracing::info!("sandbox: off");
            return;
        }
        self.grants.macvtap |= has_macvtap;
        match capabilities::keep_for(&self.grants) {
            Ok(kept) => self.view.capabilities = kept,
            Err(error) => tracing::warn!(%error, "sandbox: cannot give up capabilities"),
        }
        self.view.landlock = self.restrict_files();
        if self.view.seccomp == ON {
            self.view.seccomp = done("seccomp", filter::restrict_control(&self.grants));
        }
        tracing::info!(
            no_new_privs = self.view.no_new_privs,
            seccomp = self.view.seccomp,
            landlock = self.view.landlock,
            capabilities = self.view.kept(),
            "sandbox: on"
        );
        let troubles = self.troubles.lock().unwrap_or_else(PoisonError::into_inner);
        for trouble in troubles.iter() {
            tracing::warn!(trouble, "sandbox: a worker keeps more than it needs");
        }
    }

    fn restrict_files(&mut self) -> String {
        if self.grants.macvtap {
            self.places.sockets = None;
            return "off: a macvtap is opened in mounts of its own".to_owned();
        }
        match self.places.restrict() {
            Ok(Restricted::Fully) => ON.to_owned(),
            Ok(Restricted::Partly) => "on, as far as this kernel knows it".to_owned(),
            Ok(Restricted::Not) => {
                self.places.sockets = None;
                "off: this kernel has none, or it is not enabled".to_owned()
            }
            Err(error) => {
                self.places.sockets = None;
                format!("off: {error}")
            }
        }
    }

    /// Whether a port can be opened with what was kept.
    ///
    /// # Errors
    ///
    /// What is missing, and what would help.
    pub(crate) fn permits(&self, spec: &PortSpec) -> Result<(), String> {
        if !self.on {
            return Ok(());
        }
        self.grants.permit(spec)?;
        if let PortKind::VhostUser(guest) = &spec.kind
            && guest.mode == SocketRole::Server
        {
            let folder = folder_of(&guest.socket);
            if !self.places.has_socket_folder(&folder) {
                let folder = folder.display();
                return Err(format!(
                    "the sandbox allows no socket in {folder}: start with --allow-dir {folder}, \
                     or with --sandbox off"
                ));
            }
        }
        Ok(())
    }

    /// What stands behind the error of a port that could not be opened, as far as it is us.
    pub(crate) fn explain(&self, spec: &PortSpec, error: String) -> String {
        let PortKind::VhostUser(guest) = &spec.kind else { return error };
        let group = self.on && guest.socket_group.is_some() && !self.grants.foreign_group;
        if group && error.starts_with("cannot set the group") {
            return format!("{error}: {}", grants::NO_GROUP);
        }
        error
    }

    /// What is in force.
    pub(crate) fn view(&self) -> SandboxView {
        SandboxView { refused: trap::refused(), ..self.view.clone() }
    }
}

const ON: &str = "on";

/// How something that was tried went, in words; what failed is logged.
fn done(what: &str, result: Result<(), String>) -> String {
    match result {
        Ok(()) => ON.to_owned(),
        Err(error) => {
            tracing::warn!(error, "sandbox: no {what}");
            format!("off: {error}")
        }
    }
}

/// What could not be given up.
fn restrict_worker() -> Vec<String> {
    let capabilities = capabilities::drop_all().map_err(|error| format!("capabilities: {error}"));
    let files = files::restrict_worker().map_err(|error| format!("Landlock: {error}"));
    let calls = filter::restrict_worker().map_err(|error| format!("seccomp: {error}"));
    [capabilities, files.map(drop), calls].into_iter().filter_map(Result::err).collect()
}

fn places(asked: &Asked<'_>, ports: &[&PortSpec], grants: &Grants) -> Places {
    let mut places = Places::default();
    let sockets = ports.iter().filter_map(|port| match &port.kind {
        PortKind::VhostUser(guest) if guest.mode == SocketRole::Server => Some(&*guest.socket),
        PortKind::VhostUser(_)
        | PortKind::Tap(_)
        | PortKind::AfXdp(_)
        | PortKind::PacketMmap(_) => None,
    });
    let folders = sockets.chain([asked.control]).map(folder_of);
    let folders = folders.chain(asked.allow_dirs.iter().cloned()).collect();
    // Without ports nobody knows yet where sockets will be.
    let unknown = ports.is_empty() && asked.allow_dirs.is_empty();
    places.sockets = (!unknown).then_some(folders);
    places.state.extend(asked.state_dir.map(Path::to_owned));
    places.read.extend(files::program());
    places.read.extend([PathBuf::from("/etc/group")]);
    // An editor puts a new file in the place of the old one.
    places.read.extend(asked.config.map(folder_of));
    if grants.uplinks() {
        places.read.extend([PathBuf::from("/sys/class/net")]);
        places.read.extend([PathBuf::from("/sys/devices")]);
    }
    if grants.netns {
        places.read.extend([PathBuf::from("/run/netns")]);
        let named = ports.iter().filter_map(|port| port.kind.interface()?.netns.as_deref());
        places
            .read
            .extend(named.filter(|name| name.starts_with('/')).map(|n| folder_of(n.as_ref())));
    }
    if grants.tap {
        places.devices.extend([PathBuf::from("/dev/net/tun")]);
    }
    places.devices.extend([PathBuf::from("/dev/userfaultfd")]);
    places
}

/// The folder of a file, whatever the current one is.
fn folder_of(file: &Path) -> PathBuf {
    let whole = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    whole.parent().map_or_else(|| PathBuf::from("/"), Path::to_owned)
}

#[cfg(test)]
mod tests;
