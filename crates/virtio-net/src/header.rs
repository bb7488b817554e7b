//! `virtio_net_hdr` (virtio 1.3, section 5.1.6) from and to offload intent.
//!
//! ```text
//!  0 flags │ 1 gso_type │ 2 hdr_len │ 4 gso_size │ 6 csum_start │ 8 csum_offset │ 10 num_buffers
//!  │ 12 hash_value: le32 │ 16 hash_report: le16 │ 18 padding: le16
//! ```
//!
//! All fields are little-endian. `num_buffers` exists with `VERSION_1` or `MRG_RXBUF` only, the
//! second line with `HASH_REPORT`.
//!
//! **Trust.** The bytes come from the driver, copied once. What they say of the frame is checked by
//! [`Offload::checked`] against its private head.
//! **Limits.** Legacy drivers of big-endian guests are not supported.

use packet::HashKind;
use port::{Gso, Offload, OffloadSet};
use virtio_bindings::virtio_net as net;

/// Bytes of the header without `num_buffers`.
pub const LEGACY_LEN: usize = 10;
/// Bytes of the header with `num_buffers`.
pub const V1_LEN: usize = 12;
/// Bytes of the header with the frame's hash.
pub const HASH_LEN: usize = 20;

/// Turns a constant of the bindings into the byte that the header has for it.
#[expect(clippy::cast_possible_truncation, reason = "checked by the assertion")]
const fn byte(constant: u32) -> u8 {
    assert!(constant < 256, "header constants are bytes");
    constant as u8
}

/// The length of a header in the type that lengths of chains have.
#[expect(clippy::cast_possible_truncation, reason = "checked by the assertion")]
pub(crate) const fn len_u32(len: usize) -> u32 {
    assert!(len == LEGACY_LEN || len == V1_LEN || len == HASH_LEN, "there are three headers");
    len as u32
}

const NEEDS_CSUM: u8 = byte(net::VIRTIO_NET_HDR_F_NEEDS_CSUM);
const DATA_VALID: u8 = byte(net::VIRTIO_NET_HDR_F_DATA_VALID);
const GSO_NONE: u8 = byte(net::VIRTIO_NET_HDR_GSO_NONE);
const GSO_TCPV4: u8 = byte(net::VIRTIO_NET_HDR_GSO_TCPV4);
const GSO_TCPV6: u8 = byte(net::VIRTIO_NET_HDR_GSO_TCPV6);
const GSO_UDP_L4: u8 = byte(net::VIRTIO_NET_HDR_GSO_UDP_L4);
const GSO_ECN: u8 = byte(net::VIRTIO_NET_HDR_GSO_ECN);

/// Reads a header. None if it says what cannot be, or what the driver may not ask for; what it says
/// of the frame is still to be checked ([`Offload::checked`]). Flags that a driver does not set are
/// ignored, as the specification says.
#[inline(always)]
pub fn parse(raw: &[u8; LEGACY_LEN], allowed: OffloadSet) -> Option<Offload> {
    let [flags, gso_type, ..] = *raw;
    if flags & NEEDS_CSUM == 0 && gso_type == GSO_NONE {
        return Some(Offload::default());
    }
    parse_intent(raw, allowed)
}

#[inline(never)]
fn parse_intent(raw: &[u8; LEGACY_LEN], allowed: OffloadSet) -> Option<Offload> {
    let [flags, gso_type, h0, h1, g0, g1, s0, s1, o0, o1] = *raw;
    let offload = Offload {
        needs_csum: flags & NEEDS_CSUM != 0,
        data_valid: false,
        ecn: gso_type & GSO_ECN != 0,
        gso: match gso_type & !GSO_ECN {
            GSO_NONE => Gso::None,
            GSO_TCPV4 => Gso::TcpV4,
            GSO_TCPV6 => Gso::TcpV6,
            GSO_UDP_L4 => Gso::UdpL4,
            _ => return None,
        },
        hdr_len: u16::from_le_bytes([h0, h1]),
        gso_size: u16::from_le_bytes([g0, g1]),
        csum_start: u16::from_le_bytes([s0, s1]),
        csum_offset: u16::from_le_bytes([o0, o1]),
    };
    let tcp = matches!(offload.gso, Gso::TcpV4 | Gso::TcpV6);
    (allowed.takes(&offload) && (tcp || !offload.ecn)).then_some(offload)
}

/// Writes the header of a frame that takes `num_buffers` buffers for a driver that can do
/// `allowed` (it takes [`Offload::data_valid`] only with checksums negotiated).
#[inline(always)]
pub fn encode(offload: &Offload, allowed: OffloadSet, num_buffers: u16) -> [u8; V1_LEN] {
    let [n0, n1] = num_buffers.to_le_bytes();
    if offload.is_none() {
        let flags = if offload.data_valid && allowed.csum { DATA_VALID } else { 0 };
        return [flags, GSO_NONE, 0, 0, 0, 0, 0, 0, 0, 0, n0, n1];
    }
    encode_intent(offload, num_buffers)
}

#[inline(never)]
fn encode_intent(offload: &Offload, num_buffers: u16) -> [u8; V1_LEN] {
    let flags = if offload.needs_csum { NEEDS_CSUM } else { 0 };
    let gso_type = match offload.gso {
        Gso::None => GSO_NONE,
        Gso::TcpV4 => GSO_TCPV4,
        Gso::TcpV6 => GSO_TCPV6,
        Gso::UdpL4 => GSO_UDP_L4,
    };
    let ecn = if offload.ecn { GSO_ECN } else { 0 };
    let [h0, h1] = offload.hdr_len.to_le_bytes();
    let [g0, g1] = offload.gso_size.to_le_bytes();
    let [s0, s1] = offload.csum_start.to_le_bytes();
    let [o0, o1] = offload.csum_offset.to_le_bytes();
    let [n0, n1] = num_buffers.to_le_bytes();
    [flags, gso_type | ecn, h0, h1, g0, g1, s0, s1, o0, o1, n0, n1]
}

/// The same with the frame's hash, if it has one.
pub fn with_hash(header: [u8; V1_LEN], hash: Option<(u32, HashKind)>) -> [u8; HASH_LEN] {
    let (value, kind) = hash.map_or((0, 0), |(value, kind)| (value, kind as u16));
    let [v0, v1, v2, v3] = value.to_le_bytes();
    let [k0, k1] = kind.to_le_bytes();
    let [a, b, c, d, e, f, g, h, i, j, k, l] = header;
    [a, b, c, d, e, f, g, h, i, j, k, l, v0, v1, v2, v3, k0, k1, 0, 0]
}

#[cfg(test)]
mod tests;
