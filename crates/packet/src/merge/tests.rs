#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::vec::Vec;

use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

use super::{Fit, Merge, Segment};
use crate::segment::tests::{Shape, build, shape};
use crate::{CUT_HEADER_MAX, Checksum, Cut};

/// The segments that a frame is cut into.
fn cut(frame: &[u8], size: u16) -> Vec<Vec<u8>> {
    let cut =
        Cut::new(&frame[..frame.len().min(CUT_HEADER_MAX)], frame.len() as u32, size).unwrap();
    let segment = |index| {
        let range = cut.range(index);
        let payload = &frame[range.start as usize..range.end as usize];
        let mut sum = Checksum::default();
        sum.add(payload);
        [cut.header(index, sum).bytes(), payload].concat()
    };
    (0..cut.count()).map(segment).collect()
}

fn parse(frame: &[u8]) -> Option<Segment<'_>> {
    Segment::parse(frame, frame.len() as u32)
}

/// Puts `segments` together, as far as they go: the frame, and how many there were.
fn merge(segments: &[Vec<u8>]) -> (Vec<u8>, usize, u16) {
    let first = parse(&segments[0]).unwrap();
    let mut merge = Merge::begin(&first);
    let mut whole = segments[0].clone();
    let mut count = 1;
    for segment in &segments[1..] {
        let next = parse(segment).unwrap();
        if merge.fit(&next) != Fit::Follows {
            break;
        }
        merge.add(&next);
        whole.extend(&segment[next.header_len()..]);
        count += 1;
    }
    merge.write(&mut whole);
    (whole, count, merge.size())
}

/// A frame as a sender leaves it whose checksum is not finished.
fn partial(mut frame: Vec<u8>, payload: usize) -> Vec<u8> {
    let segment = parse(&frame).unwrap();
    let (start, offset) = segment.checksum_place();
    let at = usize::from(start + offset);
    let mut sum = segment.headers.pseudo(&frame);
    sum.add_u32((segment.headers.len - segment.headers.l4 + payload) as u32);
    frame[at..at + 2].copy_from_slice(&sum.sum().to_be_bytes());
    frame
}

