//! Transport checksums that a sender left undone, computed before the frame reaches somebody who
//! would take them as they are: on the way of the one copy, or before it.
//!
//! **Trust.** Offsets come from the kernel or from a guest: a frame whose checksum does not lie in
//! its private head is refused. The body is summed as it is read; whoever changes it meanwhile
//! gets a frame with a wrong checksum.

use packet::Checksum;
use virtq::mem::{Reader, Writer};

use crate::{Batch, Frame, Offload};

/// Where UDP (and UDP-Lite) has its checksum.
const UDP_CHECKSUM: u16 = 6;

/// A checksum that is being finished.
#[derive(Debug)]
pub struct Finish {
    sum: Checksum,
    place: usize,
    /// Where the checksum is says so; in UDP 0 stands for none.
    is_udp: bool,
}

impl Finish {
    /// Whether the checksum's place is in the head, so that it can be finished.
    #[inline]
    pub fn is_possible(frame: &Frame) -> bool {
        let Offload { csum_start, csum_offset, .. } = frame.offload;
        let place = usize::from(csum_start).saturating_add(usize::from(csum_offset));
        frame.head().len() >= place.saturating_add(2)
    }

    /// Begins with what the head has of the frame. None if the checksum's place is not in the head.
    #[inline]
    fn begin(frame: &Frame) -> Option<Self> {
        let Offload { csum_start, csum_offset, .. } = frame.offload;
        let start = usize::from(csum_start);
        let place = start.saturating_add(usize::from(csum_offset));
        let head = frame.head();
        let part = head.get(start..).filter(|_| head.len() >= place.saturating_add(2))?;
        // The field holds the sum of the pseudo header: it is part of what is summed.
        let mut sum = Checksum::default();
        sum.add_header(part);
        Some(Self { sum, place, is_udp: csum_offset == UDP_CHECKSUM })
    }

    /// Writes `frame`, one of `batch`, with its checksum finished. False, and nothing written, if
    /// that is not possible; what finds no room is not written.
    #[inline]
    pub fn write(frame: &Frame, batch: &Batch<'_>, to: Writer<'_>) -> bool {
        let Some(mut finish) = Self::begin(frame) else { return false };
        // Mostly all goes from one piece into one piece.
        if let Some(body) = batch.body_piece(frame)
            && let Some(piece) = to.whole(frame.len())
            && let Some(sum) = piece.write_summed(frame.head(), body)
        {
            finish.sum.add_part(sum, frame.body.len);
            let (place, value) = finish.end();
            piece.write_at(place, value);
            return true;
        }
        Self::write_spread(frame, batch, to)
    }

    #[inline(never)]
    fn write_spread(frame: &Frame, batch: &Batch<'_>, mut to: Writer<'_>) -> bool {
        let Some(mut finish) = Self::begin(frame) else { return false };
        let mut at_sum = to;
        let _ = to.write(frame.head());
        let _ = finish.copy(&mut to, &mut batch.body(frame), frame.body.len);
        let (place, value) = finish.end();
        let _ = at_sum.skip(u32::try_from(place).unwrap_or(u32::MAX));
        let _ = at_sum.write(&value);
        true
    }

    /// Copies `len` bytes of the body and sums them on the way; returns how many there were.
    #[inline]
    fn copy(&mut self, to: &mut Writer<'_>, body: &mut Reader<'_>, len: u32) -> u32 {
        let mut done = 0u32;
        while done < len {
            let left = len.wrapping_sub(done);
            let (sum, count) = to.copy_sum(body, left);
            if count == 0 {
                break;
            }
            self.sum.add_part(sum, count);
            done = done.wrapping_add(count);
        }
        done
    }

    /// Where in the frame the checksum stands, and its bytes: to be written behind all others,
    /// where the frame went.
    #[inline]
    fn end(self) -> (usize, [u8; 2]) {
        let value = if self.is_udp { self.sum.finish_transport() } else { self.sum.finish() };
        (self.place, value.to_be_bytes())
    }
}

/// Computes the checksum that `frame`'s offload intent asks for, over the head and `body`, and
/// clears the intent. False, and nothing changed, if its place is not within the head.
pub fn finish_checksum(frame: &mut Frame, body: Reader<'_>) -> bool {
    if !frame.offload.needs_csum {
        return true;
    }
    let Some(mut finish) = Finish::begin(frame) else { return false };
    sum_body(&mut finish.sum, body);
    let (place, value) = finish.end();
    if let Some(field) = frame.head_mut().get_mut(place..).and_then(<[u8]>::first_chunk_mut) {
        *field = value;
    }
    frame.offload = Offload::default();
    true
}

