use proptest::prelude::*;

use super::{PortKind, PortSpec};
use crate::values::{Steer, XdpMode};

fn error(spec: &str) -> String {
    spec.parse::<PortSpec>().unwrap_err().to_string()
}

#[test]
fn defaults_are_those_of_the_design() {
    let spec: PortSpec = "vhost-user:name=g0,socket=/run/g0.sock".parse().unwrap();
    let PortKind::VhostUser(port) = &spec.kind else { panic!("{spec:?}") };
    assert_eq!((port.queues, port.queue_size, port.socket_mode.0), (128, 32768, 0o660));
    assert_eq!((port.mtu, port.mac, port.mode.to_string()), (None, None, "server".to_owned()));
    let spec: PortSpec = "tap:name=up,ifname=tap0".parse().unwrap();
    let PortKind::Tap(tap) = &spec.kind else { panic!("{spec:?}") };
    assert_eq!((tap.queues, &tap.netns, spec.wait), (1, &None, false));
}

#[test]
fn wrong_shapes_and_kinds_say_what_is_right() {
    let form =
        "a port is KIND:key=value,key=value; KIND is tap or vhost-user or af-xdp or packet-mmap";
    for spec in ["", ":", "=", "name=g0", "tap:name", "tap:name=a,", "tap:,"] {
        assert_eq!(error(spec), form, "{spec}");
    }
    assert_eq!(
        error("vhost:name=a"),
        "unknown kind \"vhost\" (did you mean vhost-user?); known kinds are tap, vhost-user, \
         af-xdp, packet-mmap"
    );
    assert_eq!(
        error("bridge:name=a"),
        "unknown kind \"bridge\"; known kinds are tap, vhost-user, \
         af-xdp, packet-mmap"
    );
}

#[test]
fn wrong_keys_and_values_say_what_is_right() {
    assert_eq!(
        error("tap:name=a,ifnam=t0"),
        "unknown key \"ifnam\" (did you mean ifname?); tap has name, vlan, trunk, wait, cpus, \
         rate-mbps, burst-kb, rate-kpps, burst-frames, storm-kpps, \
         ifname, queues, spread, netns, offloads"
    );
    assert_eq!(
        error("vhost-user:name=a,zzz=t0"),
        "unknown key \"zzz\"; vhost-user has name, vlan, trunk, wait, cpus, \
         rate-mbps, burst-kb, rate-kpps, burst-frames, storm-kpps, socket, mode, queues, \
         queue-size, mtu, mac, socket-mode, socket-group, ring-reset, postcopy, offloads, \
         antispoof, ip"
    );
    assert_eq!(error("tap:name=a"), "tap needs ifname=INTERFACE");
    assert_eq!(error("tap:ifname=t0"), "tap needs name=NAME");
    assert_eq!(error("vhost-user:name=a"), "vhost-user needs socket=PATH");
    assert_eq!(error("tap:name=a,ifname=t0,name=b"), "name is given twice");
    let cases = [
        ("queues=0", "queues=0 is not allowed: queues is a number of pairs from 1 to 128"),
        ("queues=129", "queues=129 is not allowed: queues is a number of pairs from 1 to 128"),
        ("vlan=4095", "vlan=4095 is not allowed: vlan is a VLAN from 1 to 4094"),
        ("cpus=0+0", "cpus=0+0 is not allowed: cpus is up to 64 CPUs as A+B+C, each once"),
        ("cpus=", "cpus= is not allowed: cpus is up to 64 CPUs as A+B+C, each once"),
        (
            "trunk=1+0",
            "trunk=1+0 is not allowed: trunk is VLANs from 1 to 4094 as A+B+C, each once",
        ),
        (
            "trunk=7+7",
            "trunk=7+7 is not allowed: trunk is VLANs from 1 to 4094 as A+B+C, each once",
        ),
        ("mode=both", "mode=both is not allowed: mode is server or client"),
        ("mtu=67", "mtu=67 is not allowed: mtu is a number of bytes from 68 to 65535"),
        (
            "queue-size=32769",
            "queue-size=32769 is not allowed: queue-size is a number of descriptors from 1 to \
             32768",
        ),
        (
            "mac=01:00:00:00:00:00",
            "mac=01:00:00:00:00:00 is not allowed: mac is the address of one station as \
             02:00:00:00:00:01",
        ),
        (
            "socket-mode=888",
            "socket-mode=888 is not allowed: socket-mode is permission bits in octal, 0 to 0777",
        ),
        ("wait=yes", "wait=yes is not allowed: wait is on or off"),
        (
            "offloads=tso4",
            "offloads=tso4 is not allowed: offloads is on, off, or some of csum, tso4, tso6, ecn, \
             uso and gro joined with '+' (tso4, tso6 and uso need csum, ecn needs tso4 or tso6, \
             gro needs tso4, tso6 or uso)",
        ),
    ];
    for (setting, text) in cases {
        assert_eq!(error(&format!("vhost-user:name=a,socket=/s,{setting}")), text);
    }
    assert_eq!(
        error("tap:name=a b,ifname=t0"),
        "name=a b is not allowed: name is 1 to 64 letters, digits, '.', '_' and '-'"
    );
    assert_eq!(
        error("tap:name=a,ifname=0123456789abcdef"),
        "ifname=0123456789abcdef is not allowed: ifname is 1 to 15 bytes without '/', ':' and \
         white space"
    );
}

