//! Offload intent: what the sender left for the receiver, or for us, to do.

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
