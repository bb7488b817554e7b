//! A capture for people and programs who look at it at once: one line per frame.

use std::fmt::{self, Write};

use serde::Serialize;

use super::pcapng::{COMMENT, PACKET};

/// One frame of a capture.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// `in` is into the switch, `out` out of it.
    pub direction: &'static str,
    /// The queue pair.
    pub queue: u32,
    /// Where it comes from.
    pub source: String,
    /// Where it goes to.
    pub destination: String,
    /// The outer tag's VLAN.
    pub vlan: Option<u16>,
    /// What it carries, behind all tags.
    pub ether_type: Option<u16>,
    /// Its length.
    pub bytes: u32,
    /// Why it was dropped.
    pub dropped: Option<String>,
}

/// Takes whole frames out of `bytes`, a pcapng file in its making.
pub fn lines(bytes: &mut Vec<u8>) -> Vec<Line> {
    let mut lines = Vec::new();
    let mut at = 0usize;
    while let Some(rest) = bytes.get(at..) {
        let (Some(kind), Some(len)) = (word(rest, 0), word(rest, 4)) else { break };
        let len = len as usize;
        let Some(block) = rest.get(..len).filter(|_| len >= 12) else { break };
        if kind == PACKET {
            lines.extend(line(block));
        }
        at = at.saturating_add(len);
    }
    drop(bytes.drain(..at.min(bytes.len())));
    lines
}

fn line(block: &[u8]) -> Option<Line> {
    let interface = word(block, 8)?;
    let time_ns = u64::from(word(block, 12)?) << 32 | u64::from(word(block, 16)?);
    let captured = word(block, 20)? as usize;
    let bytes = word(block, 24)?;
    let frame = block.get(28..)?.get(..captured)?;
    let options = block.get(28usize.checked_add(captured.next_multiple_of(4))?..)?;
    let (mut queue, mut dropped) = (0, None);
    let mut rest = options;
    while let Some([code, code2, len, len2]) = rest.first_chunk::<4>().copied() {
        let len = usize::from(u16::from_le_bytes([len, len2]));
        let value = rest.get(4..)?.get(..len)?;
        match u16::from_le_bytes([code, code2]) {
            0 => break,
            COMMENT => dropped = Some(String::from_utf8_lossy(value).into_owned()),
            6 => queue = word(value, 0)?,
            _ => {}
        }
        rest = rest.get(4usize.checked_add(len.next_multiple_of(4))?..)?;
    }
    let (vlan, ether_type) = types(frame);
    Some(Line {
        time_ns,
        direction: if interface == 0 { "in" } else { "out" },
        queue,
        source: mac(frame.get(6..12).unwrap_or_default()),
        destination: mac(frame.get(..6).unwrap_or_default()),
        vlan,
        ether_type,
        bytes,
        dropped: dropped.map(|text| text.trim_start_matches("dropped: ").to_owned()),
    })
}

fn types(frame: &[u8]) -> (Option<u16>, Option<u16>) {
    let half = |at: usize| -> Option<u16> {
        frame.get(at..)?.first_chunk().copied().map(u16::from_be_bytes)
    };
    let (mut at, mut vlan) = (12usize, None);
    while let Some(0x8100 | 0x88a8) = half(at) {
        vlan = vlan.or(half(at.saturating_add(2)).map(|tag| tag & 0x0fff));
        at = at.saturating_add(4);
    }
    (vlan, half(at))
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn mac(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (number, byte) in bytes.iter().enumerate() {
        let colon = if number == 0 { "" } else { ":" };
        let _ = write!(text, "{colon}{byte:02x}");
    }
    text
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (seconds, nanos) = (self.time_ns / 1_000_000_000, self.time_ns % 1_000_000_000);
        let (hours, minutes) = (seconds / 3600 % 24, seconds / 60 % 60);
        let Self { direction, queue, source, destination, bytes, .. } = self;
        write!(f, "{hours:02}:{minutes:02}:{:02}.{nanos:09} ", seconds % 60)?;
        write!(f, "{direction:<3} q{queue} {source} > {destination}")?;
        if let Some(vlan) = self.vlan {
            write!(f, " vlan {vlan}")?;
        }
        match self.ether_type {
            Some(0x0800) => f.write_str(" IPv4")?,
            Some(0x0806) => f.write_str(" ARP")?,
            Some(0x86dd) => f.write_str(" IPv6")?,
            Some(other) => write!(f, " type {other:#06x}")?,
            None => {}
        }
        write!(f, ", {bytes} bytes")?;
        if let Some(dropped) = &self.dropped {
            write!(f, ", dropped: {dropped}")?;
        }
        Ok(())
    }
}
