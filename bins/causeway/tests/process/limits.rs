//! Limits of ports, from the configuration file to the counters, changed while guests stay.

use crate::bed::{Bed, ledger};
use crate::guest::Guest;

/// A file with two guests; `keys` are those of the first.
fn file(keys: &str) -> String {
    let guest = |name: &str, keys: &str| {
        format!(
            "[[port]]\nkind = \"vhost-user\"\nname = \"{name}\"\nsocket = \"{name}.sock\"\n{keys}\n"
        )
    };
    let other = "mac = \"02:00:00:00:00:09\"\nantispoof = true";
    guest("g0", keys) + &guest("g1", other)
}

#[test]
fn limits_hold_and_change_while_guests_stay() {
    let mut bed = Bed::new();
    let config = bed.path("c.toml");
    std::fs::write(&config, file("")).unwrap();
    bed.start(&["--config", "c.toml"]);
    let (mut g0, mut g1) = (Guest::join(&bed, "g0.sock", 1), Guest::join(&bed, "g1.sock", 2));
    let _ = (bed.wait_state("g0", "up"), bed.wait_state("g1", "up"));
    let count = |name: &str, reason: &str| {
        let stats = bed.json(&["stats"]);
        let ports = stats["ports"].as_array().unwrap();
        let port = ports.iter().find(|port| port["name"] == name).unwrap();
        let queue = &port["queues"][0];
        queue["drops"].get(reason).unwrap_or(&queue[reason]).as_u64().unwrap()
    };
    let reload = |keys: &str| {
        std::fs::write(&config, file(keys)).unwrap();
        bed.ctl(&["reload"])
    };
    g0.send(5);
    assert_eq!(count("g1", "tx_frames"), 5);
    // The second guest is none that its port knows.
    g1.send(3);
    assert_eq!((count("g1", "spoofed"), count("g0", "tx_frames")), (3, 0));

    assert_eq!(reload("storm-kpps = \"0.001\""), "changed the limits of g0\n");
    g0.send(40);
    let storm = count("g0", "storm");
    // 16 at once, and one more a second.
    assert!((15..=24).contains(&storm), "{storm}");
    assert_eq!(count("g1", "tx_frames"), 45 - storm);

    assert_eq!(reload("rate-kpps = \"0.01\"\nburst-frames = 1"), "changed the limits of g0\n");
    g0.send(3);
    assert!(count("g0", "rests") > 0);
    assert_eq!(count("g0", "storm"), storm);
    assert!(bed.ctl(&["ports"]).contains("g0"));
    let spec = &bed.port("g0")["spec"];
    assert!(spec.as_str().unwrap().ends_with(",rate-kpps=0.01,burst-frames=1"), "{spec}");
    assert_eq!(reload(""), "changed the limits of g0\n");
    assert_eq!(reload(""), "nothing changed\n");
    assert_eq!(bed.log().matches("front end connected").count(), 2, "nobody was sent away");
    let (came, went, held) = ledger(&bed);
    assert_eq!((came, held), (went, 0));
}
