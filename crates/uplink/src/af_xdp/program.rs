//! The XDP program that hands frames to our sockets, instruction by instruction.
//!
//! ```text
//!  steer=all:   redirect to the socket of the receive queue; none there: to the kernel
//!  steer=mac:   group address, or one of an attached guest: as above; else to the kernel
//!  with marks:  │ mark │ frame: 8 bytes before it say how it is to be cut ([`Mark`])
//! ```
//!
//! A program in front of a socket buffer reaches what the buffer says of a large frame: its
//! `skb_shared_info` stands behind the bytes that the program is shown. A program in a driver has
//! no such thing, and marks frames as whole.
//!
//! **Trust.** The kernel checks each program, and where types have their fields it says itself.
//! **Limits.** [`MACS_MAX`] addresses.
//! **Not supported.** A frame goes to one of both: with `steer=mac` the host's own stack sees no
//! broadcast, so it can ask for addresses on this interface, but does not answer who asks.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use packet::MacAddr;
use serde::{Deserialize, Serialize};

use crate::parts::{Collected, PartsError, Remaining};
use crate::sys::bpf;

use super::btf::Btf;
use super::{AfXdpError, Steer};

/// The most addresses of attached guests.
pub const MACS_MAX: u32 = 65_536;

/// Key and value of the map of addresses, in bytes.
const MAC_KEY: usize = 6;
const MAC_VALUE: usize = 1;
/// Key and value of the map of sockets, in bytes.
const SOCKET_KEY: u32 = 4;
const SOCKET_VALUE: u32 = 4;

/// Bytes of the mark before a frame.
pub(super) const MARK: u32 = 8;

/// Fields of `struct xdp_md`.
const DATA: i16 = 0;
const DATA_END: i16 = 4;
const DATA_META: i16 = 8;
const RX_QUEUE_INDEX: i16 = 16;

const LICENSE: &CStr = c"Apache-2.0 OR BSD-3-Clause";
const MARK_BYTES: i32 = 8;
const _: () = assert!(MARK_BYTES as u32 == MARK);

const XDP_PASS: i32 = 2;
const CALL_MAP_LOOKUP: i32 = 1;
const CALL_REDIRECT_MAP: i32 = 51;
const CALL_ADJUST_META: i32 = 54;

/// Opcodes.
const LOAD_8: u8 = 0x71;
const LOAD_16: u8 = 0x69;
const LOAD_32: u8 = 0x61;
const LOAD_64: u8 = 0x79;
const STORE_16: u8 = 0x6b;
const STORE_32: u8 = 0x63;
const MOVE: u8 = 0xbf;
const MOVE_CONST: u8 = 0xb7;
const ADD: u8 = 0x0f;
const ADD_CONST: u8 = 0x07;
const AND_CONST: u8 = 0x57;
const LOAD_CONST_64: u8 = 0x18;
const JUMP_IF_GREATER: u8 = 0x2d;
const JUMP_IF_NOT: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;
/// In the source register of [`LOAD_CONST_64`]: the constant is a map's fd.
const MAP_FD: u8 = 1;
/// In the source register of [`CALL`]: the constant is a function of the kernel.
const KERNEL: u8 = 2;
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

/// Where the kernel keeps how a socket buffer is to be cut.
#[derive(Debug, Clone, Copy)]
struct Cuts {
    /// Functions: the kernel's own context of the program's, and a pointer as one to a type.
    context: i32,
    cast: i32,
    /// Of the context: where the bytes begin, and how many there are with what is behind them.
    start: i16,
    bytes: i16,
    /// The structure behind the bytes: its type, its size, and its fields.
    info: i32,
    info_bytes: i32,
    kind: i16,
    size: i16,
}

impl Cuts {
    /// What this kernel says.
    fn of_kernel() -> Option<Self> {
        let said = Btf::of_kernel().ok().as_ref().and_then(Self::of);
        if said.is_none() {
            tracing::debug!("the kernel does not say where it keeps how frames are to be cut");
        }
        said
    }

