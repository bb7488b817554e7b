//! Cursors over segments, against the same bytes in one slice.
#![expect(clippy::arithmetic_side_effects, clippy::cast_possible_truncation, reason = "test code")]

use super::{RawSeg, Reader, SegSpan, SegStore, Writable, Writer};
use crate::mem::sum::tests::plain;

/// Private bytes cut into segments of the given lengths.
struct Cut {
    bytes: Vec<u8>,
    segs: Vec<RawSeg>,
}

impl Cut {
    fn new(lens: &[u32]) -> Self {
        let total: u32 = lens.iter().sum();
        let mut bytes: Vec<u8> = (0..total).map(|i| i as u8).collect();
        let start = bytes.as_mut_ptr();
        let mut at = 0;
        let segs = lens
            .iter()
            .map(|len| {
                let seg = RawSeg::new(start.wrapping_add(at), *len);
                at += *len as usize;
                seg
            })
            .collect();
        Self { bytes, segs }
    }

    fn reader(&self, skip: u32, len: u32) -> Reader<'_> {
        let count = self.segs.len() as u32;
        SegStore::new(&self.segs, &[]).reader(SegSpan { first: 0, count, skip, len })
    }

    fn writer(&self) -> Writer<'_> {
        let len = self.segs.iter().map(|seg| seg.len()).sum();
        Writable { segs: &self.segs, len }.writer()
    }

    fn now(&self) -> Vec<u8> {
        let mut out = vec![0; self.bytes.len()];
        assert_eq!(Reader::over(&self.segs).read(&mut out), out.len());
        out
    }
}

const CUTS: [&[u32]; 5] = [&[20], &[0, 20], &[1, 0, 19], &[7, 6, 7], &[1; 20]];

#[test]
fn readers_read_what_a_slice_holds() {
    for cut in CUTS.map(Cut::new) {
        for skip in [0, 1, 7, 13, 19, 20, 21, u32::MAX] {
            for len in [0, 1, 7, 19, 20, 21, u32::MAX] {
                let mut reader = cut.reader(skip, len);
                let from = (skip as usize).min(20);
                let want = &cut.bytes[from..(from + len as usize).min(20)];
                assert_eq!(reader.remaining() as usize, want.len());
                let step = reader.skip(2) as usize;
                assert_eq!(step, want.len().min(2));
                let mut out = [0xee; 30];
                assert_eq!(reader.read(&mut out), want.len() - step);
                assert_eq!(out[..want.len() - step], want[step..]);
                assert_eq!((reader.read(&mut out), reader.skip(1)), (0, 0));
                assert!(reader.next_piece(1).is_none());
            }
        }
    }
}

#[test]
fn spans_outside_of_the_store_are_empty() {
    let cut = Cut::new(&[4, 4]);
    let store = SegStore::new(&cut.segs, &[]);
    for (first, count) in [(0, 3), (2, 1), (3, 0), (u32::MAX, u32::MAX)] {
        let reader = store.reader(SegSpan { first, count, skip: 0, len: 8 });
        assert_eq!(reader.remaining(), 0);
    }
    assert_eq!(store.reader(SegSpan { first: 1, count: 1, skip: 1, len: 9 }).remaining(), 3);
    let span = SegSpan { first: 0, count: 1, skip: 0, len: 1 };
    assert_eq!(SegStore::empty().reader(span).remaining(), 0);
}

#[test]
fn pieces_are_what_the_segments_are() {
    let cut = Cut::new(&[3, 0, 5]);
    let mut reader = cut.reader(1, 6);
    let lens: Vec<_> =
        std::iter::from_fn(|| reader.next_piece(3)).map(|piece| piece.len()).collect();
    assert_eq!(lens, [2, 3, 1]);
}

#[test]
fn one_copy_moves_between_all_cuts() {
    for from in CUTS {
        for to in CUTS {
            for len in [0, 1, 10, 20, u32::MAX] {
                let (source, target) = (Cut::new(from), Cut::new(to));
                let mut want = target.bytes.clone();
                let mut writer = target.writer();
                assert_eq!(writer.write(&[0xaa, 0xbb]), 2);
                let mut reader = source.reader(5, 14);
                let moved = writer.copy_from(&mut reader, len) as usize;
                assert_eq!(moved, (len as usize).min(14));
                assert_eq!(reader.remaining() as usize, 14 - moved);
                want[..2].copy_from_slice(&[0xaa, 0xbb]);
                want[2..2 + moved].copy_from_slice(&source.bytes[5..5 + moved]);
                assert_eq!(target.now(), want);
            }
        }
    }
}

