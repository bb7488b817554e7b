//! What a test needs besides our own code: finds it, or fetches and builds it once into a cache.
//!
//! Both QEMUs, DPDK, OVS, the guest kernel and the guest's programs are Debian packages that are
//! unpacked into the cache and never installed, so they need no right and change nothing on the
//! machine. Only hugepages do: [`Environment::testpmd`] says that it raises them.
//!
//! **Limits** One process works on the cache at a time (a file lock); a finished part is known by
//! its stamp and never built again.

mod apt;
mod cpio;
mod elf;
pub mod host;
pub(crate) mod image;

use std::ffi::OsString;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::process::{output, tied_command};
use crate::scratch::target_folder;

/// Raised when the contents of the cache change, so that an old cache is built again.
const RECIPE: &str = "2";
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
const OVS_SWITCH: &str = "usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk";
/// The last is what DPDK loads for its memory, so that nothing depends on it.
const OVS_PACKAGES: [&str; 4] = [
    "openvswitch-switch-dpdk",
    "openvswitch-switch",
    "openvswitch-common",
    "librte-mempool-ring23",
];
/// The linker's driver, the linker, what is linked with, and the emulator.
const CROSS_PACKAGES: [&str; 4] = [
    "gcc-12-aarch64-linux-gnu",
    "binutils-aarch64-linux-gnu",
    "libc6-dev-arm64-cross",
    "qemu-user-static",
];
/// The name ends so that the compiler knows how to call it.
const CROSS_LINKER: &str = "aarch64-gcc";
/// The unpacked linker, with the libraries that it was unpacked with.
const CROSS_SCRIPT: &str = r#"#!/bin/sh
root=$(dirname "$(readlink -f "$0")")
export LD_LIBRARY_PATH="$root/usr/lib/x86_64-linux-gnu"
exec "$root/usr/bin/aarch64-linux-gnu-gcc-12" --sysroot="$root" "$@"
"#;
const VERSION_TIMEOUT: Duration = Duration::from_secs(10);

/// The QEMU releases that we promise to work with.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum QemuVersion {
    /// 10.0, of Debian 13 and the backports of Debian 12.
    V10,
    /// 7.2, of Debian 12. It crashes with vhost-user, TCG and MSI-X: guests get `vectors=0`.
    V7,
}

/// A Linux guest: its kernel and its first file system.
#[derive(Clone, Debug)]
pub struct Image {
    /// The bzImage.
    pub kernel: PathBuf,
    /// The initramfs, whose `init` offers a shell on the console.
    pub initrd: PathBuf,
}

/// The programs of OVS-DPDK, unpacked.
#[derive(Clone, Debug)]
pub struct Ovs {
    root: PathBuf,
}

/// What links and runs programs for 64-bit Arm.
#[derive(Clone, Debug)]
pub struct CrossTools {
    /// The linker, for cargo.
    pub linker: PathBuf,
    /// The emulator with its options, for cargo: words with spaces between them.
    pub runner: String,
}

/// The cache and what has been found in it.
#[derive(Clone, Debug)]
pub struct Environment {
    cache: PathBuf,
}

impl QemuVersion {
    /// The name for case names and messages.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V10 => "qemu10",
            Self::V7 => "qemu7.2",
        }
    }

    fn suites(self) -> &'static [&'static str] {
        match self {
            Self::V10 => &["bookworm", "bookworm-backports"],
            Self::V7 => &["bookworm"],
        }
    }
}

impl Environment {
    /// Opens the cache: `$CAUSEWAY_CACHE`, or `guest-env` in cargo's target folder, or
    /// `~/.cache/causeway` if that cannot be written.
    ///
    /// # Errors
    /// None of them can be written.
    pub fn open() -> Result<Self> {
        let home = std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache/causeway"));
        let chosen = std::env::var_os("CAUSEWAY_CACHE").map(PathBuf::from);
        let places = match chosen {
            Some(place) => vec![place],
            None => [Some(target_folder().join("guest-env")), home].into_iter().flatten().collect(),
        };
        for place in &places {
            if fs::create_dir_all(place).is_ok() && File::create(place.join(".lock")).is_ok() {
                return Ok(Self { cache: place.canonicalize()? });
            }
        }
        anyhow::bail!("none of {places:?} can be written: set CAUSEWAY_CACHE to a folder that can")
    }

