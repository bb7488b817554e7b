//! The 12 bytes before each frame of a tap: `struct virtio_net_hdr_v1`, little endian.
//!
//! **Trust.** The kernel wrote the header, but from what the network sent: values that contradict
//! each other are refused, ranges are checked by whoever acts on them.

use port::{Frame, Gso, Offload};
use virtq::mem::Reader;

/// Bytes of the header.
pub(crate) const HEADER: usize = 12;

/// Bytes of a header without the number of buffers.
pub(crate) const SHORT: usize = 10;

const NEEDS_CSUM: u8 = 1;
const DATA_VALID: u8 = 2;
const GSO_TCPV4: u8 = 1;
const GSO_TCPV6: u8 = 4;
const GSO_UDP_L4: u8 = 5;
const GSO_ECN: u8 = 0x80;

/// Whether the kernel takes `GSO_UDP_L4` in a header: Linux 6.2 and later do.
pub(crate) fn kernel_knows_uso() -> bool {
    kernel_is_since(6, 2)
}

/// Whether the running kernel is of that version or a later one.
pub(crate) fn kernel_is_since(major: u32, minor: u32) -> bool {
    version(&rustix::system::uname().release().to_string_lossy()) >= (major, minor)
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Bytes of the frame, or of its segments once somebody cuts it, which the MTU bounds.
#[inline(always)]
pub(crate) fn segment_bytes(frame: &Frame) -> u32 {
    match frame.offload.gso {
        Gso::None => frame.len(),
        Gso::TcpV4 | Gso::TcpV6 | Gso::UdpL4 => {
            u32::from(frame.offload.hdr_len).wrapping_add(u32::from(frame.offload.gso_size))
        }
    }
}

/// Header, head and body in one piece: a frame of more pieces than one call takes.
#[cold]
pub(crate) fn in_one_piece(header: &[u8], head: &[u8], mut body: Reader<'_>) -> Vec<u8> {
    let mut whole = [header, head].concat();
    let start = whole.len();
    whole.resize(start.saturating_add(body.remaining() as usize), 0);
    let _all = body.read(whole.get_mut(start..).unwrap_or_default());
    whole
}

/// Reads a header; `None` if it asks for what no frame can need.
#[inline]
pub(crate) fn decode(header: &[u8; HEADER]) -> Option<Offload> {
    let [flags, gso_type, h0, h1, s0, s1, c0, c1, o0, o1, _, _] = *header;
    if flags & !DATA_VALID == 0 && gso_type == 0 {
        return Some(Offload { data_valid: flags & DATA_VALID != 0, ..Offload::default() });
    }
    let gso = match gso_type & !GSO_ECN {
        0 => Gso::None,
        GSO_TCPV4 => Gso::TcpV4,
        GSO_TCPV6 => Gso::TcpV6,
        GSO_UDP_L4 => Gso::UdpL4,
        _ => return None,
    };
    let offload = Offload {
        needs_csum: flags & NEEDS_CSUM != 0,
        data_valid: flags & DATA_VALID != 0,
        ecn: gso_type & GSO_ECN != 0,
        gso,
        hdr_len: u16::from_le_bytes([h0, h1]),
        gso_size: u16::from_le_bytes([s0, s1]),
        csum_start: u16::from_le_bytes([c0, c1]),
        csum_offset: u16::from_le_bytes([o0, o1]),
    };
    let cut_without_size = gso != Gso::None && (offload.gso_size == 0 || !offload.needs_csum);
    (!cut_without_size).then_some(offload)
}

/// Writes a header.
#[inline]
pub(crate) fn encode(offload: &Offload) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    if offload.is_none() {
        header[0] = if offload.data_valid { DATA_VALID } else { 0 };
        return header;
    }
    // The kernel refuses DATA_VALID beside NEEDS_CSUM.
    header[0] = if offload.needs_csum { NEEDS_CSUM } else { 0 };
    header[1] = match offload.gso {
        Gso::None => 0,
        Gso::TcpV4 => GSO_TCPV4,
        Gso::TcpV6 => GSO_TCPV6,
        Gso::UdpL4 => GSO_UDP_L4,
    } | if offload.ecn { GSO_ECN } else { 0 };
    let words = [offload.hdr_len, offload.gso_size, offload.csum_start, offload.csum_offset];
    for (place, word) in header[2..10].chunks_exact_mut(2).zip(words) {
        place.copy_from_slice(&word.to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::{HEADER, decode, encode, version};
    use port::{Gso, Offload};

    #[test]
    fn what_is_encoded_decodes_to_itself() {
        let plain = Offload { data_valid: true, ..Offload::default() };
        let csum =
            Offload { needs_csum: true, csum_start: 34, csum_offset: 16, ..Offload::default() };
        let large = Offload { gso: Gso::TcpV4, gso_size: 1448, hdr_len: 54, ecn: true, ..csum };
        for offload in [Offload::default(), plain, csum, large] {
            assert_eq!(decode(&encode(&offload)), Some(offload));
        }
    }

    #[test]
    fn releases_are_compared_as_numbers() {
        let since = |release| version(release) >= (6, 2);
        assert!(["6.2.0-rc1", "6.2", "6.18.44-fc", "7.0.1"].into_iter().all(since));
        assert!(!["6.1.0-49-cloud-amd64", "5.15.3", "", "x"].into_iter().any(since));
    }

    #[test]
    fn contradictions_are_refused() {
        let mut header = [0; HEADER];
        header[1] = 3; // UFO, long gone
        assert_eq!(decode(&header), None);
        header[1] = 1; // TCP segmentation without checksum and size
        assert_eq!(decode(&header), None);
    }
}
