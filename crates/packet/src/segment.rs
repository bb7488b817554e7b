//! Cutting a large frame into segments: what the sender left to its network card.
//!
//! ```text
//!  ┌ Ethernet, tags │ IP │ TCP or UDP ┐┌──────────── payload: up to 64 KiB ────────────┐
//!                 header               │ size │ size │ size │ … │ rest │
//!  each segment: the header, rewritten, and a range of the payload, which is never moved
//! ```
//!
//! **Trust.** The header may contradict itself or what it came with: every length and place is
//! checked in [`Cut::new`], and a `Cut` exists only for frames that can be cut.
//! **Limits.** At most [`CUT_HEADER_MAX`] bytes of header, and [`SEGMENTS_MAX`] segments.
//! **Not supported.** Tunnels, and IPv6 extension headers other than those that [`Ipv6`] knows.

use core::ops::Range;

use crate::ipv4::ip_protocol::{TCP, UDP};
use crate::{Checksum, Ethernet, Ipv4, Ipv6, VlanTag, ethertype};

/// The most bytes of headers of a frame that can be cut.
pub const CUT_HEADER_MAX: usize = 128;
/// The most segments of a frame.
pub const SEGMENTS_MAX: u32 = 65_535;

/// The most tags that are skipped.
const TAGS_MAX: usize = 3;
pub(crate) const FIN: u8 = 1;
pub(crate) const PSH: u8 = 8;
const CWR: u8 = 128;
const UDP_HEADER: usize = 8;
/// Where in the TCP and UDP headers the checksum is.
const TCP_CHECKSUM: usize = 16;
pub(crate) const TCP_FLAGS: usize = 13;
const UDP_CHECKSUM: usize = 6;

/// Why a frame cannot be cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutError {
    /// It is neither TCP nor UDP over IP, or a fragment.
    Protocol,
    /// Its headers are longer than [`CUT_HEADER_MAX`] or than the frame.
    Header,
    /// Segments of no bytes, or more than [`SEGMENTS_MAX`].
    Size,
}

/// What kind of segments a frame is cut into.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CutKind {
    /// TCP over IPv4.
    TcpV4,
    /// TCP over IPv6.
    TcpV6,
    /// UDP over IPv4 or IPv6.
    Udp,
}

/// Which address family carries the segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Family {
    V4,
    V6,
}

/// Where the headers of a TCP or UDP frame are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Headers {
    /// Where the IP header begins.
    pub(crate) l3: usize,
    /// Where the TCP or UDP header begins.
    pub(crate) l4: usize,
    /// Where the payload begins.
    pub(crate) len: usize,
    pub(crate) family: Family,
    pub(crate) tcp: bool,
}

impl Headers {
    pub(crate) fn parse(head: &[u8]) -> Result<Self, CutError> {
        let (l3, kind) = network_offset(head).ok_or(CutError::Protocol)?;
        let packet = head.get(l3..).unwrap_or_default();
        let (family, l4, protocol) = transport(kind, packet).ok_or(CutError::Protocol)?;
        let l4 = l3.saturating_add(l4);
        let upper = head.get(l4..).unwrap_or_default();
        let (tcp, upper_len) = match protocol {
            TCP => (true, tcp_header_len(upper).ok_or(CutError::Header)?),
            UDP => (false, UDP_HEADER),
            _ => return Err(CutError::Protocol),
        };
        let len = l4.saturating_add(upper_len);
        Ok(Self { l3, l4, len, family, tcp })
    }

    #[inline]
    pub(crate) fn kind(&self) -> CutKind {
        match (self.tcp, self.family) {
            (true, Family::V4) => CutKind::TcpV4,
            (true, Family::V6) => CutKind::TcpV6,
            (false, _) => CutKind::Udp,
        }
    }

    #[inline]
    pub(crate) fn checksum_place(&self) -> (u16, u16) {
        let offset = if self.tcp { TCP_CHECKSUM } else { UDP_CHECKSUM };
        (u16::try_from(self.l4).unwrap_or(u16::MAX), u16::try_from(offset).unwrap_or(u16::MAX))
    }

