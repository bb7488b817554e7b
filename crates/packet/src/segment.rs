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
/// Without options.
const TCP_HEADER: usize = 20;
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: u32 = 40;
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

    /// Where both addresses of the IP header are.
    #[inline]
    pub(crate) fn addresses(&self) -> Range<usize> {
        let (from, to): (usize, usize) = match self.family {
            Family::V4 => (12, 20),
            Family::V6 => (8, 40),
        };
        self.l3.saturating_add(from)..self.l3.saturating_add(to)
    }

    /// Where both ports are.
    pub(crate) fn ports(&self) -> Range<usize> {
        self.l4..self.l4.saturating_add(4)
    }

    /// The sum of the pseudo header without the length.
    pub(crate) fn pseudo(&self, header: &[u8]) -> Checksum {
        let mut sum = Checksum::default();
        sum.add_header(header.get(self.addresses()).unwrap_or_default());
        sum.add_u16(u16::from(if self.tcp { TCP } else { UDP }));
        sum
    }
}

/// A large frame, ready to be cut.
#[derive(Debug, Clone)]
pub struct Cut {
    /// The headers of a segment between the first and the last one, but for what tells it from its
    /// like.
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
    /// Of the first segment: the IPv4 identification, the TCP sequence number and the TCP flags.
    id: u16,
    sequence: u32,
    flags: u8,
    /// Sum of the IPv4 header of a segment that is not the last one, without the identification.
    network_sum: u16,
    /// Sum of the addresses and the protocol.
    pseudo_sum: Checksum,
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
            id: 0,
            sequence: 0,
            flags: 0,
            network_sum: 0,
            pseudo_sum: Checksum::default(),
        };
        let fits = usize::try_from(size).unwrap_or(usize::MAX).saturating_add(header_len)
            <= usize::from(u16::MAX);
        if size == 0 || !fits || count > SEGMENTS_MAX {
            return Err(CutError::Size);
        }
        cut.prepare();
        Ok(cut)
    }

    /// Does once what is the same for all segments.
    fn prepare(&mut self) {
        self.pseudo_sum = self.headers().pseudo(&self.header);
        let mut whole = self.header;
        let header = whole.get_mut(..self.header_len).unwrap_or_default();
        let (network, upper) = header.split_at_mut_checked(self.l4).unwrap_or_default();
        if self.family == Family::V4 {
            let network = network.get_mut(self.l3..).unwrap_or_default();
            self.id = get(network, 4);
            put(network, 4, 0);
            put(network, 10, 0);
        }
        if self.tcp {
            let sequence = upper.get(4..).and_then(<[u8]>::first_chunk).copied();
            self.sequence = sequence.map_or(0, u32::from_be_bytes);
            if let Some(flags) = upper.get_mut(TCP_FLAGS) {
                self.flags = *flags;
                *flags &= !(FIN | PSH | CWR);
            }
        }
        self.network_sum = self.write_lengths(header, self.size.min(self.payload));
        self.header = whole;
    }

    /// Writes the lengths of a segment with that much payload, and the sum of the pseudo header.
    /// Returns the sum of an IPv4 header that has neither identification nor checksum.
    #[inline(never)]
    fn write_lengths(&self, header: &mut [u8], payload: u32) -> u16 {
        let (network, upper) = header.split_at_mut_checked(self.l4).unwrap_or_default();
        let l4_len = u32::try_from(upper.len()).unwrap_or(0).wrapping_add(payload);
        let network = network.get_mut(self.l3..).unwrap_or_default();
        let packet = u32::try_from(network.len()).unwrap_or(0).wrapping_add(l4_len);
        match self.family {
            Family::V4 => put(network, 2, low(packet)),
            // Extension headers are part of the payload.
            Family::V6 => put(network, 4, low(packet.wrapping_sub(IPV6_HEADER))),
        }
        if !self.tcp {
            put(upper, 4, low(l4_len));
        }
        let mut sum = self.pseudo_sum;
        sum.add_u32(l4_len);
        put(upper, self.checksum_offset(), sum.sum());
        let mut sum = Checksum::default();
        sum.add(network);
        sum.sum()
    }

    /// Number of segments: at least one.
    #[inline]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Bytes of the payload of a segment that is not the last one.
    #[inline]
    pub fn size(&self) -> u32 {
        self.size
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

    /// Bytes of the payload of segment `index`.
    #[inline]
    pub fn payload_len(&self, index: u32) -> u32 {
        self.payload.saturating_sub(index.saturating_mul(self.size)).min(self.size)
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
        self.tcp && self.flags & CWR != 0
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
    pub fn write_header(&self, index: u32, payload: Option<Checksum>, to: &mut [u8]) {
        let Some(header) = self.header.get(..self.header_len) else { return };
        if to.len() != header.len() {
            return;
        }
        copy_short(header, to);
        let network_sum = self.write_end(index, to);
        self.write_numbers(index, network_sum, to);
        if let Some(mut sum) = payload {
            let upper = to.get_mut(self.l4..).unwrap_or_default();
            // The payload's length need not be even, its folded sum is. The field holds the sum of
            // the pseudo header.
            sum = Checksum::of_part(sum.sum());
            sum.add(upper);
            let value = if self.tcp { sum.finish() } else { sum.finish_transport() };
            put(upper, self.checksum_offset(), value);
        }
    }

    #[inline]
    fn checksum_offset(&self) -> usize {
        if self.tcp { TCP_CHECKSUM } else { UDP_CHECKSUM }
    }

    /// As [`Self::write_header`] without a sum, of a segment that is neither the first nor the last
    /// one.
    #[inline]
    pub fn write_between(&self, index: u32, to: &mut [u8]) {
        if let Some(header) = self.header.get(..self.header_len)
            && to.len() == header.len()
        {
            copy_short(header, to);
            self.write_numbers(index, self.network_sum, to);
        }
    }

    /// Writes what tells the first and the last segment from those between them. Returns the sum
    /// of the IPv4 header without the identification.
    fn write_end(&self, index: u32, to: &mut [u8]) -> u16 {
        let last = index.wrapping_add(1) >= self.count;
        let not_last = if last { !0 } else { !(FIN | PSH) };
        let not_first = if index == 0 { !0 } else { !CWR };
        let upper = to.get_mut(self.l4..).unwrap_or_default();
        if self.tcp
            && let Some(flags) = upper.get_mut(TCP_FLAGS)
        {
            *flags = self.flags & not_last & not_first;
        }
        if last { self.write_lengths(to, self.payload_len(index)) } else { self.network_sum }
    }

    /// Writes what tells segments from each other, given the sum of the IPv4 header without the
    /// identification. What was just written is not read again: to read less than what was written
    /// at once has to wait for it.
    #[inline(always)]
    fn write_numbers(&self, index: u32, sum: u16, to: &mut [u8]) {
        if self.family == Family::V4
            && let Some(ip) = to.get_mut(self.l3..).and_then(<[u8]>::first_chunk_mut)
        {
            let ip: &mut [u8; IPV4_HEADER] = ip;
            let id = self.id.wrapping_add(low(index));
            let sum = u32::from(sum).wrapping_add(u32::from(id));
            [ip[4], ip[5]] = id.to_be_bytes();
            [ip[10], ip[11]] = (!low(sum.wrapping_add(sum >> 16))).to_be_bytes();
        }
        if self.tcp
            && let Some(tcp) = to.get_mut(self.l4..).and_then(<[u8]>::first_chunk_mut)
        {
            let tcp: &mut [u8; TCP_HEADER] = tcp;
            let sequence = self.sequence.wrapping_add(index.wrapping_mul(self.size));
            [tcp[4], tcp[5], tcp[6], tcp[7]] = sequence.to_be_bytes();
        }
    }
}

/// Copies a header, most of them without a call: as a first and a last block that may share their
/// middle. Both have one length.
#[inline(always)]
fn copy_short(from: &[u8], to: &mut [u8]) {
    match from.len() {
        32..=63 => copy_ends::<32>(from, to),
        64..=CUT_HEADER_MAX => copy_ends::<64>(from, to),
        _ => to.copy_from_slice(from),
    }
}

#[inline(always)]
fn copy_ends<const N: usize>(from: &[u8], to: &mut [u8]) {
    if let (Some(from), Some(to)) = (from.first_chunk::<N>(), to.first_chunk_mut::<N>()) {
        *to = *from;
    }
    if let (Some(from), Some(to)) = (from.last_chunk::<N>(), to.last_chunk_mut::<N>()) {
        *to = *from;
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
