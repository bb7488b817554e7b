//! Bugs and faults stay at the port that they happen at, and no frame is lost from the books.

use std::sync::Arc;

use port::{DropReason, Fabric, PortState};
use switch::{Switch, SwitchConfig, SwitchEvent, Way};

use crate::mock::{
    BROADCAST, Behaviour, Wire, at, attach, attach_egress, attach_ingress, drops, frame, mac,
    plain_ports, settle, wait_for,
};

fn next_event(switch: &Switch) -> SwitchEvent {
    let mut event = None;
    wait_for("an event", || {
        event = switch.events().next();
        event.is_some()
    });
    event.unwrap()
}

/// Frames still pass between two ports.
fn check_traffic(switch: &Switch, a: &Arc<Wire>, b: &Arc<Wire>) {
    // Every worker knows of what was reset or attached.
    switch.quiesce();
    drop((a.take(), b.take()));
    a.send(&[frame(BROADCAST, mac(0xa), 77)]);
    wait_for("a frame to b", || b.take().contains(&frame(BROADCAST, mac(0xa), 77)));
    b.send(&[frame(mac(0xa), mac(0xb), 78)]);
    wait_for("a frame to a", || a.take().contains(&frame(mac(0xa), mac(0xb), 78)));
    wait_for("quiet", || switch.stats().held == 0);
}

#[test]
fn an_ingress_that_panics_costs_its_port_only() {
    for behaviour in
        [Behaviour::IngressPanics, Behaviour::IngressPanicsLate, Behaviour::NotifyPanics]
    {
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        let ports = plain_ports(&switch, 3);
        let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
        wires[0].behave(behaviour);
        wires[0].send(&[frame(BROADCAST, mac(1), 1), frame(BROADCAST, mac(1), 2)]);
        let id = at(ports[0].0.id, 0);
        match next_event(&switch) {
            SwitchEvent::Panicked { queue, way: Way::Ingress, text } => {
                assert_eq!(queue, id);
                assert!(text.contains("panics"), "{text}");
            }
            other => panic!("{other:?}"),
        }
        let status = ports[0].0.status.read();
        assert_eq!(status.state, PortState::Quarantined);
        assert!(status.reason.contains("a bug:"), "{}", status.reason);
        let stats = switch.stats();
        let lost = if behaviour == Behaviour::IngressPanicsLate { 2 } else { 0 };
        assert_eq!(drops(&stats, DropReason::Panicked), lost, "{behaviour:?}");
        crate::mock::check_law(&stats);

        check_traffic(&switch, wires[1], wires[2]);
        assert!(switch.detach_ingress(id).is_none(), "it is gone");

        // Once the worker's turn is over nothing goes to the port; after the reset it works again.
        drop(wires[0].take());
        check_traffic(&switch, wires[1], wires[2]);
        assert!(wires[0].take().is_empty());
        wires[0].behave(Behaviour::Good);
        assert!(switch.reset_port(id.port));
        attach_ingress(&switch, &ports[0].0, 0, wires[0]);
        check_traffic(&switch, wires[0], wires[1]);
    }
}

#[test]
fn quarantine_stops_the_ports_other_queues_until_the_reset() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 1);
    let two = switch.add_port(&switch::PortConfig { pairs: 2, ..switch::PortConfig::new("two") });
    let two = two.unwrap();
    let (bad, good) = (attach(&switch, &two, 0), attach(&switch, &two, 1));
    bad.behave(Behaviour::IngressPanics);
    bad.send(&[frame(BROADCAST, mac(3), 3)]);
    let _ = next_event(&switch);
    // The turn in which it happened may still serve the pair: only the next one does not.
    let turns = |count| {
        for _ in 0..count {
            ports[0].1.send(&[frame(BROADCAST, mac(1), 0)]);
            wait_for("the other port", || ports[0].1.waiting() == 0);
        }
    };
    turns(2);
    good.send(&[frame(BROADCAST, mac(4), 4)]);
    ports[0].1.send(&[frame(BROADCAST, mac(1), 1)]);
    wait_for("the other port", || ports[0].1.waiting() == 0);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(good.waiting(), 1, "not served");
    assert!(good.take().is_empty() && bad.take().is_empty(), "not sent to");
    assert!(switch.reset_port(two.id));
    wait_for("the good queue", || ports[0].1.take() == [frame(BROADCAST, mac(4), 4)]);
    let _ = settle(&switch, &[&good]);
}

