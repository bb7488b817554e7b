//! Which files the control thread may use: where sockets come and go, and what is read again.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd,
    Ruleset, RulesetAttr, RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
    make_bitflags,
};

/// The newest rights that are restricted; an older kernel restricts those that it knows.
const NEWEST: ABI = ABI::V6;

/// What is needed where sockets come and go: they are made under another name and renamed.
fn sockets() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{MakeSock | RemoveFile})
}

/// What is needed where state is kept.
fn state() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{
        ReadFile | WriteFile | ReadDir | RemoveFile | RemoveDir | MakeReg | MakeDir | MakeSock
        | Truncate
    })
}

fn reading() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{ReadFile | ReadDir})
}

fn device() -> BitFlags<AccessFs> {
    make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev})
}

/// What may be used.
#[derive(Debug, Clone, Default)]
pub(super) struct Places {
    /// Folders in which sockets come and go. None: anywhere.
    pub(super) sockets: Option<BTreeSet<PathBuf>>,
    /// Folders in which files come and go.
    pub(super) state: BTreeSet<PathBuf>,
    /// Files and folders that are read.
    pub(super) read: BTreeSet<PathBuf>,
    /// Device files.
    pub(super) devices: BTreeSet<PathBuf>,
}

/// What the kernel made of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Restricted {
    /// Everything is in force.
    Fully,
    /// The kernel knows only a part of the rules.
    Partly,
    /// The kernel has no Landlock.
    Not,
}

impl Places {
    /// Restricts the calling thread, and those that it starts.
    pub(super) fn restrict(&self) -> Result<Restricted, RulesetError> {
        let mut rules = ruleset()?;
        let no_limit = BTreeSet::from([PathBuf::from("/")]);
        let everywhere = self.sockets.as_ref().unwrap_or(&no_limit);
        for (places, access) in [
            (everywhere, sockets()),
            (&self.state, state()),
            (&self.read, reading()),
            (&self.devices, device()),
        ] {
            for place in places {
                rules = allow(rules, place, access)?;
            }
        }
        enforce(rules)
    }

    /// Whether a socket may be made in `folder`.
    pub(super) fn has_socket_folder(&self, folder: &Path) -> bool {
        let Some(sockets) = &self.sockets else { return true };
        let whole = |path: &Path| std::fs::canonicalize(path).ok();
        let Some(folder) = whole(folder) else {
            // What is not there fails for that reason.
            return true;
        };
        let all = sockets.iter().chain(&self.state);
        all.filter_map(|allowed| whole(allowed)).any(|allowed| folder.starts_with(allowed))
    }
}

/// What a worker may do with files: read our program, to say where a panic was.
pub(super) fn restrict_worker() -> Result<Restricted, RulesetError> {
    let read = BTreeSet::from_iter(program());
    Places { sockets: Some(BTreeSet::new()), read, ..Places::default() }.restrict()
}

/// What a panic reads to say where it was.
pub(super) fn program() -> impl Iterator<Item = PathBuf> {
    let program = std::env::current_exe().ok();
    let known = ["/proc/self", "/usr/lib", "/lib", "/lib64"];
    program.into_iter().chain(known.into_iter().map(PathBuf::from))
}

/// Nothing is allowed.
fn ruleset() -> Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::from_all(NEWEST))?
        .create()
}

/// What is not there needs no rule.
fn allow(
    rules: RulesetCreated,
    place: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated, RulesetError> {
    let Ok(fd) = PathFd::new(place) else { return Ok(rules) };
    let access = if place.is_dir() { access } else { access & AccessFs::from_file(NEWEST) };
    rules.add_rule(PathBeneath::new(fd, access))
}

fn enforce(rules: RulesetCreated) -> Result<Restricted, RulesetError> {
    Ok(match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced => Restricted::Fully,
        RulesetStatus::PartiallyEnforced => Restricted::Partly,
        RulesetStatus::NotEnforced => Restricted::Not,
    })
}
