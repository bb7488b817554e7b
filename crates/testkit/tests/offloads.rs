//! Every combination of what a sender and a receiver negotiated: the receiver gets the sender's
//! bytes in order, in frames that it can take, with checksums that are right or left to it.
#![expect(clippy::unwrap_used, clippy::panic, reason = "test code")]
#![expect(clippy::arithmetic_side_effects, reason = "test code")]
#![expect(clippy::indexing_slicing, clippy::cast_possible_truncation, reason = "test code")]
#![forbid(unsafe_code)]

use std::sync::Arc;

use port::{Egress, FrameBuf, Ingress, QueueCounters};
use testkit::{Guest, GuestSettings, ReceivedFrame};
use virtio_net::features as f;
use virtq::{Layout, RingFeatures};

/// Payload bytes of a segment.
const SIZE: usize = 1400;

/// What is sent.
#[derive(Debug, Clone, Copy)]
struct Kind {
    v6: bool,
    tcp: bool,
    tagged: bool,
    cwr: bool,
}

impl Kind {
    fn l3(self) -> usize {
        if self.tagged { 18 } else { 14 }
    }

    fn l4(self) -> usize {
        self.l3() + if self.v6 { 40 } else { 20 }
    }

    fn headers(self) -> usize {
        self.l4() + if self.tcp { 32 } else { 8 }
    }

    fn place(self) -> usize {
        self.l4() + if self.tcp { 16 } else { 6 }
    }

    fn gso(self) -> u8 {
        match (self.tcp, self.v6) {
            (true, false) => 1,
            (true, true) => 4,
            (false, _) => 5,
        }
    }

    /// The frame of a segment at `offset`, its checksum as the sum of the pseudo header.
    fn frame(self, offset: usize, payload: &[u8], last: bool) -> Vec<u8> {
        let upper = self.headers() - self.l4() + payload.len();
        let mut frame = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        if self.tagged {
            frame.extend([0x81, 0, 0x20, 5]);
        }
        let protocol = if self.tcp { 6 } else { 17 };
        if self.v6 {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend((upper as u16).to_be_bytes());
            frame.extend([protocol, 64]);
            frame.extend((0..32).map(|n| n ^ 0xfd));
        } else {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + upper as u16).to_be_bytes());
            let id = (offset / SIZE) as u16;
            frame.extend(id.to_be_bytes());
            frame.extend([0, 0, 64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
            let sum = !sum(&frame[self.l3()..]);
            frame[self.l3() + 10..self.l3() + 12].copy_from_slice(&sum.to_be_bytes());
        }
        frame.extend([0x12, 0x34, 0, 80]);
        if self.tcp {
            frame.extend((offset as u32).to_be_bytes());
            let cwr = if self.cwr && offset == 0 { 0x80 } else { 0 };
            let psh = if last { 8 } else { 0 };
            frame.extend([0, 0, 0, 1, 0x80, 0x10 | cwr | psh, 1, 2, 0, 0, 0, 0]);
            frame.extend([1, 1, 8, 10, 0, 0, 0, 7, 0, 0, 0, 9]);
        } else {
            frame.extend((upper as u16).to_be_bytes());
            frame.extend([0, 0]);
        }
        let pseudo = self.pseudo(&frame, upper);
        frame[self.place()..self.place() + 2].copy_from_slice(&pseudo.to_be_bytes());
        frame.extend(payload);
        frame
    }

    fn pseudo(self, frame: &[u8], upper: usize) -> u16 {
        let from = self.l3() + if self.v6 { 8 } else { 12 };
        let to = self.l3() + if self.v6 { 40 } else { 20 };
        let mut all = frame[from..to].to_vec();
        all.extend([0, if self.tcp { 6 } else { 17 }]);
        all.extend((upper as u32).to_be_bytes());
        sum(&all)
    }

    /// What a driver sends that negotiated `bits`: frames with their headers.
    fn sent(self, payload: &[u8], bits: u64) -> Vec<ReceivedFrame> {
        let large = match self.gso() {
            1 => f::HOST_TSO4,
            4 => f::HOST_TSO6,
            _ => f::HOST_USO,
        };
        let (csum, ecn) = (bits & f::CSUM != 0, !self.cwr || bits & f::HOST_ECN != 0);
        let whole = csum && ecn && bits & large != 0;
        let size = if whole { payload.len() } else { SIZE };
        let mut frames = Vec::new();
        for (number, part) in payload.chunks(size).enumerate() {
            let last = (number + 1) * size >= payload.len();
            let mut frame = self.frame(number * size, part, last);
            let mut header = [0; 12];
            if csum {
                header[0] = 1;
                header[6..8].copy_from_slice(&(self.l4() as u16).to_le_bytes());
                header[8..10].copy_from_slice(&((self.place() - self.l4()) as u16).to_le_bytes());
            } else {
                let value = !sum(&frame[self.l4()..]);
                frame[self.place()..self.place() + 2].copy_from_slice(&value.to_be_bytes());
            }
            if whole {
                header[1] = self.gso() | if self.cwr { 0x80 } else { 0 };
                header[2..4].copy_from_slice(&(self.headers() as u16).to_le_bytes());
                header[4..6].copy_from_slice(&(SIZE as u16).to_le_bytes());
            }
            frames.push((header, frame));
        }
        frames
    }