    /// The sum of the pseudo header without the length.
    pub(crate) fn pseudo(&self, header: &[u8]) -> Checksum {
        let (from, to): (usize, usize) = match self.family {
            Family::V4 => (12, 20),
            Family::V6 => (8, 40),
        };
        let addresses = self.l3.saturating_add(from)..self.l3.saturating_add(to);
        let mut sum = Checksum::default();
        sum.add(header.get(addresses).unwrap_or_default());
        sum.add_u16(u16::from(if self.tcp { TCP } else { UDP }));
        sum
    }
}

/// A large frame, ready to be cut.
#[derive(Debug, Clone)]
pub struct Cut {
    /// The headers as they came.
    header: [u8; CUT_HEADER_MAX],
    header_len: usize,
    /// Where the IP header begins.
    l3: usize,
    /// Where the TCP or UDP header begins.
    l4: usize,
    family: Family,
    tcp: bool,
    /// Bytes of payload of the frame.
    payload: u32,
    /// Bytes of payload of a segment.
    size: u32,
    /// Number of segments.
    count: u32,
    /// Sum of the IPv4 header, without what differs from segment to segment.
    network_sum: Checksum,
    /// Sum of the addresses, the protocol, and of the TCP or UDP header without what differs.
    upper_sum: Checksum,
}

/// One segment: its headers. [`Cut::range`] says what payload follows them.
#[derive(Debug, Clone, Copy)]
pub struct SegmentHeader {
    bytes: [u8; CUT_HEADER_MAX],
    len: usize,
}

impl SegmentHeader {
    /// The headers.
    #[inline]
    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.len).unwrap_or_default()
    }
}

impl Cut {
    /// Prepares to cut the frame of `frame_len` bytes that begins with `head` into segments with
    /// `size` bytes of payload each. `head` holds the headers, and may go on into the payload.
    ///
    /// # Errors
    ///
    /// [`CutError`] says what is wrong with the frame.
    pub fn new(head: &[u8], frame_len: u32, size: u16) -> Result<Self, CutError> {
        let Headers { l3, l4, len: header_len, family, tcp } = Headers::parse(head)?;
        let mut header = [0; CUT_HEADER_MAX];
        let (Some(to), Some(from)) = (header.get_mut(..header_len), head.get(..header_len)) else {
            return Err(CutError::Header);
        };
        to.copy_from_slice(from);
        let len = u32::try_from(header_len).unwrap_or(u32::MAX);
        let payload = frame_len.checked_sub(len).ok_or(CutError::Header)?;
        let size = u32::from(size);
        let (network_sum, upper_sum) = (Checksum::default(), Checksum::default());
        let count = payload.div_ceil(size.max(1)).max(1);
        let mut cut = Self {
            header,
            header_len,
            l3,
            l4,
            family,
            tcp,
            payload,
            size,
            count,
            network_sum,
            upper_sum,
        };
        let fits = usize::try_from(size).unwrap_or(usize::MAX).saturating_add(header_len)
            <= usize::from(u16::MAX);
        if size == 0 || !fits || count > SEGMENTS_MAX {
            return Err(CutError::Size);
        }
        cut.prepare();
        Ok(cut)
    }

    /// Sums once what all segments have in common.
    fn prepare(&mut self) {
        self.upper_sum = self.headers().pseudo(&self.header);
        let header = self.header.get_mut(..self.header_len).unwrap_or_default();
        let (network, upper) = header.split_at_mut_checked(self.l4).unwrap_or_default();
        let network = network.get_mut(self.l3..).unwrap_or_default();
        if self.family == Family::V4 {
            put(network, 2, 0);
            put(network, 10, 0);
            self.network_sum.add(network);
        }
        if !self.tcp {
            put(upper, 4, 0);
        }
        let place = if self.tcp { TCP_CHECKSUM } else { UDP_CHECKSUM };
        put(upper, place, 0);
    }

