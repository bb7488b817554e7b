//! A running switch holds no more than it needs, and says so.

use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

use crate::bed::{Bed, PROGRAM, causeway, eventually};
use crate::guest::Guest;

const GUESTS: [&str; 4] =
    ["--port", "vhost-user:name=g0,socket=g0.sock", "--port", "vhost-user:name=g1,socket=g1.sock"];

/// What the kernel says of each thread: name, and the line of its status that begins with `key`.
fn threads(bed: &Bed, key: &str) -> Vec<(String, String)> {
    let folder = format!("/proc/{}/task", bed.id());
    let status = |task: std::io::Result<std::fs::DirEntry>| {
        let text = std::fs::read_to_string(task.unwrap().path().join("status")).unwrap();
        let line = |key: &str| {
            let line = text.lines().find(|line| line.starts_with(key)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        (line("Name:"), line(key))
    };
    std::fs::read_dir(folder).unwrap().map(status).collect()
}

#[test]
fn every_thread_is_restricted_and_frames_move_all_the_same() {
    let bed = Bed::started(&GUESTS);
    let (mut g0, _g1) = (Guest::join(&bed, "g0.sock", 1), Guest::join(&bed, "g1.sock", 2));
    for name in ["g0", "g1"] {
        let _ = bed.wait_state(name, "up");
    }
    g0.send(7);
    for (key, value) in [("NoNewPrivs:", "1"), ("Seccomp:", "2"), ("CapEff:", "0000000000000000")] {
        let threads = threads(&bed, key);
        assert!(threads.iter().all(|(_, found)| found == value), "{key} {threads:?}");
        assert!(threads.iter().any(|(name, _)| name == "worker-0"));
    }
    let sandbox = &bed.json(&["version"])["sandbox"];
    assert_eq!((&sandbox["on"], &sandbox["seccomp"]), (&true.into(), &"on".into()), "{sandbox}");
    assert_eq!(sandbox["no_new_privs"], "on");
    assert_eq!(
        (&sandbox["refused"], &sandbox["capabilities"]),
        (&0.into(), &serde_json::json!([]))
    );
    assert!(bed.ctl(&["version"]).contains("\nsandbox: on\n  no_new_privs  on\n"));
    assert!(bed.log().contains("sandbox: on") && !bed.log().contains("refused"), "{}", bed.log());
}

#[test]
fn without_it_nothing_is_restricted() {
    let bed = Bed::started(&[&GUESTS[..], &["--sandbox", "off"]].concat());
    assert!(threads(&bed, "Seccomp:").iter().all(|(_, found)| found == "0"));
    assert!(threads(&bed, "NoNewPrivs:").iter().all(|(_, found)| found == "0"));
    assert!(bed.ctl(&["version"]).contains("\nsandbox: off\n"));
}

#[test]
fn sockets_and_kinds_that_come_later_must_have_been_allowed() {
    let elsewhere = tempfile::tempdir().unwrap();
    let folder = elsewhere.path().to_str().unwrap();
    let late = format!("vhost-user:name=late,socket={folder}/late.sock");
    let add = |bed: &Bed, spec: &str| bed.ctl_full(&["port", "add", spec]);

    let bed = Bed::started(&GUESTS);
    assert_eq!(add(&bed, "vhost-user:name=g2,socket=g2.sock").0, 0);
    let landlock = bed.json(&["version"])["sandbox"]["landlock"] == "on";
    if landlock {
        let (code, _, error) = add(&bed, &late);
        let help = format!(
            "the sandbox allows no socket in {folder}: start with --allow-dir {folder}, or with \
             --sandbox off"
        );
        assert_eq!((code, error), (1, format!("causeway: port late: {help}\n")));
    }
    let (code, _, error) = add(&bed, "tap:name=t,ifname=cwnever0");
    assert_eq!(code, 1);
    assert!(
        error.contains("gave up CAP_NET_ADMIN") && error.contains("--allow-kind tap"),
        "{error}"
    );
    assert!(!Path::new("/sys/class/net/cwnever0").exists());

    let bed =
        Bed::started(&[&GUESTS[..], &["--allow-dir", folder, "--allow-kind", "tap"]].concat());
    assert_eq!(add(&bed, &late).0, 0, "{}", bed.log());
    if rustix::process::geteuid().is_root() {
        let tap = format!("cwl{}", bed.id());
        assert_eq!(add(&bed, &format!("tap:name=t,ifname={tap}")).0, 0, "{}", bed.log());
        let _ = bed.wait_state("t", "up");
        let kept = &bed.json(&["version"])["sandbox"]["capabilities"];
        assert_eq!(*kept, serde_json::json!(["CAP_NET_ADMIN"]));
    }

    let (code, _, error) =
        causeway(bed.folder.path(), &["run", "--control", "c.sock", "--allow-dir", "/nowhere"]);
    assert_eq!(code, 1);
    assert!(error.ends_with("--allow-dir /nowhere: No such file or directory (os error 2)\n"));
}

#[test]
fn threads_that_come_later_are_restricted_too() {
    let mut bed = Bed::new();
    bed.start(&[&GUESTS[..], &["--workers", "per-queue", "--metrics", "0"]].concat());
    let (mut g0, _g1) = (Guest::join(&bed, "g0.sock", 1), Guest::join(&bed, "g1.sock", 2));
    for name in ["g0", "g1"] {
        let _ = bed.wait_state(name, "up");
    }
    let mut capture = bed.spawn_ctl(&["capture", "g0", "--count", "3"]);
    eventually("the capture has begun", || {
        let threads = threads(&bed, "Seccomp:");
        assert!(threads.iter().all(|(_, found)| found == "2"), "{threads:?}");
        // Main, two workers, and whoever serves the capture.
        threads.len() > 3
    });
    g0.send(3);
    assert!(capture.wait().unwrap().success());
    let sandbox = &bed.json(&["version"])["sandbox"];
    assert_eq!(sandbox["refused"], 0, "{}", bed.log());
}

/// Two guests join, and frames pass.
fn frames_pass(bed: &Bed) {
    let (mut g0, _g1) = (Guest::join(bed, "g0.sock", 1), Guest::join(bed, "g1.sock", 2));
    for name in ["g0", "g1"] {
        let _ = bed.wait_state(name, "up");
    }
    g0.send(7);
}

/// A user without any right. Who runs the tests without rights of root is one, too.
const NOBODY: u32 = 65_534;

#[test]
fn a_switch_of_nobody_serves_and_is_restricted() {
    let mut bed = Bed::new();
    let program = bed.path("causeway");
    let _ = std::fs::copy(PROGRAM, &program).unwrap();
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).unwrap();
    let mut command = Command::new(&program);
    let _ = command.env_clear();
    let user = if rustix::process::geteuid().is_root() {
        chown(bed.folder.path(), Some(NOBODY), Some(NOBODY)).unwrap();
        let _ = command.uid(NOBODY).gid(NOBODY);
        NOBODY
    } else {
        rustix::process::geteuid().as_raw()
    };
    bed.start_command(&mut command, &GUESTS);
    for (key, value) in [("Uid:", &*user.to_string()), ("CapPrm:", "0000000000000000")] {
        assert!(threads(&bed, key).iter().all(|(_, found)| found == value), "{key}");
    }
    frames_pass(&bed);
    for (key, value) in [("NoNewPrivs:", "1"), ("Seccomp:", "2")] {
        let threads = threads(&bed, key);
        assert!(threads.iter().all(|(_, found)| found == value), "{key} {threads:?}");
    }
    let sandbox = &bed.json(&["version"])["sandbox"];
    assert_eq!((&sandbox["seccomp"], &sandbox["no_new_privs"]), (&"on".into(), &"on".into()));
    assert_eq!(sandbox["refused"], 0, "{}", bed.log());
    // A port whose kind it has no right to is refused in words, not by a signal.
    let (code, _, error) = bed.ctl_full(&["port", "add", "tap:name=t,ifname=cwnobody0"]);
    assert_eq!(code, 1);
    assert!(error.contains("CAP_NET_ADMIN"), "{error}");
}

/// System calls of Landlock fail in this thread, and in what it starts, as in a kernel without.
fn without_landlock() {
    let calls = [libc::SYS_landlock_create_ruleset, libc::SYS_landlock_add_rule];
    let rules = calls.into_iter().chain([libc::SYS_landlock_restrict_self]);
    let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let rules = rules.map(|call| (call, Vec::new())).collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, missing, arch).unwrap();
    let filter: BpfProgram = filter.try_into().unwrap();
    apply_filter(&filter).unwrap();
}

