//! Rates as arithmetic, and who is who.

use std::net::IpAddr;

use packet::MacAddr;

use super::{Bucket, Guard, PortLimits, Rate, Sources};

const MS: u64 = 1_000_000;

#[test]
fn a_bucket_gives_its_burst_and_then_its_rate() {
    let mut bucket = Bucket::new(Rate { per_second: 1000, burst: 64 });
    assert_eq!(bucket.credit(0), 64);
    bucket.spend(0, 64);
    assert_eq!(bucket.credit(0), 0);
    // One a millisecond; what is not used is kept up to the burst.
    for (now_ms, credit) in [(1, 1), (10, 10), (64, 64), (1000, 64)] {
        assert_eq!(bucket.credit(now_ms * MS), credit);
    }
    // More than there is: a debt.
    bucket.spend(1000 * MS, 100);
    assert_eq!(bucket.credit(1000 * MS), 0);
    assert_eq!(bucket.ready_ns(), 1037 * MS);
    assert!(bucket.credit(bucket.ready_ns()) > 0);
}

#[test]
fn another_guard_goes_on_with_what_was_used_up() {
    let rate = |per_second, burst| Some(Rate { per_second, burst });
    let limits = PortLimits {
        bytes: rate(1_000_000, 10_000),
        frames: rate(1000, 64),
        storm: rate(10, 16),
        sources: None,
    };
    let old = Guard::new(&limits).unwrap();
    let now_ns = 500 * MS;
    old.spend(now_ns, 64, 4000);
    (0..16).for_each(|_| assert!(old.may_flood(now_ns)));
    let debt = old.debt(now_ns);
    // Its clock begins anew, the debt does not.
    let new = Guard::new(&limits).unwrap();
    new.owe(3 * MS, &debt);
    assert_eq!(new.debt(3 * MS), debt);
    assert!(new.admit(3 * MS).is_err() && !new.may_flood(3 * MS));
    assert_eq!(new.admit(13 * MS), Ok(10));
    // What was owed at a low rate does not stop a port with a high one for longer than a burst.
    let fast = Guard::new(&PortLimits { frames: rate(1_000_000, 1000), ..limits.clone() }).unwrap();
    fast.owe(0, &debt);
    assert!(fast.admit(2 * MS).is_ok());
    // Who has used up nothing, and who has no limits, owes nothing.
    assert_eq!(Guard::new(&limits).unwrap().debt(0), super::PortDebt::default());
}

#[test]
fn over_a_long_time_the_rate_is_exact() {
    let per_second = 12_345_678;
    let mut bucket = Bucket::new(Rate { per_second, burst: 65_536 });
    let (mut now_ns, mut sent) = (0, 0);
    while now_ns < 10_000 * MS {
        if bucket.credit(now_ns) > 0 {
            bucket.spend(now_ns, 1514);
            sent += 1514;
        } else {
            now_ns = bucket.ready_ns();
        }
    }
    let expected = 10 * per_second;
    assert!(sent >= expected && sent < expected + expected / 100, "{sent} of {expected}");
}

#[test]
fn extremes_overflow_nothing() {
    let most = Rate { per_second: u64::MAX, burst: u64::MAX };
    let least = Rate { per_second: 1, burst: 1 };
    for rate in [most, least] {
        let mut bucket = Bucket::new(rate);
        for now_ns in [0, 1, u64::MAX] {
            bucket.spend(now_ns, u64::MAX);
            let _ = (bucket.credit(now_ns), bucket.ready_ns());
        }
    }
}

#[test]
fn a_whole_burst_is_admitted_only_if_there_is_credit_for_it() {
    for per_second in [1000, 12_345_678, 1_000_000_000] {
        let rate = Rate { per_second, burst: 100 };
        let limits = PortLimits { frames: Some(rate), ..PortLimits::default() };
        let guard = Guard::new(&limits).unwrap();
        assert!(guard.admits_all(0));
        guard.spend(0, 35, 0);
        assert!(guard.admits_all(0), "65 are left");
        guard.spend(0, 2, 0);
        assert!(!guard.admits_all(0), "63 are left");
        assert!((62..=64).contains(&guard.admit(0).unwrap()));
        // A clock that is late never gives more than one that is right.
        guard.spend(MS, 10, 0);
        assert!(!guard.admits_all(0) || guard.admits_all(MS));
    }
    let bytes = Some(Rate { per_second: 1000, burst: 1000 });
    let guard = Guard::new(&PortLimits { bytes, ..PortLimits::default() }).unwrap();
    guard.spend(0, 1, 990);
    assert!(guard.admits_all(0));
    guard.spend(0, 1, 100);
    assert!(!guard.admits_all(0) && guard.admit(0).is_err());
}

