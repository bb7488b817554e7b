//! The hostile guest behind a vIOMMU.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Result, ensure};
use rustix::net::{RecvFlags, recv};
use testkit::request::{IOTLB_MSG, SET_BACKEND_REQ_FD, SET_PROTOCOL_FEATURES, SET_VRING_ENABLE};
use testkit::{Guest, Remote};

/// `VIRTIO_F_ACCESS_PLATFORM`, and the bit that protocol features hang on.
const FEATURES: u64 = 1 << 33 | 1 << 30;
/// Multiqueue, acknowledgements, requests of the back end.
const PROTOCOL: u64 = 1 | 1 << 3 | 1 << 5;
const PAGE: u64 = 4096;
/// Where nothing of the guest is.
const FAR: u64 = 1 << 40;
/// How long it waits for a question.
const PATIENCE: Duration = Duration::from_millis(20);
/// Of a message: for reading and writing, a translation; a translation taken back.
const UPDATE: u64 = 3 | 2 << 8;
const INVALIDATE: u64 = 3 << 8;

/// What it is behind a vIOMMU.
#[derive(Debug)]
pub(super) struct Behind {
    /// Where it is asked for translations.
    questions: UnixStream,
}

impl Behind {
    /// Sets everything up; its rings are translated, its buffers are not.
    pub(super) fn set_up(remote: &mut Remote) -> Result<Self> {
        let (questions, theirs) = UnixStream::pair()?;
        questions.set_read_timeout(Some(PATIENCE))?;
        let front_end = &mut remote.front_end;
        front_end.send(SET_PROTOCOL_FEATURES, &PROTOCOL.to_le_bytes(), &[])?;
        front_end.send(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()])?;
        remote.introduce(FEATURES)?;
        remote.share_memory()?;
        for ring in [0u32, 1] {
            remote.set_ring(ring)?;
            let enable = [ring, 1].map(u32::to_le_bytes).concat();
            remote.front_end.send(SET_VRING_ENABLE, &enable, &[])?;
        }
        let rings = [0, Guest::BUFFERS, 0, UPDATE];
        let known = remote.front_end.acknowledged(IOTLB_MSG, &body(rings), &[])?;
        ensure!(known, "its translation was refused");
        Ok(Self { questions })
    }

    /// Translations that nobody asked for, and each taken back.
    pub(super) fn map_and_unmap(&self, remote: &mut Remote, count: u64) -> Result<()> {
        for number in 0..count {
            let iova = FAR.saturating_add(PAGE.saturating_mul(number));
            for message in [[iova, PAGE, 0, UPDATE], [iova, PAGE, 0, INVALIDATE]] {
                remote.front_end.send(IOTLB_MSG, &body(message), &[])?;
            }
        }
        Ok(())
    }

    /// Frames whose place is asked for, told when that has come, and taken back at once: so does a
    /// busy guest that maps each buffer anew.
    pub(super) fn ask_again(&self, remote: &mut Remote, count: u64) -> Result<()> {
        let (at, bytes) = (Guest::BUFFERS, Guest::BYTES.saturating_sub(Guest::BUFFERS));
        for _ in 0..count {
            let _ = remote.guest.send(&[0xff; 60], 1)?;
            let _ = remote.guest.flush();
            remote.guest.kick();
            // None may come: it is made to wait.
            let _ = recv(&self.questions, &mut [0; 4096][..], RecvFlags::empty());
            let front_end = &mut remote.front_end;
            front_end.send(IOTLB_MSG, &body([at, bytes, at, UPDATE]), &[])?;
            // Until it is, the next frame is not asked for.
            let _ = front_end.acknowledged(IOTLB_MSG, &body([at, bytes, 0, INVALIDATE]), &[])?;
        }
        Ok(())
    }
}

fn body(words: [u64; 4]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}