    /// Number of segments: at least one.
    #[inline]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of the headers.
    #[inline]
    pub fn header_len(&self) -> u32 {
        u32::try_from(self.header_len).unwrap_or(u32::MAX)
    }

    /// The payload of segment `index`, counted from the start of the frame.
    #[inline]
    pub fn range(&self, index: u32) -> Range<u32> {
        let place = |index: u32| {
            let offset = u64::from(index).saturating_mul(u64::from(self.size));
            u32::try_from(offset).unwrap_or(u32::MAX).min(self.payload)
        };
        let base = self.header_len();
        let (start, end) = (place(index), place(index.saturating_add(1)));
        base.saturating_add(start)..base.saturating_add(end)
    }

    /// Where the checksummed part of each segment starts, and where from there its checksum is.
    #[inline]
    pub fn checksum_place(&self) -> (u16, u16) {
        self.headers().checksum_place()
    }

    /// Whether it is TCP over IPv4, TCP over IPv6, or UDP over either.
    #[inline]
    pub fn kind(&self) -> CutKind {
        self.headers().kind()
    }

    #[inline]
    fn headers(&self) -> Headers {
        let Self { l3, l4, header_len: len, family, tcp, .. } = *self;
        Headers { l3, l4, len, family, tcp }
    }

    /// Whether the first segment will say that the sender reduced its congestion window (ECN).
    #[inline]
    pub fn has_cwr(&self) -> bool {
        let flags = self.header.get(self.l4.saturating_add(TCP_FLAGS));
        self.tcp && flags.is_some_and(|flags| flags & CWR != 0)
    }

    /// The headers of segment `index`, given the sum of its payload.
    pub fn header(&self, index: u32, payload: Checksum) -> SegmentHeader {
        let mut segment = SegmentHeader { bytes: self.header, len: self.header_len };
        let bytes = segment.bytes.get_mut(..self.header_len).unwrap_or_default();
        self.write_header(index, Some(payload), bytes);
        segment
    }

    /// Writes the headers of segment `index` to `to`, which has [`Self::header_len`] bytes (nothing
    /// is written otherwise), given the sum of its payload. Without that the checksum field holds
    /// the sum of the pseudo header: for who finishes checksums itself.
    #[inline]
    pub fn write_header(&self, index: u32, payload: Option<Checksum>, to: &mut [u8]) {
        let Some(header) = self.header.get(..self.header_len) else { return };
        if to.len() != header.len() {
            return;
        }
        to.copy_from_slice(header);
        let range = self.range(index);
        let payload_len = range.end.saturating_sub(range.start);
        let upper_len = self.header_len.saturating_sub(self.l4);
        let l4_len = u32::try_from(upper_len).unwrap_or(0).saturating_add(payload_len);
        let (network, upper) = to.split_at_mut_checked(self.l4).unwrap_or_default();
        let network = network.get_mut(self.l3..).unwrap_or_default();
        match self.family {
            Family::V4 => {
                let first = get(&self.header, self.l3.saturating_add(4));
                write_ipv4(network, (l4_len, first), index, self.network_sum);
            }
            Family::V6 => write_ipv6(network, l4_len),
        }
        let place = if self.tcp {
            let last = index.saturating_add(1) >= self.count;
            let as_it_came = self.header.get(self.l4..).unwrap_or_default();
            write_tcp((as_it_came, upper), index, index.wrapping_mul(self.size), last);
            TCP_CHECKSUM
        } else {
            put(upper, 4, low(l4_len));
            UDP_CHECKSUM
        };
        let mut sum = self.upper_sum;
        sum.add_u32(l4_len);
        let value = match payload {
            Some(payload) => {
                sum.add(upper);
                // The header's length is even; the payload's need not be, its folded sum is.
                sum.add_u16(payload.sum());
                if self.tcp { sum.finish() } else { sum.finish_transport() }
            }
            None => sum.sum(),
        };
        put(upper, place, value);
    }
}

