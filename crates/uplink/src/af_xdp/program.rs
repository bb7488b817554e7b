//! The XDP program that hands frames to our sockets, instruction by instruction.
//!
//! ```text
//!  steer=all:   redirect to the socket of the receive queue; none there: to the kernel
//!  steer=mac:   group address, or one of an attached guest: as above; else to the kernel
//! ```
//!
//! **Limits.** [`MACS_MAX`] addresses.
//! **Not supported.** A frame goes to one of both: with `steer=mac` the host's own stack sees no
//! broadcast, so it can ask for addresses on this interface, but does not answer who asks.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use packet::MacAddr;

use crate::parts::{Collected, PartsError, Remaining};
use crate::sys::bpf;

use super::{AfXdpError, Steer};

/// The most addresses of attached guests.
pub const MACS_MAX: u32 = 65_536;

/// Key and value of the map of addresses, in bytes.
const MAC_KEY: usize = 6;
const MAC_VALUE: usize = 1;
/// Key and value of the map of sockets, in bytes.
const SOCKET_KEY: u32 = 4;
const SOCKET_VALUE: u32 = 4;

/// Fields of `struct xdp_md`.
const DATA: i16 = 0;
const DATA_END: i16 = 4;
const RX_QUEUE_INDEX: i16 = 16;

const XDP_PASS: i32 = 2;
const CALL_MAP_LOOKUP: i32 = 1;
const CALL_REDIRECT_MAP: i32 = 51;

/// Opcodes.
const LOAD_8: u8 = 0x71;
const LOAD_16: u8 = 0x69;
const LOAD_32: u8 = 0x61;
const STORE_16: u8 = 0x6b;
const STORE_32: u8 = 0x63;
const MOVE: u8 = 0xbf;
const MOVE_CONST: u8 = 0xb7;
const ADD_CONST: u8 = 0x07;
const AND_CONST: u8 = 0x57;
const LOAD_CONST_64: u8 = 0x18;
const JUMP_IF_GREATER: u8 = 0x2d;
const JUMP_IF_NOT: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// In the source register of [`LOAD_CONST_64`]: the constant is a map's fd.
const MAP_FD: u8 = 1;
/// The frame pointer.
const FP: u8 = 10;

/// One instruction: `struct bpf_insn` as the kernel of this machine lays it out.
fn op(code: u8, (to, from): (u8, u8), offset: i16, constant: i32) -> u64 {
    let [o0, o1] = offset.to_ne_bytes();
    let [c0, c1, c2, c3] = constant.to_ne_bytes();
    let registers =
        if cfg!(target_endian = "little") { to | (from << 4) } else { from | (to << 4) };
    u64::from_ne_bytes([code, registers, o0, o1, c0, c1, c2, c3])
}

/// Loads a map into a register: two instructions.
fn map(to: u8, fd: i32) -> [u64; 2] {
    [op(LOAD_CONST_64, (to, MAP_FD), 0, fd), 0]
}

/// `r6` is the context; gives the frame to the socket of its queue, else to the kernel.
fn redirect(sockets: i32) -> Vec<u64> {
    let [map0, map1] = map(1, sockets);
    vec![
        op(LOAD_32, (2, 6), RX_QUEUE_INDEX, 0),
        map0,
        map1,
        op(MOVE_CONST, (3, 0), 0, XDP_PASS),
        op(CALL, (0, 0), 0, CALL_REDIRECT_MAP),
        op(EXIT, (0, 0), 0, 0),
    ]
}

/// The whole program.
fn assemble(sockets: i32, macs: Option<i32>) -> Vec<u64> {
    let mut program = vec![op(MOVE, (6, 1), 0, 0)];
    if let Some(macs) = macs {
        let [map0, map1] = map(1, macs);
        program.extend([
            op(LOAD_32, (2, 6), DATA, 0),
            op(LOAD_32, (3, 6), DATA_END, 0),
            op(MOVE, (4, 2), 0, 0),
            op(ADD_CONST, (4, 0), 0, 14),
            // Runts: to the kernel.
            op(JUMP_IF_GREATER, (4, 3), 13, 0),
            op(LOAD_8, (5, 2), 0, 0),
            op(AND_CONST, (5, 0), 0, 1),
            // Group addresses: to us, behind the kernel's way.
            op(JUMP_IF_NOT, (5, 0), 12, 0),
            op(LOAD_32, (5, 2), 0, 0),
            op(STORE_32, (FP, 5), -8, 0),
            op(LOAD_16, (5, 2), 4, 0),
            op(STORE_16, (FP, 5), -4, 0),
            op(MOVE, (2, FP), 0, 0),
            op(ADD_CONST, (2, 0), 0, -8),
            map0,
            map1,
            op(CALL, (0, 0), 0, CALL_MAP_LOOKUP),
        ]);
        // Found: to us.
        program.extend([
            op(JUMP_IF_NOT, (0, 0), 2, 0),
            op(MOVE_CONST, (0, 0), 0, XDP_PASS),
            op(EXIT, (0, 0), 0, 0),
        ]);
    }
    program.extend(redirect(sockets));
    program
}

