#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use std::path::Path;

use proptest::prelude::*;

use super::{Config, Difference, check_stations, check_unique};
use crate::spec::PortSpec;
use crate::values::{Poll, StateDir, Workers};

const FILE: &str = r#"
# Two guests and the host.
[switch]
workers = [0, 1]
poll = "adaptive"
poll-us = 50
ageing = 300
forward-reserved = true

[[port]]
kind = "vhost-user"
name = "g0"
socket = "/run/g0.sock"
socket-mode = 0o600
trunk = [1, 2, 30]

[[port]]
kind = "tap"
name = "up"
ifname = "tap0"
queues = 2

[[static]]
mac = "02:00:00:00:00:01"
vlan = 30
port = "g0"
"#;

fn error(text: &str) -> String {
    Config::parse(text).unwrap_err().to_string()
}

#[test]
fn a_file_says_what_specs_and_options_say() {
    let config = Config::parse(FILE).unwrap();
    assert_eq!(config.switch.workers, Some(Workers::Cpus(vec![0, 1])));
    assert_eq!(config.switch.poll, Some(Poll::Adaptive));
    assert_eq!((config.switch.poll_us, config.switch.ageing_s), (Some(50), Some(300)));
    assert_eq!(config.switch.forward_reserved, Some(true));
    let specs: Vec<PortSpec> = [
        "vhost-user:name=g0,socket=/run/g0.sock,socket-mode=0600,trunk=1+2+30",
        "tap:name=up,ifname=tap0,queues=2",
    ]
    .iter()
    .map(|spec| spec.parse().unwrap())
    .collect();
    assert_eq!(config.ports, specs);
    assert_eq!(config.statics[0].vlan.unwrap().number(), 30);
}

#[test]
fn errors_name_line_value_and_what_is_allowed() {
    let cases = [
        ("x = 1", "line 1: unknown key \"x\"; the file has switch, port, static"),
        (
            "\n[[prt]]\nname = \"a\"",
            "line 2: unknown key \"prt\" (did you mean port?); the file has switch, port, static",
        ),
        ("[port]\nkind = \"tap\"", "line 1: port is a list of tables: [[port]]"),
        (
            "[[port]]\nname = \"a\"",
            "line 1: a port needs kind=tap, vhost-user, af-xdp or packet-mmap",
        ),
        (
            "[[port]]\nname = \"a\"\nkind = \"tapp\"",
            "line 3: unknown kind \"tapp\" (did you mean tap?); known kinds are tap, vhost-user, \
             af-xdp, packet-mmap",
        ),
        (
            "[[port]]\nkind = \"tap\"\nname = \"a\"\nifname = \"t\"\nqueues = 0",
            "line 5: queues=0 is not allowed: queues is a number of pairs from 1 to 256",
        ),
        (
            "[[port]]\nkind = \"tap\"\nname = \"a\"\nifnam = \"t\"",
            "line 4: unknown key \"ifnam\" (did you mean ifname?); tap has name, vlan, trunk, \
             wait, cpus, rate-mbps, burst-kb, rate-kpps, burst-frames, \
             storm-kpps, ifname, queues, spread, netns, offloads",
        ),
        ("[[port]]\nkind = \"tap\"\nname = \"a\"", "line 1: tap needs ifname=INTERFACE"),
        (
            "[switch]\npol = \"busy\"",
            "line 2: unknown key \"pol\" (did you mean poll?); [switch] has workers, poll, \
             poll-us, rebalance, control, state-dir, metrics, ageing, fdb-entries, \
             fdb-entries-per-port, retries, forward-reserved",
        ),
        (
            "[switch]\n\npoll = \"lazy\"",
            "line 3: poll=lazy is not allowed: poll is adaptive, busy or interrupt",
        ),
        (
            "[switch]\npoll-us = 1.5",
            "line 2: poll-us is a number with a fraction; write a text, a number, true, false or \
             a list of them",
        ),
        (
            "[[static]]\nmac = \"02:00:00:00:00:01\"\nport = \"g9\"",
            "line 1: static entry for port \"g9\", which is not here",
        ),
        ("[[static]]\nport = \"g9\"", "line 1: [[static]] needs mac=ADDRESS"),
    ];
    for (text, message) in cases {
        assert_eq!(error(text), message, "{text}");
    }
    let twice = "[[port]]\nkind = \"tap\"\nname = \"a\"\nifname = \"t\"\n\
                 [[port]]\nkind = \"tap\"\nname = \"a\"\nifname = \"u\"";
    assert_eq!(error(twice), "line 5: two ports have the name a");
    let guest = |name: &str| {
        format!(
            "[[port]]\nkind = \"vhost-user\"\nname = \"{name}\"\nsocket = \"/{name}\"\n\
             mac = \"02:00:00:00:00:01\"\n"
        )
    };
    assert_eq!(
        error(&(guest("a") + &guest("b"))),
        "line 6: 02:00:00:00:00:01 is behind port a already, not b"
    );
    assert!(error("[switch\n").starts_with("line 1: "));
    assert_eq!(
        Config::load(Path::new("/nowhere/x.toml"), &[]).unwrap_err().to_string(),
        "/nowhere/x.toml: No such file or directory (os error 2)"
    );
}

