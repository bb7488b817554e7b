//! What large frames cost, segment by segment: to cut one for who takes none, and to make one of
//! the segments of a flow.

use anyhow::{Context, ensure};
use packet::{CUT_HEADER_MAX, Checksum, Cut};
use port::{
    Adapter, Coalescer, DropReason, Finish, FrameBuf, Gso, Offload, OffloadSet, QueueCounters, Way,
};
use virtq::mem::{Pool, SegSpan};

/// Bytes of the payload of a segment.
const SEGMENT: u16 = 1448;
const SLOT_BYTES: u32 = 2048;
/// Where the TCP header begins: no tag, IPv4 without options.
const TCP: u16 = 34;

/// The headers of a TCP segment with a timestamp, as long as `payload` says; its checksum field
/// holds the sum of the pseudo header.
fn header(payload: usize) -> anyhow::Result<Vec<u8>> {
    let segment = u16::try_from(payload.saturating_add(32))?;
    let mut header = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    header.extend([0x45, 0]);
    header.extend(segment.saturating_add(20).to_be_bytes());
    header.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    header.extend([0x30, 0x39, 0x14, 0x51, 0, 0, 0, 9, 0, 0, 0, 1, 0x80, 0x10, 1, 0]);
    let mut pseudo = Checksum::default();
    pseudo.add(&[10, 0, 0, 1, 10, 0, 0, 2, 0, 6]);
    pseudo.add_u16(segment);
    header.extend(pseudo.sum().to_be_bytes());
    header.extend([0, 0, 1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2]);
    Ok(header)
}

/// A large frame with that many segments, and what its sender left to others.
fn large(segments: u16) -> anyhow::Result<(Vec<u8>, Offload)> {
    let payload = usize::from(segments).saturating_mul(usize::from(SEGMENT));
    let mut frame = header(payload)?;
    let hdr_len = u16::try_from(frame.len())?;
    frame.extend((0..=u8::MAX).cycle().take(payload));
    let offload = Offload {
        needs_csum: true,
        gso: Gso::TcpV4,
        gso_size: SEGMENT,
        hdr_len,
        csum_start: TCP,
        csum_offset: 16,
        ..Offload::default()
    };
    Ok((frame, offload))
}

/// A large TCP frame, and a guest that takes neither segmentation nor checksums.
#[derive(Debug)]
pub struct Segments {
    source: Pool,
    span: SegSpan,
    offload: Offload,
    frames: FrameBuf,
    adapter: Adapter,
    sink: Pool,
    counters: QueueCounters,
}

impl Segments {
    /// A frame of `count` segments: at most 45.
    ///
    /// # Errors
    ///
    /// If memory cannot be mapped, or there are too many segments for a frame.
    pub fn new(count: u16) -> anyhow::Result<Self> {
        let (bytes, offload) = large(count)?;
        let mut source = Pool::new(1, 1 << 16)?;
        let place = source.slot_mut(0).and_then(|slot| slot.get_mut(..bytes.len()));
        place.context("no room for the frame")?.copy_from_slice(&bytes);
        Ok(Self {
            source,
            span: Pool::span(0, 0, u32::try_from(bytes.len())?),
            offload,
            frames: FrameBuf::default(),
            adapter: Adapter::default(),
            sink: Pool::new(u32::from(count), SLOT_BYTES)?,
            counters: QueueCounters::default(),
        })
    }

    /// Cuts the frame, and writes its segments with their checksums; returns how many they were.
    #[inline(never)]
    pub fn serve(&mut self) -> u32 {
        let Self { source, span, offload, frames, adapter, sink, counters } = self;
        frames.clear();
        let Some(frame) = frames.slot() else { return 0 };
        if !frame.fill(source.store().reader(*span), *span, *offload) {
            return 0;
        }
        frames.keep();
        let takes = OffloadSet { csum: true, ..OffloadSet::NONE };
        let way = Way { takes, lost: DropReason::PortDown, counters: &counters.egress };
        let mut slot = 0u32;
        let batch = frames.batch(source.store(), None);
        let sent = adapter.send(&batch, &[0], &way, |batch, picked| {
            for index in picked {
                let frame = batch.frames().get(usize::from(*index));
                let writer = sink.writer(slot);
                if frame.is_some_and(|frame| Finish::write(frame, batch, writer)) {
                    slot = slot.wrapping_add(1);
                }
            }
            Ok(())
        });
        if sent.is_ok() { slot } else { 0 }
    }
}

