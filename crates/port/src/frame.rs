//! One frame on its way: a private head, and where the rest of it is.
//!
//! ```text
//!  ┌ room ┬──────── head: private copy ─────────┐┌──── body: still in the sender's memory ────┐
//!  │  16  │ Ethernet, tags, IP, L4 … ≤ 128 B     ││ copied once, by the egress                 │
//!  └──────┴──────────────────────────────────────┘└────────────────────────────────────────────┘
//! ```
//!
//! **Trust.** The head was copied once and is used from the copy: what was checked is what is
//! sent. The body stays hostile and is never interpreted.

use std::ops::Range;

use virtq::mem::{ReadPiece, Reader, SegSpan};

use crate::Offload;

/// The most frames in a batch.
pub const BURST_MAX: usize = virtq::swept!("BURST", 64);
/// The most bytes of a batch, if it has more than one frame: two of the largest. A guest's burst of
/// large frames keeps a worker from others for about as long as one of 64 frames of 1500 bytes.
pub const BURST_BYTES: u64 = 144 * 1024;
/// The most bytes of a frame that are copied into its private head.
pub const HEAD_MAX: usize = 128;
/// Spare bytes before the head, for tags that are pushed on the way.
pub const HEAD_ROOM: usize = 16;

/// Bytes of an Ethernet header.
const ETHERNET: u32 = 14;
/// Bytes of the two addresses that stand before a tag.
const ADDRESSES: usize = 12;
const TAG: usize = 4;
/// Bytes of an Ethernet header, without and with a tag.
const HEADER: usize = 14;
const TAGGED_HEADER: usize = 18;
/// `EtherType` of an 802.1Q tag.
const TPID: [u8; 2] = [0x81, 0x00];
/// That of an 802.1ad service tag.
const SERVICE_TPID: [u8; 2] = [0x88, 0xa8];

/// One frame of a [`crate::Batch`].
#[derive(Debug, Clone)]
pub struct Frame {
    bytes: [u8; HEAD_ROOM + HEAD_MAX],
    start: u16,
    /// Bytes of the head, from `start` on.
    head_len: u16,
    /// Where the bytes after the head are, in the batch's segment store. What the head holds of the
    /// payload stands before them there.
    pub body: SegSpan,
    /// What the sender left for others to do.
    pub offload: Offload,
}

impl Default for Frame {
    fn default() -> Self {
        Self {
            bytes: [0; HEAD_ROOM + HEAD_MAX],
            start: ROOM,
            head_len: 0,
            body: SegSpan::default(),
            offload: Offload::default(),
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "16 fits")]
const ROOM: u16 = HEAD_ROOM as u16;

#[expect(clippy::cast_possible_truncation, reason = "128 fits")]
const HEAD_MAX_U32: u32 = HEAD_MAX as u32;

impl Frame {
    /// Fills the frame: the head from `reader`, the body from what is left of `whole`, the span
    /// that `reader` was made from. Returns false if there are no 14 bytes of Ethernet header.
    #[inline(always)]
    pub fn fill(&mut self, mut reader: Reader<'_>, whole: SegSpan, offload: Offload) -> bool {
        let Some(space) = self.bytes.get_mut(HEAD_ROOM..) else { return false };
        let len = reader.remaining();
        // A constant length lets the compiler copy with a few wide moves instead of a call.
        let got = match space.split_first_chunk_mut::<64>() {
            Some((line, rest)) if (64..96).contains(&len) => {
                let got = reader.read(line);
                if len > 64 { got.saturating_add(reader.read(rest)) } else { got }
            }
            _ => reader.read(space),
        };
        let got16 = u16::try_from(got).unwrap_or(0);
        self.start = ROOM;
        self.head_len = got16;
        let taken = u32::from(got16);
        self.body =
            SegSpan { skip: whole.skip.wrapping_add(taken), len: len.wrapping_sub(taken), ..whole };
        self.offload = offload;
        got >= 14
    }

