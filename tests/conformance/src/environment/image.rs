//! Builds the Linux guest: Debian's cloud kernel and an initramfs with busybox, iperf3, ethtool
//! and the virtio modules.
//!
//! `init` offers a shell on the console: it prints [`UP`], then reads one command a line, runs it
//! and prints [`DONE`] with its status. Uncompressed, because a guest under TCG would spend longer
//! on decompressing than QEMU on loading.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::cpio::Archive;
use super::{apt, elf};

/// What the console says when the guest takes commands.
pub(crate) const UP: &str = "@@UP";
/// What the console says, with the status, when a command has ended.
pub(crate) const DONE: &str = "@@DONE";

const PACKAGES: [&str; 4] = ["busybox-static", "iperf3", "ethtool", "libc6"];
const KERNEL: &str = "linux-image-cloud-amd64";
const PROGRAMS: [&str; 2] = ["usr/bin/iperf3", "sbin/ethtool"];
/// In the order of their dependencies.
const MODULES: [&str; 13] = [
    "drivers/virtio/virtio",
    "drivers/virtio/virtio_ring",
    "drivers/virtio/virtio_pci_legacy_dev",
    "drivers/virtio/virtio_pci_modern_dev",
    "drivers/virtio/virtio_pci",
    "net/core/failover",
    "drivers/net/net_failover",
    "drivers/net/virtio_net",
    "net/llc/llc",
    "net/802/stp",
    "net/802/garp",
    "net/802/mrp",
    "net/8021q/8021q",
];

/// Builds `vmlinuz` and `initrd` in `folder`.
pub(super) fn build(cache: &Path, folder: &Path) -> Result<()> {
    let root = folder.join("root");
    fs::create_dir_all(&root)?;
    apt::unpack_guest(cache, &PACKAGES, KERNEL, &root)?;
    let kernel = only_entry(&root.join("boot"), "vmlinuz-")?;
    let _ = fs::copy(kernel, folder.join("vmlinuz"))?;
    write_initrd(&root, &folder.join("initrd"))?;
    fs::remove_dir_all(&root)?;
    Ok(())
}

/// Writes `initrd` with more `programs` in its `bin`, and the libraries that they need of this
/// machine: those serve the older programs of the image too.
pub(super) fn extend(initrd: &Path, programs: &[PathBuf], target: &Path) -> Result<()> {
    let mut out = BufWriter::new(File::create(target)?);
    out.write_all(&read(initrd)?)?;
    // The kernel unpacks one archive behind the other.
    let mut archive = Archive::new(out);
    archive.file(elf::LOADER, &read(&Path::new("/").join(elf::LOADER))?)?;
    for program in programs {
        let shown = program.to_str().with_context(|| format!("{}", program.display()))?;
        archive.file(&format!("bin/{}", file_name(program)?), &read(program)?)?;
        for library in elf::libraries(Path::new("/"), shown)? {
            archive.file(&format!("lib/{}", file_name(&library)?), &read(&library)?)?;
        }
    }
    archive.finish()
}

fn write_initrd(root: &Path, target: &Path) -> Result<()> {
    let mut archive = Archive::new(BufWriter::new(File::create(target)?));
    for name in ["bin", "dev", "lib", "lib64", "lib/modules", "proc", "sys", "tmp"] {
        archive.folder(name)?;
    }
    archive.character_device("dev/console", (5, 1))?;
    archive.file("init", init().as_bytes())?;
    archive.file("bin/busybox", &read(&root.join("bin/busybox"))?)?;
    archive.file(elf::LOADER, &read(&root.join(elf::LOADER))?)?;
    let mut libraries = Vec::new();
    for program in PROGRAMS {
        archive.file(
            &format!("bin/{}", file_name(Path::new(program))?),
            &read(&root.join(program))?,
        )?;
        libraries.extend(elf::libraries(root, program)?);
    }
    libraries.sort();
    libraries.dedup();
    for library in libraries {
        archive.file(&format!("lib/{}", file_name(&library)?), &read(&library)?)?;
    }
    let modules = only_entry(&root.join("lib/modules"), "")?.join("kernel");
    for module in MODULES {
        let path = modules.join(format!("{module}.ko"));
        archive.file(&format!("lib/modules/{}", file_name(&path)?), &read(&path)?)?;
    }
    archive.finish()
}

fn init() -> String {
    let names = MODULES.map(|module| module.rsplit('/').next().unwrap_or(module)).join(" ");
    format!(
        "#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin LD_LIBRARY_PATH=/lib
mount -t proc none /proc; mount -t sysfs none /sys; mount -t devtmpfs none /dev
mount -t tmpfs none /tmp; mkdir -p /dev/shm; mount -t tmpfs none /dev/shm
dmesg -n 1
stty -echo -onlcr
for module in {names}; do insmod /lib/modules/$module.ko; done
ip link set lo up
echo; echo {UP}
while IFS= read -r line; do
  eval \"$line\" </dev/null 2>&1
  status=$?; echo; echo \"{DONE} $status\"
done
poweroff -f
"
    )
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

fn file_name(path: &Path) -> Result<&str> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.with_context(|| format!("{} has no name", path.display()))
}

fn only_entry(folder: &Path, prefix: &str) -> Result<PathBuf> {
    let entries = fs::read_dir(folder).with_context(|| format!("no {}", folder.display()))?;
    entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| file_name(path).is_ok_and(|name| name.starts_with(prefix)))
        .with_context(|| format!("no {prefix}* in {}", folder.display()))
}