proptest! {
    #[test]
    fn what_is_cut_and_put_together_is_what_it_was(shape in shape(), size in 536..2000u16) {
        let payload = shape.payload.max(1);
        // ACK alone, with what ends a train and with what begins one.
        let shape = Shape { flags: shape.flags & 0xd9 | 0x10, payload, ..shape };
        let (frame, l3, _) = build(&shape);
        let segments = cut(&frame, size);
        for segment in &segments {
            let parsed = parse(segment).unwrap();
            let mut sum = parsed.sum(parsed.header);
            sum.add(&segment[parsed.header_len()..]);
            prop_assert_eq!(sum.finish(), 0);
        }
        let (whole, count, of_each) = merge(&segments);
        prop_assert_eq!(count, segments.len());
        prop_assert_eq!(usize::from(of_each), payload.min(usize::from(size)));
        // The builder leaves checksums to others.
        let mut original = frame;
        if !shape.v6 {
            original[l3 + 10..l3 + 12].fill(0);
            let sum = crate::checksum(&original[l3..l3 + 20]);
            original[l3 + 10..l3 + 12].copy_from_slice(&sum.to_be_bytes());
        }
        let at = parse(&segments[0]).unwrap().checksum_place();
        let at = usize::from(at.0 + at.1);
        original[at..at + 2].copy_from_slice(&[1, 1]);
        prop_assert_eq!(&whole, &partial(original, payload));
    }

    #[test]
    fn a_segment_that_is_not_the_next_one_ends_what_was_there(
        shape in shape(), at in 0..40usize, bit in 0..8u32, tail in any::<bool>(),
    ) {
        let shape = Shape { flags: 0x10, payload: 3000, ..shape };
        let (frame, l3, l4) = build(&shape);
        let segments = cut(&frame, 1000);
        let first = parse(&segments[0]).unwrap();
        let merge = Merge::begin(&first);
        prop_assert_eq!(merge.fit(&parse(&segments[1]).unwrap()), Fit::Follows);
        if shape.tcp {
            prop_assert_eq!(merge.fit(&parse(&segments[2]).unwrap()), Fit::Ends, "a gap");
            prop_assert_eq!(merge.fit(&first), Fit::Ends, "again");
        }
        // Any other bit of the headers: but PSH, FIN and the checksums, which may differ.
        let start = if tail { l4 } else { 0 };
        let at = start + at % (first.header_len() - start);
        let mut changed = segments[1].clone();
        changed[at] ^= 1 << bit;
        let upper = at.wrapping_sub(l4);
        let free = if shape.tcp {
            (16..18).contains(&upper) || upper == 13 && [0, 3].contains(&bit)
        } else {
            (6..8).contains(&upper)
        };
        if !shape.v6 && (l3..l4).contains(&at) {
            let header = &mut changed[l3..l3 + 20];
            header[10..12].fill(0);
            let sum = crate::checksum(header);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        // Packets that are never fragmented need no numbers, and the checksum was made right.
        let free = free || !shape.v6 && [4, 5, 10, 11].contains(&at.wrapping_sub(l3));
        if let Some(next) = parse(&changed) {
            prop_assert_eq!(merge.fit(&next) == Fit::Follows, free, "byte {} bit {}", at, bit);
        }
    }

    #[test]
    fn any_bytes_are_a_segment_or_not(
        head in proptest::collection::vec(any::<u8>(), 0..160), len: u32,
    ) {
        if let Some(segment) = Segment::parse(&head, len) {
            let mut whole = head.clone();
            let merge = Merge::begin(&segment);
            let _ = (merge.fit(&segment), segment.sum(segment.header), segment.kind());
            merge.write(&mut whole);
            prop_assert!(segment.header_len() <= CUT_HEADER_MAX);
        }
    }
}

#[test]
fn a_train_ends_with_push_with_fin_and_with_what_is_smaller() {
    let base = Shape {
        tags: 1,
        v6: false,
        extension: false,
        tcp: true,
        options: 12,
        flags: 0x10,
        payload: 5000,
    };
    let segments = cut(&build(&base).0, 1000);
    assert_eq!(merge(&segments).1, 5);
    for flag in [1, 8] {
        let mut segments = segments.clone();
        segments[2][18 + 20 + 13] |= flag;
        let (whole, count, _) = merge(&segments);
        assert_eq!((count, whole[18 + 20 + 13]), (3, 0x10 | flag));
    }
    for flag in [2, 4, 32] {
        let mut segment = segments[0].clone();
        segment[18 + 20 + 13] |= flag;
        assert!(parse(&segment).is_none(), "flag {flag}");
    }
    let (frame, ..) = build(&Shape { payload: 2500, ..base });
    let small = [cut(&frame, 1000), segments[3..].to_vec()].concat();
    assert_eq!(merge(&small).1, 3);
    // What fills a packet leaves no room for more.
    let (frame, ..) = build(&Shape { payload: 65_000, ..base });
    let mut many = cut(&frame, 1000);
    many.push(many[64].clone());
    let next = 0xffff_ff00_u32.wrapping_add(65_000);
    many[65][18 + 20 + 4..18 + 20 + 8].copy_from_slice(&next.to_be_bytes());
    assert_eq!(merge(&many).1, 65);
}

#[test]
fn padding_and_wrong_headers_make_no_segment() {
    let base = Shape {
        tags: 0,
        v6: false,
        extension: false,
        tcp: false,
        options: 0,
        flags: 0,
        payload: 100,
    };
    let segment = cut(&build(&base).0, 1000).remove(0);
    assert!(parse(&segment).is_some());
    assert!(Segment::parse(&segment, segment.len() as u32 + 1).is_none(), "padded");
    for at in [17, 24, 39] {
        let mut wrong = segment.clone();
        wrong[at] ^= 1;
        assert!(parse(&wrong).is_none(), "byte {at}");
    }
    let mut bare = segment;
    bare[40..42].fill(0);
    assert!(parse(&bare).is_none(), "no checksum");
}
