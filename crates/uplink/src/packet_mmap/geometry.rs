//! Sizes of rings: what may be asked for, and what is made of it.

use crate::sys::packet::RingRequest;
use crate::vnet::HEADER as VNET;

use super::{PacketMmapError, PacketMmapSettings, QUEUES_MAX};

/// Blocks of a receive ring: one is filled while another is read.
pub(super) const BLOCKS_MIN: u32 = 2;
pub(super) const BLOCKS_MAX: u32 = 65_536;
/// The most bytes of a receive ring.
pub(super) const RING_BYTES_MAX: u32 = 1 << 30;
pub(super) const RETIRE_MS_MAX: u32 = 1000;
/// A block of at least so many bytes holds every frame that the kernel has, 64 KiB and its headers.
const WHOLE_FRAMES: u32 = 66 * 1024;

/// Frames of a transmit ring.
pub(super) const SLOTS: u32 = 256;
/// The least and the most bytes of a frame of the transmit ring. What is larger is sent by itself.
const SLOT_MIN: u32 = 2048;
const SLOT_MAX: u32 = 16 * 1024;
/// What stands before the data of a frame to send (`struct tpacket3_hdr`).
pub(super) const SLOT_HEADER: u32 = 48;
/// Bytes that an MTU does not count: Ethernet header and two tags.
const LINK_HEADER: u32 = 14 + 8;

/// Whether a ring can be what `settings` say.
pub(super) fn check(settings: &PacketMmapSettings) -> Result<(), PacketMmapError> {
    let PacketMmapSettings { queues, block_size: size, blocks, retire_ms, .. } = *settings;
    if queues == 0 || queues > QUEUES_MAX {
        return Err(PacketMmapError::Queues(queues));
    }
    let page = page_size();
    if size == 0 || !size.is_multiple_of(page) {
        let hint = size.checked_next_power_of_two().unwrap_or(RING_BYTES_MAX / BLOCKS_MIN);
        let hint = hint.clamp(page.max(1), RING_BYTES_MAX / BLOCKS_MIN);
        return Err(PacketMmapError::BlockSize { size, page, hint });
    }
    if !(BLOCKS_MIN..=BLOCKS_MAX).contains(&blocks) {
        return Err(PacketMmapError::Blocks(blocks));
    }
    if size.checked_mul(blocks).is_none_or(|bytes| bytes > RING_BYTES_MAX) {
        return Err(PacketMmapError::Ring { size, blocks });
    }
    if retire_ms == 0 || retire_ms > RETIRE_MS_MAX {
        return Err(PacketMmapError::Retire(retire_ms));
    }
    if size < WHOLE_FRAMES {
        let interface = settings.ifname.as_str();
        tracing::warn!(interface, "blocks of {size} bytes do not hold the largest frames");
    }
    Ok(())
}

fn page_size() -> u32 {
    u32::try_from(rustix::param::page_size()).unwrap_or(4096)
}

/// The receive ring.
pub(super) fn receive(settings: &PacketMmapSettings) -> RingRequest {
    let PacketMmapSettings { block_size, blocks, retire_ms, .. } = *settings;
    // The kernel packs frames as they come; it only wants these numbers to agree.
    let frames = block_size.saturating_div(SLOT_MIN).saturating_mul(blocks);
    RingRequest {
        block_size,
        blocks,
        frame_size: SLOT_MIN,
        frames,
        retire_ms,
        ..RingRequest::default()
    }
}

/// The transmit ring of an interface with that MTU: ordinary frames fit into its slots.
pub(super) fn transmit(mtu: u32) -> RingRequest {
    #[expect(clippy::cast_possible_truncation, reason = "12 fits")]
    const FIXED: u32 = SLOT_HEADER + VNET as u32 + LINK_HEADER;
    let slot = mtu.saturating_add(FIXED).clamp(SLOT_MIN, SLOT_MAX).next_power_of_two();
    // A block is a whole number of pages and of slots: slots follow each other without gaps.
    let block_size = slot.max(page_size());
    let slots_per_block = block_size.checked_div(slot).unwrap_or(1);
    RingRequest {
        block_size,
        blocks: SLOTS.checked_div(slots_per_block).unwrap_or(1).max(1),
        frame_size: slot,
        frames: SLOTS.max(slots_per_block),
        ..RingRequest::default()
    }
}

#[cfg(test)]
mod tests {
    use super::{PacketMmapSettings, check, receive, transmit};

    fn message(change: impl FnOnce(&mut PacketMmapSettings)) -> String {
        let mut settings = PacketMmapSettings::default();
        assert!(check(&settings).is_ok());
        change(&mut settings);
        check(&settings).map_or_else(|error| error.to_string(), |()| "fine".to_owned())
    }

    #[test]
    fn wrong_sizes_are_named_with_their_limit() {
        assert_eq!(message(|s| s.queues = 0), "queues 0 must be 1 to 256");
        assert_eq!(message(|s| s.queues = 257), "queues 257 must be 1 to 256");
        assert_eq!(
            message(|s| s.block_size = 100_000),
            "block-size 100000 must be a multiple of the page size, 4096 (try 131072)"
        );
        assert_eq!(
            message(|s| s.block_size = 0),
            "block-size 0 must be a multiple of the page size, 4096 (try 4096)"
        );
        assert_eq!(
            message(|s| s.block_size = u32::MAX),
            "block-size 4294967295 must be a multiple of the page size, 4096 (try 536870912)"
        );
        assert_eq!(message(|s| s.blocks = 1), "blocks 1 must be 2 to 65536");
        assert_eq!(message(|s| s.blocks = 65_537), "blocks 65537 must be 2 to 65536");
        assert_eq!(
            message(|s| (s.block_size, s.blocks) = (1 << 20, 1025)),
            "block-size 1048576 times blocks 1025 must be at most 1073741824 bytes"
        );
        assert_eq!(message(|s| s.retire_ms = 0), "retire-ms 0 must be 1 to 1000");
        assert_eq!(message(|s| s.retire_ms = 1001), "retire-ms 1001 must be 1 to 1000");
        assert_eq!(message(|s| (s.block_size, s.blocks) = (1 << 20, 1024)), "fine");
    }

    #[test]
    fn rings_are_what_the_kernel_takes() {
        let ring = receive(&PacketMmapSettings::default());
        assert_eq!(ring.frames, ring.block_size / ring.frame_size * ring.blocks);
        for (mtu, slot) in [(68, 2048), (1500, 2048), (2000, 4096), (9000, 16_384)] {
            let ring = transmit(mtu);
            assert_eq!(ring.frame_size, slot, "MTU {mtu}");
            assert!(ring.block_size.is_multiple_of(4096) && ring.block_size.is_multiple_of(slot));
            assert_eq!(ring.frames, ring.block_size / slot * ring.blocks);
            assert_eq!(ring.frames, 256);
        }
        assert_eq!(transmit(65_535).frame_size, 16_384);
        assert_eq!(transmit(u32::MAX).frame_size, 16_384);
    }
}
