#![expect(clippy::cast_possible_truncation, reason = "test code")]

use super::Filter;

const A: [u8; 6] = [2, 0, 0, 0, 0, 1];
const B: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn ethernet(tags: &[u16], ether_type: u16, packet: &[u8]) -> Vec<u8> {
    let mut frame = [B, A].concat();
    for tag in tags {
        frame.extend([0x81, 0]);
        frame.extend(tag.to_be_bytes());
    }
    frame.extend(ether_type.to_be_bytes());
    frame.extend_from_slice(packet);
    frame.resize(frame.len().max(60), 0);
    frame
}

/// From 10.0.0.1 to 10.0.0.2.
fn ipv4(protocol: u8, fragment: u16, ports: (u16, u16)) -> Vec<u8> {
    let mut packet = vec![0x46, 0, 0, 40, 0, 0];
    packet.extend(fragment.to_be_bytes());
    packet.extend([64, protocol, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    packet.extend([1, 1, 1, 0]);
    packet.extend(ports.0.to_be_bytes());
    packet.extend(ports.1.to_be_bytes());
    packet
}

/// From `fe80::1` to `fe80::2`, behind a header of options.
fn ipv6(protocol: u8, ports: (u16, u16)) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 12, 0, 64];
    for last in [1, 2] {
        packet.extend([0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, last]);
    }
    packet.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
    packet.extend(ports.0.to_be_bytes());
    packet.extend(ports.1.to_be_bytes());
    packet
}

/// 10.0.0.1 asks for 10.0.0.9.
fn arp() -> Vec<u8> {
    let mut packet = vec![0, 1, 8, 0, 6, 4, 0, 1];
    packet.extend(A);
    packet.extend([10, 0, 0, 1, 0, 0, 0, 0, 0, 0, 10, 0, 0, 9]);
    packet
}

fn matches(filter: &str, frame: &[u8]) -> bool {
    let filter: Filter = filter.parse().unwrap();
    filter.matches(frame, frame.len() as u32)
}

#[test]
fn every_primitive_matches_what_it_names_and_nothing_else() {
    let frames = [
        ("tcp4", ethernet(&[], 0x0800, &ipv4(6, 0x4000, (1000, 80)))),
        ("udp4", ethernet(&[5], 0x0800, &ipv4(17, 0, (53, 2000)))),
        ("later", ethernet(&[], 0x0800, &ipv4(17, 100, (53, 2000)))),
        ("icmp", ethernet(&[], 0x0800, &ipv4(1, 0, (80, 80)))),
        ("tcp6", ethernet(&[], 0x86dd, &ipv6(6, (1000, 80)))),
        ("icmp6", ethernet(&[0x6007, 9], 0x86dd, &ipv6(58, (0, 0)))),
        ("arp", ethernet(&[], 0x0806, &arp())),
        ("other", ethernet(&[], 0x88b5, &[0; 100])),
    ];
    let cases = [
        ("arp", "arp"),
        ("ip", "tcp4 udp4 later icmp"),
        ("ip6", "tcp6 icmp6"),
        ("tcp", "tcp4 tcp6"),
        ("udp", "udp4 later"),
        ("icmp", "icmp"),
        ("icmp6", "icmp6"),
        ("sctp", ""),
        ("vlan", "udp4 icmp6"),
        ("vlan 5", "udp4"),
        ("vlan 7", "icmp6"),
        ("vlan 9", ""),
        ("host 10.0.0.1", "tcp4 udp4 later icmp arp"),
        ("10.0.0.9", "arp"),
        ("arp src host 10.0.0.1", "arp"),
        ("arp dst host 10.0.0.1", ""),
        ("src 10.0.0.2", ""),
        ("dst 10.0.0.2", "tcp4 udp4 later icmp"),
        ("host fe80::2", "tcp6 icmp6"),
        ("src host fe80::1 and tcp", "tcp6"),
        ("net 10.0.0.8/30", "arp"),
        ("dst net 10.0.0.0/24", "tcp4 udp4 later icmp arp"),
        ("net 0.0.0.0/0", "tcp4 udp4 later icmp arp"),
        ("net ::/0", "tcp6 icmp6"),
        ("ip6 net fe80::/10", "tcp6 icmp6"),
        ("port 80", "tcp4 tcp6"),
        ("src port 80", ""),
        ("udp src port 53", "udp4"),
        ("tcp dst port 80 and ip6", "tcp6"),
        ("ether src 02:00:00:00:00:01 and arp", "arp"),
        ("ether dst 02:00:00:00:00:01", ""),
        ("ether host 2:0:0:0:0:2 and arp", "arp"),
        ("ether proto 0x88b5", "other"),
        ("ether broadcast", ""),
        ("ether multicast", ""),
        ("greater 100", "other"),
        ("not less 113", "other"),
        ("less 60 and not ip", "arp"),
        // Equal rank, from left to right.
        ("arp or tcp and ip6", "tcp6"),
        ("arp or (tcp and ip6)", "tcp6 arp"),
        ("!(ip||ip6)&&!arp", "other"),
        ("not not arp", "arp"),
    ];
    for (filter, names) in cases {
        let found: Vec<_> =
            frames.iter().filter(|(_, f)| matches(filter, f)).map(|(name, _)| *name).collect();
        assert_eq!(found.join(" "), names, "{filter}");
    }
    for (name, frame) in &frames {
        assert!(matches("", frame) && matches(" \t", frame), "{name}");
        // Frames that end anywhere.
        for len in 0..frame.len() {
            for (filter, _) in cases {
                let _ = matches(filter, &frame[..len]);
            }
        }
    }
    assert!(!matches("ip", &[]) && !matches("ether src 0:0:0:0:0:0", &[0; 11]));
}