/// The loaded program and its maps.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) program: OwnedFd,
    sockets: OwnedFd,
    /// With `steer=mac`.
    macs: Option<OwnedFd>,
    /// What the map of addresses holds.
    known: BTreeSet<MacAddr>,
}

impl Program {
    /// Loads the program for `queues` sockets.
    pub(super) fn load(queues: u16, steer: Steer) -> Result<Self, AfXdpError> {
        let failed = |error| AfXdpError::bpf("make a BPF map", error);
        let sizes = (SOCKET_KEY, SOCKET_VALUE);
        let sockets = bpf::create_map(bpf::MAP_TYPE_XSKMAP, sizes, queues.into(), b"cw_sockets")
            .map_err(failed)?;
        let macs = match steer {
            Steer::All => None,
            Steer::Mac => Some(
                bpf::create_map(bpf::MAP_TYPE_HASH, (6, 1), MACS_MAX, b"cw_macs")
                    .map_err(failed)?,
            ),
        };
        let instructions = assemble(sockets.as_raw_fd(), macs.as_ref().map(AsRawFd::as_raw_fd));
        let program =
            bpf::load_xdp(&instructions, b"causeway").map_err(|(error, log)| {
                match error.raw_os_error() {
                    Some(libc::EPERM) => AfXdpError::bpf("load an XDP program", error),
                    _ => AfXdpError::Program { error, log },
                }
            })?;
        Ok(Self { program, sockets, macs, known: BTreeSet::new() })
    }

    /// Gives the frames of a queue to a socket.
    pub(super) fn set_socket(&self, queue: u32, socket: &OwnedFd) -> io::Result<()> {
        let fd = socket.as_raw_fd().to_ne_bytes();
        bpf::update(self.sockets.as_fd(), &queue.to_ne_bytes(), &fd)
    }

    /// Says which stations are ours; with `steer=all`, all are.
    ///
    /// What is not wanted any more goes first, so that a map that was full has room again; after an
    /// error the next call goes on from what the map holds.
    pub(super) fn set_macs(&mut self, wanted: &[MacAddr]) -> io::Result<()> {
        let Some(macs) = &self.macs else { return Ok(()) };
        let wanted: BTreeSet<MacAddr> = wanted.iter().copied().collect();
        let old: Vec<MacAddr> = self.known.difference(&wanted).copied().collect();
        for mac in old {
            match bpf::delete(macs.as_fd(), &key(mac), MAC_VALUE) {
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return Err(error),
                _ => {
                    let _ = self.known.remove(&mac);
                }
            }
        }
        let new: Vec<MacAddr> = wanted.difference(&self.known).copied().collect();
        for mac in new {
            bpf::update(macs.as_fd(), &key(mac), &[1; MAC_VALUE])?;
            let _ = self.known.insert(mac);
        }
        Ok(())
    }

    /// The program and its maps: of the last one, whether it is there.
    pub(super) fn parts(&self, fds: &mut Collected) -> Result<bool, PartsError> {
        fds.add(&self.program)?;
        fds.add(&self.sockets)?;
        if let Some(macs) = &self.macs {
            fds.add(macs)?;
        }
        Ok(self.macs.is_some())
    }

    /// What [`Self::parts`] took apart; what the map of addresses holds is asked of the kernel.
    pub(super) fn from_parts(has_macs: bool, fds: &mut Remaining) -> Result<Self, PartsError> {
        let (program, sockets) = (fds.next()?, fds.next()?);
        let macs = fds.next_if(has_macs)?;
        let keys = macs.as_ref().map(|macs| bpf::keys(macs.as_fd(), MAC_VALUE, MACS_MAX));
        let keys = keys.transpose().map_err(|error| {
            let what = "read the map of addresses of an XDP program";
            PartsError::System { what, error }
        })?;
        let known = keys.unwrap_or_default().into_iter().map(MacAddr).collect();
        Ok(Self { program, sockets, macs, known })
    }
}

fn key(mac: MacAddr) -> [u8; MAC_KEY] {
    mac.0
}

#[cfg(test)]
mod tests {
    #![expect(clippy::arithmetic_side_effects, reason = "tests")]

    use super::{EXIT, JUMP_IF_GREATER, JUMP_IF_NOT, assemble};

    /// Where the jump at `at` goes.
    fn target(program: &[u64], at: usize) -> usize {
        let bytes = program[at].to_ne_bytes();
        at + 1 + usize::try_from(i16::from_ne_bytes([bytes[2], bytes[3]])).unwrap()
    }

    #[test]
    fn jumps_go_where_they_say() {
        let program = assemble(3, Some(4));
        let codes: Vec<u8> = program.iter().map(|op| op.to_ne_bytes()[0]).collect();
        let redirect = codes.len() - 6;
        let pass = redirect - 2;
        assert_eq!((codes[pass + 1], codes[codes.len() - 1]), (EXIT, EXIT));
        let targets = |code: u8| -> Vec<usize> {
            let jumps = (0..codes.len()).filter(|at| codes[*at] == code);
            jumps.map(|at| target(&program, at)).collect()
        };
        assert_eq!(targets(JUMP_IF_GREATER), [pass]);
        let ours = targets(JUMP_IF_NOT);
        assert_eq!(ours, [redirect, redirect]);
    }
}
