//! The test frame: everything that a receiver needs to judge it is in it.
//!
//! ```text
//!  Ethernet 14 [802.1Q 4] │ IPv4 20 │ UDP 8 │ stamp 18 │ pattern … │ tail 4
//!                           id: salt          │          (from 22 B after UDP on)
//!                                    seq 4, flow 2, sent_ns 8, check 4
//! ```
//!
//! The pattern follows from the salt (the sender's buffer) and does not change, so that a sender
//! writes 22 bytes per frame; the salt tells mixed-up bodies apart, the tail, which repeats the
//! sequence number, mixed-up ends. The check covers stamp, salt, length and pattern.
//! The source port is 1024 + flow, the destination port the sender's run.
//!
//! **Limits.** 60 (tagged: 64) to 65535 bytes.

use crate::mac::MacAddr;

/// Bytes of IPv4 and UDP header.
const L3L4: usize = 28;
/// Bytes of the stamp.
pub(crate) const STAMP: usize = 18;
/// Bytes of the tail.
const TAIL: usize = 4;
/// The most bytes before the pattern.
pub(crate) const HEAD_MAX: usize = 18 + L3L4 + STAMP;
const FIRST_PORT: u16 = 1024;

/// What all frames of one sender have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sender {
    pub(crate) src: MacAddr,
    pub(crate) dst: MacAddr,
    pub(crate) vlan: Option<u16>,
    /// Tells this run of the sender from others.
    pub(crate) run: u16,
}

/// What changes from frame to frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp {
    pub(crate) seq: u32,
    pub(crate) flow: u16,
    pub(crate) sent_ns: u64,
}

/// A frame that was recognised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Sender and run: sequence numbers of a flow count within it.
    pub(crate) origin: u64,
    pub(crate) stamp: Stamp,
    pub(crate) salt: u16,
    /// Where the IPv4 header starts.
    l3: usize,
    /// Bytes that the frame should have.
    pub(crate) len: usize,
    check: u32,
}

impl Sender {
    /// Bytes before the IPv4 header.
    pub(crate) fn l3(&self) -> usize {
        if self.vlan.is_some() { 18 } else { 14 }
    }

    /// Writes the parts of a frame of `len` bytes that stay the same, pattern included.
    pub(crate) fn build(&self, frame: &mut Vec<u8>, len: usize, salt: u16) {
        frame.clear();
        frame.extend_from_slice(&self.dst.0);
        frame.extend_from_slice(&self.src.0);
        if let Some(vlan) = self.vlan {
            frame.extend_from_slice(&[0x81, 0]);
            frame.extend_from_slice(&vlan.to_be_bytes());
        }
        frame.extend_from_slice(&[8, 0]);
        frame.extend_from_slice(&self.ipv4(len, salt));
        frame.extend_from_slice(&FIRST_PORT.to_be_bytes());
        frame.extend_from_slice(&self.run.to_be_bytes());
        let udp = len.saturating_sub(self.l3()).saturating_sub(20);
        frame.extend_from_slice(&low16(udp).to_be_bytes());
        frame.extend_from_slice(&[0, 0]);
        frame.resize(frame.len().saturating_add(STAMP), 0);
        let pattern = len.saturating_sub(frame.len());
        push_pattern(frame, salt, pattern);
    }

    /// The IPv4 header of a frame of `len` bytes: it changes if sizes do.
    pub(crate) fn ipv4(&self, len: usize, salt: u16) -> [u8; 20] {
        let [_, _, _, d, e, f] = self.src.0;
        let [s1, s2] = salt.to_be_bytes();
        let [l1, l2] = low16(len.saturating_sub(self.l3())).to_be_bytes();
        let mut ip = [0x45, 0, l1, l2, s1, s2, 0x40, 0, 64, 17, 0, 0, 10, d, e, f, 10, 0, 0, 1];
        let sum = ipv4_checksum(&ip).to_be_bytes();
        if let Some(place) = ip.get_mut(10..12) {
            place.copy_from_slice(&sum);
        }
        ip
    }

    /// Where the source port is, which follows from the flow.
    pub(crate) fn port_at(&self) -> usize {
        self.l3().saturating_add(20)
    }

    /// Where the stamp is.
    pub(crate) fn stamp_at(&self) -> usize {
        self.l3().saturating_add(L3L4)
    }

    /// Where the pattern starts.
    pub(crate) fn pattern_at(&self) -> usize {
        self.stamp_at().saturating_add(STAMP)
    }
}

