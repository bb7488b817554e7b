use proptest::prelude::*;

use super::{PortKind, PortSpec};

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
    let form = "a port is KIND:key=value,key=value; KIND is tap or vhost-user";
    for spec in ["", ":", "=", "name=g0", "tap:name", "tap:name=a,", "tap:,"] {
        assert_eq!(error(spec), form, "{spec}");
    }
    assert_eq!(
        error("vhost:name=a"),
        "unknown kind \"vhost\" (did you mean vhost-user?); known kinds are tap, vhost-user"
    );
    assert_eq!(error("bridge:name=a"), "unknown kind \"bridge\"; known kinds are tap, vhost-user");
    for kind in ["af-xdp", "packet-mmap"] {
        let text = format!("kind {kind} is not supported in this version; use tap or vhost-user");
        assert_eq!(error(&format!("{kind}:name=a,ifname=eth0")), text);
    }
}

#[test]
fn wrong_keys_and_values_say_what_is_right() {
    assert_eq!(
        error("tap:name=a,ifnam=t0"),
        "unknown key \"ifnam\" (did you mean ifname?); tap has name, vlan, trunk, wait, ifname, \
         queues, netns"
    );
    assert_eq!(
        error("vhost-user:name=a,zzz=t0"),
        "unknown key \"zzz\"; vhost-user has name, vlan, trunk, wait, socket, mode, queues, \
         queue-size, mtu, mac, socket-mode, socket-group, ring-reset"
    );
    assert_eq!(error("tap:name=a"), "tap needs ifname=INTERFACE");
    assert_eq!(error("tap:ifname=t0"), "tap needs name=NAME");
    assert_eq!(error("vhost-user:name=a"), "vhost-user needs socket=PATH");
    assert_eq!(error("tap:name=a,ifname=t0,name=b"), "name is given twice");
    let cases = [
        ("queues=0", "queues=0 is not allowed: queues is a number of pairs from 1 to 128"),
        ("queues=129", "queues=129 is not allowed: queues is a number of pairs from 1 to 128"),
        ("vlan=4095", "vlan=4095 is not allowed: vlan is a VLAN from 1 to 4094"),
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
    prop_oneof![tap, guest]
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
