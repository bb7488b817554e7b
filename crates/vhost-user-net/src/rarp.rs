//! The frame that tells switches where a guest went after its migration.

/// Bytes of the shortest Ethernet frame, without its checksum.
const FRAME_BYTES: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
/// `EtherType` of RARP.
const RARP: [u8; 2] = [0x80, 0x35];
/// Ethernet, IPv4, their address lengths, "request reverse".
const ETHERNET_IPV4_REQUEST: [u8; 8] = [0, 1, 8, 0, 6, 4, 0, 3];

/// A broadcast RARP request of `mac` for itself.
pub(crate) fn announcement(mac: [u8; 6]) -> [u8; FRAME_BYTES] {
    let no_address = [0u8; 4];
    let parts: [&[u8]; 8] =
        [&BROADCAST, &mac, &RARP, &ETHERNET_IPV4_REQUEST, &mac, &no_address, &mac, &no_address];
    let mut frame = [0; FRAME_BYTES];
    for (to, from) in frame.iter_mut().zip(parts.into_iter().flatten()) {
        *to = *from;
    }
    frame
}
