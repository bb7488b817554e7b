//! What is opened, what cannot be, and what is left behind.

use std::time::{Duration, Instant};

use uplink::af_xdp::{AfXdp, AfXdpSettings, Mode};

use crate::namespace::{Namespace, open_with};

/// Opens an interface that was closed. A test beside this one that starts a program holds our fds
/// for a moment too.
pub(super) fn reopened(namespace: &Namespace) -> AfXdp {
    reopened_with(&namespace.settings("left0"))
}

/// The same, in the way that `settings` say.
pub(super) fn reopened_with(settings: &AfXdpSettings) -> AfXdp {
    let start = Instant::now();
    loop {
        match open_with(settings) {
            Ok(open) => return open,
            Err(error) => assert!(start.elapsed() < Duration::from_secs(5), "{error}"),
        }
    }
}

#[test]
fn what_was_changed_is_undone() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let _ = namespace.ip(&["link", "set", "left0", "down"]);
    let shown = || namespace.ip(&["-d", "link", "show", "left0"]);
    for mode in [Mode::Copy, Mode::Generic] {
        let settings = AfXdpSettings { mode, ..namespace.settings("left0") };
        let end = open_with(&settings).unwrap();
        let text = shown();
        let how = if mode == Mode::Copy { " xdp " } else { " xdpgeneric " };
        assert!(text.contains(how) && text.contains("promiscuity 1"), "{text}");
        assert!(text.contains(",UP"), "{text}");
        assert!(end.control.program_link().is_some());
        assert_eq!(end.control.sockets().count(), 1);
        drop(end);
        let start = Instant::now();
        // Another test that starts a program holds our fds for a moment too.
        while shown().contains("xdp") || shown().contains("promiscuity 1") {
            assert!(start.elapsed() < Duration::from_secs(5), "{}", shown());
        }
        assert!(!shown().contains(",UP"));
    }
}

#[test]
fn a_killed_process_leaves_nothing_on_the_interface() {
    const HOLD: &str = "CW_TEST_HOLD";
    if let Ok(netns) = std::env::var(HOLD) {
        // The namespace belongs to the test that started this.
        let place = std::mem::ManuallyDrop::new(Namespace(netns));
        let _held = place.open("left0").unwrap();
        std::thread::sleep(Duration::from_secs(20));
        return;
    }
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let shown = || namespace.ip(&["-d", "link", "show", "left0"]);
    let until = |there: bool| {
        let start = Instant::now();
        while shown().contains("prog/xdp") != there || there != shown().contains("promiscuity 1") {
            assert!(start.elapsed() < Duration::from_secs(5), "there {there}: {}", shown());
            std::thread::sleep(Duration::from_millis(10));
        }
    };
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "opening::a_killed_process_leaves_nothing_on_the_interface"])
        .env(HOLD, &namespace.0)
        .stdout(std::process::Stdio::null())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    until(true);
    child.kill().unwrap();
    let _killed = child.wait().unwrap();
    until(false);
    drop(reopened(&namespace));
}

#[test]
fn a_program_that_a_link_holds_is_named_and_stays() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    // Another uplink's program stands for somebody else's: it is held by a link.
    let held = namespace.open("left0").unwrap();
    for replace in [false, true] {
        let settings = AfXdpSettings { replace, ..namespace.settings("left0") };
        let text = open_with(&settings).unwrap_err().to_string();
        let rest = text.strip_prefix("interface left0 has an XDP program already: program ");
        let rest = rest.unwrap_or_else(|| panic!("{text}"));
        assert!(rest.contains(" (causeway), which BPF link "), "{text}");
        assert!(rest.ends_with("it cannot be replaced: end that process"), "{text}");
    }
    drop(held);
    drop(reopened(&namespace));
}

/// Without `CAP_SYS_ADMIN` nobody can tell whether a link holds it: no advice that may not work.
#[test]
fn a_program_whose_holder_cannot_be_seen_is_no_program_without_a_link() {
    use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let _held = namespace.open("left0").unwrap();
    for replace in [false, true] {
        let settings = AfXdpSettings { netns: None, replace, ..namespace.settings("left0") };
        let text = namespace.inside(move || {
            let some = CapabilitySet::NET_ADMIN
                | CapabilitySet::NET_RAW
                | CapabilitySet::BPF
                | CapabilitySet::PERFMON;
            let none = CapabilitySet::empty();
            let sets = CapabilitySets { effective: some, permitted: some, inheritable: none };
            set_capabilities(None, sets).unwrap();
            open_with(&settings).unwrap_err().to_string()
        });
        assert!(text.starts_with("interface left0 has an XDP program already: program "), "{text}");
        assert!(text.contains("CAP_SYS_ADMIN is needed") && text.contains("sandbox"), "{text}");
        assert!(!text.contains("xdp=replace"), "{text}");
    }
}

#[test]
fn what_cannot_be_opened_is_named() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 2, 1500);
    let error = |name: &str, queues, mode| {
        let settings = AfXdpSettings { queues, mode, ..namespace.settings(name) };
        open_with(&settings).unwrap_err().to_string()
    };
    let place = format!("in network namespace {}", namespace.0);
    assert_eq!(error("none0", 1, Mode::Auto), format!("interface none0 does not exist {place}"));
    assert_eq!(
        error("left0", 3, Mode::Auto),
        "interface left0 has 2 receive and 2 transmit queues, 3 of each were asked for: use \
         queues=2 or change the device with `ethtool -L`"
    );
    assert_eq!(error("left0", 0, Mode::Auto), "queues 0 must be 1 to 64");
    assert_eq!(error("left0", 65, Mode::Auto), "queues 65 must be 1 to 64");
    let _ = namespace.ip(&["link", "add", "br0", "type", "bridge"]);
    assert_eq!(
        error("br0", 1, Mode::Copy),
        "interface br0 (driver bridge) has no XDP of its own: use mode=generic or mode=auto"
    );
}

#[test]
fn a_missing_right_is_named() {
    let namespace = Namespace::new();
    namespace.veth("left0", (&namespace, "right0"), 1, 1500);
    let settings = AfXdpSettings { netns: None, ..namespace.settings("left0") };
    let error = namespace.inside(move || {
        use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};
        let none = CapabilitySet::empty();
        let sets = CapabilitySets { effective: none, permitted: none, inheritable: none };
        set_capabilities(None, sets).unwrap();
        open_with(&settings).unwrap_err().to_string()
    });
    assert_eq!(
        error,
        "no permission to make a BPF map: CAP_BPF (with CAP_NET_ADMIN) is needed (root has it)"
    );
}
