//! What a tap's kernel may leave to us: `TUNSETOFFLOAD`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use port::OffloadSet;

use crate::sys;

const CSUM: u32 = 1;
const TSO4: u32 = 1 << 1;
const TSO6: u32 = 1 << 2;
const TSO_ECN: u32 = 1 << 3;
/// USO over IPv4 and IPv6: the kernel takes both or none.
const USO: u32 = 1 << 5 | 1 << 6;

/// What the kernel of an open tap leaves to us, for who holds the link while workers have the
/// queues. All queues have it together, in whichever process they are.
#[derive(Debug)]
pub struct TapOffloads {
    pub(super) fd: Arc<OwnedFd>,
    pub(super) set: OffloadSet,
}

impl TapOffloads {
    /// Sets it again: another process that was to go on with the tap may have set its own.
    ///
    /// # Errors
    ///
    /// The kernel's: `EBADFD` if the interface is gone.
    pub fn set_again(&self) -> io::Result<()> {
        set(self.fd.as_fd(), self.set).map(drop)
    }
}

/// Lets the kernel leave `wanted` to us. What was set: a kernel before 6.2 knows no USO, for which
/// it makes up itself.
pub(super) fn set(fd: BorrowedFd<'_>, wanted: OffloadSet) -> io::Result<OffloadSet> {
    let without_uso = OffloadSet { uso: false, ..wanted };
    match sys::tun_set_offloads(fd, flags(wanted)) {
        Ok(()) => Ok(wanted),
        Err(error) if wanted.uso && error.raw_os_error() == Some(libc::EINVAL) => {
            sys::tun_set_offloads(fd, flags(without_uso)).map(|()| without_uso)
        }
        Err(error) => Err(error),
    }
}

/// Segmentation needs checksums, and ECN segmentation.
fn flags(set: OffloadSet) -> u32 {
    if !set.csum {
        return 0;
    }
    let tso = [(set.tso4, TSO4), (set.tso6, TSO6), (set.ecn && (set.tso4 || set.tso6), TSO_ECN)];
    let taken = tso.into_iter().chain([(set.uso, USO)]).filter(|(on, _)| *on);
    taken.fold(CSUM, |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::flags;
    use port::OffloadSet;

    #[test]
    fn the_kernel_is_asked_for_what_it_takes_only() {
        assert_eq!(flags(OffloadSet::ALL), 0x6f);
        assert_eq!(flags(OffloadSet { csum: false, ..OffloadSet::ALL }), 0);
        assert_eq!(flags(OffloadSet { tso4: false, tso6: false, ..OffloadSet::ALL }), 0x61);
        assert_eq!(flags(OffloadSet { uso: false, tso6: false, ..OffloadSet::ALL }), 0x0b);
    }
}
