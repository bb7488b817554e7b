//! Ports come and go at run time.

use std::os::unix::net::UnixStream;

use rustix::process::Signal;

use crate::bed::{Bed, causeway, eventually};

#[test]
fn ports_are_added_and_removed() {
    let bed = Bed::started(&[]);
    assert_eq!(bed.json(&["ports"]), serde_json::json!({"ports": []}));
    let spec = "vhost-user:name=g0,socket=g0.sock,queues=2,vlan=7";
    assert_eq!(bed.ctl(&["port", "add", spec]), "added port g0\n");
    let port = bed.port("g0");
    let socket = bed.path("g0.sock");
    let reason = format!("waiting for the front end to connect to {}", socket.display());
    assert_eq!(port["reason"], reason);
    let _ = UnixStream::connect(&socket).unwrap();

    let twice = bed.ctl_full(&["port", "add", "vhost-user:name=g0,socket=other.sock"]);
    let text = "causeway: two ports have the name g0\n";
    assert_eq!(twice, (1, String::new(), text.to_owned()));
    let (code, _, text) = bed.ctl_full(&["port", "add", "vhost-user:name=g1,socket=g0.sock"]);
    assert!(code == 1 && text.contains("belongs to port g0 already"), "{text}");

    assert_eq!(bed.ctl(&["port", "del", "g0"]), "removed port g0\n");
    assert!(!socket.exists());
    let text = "causeway: there is no port \"g0\"; ports are: none\n";
    assert_eq!(bed.ctl_full(&["port", "del", "g0"]), (1, String::new(), text.to_owned()));
}

#[test]
fn a_port_that_works_is_not_reset() {
    let bed = Bed::started(&["--port", "vhost-user:name=g0,socket=g0.sock"]);
    let text = "causeway: port g0 is waiting: there is nothing to reset\n";
    assert_eq!(bed.ctl_full(&["port", "reset", "g0"]), (1, String::new(), text.to_owned()));
}

#[test]
fn static_entries_show_and_stay() {
    let bed = Bed::started(&[
        "--port",
        "vhost-user:name=g0,socket=g0.sock,mac=02:00:00:00:00:01,trunk=5+6",
    ]);
    let _ = bed.ctl(&["fdb", "flush"]);
    let entry = |vlan: u16| {
        serde_json::json!({
            "mac": "02:00:00:00:00:01", "vlan": vlan, "port": "g0", "age_s": 0, "static": true,
        })
    };
    let mut shown = bed.json(&["fdb"]);
    for entry in shown["entries"].as_array_mut().unwrap() {
        entry["age_s"] = 0.into();
    }
    assert_eq!(shown, serde_json::json!({"entries": [entry(5), entry(6)]}));
}

#[test]
fn a_folder_with_a_comma_in_its_name_is_named() {
    let bed = Bed::started(&[]);
    let folder = bed.path("a,b");
    std::fs::create_dir(&folder).unwrap();
    let control = bed.control();
    let spec = "vhost-user:name=g0,socket=g0.sock";
    let arguments = ["ctl", "--control", control.to_str().unwrap(), "port", "add", spec];
    let socket = folder.join("g0.sock");
    let text =
        format!("causeway: the whole path of a socket must be without ',': {}\n", socket.display());
    assert_eq!(causeway(&folder, &arguments), (2, String::new(), text));
}

#[test]
fn a_station_is_behind_one_port() {
    let bed = Bed::started(&["--port", "vhost-user:name=g0,socket=g0.sock,mac=02:00:00:00:00:01"]);
    let add = |more: &str| {
        let spec = format!("vhost-user:name=g1,socket=g1.sock,mac=02:00:00:00:00:01{more}");
        bed.ctl_full(&["port", "add", &spec])
    };
    let text = "causeway: 02:00:00:00:00:01 is behind port g0 already, not g1\n";
    assert_eq!(add(""), (1, String::new(), text.to_owned()));
    assert_eq!(add(",vlan=7").0, 0);
}

