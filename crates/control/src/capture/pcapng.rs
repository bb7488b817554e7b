//! A capture as a pcapng file: draft-ietf-opsawg-pcapng.
//!
//! Two interfaces: 0 is what goes into the switch, 1 what goes out of it; and each frame's flags
//! say inbound or outbound. Times are nanoseconds. A frame that was dropped has a comment that says
//! why. Statistics stand at the end.

use port::capture::{CaptureSettings, CaptureTotals, Captured, Direction};

const SECTION: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const STATISTICS: u32 = 5;
/// An enhanced packet block.
pub const PACKET: u32 = 6;
const MAGIC: u32 = 0x1a2b_3c4d;
const ETHERNET: u16 = 1;
/// Options of every block.
pub const COMMENT: u16 = 1;
const END_OF_OPTIONS: u16 = 0;
/// Options of a section.
const USER_APPLICATION: u16 = 4;
/// Options of an interface.
const NAME: u16 = 2;
const DESCRIPTION: u16 = 3;
const RESOLUTION: u16 = 9;
const FILTER: u16 = 11;
/// Options of a packet.
const FLAGS: u16 = 2;
const QUEUE: u16 = 6;
/// Options of statistics.
const RECEIVED: u16 = 4;
const DROPPED: u16 = 5;
const ACCEPTED: u16 = 6;
const DELIVERED: u16 = 8;

/// Writes what a file begins with.
pub fn begin(out: &mut Vec<u8>, port: &str, filter: &str, settings: &CaptureSettings) {
    block(out, SECTION, |out| {
        out.extend(MAGIC.to_le_bytes());
        out.extend(1u16.to_le_bytes());
        out.extend(0u16.to_le_bytes());
        out.extend(u64::MAX.to_le_bytes());
        option(out, USER_APPLICATION, concat!("causeway ", env!("CARGO_PKG_VERSION")).as_bytes());
        option(out, END_OF_OPTIONS, &[]);
    });
    for (direction, what) in [("in", "into the switch"), ("out", "out of the switch")] {
        block(out, INTERFACE, |out| {
            out.extend(ETHERNET.to_le_bytes());
            out.extend(0u16.to_le_bytes());
            out.extend(settings.snaplen.to_le_bytes());
            option(out, NAME, format!("{port}:{direction}").as_bytes());
            option(out, DESCRIPTION, format!("port {port}, {what}").as_bytes());
            // Ten to the minus ninth.
            option(out, RESOLUTION, &[9]);
            if !filter.is_empty() {
                // A text as pcap would have it.
                option(out, FILTER, &[&[0], filter.as_bytes()].concat());
            }
            option(out, END_OF_OPTIONS, &[]);
        });
    }
}

/// Writes a frame.
pub fn frame(out: &mut Vec<u8>, captured: &Captured<'_>) {
    block(out, PACKET, |out| {
        out.extend(interface(captured.direction).to_le_bytes());
        time(out, captured.time_ns);
        out.extend(u32::try_from(captured.data.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend(captured.frame_bytes.to_le_bytes());
        out.extend_from_slice(captured.data);
        pad(out, captured.data.len());
        let flags = match captured.direction {
            Direction::In => 1u32,
            Direction::Out => 2,
        };
        option(out, FLAGS, &flags.to_le_bytes());
        option(out, QUEUE, &u32::from(captured.pair).to_le_bytes());
        if let Some(reason) = captured.dropped {
            let comment = format!("dropped: {}: {}", reason.name(), reason.text());
            option(out, COMMENT, comment.as_bytes());
        }
        option(out, END_OF_OPTIONS, &[]);
    });
}

/// Writes the statistics of one direction: what passed, and how much of it was written.
pub fn statistics(
    out: &mut Vec<u8>,
    direction: Direction,
    time_ns: u64,
    totals: &CaptureTotals,
    captured: u64,
) {
    block(out, STATISTICS, |out| {
        out.extend(interface(direction).to_le_bytes());
        time(out, time_ns);
        let counts = [
            (RECEIVED, totals.seen),
            (DROPPED, totals.skipped),
            (ACCEPTED, totals.accepted),
            (DELIVERED, captured),
        ];
        for (code, count) in counts {
            option(out, code, &count.to_le_bytes());
        }
        option(out, END_OF_OPTIONS, &[]);
    });
}

fn interface(direction: Direction) -> u32 {
    match direction {
        Direction::In => 0,
        Direction::Out => 1,
    }
}

/// The upper half first, whatever the byte order.
fn time(out: &mut Vec<u8>, time_ns: u64) {
    let [a, b, c, d, e, f, g, h] = time_ns.to_le_bytes();
    out.extend([e, f, g, h, a, b, c, d]);
}

/// A block: type, length, what `fill` writes, length.
fn block(out: &mut Vec<u8>, kind: u32, fill: impl FnOnce(&mut Vec<u8>)) {
    let begin = out.len();
    out.extend(kind.to_le_bytes());
    out.extend([0; 4]);
    fill(out);
    let whole = out.len().saturating_sub(begin).saturating_add(4);
    let len = u32::try_from(whole).unwrap_or(u32::MAX).to_le_bytes();
    out.extend(len);
    let at = begin.saturating_add(4);
    if let Some(place) = out.get_mut(at..at.saturating_add(4)) {
        place.copy_from_slice(&len);
    }
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    let value = value.get(..usize::from(u16::MAX)).unwrap_or(value);
    out.extend(code.to_le_bytes());
    out.extend(u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
    out.extend_from_slice(value);
    pad(out, value.len());
}

/// Fills up to a multiple of four.
fn pad(out: &mut Vec<u8>, len: usize) {
    out.extend(std::iter::repeat_n(0, len.wrapping_neg() % 4));
}
