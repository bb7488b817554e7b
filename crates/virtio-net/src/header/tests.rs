use port::{Gso, Offload};
use virtio_bindings::virtio_net::{virtio_net_hdr, virtio_net_hdr_mrg_rxbuf};

use super::{LEGACY_LEN, V1_LEN, encode, parse};
use crate::OffloadSet;

const ALL: OffloadSet = OffloadSet { csum: true, tso4: true, tso6: true, ecn: true, uso: true };

const _: () = assert!(size_of::<virtio_net_hdr>() == LEGACY_LEN);
const _: () = assert!(size_of::<virtio_net_hdr_mrg_rxbuf>() == V1_LEN);

fn tcp() -> Offload {
    Offload {
        needs_csum: true,
        data_valid: false,
        ecn: true,
        gso: Gso::TcpV4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
    }
}

fn legacy(header: [u8; V1_LEN]) -> [u8; LEGACY_LEN] {
    *header.first_chunk().unwrap()
}

#[test]
fn what_is_written_reads_the_same() {
    let csum = Offload { ecn: false, gso: Gso::None, ..tcp() };
    let udp = Offload { ecn: false, gso: Gso::UdpL4, ..tcp() };
    let tcp6 = Offload { gso: Gso::TcpV6, ..tcp() };
    for offload in [Offload::default(), csum, tcp(), tcp6, udp] {
        let header = encode(&offload, ALL, 3);
        assert_eq!(header[10..], [3, 0]);
        assert_eq!(parse(&legacy(header), ALL), Some(offload));
    }
}

#[test]
fn the_bytes_stand_where_the_specification_says() {
    let header = encode(&tcp(), ALL, 0x0102);
    assert_eq!(header, [1, 0x81, 54, 0, 0xa8, 5, 34, 0, 16, 0, 2, 1]);
}

#[test]
fn data_valid_goes_to_drivers_that_negotiated_checksums_and_is_never_believed() {
    let offload = Offload { data_valid: true, ..Offload::default() };
    assert_eq!(encode(&offload, ALL, 1)[0], 2);
    assert_eq!(encode(&offload, OffloadSet::default(), 1)[0], 0);
    assert_eq!(parse(&legacy(encode(&offload, ALL, 1)), ALL), Some(Offload::default()));
}

#[test]
fn stale_fields_of_an_ordinary_frame_are_ignored() {
    let raw = [0, 0, 9, 9, 9, 9, 0xff, 0xff, 0xff, 0xff];
    assert_eq!(parse(&raw, OffloadSet::default()), Some(Offload::default()));
}

#[test]
fn what_was_not_negotiated_is_refused() {
    let header = legacy(encode(&tcp(), ALL, 1));
    for allowed in [
        OffloadSet { csum: false, ..ALL },
        OffloadSet { tso4: false, ..ALL },
        OffloadSet { ecn: false, ..ALL },
        OffloadSet::default(),
    ] {
        assert_eq!(parse(&header, allowed), None);
        assert!(!allowed.takes(&tcp()));
    }
    let tcp6 = Offload { gso: Gso::TcpV6, ..tcp() };
    assert!(!OffloadSet { tso6: false, ..ALL }.takes(&tcp6));
    let udp = Offload { ecn: false, gso: Gso::UdpL4, ..tcp() };
    assert!(!OffloadSet { uso: false, ..ALL }.takes(&udp));
    assert!(OffloadSet::default().takes(&Offload::default()));
}

#[test]
fn hostile_values_are_refused() {
    let good = encode(&tcp(), ALL, 1);
    let with = |index: usize, value: u8| {
        let mut raw = legacy(good);
        raw[index] = value;
        parse(&raw, ALL)
    };
    assert!(with(1, 1).is_some());
    assert_eq!(with(1, 2), None, "unknown type");
    assert_eq!(with(1, 3), None, "UFO");
    assert_eq!(with(1, 0x7f), None, "unknown type");
    assert_eq!(with(1, 0x80), None, "ECN alone");
    assert_eq!(with(1, 0x85), None, "ECN with UDP");
}
