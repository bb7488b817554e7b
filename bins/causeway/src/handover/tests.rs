use control::PortSpec;

use super::{Offer, PortOffer, State, Status};

fn spec(text: &str) -> PortSpec {
    text.parse().unwrap()
}

#[test]
fn a_port_is_understood_again() {
    let spec = spec("vhost-user:name=g0,vlan=7,socket=/run/g0.sock,queues=4,mac=02:00:00:00:00:01");
    let entry = control::StaticEntry {
        mac: "02:00:00:00:00:02".parse().unwrap(),
        vlan: Some("7".parse().unwrap()),
        port: "g0".to_owned(),
    };
    let offer = PortOffer::of(&spec, std::slice::from_ref(&entry), "file");
    let text = serde_json::to_string(&offer).unwrap();
    let read: PortOffer = serde_json::from_str(&text).unwrap();
    assert_eq!(read.spec().unwrap(), spec);
    assert_eq!(read.entries().unwrap(), [entry]);
    assert_eq!(read.resource, "socket /run/g0.sock");
}

#[test]
fn what_the_switch_alone_knows_may_change() {
    let offer = PortOffer::of(&spec("vhost-user:name=g0,vlan=7,socket=/run/g0.sock"), &[], "file");
    for (text, goes_on) in [
        ("vhost-user:name=g0,vlan=7,socket=/run/g0.sock", true),
        ("vhost-user:name=g0,trunk=1+2,socket=/run/g0.sock,mac=02:00:00:00:00:01", true),
        ("vhost-user:name=g0,socket=/run/g0.sock,offloads=off", true),
        ("vhost-user:name=g0,socket=/run/g0.sock,rate-mbps=1,burst-kb=9,storm-kpps=1", true),
        ("vhost-user:name=g0,socket=/run/g0.sock,rate-kpps=1,burst-frames=9", true),
        (
            "vhost-user:name=g0,socket=/run/g0.sock,mac=02:00:00:00:00:01,antispoof=on,ip=10.0.0.1",
            true,
        ),
        ("vhost-user:name=g0,socket=/run/g0.sock,queues=2", false),
        ("vhost-user:name=g0,socket=/run/g0.sock,mode=client", false),
        ("vhost-user:name=g0,socket=/run/g1.sock", false),
        ("vhost-user:name=g1,socket=/run/g0.sock", false),
        ("tap:name=g0,ifname=g0", false),
    ] {
        assert_eq!(offer.goes_on_as(&spec(text)), goes_on, "{text}");
    }
    let tap = PortOffer::of(&spec("tap:name=t0,ifname=t0"), &[], "file");
    assert!(tap.goes_on_as(&spec("tap:name=t0,ifname=t0,offloads=off")));
    assert!(!tap.goes_on_as(&spec("tap:name=t0,ifname=t0,queues=2")));
    // A key that only a newer program knows is a difference.
    let mut newer = offer.clone();
    newer.keys.push(("colour".to_owned(), "blue".to_owned()));
    assert!(!newer.goes_on_as(&spec("vhost-user:name=g0,vlan=7,socket=/run/g0.sock")));
    assert!(newer.spec().unwrap_err().starts_with("port g0: unknown key \"colour\""));
}

#[test]
fn other_programs_may_say_less_or_more() {
    let offer: Offer = serde_json::from_str(r#"{"ports":[{"name":"g0","hat":1}],"x":2}"#).unwrap();
    assert_eq!(offer.ports[0].name, "g0");
    let state: State = serde_json::from_str(r#"{"ports":[{"name":"g0"}]}"#).unwrap();
    assert!(state.ports[0].uplink.is_none());
    let status = Status { state: "asleep".to_owned(), ..Status::default() }.restore();
    assert_eq!(status.state, port::PortState::Waiting);
}