    /// As [`Self::fill`], of an ordinary frame in `piece` after `skip` bytes; the piece is segment
    /// `segment` of the batch's store.
    #[inline(always)]
    pub fn fill_piece(&mut self, piece: ReadPiece<'_>, skip: u32, segment: u32) -> bool {
        let Some(len) = piece.len_u32().checked_sub(skip) else { return false };
        // Frames without a body go the way without conditions.
        if len <= HEAD_MAX_U32 {
            return len >= ETHERNET && self.take_head(piece, (skip, len));
        }
        self.fill_long(piece, (skip, len), segment)
    }

    /// As [`Self::fill_piece`], of a frame with a body. Of its own, so that loops over short ones
    /// keep their registers.
    #[inline(never)]
    fn fill_long(&mut self, piece: ReadPiece<'_>, (skip, len): (u32, u32), segment: u32) -> bool {
        if !self.take_head(piece, (skip, HEAD_MAX_U32)) {
            return false;
        }
        self.body = SegSpan {
            first: segment,
            count: 1,
            skip: skip.wrapping_add(HEAD_MAX_U32),
            len: len.wrapping_sub(HEAD_MAX_U32),
        };
        true
    }

    /// Makes the frame the `len` bytes after `skip` in `piece`.
    #[inline(always)]
    fn take_head(&mut self, piece: ReadPiece<'_>, (skip, len): (u32, u32)) -> bool {
        let end = HEAD_ROOM.wrapping_add(len as usize);
        let Some(head) = self.bytes.get_mut(HEAD_ROOM..end) else { return false };
        if !piece.copy_to(skip, head) {
            return false;
        }
        self.start = ROOM;
        self.head_len = u16::try_from(len).unwrap_or(0);
        self.body = SegSpan::default();
        self.offload = Offload::default();
        true
    }

    /// Fills the frame from private bytes: frames that the switch originates itself, and tests.
    /// At most [`HEAD_MAX`] bytes are taken.
    pub fn fill_private(&mut self, data: &[u8]) {
        let len = data.len().min(HEAD_MAX);
        let target = self.bytes.get_mut(HEAD_ROOM..HEAD_ROOM.saturating_add(len));
        if let (Some(target), Some(data)) = (target, data.get(..len)) {
            target.copy_from_slice(data);
        }
        self.start = ROOM;
        self.head_len = u16::try_from(len).unwrap_or(0);
        self.body = SegSpan::default();
        self.offload = Offload::default();
    }

    /// Makes the offload intent what is true of the frame ([`Offload::checked`]). False if it
    /// contradicts the frame.
    #[inline]
    pub fn check_offload(&mut self) -> bool {
        let checked = self.offload.checked(self.head(), self.len());
        self.offload = checked.unwrap_or_default();
        checked.is_some()
    }

    /// Makes this a segment of `whole`: a header of `header_len` bytes, to be written by the caller
    /// into what is returned, then the bytes `payload` of the head of `whole`, then `body`. The
    /// header is not longer than what stood before the payload; nothing is returned otherwise.
    #[inline]
    pub fn begin_segment(
        &mut self,
        whole: &Self,
        (header_len, payload): (usize, Range<usize>),
        (body, offload): (SegSpan, Offload),
    ) -> &mut [u8] {
        let shape = whole.shape(header_len.saturating_add(payload.len()));
        let head = self.begin_header(shape, body, offload);
        let Some((header, rest)) = head.split_at_mut_checked(header_len) else { return &mut [] };
        if !rest.is_empty() {
            let Some(payload) = whole.head().get(payload) else { return &mut [] };
            rest.copy_from_slice(payload);
        }
        header
    }

    /// Where a head of `len` bytes begins that stands where that of this frame does, and its
    /// length.
    #[inline]
    pub(crate) fn shape(&self, len: usize) -> (u16, u16) {
        (self.start, u16::try_from(len).unwrap_or(u16::MAX))
    }

