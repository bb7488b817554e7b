use crate::{Gso, Offload, OffloadSet};

/// Headers of TCP or UDP behind `tags` tags, as the head of a frame of `payload` more bytes.
fn headers(tags: usize, v6: bool, tcp: bool) -> Vec<u8> {
    let mut head = vec![2; 12];
    for _ in 0..tags {
        head.extend([0x81, 0, 0, 5]);
    }
    let protocol = if tcp { 6 } else { 17 };
    if v6 {
        head.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0xff, 0, protocol, 64]);
        head.extend([7; 32]);
    } else {
        head.extend([8, 0, 0x45, 0, 0xff, 0, 0, 0, 0x40, 0, 64, protocol]);
        head.extend([7; 10]);
    }
    head.extend([0x12, 0x34, 0, 80]);
    head.extend(if tcp {
        vec![0, 0, 0, 9, 0, 0, 0, 1, 0x50, 0x10, 1, 2, 0, 0, 0, 0]
    } else {
        vec![0; 4]
    });
    head
}

fn intent(head: &[u8], gso: Gso) -> Offload {
    let (upper, csum_offset) = if gso == Gso::UdpL4 { (8, 6) } else { (20, 16) };
    let hdr_len = u16::try_from(head.len()).unwrap();
    Offload {
        needs_csum: true,
        gso,
        hdr_len,
        gso_size: 1000,
        csum_start: hdr_len.checked_sub(upper).unwrap(),
        csum_offset,
        ..Offload::default()
    }
}

#[test]
fn what_is_true_of_a_frame_stays_as_it_is() {
    for tags in 0..3 {
        for (v6, gso) in
            [(false, Gso::TcpV4), (true, Gso::TcpV6), (false, Gso::UdpL4), (true, Gso::UdpL4)]
        {
            let mut head = headers(tags, v6, gso != Gso::UdpL4);
            let large = intent(&head, gso);
            let len = u32::from(large.hdr_len);
            assert_eq!(large.checked(&head, len.saturating_add(5000)), Some(large));
            // What is one segment anyway needs no cutting.
            let one = Offload { gso: Gso::None, hdr_len: 0, gso_size: 0, ..large };
            assert_eq!(large.checked(&head, len.saturating_add(1000)), Some(one));
            assert_eq!(one.checked(&head, len), Some(one));
            // Hints are made right.
            let hints = Offload { hdr_len: 3, ecn: gso != Gso::UdpL4, ..large };
            assert_eq!(hints.checked(&head, len.saturating_add(5000)), Some(large));
            if gso != Gso::UdpL4 {
                let flags = head.len().checked_sub(7).unwrap();
                head[flags] = 0x80;
                let cwr = Offload { ecn: true, ..large };
                assert_eq!(large.checked(&head, len.saturating_add(5000)), Some(cwr));
            }
            let verified = Offload { data_valid: true, hdr_len: 9, ..Offload::default() };
            let told = verified.checked(&head, len).unwrap();
            assert!(told.data_valid && told.hdr_len == 0);
        }
    }
}

#[test]
fn what_contradicts_the_frame_is_refused() {
    let head = headers(0, false, true);
    let large = intent(&head, Gso::TcpV4);
    let refused = |offload: Offload| offload.checked(&head, 5000).is_none();
    assert!(!refused(large));
    for (what, wrong) in [
        ("another protocol", Offload { gso: Gso::UdpL4, ..large }),
        ("another family", Offload { gso: Gso::TcpV6, ..large }),
        ("segments of no bytes", Offload { gso_size: 0, ..large }),
        ("segments larger than a packet", Offload { gso_size: u16::MAX, ..large }),
        ("a checksum elsewhere", Offload { csum_offset: 6, ..large }),
        ("a sum from elsewhere", Offload { csum_start: 33, ..large }),
        ("segments without checksums", Offload { needs_csum: false, ..large }),
    ] {
        assert!(refused(wrong), "{what}");
    }
    let mut fragment = head.clone();
    fragment[20] = 0x20;
    assert_eq!(large.checked(&fragment, 5000), None);
    assert_eq!(large.checked(&head, 53), None, "the header is cut off");
}

#[test]
fn a_checksum_can_be_anywhere_behind_the_headers_that_the_network_uses() {
    let csum = |csum_start, csum_offset| Offload {
        needs_csum: true,
        csum_start,
        csum_offset,
        ..Offload::default()
    };
    let mut head = headers(1, false, true);
    head.resize(128, 0);
    let good = |offload: Offload, head: &[u8]| offload.checked(head, 1000).is_some();
    assert!(good(csum(38, 16), &head) && good(csum(38, 0), &head) && good(csum(90, 36), &head));
    assert!(!good(csum(90, 37), &head), "behind the head");
    assert!(!good(csum(u16::MAX, u16::MAX), &head));
    for start in [0, 6, 14, 18, 37] {
        assert!(!good(csum(start, 20), &head), "{start}: the sum covers addresses");
    }
    head[16..18].copy_from_slice(&[0x88, 0xb5]);
    assert!(good(csum(18, 20), &head), "a protocol of somebody's own");
    assert!(!good(csum(17, 20), &head));
}

#[test]
fn each_offload_is_needed_for_what_it_stands_for() {
    let all = OffloadSet::ALL;
    let large = intent(&headers(0, false, true), Gso::TcpV4);
    let cwr = Offload { ecn: true, ..large };
    let csum = Offload { gso: Gso::None, ..large };
    for (set, offload, taken) in [
        (all, cwr, true),
        (OffloadSet::NONE, Offload::default(), true),
        (OffloadSet { csum: false, ..all }, csum, false),
        (OffloadSet { csum: false, ..all }, large, false),
        (OffloadSet { tso4: false, ..all }, large, false),
        (OffloadSet { tso6: false, ..all }, large, true),
        (OffloadSet { tso6: false, ..all }, Offload { gso: Gso::TcpV6, ..large }, false),
        (OffloadSet { uso: false, ..all }, Offload { gso: Gso::UdpL4, ..large }, false),
        (OffloadSet { ecn: false, ..all }, large, true),
        (OffloadSet { ecn: false, ..all }, cwr, false),
    ] {
        assert_eq!(set.takes(&offload), taken, "{set:?} {offload:?}");
    }
}

/// A `CRC32c` that was left undone is not what anybody here would make of it.
#[test]
fn an_unfinished_checksum_of_sctp_is_refused() {
    for v6 in [false, true] {
        let mut head = headers(0, v6, true);
        head[if v6 { 20 } else { 23 }] = 132;
        let start = intent(&head, Gso::TcpV4).csum_start;
        let at = |csum_offset| Offload {
            needs_csum: true,
            csum_start: start,
            csum_offset,
            ..Offload::default()
        };
        assert_eq!(at(8).checked(&head, 5000), None);
        assert_eq!(at(16).checked(&head, 5000), Some(at(16)), "another one");
    }
}