/// Where the payload of an Ethernet frame begins, behind its tags, and of which type it is. At most
/// three tags are skipped.
#[inline]
pub fn network_offset(head: &[u8]) -> Option<(usize, u16)> {
    let ethernet = Ethernet::parse(head)?;
    let (mut kind, mut payload) = (ethernet.ethertype(), ethernet.payload());
    for _ in 0..TAGS_MAX {
        if kind != ethertype::VLAN && kind != ethertype::SERVICE_VLAN {
            break;
        }
        let tag = VlanTag::parse(payload)?;
        (kind, payload) = (tag.ethertype(), tag.payload());
    }
    Some((head.len().checked_sub(payload.len())?, kind))
}

/// The family, the bytes of the IP header with what is before TCP or UDP, and the protocol.
fn transport(kind: u16, packet: &[u8]) -> Option<(Family, usize, u8)> {
    match kind {
        ethertype::IPV4 => {
            let ip = Ipv4::parse(packet)?;
            (!ip.is_fragment()).then(|| (Family::V4, ip.header_len(), ip.protocol()))
        }
        ethertype::IPV6 => {
            let ip = Ipv6::parse(packet)?;
            let upper = ip.upper()?;
            // Both are parts of one slice: what is between their starts are the headers.
            let before = upper.payload.as_ptr().addr().checked_sub(packet.as_ptr().addr())?;
            (!upper.fragment).then_some((Family::V6, before, upper.protocol))
        }
        _ => None,
    }
}

fn tcp_header_len(upper: &[u8]) -> Option<usize> {
    let words = usize::from(upper.get(12)? >> 4);
    (words >= 5).then(|| words.saturating_mul(4))
}

/// `first` is the frame's own identification. What was written last is not read again here and in
/// [`write_tcp`]: reading less than what was written at once has to wait for it.
fn write_ipv4(network: &mut [u8], (l4_len, first): (u32, u16), index: u32, mut sum: Checksum) {
    let total = u32::try_from(network.len()).unwrap_or(0).saturating_add(l4_len);
    put(network, 2, low(total));
    let id = first.wrapping_add(low(index));
    put(network, 4, id);
    // The sum has the first number.
    sum.add_u16(!first);
    sum.add_u16(id);
    sum.add_u16(low(total));
    put(network, 10, sum.finish());
}

fn write_ipv6(network: &mut [u8], l4_len: u32) {
    // Extension headers are part of the payload.
    let extensions = network.len().saturating_sub(40);
    let payload = u32::try_from(extensions).unwrap_or(0).saturating_add(l4_len);
    put(network, 4, low(payload));
}

fn write_tcp((came, upper): (&[u8], &mut [u8]), index: u32, offset: u32, last: bool) {
    let sequence = came.get(4..).and_then(<[u8]>::first_chunk);
    let place = upper.get_mut(4..).and_then(<[u8]>::first_chunk_mut);
    if let (Some(sequence), Some(place)) = (sequence, place) {
        *place = u32::from_be_bytes(*sequence).wrapping_add(offset).to_be_bytes();
    }
    if let (Some(flags), Some(place)) = (came.get(TCP_FLAGS), upper.get_mut(TCP_FLAGS)) {
        *place =
            flags & (if last { !0 } else { !(FIN | PSH) }) & (if index == 0 { !0 } else { !CWR });
    }
}

pub(crate) fn low(value: u32) -> u16 {
    let [_, _, a, b] = value.to_be_bytes();
    u16::from_be_bytes([a, b])
}

pub(crate) fn get(bytes: &[u8], at: usize) -> u16 {
    let field = bytes.get(at..).and_then(<[u8]>::first_chunk);
    field.copied().map_or(0, u16::from_be_bytes)
}

pub(crate) fn put(bytes: &mut [u8], at: usize, value: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(<[u8]>::first_chunk_mut) {
        *field = value.to_be_bytes();
    }
}

#[cfg(test)]
pub(crate) mod tests;