fn config(ports: &[(&str, &str)]) -> String {
    let table = |(name, more): &(&str, &str)| {
        format!(
            "[[port]]\nkind = \"vhost-user\"\nname = \"{name}\"\nsocket = \"{name}.sock\"\n{more}\n"
        )
    };
    ports.iter().map(table).collect()
}

#[test]
fn a_reload_applies_the_difference_and_nothing_else() {
    let mut bed = Bed::new();
    let write = |bed: &Bed, text: &str| std::fs::write(bed.path("c.toml"), text).unwrap();
    write(&bed, &config(&[("same", ""), ("gone", ""), ("other", "queues = 1")]));
    bed.start(&["--config", "c.toml", "--port", "vhost-user:name=cli,socket=cli.sock"]);
    let _ = bed.ctl(&["port", "add", "vhost-user:name=late,socket=late.sock"]);
    // Front ends that are connected stay so, or do not.
    let connect = |name: &str| UnixStream::connect(bed.path(name)).unwrap();
    let sockets = ["same.sock", "cli.sock", "late.sock", "gone.sock", "other.sock"];
    let streams = sockets.map(connect);

    assert_eq!(bed.ctl(&["reload"]), "nothing changed\n");
    write(&bed, &config(&[("same", ""), ("new", ""), ("other", "queues = 2")]));
    assert_eq!(bed.ctl(&["reload"]), "removed gone, other; added new, other\n");
    assert_eq!(names(&bed), "cli late new other same");
    let closed = streams.map(|mut stream| {
        stream.set_nonblocking(true).unwrap();
        matches!(std::io::Read::read(&mut stream, &mut [0; 1]), Ok(0))
    });
    assert_eq!(closed, [false, false, false, true, true]);

    // A wrong file changes nothing.
    write(&bed, &(config(&[("same", "")]) + "nonsense = 1"));
    let (code, _, text) = bed.ctl_full(&["reload"]);
    assert!(code == 2 && text.contains("c.toml:6: unknown key \"nonsense\""), "{text}");
    assert_eq!(names(&bed), "cli late new other same");

    // A name that somebody else has, too.
    write(&bed, &config(&[("late", "")]));
    let (code, _, text) = bed.ctl_full(&["reload"]);
    assert!(code == 2 && text.contains("two ports have the name late"), "{text}");

    write(&bed, &(config(&[("same", "")]) + "[switch]\nageing = 20"));
    bed.signal(Signal::HUP);
    eventually("SIGHUP reloads", || names(&bed) == "cli late same");
    eventually("it says so", || bed.log().contains("a restart is needed for ageing"));
    assert_eq!(bed.end(Signal::TERM).code(), Some(0));
}

#[test]
fn a_reload_without_a_file_fails() {
    let bed = Bed::started(&[]);
    let (code, _, text) = bed.ctl_full(&["reload"]);
    let expected = "causeway: there is nothing to reload: run got no --config\n";
    assert_eq!((code, text.as_str()), (1, expected));
}

fn names(bed: &Bed) -> String {
    let view = bed.json(&["ports"]);
    let name = |port: &serde_json::Value| port["name"].as_str().unwrap().to_owned();
    let mut names: Vec<_> = view["ports"].as_array().unwrap().iter().map(name).collect();
    names.sort_unstable();
    names.join(" ")
}

/// A running switch with a configuration file.
fn with_file(text: &str, arguments: &[&str]) -> Bed {
    let mut bed = Bed::new();
    std::fs::write(bed.path("c.toml"), text).unwrap();
    let mut all = vec!["--config", "c.toml"];
    all.extend_from_slice(arguments);
    bed.start(&all);
    bed
}

