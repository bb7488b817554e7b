//! Network namespaces with veth pairs: containers, as far as a switch can see them.
//!
//! **Limits** Names hold the process id, so that test runs do not meet.

use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, anyhow};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::environment::host::{find, ip};
use crate::process::{Process, tied_command};

/// A namespace that is deleted in the end, and every interface in it.
#[derive(Debug)]
pub struct Netns(String);

impl Netns {
    /// Makes a namespace.
    ///
    /// # Errors
    /// `ip` fails: we are not root.
    pub fn new() -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("cw-c{}-{number}", std::process::id());
        let _ = ip(&["netns", "add", &name])?;
        let namespace = Self(name);
        let _ = namespace.ip(&["link", "set", "lo", "up"])?;
        Ok(namespace)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }

    /// Runs `ip` inside.
    ///
    /// # Errors
    /// It fails.
    pub fn ip(&self, arguments: &[&str]) -> Result<String> {
        ip(&[&["-n", &self.0], arguments].concat())
    }

    /// Gives it `eth0` with an address ("10.77.0.254/24"), whose other end is `ifname` in `other`.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn connect(&self, address: &str, other: &Self, ifname: &str) -> Result<()> {
        let ours = ["link", "add", "eth0", "type", "veth"];
        let _ = self.ip(&[&ours[..], &["peer", "name", ifname, "netns", other.name()]].concat())?;
        self.configure("eth0", address)
    }

    /// Gives an interface an address and brings it up.
    ///
    /// # Errors
    /// `ip` fails.
    pub fn configure(&self, ifname: &str, address: &str) -> Result<()> {
        let _ = self.ip(&["address", "add", address, "dev", ifname])?;
        self.ip(&["link", "set", ifname, "up"]).map(drop)
    }

    /// A command that runs `program` inside.
    ///
    /// # Errors
    /// There is no `ip`.
    pub fn command(&self, program: &Command) -> Result<Command> {
        let mut command = tied_command(find("ip").context("no ip program")?);
        let _ = command.args(["netns", "exec", &self.0]).arg(program.get_program());
        let _ = command.args(program.get_args());
        for (name, value) in program.get_envs() {
            let _ = value.map(|value| command.env(name, value));
        }
        Ok(command)
    }

    /// Runs `work` in a thread of its own inside.
    ///
    /// # Errors
    /// The namespace cannot be entered, or `work` fails.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let file = File::open(Path::new("/run/netns").join(&self.0))?;
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
                work()
            });
            thread.join().map_err(|_| anyhow!("a thread in {} panicked", self.0))?
        })
    }

    /// Starts `program` inside, as a process that ends with its value.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(&self, name: &str, program: &Command, folder: &Path) -> Result<Process> {
        Process::spawn(name, &mut self.command(program)?, &folder.join(format!("{name}.log")))
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = ip(&["netns", "del", &self.0]);
    }
}