    /// A command that runs that QEMU; the first call fetches it.
    ///
    /// # Errors
    /// It is not in the cache and cannot be fetched.
    pub fn qemu(&self, version: QemuVersion) -> Result<Command> {
        let root = self.part(version.name(), |root| {
            say(&format!("fetching {} (unpacked into the cache, not installed)", version.name()));
            apt::unpack_closure(&self.cache, version.suites(), &["qemu-system-x86"], root)
        })?;
        let libraries = root.join("usr/lib/x86_64-linux-gnu");
        let mut command = tied_command(root.join("usr/bin/qemu-system-x86_64"));
        let search: Vec<PathBuf> = vec![libraries.clone(), root.join("lib/x86_64-linux-gnu")];
        let search: OsString = std::env::join_paths(search)?;
        let _ =
            command.env("LD_LIBRARY_PATH", search).env("QEMU_MODULE_DIR", libraries.join("qemu"));
        for data in ["usr/share/qemu", "usr/share/seabios", "usr/lib/ipxe/qemu"] {
            let _ = command.arg("-L").arg(root.join(data));
        }
        Ok(command)
    }

    /// The Linux guest; the first call builds it.
    ///
    /// # Errors
    /// It is not in the cache and a part of it cannot be fetched.
    pub fn image(&self) -> Result<Image> {
        let root = self.part("guest", |root| {
            say("building the guest image (kernel, busybox, iperf3, ethtool)");
            image::build(&self.cache, root)
        })?;
        Ok(Image { kernel: root.join("vmlinuz"), initrd: root.join("initrd") })
    }

    /// The Linux guest with more programs of this machine in its `/bin`, its first file system in
    /// `folder`.
    ///
    /// # Errors
    /// As [`Self::image`], or a program cannot be read.
    pub fn image_with(&self, programs: &[PathBuf], folder: &Path) -> Result<Image> {
        let image = self.image()?;
        let initrd = folder.join("initrd");
        image::extend(&image.initrd, programs, &initrd)?;
        Ok(Image { initrd, ..image })
    }

    /// A command that runs DPDK's testpmd (up to its EAL options) on hugepages that exist; the
    /// first call fetches it.
    ///
    /// # Errors
    /// It cannot be fetched, or there are too few hugepages.
    pub fn testpmd(&self) -> Result<Command> {
        {
            let _lock = self.lock()?;
            host::hugepages()?;
        }
        let root = self.part("dpdk", |root| {
            say("fetching DPDK (unpacked into the cache, not installed)");
            apt::unpack_closure(&self.cache, &["bookworm"], &["dpdk-dev"], root)
        })?;
        // Its printed lines have to come out at once although they go to a file.
        let mut command = without_installed_drivers();
        let _ = command
            .args(["stdbuf", "-oL"])
            .arg(root.join("usr/bin/dpdk-testpmd"))
            .env("LD_LIBRARY_PATH", library_path(&root)?)
            // Where `net_af_xdp` finds the XDP program of libxdp.
            .env("LIBXDP_OBJECT_PATH", root.join(LIBRARIES).join("bpf"));
        // By name: DPDK refuses a path that has a folder like `/tmp` in it.
        for driver in ["mempool_ring", "net_virtio", "net_vhost", "net_tap"] {
            let _ = command.arg("-d").arg(format!("librte_{driver}.so.23"));
        }
        Ok(command)
    }

    /// The programs of OVS-DPDK, with hugepages that exist; the first call fetches them.
    ///
    /// # Errors
    /// They cannot be fetched, or there are too few hugepages.
    pub fn ovs(&self) -> Result<Ovs> {
        {
            let _lock = self.lock()?;
            host::hugepages()?;
        }
        let root = self.part("ovs", |root| {
            say("fetching OVS-DPDK (unpacked into the cache, not installed)");
            apt::unpack_closure(&self.cache, &["bookworm"], &OVS_PACKAGES, root)
        })?;
        Ok(Ovs { root })
    }

    /// A command that runs `iperf3` or `dnsmasq` on this machine; the first call fetches them.
    ///
    /// # Errors
    /// They cannot be fetched.
    pub fn server_program(&self, name: &str) -> Result<Command> {
        let root = self.part("servers", |root| {
            say("fetching dnsmasq and iperf3 (unpacked into the cache, not installed)");
            apt::unpack_closure(&self.cache, &["bookworm"], &["dnsmasq-base", "iperf3"], root)
        })?;
        let places = ["usr/bin", "usr/sbin"].map(|folder| root.join(folder).join(name));
        let found = places.iter().find(|file| file.is_file());
        let mut command = Command::new(found.with_context(|| format!("no {name}"))?);
        let _ = command.env("LD_LIBRARY_PATH", root.join(LIBRARIES));
        Ok(command)
    }