#[test]
fn a_reload_starts_from_what_runs() {
    let both = config(&[("g0", ""), ("g1", "")]);
    let bed = with_file(&both, &[]);
    let _ = bed.ctl(&["port", "del", "g1"]);
    assert_eq!(bed.ctl(&["reload"]), "added g1\n");
    assert_eq!(names(&bed), "g0 g1");
    // A port that was added by hand is not the file's, whatever its name.
    let _ = bed.ctl(&["port", "del", "g1"]);
    let _ = bed.ctl(&["port", "add", "vhost-user:name=g1,socket=hand.sock"]);
    std::fs::write(bed.path("c.toml"), config(&[("g0", "")])).unwrap();
    assert_eq!(bed.ctl(&["reload"]), "nothing changed\n");
    assert_eq!(names(&bed), "g0 g1");
    assert!(bed.path("hand.sock").exists());
    std::fs::write(bed.path("c.toml"), both).unwrap();
    let (code, _, text) = bed.ctl_full(&["reload"]);
    assert!(code == 2 && text.contains("two ports have the name g1"), "{text}");
}

#[test]
fn a_reload_that_fails_leaves_the_port_as_it_was() {
    let bed = with_file(&config(&[("g0", ""), ("g1", ""), ("g2", "")]), &[]);
    let bad = "queues = 2\nsocket-group = \"cw-none\"";
    let file = config(&[("g0", ""), ("g1", bad), ("new", bad)]);
    std::fs::write(bed.path("c.toml"), file).unwrap();
    let again = |removed: &str| {
        let group = "there is no group \"cw-none\"";
        let text = format!(
            "causeway: {removed}; failed: port g1: {group}; g1 stays as it was; port new: {group}\n"
        );
        assert_eq!(bed.ctl_full(&["reload"]), (1, String::new(), text));
    };
    again("removed g2");
    assert_eq!(names(&bed), "g0 g1");
    assert_eq!(bed.port("g1")["state"], "waiting");
    let _ = UnixStream::connect(bed.path("g1.sock")).unwrap();
    // It is tried again, and works when the file is right.
    again("nothing changed");
    std::fs::write(bed.path("c.toml"), config(&[("g0", ""), ("g1", "queues = 2")])).unwrap();
    assert_eq!(bed.ctl(&["reload"]), "removed g1; added g1\n");
}

#[test]
fn static_entries_of_the_file_name_ports_of_the_command_line() {
    let station =
        |last: u8| format!("[[static]]\nmac = \"02:00:00:00:00:0{last}\"\nport = \"cli\"\n");
    let cli = "vhost-user:name=cli,socket=cli.sock";
    let bed = with_file(&station(1), &["--port", cli]);
    let entry = |bed: &Bed| {
        let entries = bed.json(&["fdb"])["entries"].as_array().unwrap().clone();
        assert_eq!(entries.len(), 1);
        entries[0]["mac"].as_str().unwrap().to_owned()
    };
    assert_eq!(entry(&bed), "02:00:00:00:00:01");
    assert_eq!(bed.ctl(&["reload"]), "nothing changed\n");
    std::fs::write(bed.path("c.toml"), station(2)).unwrap();
    let _ = bed.ctl(&["reload"]);
    assert_eq!((names(&bed), entry(&bed)), ("cli".to_owned(), "02:00:00:00:00:02".to_owned()));
    // It is still the command line's: the file does not remove it.
    std::fs::write(bed.path("c.toml"), "").unwrap();
    let _ = bed.ctl(&["reload"]);
    assert_eq!(names(&bed), "cli"); // When it is gone, its entries wait in the file without harm.
    std::fs::write(bed.path("c.toml"), station(1)).unwrap();
    let _ = bed.ctl(&["port", "del", "cli"]);
    assert_eq!(bed.ctl(&["reload"]), "nothing changed\n");
}

#[test]
fn the_station_of_a_port_that_is_gone_is_free() {
    let cli = "vhost-user:name=cli,socket=cli.sock,mac=02:00:00:00:00:01";
    let bed = with_file("", &["--port", cli]);
    let more = "mac = \"02:00:00:00:00:01\"";
    std::fs::write(bed.path("c.toml"), config(&[("g0", more)])).unwrap();
    let (code, _, text) = bed.ctl_full(&["reload"]);
    assert!(code == 2 && text.contains("is behind port g0 already, not cli"), "{text}");
    let _ = bed.ctl(&["port", "del", "cli"]);
    assert_eq!(bed.ctl(&["reload"]), "added g0\n");
}
