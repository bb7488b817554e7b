//! Wrong use ends with 2 and one line, failures with 1 and one line.

use std::path::Path;

use crate::bed::{Bed, causeway};

fn error(arguments: &[&str]) -> (i32, String) {
    let (code, out, error) = causeway(Path::new("/"), arguments);
    assert_eq!(out, "");
    assert_eq!(error.lines().count(), 1, "{error}");
    (code, error.trim_end().to_owned())
}

#[test]
fn wrong_specs_and_options_end_with_2() {
    let cases: [(&[&str], &str); 9] = [
        (
            &["run", "--port", "tap:name=a,ifname=t,queues=0"],
            "causeway: invalid value 'tap:name=a,ifname=t,queues=0' for '--port <SPEC>': queues=0 \
             is not allowed: queues is a number of pairs from 1 to 256",
        ),
        (
            &["run", "--port", "af-xdp:name=a,ifname=t,mode=fast"],
            "causeway: invalid value 'af-xdp:name=a,ifname=t,mode=fast' for '--port <SPEC>': \
             mode=fast is not allowed: mode is auto, zero-copy, copy or generic",
        ),
        (
            &["run", "--workers", "x"],
            "causeway: invalid value 'x' for '--workers <LIST>': workers=x is not allowed: workers \
             is a list of CPUs as 0,1 or 0-3, or per-queue",
        ),
        (
            &["run", "--port", "tap:name=a,ifname=t", "--port", "tap:name=a,ifname=u"],
            "causeway: two ports have the name a",
        ),
        (
            &["run", "--config", "/nowhere.toml"],
            "causeway: /nowhere.toml: No such file or directory (os error 2)",
        ),
        (&["run", "--resume", "/tmp"], "causeway: unexpected argument '--resume' found"),
        (
            &["run", "--rebalance", "soon"],
            "causeway: invalid value 'soon' for '--rebalance <SECONDS>': rebalance=soon is not \
             allowed: rebalance is off, or a number of seconds from 1 to 3600",
        ),
        (
            &["run", "--rebalance", "5", "--workers", "per-queue"],
            "causeway: rebalance has nothing to move with workers=per-queue: every pair has its \
             own worker",
        ),
        (
            &["ctl", "port", "add", "tap:name=a"],
            "causeway: invalid value 'tap:name=a' for '<SPEC>': tap needs ifname=INTERFACE",
        ),
    ];
    for (arguments, text) in cases {
        assert_eq!(error(arguments), (2, text.to_owned()));
    }
    let (code, text) = error(&["run", "--workers", "4000"]);
    assert_eq!(code, 2);
    assert!(text.starts_with("causeway: workers names CPU 4000; this process may use "), "{text}");
    let (code, text) = error(&["run", "--port", "tap:name=a,ifname=t,cpus=4000"]);
    assert_eq!(code, 2);
    let start = "causeway: port a: cpus names CPU 4000, where no worker runs: they run on ";
    assert!(text.starts_with(start), "{text}");
    let pinned = "tap:name=a,ifname=t,cpus=0";
    let (code, text) = error(&["run", "--workers", "per-queue", "--port", pinned]);
    assert_eq!(code, 2);
    assert!(
        text.ends_with("cpus names CPU 0, but no worker is shared: workers=per-queue"),
        "{text}"
    );
    let spread = "tap:name=a,ifname=t,spread=on";
    let (code, text) = error(&["run", "--workers", "per-queue", "--port", spread]);
    assert_eq!(code, 2);
    let end = "port a: spread=on has no workers to share with: workers=per-queue";
    assert!(text.ends_with(end), "{text}");
}

#[test]
fn a_wrong_file_is_named_with_its_line() {
    let bed = Bed::new();
    let file = bed.path("c.toml");
    std::fs::write(&file, "[switch]\n\npol = \"busy\"\n").unwrap();
    let (code, text) = error(&["run", "--config", file.to_str().unwrap()]);
    assert_eq!(code, 2);
    let start = format!("causeway: {}:3: unknown key \"pol\" (did you mean poll?)", file.display());
    assert!(text.starts_with(&start), "{text}");
}

#[test]
fn static_entries_that_contradict_end_with_2() {
    let bed = Bed::new();
    let file = bed.path("c.toml");
    let station = "[[static]]\nmac = \"02:00:00:00:00:01\"\nport = ";
    let text = format!("{station}\"a\"\n\n{station}\"b\"\n");
    std::fs::write(&file, text).unwrap();
    let name = file.to_str().unwrap();
    let ports = ["--port", "tap:name=a,ifname=t", "--port", "tap:name=b,ifname=u"];
    let arguments = [&["run", "--config", name], &ports[..]].concat();
    assert_eq!(
        error(&arguments),
        (2, format!("causeway: {name}:5: 02:00:00:00:00:01 is behind port a already, not b"))
    );
    let ports = ["--port", "tap:name=a,ifname=t,vlan=3", "--port", "tap:name=b,ifname=u"];
    let arguments = [&["run", "--config", name], &ports[..]].concat();
    assert_eq!(
        error(&arguments),
        (2, format!("causeway: {name}:1: a static entry for port a needs vlan=3"))
    );
    let guest = |name| format!("vhost-user:name={name},socket=/{name},mac=02:00:00:00:00:01");
    assert_eq!(
        error(&["run", "--port", &guest("a"), "--port", &guest("b")]),
        (2, "causeway: 02:00:00:00:00:01 is behind port a already, not b".to_owned())
    );
}

#[test]
fn failures_at_start_end_with_1_and_name_the_cause() {
    let bed = Bed::new();
    let control = bed.control();
    let run = |port: &str| {
        error(&["run", "--log", "off", "--control", control.to_str().unwrap(), "--port", port])
    };
    assert_eq!(
        run("tap:name=a,ifname=t,netns=cw-none"),
        (
            1,
            "causeway: port a: network namespace cw-none cannot be opened: No such file or \
             directory (os error 2)"
                .to_owned()
        )
    );
    let (code, text) = run("vhost-user:name=a,socket=/nowhere/s,mode=server");
    assert_eq!(code, 1);
    assert!(text.starts_with("causeway: port a: ") && text.contains("/nowhere/"), "{text}");
    let group = "vhost-user:name=a,socket=/tmp/cw-none.sock,socket-group=cw-none";
    let (code, text) = run(group);
    assert_eq!((code, text), (1, "causeway: port a: there is no group \"cw-none\"".to_owned()));
    assert!(!control.exists());
}

#[test]
fn ctl_without_a_switch_ends_with_1() {
    let bed = Bed::new();
    let (code, out, text) = bed.ctl_full(&["stats"]);
    assert_eq!((code, out.as_str()), (1, ""));
    assert_eq!(
        text,
        format!(
            "causeway: cannot reach the switch at {}: No such file or directory (os error 2); \
             does `causeway run` run?\n",
            bed.control().display()
        )
    );
}

#[test]
fn help_and_version_end_with_0() {
    for arguments in [&["--help"][..], &["--version"], &["run", "--help"], &["ctl", "--help"]] {
        let (code, out, error) = causeway(Path::new("/"), arguments);
        assert_eq!((code, error.as_str()), (0, ""));
        assert!(!out.is_empty());
    }
}

#[test]
fn the_demo_shows_that_it_works() {
    let (code, out, error) = causeway(Path::new("/"), &["demo"]);
    assert_eq!((code, error.as_str()), (0, ""), "{out}");
    assert!(out.contains("none was lost") && out.contains("RX FRAMES"), "{out}");
}