#[test]
fn an_egress_that_panics_is_closed_and_poisons_nobody() {
    for behaviour in [Behaviour::EgressPanics, Behaviour::EgressPanicsLate] {
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        let ports = plain_ports(&switch, 3);
        let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
        wires[2].behave(behaviour);
        let burst: Vec<_> = (0..10).map(|n| frame(BROADCAST, mac(1), n)).collect();
        wires[0].send(&burst);
        match next_event(&switch) {
            SwitchEvent::Panicked { queue, way: Way::Egress, .. } => {
                assert_eq!(queue, at(ports[2].0.id, 0));
            }
            other => panic!("{other:?}"),
        }
        let stats = settle(&switch, &wires);
        let queue = &stats.ports[2].queues[0];
        assert_eq!(queue.tx_frames + queue.drops[DropReason::Panicked as usize], 10);
        assert_eq!(wires[1].take(), burst, "the others got everything");
        assert_eq!(ports[2].0.status.read().state, PortState::Quarantined);
        check_traffic(&switch, wires[0], wires[1]);

        wires[2].behave(Behaviour::Good);
        assert!(switch.reset_port(ports[2].0.id));
        attach_egress(&switch, &ports[2].0, 0, wires[2]);
        check_traffic(&switch, wires[0], wires[2]);
        let _ = settle(&switch, &wires);
    }
}

#[test]
fn a_fault_ends_one_half_and_its_owner_gets_it_back() {
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 3);
    let wires: Vec<_> = ports.iter().map(|(_, wire)| wire).collect();
    let id = at(ports[2].0.id, 0);
    wires[2].behave(Behaviour::EgressFaults);
    wires[0].send(&[frame(BROADCAST, mac(1), 1)]);
    let event = next_event(&switch);
    let faulted = |wanted: Way, event: &SwitchEvent| match event {
        SwitchEvent::Faulted { queue, way, .. } => *queue == id && *way == wanted,
        SwitchEvent::Panicked { .. } => false,
    };
    assert!(faulted(Way::Egress, &event), "{event:?}");
    assert_eq!(ports[2].0.status.read().state, PortState::Broken);
    wires[0].send(&[frame(BROADCAST, mac(1), 2)]);
    let stats = settle(&switch, &wires);
    assert_eq!(stats.ports[2].queues[0].dropped(), 1, "the second one was not sent there");
    assert!(switch.detach_egress(id).is_some());

    wires[2].behave(Behaviour::IngressFaults);
    wires[2].send(&[frame(BROADCAST, mac(3), 3)]);
    let event = next_event(&switch);
    assert!(faulted(Way::Ingress, &event), "{event:?}");
    assert_eq!(switch.events().next(), None, "one event a fault");
    assert!(switch.detach_ingress(id).is_some());
    check_traffic(&switch, wires[0], wires[1]);
    let _ = settle(&switch, &wires[..2]);
}

#[test]
fn the_event_fd_is_readable_while_there_are_events() {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let switch = Switch::start(&SwitchConfig::default()).unwrap();
    let ports = plain_ports(&switch, 1);
    ports[0].1.behave(Behaviour::IngressFaults);
    ports[0].1.send(&[frame(BROADCAST, mac(1), 1)]);
    let readable = |secs| {
        let mut fds = [PollFd::new(switch.events(), PollFlags::IN)];
        poll(&mut fds, Some(&Timespec { tv_sec: secs, tv_nsec: 0 })).unwrap() == 1
    };
    assert!(readable(10));
    assert!(switch.events().next().is_some());
    assert!(switch.events().next().is_none());
    assert!(!readable(0));
}

#[test]
fn what_an_egress_holds_is_sent_when_it_may_go_on_and_never_forgotten() {
    for behaviour in [Behaviour::Good, Behaviour::EgressFaults, Behaviour::EgressPanics] {
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        let ports = plain_ports(&switch, 2);
        let (from, to) = (&ports[0].1, &ports[1].1);
        to.behave(Behaviour::Holds);
        from.send(&[frame(BROADCAST, mac(1), 1), frame(BROADCAST, mac(1), 2)]);
        wait_for("the frames", || from.waiting() == 0 && switch.stats().held == 2);
        let id = at(ports[1].0.id, 0);
        // Whoever stops and starts it takes along what it holds.
        let egress = switch.detach_egress(id).unwrap();
        assert_eq!(egress.held(), 2);
        switch.attach_egress(id, egress);
        let before = to.egress_notified.load(std::sync::atomic::Ordering::SeqCst);
        to.behave(behaviour);
        switch.resume_egress(id);
        assert_eq!(switch.stats().held, 0, "{behaviour:?}");
        let stats = switch.stats();
        crate::mock::check_law(&stats);
        let lost = (drops(&stats, DropReason::PortDown), drops(&stats, DropReason::Panicked));
        if behaviour == Behaviour::Good {
            assert_eq!(lost, (0, 0));
            assert!(to.egress_notified.load(std::sync::atomic::Ordering::SeqCst) > before);
            continue;
        }
        assert_eq!(lost, if behaviour == Behaviour::EgressFaults { (2, 0) } else { (0, 2) });
        let told = matches!(
            next_event(&switch),
            SwitchEvent::Panicked { way: Way::Egress, .. }
                | SwitchEvent::Faulted { way: Way::Egress, .. }
        );
        assert!(told);
        // It is out of service: nothing happens any more.
        switch.resume_egress(id);
    }
}