/// Adds all that is left in `body`.
pub fn sum_body(sum: &mut Checksum, mut body: Reader<'_>) {
    while body.remaining() > 0 {
        let (part, count) = body.sum_piece(u32::MAX);
        if count == 0 {
            break;
        }
        sum.add_part(part, count);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::cast_possible_truncation, clippy::arithmetic_side_effects, reason = "tests")]

    use super::{Finish, finish_checksum};
    use crate::{Frame, FrameBuf, Offload};
    use packet::{Checksum, checksum};
    use virtq::mem::Pool;

    /// A UDP datagram over IPv4 whose checksum field holds the sum of the pseudo header.
    fn datagram(payload: usize) -> (Vec<u8>, Vec<u8>) {
        let len = (8 + payload) as u16;
        let mut pseudo = vec![10, 0, 0, 1, 10, 0, 0, 2, 0, 17];
        pseudo.extend(len.to_be_bytes());
        let mut frame = vec![2; 14];
        frame.extend([0x45, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        frame.extend([0x12, 0x34, 0, 53]);
        frame.extend(len.to_be_bytes());
        frame.extend((!checksum(&pseudo)).to_be_bytes());
        frame.extend((0..payload).map(|i| (i * 7 + payload) as u8));
        (frame, pseudo)
    }

    #[test]
    fn a_finished_checksum_is_right_whatever_is_in_the_body() {
        for payload in (0..300).chain([1472, 2048, 4096, 8972, 60_000]) {
            let (bytes, mut pseudo) = datagram(payload);
            let mut pool = Pool::new(1, 65_536).unwrap();
            pool.slot_mut(0).unwrap()[..bytes.len()].copy_from_slice(&bytes);
            let span = Pool::span(0, 0, bytes.len() as u32);
            let offload =
                Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() };
            let mut frame = Frame::default();
            assert!(frame.fill(pool.store().reader(span), span, offload));
            let body = frame.body;
            assert!(finish_checksum(&mut frame, pool.store().reader(body)));
            assert!(frame.offload.is_none());
            let field = [frame.head()[40], frame.head()[41]];
            assert_ne!(field, [0, 0], "no checksum");
            let mut whole = bytes.clone();
            whole[40..42].copy_from_slice(&field);
            pseudo.extend(&whole[34..]);
            let mut sum = Checksum::default();
            sum.add(&pseudo);
            assert_eq!(sum.finish(), 0, "{payload} bytes");
        }
    }

    /// A sum of all ones: its checksum is 0, which only UDP writes in another way.
    #[test]
    fn a_checksum_of_zero_is_zero_but_in_udp() {
        for (csum_offset, value) in [(16, [0, 0]), (6, [0xff, 0xff])] {
            let mut bytes = [0; 60];
            bytes[34..36].copy_from_slice(&[0xff, 0xff]);
            let mut frame = Frame::default();
            frame.fill_private(&bytes);
            frame.offload =
                Offload { needs_csum: true, csum_start: 34, csum_offset, ..Offload::default() };
            let body = virtq::mem::SegStore::empty().reader(frame.body);
            assert!(finish_checksum(&mut frame, body));
            let place = 34 + usize::from(csum_offset);
            assert_eq!(frame.head()[place..place + 2], value);
        }
    }

    /// In one piece, over pieces that end anywhere, and where there is no room for all.
    #[test]
    fn what_is_written_is_the_frame_with_its_checksum() {
        for payload in [0, 1, 87, 100, 1448, 1449] {
            let (bytes, _) = datagram(payload);
            let mut from = Pool::new(1, 2048).unwrap();
            from.slot_mut(0).unwrap()[..bytes.len()].copy_from_slice(&bytes);
            let span = Pool::span(0, 0, bytes.len() as u32);
            let offload =
                Offload { needs_csum: true, csum_start: 34, csum_offset: 6, ..Offload::default() };
            let mut buf = FrameBuf::default();
            let frame = buf.slot().unwrap();
            assert!(frame.fill(from.store().reader(span), span, offload));
            let mut wanted = frame.clone();
            assert!(finish_checksum(&mut wanted, from.store().reader(frame.body)));
            let whole = [wanted.head(), &bytes[wanted.head().len()..]].concat();
            buf.keep();
            let batch = buf.batch(from.store(), None);
            let frame = &batch.frames()[0];
            for slot_bytes in [2048, 1024, 512, 100, 41, 16, 1] {
                let slots = 2048 / slot_bytes;
                let mut to = Pool::new(slots, slot_bytes).unwrap();
                let writer = to.writer_over(slots);
                assert!(Finish::is_possible(frame) && Finish::write(frame, &batch, writer));
                let written: Vec<u8> =
                    (0..slots).flat_map(|slot| to.slot_mut(slot).unwrap().to_vec()).collect();
                let there = whole.len().min(written.len());
                assert!(written[..there] == whole[..there], "{payload} in {slot_bytes}");
                assert!(written[there..].iter().all(|byte| *byte == 0));
            }
        }
    }

    #[test]
    fn a_place_outside_of_the_head_is_refused() {
        let (bytes, _) = datagram(20);
        for (csum_start, csum_offset) in [(34, 27), (62, 0), (63, 0), (u16::MAX, u16::MAX)] {
            let mut frame = Frame::default();
            frame.fill_private(&bytes);
            frame.offload =
                Offload { needs_csum: true, csum_start, csum_offset, ..Offload::default() };
            let body = virtq::mem::SegStore::empty().reader(frame.body);
            assert!(!finish_checksum(&mut frame, body));
            assert!(!Finish::is_possible(&frame));
            assert_eq!(frame.head(), bytes, "nothing changed");
        }
    }
}