/// The segments of a flow with their checksums, as an uplink delivers them, and a guest that takes
/// large frames.
#[derive(Debug)]
pub struct Merges {
    source: Pool,
    frames: FrameBuf,
    picked: Vec<u16>,
    coalescer: Coalescer,
    counters: QueueCounters,
}

impl Merges {
    /// A burst of `count` segments.
    ///
    /// # Errors
    ///
    /// If memory cannot be mapped, or there are too many segments for a frame.
    pub fn new(count: u16) -> anyhow::Result<Self> {
        let (bytes, _) = large(count)?;
        let head = bytes.get(..CUT_HEADER_MAX).context("no segment")?;
        let len = u32::try_from(bytes.len())?;
        let cut = Cut::new(head, len, SEGMENT).map_err(|error| anyhow::anyhow!("{error:?}"))?;
        let mut source = Pool::new(u32::from(count), SLOT_BYTES)?;
        let mut frames = FrameBuf::default();
        for index in 0..cut.count() {
            let range = cut.range(index);
            let payload = usize::try_from(range.start)?..usize::try_from(range.end)?;
            let payload = bytes.get(payload).context("no payload")?;
            let mut sum = Checksum::default();
            sum.add(payload);
            let segment = [cut.header(index, sum).bytes(), payload].concat();
            let place = source.slot_mut(index).and_then(|slot| slot.get_mut(..segment.len()));
            place.context("no room for a segment")?.copy_from_slice(&segment);
        }
        let segment = u32::from(SEGMENT).saturating_add(cut.header_len());
        for index in 0..cut.count() {
            let span = Pool::span(index, 0, segment);
            let frame = frames.slot().context("too many segments for a burst")?;
            ensure!(frame.fill(source.store().reader(span), span, Offload::default()), "no frame");
            frames.keep();
        }
        let (coalescer, counters) = (Coalescer::default(), QueueCounters::default());
        Ok(Self { source, frames, picked: (0..count).collect(), coalescer, counters })
    }

    /// Puts the segments together; returns how many frames are left.
    #[inline(never)]
    pub fn serve(&mut self) -> usize {
        let Self { source, frames, picked, coalescer, counters } = self;
        let takes = OffloadSet { csum: true, tso4: true, ..OffloadSet::NONE };
        let batch = frames.batch(source.store(), None);
        let mut left = 0;
        let _ = coalescer.send(&batch, picked, (takes, &counters.egress), |_, picked| {
            left = picked.len();
            Ok(())
        });
        left
    }
}

#[cfg(test)]
mod tests {
    use packet::checksum;

    use super::{Merges, Segments};

    #[test]
    fn a_frame_is_cut_into_segments_with_right_checksums() {
        let mut segments = Segments::new(32).unwrap();
        assert_eq!(segments.serve(), 32);
        for index in 0..32 {
            let bytes = segments.sink.slot_mut(index).unwrap();
            let mut pseudo = vec![0, 6, 5, 200];
            assert_eq!(1448 + 32, 5 * 256 + 200);
            pseudo.extend(&bytes[26..34]);
            pseudo.extend(&bytes[34..66 + 1448]);
            assert_eq!((checksum(&bytes[14..34]), checksum(&pseudo)), (0, 0), "segment {index}");
        }
    }

    #[test]
    fn segments_are_put_together() {
        for count in [2, 32, 45] {
            assert_eq!(Merges::new(count).unwrap().serve(), 1, "{count}");
        }
    }
}