#[test]
fn group_addresses_are_told_apart() {
    let mut frame = ethernet(&[], 0x88b5, &[]);
    frame[..6].copy_from_slice(&[0xff; 6]);
    assert!(matches("ether broadcast", &frame) && matches("ether multicast", &frame));
    frame[5] = 0;
    assert!(!matches("ether broadcast", &frame) && matches("ether multicast", &frame));
}

#[test]
fn errors_point_at_the_wrong_word_and_say_what_is_right() {
    let cases = [
        (
            "arp or hots 10.0.0.1",
            "\"hots\" is not understood (word 3, at character 8): expected arp, ip, ip6, tcp, ",
        ),
        (
            "host 10.0.0.300",
            "\"10.0.0.300\" is not understood (word 2, at character 6): expected an IP address as",
        ),
        (
            "vlan 4096",
            "\"4096\" is not understood (word 2, at character 6): expected a VLAN number",
        ),
        ("port http", "\"http\" is not understood (word 2, at character 6): expected a port"),
        ("arp and", "the filter ends too early: expected arp, ip"),
        ("(arp", "the filter ends too early: expected and, or, or the ) that closes a ("),
        ("arp)", "\")\" is not understood (word 2, at character 4): expected and, or, ) or"),
        ("arp ip", "\"ip\" is not understood (word 2, at character 5): expected and, or, ) or"),
        ("ether 1:2:3", "\"1:2:3\" is not understood (word 2, at character 7): expected src, dst"),
        ("ether src 1:2:3:4:5:6:7", "\"1:2:3:4:5:6:7\" is not understood (word 3"),
        ("src vlan", "\"vlan\" is not understood (word 2, at character 5): expected host, net, "),
        ("net 10.0.0.0", "\"10.0.0.0\" is not understood (word 2, at character 5): expected a net"),
        ("net 10.0.0.0/33", "\"10.0.0.0/33\" is not understood"),
        ("greater big", "\"big\" is not understood (word 2, at character 9): expected a number of"),
        ("ärp", "\"ärp\" is not understood (word 1, at character 1)"),
    ];
    for (filter, text) in cases {
        let error = filter.parse::<Filter>().unwrap_err().to_string();
        assert!(error.starts_with(text), "{filter}: {error}");
    }
    let long = vec!["not"; 257].join(" ");
    let error = long.parse::<Filter>().unwrap_err().to_string();
    assert_eq!(error, "a filter of 257 words: expected at most 256 words");
}
