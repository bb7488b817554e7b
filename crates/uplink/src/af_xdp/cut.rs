//! Large frames that their sender left to be cut: what the mark before a frame says.
//!
//! ```text
//!  kind of segments (u32) │ bytes of payload of each (u32; 0: the frame is whole) │ frame
//! ```
//!
//! **Trust.** Our own XDP program wrote the mark, from what the kernel knows of the frame. The
//! frame is its sender's: a mark that its headers contradict is refused.
//! **Not supported.** Segments within tunnels.

use packet::{Cut, CutKind};
use port::{Frame, Gso, Offload};

/// Kinds of segments, `SKB_GSO_...` of the kernel.
const TCP_V4: u32 = 1;
const TCP_V6: u32 = 1 << 4;
const UDP: u32 = 1 << 17;
const ECN: u32 = 1 << 2;
/// What is said beside a kind and changes nothing for us: that nobody verified it, and that IPv4
/// identifications stay the same (before Linux 6.18, and since).
const BESIDE: u32 = 1 << 1 | 1 << 3 | 1 << 30;

/// What is left to do on a frame that is to be cut into segments of that `kind` and `size`; its
/// checksum is `left` undone. None if we cannot do it.
pub(super) fn cut(
    (kind, size): (u32, u32),
    frame: &Frame,
    left: Option<Offload>,
) -> Option<Offload> {
    let (left, size) = (left?, u16::try_from(size).ok()?);
    let cut = Cut::new(frame.head(), frame.len(), size).ok()?;
    let gso = match (kind & !(ECN | BESIDE), cut.kind()) {
        (TCP_V4, CutKind::TcpV4) => Gso::TcpV4,
        (TCP_V6, CutKind::TcpV6) => Gso::TcpV6,
        (UDP, CutKind::Udp) => Gso::UdpL4,
        _ => return None,
    };
    let placed = (left.csum_start, left.csum_offset) == cut.checksum_place();
    let hdr_len = u16::try_from(cut.header_len()).ok()?;
    let ecn = kind & ECN != 0;
    placed.then_some(Offload { gso, gso_size: size, hdr_len, ecn, ..left })
}

#[cfg(test)]
mod tests {
    use super::{ECN, TCP_V4, TCP_V6, UDP, cut};
    use packet::checksum;
    use port::{Frame, Gso, Offload};

    /// A frame of 110 bytes over IPv4, TCP or UDP, and what is left undone of its checksum.
    fn made(protocol: u8) -> (Frame, Option<Offload>) {
        let mut bytes = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0, 0, 96, 0, 0];
        bytes.extend([0x40, 0, 64, protocol, 0, 0, 10, 9, 0, 1, 10, 9, 0, 2]);
        let sum = checksum(&bytes[14..34]).to_be_bytes();
        bytes[24..26].copy_from_slice(&sum);
        bytes.extend([0x12, 0x34, 0, 53, 0, 76, 0, 0, 0, 0, 0, 0, 0x80, 0x10, 1, 0]);
        bytes.resize(110, 7);
        let mut frame = Frame::default();
        frame.fill_private(&bytes);
        let csum_offset = if protocol == 6 { 16 } else { 6 };
        let left = Offload { needs_csum: true, csum_start: 34, csum_offset, ..Offload::default() };
        (frame, Some(left))
    }

    #[test]
    fn a_mark_becomes_an_intent() {
        let (tcp, left) = made(6);
        for (kind, ecn) in [(TCP_V4, false), (TCP_V4 | ECN, true), (TCP_V4 | 2 | 8, false)] {
            let wanted =
                Offload { gso: Gso::TcpV4, gso_size: 20, hdr_len: 66, ecn, ..left.unwrap() };
            assert_eq!(cut((kind, 20), &tcp, left), Some(wanted), "{kind:#x}");
        }
        let (udp, left) = made(17);
        let wanted = Offload { gso: Gso::UdpL4, gso_size: 30, hdr_len: 42, ..left.unwrap() };
        assert_eq!(cut((UDP, 30), &udp, left), Some(wanted));
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let (tcp, left) = made(6);
        // Tunnels, a list of frames, another family, no kind, a size that is none.
        for kind in [TCP_V4 | 1 << 10, TCP_V4 | 1 << 18, 1 << 6, TCP_V6, UDP, 0, 2] {
            assert_eq!(cut((kind, 20), &tcp, left), None, "{kind:#x}");
        }
        for size in [0, 65_536, u32::MAX] {
            assert_eq!(cut((TCP_V4, size), &tcp, left), None, "{size}");
        }
        // Its checksum is not left undone, or elsewhere.
        assert_eq!(cut((TCP_V4, 20), &tcp, None), None);
        let elsewhere = left.map(|left| Offload { csum_start: 35, ..left });
        assert_eq!(cut((TCP_V4, 20), &tcp, elsewhere), None);
        assert_eq!(cut((TCP_V4, 20), &Frame::default(), left), None);
    }
}