#[test]
fn uplinks_take_their_keys_and_no_others() {
    let spec = "af-xdp:name=u,ifname=eth0,queues=4,netns=blue,mode=zero-copy,xdp=replace,\
                steer=mac,busy-poll=on";
    let port: PortSpec = spec.parse().unwrap();
    let PortKind::AfXdp(xdp) = &port.kind else { panic!("{port:?}") };
    assert_eq!((xdp.mode, xdp.replace, xdp.steer), (XdpMode::ZeroCopy, true, Steer::Mac));
    assert_eq!((xdp.busy_poll, port.kind.pairs(), port.to_string().as_str()), (true, 4, spec));
    let port: PortSpec = "af-xdp:name=u,ifname=eth0,mode=auto,xdp=refuse".parse().unwrap();
    assert_eq!(port.to_string(), "af-xdp:name=u,ifname=eth0");
    let spec = "af-xdp:name=u,ifname=eth0,mode=copy,umem=all.of_us-1,umem-queues=64";
    let port: PortSpec = spec.parse().unwrap();
    let PortKind::AfXdp(xdp) = &port.kind else { panic!("{port:?}") };
    assert_eq!((xdp.umem.as_deref(), xdp.umem_queues), (Some("all.of_us-1"), Some(64)));
    assert_eq!(port.to_string(), spec);
    let spec = "packet-mmap:name=u,ifname=eth0,block-size=65536,blocks=8,retire-ms=2";
    let port: PortSpec = spec.parse().unwrap();
    let PortKind::PacketMmap(ring) = &port.kind else { panic!("{port:?}") };
    let sizes = (ring.block_size, ring.blocks, ring.retire_ms);
    assert_eq!((sizes, port.to_string().as_str()), ((Some(65536), Some(8), Some(2)), spec));
    assert_eq!(port.resource(), "interface eth0");
    assert_eq!(
        error("af-xdp:name=u,ifname=e,blocks=1"),
        "unknown key \"blocks\"; af-xdp has name, vlan, trunk, wait, cpus, \
         rate-mbps, burst-kb, rate-kpps, burst-frames, storm-kpps, \
         ifname, queues, \
         spread, netns, mode, xdp, steer, busy-poll, umem, umem-queues"
    );
    assert_eq!(
        error("packet-mmap:name=u,ifname=e,mod=x"),
        "unknown key \"mod\"; packet-mmap has name, vlan, trunk, wait, cpus, \
         rate-mbps, burst-kb, rate-kpps, burst-frames, storm-kpps, \
         ifname, queues, \
         spread, netns, offloads, block-size, blocks, retire-ms"
    );
    assert_eq!(error("packet-mmap:name=u"), "packet-mmap needs ifname=INTERFACE");
    for (settings, text) in [
        ("umem-queues=2", "umem-queues needs umem=NAME"),
        (
            "umem=u,mode=zero-copy",
            "mode=zero-copy has no umem: nobody can see when a device is done with memory that \
             others share",
        ),
        ("umem=a b", "umem=a b is not allowed: umem is 1 to 64 letters, digits, '.', '_' and '-'"),
        (
            "umem=u,umem-queues=65",
            "umem-queues=65 is not allowed: umem-queues is a number of queues from 1 to 64",
        ),
    ] {
        assert_eq!(error(&format!("af-xdp:name=u,ifname=e,{settings}")), text);
    }
    for (setting, rule) in [
        ("block-size=4097", "a number of bytes from 4096 to 16777216, a multiple of the page size"),
        ("blocks=1", "a number of blocks from 2 to 4096"),
        ("retire-ms=0", "a number of milliseconds from 1 to 10000"),
    ] {
        let key = setting.split('=').next().unwrap();
        assert_eq!(
            error(&format!("packet-mmap:name=u,ifname=e,{setting}")),
            format!("{setting} is not allowed: {key} is {rule}")
        );
    }
}