    /// What the kernel says. None if it is of a kind that is not known here.
    fn of(btf: &Btf) -> Option<Self> {
        let function = |name| btf.function(name).and_then(|number| i32::try_from(number).ok());
        let (context, info) = (btf.structure("xdp_buff")?, btf.structure("skb_shared_info")?);
        let of_context = |member| context.place(member).and_then(|at| i16::try_from(at).ok());
        let of_info = |member| info.place(member).and_then(|at| i16::try_from(at).ok());
        // The kernel rounds the size up to lines of its cache: here to 64 bytes.
        let lines = cfg!(any(target_arch = "x86_64", target_arch = "aarch64"));
        (lines && info.size().is_multiple_of(64)).then_some(())?;
        Some(Self {
            context: function("bpf_cast_to_kern_ctx")?,
            cast: function("bpf_rdonly_cast")?,
            start: of_context("data_hard_start")?,
            bytes: of_context("frame_sz")?,
            info: i32::try_from(info.number()).ok()?,
            info_bytes: i32::try_from(info.size()).ok()?,
            kind: of_info("gso_type")?,
            size: of_info("gso_size")?,
        })
    }
}

/// What a program writes before each frame that it hands over.
#[derive(Debug, Clone, Copy)]
enum Marks {
    None,
    /// That it is whole.
    Whole,
    /// How it is to be cut.
    Cut(Cuts),
}

/// `r6` is the context; `r7` gets the kind of segments and `r8` their size, which stand in the
/// mark. Behind it an instruction more than what [`redirect`] has is the way to the kernel.
fn mark(marks: Marks) -> Vec<u64> {
    let mut program = match marks {
        Marks::None => return Vec::new(),
        Marks::Whole => vec![op(MOVE_CONST, (7, 0), 0, 0), op(MOVE_CONST, (8, 0), 0, 0)],
        Marks::Cut(Cuts { context, cast, start, bytes, info, info_bytes, kind, size }) => vec![
            op(MOVE, (1, 6), 0, 0),
            op(CALL, (0, KERNEL), 0, context),
            op(LOAD_64, (1, 0), start, 0),
            op(LOAD_32, (2, 0), bytes, 0),
            op(ADD, (1, 2), 0, 0),
            op(ADD_CONST, (1, 0), 0, info_bytes.wrapping_neg()),
            op(MOVE_CONST, (2, 0), 0, info),
            op(CALL, (0, KERNEL), 0, cast),
            op(LOAD_32, (7, 0), kind, 0),
            op(LOAD_16, (8, 0), size, 0),
        ],
    };
    let pass = REDIRECT;
    program.extend([
        op(MOVE, (1, 6), 0, 0),
        op(MOVE_CONST, (2, 0), 0, -MARK_BYTES),
        op(CALL, (0, 0), 0, CALL_ADJUST_META),
        // Without room for a mark: to the kernel. It has room wherever a program can be.
        op(JUMP_IF_NOT, (0, 0), pass.wrapping_add(7), 0),
        op(LOAD_32, (2, 6), DATA_META, 0),
        op(LOAD_32, (3, 6), DATA, 0),
        op(MOVE, (4, 2), 0, 0),
        op(ADD_CONST, (4, 0), 0, MARK_BYTES),
        op(JUMP_IF_GREATER, (4, 3), pass.wrapping_add(2), 0),
        op(STORE_32, (2, 7), 0, 0),
        op(STORE_32, (2, 8), 4, 0),
    ]);
    program
}

/// Instructions of [`redirect`].
const REDIRECT: i16 = 6;

/// `r6` is the context; gives the frame to the socket of its queue, else to the kernel.
fn redirect(sockets: i32) -> [u64; REDIRECT as usize] {
    let [map0, map1] = map(1, sockets);
    [
        op(LOAD_32, (2, 6), RX_QUEUE_INDEX, 0),
        map0,
        map1,
        op(MOVE_CONST, (3, 0), 0, XDP_PASS),
        op(CALL, (0, 0), 0, CALL_REDIRECT_MAP),
        op(EXIT, (0, 0), 0, 0),
    ]
}

/// The whole program.
fn assemble(sockets: i32, macs: Option<i32>, marks: Marks) -> Vec<u64> {
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
    program.extend(mark(marks));
    program.extend(redirect(sockets));
    if !matches!(marks, Marks::None) {
        program.extend([op(MOVE_CONST, (0, 0), 0, XDP_PASS), op(EXIT, (0, 0), 0, 0)]);
    }
    program
}

/// The loaded program and its maps.
#[derive(Debug)]
pub(super) struct Program {
    pub(super) program: OwnedFd,
    /// The one that says how frames are to be cut: with it both mark frames.
    pub(super) cutting: Option<OwnedFd>,
    sockets: OwnedFd,
    /// With `steer=mac`.
    macs: Option<OwnedFd>,
    /// What the map of addresses holds.
    known: BTreeSet<MacAddr>,
}

/// Which of a program's fds there are.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct ProgramParts {
    /// With `steer=mac`.
    macs: bool,
    pub(super) cutting: bool,
}