#[test]
fn bytes_and_frames_are_both_kept() {
    let rate = |per_second| Some(Rate { per_second, burst: 10 });
    let limits = PortLimits { bytes: rate(1000), frames: rate(1000), ..PortLimits::default() };
    let guard = Guard::new(&limits).unwrap();
    assert_eq!(guard.admit(0), Ok(10));
    guard.spend(0, 3, 3);
    assert_eq!(guard.admit(0), Ok(7));
    guard.spend(0, 1, 20);
    let until = guard.admit(0).unwrap_err();
    assert!(until > 13 * MS && guard.admit(until).is_ok(), "{until}");
    assert!(Guard::new(&PortLimits::default()).is_none());
}

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 2];

fn sources(addresses: &[&str]) -> Sources {
    let parsed = addresses.iter().map(|text| text.parse::<IpAddr>().unwrap());
    Sources::new(MacAddr(MAC), parsed)
}

fn ethernet(source: [u8; 6], ethertype: u16, packet: &[u8]) -> Vec<u8> {
    [&[0xff; 6], &source[..], &ethertype.to_be_bytes(), packet].concat()
}

fn ip(text: &str) -> Vec<u8> {
    match text.parse::<IpAddr>().unwrap() {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    }
}

fn ipv4(source: &str, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
    packet.extend(ip(source));
    packet.extend(ip("10.0.0.9"));
    packet.extend(payload);
    packet
}

fn arp(mac: [u8; 6], address: &str) -> Vec<u8> {
    arp_for(mac, address, "10.0.0.9")
}

fn arp_for(mac: [u8; 6], address: &str, target: &str) -> Vec<u8> {
    [&[0, 1, 8, 0, 6, 4, 0, 1], &mac[..], &ip(address), &[0; 6], &ip(target)].concat()
}

fn ipv6(source: &str, next: u8, payload: &[u8]) -> Vec<u8> {
    let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 255];
    packet.extend(ip(source));
    packet.extend(ip("ff02::1"));
    packet.extend(payload);
    packet
}

/// A neighbour advertisement (136) or solicitation (135) with one link-layer option.
fn discovery(kind: u8, target: &str, mac: [u8; 6]) -> Vec<u8> {
    let option = if kind == 136 { 2 } else { 1 };
    [&[kind, 0, 0, 0, 0, 0, 0, 0], &ip(target)[..], &[option, 1], &mac[..]].concat()
}

fn allowed(sources: &Sources, ethertype: u16, packet: &[u8]) -> bool {
    let plain = sources.allow(&ethernet(MAC, ethertype, packet));
    // A tag, and two of them, change nothing.
    let tag = [&[0, 5], &ethertype.to_be_bytes()[..], packet].concat();
    let two = [&[0, 6, 0x81, 0], &tag[..]].concat();
    assert_eq!(sources.allow(&ethernet(MAC, 0x8100, &tag)), plain);
    assert_eq!(sources.allow(&ethernet(MAC, 0x88a8, &two)), plain);
    // Nor does a length with the type behind it.
    for end in [0, 0xf8] {
        let snap = [&[0xaa, 0xaa, 3, 0, 0, end], &ethertype.to_be_bytes()[..], packet].concat();
        assert_eq!(sources.allow(&ethernet(MAC, 64, &snap)), plain);
    }
    plain
}

#[test]
fn only_the_station_itself_sends() {
    let any = sources(&[]);
    assert!(any.allow(&ethernet(MAC, 0x88b5, &[])));
    assert!(!any.allow(&ethernet(OTHER, 0x88b5, &[])));
    assert!(allowed(&any, 0x0800, &ipv4("10.0.0.7", 17, &[])), "any address");
    assert!(allowed(&any, 0x0806, &arp(MAC, "10.0.0.7")));
    assert!(!allowed(&any, 0x0806, &arp(OTHER, "10.0.0.7")), "ARP for another station");
    assert!(allowed(&any, 0x86dd, &ipv6("2001:db8::7", 58, &discovery(136, "2001:db8::7", MAC))));
    let other = discovery(136, "2001:db8::7", OTHER);
    assert!(!allowed(&any, 0x86dd, &ipv6("2001:db8::7", 58, &other)));
    // Too many tags hide what is behind.
    let tags = [&[0, 1, 0x81, 0], &[0, 1, 0x81, 0][..], &[0, 1, 0x08, 0]].concat();
    assert!(!any.allow(&ethernet(MAC, 0x8100, &tags)));
}