#[test]
fn uplinks_with_a_header_have_offloads() {
    for (setting, shown) in [
        ("", ""),
        (",offloads=on", ""),
        (",offloads=csum+tso4+tso6+ecn+uso", ""),
        (",offloads=off", ",offloads=off"),
        (",offloads=uso+csum", ",offloads=csum+uso"),
    ] {
        for kind in ["tap", "packet-mmap"] {
            let port: PortSpec = format!("{kind}:name=u,ifname=e0{setting}").parse().unwrap();
            assert_eq!(port.to_string(), format!("{kind}:name=u,ifname=e0{shown}"));
        }
    }
    for value in ["csum+gro", "on+gro", "tso4", "csum+ecn", "", "none"] {
        assert_eq!(
            error(&format!("tap:name=u,ifname=e,offloads={value}")),
            format!(
                "offloads={value} is not allowed: offloads is on, off, or some of csum, tso4, \
                 tso6, ecn and uso joined with '+' (tso4, tso6 and uso need csum, ecn needs tso4 \
                 or tso6)"
            )
        );
    }
    assert_eq!(
        error("af-xdp:name=u,ifname=e,offloads=off"),
        "af-xdp has no offloads: the kernel and the driver say what is left undone there"
    );
}

#[test]
fn limits_are_read_shown_and_checked() {
    let spec = "vhost-user:name=g,socket=/s,mac=02:00:00:00:00:01,antispoof=on,\
                ip=10.0.0.1+2001:db8::1,rate-mbps=0.5,burst-kb=3,rate-kpps=12.345,burst-frames=7,\
                storm-kpps=0.1";
    let port: PortSpec = spec.parse().unwrap();
    let limits = port.limits;
    assert_eq!(
        (limits.rate_kbps, limits.rate_fps, limits.storm_fps),
        (Some(500), Some(12_345), Some(100))
    );
    assert_eq!((limits.burst_kb, limits.burst_frames), (Some(3), Some(7)));
    assert_eq!(port.to_string(), spec);
    for (keys, expected) in [
        ("burst-kb=3", "burst-kb needs rate-mbps=N"),
        ("burst-frames=3", "burst-frames needs rate-kpps=N"),
        ("antispoof=on", "antispoof=on needs mac=ADDRESS"),
        ("ip=10.0.0.1", "ip needs antispoof=on"),
    ] {
        assert_eq!(error(&format!("vhost-user:name=g,socket=/s,{keys}")), expected);
    }
    let rate = "megabits per second from 0.001 to 1000000, with at most 3 decimals";
    for value in
        ["0", "0.0001", "-1", "1000000.001", "1.", ".5", "1e3", "1.+5", "9999999999999999999"]
    {
        assert_eq!(
            error(&format!("tap:name=t,ifname=t,rate-mbps={value}")),
            format!("rate-mbps={value} is not allowed: rate-mbps is {rate}")
        );
    }
    let ips = "up to 256 IPv4 and IPv6 addresses of stations as A+B+C, each once";
    for value in
        ["10.0.0", "10.0.0.1+10.0.0.1", "224.0.0.1", "0.0.0.0", "::", "255.255.255.255", ""]
    {
        assert_eq!(
            error(&format!("vhost-user:name=g,socket=/s,ip={value}")),
            format!("ip={value} is not allowed: ip is {ips}")
        );
    }
    assert!(error("tap:name=t,ifname=t,antispoof=on").starts_with("unknown key \"antispoof\""));
}

#[test]
fn errors_are_one_line() {
    for spec in ["tap:name=a\nb,ifname=t", "tap:na\nme=a", "ta\np:name=a", "tap:ifname=\n\n"] {
        assert!(!crate::spec::one_line(&error(spec)).contains('\n'), "{spec:?}");
    }
}

fn name() -> impl Strategy<Value = String> {
    "[a-zA-Z0-9._-]{1,64}"
}