/// The program with these maps that says how frames are to be cut.
fn load_cutting(fds: (i32, Option<i32>), cuts: Cuts) -> Option<OwnedFd> {
    let refused = |(error, log): &(io::Error, String)| {
        tracing::debug!(%error, log, "the kernel does not let a program see how frames are cut");
    };
    load(fds, Marks::Cut(cuts)).inspect_err(refused).ok()
}

fn load((sockets, macs): (i32, Option<i32>), marks: Marks) -> Result<OwnedFd, (io::Error, String)> {
    // Functions of the kernel are for programs that may be had under the GPL. This one may: it is
    // these instructions, and of nobody else.
    let license = if matches!(marks, Marks::Cut(_)) { c"Dual BSD/GPL" } else { LICENSE };
    bpf::load_xdp(&assemble(sockets, macs, marks), b"causeway", license)
}

impl Program {
    /// Loads the program for `queues` sockets; with `cuts` also the one that says how frames are to
    /// be cut, if the kernel lets it.
    pub(super) fn load(queues: u16, steer: Steer, cuts: bool) -> Result<Self, AfXdpError> {
        Self::load_with(queues, steer, if cuts { Cuts::of_kernel() } else { None })
    }

    /// At most `count` programs for one queue that say how frames are to be cut.
    pub(super) fn load_spares(count: usize) -> Vec<Self> {
        let Some(cuts) = Cuts::of_kernel() else { return Vec::new() };
        let one = |_| Self::load_with(1, Steer::All, Some(cuts)).ok();
        (0..count).map_while(one).take_while(|program| program.cutting.is_some()).collect()
    }

    /// The same program and maps again.
    pub(super) fn again(&self) -> io::Result<Self> {
        let again = |fd: &Option<OwnedFd>| fd.as_ref().map(OwnedFd::try_clone).transpose();
        Ok(Self {
            program: self.program.try_clone()?,
            cutting: again(&self.cutting)?,
            sockets: self.sockets.try_clone()?,
            macs: again(&self.macs)?,
            known: self.known.clone(),
        })
    }

    /// Which frames it takes.
    pub(super) fn steer(&self) -> Steer {
        if self.macs.is_some() { Steer::Mac } else { Steer::All }
    }

    fn load_with(queues: u16, steer: Steer, cuts: Option<Cuts>) -> Result<Self, AfXdpError> {
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
        let fds = (sockets.as_raw_fd(), macs.as_ref().map(AsRawFd::as_raw_fd));
        let cutting = cuts.and_then(|cuts| load_cutting(fds, cuts));
        let marks = if cutting.is_some() { Marks::Whole } else { Marks::None };
        let program = load(fds, marks).map_err(|(error, log)| match error.raw_os_error() {
            Some(libc::EPERM) => AfXdpError::bpf("load an XDP program", error),
            _ => AfXdpError::Program { error, log },
        })?;
        Ok(Self { program, cutting, sockets, macs, known: BTreeSet::new() })
    }

    /// Gives the frames of a queue to a socket.
    pub(super) fn set_socket(&self, queue: u32, socket: &OwnedFd) -> io::Result<()> {
        let fd = socket.as_raw_fd().to_ne_bytes();
        bpf::update(self.sockets.as_fd(), &queue.to_ne_bytes(), &fd)
    }

    /// Takes the frames of a queue from its socket, whoever else holds it.
    pub(super) fn clear_socket(&self, queue: u32) -> io::Result<()> {
        bpf::delete(self.sockets.as_fd(), &queue.to_ne_bytes(), size_of::<u32>())
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

    /// The program and its maps; which of them are there.
    pub(super) fn parts(&self, fds: &mut Collected) -> Result<ProgramParts, PartsError> {
        fds.add(&self.program)?;
        fds.add(&self.sockets)?;
        for optional in [&self.macs, &self.cutting].into_iter().flatten() {
            fds.add(optional)?;
        }
        Ok(ProgramParts { macs: self.macs.is_some(), cutting: self.cutting.is_some() })
    }

    /// What [`Self::parts`] took apart; what the map of addresses holds is asked of the kernel.
    pub(super) fn from_parts(
        parts: &ProgramParts,
        fds: &mut Remaining,
    ) -> Result<Self, PartsError> {
        let (program, sockets) = (fds.next()?, fds.next()?);
        let (macs, cutting) = (fds.next_if(parts.macs)?, fds.next_if(parts.cutting)?);
        let keys = macs.as_ref().map(|macs| bpf::keys(macs.as_fd(), MAC_VALUE, MACS_MAX));
        let keys = keys.transpose().map_err(|error| {
            let what = "read the map of addresses of an XDP program";
            PartsError::System { what, error }
        })?;
        let known = keys.unwrap_or_default().into_iter().map(MacAddr).collect();
        Ok(Self { program, cutting, sockets, macs, known })
    }
}

fn key(mac: MacAddr) -> [u8; MAC_KEY] {
    mac.0
}

#[cfg(test)]
mod tests {
    #![expect(clippy::arithmetic_side_effects, reason = "tests")]

    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use packet::MacAddr;