const STATION: &str = "\n[[static]]\nmac = \"02:00:00:00:00:01\"\n";

#[test]
fn static_entries_name_ports_beside_the_file() {
    let text = format!("{STATION}port = \"cli\"");
    let cli: PortSpec = "tap:name=cli,ifname=t".parse().unwrap();
    assert_eq!(Config::parse_beside(&text, &[cli]).unwrap().statics.len(), 1);
    assert_eq!(error(&text), "line 2: static entry for port \"cli\", which is not here");
}

#[test]
fn static_entries_do_not_contradict() {
    let ports: Vec<PortSpec> =
        ["tap:name=a,ifname=t", "tap:name=b,ifname=u", "tap:name=c,ifname=v,trunk=7,vlan=8"]
            .iter()
            .map(|spec| spec.parse().unwrap())
            .collect();
    let read = |entries: &[&str]| {
        let text: String = entries.iter().map(|entry| format!("{STATION}{entry}\n")).collect();
        Config::parse_beside(&text, &ports).map_err(|e| e.to_string()).map(|c| c.statics.len())
    };
    let [a, b] = ["port = \"a\"", "port = \"b\""];
    let clash = "line 6: 02:00:00:00:00:01 is behind port a already, not b";
    assert_eq!(read(&[a, b]), Err(clash.to_owned()));
    assert_eq!(read(&[a, "vlan = 7\nport = \"b\"", "vlan = 8\nport = \"c\""]), Ok(3));
    let clash = "line 7: 02:00:00:00:00:01 in VLAN 7 is behind port b already, not c";
    assert_eq!(read(&["vlan = 7\nport = \"b\"", "vlan = 7\nport = \"c\""]), Err(clash.to_owned()));
    // A VLAN that the port is not in.
    assert_eq!(
        read(&["vlan = 9\nport = \"c\""]),
        Err("line 2: port c is not in VLAN 9".to_owned())
    );
    assert_eq!(
        read(&["port = \"c\""]),
        Err("line 2: a static entry for port c needs vlan=8 or 7".to_owned())
    );
    // The key mac is such an entry in each of the port's VLANs.
    let guests = |more: &str| {
        [
            format!("vhost-user:name=g,socket=/g,mac=02:00:00:00:00:01{more}"),
            "tap:name=c,ifname=v,trunk=7".to_owned(),
        ]
        .map(|spec| spec.parse::<PortSpec>().unwrap())
    };
    let statics = Config::parse_beside(&format!("{STATION}vlan = 7\nport = \"c\""), &ports);
    let statics = statics.unwrap().statics;
    assert_eq!(check_stations(&guests(""), &statics), Ok(()));
    let clash = check_stations(&guests(",vlan=7"), &statics).unwrap_err();
    assert_eq!(clash.entry, Some(0));
    assert_eq!(clash.message, "02:00:00:00:00:01 in VLAN 7 is behind port g already, not c");
}

#[test]
fn sockets_and_interfaces_are_used_once() {
    let ports = |specs: [&str; 2]| specs.map(|spec| spec.parse::<PortSpec>().unwrap());
    let check = |specs| check_unique(&ports(specs));
    assert_eq!(
        check(["vhost-user:name=a,socket=/s", "vhost-user:name=b,socket=/s"]),
        Err("socket /s belongs to port a already, not to b".to_owned())
    );
    assert_eq!(
        check(["tap:name=a,ifname=t", "tap:name=b,ifname=t"]),
        Err("interface t belongs to port a already, not to b".to_owned())
    );
    assert_eq!(check(["tap:name=a,ifname=t", "tap:name=b,ifname=t,netns=n"]), Ok(()));
}

