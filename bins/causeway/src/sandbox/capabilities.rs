//! Which of root's rights are kept: those that the ports of this switch need.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::Grants;

/// Names, for people.
const NAMES: [(CapabilitySet, &str); 9] = [
    (CapabilitySet::CHOWN, "CAP_CHOWN"),
    (CapabilitySet::DAC_OVERRIDE, "CAP_DAC_OVERRIDE"),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN"),
    (CapabilitySet::NET_RAW, "CAP_NET_RAW"),
    (CapabilitySet::IPC_LOCK, "CAP_IPC_LOCK"),
    (CapabilitySet::SYS_ADMIN, "CAP_SYS_ADMIN"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE"),
    (CapabilitySet::MKNOD, "CAP_MKNOD"),
    (CapabilitySet::BPF, "CAP_BPF"),
];

/// What the control thread needs for ports of these kinds, now and when they are opened again.
fn needed(grants: &Grants) -> CapabilitySet {
    let mut needed = CapabilitySet::empty();
    let kinds = [
        // Making a tap, setting it up.
        (grants.tap, CapabilitySet::NET_ADMIN),
        // The program and its maps; memory that is locked beyond the limit.
        (grants.af_xdp, CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW),
        (grants.af_xdp, CapabilitySet::BPF | CapabilitySet::IPC_LOCK),
        (grants.packet_mmap, CapabilitySet::NET_ADMIN | CapabilitySet::NET_RAW),
        // Entering a namespace; entering that of a macvtap takes a mount of sysfs, too.
        (grants.netns, CapabilitySet::SYS_ADMIN),
        (grants.macvtap, CapabilitySet::SYS_ADMIN | CapabilitySet::MKNOD),
        (grants.foreign_group, CapabilitySet::CHOWN),
        (grants.foreign_folder, CapabilitySet::DAC_OVERRIDE),
    ];
    for (granted, set) in kinds {
        if granted {
            needed |= set;
        }
    }
    needed
}

/// Gives up everything that ports of these kinds do not need; returns the names of what is left.
pub(super) fn keep_for(grants: &Grants) -> io::Result<Vec<String>> {
    restrict(needed(grants))
}

/// Gives up everything.
pub(super) fn drop_all() -> io::Result<()> {
    restrict(CapabilitySet::empty()).map(drop)
}

/// The calling thread keeps what it has of `kept`.
fn restrict(kept: CapabilitySet) -> io::Result<Vec<String>> {
    let had = capabilities(None)?;
    let permitted = had.permitted & kept;
    let inheritable = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: permitted, permitted, inheritable })?;
    let held = NAMES.iter().filter(|(set, _)| permitted.contains(*set));
    Ok(held.map(|(_, name)| (*name).to_owned()).collect())
}