/// The source port of a flow.
pub(crate) fn port_of(flow: u16) -> [u8; 2] {
    FIRST_PORT.wrapping_add(flow).to_be_bytes()
}

impl Stamp {
    /// The bytes of the stamp for a frame of `len` bytes whose pattern has the hash `pattern`.
    #[inline]
    pub(crate) fn bytes(&self, len: usize, salt: u16, pattern: u32) -> [u8; STAMP] {
        let [s0, s1, s2, s3] = self.seq.to_be_bytes();
        let [f0, f1] = self.flow.to_be_bytes();
        let [t0, t1, t2, t3, t4, t5, t6, t7] = self.sent_ns.to_be_bytes();
        let [c0, c1, c2, c3] = self.check(len, salt, pattern).to_be_bytes();
        [s0, s1, s2, s3, f0, f1, t0, t1, t2, t3, t4, t5, t6, t7, c0, c1, c2, c3]
    }

    /// What the frame's last bytes are, if it has room for them.
    #[inline]
    pub(crate) fn tail(&self, pattern_len: usize) -> Option<[u8; TAIL]> {
        (pattern_len >= TAIL).then(|| (self.seq ^ 0x5aa5_c33c).to_be_bytes())
    }

    #[inline]
    fn check(&self, len: usize, salt: u16, pattern: u32) -> u32 {
        let a = u64::from(self.seq) << 32 | u64::from(self.flow) << 16 | u64::from(salt);
        let b = self.sent_ns ^ (len as u64).rotate_left(40) ^ u64::from(pattern) << 8;
        fold(mix(mix(0x9e37_79b9_7f4a_7c15, a), b))
    }
}

/// Recognises a test frame by its headers; the contents are not judged yet.
#[inline]
pub(crate) fn recognise(head: &[u8]) -> Option<Seen> {
    let l3 = match head.get(12..14)? {
        [8, 0] => 14,
        [0x81, 0] if head.get(16..18)? == [8, 0] => 18,
        _ => return None,
    };
    let rest = head.get(l3..)?;
    let (ip, rest) = rest.split_first_chunk::<20>()?;
    let (udp, rest) = rest.split_first_chunk::<8>()?;
    let (stamp, _) = rest.split_first_chunk::<STAMP>()?;
    let [0x45, 0, l1, l2, s1, s2, _, _, _, 17, _, _, 10, d, e, f, 10, 0, 0, 1] = *ip else {
        return None;
    };
    let [_, _, r1, r2, ..] = *udp;
    let [q1, q2, q3, q4, f1, f2, t @ .., c1, c2, c3, c4] = *stamp;
    let t: [u8; 8] = t;
    Some(Seen {
        origin: u64::from_be_bytes([0, 0, 0, d, e, f, r1, r2]),
        stamp: Stamp {
            seq: u32::from_be_bytes([q1, q2, q3, q4]),
            flow: u16::from_be_bytes([f1, f2]),
            sent_ns: u64::from_be_bytes(t),
        },
        salt: u16::from_be_bytes([s1, s2]),
        l3,
        len: l3.saturating_add(usize::from(u16::from_be_bytes([l1, l2]))),
        check: u32::from_be_bytes([c1, c2, c3, c4]),
    })
}

impl Seen {
    /// Whether `frame`, the whole of it, is what the sender sent.
    pub(crate) fn is_intact(&self, frame: &[u8]) -> bool {
        let l4 = self.l3.saturating_add(20);
        let pattern_at = l4.saturating_add(8).saturating_add(STAMP);
        let (Some(ip), Some(port), Some(pattern)) =
            (frame.get(self.l3..l4), frame.get(l4..l4.saturating_add(2)), frame.get(pattern_at..))
        else {
            return false;
        };
        if frame.len() != self.len || ipv4_checksum(ip) != 0 || port != port_of(self.stamp.flow) {
            return false;
        }
        let body = match self.stamp.tail(pattern.len()) {
            Some(tail) => match pattern.strip_suffix(&tail) {
                Some(body) => body,
                None => return false,
            },
            None => pattern,
        };
        self.check == self.stamp.check(frame.len(), self.salt, hash_pattern(body))
    }
}

/// The hash of the pattern of a frame with `pattern` bytes after the stamp, tail excluded.
pub(crate) fn hash_of_pattern(pattern: &[u8]) -> u32 {
    let end =
        if pattern.len() >= TAIL { pattern.len().saturating_sub(TAIL) } else { pattern.len() };
    hash_pattern(pattern.get(..end).unwrap_or_default())
}