    use super::super::testbed::Space;
    use super::super::{AfXdpError, AfXdpSettings, Steer, Umems, open, spare};
    use super::{
        Cuts, EXIT, JUMP_IF_GREATER, JUMP_IF_NOT, MAC_KEY, MAC_VALUE, MACS_MAX, Marks, Program,
        assemble,
    };
    use crate::sys::bpf;

    /// Where the jump at `at` goes.
    fn target(program: &[u64], at: usize) -> usize {
        let bytes = program[at].to_ne_bytes();
        at + 1 + usize::try_from(i16::from_ne_bytes([bytes[2], bytes[3]])).unwrap()
    }

    #[test]
    fn a_program_that_comes_back_knows_no_station_and_comes_only_where_any_is_kept() {
        let mut program = Program::load(1, Steer::Mac, true).unwrap();
        assert!(program.cutting.is_some(), "this kernel lets no program see how frames are cut");
        program.set_macs(&[MacAddr([2, 0, 0, 0, 0, 7])]).unwrap();
        spare::give_back(&program);
        assert!(spare::take(Steer::Mac).is_none());
        assert!(spare::keep_spares() > 0);
        spare::give_back(&program);
        let again = spare::take(Steer::Mac).unwrap();
        let macs = again.macs.as_ref().unwrap().as_fd();
        let left: Vec<[u8; MAC_KEY]> = bpf::keys(macs, MAC_VALUE, MACS_MAX).unwrap();
        assert!(left.is_empty(), "{left:?}");
        // So does that of an interface that cannot be opened.
        spare::give_back(&again);
        let space = Space::new("spare");
        let one = ["numrxqueues", "1", "numtxqueues", "1"];
        let pair = [&["link", "add", "a0"][..], &one, &["type", "veth", "peer", "b0"], &one];
        space.ip(&pair.concat());
        let settings = AfXdpSettings { patience: Duration::ZERO, ..space.settings("a0") };
        let open = |settings: &AfXdpSettings| open(settings, &Umems::default(), &[Arc::default()]);
        let before = open(&settings).unwrap();
        let _queue = before.control.sockets.clone();
        drop(before);
        let settings = AfXdpSettings { steer: Steer::Mac, ..settings };
        let (start, mut refused) = (Instant::now(), 0);
        while refused < 3 {
            // A program that another test starts holds our fds for a moment, too.
            let error = open(&settings).unwrap_err();
            refused += i32::from(matches!(error, AfXdpError::Busy { .. }));
            assert!(start.elapsed() < Duration::from_secs(5), "{error}");
        }
        assert!(spare::take(Steer::Mac).is_some());
        assert!(spare::take(Steer::Mac).is_none(), "once");
    }

    #[test]
    fn jumps_go_where_they_say() {
        let program = assemble(3, Some(4), Marks::None);
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

    /// With marks the way to the kernel is behind all else.
    #[test]
    fn a_frame_without_room_for_a_mark_goes_to_the_kernel() {
        let cuts = Cuts {
            context: 1,
            cast: 2,
            start: 24,
            bytes: 48,
            info: 3,
            info_bytes: 320,
            kind: 24,
            size: 4,
        };
        for (macs, marks) in [
            (None, Marks::Whole),
            (None, Marks::Cut(cuts)),
            (Some(4), Marks::Whole),
            (Some(4), Marks::Cut(cuts)),
        ] {
            let program = assemble(3, macs, marks);
            let codes: Vec<u8> = program.iter().map(|op| op.to_ne_bytes()[0]).collect();
            let pass = codes.len() - 2;
            let jumps = |code: u8| {
                let at = (0..codes.len()).rfind(|at| codes[*at] == code).unwrap();
                target(&program, at)
            };
            assert_eq!((jumps(JUMP_IF_NOT), jumps(JUMP_IF_GREATER)), (pass, pass));
            let marked = codes.len() - 8;
            assert_eq!(codes[marked - 1], super::STORE_32);
        }
    }
}