    /// A command that runs `tshark` or `socat`; the first call fetches them.
    ///
    /// # Errors
    /// They cannot be fetched.
    pub fn wire_program(&self, name: &str) -> Result<Command> {
        let root = self.part("wire", |root| {
            say("fetching tshark and socat (unpacked into the cache, not installed)");
            let packages = ["tshark", "wireshark-common", "libwireshark-data", "socat"];
            apt::unpack_closure(&self.cache, &["bookworm"], &packages, root)
        })?;
        let mut command = tied_command(root.join("usr/bin").join(name));
        let search = [LIBRARIES, "lib/x86_64-linux-gnu"].map(|folder| root.join(folder));
        let _ = command
            .env("LD_LIBRARY_PATH", std::env::join_paths(search)?)
            .env("WIRESHARK_DATA_DIR", root.join("usr/share/wireshark"));
        Ok(command)
    }

    /// The linker and the emulator for 64-bit Arm; the first call fetches them.
    ///
    /// # Errors
    /// They cannot be fetched, or the cache's path has a space, which cargo would split.
    pub fn aarch64(&self) -> Result<CrossTools> {
        let root = self.part("aarch64", |root| {
            say(
                "fetching linker and emulator for aarch64 (unpacked into the cache, not installed)",
            );
            apt::unpack_closure(&self.cache, &["bookworm"], &CROSS_PACKAGES, root)?;
            let linker = root.join(CROSS_LINKER);
            fs::write(&linker, CROSS_SCRIPT)?;
            Ok(fs::set_permissions(&linker, fs::Permissions::from_mode(0o755))?)
        })?;
        let (emulator, libraries) =
            (root.join("usr/bin/qemu-aarch64-static"), root.join("usr/aarch64-linux-gnu"));
        let runner = format!("{} -L {}", emulator.display(), libraries.display());
        anyhow::ensure!(runner.split(' ').count() == 3, "a space in {}", root.display());
        Ok(CrossTools { linker: root.join(CROSS_LINKER), runner })
    }

    /// Builds a part of the cache once: into a temporary folder that gets its name when complete.
    fn part(&self, name: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        let done = self.cache.join(format!("{name}-{RECIPE}"));
        if done.exists() {
            return Ok(done);
        }
        let _lock = self.lock()?;
        if !done.exists() {
            let half = self.cache.join(format!("{name}.part"));
            let _ = fs::remove_dir_all(&half);
            fs::create_dir_all(&half)?;
            build(&half).with_context(|| format!("cannot prepare {name}"))?;
            fs::rename(&half, &done)?;
        }
        Ok(done)
    }

    fn lock(&self) -> Result<File> {
        let file = File::create(self.cache.join(".lock"))?;
        file.lock().context("cannot lock the cache")?;
        Ok(file)
    }
}

impl Ovs {
    /// A file of its packages.
    #[must_use]
    pub fn file(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    /// A command that runs one of its programs.
    ///
    /// # Errors
    /// The path of the cache cannot stand in a search path.
    pub fn command(&self, program: &str) -> Result<Command> {
        let mut command = tied_command(self.file(program));
        let _ = command.env("LD_LIBRARY_PATH", library_path(&self.root)?);
        Ok(command)
    }

    /// A command that runs the switch itself.
    ///
    /// # Errors
    /// As [`Ovs::command`].
    pub fn switch(&self) -> Result<Command> {
        let mut command = without_installed_drivers();
        let _ =
            command.arg(self.file(OVS_SWITCH)).env("LD_LIBRARY_PATH", library_path(&self.root)?);
        Ok(command)
    }

    /// Its version and DPDK's.
    ///
    /// # Errors
    /// It does not run.
    pub fn version(&self) -> Result<String> {
        let shown = output(self.command(OVS_SWITCH)?.arg("--version"), VERSION_TIMEOUT)?;
        let lines = shown.lines().filter_map(|line| match line.split_once("(Open vSwitch) ") {
            Some((_, version)) => Some(format!("Open vSwitch {version}")),
            None => line.starts_with("DPDK ").then(|| line.to_owned()),
        });
        Ok(lines.collect::<Vec<_>>().join(", "))
    }
}

/// The start of a command that does not see an installed DPDK's drivers: testpmd would load them
/// besides its own, and end. The folder is hidden from this one process only.
fn without_installed_drivers() -> Command {
    let hide = "for d in \"$0\"/*/dpdk; do \
                [ ! -d \"$d\" ] || mount -t tmpfs none \"$d\" || exit 1; \
                done; exec \"$@\"";
    let mut command = tied_command("unshare");
    let _ = command.args(["--mount", "--", "sh", "-c", hide, "/usr/lib"]);
    command
}

fn library_path(root: &Path) -> Result<OsString> {
    let drivers = "usr/lib/x86_64-linux-gnu/dpdk/pmds-23.0";
    let folders = [LIBRARIES, "lib/x86_64-linux-gnu", drivers].map(|folder| root.join(folder));
    Ok(std::env::join_paths(folders)?)
}

/// Tells the user what is going on, on standard error.
pub(crate) fn say(what: &str) {
    eprintln!("environment: {what}");
}
