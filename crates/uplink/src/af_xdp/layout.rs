//! How a UMEM is divided, and where a descriptor of the kernel lies in it.
//!
//! ```text
//!  place 0: one queue's                   place 1: another queue's, of whichever interface
//!  ┌ frames that arrive ┬ frames to send ┬─────────────
//!  │ RX_FRAMES chunks   │ TX_FRAMES      │ ...
//!  └────────────────────┴────────────────┴─────────────
//! ```

use crate::sys::xdp::Desc;

/// Bytes of a chunk: room for a frame of 1500 bytes behind the kernel's 256.
pub(super) const CHUNK: u32 = 2048;
/// Chunks of a queue for frames that arrive, all in the fill ring when nothing is on its way: more
/// than what one TCP connection of a local sender has on its way (4 MiB, `tcp_wmem`), so that
/// it loses nothing while the worker is kept from its CPU.
pub(super) const RX_FRAMES: u32 = 4096;
/// Chunks of a queue for frames to send.
pub(super) const TX_FRAMES: u32 = 1024;
/// Where a frame to send begins in its chunk: its metadata stands before it.
pub(super) const TX_SKIP: u32 = 64;
/// Bytes of a frame in a chunk to send.
pub(super) const TX_ROOM: u32 = CHUNK - TX_SKIP;
/// The most chunks of one frame to send: those of the kernel's socket buffers.
pub(super) const PARTS_MAX: u32 = 18;
/// The most chunks of one frame that arrives: 64 KiB of payload and all headers.
pub(super) const RX_PARTS_MAX: u32 = 40;

/// Bytes of a queue's chunks.
const QUEUE_BYTES: u64 = (RX_FRAMES as u64 + TX_FRAMES as u64) * CHUNK as u64;

/// Bytes of a UMEM for `queues` queues.
pub(super) fn umem_bytes(queues: u16) -> u64 {
    QUEUE_BYTES.saturating_mul(u64::from(queues))
}

/// Chunks of one way of one queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Area {
    /// Where they begin, in bytes from the start of the UMEM.
    base: u64,
    /// How many there are.
    chunks: u32,
}

/// Where a descriptor points to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    /// The chunk.
    pub(super) chunk: u32,
    /// Bytes before the frame in it.
    pub(super) skip: u32,
}

impl Area {
    /// The chunks of a place for frames that arrive.
    pub(super) fn receive(place: u32) -> Self {
        Self { base: QUEUE_BYTES.saturating_mul(u64::from(place)), chunks: RX_FRAMES }
    }

    /// The chunks of a place for frames to send.
    pub(super) fn transmit(place: u32) -> Self {
        let behind = u64::from(RX_FRAMES).saturating_mul(u64::from(CHUNK));
        Self { base: Self::receive(place).base.saturating_add(behind), chunks: TX_FRAMES }
    }

    /// Where the area begins in the UMEM.
    pub(super) fn offset(&self) -> usize {
        usize::try_from(self.base).unwrap_or(usize::MAX)
    }

    /// How many chunks there are.
    pub(super) fn chunks(&self) -> u32 {
        self.chunks
    }

    /// The address of byte `skip` of a chunk.
    #[inline(always)]
    pub(super) fn address(&self, chunk: u32, skip: u32) -> u64 {
        let offset = u64::from(chunk).wrapping_mul(u64::from(CHUNK));
        self.base.wrapping_add(offset).wrapping_add(u64::from(skip))
    }

    /// The chunk that an address is in; none if it is not of this area.
    #[inline(always)]
    pub(super) fn chunk(&self, addr: u64) -> Option<u32> {
        let chunk = addr.checked_sub(self.base)? >> CHUNK.trailing_zeros();
        u32::try_from(chunk).ok().filter(|chunk| *chunk < self.chunks)
    }

    /// Where a frame, or a part of one, lies; none if it is not within one chunk of this area.
    #[inline(always)]
    pub(super) fn locate(&self, desc: Desc) -> Option<Place> {
        let chunk = self.chunk(desc.addr)?;
        let skip = u32::try_from(desc.addr & u64::from(CHUNK - 1)).ok()?;
        let fits = CHUNK.checked_sub(skip).is_some_and(|room| room >= desc.len);
        fits.then_some(Place { chunk, skip })
    }
}

const _: () = assert!(CHUNK.is_power_of_two());
const _: () = assert!(RX_FRAMES.is_power_of_two() && TX_FRAMES.is_power_of_two());

#[cfg(test)]
mod tests {
    use super::{Area, CHUNK, Place, RX_FRAMES, TX_FRAMES, umem_bytes};
    use crate::sys::xdp::Desc;

    fn at(addr: u64, len: u32) -> Desc {
        Desc { addr, len, options: 0 }
    }

    #[test]
    fn areas_follow_each_other_and_fill_the_umem() {
        let mut end = 0;
        for queue in 0..4 {
            for (area, chunks) in
                [(Area::receive(queue), RX_FRAMES), (Area::transmit(queue), TX_FRAMES)]
            {
                assert_eq!((area.address(0, 0), area.chunks()), (end, chunks));
                end = area.address(chunks, 0);
                for chunk in [0, 1, chunks - 1] {
                    assert_eq!(area.chunk(area.address(chunk, 7)), Some(chunk));
                }
                assert_eq!(area.chunk(end), None);
            }
        }
        assert_eq!(end, umem_bytes(4));
    }

    #[test]
    fn what_is_not_within_one_chunk_of_the_area_is_refused() {
        let area = Area::receive(1);
        let base = area.address(0, 0);
        let last = area.address(RX_FRAMES - 1, 0);
        assert_eq!(area.locate(at(base + 256, 1792)), Some(Place { chunk: 0, skip: 256 }));
        let place = Place { chunk: RX_FRAMES - 1, skip: CHUNK - 1 };
        assert_eq!(area.locate(at(last + 2047, 1)), Some(place));
        for (addr, len) in [
            (base - 1, 1),
            (0, 60),
            (base + 256, 1793),
            (last + 2047, 2),
            (last + 2048, 0),
            (base, u32::MAX),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
        ] {
            assert_eq!(area.locate(at(addr, len)), None, "{addr} {len}");
        }
    }
}