    /// Makes this a frame with a head of that shape, to be written by the caller into what is
    /// returned, before `body`. Nothing is returned if it does not fit.
    #[inline(always)]
    pub(crate) fn begin_header(
        &mut self,
        (start, len): (u16, u16),
        body: SegSpan,
        offload: Offload,
    ) -> &mut [u8] {
        let begin = usize::from(start);
        let place = self.bytes.get_mut(begin..begin.wrapping_add(usize::from(len)));
        let Some(head) = place else { return &mut [] };
        (self.start, self.head_len) = (start, len);
        (self.body, self.offload) = (body, offload);
        head
    }

    #[inline(always)]
    fn range(&self) -> Range<usize> {
        let start = usize::from(self.start);
        start..start.wrapping_add(usize::from(self.head_len))
    }

    /// The private head.
    #[inline(always)]
    pub fn head(&self) -> &[u8] {
        self.head_bytes().unwrap_or_default()
    }

    /// The private head, for hot loops: none instead of an empty one, so that nothing is selected.
    #[inline(always)]
    pub fn head_bytes(&self) -> Option<&[u8]> {
        self.bytes.get(self.range())
    }

    /// The private head, to edit.
    #[inline(always)]
    pub fn head_mut(&mut self) -> &mut [u8] {
        let range = self.range();
        self.bytes.get_mut(range).unwrap_or_default()
    }

    /// Bytes of the frame: head and body.
    #[inline(always)]
    #[expect(clippy::len_without_is_empty, reason = "a frame has at least its Ethernet header")]
    pub fn len(&self) -> u32 {
        u32::from(self.head_len).wrapping_add(self.body.len)
    }

    /// The outer 802.1Q tag's control information (priority, DEI, VLAN), if there is a tag.
    #[inline(always)]
    pub fn tag(&self) -> Option<u16> {
        match self.head().get(ADDRESSES..ADDRESSES.wrapping_add(TAG)) {
            Some([0x81, 0x00, hi, lo]) => Some(u16::from_be_bytes([*hi, *lo])),
            _ => None,
        }
    }

    /// Whether the frame ends before its Ethernet header does, tag included.
    #[inline(always)]
    pub fn is_runt(&self) -> bool {
        let head = self.head();
        head.len() < TAGGED_HEADER && is_cut_off(head)
    }

    /// Whether a tag stands behind the outer one, which is there if `outer` says so: an 802.1Q tag,
    /// or a service tag (802.1ad).
    #[inline]
    pub fn has_tag_behind(&self, outer: bool) -> bool {
        let at = if outer { ADDRESSES.wrapping_add(TAG) } else { ADDRESSES };
        let kind = self.head().get(at..at.wrapping_add(TPID.len()));
        kind == Some(&TPID) || kind == Some(&SERVICE_TPID)
    }

    /// Makes the outer tag what `tci` says: pushed, popped, rewritten or left alone. Returns
    /// false, and changes nothing, if there is no room for another tag.
    ///
    /// Whether the outer tag is there `now` is for the caller to know: once it was popped, the
    /// frame's bytes do not tell it from the next one.
    #[inline]
    pub fn set_tag(&mut self, now: bool, tci: Option<u16>) -> bool {
        match (now, tci) {
            (false, None) => true,
            (true, None) => self.close_gap(),
            (true, Some(tci)) => self.write_tag(tci),
            (false, Some(tci)) => self.open_gap() && self.write_tag(tci),
        }
    }

    fn write_tag(&mut self, tci: u16) -> bool {
        let [hi, lo] = tci.to_be_bytes();
        let Some(place) = self.head_mut().get_mut(ADDRESSES..ADDRESSES.wrapping_add(TAG)) else {
            return false;
        };
        place.copy_from_slice(&[TPID[0], TPID[1], hi, lo]);
        true
    }