#[test]
fn a_kernel_without_landlock_leaves_the_rest_in_force() {
    let mut bed = Bed::new();
    std::thread::scope(|scope| {
        let start = || {
            without_landlock();
            bed.start(&GUESTS);
        };
        scope.spawn(start).join().unwrap();
    });
    frames_pass(&bed);
    let sandbox = &bed.json(&["version"])["sandbox"];
    let landlock = "off: this kernel has none, or it is not enabled";
    assert_eq!((&sandbox["on"], &sandbox["landlock"]), (&true.into(), &landlock.into()));
    assert_eq!((&sandbox["seccomp"], &sandbox["refused"]), (&"on".into(), &0.into()));
    for (key, value) in [("NoNewPrivs:", "1"), ("CapEff:", "0000000000000000")] {
        let threads = threads(&bed, key);
        assert!(threads.iter().all(|(_, found)| found == value), "{key} {threads:?}");
    }
    // One filter is this test's.
    let filters = threads(&bed, "Seccomp_filters:");
    assert!(filters.iter().all(|(_, count)| count.parse::<u32>().unwrap() > 1), "{filters:?}");
    assert!(bed.log().contains(landlock), "{}", bed.log());
    assert!(bed.ctl(&["version"]).contains(landlock));
    // Nothing keeps sockets out of other folders then, and nothing says that it would.
    let elsewhere = tempfile::tempdir().unwrap();
    let late = format!("vhost-user:name=late,socket={}/s", elsewhere.path().display());
    assert_eq!(bed.ctl_full(&["port", "add", &late]).0, 0, "{}", bed.log());
}
