//! Putting segments together again: what [`crate::Cut`] takes apart.
//!
//! ```text
//!  header │ 1448      header │ 1448      header │ 600 (or PSH, or FIN: the last one)
//!     └─────────┴────────────────┴────────────────┴──► header, rewritten │ 1448 │ 1448 │ 600
//! ```
//!
//! Two segments go together if they are of one flow, follow one another, and cutting the whole
//! gives both again: all that differs between their headers is what a cut writes anew.
//!
//! **Trust.** Headers may contradict themselves or their frame: such a frame is no [`Segment`].
//! That the checksum over the payload is right is for the caller to know, as it is lost here.
//! **Not supported.** What [`crate::Cut`] does not cut; UDP without a checksum.

use crate::segment::{FIN, Family, Headers, PSH, TCP_FLAGS, get, low, put};
use crate::{CUT_HEADER_MAX, Checksum, CutKind};

/// The largest number in the length field of an IP header.
const PACKET_MAX: u32 = 65_535;
const SYN: u8 = 2;
const RST: u8 = 4;
const ACK: u8 = 16;
const URG: u8 = 32;
const CWR: u8 = 128;
const IPV6: usize = 40;
/// Bytes of headers that are compared at once.
const CHUNK: usize = 16;

/// A frame that may be a part of a larger one.
#[derive(Debug, Clone, Copy)]
pub struct Segment<'a> {
    header: &'a [u8],
    headers: Headers,
    /// Bytes of payload.
    payload: u32,
}

impl<'a> Segment<'a> {
    /// The frame of `frame_len` bytes that begins with `head`, if it has a payload, its lengths are
    /// right, and it says nothing but "here is more".
    pub fn parse(head: &'a [u8], frame_len: u32) -> Option<Self> {
        let headers = Headers::parse(head).ok().filter(|h| h.len <= CUT_HEADER_MAX)?;
        let header = head.get(..headers.len)?;
        let payload = frame_len.checked_sub(u32::try_from(headers.len).ok()?)?;
        let network = header.get(headers.l3..headers.l4)?;
        let upper = header.get(headers.l4..)?;
        let packet = frame_len.checked_sub(u32::try_from(headers.l3).ok()?)?;
        let lengths = match headers.family {
            Family::V4 => u32::from(get(network, 2)) == packet && header_checksum(network) == 0,
            Family::V6 => u32::from(get(network, 4)).saturating_add(40) == packet,
        };
        let plain = if headers.tcp {
            let flags = upper.get(TCP_FLAGS)?;
            flags & (SYN | RST | ACK | URG) == ACK
        } else {
            let len = packet.checked_sub(u32::try_from(network.len()).ok()?)?;
            u32::from(get(upper, 4)) == len && get(upper, 6) != 0
        };
        (payload > 0 && lengths && plain).then_some(Self { header, headers, payload })
    }

    /// Bytes of its headers.
    pub fn header_len(&self) -> usize {
        self.headers.len
    }

    /// What its payload goes by.
    pub fn kind(&self) -> CutKind {
        self.headers.kind()
    }

    /// Where the checksummed part starts, and where from there its checksum is.
    pub fn checksum_place(&self) -> (u16, u16) {
        self.headers.checksum_place()
    }

    /// Whether the sender reduced its congestion window (ECN).
    pub fn has_cwr(&self) -> bool {
        self.flags() & CWR != 0
    }

    /// The sum of its pseudo header and of `head` from the TCP or UDP header on: what it was parsed
    /// from, or only the headers. With the rest of the payload added it finishes to 0 if the
    /// checksum is right.
    pub fn sum(&self, head: &[u8]) -> Checksum {
        let Headers { l4, len, .. } = self.headers;
        let mut sum = self.headers.pseudo(self.header);
        let upper_len = u32::try_from(len.saturating_sub(l4)).unwrap_or(0);
        sum.add_u32(upper_len.saturating_add(self.payload));
        sum.add_header(head.get(l4..).unwrap_or_default());
        sum
    }