#[test]
fn a_copy_ends_where_the_room_ends() {
    let (source, target) = (Cut::new(&[30]), Cut::new(&[2, 3]));
    let mut writer = target.writer();
    let mut reader = source.reader(0, 30);
    assert_eq!(writer.copy_from(&mut reader, 30), 5);
    assert_eq!((reader.remaining(), writer.remaining()), (25, 0));
    assert_eq!(writer.write(&[1]), 0);
    assert_eq!(writer.skip(1), 0);
}

#[test]
fn write_if_different_writes_what_differs() {
    for cut in CUTS {
        let target = Cut::new(cut);
        let mut writer = target.writer();
        assert_eq!(writer.write_if_different(&[0, 1, 2, 3]), 4);
        assert_eq!(writer.write_if_different(&[9; 12]), 12);
        assert_eq!(writer.skip(1), 1);
        assert_eq!(writer.write_if_different(&[8; 12]), 3);
        let want = [&[0, 1, 2, 3][..], &[9; 12], &[16], &[8; 3]].concat();
        assert_eq!(target.now(), want);
    }
}

#[test]
fn copies_may_overlap() {
    let cut = Cut::new(&[20]);
    let source = SegStore::new(&cut.segs, &[]);
    let mut writer = cut.writer();
    let _ = writer.skip(3);
    let mut reader = source.reader(SegSpan { first: 0, count: 1, skip: 0, len: 17 });
    assert_eq!(writer.copy_from(&mut reader, 17), 17);
    assert_eq!(cut.now()[3..], (0..17).collect::<Vec<u8>>());
}

#[test]
fn both_parts_of_a_split_span_hold_what_the_whole_held() {
    for cut in CUTS.map(Cut::new) {
        let store = SegStore::new(&cut.segs, &[]);
        let read = |span: SegSpan| {
            let mut out = vec![0; span.len as usize];
            assert_eq!(store.reader(span).read(&mut out), out.len());
            out
        };
        for (skip, len) in [(0, 20), (3, 17), (7, 6), (20, 0)] {
            let whole = SegSpan { first: 0, count: cut.segs.len() as u32, skip, len };
            let bytes = read(whole);
            for at in 0..=len {
                let (front, back) = store.split(whole, at);
                assert_eq!((front.len, back.len), (at, len - at));
                assert_eq!(read(front), bytes[..at as usize]);
                assert_eq!(read(back), bytes[at as usize..]);
                assert!(front.count <= whole.count && back.first + back.count <= whole.count);
            }
            assert_eq!(store.split(whole, len + 1), store.split(whole, len));
        }
    }
    let cut = Cut::new(&[7, 6, 7]);
    let whole = SegSpan { first: 0, count: 3, skip: 0, len: 20 };
    let store = SegStore::new(&cut.segs, &[]);
    let (front, back) = store.split(whole, 7);
    assert!(store.one(front).is_some() && back == SegSpan { first: 1, count: 2, skip: 0, len: 13 });
    assert!(store.one(store.split(back, 6).0).is_some(), "no segment that is not needed");
}

#[test]
fn what_is_summed_is_what_passes() {
    for (cut, room) in CUTS.map(Cut::new).into_iter().zip(CUTS.map(Cut::new)) {
        let mut room = room;
        room.bytes.fill(0);
        let (mut reader, mut again, mut writer) =
            (cut.reader(0, 20), cut.reader(3, 17), room.writer());
        let mut total = 0;
        while let (sum, step @ 1..) = writer.copy_sum(&mut reader, 9) {
            assert_eq!(sum, plain(&cut.bytes[total..total + step as usize]));
            total += step as usize;
        }
        assert_eq!(total, cut.bytes.len());
        assert_eq!(room.now(), cut.bytes);
        let mut total = 3;
        while let (sum, step @ 1..) = again.sum_piece(u32::MAX) {
            assert_eq!(sum, plain(&cut.bytes[total..total + step as usize]));
            total += step as usize;
        }
        assert_eq!(total, 20);
    }
    let long = Cut::new(&[200, 100]);
    assert_eq!(long.reader(0, 300).sum_piece(300), (plain(&long.bytes[..200]), 200));
}

#[test]
fn what_is_gathered_reads_as_if_it_stood_together() {
    let mut buf = super::super::GatherBuf::default();
    for cut in CUTS.map(Cut::new) {
        let store = SegStore::new(&cut.segs, &[]);
        let count = cut.segs.len() as u32;
        let span = |skip, len| SegSpan { first: 0, count, skip, len };
        let mut gather = buf.begin(store);
        assert_eq!(gather.push(span(3, 2)), 2);
        let first = gather.next();
        assert_eq!([gather.push(span(10, 7)), gather.push(span(0, 9))], [7, 9]);
        let whole = gather.span(first, 16);
        let gathered = gather.finish();
        let mut out = [0; 20];
        assert_eq!(gathered.reader(whole).read(&mut out), 16);
        assert_eq!(out[..16], [&cut.bytes[10..17], &cut.bytes[..9]].concat());
    }
}