    fn open_gap(&mut self) -> bool {
        let start = usize::from(self.start);
        let Some(new) = start.checked_sub(TAG) else { return false };
        self.bytes.copy_within(start..start.wrapping_add(ADDRESSES), new);
        self.start = self.start.wrapping_sub(4);
        self.head_len = self.head_len.wrapping_add(4);
        self.offload = self.offload.shifted(4);
        true
    }

    fn close_gap(&mut self) -> bool {
        let start = usize::from(self.start);
        self.bytes.copy_within(start..start.wrapping_add(ADDRESSES), start.wrapping_add(TAG));
        self.start = self.start.wrapping_add(4);
        self.head_len = self.head_len.saturating_sub(4);
        self.offload = self.offload.shifted(-4);
        true
    }
}

/// Whether all frames of a burst begin alike, without a branch for each of them.
#[derive(Debug, Clone, Copy, Default)]
pub struct Alike {
    /// Bits in which a frame began otherwise.
    bytes: u128,
    /// Differences of start and length, one above the other.
    shape: u32,
}

impl Alike {
    /// Where a head begins that no tag was pushed to or popped from, and the least bytes of one
    /// with a tag.
    const USUAL: u32 = 18 << 16 | 16;
    /// A start that is another one, or a length that is less.
    const UNUSUAL: u32 = 0x8000_ffff;

    /// Adds a frame to be compared with one that begins with `bytes` (little endian).
    #[inline(always)]
    pub fn add(&mut self, frame: &Frame, bytes: u128) {
        let Some(first) = frame.bytes.last_chunk::<HEAD_MAX>().and_then(|head| head.first_chunk())
        else {
            return;
        };
        self.bytes |= u128::from_le_bytes(*first) ^ bytes;
        let shape = u32::from(frame.head_len) << 16 | u32::from(frame.start);
        self.shape |= shape.wrapping_sub(Self::USUAL);
    }

    /// Whether all frames began with those bits that `mask` names, have the 18 bytes of a tagged
    /// header, and no tag was pushed or popped on the way. False is no proof of the contrary.
    #[inline(always)]
    pub fn holds(self, mask: u128) -> bool {
        self.bytes & mask == 0 && self.shape & Self::UNUSUAL == 0
    }
}

const _: () = assert!(HEAD_ROOM == 16 && TAGGED_HEADER == 18 && HEAD_ROOM + HEAD_MAX < 0x8000);

/// Of less than [`TAGGED_HEADER`] bytes: whether there should be more.
#[cold]
fn is_cut_off(head: &[u8]) -> bool {
    head.len() < HEADER || head.get(ADDRESSES..HEADER) == Some(&TPID)
}

#[cfg(test)]
mod tests {
    use super::{Alike, Frame};
    use crate::Offload;

    #[test]
    fn frames_are_alike_if_they_begin_alike_and_are_whole() {
        let pattern = u128::from_le_bytes(*b"0123456789abcdef");
        let holds = |frames: &[&[u8]], mask| {
            let mut alike = Alike::default();
            for bytes in frames {
                let mut frame = Frame::default();
                frame.fill_private(bytes);
                alike.add(&frame, pattern);
            }
            alike.holds(mask)
        };
        let (same, other): (&[u8], &[u8]) = (b"0123456789abcdefgh", b"0123456789abcdeFxxx");
        assert!(holds(&[same, same], !0) && holds(&[same, &[same; 7].concat()], !0));
        assert!(!holds(&[same, other, same], !0), "the last byte differs");
        assert!(holds(&[same, other], !0 >> 8), "which the mask leaves out");
        assert!(!holds(&[other, b"x123456789abcdefgh"], !0 >> 8));
        assert!(!holds(&[same, &same[..17], same], !0), "too short for a tag");
        let mut pushed = Frame::default();
        pushed.fill_private(same);
        assert!(pushed.set_tag(false, Some(5)));
        let mut alike = Alike::default();
        alike.add(&pushed, pattern);
        assert!(!alike.holds(0), "it begins elsewhere");
    }

    fn frame() -> Frame {
        let mut frame = Frame::default();
        let bytes: Vec<u8> = (0..60).collect();
        frame.fill_private(&bytes);
        frame
    }