    /// TCP's flags; none of UDP.
    fn flags(&self) -> u8 {
        let at = self.headers.l4.saturating_add(TCP_FLAGS);
        if self.headers.tcp { self.header.get(at).copied().unwrap_or(0) } else { 0 }
    }

    fn is_last(&self) -> bool {
        self.flags() & (PSH | FIN) != 0
    }

    fn sequence(&self) -> u32 {
        let field = self.header.get(self.headers.l4.saturating_add(4)..);
        field.and_then(<[u8]>::first_chunk).copied().map_or(0, u32::from_be_bytes)
    }

    /// The IPv4 identification, if it counts: the packet may be fragmented on its way.
    fn id(&self) -> Option<u16> {
        let network = self.header.get(self.headers.l3..)?;
        let counts = self.headers.family == Family::V4 && get(network, 6) & 0x4000 == 0;
        counts.then(|| get(network, 4))
    }

    /// The bits of the headers that a cut leaves as they are.
    fn mask(&self) -> [u8; CUT_HEADER_MAX] {
        let mut mask = [0; CUT_HEADER_MAX];
        if let Some(header) = mask.get_mut(..self.headers.len) {
            header.fill(!0);
        }
        let (network, upper) = mask.split_at_mut_checked(self.headers.l4).unwrap_or_default();
        let network = network.get_mut(self.headers.l3..).unwrap_or_default();
        match self.headers.family {
            Family::V4 => [2, 4, 10].into_iter().for_each(|at| put(network, at, 0)),
            Family::V6 => put(network, 4, 0),
        }
        if self.headers.tcp {
            [4, 6, 16].into_iter().for_each(|at| put(upper, at, 0));
            if let Some(flags) = upper.get_mut(TCP_FLAGS) {
                *flags = !(FIN | PSH | CWR);
            }
        } else {
            [4, 6].into_iter().for_each(|at| put(upper, at, 0));
        }
        mask
    }

    /// Whether both are of one flow, whatever tags and options they have.
    fn is_of_the_flow_of(&self, other: &Merge) -> bool {
        let (own, others) = (&self.headers, &other.headers);
        (own.family, own.tcp) == (others.family, others.tcp)
            && self.header.get(own.addresses()) == other.header.get(others.addresses())
            && self.header.get(own.ports()) == other.header.get(others.ports())
    }
}

/// How a segment stands to those that were put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fit {
    /// It goes on where they end.
    Follows,
    /// It is of the same flow, and does not go on: they are complete.
    Ends,
    /// It is of another flow.
    Other,
}

/// Segments that are put together.
#[derive(Debug, Clone)]
pub struct Merge {
    /// Of the first one, and which of its bits all have.
    header: [u8; CUT_HEADER_MAX],
    mask: [u8; CUT_HEADER_MAX],
    headers: Headers,
    /// Bytes of payload of each segment but the last.
    size: u32,
    /// Bytes of payload of all.
    payload: u32,
    /// Where the next one begins.
    sequence: u32,
    id: Option<u16>,
    /// FIN and PSH of the last one.
    flags: u8,
    cwr: bool,
    complete: bool,
}

impl Merge {
    /// Begins with one segment.
    pub fn begin(first: &Segment<'_>) -> Self {
        let mut header = [0; CUT_HEADER_MAX];
        if let Some(to) = header.get_mut(..first.header.len()) {
            to.copy_from_slice(first.header);
        }
        Self {
            header,
            mask: first.mask(),
            headers: first.headers,
            size: first.payload,
            payload: first.payload,
            sequence: first.sequence().wrapping_add(first.payload),
            id: first.id().map(|id| id.wrapping_add(1)),
            flags: 0,
            cwr: first.has_cwr(),
            complete: first.is_last(),
        }
    }

    /// How `next` stands to what is there.
    pub fn fit(&self, next: &Segment<'_>) -> Fit {
        if !self.is_like(next) {
            return if next.is_of_the_flow_of(self) { Fit::Ends } else { Fit::Other };
        }
        let before = u32::try_from(self.headers.len.saturating_sub(self.headers.l3)).unwrap_or(0);
        let packet = before.saturating_add(self.payload).saturating_add(next.payload);
        let follows = !self.complete
            && next.payload <= self.size
            && packet <= PACKET_MAX
            && (!self.headers.tcp || next.sequence() == self.sequence)
            && next.id() == self.id
            && !next.has_cwr();
        if follows { Fit::Follows } else { Fit::Ends }
    }

