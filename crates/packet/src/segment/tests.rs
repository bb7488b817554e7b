#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use std::vec;
use std::vec::Vec;

use proptest::prelude::{any, prop_assert, prop_assert_eq, prop_oneof, proptest};
use proptest::strategy::{Just, Strategy};

use super::{CUT_HEADER_MAX, Cut, CutError};
use crate::{Checksum, Ipv4, Ipv6, Tcp, Udp, checksum};

/// What a large frame is made of.
#[derive(Debug, Clone)]
pub(crate) struct Shape {
    pub(crate) tags: usize,
    pub(crate) v6: bool,
    pub(crate) extension: bool,
    pub(crate) tcp: bool,
    pub(crate) options: usize,
    pub(crate) flags: u8,
    pub(crate) payload: usize,
}

pub(crate) fn shape() -> impl Strategy<Value = Shape> {
    let payload = prop_oneof![0..40usize, 1000..4000usize, Just(60_000)];
    let kind = (0..3usize, any::<bool>(), any::<bool>(), any::<bool>());
    (kind, 0..6usize, any::<u8>(), payload).prop_map(
        |((tags, v6, extension, tcp), options, flags, payload)| Shape {
            tags,
            v6,
            extension: extension && v6,
            tcp,
            options: options * 4,
            flags,
            payload,
        },
    )
}

/// The frame, and where its IP and its TCP or UDP header begin.
pub(crate) fn build(shape: &Shape) -> (Vec<u8>, usize, usize) {
    let mut frame = vec![2; 12];
    for tag in 0..shape.tags {
        frame.extend([0x81, 0, 0, tag as u8]);
    }
    frame.extend(if shape.v6 { [0x86, 0xdd] } else { [8, 0] });
    let l3 = frame.len();
    let upper_len = if shape.tcp { 20 + shape.options } else { 8 } + shape.payload;
    let protocol = if shape.tcp { 6 } else { 17 };
    if shape.v6 {
        let extension = if shape.extension { 8 } else { 0 };
        frame.extend([0x60, 0, 0, 0]);
        frame.extend(((upper_len + extension) as u16).to_be_bytes());
        frame.extend([if shape.extension { 0 } else { protocol }, 64]);
        frame.extend(1..=32);
        if shape.extension {
            frame.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
        }
    } else {
        frame.extend([0x45, 0]);
        frame.extend((20 + upper_len as u16).to_be_bytes());
        frame.extend([0xff, 0xfe, 0x40, 0, 64, protocol, 9, 9, 10, 0, 0, 1, 10, 0, 0, 2]);
    }
    let l4 = frame.len();
    frame.extend([0x12, 0x34, 0, 80]);
    if shape.tcp {
        frame.extend([0xff, 0xff, 0xff, 0, 0, 0, 0, 1]);
        frame.extend([((20 + shape.options) as u8 / 4) << 4, shape.flags, 1, 2, 7, 7, 0, 0]);
        frame.extend(vec![1; shape.options]);
    } else {
        frame.extend((upper_len as u16).to_be_bytes());
        frame.extend([7, 7]);
    }
    frame.extend((0..shape.payload).map(|i| (i * 31 + i / 256) as u8));
    (frame, l3, l4)
}

/// The transport checksum over a whole segment; 0 if it is right.
fn verify(shape: &Shape, network: &[u8], upper: &[u8]) -> u16 {
    let mut sum = Checksum::default();
    sum.add(if shape.v6 { &network[8..40] } else { &network[12..20] });
    sum.add(&(upper.len() as u32).to_be_bytes());
    sum.add(&[0, if shape.tcp { 6 } else { 17 }]);
    sum.add(upper);
    sum.finish()
}