    /// What is looked at and what is left to do: neighbour discovery and the checksum of TCP over
    /// IPv6 stand behind the first 64 bytes.
    #[test]
    fn the_head_has_all_that_it_can_hold() {
        let mut pool = virtq::mem::Pool::new(1, 4096).unwrap();
        let bytes: Vec<u8> = (0..200).collect();
        pool.slot_mut(0).unwrap()[..200].copy_from_slice(&bytes);
        let partial =
            Offload { needs_csum: true, csum_start: 58, csum_offset: 16, ..Offload::default() };
        for (len, offload) in (60..200).zip([Offload::default(), partial].into_iter().cycle()) {
            let span = virtq::mem::Pool::span(0, 0, len);
            let mut frame = Frame::default();
            assert!(frame.fill(pool.store().reader(span), span, offload));
            assert_eq!(frame.head(), &bytes[..len.min(128) as usize]);
            assert_eq!((frame.body.skip, frame.body.len), (len.min(128), len.saturating_sub(128)));
        }
    }

    #[test]
    fn a_pushed_tag_pops_to_the_same_bytes() {
        let mut frame = frame();
        let before = frame.head().to_vec();
        frame.offload = Offload { needs_csum: true, csum_start: 34, ..Offload::default() };
        assert!(frame.set_tag(false, Some(0x2005)));
        assert_eq!(frame.head().len(), 64);
        assert_eq!(&frame.head()[..12], &before[..12]);
        assert_eq!(&frame.head()[12..16], &[0x81, 0, 0x20, 5]);
        assert_eq!(&frame.head()[16..], &before[12..]);
        assert_eq!(frame.offload.csum_start, 38);
        assert!(frame.set_tag(true, Some(7)));
        assert_eq!(frame.tag(), Some(7));
        assert!(frame.set_tag(true, None));
        assert_eq!(frame.head(), before);
        assert_eq!(frame.offload.csum_start, 34);
    }

    #[test]
    fn an_inner_tag_is_never_taken_for_the_outer_one() {
        let mut frame = frame();
        frame.head_mut()[12..22].copy_from_slice(&[0x81, 0, 0, 5, 0x81, 0, 0, 6, 8, 0]);
        let before = frame.head().to_vec();
        let inner = [&before[..12], &before[16..]].concat();
        assert!(frame.has_tag_behind(true));
        assert!(frame.set_tag(true, None));
        assert_eq!(frame.head(), inner);
        assert!(frame.has_tag_behind(false));
        assert!(frame.set_tag(false, None));
        assert_eq!(frame.head(), inner, "popped once");
        assert!(frame.set_tag(false, Some(5)));
        assert_eq!(frame.head(), before, "and pushed before the inner one");
        frame.head_mut()[16] = 0x86;
        assert!(!frame.has_tag_behind(true));
        frame.head_mut()[16..18].copy_from_slice(&[0x88, 0xa8]);
        assert!(frame.has_tag_behind(true), "a service tag is one");
        frame.head_mut()[12..14].copy_from_slice(&[0x88, 0xa8]);
        assert!(frame.tag().is_none() && frame.has_tag_behind(false));
    }

    #[test]
    fn a_tag_makes_the_header_longer() {
        let mut frame = Frame::default();
        for (tpid, whole) in [([8, 0], 14), ([0x81, 0], 18)] {
            for len in 0..64 {
                let mut bytes = [2; 64];
                bytes[12..14].copy_from_slice(&tpid);
                frame.fill_private(&bytes[..len]);
                assert_eq!(frame.is_runt(), len < whole, "{len} bytes, type {tpid:?}");
            }
        }
    }

    #[test]
    fn tags_stop_at_the_end_of_the_room() {
        let mut frame = frame();
        for _ in 0..4 {
            assert!(frame.open_gap());
        }
        assert!(!frame.open_gap());
        assert_eq!(frame.len(), 76);
    }
}
