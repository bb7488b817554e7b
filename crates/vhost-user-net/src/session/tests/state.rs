//! The device's state: what is asked of the shell, and what is not.

use rustix::pipe::pipe;
use vhost::vhost_user::message::{VhostTransferStateDirection, VhostTransferStatePhase};

use super::front::{Front, PLAIN, event, memory};
use crate::codec::{FrontendReq, Header, Request, StateDirection};
use crate::session::StateAsk;

fn set(direction: StateDirection) -> Request {
    Request::SetDeviceStateFd(direction)
}

/// The refusal of a request: the reply's number, and why.
fn refused(front: &mut Front, bytes: &[u8], fds: Vec<std::os::fd::OwnedFd>) -> (u64, String) {
    let outcome = front.bytes(bytes, fds).unwrap();
    assert!(outcome.ask.is_none());
    let reply = outcome.reply.expect("a reply");
    (u64::from_le_bytes(reply[12..].try_into().unwrap()), outcome.refused.unwrap().to_string())
}

#[test]
fn a_pipe_is_handed_to_the_shell_which_answers() {
    let mut front = Front::new();
    front.negotiate(PLAIN);
    let (reader, writer) = pipe().unwrap();
    let save = front.bytes(&set(StateDirection::Save).write(false), vec![writer]).unwrap();
    assert!(save.reply.is_none() && matches!(save.ask, Some(StateAsk::Save(_))));
    let load = front.bytes(&set(StateDirection::Load).write(false), vec![reader]).unwrap();
    assert!(load.reply.is_none() && matches!(load.ask, Some(StateAsk::Load(_))));
    let check = front.bytes(&Request::CheckDeviceState.write(false), Vec::new()).unwrap();
    assert!(check.reply.is_none() && matches!(check.ask, Some(StateAsk::Check)));
}

#[test]
fn the_numbers_are_those_of_the_vhost_crate() {
    let payload = |direction| set(direction).write(false)[12..].to_vec();
    let stopped = VhostTransferStatePhase::STOPPED as u32;
    for (ours, theirs) in [
        (StateDirection::Save, VhostTransferStateDirection::SAVE as u32),
        (StateDirection::Load, VhostTransferStateDirection::LOAD as u32),
    ] {
        assert_eq!(payload(ours), [theirs.to_le_bytes(), stopped.to_le_bytes()].concat());
    }
}

#[test]
fn what_cannot_be_is_refused_by_the_reply_and_the_session_goes_on() {
    let mut front = Front::new();
    front.up(PLAIN, 1);
    let load = set(StateDirection::Load).write(false);
    let (reader, _writer) = pipe().unwrap();
    let (reply, text) = refused(&mut front, &load, vec![reader]);
    assert_eq!((reply, text.as_str()), (0x101, "SET_DEVICE_STATE_FD while ring 0 runs"));
    let _ = (front.base(0), front.base(1));
    for fd in [event(), memory(4096)] {
        let (reply, text) = refused(&mut front, &load, vec![fd]);
        assert!(reply == 0x101 && text.ends_with("with an fd that is no pipe"), "{text}");
    }
    let (reply, text) = refused(&mut front, &load, Vec::new());
    assert_eq!((reply, text.as_str()), (0x101, "SET_DEVICE_STATE_FD with 0 fds instead of 1"));
    for (at, name) in [(12, "the direction is 0x2"), (16, "the phase is 0x2")] {
        let mut wrong = load.clone();
        wrong[at] = 2;
        let (reply, text) = refused(&mut front, &wrong, vec![pipe().unwrap().0]);
        assert!(reply == 0x101 && text.contains(name), "{text}");
    }
    let request = FrontendReq::CHECK_DEVICE_STATE.into();
    let mut long = Header { request, need_reply: false, reply: false, size: 8 }.write().to_vec();
    long.extend([0; 8]);
    let (reply, text) = refused(&mut front, &long, Vec::new());
    assert_eq!((reply, text.as_str()), (1, "CHECK_DEVICE_STATE with 8 bytes instead of 0"));
    let _ = front.get(Request::GetFeatures);
}
