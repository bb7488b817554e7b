//! Front ends that lie, and one that adds and removes memory: messages by hand.

use std::io::{IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::plan::Plan;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
/// Requests of the protocol, and some beyond.
const REQUESTS: u64 = 50;
const REGION: u64 = 1 << 21;
const SET_FEATURES: u32 = 2;
const SET_OWNER: u32 = 3;
const SET_PROTOCOL_FEATURES: u32 = 16;
const ADD_MEM_REG: u32 = 37;
const REM_MEM_REG: u32 = 38;
/// `VERSION_1`, and the bit that there are protocol features.
const FEATURES: u64 = 1 << 32 | 1 << 30;
/// `REPLY_ACK` and `CONFIGURE_MEM_SLOTS`.
const PROTOCOL_FEATURES: u64 = 1 << 3 | 1 << 15;

/// Says nonsense until the switch has enough. That it is sent away is what it deserves.
pub(super) fn lie(socket: &Path, seed: u64) {
    let Ok(stream) = UnixStream::connect(socket) else { return };
    let _ = stream.set_read_timeout(Some(Duration::from_millis(20)));
    let _ = stream.set_write_timeout(Some(Duration::from_millis(200)));
    let mut plan = Plan::new(seed);
    for _ in 0..plan.below(30) {
        let request = u32::try_from(plan.below(REQUESTS)).unwrap_or(0);
        // Most sizes are plausible, some are not.
        let size =
            if plan.below(10) == 0 { plan.below(1 << 33) } else { plan.below(8).saturating_mul(8) };
        let mut body = Vec::new();
        for _ in 0..size.min(512).div_ceil(8) {
            let word = if plan.below(2) == 0 { plan.number() } else { plan.below(4) };
            body.extend_from_slice(&word.to_le_bytes());
        }
        let flags = if plan.below(8) == 0 { plan.number() } else { VERSION.into() };
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&request.to_le_bytes());
        for word in [flags, size] {
            let low = u32::try_from(word & u64::from(u32::MAX)).unwrap_or(0);
            bytes.extend_from_slice(&low.to_le_bytes());
        }
        bytes.extend_from_slice(&body);
        let fds: Vec<OwnedFd> = (0..plan.below(3)).filter_map(|_| some_fd(&mut plan)).collect();
        if send(&stream, &bytes, &fds).is_err() {
            return;
        }
        let _ = (&stream).read(&mut [0; 512]);
    }
}

fn some_fd(plan: &mut Plan) -> Option<OwnedFd> {
    match plan.below(3) {
        0 => eventfd(0, EventfdFlags::CLOEXEC).ok(),
        1 => memory(REGION).ok(),
        _ => std::fs::File::open("/dev/null").ok().map(OwnedFd::from),
    }
}

/// Adds regions and removes them again, in an order of the seed; every one is accepted.
pub(super) fn hotplug(socket: &Path, seed: u64) -> Result<()> {
    // Somebody else may be connected: then this one is sent away at once, which is right.
    let Ok(stream) = UnixStream::connect(socket) else { return Ok(()) };
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    let mut plan = Plan::new(seed);
    let mut front = Front { stream };
    let begun = front.say(SET_OWNER, &[]).and_then(|()| {
        front.say(SET_FEATURES, &FEATURES.to_le_bytes())?;
        front.say(SET_PROTOCOL_FEATURES, &PROTOCOL_FEATURES.to_le_bytes())
    });
    if begun.is_err() {
        return Ok(());
    }
    let mut there: Vec<u64> = Vec::new();
    for slot in 0..8u64 {
        match front.region(ADD_MEM_REG, slot, Some(&memory(REGION)?)) {
            Ok(accepted) => anyhow::ensure!(accepted, "region {slot} was refused"),
            // Sent away, as the second one at the port.
            Err(_) if slot == 0 => return Ok(()),
            Err(error) => return Err(error),
        }
        there.push(slot);
        if plan.below(3) == 0 {
            let at = usize::try_from(plan.below(there.len() as u64)).unwrap_or(0);
            let gone = there.swap_remove(at);
            anyhow::ensure!(front.region(REM_MEM_REG, gone, None)?, "region {gone} stays");
        }
    }
    Ok(())
}

struct Front {
    stream: UnixStream,
}

impl Front {
    fn say(&mut self, request: u32, body: &[u8]) -> Result<()> {
        let bytes = [&words([request, VERSION, u32::try_from(body.len())?])[..], body].concat();
        send(&self.stream, &bytes, &[])
    }

    /// Whether the switch takes it.
    fn region(&mut self, request: u32, slot: u64, file: Option<&OwnedFd>) -> Result<bool> {
        let guest = slot.saturating_add(1) << 32;
        let body = [0, guest, REGION, guest << 4, 0].map(u64::to_le_bytes).concat();
        let head = words([request, VERSION | NEED_REPLY, u32::try_from(body.len())?]);
        let file = file.map(|fd| fd.try_clone()).transpose()?;
        send(&self.stream, &[&head[..], &body].concat(), file.as_slice())?;
        let mut reply = [0; 20];
        self.stream.read_exact(&mut reply).context("no acknowledgement")?;
        Ok(reply.iter().skip(12).all(|byte| *byte == 0))
    }
}

fn words<const N: usize>(words: [u32; N]) -> Vec<u8> {
    words.map(u32::to_le_bytes).concat()
}

fn memory(bytes: u64) -> Result<OwnedFd> {
    let fd = memfd_create("soak", MemfdFlags::CLOEXEC)?;
    ftruncate(&fd, bytes)?;
    Ok(fd)
}

fn send(stream: &UnixStream, bytes: &[u8], fds: &[OwnedFd]) -> Result<()> {
    let borrowed: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() {
        let _ = control.push(SendAncillaryMessage::ScmRights(&borrowed));
    }
    let _ = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
