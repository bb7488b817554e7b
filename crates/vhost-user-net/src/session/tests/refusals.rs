//! Every way of being wrong: an acknowledgement that says so, or the end of the session.

use super::front::{Front, PLAIN, event, memory, ring_addr};
use crate::codec::{FrontendReq, Header, LogArea, Request, StateDirection, VringFd, VringState};
use crate::session::{FEATURES, PROTOCOL_FEATURES};

#[test]
fn unoffered_features_are_refused() {
    let mut front = Front::new();
    let text = front.refused(Request::SetFeatures(FEATURES | 1 << 60), Vec::new());
    assert_eq!(text, "SET_FEATURES with 0x1000000000000000, which was not offered");
    let text = front.refused(Request::SetProtocolFeatures(PROTOCOL_FEATURES | 1 << 40), Vec::new());
    assert_eq!(text, "SET_PROTOCOL_FEATURES with 0x10000000000, which was not offered");
}

#[test]
fn requests_of_features_that_were_not_negotiated_are_refused() {
    let region = super::front::region(0);
    for (request, fds) in [
        (Request::GetMaxMemSlots, 0),
        (Request::AddMemReg(region), 1),
        (Request::RemMemReg(region), 0),
        (Request::SendRarp([2; 6]), 0),
        (Request::NetSetMtu(1500), 0),
        (Request::SetLogBase(LogArea { bytes: 4096, offset: 0 }), 1),
        (Request::SetBackendReqFd, 1),
        (Request::ResetDevice, 0),
        (Request::SetStatus(1), 0),
        (Request::GetStatus, 0),
        (Request::SetDeviceStateFd(StateDirection::Save), 1),
        (Request::CheckDeviceState, 0),
    ] {
        let mut front = Front::new();
        let fds = (0..fds).map(|_| memory(4096)).collect();
        let text = front.refused(request, fds);
        assert!(text.ends_with("without its protocol feature"), "{text}");
    }
}

#[test]
fn requests_of_features_that_are_not_offered_are_refused() {
    for kind in [
        FrontendReq::SET_VRING_ENDIAN,
        FrontendReq::SET_CONFIG,
        FrontendReq::VRING_KICK,
        FrontendReq::GET_SHARED_OBJECT,
    ] {
        let mut front = Front::new();
        let text = front.refused(Request::NotOffered(kind), vec![event()]);
        assert_eq!(text, format!("{kind:?} belongs to a feature that is not offered"));
    }
}

#[test]
fn get_config_is_answered_with_its_own_error() {
    let mut front = Front::new();
    let request = Request::NotOffered(FrontendReq::GET_CONFIG);
    let outcome = front.bytes(&request.write(false), Vec::new()).unwrap();
    assert!(outcome.refused.is_some());
    assert_eq!(outcome.reply.unwrap().len(), 12);
}

#[test]
fn errors_are_acknowledged_when_asked_and_the_session_goes_on() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    let many = VringState { ring: 0, num: 1025 };
    assert_eq!(front.ack(Request::SetVringNum(many), Vec::new()), 1);
    let kind = FrontendReq::SET_VRING_ENDIAN;
    assert_eq!(front.ack(Request::NotOffered(kind), vec![event()]), 1);
    let unknown = Header { request: 4711, need_reply: true, reply: false, size: 0 };
    let outcome = front.bytes(&unknown.write(), Vec::new()).unwrap();
    assert_eq!(outcome.refused.unwrap().to_string(), "unknown request 4711");
    assert_eq!(outcome.reply.unwrap()[12..], 1u64.to_le_bytes());
    let few = VringState { ring: 0, num: 1024 };
    assert_eq!(front.ack(Request::SetVringNum(few), Vec::new()), 0);
}

#[test]
fn nothing_is_acknowledged_before_reply_ack_was_negotiated() {
    let mut front = Front::new();
    let outcome = front.bytes(&Request::SetOwner.write(true), Vec::new()).unwrap();
    assert!(outcome.reply.is_none());
    let many = Request::SetVringNum(VringState { ring: 0, num: 0 });
    assert!(front.bytes(&many.write(true), Vec::new()).is_err());
}

#[test]
fn an_error_in_a_request_with_a_reply_of_its_own_ends_the_session() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    let request = Request::GetVringBase { ring: 8 };
    let error = front.bytes(&request.write(true), Vec::new()).unwrap_err();
    assert_eq!(error.to_string(), "ring 8, but the port has 8 rings");
}

#[test]
fn rings_that_the_port_does_not_have_are_refused() {
    let state = VringState { ring: 8, num: 1 };
    let fd = VringFd { ring: 8, has_fd: true };
    for (request, fds) in [
        (Request::SetVringNum(state), 0),
        (Request::SetVringAddr(ring_addr(8)), 0),
        (Request::SetVringBase(state), 0),
        (Request::GetVringBase { ring: 8 }, 0),
        (Request::SetVringEnable { ring: 8, enable: true }, 0),
        (Request::SetVringKick(fd), 1),
        (Request::SetVringCall(fd), 1),
        (Request::SetVringErr(fd), 1),
    ] {
        let mut front = Front::new();
        let text = front.refused(request, (0..fds).map(|_| event()).collect());
        assert_eq!(text, "ring 8, but the port has 8 rings");
    }
    assert!(Front::new().refused(Request::GetVringBase { ring: u32::MAX }, vec![]).len() > 10);
}

#[test]
fn sizes_out_of_bounds_are_refused_with_the_limit() {
    for num in [0, 1025, 65536, u32::MAX] {
        let text =
            Front::new().refused(Request::SetVringNum(VringState { ring: 2, num }), Vec::new());
        assert_eq!(text, format!("ring 2 with {num} entries, 1 to 1024 are allowed"));
    }
}

#[test]
fn size_position_and_features_of_a_running_ring_do_not_change() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let state = VringState { ring: 1, num: 128 };
    assert_eq!(
        front.refused(Request::SetVringNum(state), Vec::new()),
        "SET_VRING_NUM while ring 1 runs"
    );
    assert_eq!(
        front.refused(Request::SetVringBase(state), Vec::new()),
        "SET_VRING_BASE while ring 1 runs"
    );
    assert_eq!(
        front.refused(Request::SetFeatures(super::front::PACKED), Vec::new()),
        "SET_FEATURES with other features while ring 0 runs"
    );
    assert_eq!(front.running(), [0, 1]);
}

#[test]
fn impossible_rings_are_refused_by_the_message_that_completes_them() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    front.enable(1, true);
    front.say(Request::SetVringNum(VringState { ring: 1, num: 100 }));
    front.say(Request::SetVringAddr(ring_addr(1)));
    let kick = Request::SetVringKick(VringFd { ring: 1, has_fd: true });
    let text = front.refused(kick.clone(), vec![event()]);
    assert!(text.contains("power of two"), "{text}");
    let mut front = Front::new();
    front.negotiate(PLAIN);
    front.share();
    front.enable(1, true);
    front.describe(1, 0x1_0000);
    let text = front.refused(kick, vec![event()]);
    assert_eq!(text, "ring 1: position 0x10000, a split ring has 16 bits");
}

#[test]
fn only_eventfds_are_taken_as_eventfds() {
    for make in [Request::SetVringKick, Request::SetVringCall, Request::SetVringErr] {
        let request = make(VringFd { ring: 1, has_fd: true });
        let text = Front::new().refused(request, vec![memory(4096)]);
        assert!(text.ends_with("for ring 1 with an fd that is no eventfd"), "{text}");
    }
}
