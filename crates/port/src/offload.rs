//! Offload intent: what the sender left for the receiver, or for us, to do.
//!
//! **Trust.** What a sender says is checked against the frame's private head before anybody relies
//! on it ([`Offload::checked`]): a checksum can only be in what is behind the Ethernet and IP
//! headers, and in the head; a frame to be cut is what the intent says that it is.
//! **Not supported.** SCTP's checksum is a `CRC32c`: whoever finished it as an Internet checksum
//! would break the frame, so what leaves it undone is refused.

use packet::{Cut, CutKind, ethertype, network_offset};

/// Where SCTP has its checksum, and no other protocol has one.
const SCTP_CHECKSUM: u16 = 8;

/// Kind of a frame that is still to be cut into segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(u8)]
pub enum Gso {
    /// An ordinary frame.
    #[default]
    None,
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP, cut into datagrams (USO).
    UdpL4,
}

/// What is left to do. Offsets count from the start of the frame, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[repr(C)]
pub struct Offload {
    /// The checksum at `csum_start + csum_offset` covers `csum_start` to the end and is not
    /// computed yet.
    pub needs_csum: bool,
    /// The checksums were verified by somebody that the receiver may trust.
    pub data_valid: bool,
    /// The TCP segment has ECN's CWR set (`VIRTIO_NET_HDR_GSO_ECN`).
    pub ecn: bool,
    /// Segmentation to do.
    pub gso: Gso,
    /// Bytes of headers, a hint.
    pub hdr_len: u16,
    /// Payload bytes of a segment.
    pub gso_size: u16,
    /// Where the checksummed part starts.
    pub csum_start: u16,
    /// Where the checksum is, from `csum_start`.
    pub csum_offset: u16,
}

impl Offload {
    /// The intent after `by` bytes were inserted before the checksummed part (or removed).
    #[inline]
    #[must_use]
    pub fn shifted(self, by: i16) -> Self {
        let shift = |x: u16| x.saturating_add_signed(by);
        Self {
            csum_start: if self.needs_csum { shift(self.csum_start) } else { self.csum_start },
            hdr_len: if self.gso == Gso::None { self.hdr_len } else { shift(self.hdr_len) },
            ..self
        }
    }

    /// What is true of this intent for a frame of `frame_len` bytes that begins with `head`. Hints
    /// are made right (header length, ECN, segmentation of what is one segment anyway); `None` if
    /// it contradicts the frame.
    pub fn checked(self, head: &[u8], frame_len: u32) -> Option<Self> {
        if self.is_none() {
            return Some(Self { data_valid: self.data_valid, ..Self::default() });
        }
        if !self.needs_csum {
            // Segments need checksums of their own.
            return None;
        }
        let one = Self {
            needs_csum: true,
            csum_start: self.csum_start,
            csum_offset: self.csum_offset,
            ..Self::default()
        };
        if self.gso == Gso::None {
            return one.is_in_payload(head).then_some(one);
        }
        let cut = Cut::new(head, frame_len, self.gso_size).ok()?;
        let kind = match cut.kind() {
            CutKind::TcpV4 => Gso::TcpV4,
            CutKind::TcpV6 => Gso::TcpV6,
            CutKind::Udp => Gso::UdpL4,
        };
        if kind != self.gso || cut.checksum_place() != (self.csum_start, self.csum_offset) {
            return None;
        }
        if cut.count() == 1 {
            return Some(one);
        }
        let hdr_len = u16::try_from(cut.header_len()).ok()?;
        Some(Self { ecn: cut.has_cwr(), gso: kind, hdr_len, gso_size: self.gso_size, ..one })
    }

    /// Whether the checksum is an Internet checksum in `head`, and covers neither what the switch
    /// decides by nor what the network does.
    fn is_in_payload(&self, head: &[u8]) -> bool {
        if self.csum_offset == SCTP_CHECKSUM {
            return false;
        }
        let Some((l3, kind)) = network_offset(head) else { return false };
        let header = match kind {
            ethertype::IPV4 => 20,
            ethertype::IPV6 => 40,
            _ => 0,
        };
        let start = usize::from(self.csum_start);
        let end = start.saturating_add(usize::from(self.csum_offset)).saturating_add(2);
        start >= l3.saturating_add(header) && end <= head.len()
    }

    /// Whether there is nothing to do and nothing to tell.
    #[inline(always)]
    pub fn is_plain(&self) -> bool {
        // One comparison.
        let Self { needs_csum, data_valid, ecn, gso, .. } = *self;
        let all = [u8::from(needs_csum), u8::from(data_valid), u8::from(ecn), gso as u8];
        u32::from_ne_bytes(all) == 0
    }

    /// Whether there is nothing to do.
    #[inline(always)]
    pub fn is_none(&self) -> bool {
        !self.needs_csum && matches!(self.gso, Gso::None)
    }
}

/// Offloads that one side takes from the other: what may be left to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct OffloadSet {
    /// Partial checksums.
    pub csum: bool,
    /// TCP segmentation over IPv4.
    pub tso4: bool,
    /// TCP segmentation over IPv6.
    pub tso6: bool,
    /// ECN together with TCP segmentation.
    pub ecn: bool,
    /// UDP segmentation.
    pub uso: bool,
}

impl OffloadSet {
    /// Nothing: whole frames with finished checksums.
    pub const NONE: Self = Self { csum: false, tso4: false, tso6: false, ecn: false, uso: false };
    /// All there is.
    pub const ALL: Self = Self { csum: true, tso4: true, tso6: true, ecn: true, uso: true };

    /// Whether a side that takes these can be left with `offload`.
    #[inline(always)]
    pub fn takes(self, offload: &Offload) -> bool {
        offload.is_none() || self.takes_intent(offload)
    }

    #[inline]
    fn takes_intent(self, offload: &Offload) -> bool {
        let gso = match offload.gso {
            Gso::None => true,
            Gso::TcpV4 => self.tso4,
            Gso::TcpV6 => self.tso6,
            Gso::UdpL4 => self.uso,
        };
        gso && (self.csum || !offload.needs_csum) && (self.ecn || !offload.ecn)
    }
}

#[cfg(test)]
mod tests;