    /// Checks a frame that a driver got that negotiated `bits`; its payload.
    fn check(self, (header, frame): &ReceivedFrame, bits: u64) -> Vec<u8> {
        let [flags, gso, ..] = *header;
        let large = match gso & 0x7f {
            0 => 0,
            1 => f::GUEST_TSO4,
            4 => f::GUEST_TSO6,
            5 => f::GUEST_USO4,
            other => panic!("GSO type {other}"),
        };
        assert_eq!(bits & large, large, "{self:?}: GSO type {gso}");
        assert!(gso & 0x80 == 0 || bits & f::GUEST_ECN != 0, "ECN");
        let upper = frame.len() - self.l4();
        let payload = frame[self.headers()..].to_vec();
        if flags & 1 != 0 {
            assert!(bits & f::GUEST_CSUM != 0);
            let field = u16::from_be_bytes([frame[self.place()], frame[self.place() + 1]]);
            let (field, right) = (field % 0xffff, self.pseudo(frame, upper) % 0xffff);
            assert_eq!(field, right, "the pseudo header's sum");
            let starts = u16::from_le_bytes([header[6], header[7]]);
            assert_eq!(usize::from(starts), self.l4());
        } else {
            let mut all = frame[self.l4()..].to_vec();
            all.extend(self.pseudo(frame, upper).to_be_bytes());
            // The sum of what has an odd length goes on with the other half.
            let odd = upper % 2 == 1;
            let all = if odd { [&frame[self.l4()..], &[0], &all[upper..]].concat() } else { all };
            assert_eq!(sum(&all), 0xffff, "{self:?}: the checksum");
        }
        let segment = u16::from_le_bytes([header[4], header[5]]);
        if gso == 0 {
            assert!(payload.len() <= SIZE, "{self:?}: {} bytes in a segment", payload.len());
        } else {
            assert_eq!((usize::from(segment), flags & 1), (SIZE, 1));
        }
        if !self.v6 {
            assert_eq!(sum(&frame[self.l3()..self.l4()]), 0xffff, "the IPv4 checksum");
        }
        payload
    }
}

/// RFC 1071, word for word.
fn sum(bytes: &[u8]) -> u16 {
    let mut sum = 0u32;
    for pair in bytes.chunks(2) {
        sum += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

/// What is negotiated, from nothing to everything, as bits of both directions.
fn sets() -> [u64; 6] {
    let csum = f::CSUM | f::GUEST_CSUM;
    let tso4 = csum | f::HOST_TSO4 | f::GUEST_TSO4;
    let tso6 = csum | f::HOST_TSO6 | f::GUEST_TSO6;
    let uso = csum | f::HOST_USO | f::GUEST_USO4 | f::GUEST_USO6;
    [0, csum, tso4, tso4 | tso6 | f::HOST_ECN | f::GUEST_ECN, uso, f::OFFLOADS]
}

fn kinds() -> Vec<Kind> {
    let mut kinds = Vec::new();
    for v6 in [false, true] {
        for (tcp, cwr) in [(true, false), (true, true), (false, false)] {
            kinds.extend([false, true].map(|tagged| Kind { v6, tcp, tagged, cwr }));
        }
    }
    kinds
}

fn guest(layout: Layout, offloads: u64, buffers: (bool, u32)) -> Guest {
    let (mergeable, rx_bytes) = buffers;
    let settings = GuestSettings {
        features: RingFeatures::default(),
        mergeable,
        rx_bytes,
        tx_bytes: 66_000,
        mtu: 1500,
        offloads,
        ..GuestSettings::new(layout)
    };
    Guest::new(settings).unwrap()
}

/// Sends `payload` from one guest to another: the frames that arrive.
fn pass(kind: Kind, payload: &[u8], from: &mut Guest, to: &mut Guest) -> Vec<ReceivedFrame> {
    let (rx, tx) = (Arc::<QueueCounters>::default(), Arc::<QueueCounters>::default());
    let (mut transmitq, mut receiveq) = (from.transmitq(&rx).unwrap(), to.receiveq(&tx).unwrap());
    let frames = kind.sent(payload, from.settings().offloads);
    for (header, frame) in &frames {
        assert!(from.send_with(header, frame, 3).unwrap());
    }
    let _ = from.flush();
    let mut buf = FrameBuf::default();
    let batch = transmitq.receive(&mut buf);
    assert_eq!(batch.len(), frames.len(), "{kind:?}: nothing is refused");
    let picked: Vec<u16> = (0..batch.len() as u16).collect();
    receiveq.send(&batch, &picked).unwrap();
    transmitq.release();
    assert_eq!(tx.egress.ended(), frames.len() as u64, "the law");
    assert_eq!(tx.read_ends().dropped(), 0, "{kind:?}: nothing is lost");
    to.receive_with().unwrap()
}

#[test]
fn every_sender_reaches_every_receiver() {
    let payload: Vec<u8> = (0..30_011_u32).map(|n| (n * 7 + n / 256) as u8).collect();
    let mut large = 0;
    for (number, kind) in kinds().into_iter().enumerate() {
        for sender in sets() {
            for receiver in sets() {
                // Small buffers, and those that drivers without mergeable ones post.
                for buffers in [(true, 2048), (false, 65_562)] {
                    let rings = [Layout::Split, Layout::Packed];
                    let mut from = guest(rings[number % 2], sender, buffers);
                    let mut to = guest(rings[usize::from(buffers.0)], receiver, buffers);
                    let frames = pass(kind, &payload, &mut from, &mut to);
                    let all: Vec<u8> =
                        frames.iter().flat_map(|frame| kind.check(frame, receiver)).collect();
                    assert!(all == payload, "{kind:?} from {sender:#x} to {receiver:#x}");
                    large += usize::from(frames.len() == 1);
                }
            }
        }
    }
    assert!(large > 100, "{large} times whole");
}