fn common() -> impl Strategy<Value = String> {
    let vlan = prop_oneof![Just(String::new()), (1..4095u16).prop_map(|v| format!(",vlan={v}"))];
    let trunk = proptest::collection::btree_set(1..4095u16, 0..5).prop_map(|vlans| {
        let vlans: Vec<_> = vlans.iter().map(u16::to_string).collect();
        if vlans.is_empty() { String::new() } else { format!(",trunk={}", vlans.join("+")) }
    });
    let wait = prop_oneof![Just(""), Just(",wait=on"), Just(",wait=off")];
    (name(), vlan, trunk, wait).prop_map(|(n, v, t, w)| format!("name={n}{v}{t}{w}"))
}

fn spec() -> impl Strategy<Value = String> {
    let size = (1..=32768u32, 68..=65535u32, 1..=128u16);
    let tap = (common(), "[a-z][a-z0-9._-]{0,14}", 1..=256u16)
        .prop_map(|(c, i, q)| format!("tap:{c},ifname={i},queues={q}"));
    let guest = (common(), "/[a-z/=: ]{1,60}", size, 0..0o1000u32, any::<[u8; 5]>()).prop_map(
        |(c, s, (size, mtu, queues), mode, [a, b, d, e, f])| {
            format!(
                "vhost-user:{c},socket={s},queue-size={size},mtu={mtu},queues={queues},\
                 socket-mode={mode:o},mac=02:{a:02X}:{b:02x}:{d:02x}:{e:02x}:{f:02x},\
                 mode=client,socket-group=kvm"
            )
        },
    );
    let modes = prop_oneof![Just("auto"), Just("zero-copy"), Just("copy"), Just("generic")];
    let umem = prop_oneof![
        Just(String::new()),
        (0..9u32, 1..=64u16)
            .prop_map(|(name, queues)| format!(",umem=u{name},umem-queues={queues}"))
    ];
    let switches = (any::<[bool; 3]>(), umem);
    let xdp = (common(), modes, switches).prop_map(|(c, mode, ([xdp, steer, poll], umem))| {
        let umem = if mode == "zero-copy" { "" } else { &umem };
        let pick = |yes: bool, a: &'static str, b: &'static str| if yes { a } else { b };
        format!(
            "af-xdp:{c},ifname=e0,mode={mode},xdp={},steer={},busy-poll={}{umem}",
            pick(xdp, "replace", "refuse"),
            pick(steer, "mac", "all"),
            pick(poll, "on", "off")
        )
    });
    let ring = (common(), 1..=4096u32, 2..=4096u32, 1..=10_000u32).prop_map(|(c, pages, n, ms)| {
        let bytes = pages << 12;
        format!("packet-mmap:{c},ifname=e0,block-size={bytes},blocks={n},retire-ms={ms}")
    });
    prop_oneof![tap, guest, xdp, ring]
}

proptest! {
    #[test]
    fn a_port_shown_and_read_is_the_same(text in spec()) {
        let port: PortSpec = text.parse().unwrap();
        let again: PortSpec = port.to_string().parse().unwrap();
        prop_assert_eq!(port, again);
    }

    #[test]
    fn any_text_is_read_or_refused_in_one_line(text in ".*") {
        if let Err(error) = text.parse::<PortSpec>() {
            prop_assert!(!crate::spec::one_line(&error.to_string()).contains('\n'));
        }
    }
}

#[test]
fn a_umem_has_room_for_all_who_name_it_or_for_what_one_asks() {
    let rooms = |specs: &[&str]| {
        let ports: Vec<PortSpec> = specs.iter().map(|spec| spec.parse().unwrap()).collect();
        super::umem_rooms(&ports).into_iter().collect::<Vec<_>>()
    };
    let of = |name: &str, room: u16| (name.to_owned(), room);
    assert_eq!(rooms(&["af-xdp:name=a,ifname=a", "tap:name=t,ifname=t,queues=9"]), []);
    let (a, b) = ("af-xdp:name=a,ifname=a,queues=2,umem=u", "af-xdp:name=b,ifname=b,umem=u");
    let c = "af-xdp:name=c,ifname=c,queues=4,umem=v";
    assert_eq!(rooms(&[a, c, b]), [of("u", 3), of("v", 4)]);
    let (d, e) = (format!("{b}x,umem-queues=7"), format!("{b},umem-queues=5"));
    assert_eq!(rooms(&[a, &d, &e]), [of("u", 5), of("ux", 7)]);
    assert_eq!(rooms(&["af-xdp:name=a,ifname=a,queues=65,umem=u", b]), [of("u", 64)]);
}