#[test]
fn a_difference_names_what_changed_and_nothing_else() {
    let old = Config::parse(FILE).unwrap();
    assert!(Difference::between(&old, &old).is_empty());
    let text = FILE.replace("queues = 2", "queues = 4").replace("ageing = 300", "ageing = 60");
    let mut new = Config::parse(&text).unwrap();
    new.ports.push("tap:name=new,ifname=t9".parse().unwrap());
    let difference = Difference::between(&old, &new);
    assert_eq!(difference.removed, ["up"]);
    assert_eq!(difference.unchanged, ["g0"]);
    let added: Vec<_> = difference.added.iter().map(|port| port.name.as_str()).collect();
    assert_eq!(added, ["up", "new"]);
    assert_eq!(difference.switch, ["ageing"]);
    let text = FILE.replace("vlan = 30", "vlan = 2");
    let difference = Difference::between(&old, &Config::parse(&text).unwrap());
    assert_eq!((difference.removed, difference.unchanged), (vec!["g0".into()], vec!["up".into()]));
}

#[test]
fn other_limits_leave_a_port_as_it_is() {
    let config = |ports: [&str; 2]| Config {
        ports: ports.iter().map(|spec| spec.parse().unwrap()).collect(),
        ..Config::default()
    };
    let guest = "vhost-user:name=g,socket=/s,mac=02:00:00:00:00:01";
    let old = config([guest, "tap:name=t,ifname=t,rate-mbps=1"]);
    let limited = format!("{guest},antispoof=on,ip=10.0.0.1,storm-kpps=1");
    let new = config([&limited, "tap:name=t,ifname=t,rate-mbps=2"]);
    let difference = Difference::between(&old, &new);
    assert_eq!(difference.limits, new.ports);
    assert!(difference.removed.is_empty() && difference.added.is_empty() && !difference.is_empty());
    // With anything else it is another port.
    let new = config([&format!("{limited},queues=2"), "tap:name=t,ifname=t,rate-mbps=1"]);
    let difference = Difference::between(&old, &new);
    assert_eq!((difference.limits.len(), difference.removed), (0, vec!["g".to_owned()]));
    assert_eq!(difference.unchanged, ["t"]);
}

/// Any text, and text that looks like a file.
fn file_like() -> impl Strategy<Value = String> {
    let head = "(\\[\\[?(port|switch|static)\\]?\\]\n)?";
    let line = "([a-z]{1,8} *= *[0-9\"a-z\\[\\]{}.,]*\n){0,6}";
    let lines = proptest::string::string_regex(&format!("{head}{line}")).unwrap();
    prop_oneof![proptest::string::string_regex(".*").unwrap(), lines]
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused_in_one_line(text in file_like()) {
        if let Err(error) = Config::parse(&text) {
            prop_assert!(!error.to_string().contains('\n'));
        }
    }

    #[test]
    fn applying_a_difference_gives_the_new_ports(old in 0u8..64, new in 0u8..64) {
        let config = |bits: u8| {
            let ports = (0..3).filter_map(|i| {
                let queues = (bits >> (2 * i)) & 3;
                let spec = format!("tap:name=p{i},ifname=t{i},queues={queues}");
                (queues > 0).then(|| spec.parse::<PortSpec>().unwrap())
            });
            Config { ports: ports.collect(), ..Config::default() }
        };
        let (old, new) = (config(old), config(new));
        let difference = Difference::between(&old, &new);
        let mut ports = old.ports.clone();
        ports.retain(|port| !difference.removed.contains(&port.name));
        prop_assert_eq!(ports.len(), difference.unchanged.len());
        ports.extend(difference.added);
        ports.sort_by(|a, b| a.name.cmp(&b.name));
        prop_assert_eq!(ports, new.ports);
    }
}

#[test]
fn the_state_directory_is_a_path_or_off() {
    let set = |text: &str| Config::parse(&format!("[switch]\nstate-dir = \"{text}\""));
    let of = |text: &str| set(text).unwrap().switch.state_dir.unwrap();
    assert_eq!(of("off"), StateDir::Off);
    assert_eq!(of("/run/x"), StateDir::At("/run/x".into()));
    assert_eq!(of("/run/x").to_string(), "/run/x");
    let error = set("").unwrap_err().to_string();
    assert_eq!(error, "line 2: state-dir= is not allowed: state-dir is a directory, or off");
}