proptest! {
    #[test]
    fn segments_are_right_and_hold_the_whole_payload(shape in shape(), size in 1..2000u16) {
        let (frame, l3, l4) = build(&shape);
        let size = if shape.payload > 4000 { size.max(536) } else { size };
        let head = &frame[..frame.len().min(CUT_HEADER_MAX)];
        let cut = Cut::new(head, frame.len() as u32, size).unwrap();
        let mut payload: Vec<u8> = Vec::new();
        for index in 0..cut.count() {
            let range = cut.range(index);
            let part = &frame[range.start as usize..range.end as usize];
            prop_assert!(part.len() == usize::from(size) || index + 1 == cut.count());
            let mut sum = Checksum::default();
            sum.add(part);
            let header = cut.header(index, sum);
            let segment = [header.bytes(), part].concat();
            prop_assert_eq!(cut.payload_len(index) as usize, part.len());
            // Who finishes checksums finds all else done, and comes to the same one.
            let mut undone = vec![0xee; header.bytes().len()];
            cut.write_header(index, None, &mut undone);
            let mut between = vec![0xee; undone.len()];
            cut.write_between(index, &mut between);
            prop_assert!(index == 0 || index + 1 == cut.count() || between == undone);
            let mut whole = Checksum::default();
            whole.add(&undone[l4..]);
            whole.add(part);
            let value = if shape.tcp { whole.finish() } else { whole.finish_transport() };
            let at = l4 + cut.checksum_offset();
            undone[at..at + 2].copy_from_slice(&value.to_be_bytes());
            prop_assert_eq!(&undone[..], header.bytes());
            prop_assert_eq!(&segment[..l3], &frame[..l3]);
            let (network, upper) = (&segment[l3..], &segment[l4..]);
            if shape.v6 {
                let ip = Ipv6::parse(network).unwrap();
                prop_assert_eq!(usize::from(ip.payload_len()), network.len() - 40);
            } else {
                let ip = Ipv4::parse(network).unwrap();
                prop_assert_eq!(usize::from(ip.total_len()), network.len());
                prop_assert_eq!(checksum(&network[..20]), 0);
                let id = u16::from_be_bytes([network[4], network[5]]);
                prop_assert_eq!(id, 0xfffe_u16.wrapping_add(index as u16));
            }
            prop_assert_eq!(verify(&shape, network, upper), 0);
            if shape.tcp {
                let tcp = Tcp::parse(upper).unwrap();
                let offset = 0xffff_ff00_u32.wrapping_add(payload.len() as u32);
                prop_assert_eq!(tcp.sequence(), offset);
                let last = index + 1 == cut.count();
                let mut flags = shape.flags;
                flags &= if last { 0xff } else { !9 };
                flags &= if index == 0 { 0xff } else { !128 };
                prop_assert_eq!(tcp.flags(), flags);
                prop_assert_eq!(&upper[20..20 + shape.options], &vec![1; shape.options][..]);
            } else {
                let udp = Udp::parse(upper).unwrap();
                prop_assert_eq!(udp.payload(), part);
                prop_assert!(upper[6..8] != [0, 0], "no checksum");
            }
            payload.extend(part);
        }
        prop_assert_eq!(&payload[..], &frame[frame.len() - shape.payload..]);
    }

    #[test]
    fn any_bytes_are_cut_or_refused(
        mut head in proptest::collection::vec(any::<u8>(), 0..160),
        ipv4: bool, len: u32, size: u16,
    ) {
        // Mostly something that looks like a frame.
        if head.len() > 60 {
            let kind: &[u8] = if ipv4 { &[8, 0, 0x45] } else { &[0x86, 0xdd, 0x60] };
            head[12..15].copy_from_slice(kind);
            head[if ipv4 { 23 } else { 20 }] = if len & 1 == 0 { 6 } else { 17 };
        }
        if let Ok(cut) = Cut::new(&head, len, size) {
            prop_assert!(cut.header_len() as usize <= head.len());
            let last = cut.range(cut.count() - 1);
            prop_assert!(last.end == len && last.start <= last.end);
            let header = cut.header(cut.count() - 1, Checksum::default());
            prop_assert_eq!(header.bytes().len(), cut.header_len() as usize);
        }
    }
}

#[test]
fn what_cannot_be_cut_is_refused() {
    let shape = Shape {
        tags: 0,
        v6: false,
        extension: false,
        tcp: true,
        options: 12,
        flags: 0x18,
        payload: 3000,
    };
    let (frame, l3, l4) = build(&shape);
    let len = frame.len() as u32;
    let refused = |frame: &[u8], len, size| Cut::new(frame, len, size).err();
    assert_eq!(refused(&frame, len, 1448), None);
    assert_eq!(refused(&frame, len, 0), Some(CutError::Size));
    assert_eq!(refused(&frame, len, u16::MAX), Some(CutError::Size));
    assert_eq!(refused(&frame, l4 as u32 + 31, 1448), Some(CutError::Header));
    assert_eq!(refused(&frame[..l4 + 31], len, 1448), Some(CutError::Header));
    let mut changed = frame.clone();
    changed[l3 + 9] = 47;
    assert_eq!(refused(&changed, len, 1448), Some(CutError::Protocol));
    changed = frame.clone();
    changed[l3 + 6] = 0x20; // a fragment
    assert_eq!(refused(&changed, len, 1448), Some(CutError::Protocol));
    changed = frame.clone();
    changed[l4 + 12] = 0x40; // a TCP header of 16 bytes
    assert_eq!(refused(&changed, len, 1448), Some(CutError::Header));
    changed = frame;
    changed[12] = 9;
    assert_eq!(refused(&changed, len, 1448), Some(CutError::Protocol));
}
