//! Properties that hold for every input: nothing panics, and views stay inside of their bytes.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use packet::{Arp, Checksum, Ethernet, Icmp, Ipv4, Ipv6, MacAddr, Tcp, Udp, VlanTag, checksum};
use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

proptest! {
    #[test]
    fn every_view_takes_any_bytes(bytes: Vec<u8>) {
        let _ = packet::flow_hash(&bytes);
        let _ = packet::inner_flow_hash(&bytes);
        if let Some(view) = Ethernet::parse(&bytes) {
            prop_assert_eq!(view.payload().len() + 14, bytes.len());
        }
        if let Some(view) = VlanTag::parse(&bytes) {
            prop_assert_eq!(view.payload().len() + 4, bytes.len());
        }
        if let Some(view) = Ipv4::parse(&bytes) {
            prop_assert!(view.payload().len() + view.header_len() <= bytes.len());
            let _ = view.checksum_ok();
        }
        if let Some(view) = Udp::parse(&bytes) {
            prop_assert!(view.payload().len() + 8 <= bytes.len());
        }
        if let Some(view) = Tcp::parse(&bytes) {
            prop_assert!(view.payload().len() + 20 <= bytes.len());
        }
        let _ = (Arp::parse(&bytes).map(|a| a.target_ip()), Icmp::parse(&bytes).map(|i| i.echo()));
    }

    #[test]
    fn an_ipv6_walk_ends_inside_of_the_packet(
        next: u8,
        tail in proptest::collection::vec(any::<u8>(), 0..200),
    ) {
        let mut bytes = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        bytes.extend([0; 32]);
        bytes.extend(&tail);
        if let Some(upper) = Ipv6::parse(&bytes).unwrap().upper() {
            prop_assert!(tail.ends_with(upper.payload));
        }
    }

    #[test]
    fn a_stored_checksum_verifies(
        mut bytes in proptest::collection::vec(any::<u8>(), 2..300),
        cut: usize,
    ) {
        bytes[0] = 0;
        bytes[1] = 0;
        let sum = checksum(&bytes);
        bytes[..2].copy_from_slice(&sum.to_be_bytes());
        let mut pieces = Checksum::default();
        let (head, tail) = bytes.split_at(cut % bytes.len());
        pieces.add(head);
        pieces.add(tail);
        prop_assert_eq!(pieces.finish(), 0);
    }

    #[test]
    fn addresses_round_trip(bytes: [u8; 6]) {
        let mac = MacAddr(bytes);
        prop_assert_eq!(mac.to_string().parse(), Ok(mac));
        prop_assert_eq!(MacAddr::from_u64(mac.to_u64()), mac);
    }
}