    /// Whether the headers are the same but for what a cut writes anew. So is the flow, then.
    #[inline(always)]
    fn is_like(&self, next: &Segment<'_>) -> bool {
        if next.headers != self.headers {
            return false;
        }
        let differs = |next: &[u8; CHUNK], header: &[u8; CHUNK], mask: &[u8; CHUNK]| {
            let differing = u128::from_ne_bytes(*next) ^ u128::from_ne_bytes(*header);
            differing & u128::from_ne_bytes(*mask)
        };
        let (chunks, _) = next.header.as_chunks::<CHUNK>();
        let all = chunks.iter().zip(self.header.as_chunks().0).zip(self.mask.as_chunks().0);
        let whole = all.fold(0, |all, ((next, own), mask)| all | differs(next, own, mask));
        // The rest are the last bytes of a chunk that begins earlier.
        let last = |header: &[u8]| header.get(..self.headers.len)?.last_chunk().copied();
        match (last(next.header), last(&self.header), last(&self.mask)) {
            (Some(next), Some(own), Some(mask)) => whole | differs(&next, &own, &mask) == 0,
            _ => false,
        }
    }

    /// Adds a segment that [`Fit::Follows`].
    pub fn add(&mut self, next: &Segment<'_>) {
        self.payload = self.payload.saturating_add(next.payload);
        self.sequence = self.sequence.wrapping_add(next.payload);
        self.id = next.id().map(|id| id.wrapping_add(1));
        self.flags = next.flags() & (FIN | PSH);
        self.complete = next.payload < self.size || next.is_last();
    }

    /// Bytes of the headers.
    pub fn header_len(&self) -> usize {
        self.headers.len
    }

    /// What the payload goes by.
    pub fn kind(&self) -> CutKind {
        self.headers.kind()
    }

    /// Where the checksummed part starts, and where from there its checksum is.
    pub fn checksum_place(&self) -> (u16, u16) {
        self.headers.checksum_place()
    }

    /// Whether the first segment said that its sender reduced its congestion window (ECN).
    pub fn has_cwr(&self) -> bool {
        self.cwr
    }

    /// Bytes of payload of a segment.
    pub fn size(&self) -> u16 {
        low(self.size)
    }

    /// Makes `head`, which begins with the headers of the first segment, the head of all; its
    /// checksum field holds the sum of the pseudo header.
    pub fn write(&self, head: &mut [u8]) {
        let Headers { l3, l4, len, family, tcp } = self.headers;
        let Some(header) = head.get_mut(..len) else { return };
        let upper_len = u32::try_from(len.saturating_sub(l4)).unwrap_or(0);
        let l4_len = upper_len.saturating_add(self.payload);
        let mut sum = self.headers.pseudo(header);
        sum.add_u32(l4_len);
        let (network, upper) = header.split_at_mut_checked(l4).unwrap_or_default();
        let network = network.get_mut(l3..).unwrap_or_default();
        let network_len = u32::try_from(network.len()).unwrap_or(0);
        match family {
            Family::V4 => {
                put(network, 2, low(network_len.saturating_add(l4_len)));
                put(network, 10, 0);
                let sum = header_checksum(network);
                put(network, 10, sum);
            }
            Family::V6 => {
                let extensions = network.len().saturating_sub(IPV6);
                let extensions = u32::try_from(extensions).unwrap_or(0);
                put(network, 4, low(extensions.saturating_add(l4_len)));
            }
        }
        if tcp {
            if let Some(flags) = upper.get_mut(TCP_FLAGS) {
                *flags |= self.flags;
            }
            put(upper, 16, sum.sum());
        } else {
            put(upper, 4, low(l4_len));
            put(upper, 6, sum.sum());
        }
    }
}

fn header_checksum(header: &[u8]) -> u16 {
    let mut sum = Checksum::default();
    sum.add_header(header);
    sum.finish()
}

#[cfg(test)]
mod tests;