fn push_pattern(out: &mut Vec<u8>, salt: u16, len: usize) {
    let end = out.len().saturating_add(len);
    let mut state = u64::from(salt).wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    while out.len() < end {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let room = end.saturating_sub(out.len()).min(8);
        out.extend(state.to_le_bytes().iter().take(room));
    }
}

/// Four lanes, so that the multiplications overlap.
fn hash_pattern(bytes: &[u8]) -> u32 {
    let mut lanes = [1u64, 2, 3, 4];
    let mut blocks = bytes.chunks_exact(32);
    for block in &mut blocks {
        for (lane, word) in lanes.iter_mut().zip(block.chunks_exact(8)) {
            let word = word.first_chunk::<8>().map_or(0, |w| u64::from_le_bytes(*w));
            *lane = mix(*lane, word);
        }
    }
    let mut sum = bytes.len() as u64;
    for byte in blocks.remainder() {
        sum = mix(sum, u64::from(*byte));
    }
    fold(lanes.into_iter().fold(sum, mix))
}

#[inline(always)]
fn mix(state: u64, word: u64) -> u64 {
    (state ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd).rotate_left(29)
}

#[expect(clippy::cast_possible_truncation, reason = "folding to the low half is the purpose")]
fn fold(state: u64) -> u32 {
    (state ^ (state >> 32)) as u32
}

#[expect(clippy::cast_possible_truncation, reason = "sizes are checked to be below 64 KiB")]
fn low16(value: usize) -> u16 {
    value as u16
}

fn ipv4_checksum(header: &[u8]) -> u16 {
    let words = header.chunks_exact(2).filter_map(|w| w.first_chunk::<2>());
    let mut sum = words.fold(0u32, |s, w| s.wrapping_add(u32::from(u16::from_be_bytes(*w))));
    while sum > 0xffff {
        sum = (sum & 0xffff).wrapping_add(sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::arithmetic_side_effects, reason = "test code")]

    use super::{Sender, Stamp, hash_of_pattern, port_of, recognise};
    use crate::mac::MacAddr;

    fn frame(len: usize, vlan: Option<u16>) -> (Vec<u8>, Stamp) {
        let sender =
            Sender { src: MacAddr([2, 0, 0, 7, 8, 9]), dst: MacAddr([2; 6]), vlan, run: 77 };
        let stamp = Stamp { seq: 0x0102_0304, flow: 3, sent_ns: 123_456_789 };
        let mut frame = Vec::new();
        sender.build(&mut frame, len, 5);
        assert_eq!(frame.len(), len);
        let pattern = frame[sender.pattern_at()..].to_vec();
        let bytes = stamp.bytes(len, 5, hash_of_pattern(&pattern));
        frame[sender.port_at()..sender.port_at() + 2].copy_from_slice(&port_of(3));
        frame[sender.stamp_at()..sender.pattern_at()].copy_from_slice(&bytes);
        if let Some(tail) = stamp.tail(pattern.len()) {
            frame[len - 4..].copy_from_slice(&tail);
        }
        (frame, stamp)
    }

    #[test]
    fn a_frame_is_recognised_and_intact() {
        for len in [60, 61, 63, 64, 65, 128, 1514, 9000, 65535] {
            for vlan in [None, Some(5)].into_iter().filter(|v| v.is_none() || len >= 64) {
                let (frame, stamp) = frame(len, vlan);
                let seen = recognise(&frame[..frame.len().min(super::HEAD_MAX)]).unwrap();
                assert_eq!((seen.stamp, seen.salt, seen.len), (stamp, 5, len));
                assert!(seen.is_intact(&frame), "{len} {vlan:?}");
            }
        }
    }

    /// Every byte that a switch must not change is covered; only the addresses and the tag, which
    /// it may rewrite, are not.
    #[test]
    fn any_changed_byte_is_found() {
        for len in [60, 64, 200] {
            let (good, _) = frame(len, None);
            for at in 14..len {
                let mut bad = good.clone();
                bad[at] ^= 0x10;
                let intact = recognise(&bad).is_some_and(|seen| seen.is_intact(&bad));
                let udp_rest = (36..42).contains(&at);
                assert!(!intact || udp_rest, "byte {at} of {len}");
            }
            assert!(!recognise(&good).unwrap().is_intact(&good[..len - 1]));
        }
    }

    #[test]
    fn foreign_frames_are_not_recognised() {
        assert!(recognise(&[0; 60]).is_none());
        assert!(recognise(&[]).is_none());
        let (good, _) = frame(64, None);
        assert!(recognise(&good[..59]).is_none());
    }
}