#[test]
fn ipv4_and_arp_come_from_the_given_addresses() {
    let two = sources(&["10.0.0.1", "10.0.0.2"]);
    for (address, good) in [("10.0.0.1", true), ("10.0.0.2", true), ("10.0.0.3", false)] {
        assert_eq!(allowed(&two, 0x0800, &ipv4(address, 6, &[])), good, "{address}");
        assert_eq!(allowed(&two, 0x0806, &arp(MAC, address)), good, "{address}");
    }
    assert!(allowed(&two, 0x0806, &arp_for(MAC, "10.0.0.1", "10.0.0.3")), "whom it asks for");
    for (target, good) in [("10.0.0.1", true), ("10.0.0.2", true), ("10.0.0.3", false)] {
        let probe = arp_for(MAC, "0.0.0.0", target);
        assert_eq!(allowed(&two, 0x0806, &probe), good, "a probe for {target}");
        assert!(allowed(&sources(&[]), 0x0806, &probe), "any address");
        assert!(!allowed(&two, 0x0806, &probe[..27]), "cut off");
    }
    assert!(allowed(&two, 0x0800, &ipv4("0.0.0.0", 17, &[0, 68, 0, 67])), "DHCP");
    assert!(!allowed(&two, 0x0800, &ipv4("0.0.0.0", 17, &[0, 68, 0, 68])));
    assert!(!allowed(&two, 0x0800, &ipv4("0.0.0.0", 6, &[0, 68, 0, 67])));
    assert!(!allowed(&two, 0x86dd, &ipv6("2001:db8::1", 59, &[])), "a family without addresses");
    assert!(!allowed(&two, 0x86dd, &ipv6("fe80::ff:fe00:1", 59, &[])));
    for cut in [&[][..], &[0x45; 15], &[0; 13]] {
        assert!(!two.allow(&ethernet(MAC, 0x0800, cut)) && !two.allow(&ethernet(MAC, 0x0806, cut)));
        assert!(!two.allow(&ethernet(MAC, 0x86dd, cut)));
    }
}

#[test]
fn ipv6_and_neighbour_discovery_come_from_the_given_addresses() {
    let one = sources(&["2001:db8::1"]);
    for (address, good) in [
        ("2001:db8::1", true),
        ("2001:db8::2", false),
        ("fe80::ff:fe00:1", true),
        ("fe80::1", false),
    ] {
        assert_eq!(allowed(&one, 0x86dd, &ipv6(address, 6, &[])), good, "{address}");
        let advertised = discovery(136, address, MAC);
        assert_eq!(allowed(&one, 0x86dd, &ipv6("2001:db8::1", 58, &advertised)), good, "{address}");
        let probe = ipv6("::", 58, &discovery(135, address, MAC));
        assert_eq!(allowed(&one, 0x86dd, &probe), good, "duplicate address detection: {address}");
        assert!(allowed(&sources(&[]), 0x86dd, &probe), "any address");
        // Whom it asks for is free.
        assert!(allowed(&one, 0x86dd, &ipv6("2001:db8::1", 58, &discovery(135, address, MAC))));
    }
    assert!(!allowed(&one, 0x86dd, &ipv6("::", 17, &[])));
    let stolen = discovery(136, "2001:db8::2", MAC);
    let hidden = [&[58, 0, 0, 0, 0, 0, 0, 0][..], &stolen].concat();
    for extension in [0, 43, 60] {
        let packet = ipv6("2001:db8::1", extension, &hidden);
        assert!(!allowed(&one, 0x86dd, &packet), "behind an extension header");
    }
    let redirect = [&[137][..], &[0; 39]].concat();
    assert!(!allowed(&one, 0x86dd, &ipv6("2001:db8::1", 58, &redirect)));
    assert!(!allowed(&one, 0x86dd, &ipv6("2001:db8::1", 0, &[58, 200])), "cut off");
    assert!(allowed(&one, 0x86dd, &ipv6("2001:db8::1", 44, &[58, 0])), "a fragment");
}

#[test]
fn a_router_is_who_has_its_address_given() {
    let advertisement = [&[134][..], &[0; 15], &[1, 1], &MAC].concat();
    let link_local = "fe80::ff:fe00:1";
    for (given, source, good) in [
        (&["2001:db8::1"][..], link_local, false),
        (&["2001:db8::1"], "::", false),
        (&["2001:db8::1"], "fe80::1", false),
        (&["2001:db8::1", "fe80::1"], "fe80::1", true),
        (&["2001:db8::1", link_local], link_local, true),
        (&["10.0.0.1"], link_local, false),
        (&[], link_local, true),
    ] {
        let packet = ipv6(source, 58, &advertisement);
        assert_eq!(allowed(&sources(given), 0x86dd, &packet), good, "{given:?} {source}");
        // Whoever may send asks for one.
        let solicitation = ipv6("2001:db8::1", 58, &[&[133][..], &[0; 7]].concat());
        assert_eq!(allowed(&sources(given), 0x86dd, &solicitation), given != ["10.0.0.1"]);
    }
}
