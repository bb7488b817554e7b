//! A guest that comes before its memory: what is told when, and in which order only.

use std::os::fd::OwnedFd;

use super::front::{Front, GUEST, PLAIN, REGION_BYTES, USER, event, memory, region};
use crate::codec::{Request, VringFd};
use crate::session::PAGEFAULT;
use crate::session::PROTOCOL_FEATURES;

fn front() -> Front {
    let mut front = Front::with(|settings| settings.postcopy = true);
    assert_eq!(front.get(Request::GetProtocolFeatures), PROTOCOL_FEATURES | PAGEFAULT);
    front.say(Request::SetProtocolFeatures(PROTOCOL_FEATURES | PAGEFAULT));
    front.say(Request::SetFeatures(PLAIN));
    front
}

/// The front end has the fd, and the guest is about to come.
fn listening() -> Front {
    let mut front = front();
    let outcome = front.bytes(&Request::PostcopyAdvise.write(false), Vec::new()).unwrap();
    assert_eq!(outcome.reply.unwrap().len(), 12, "nothing but the fd");
    let _: OwnedFd = outcome.fd.unwrap();
    assert!(!front.session.is_late(), "it still runs elsewhere");
    assert_eq!(front.ack(Request::PostcopyListen, Vec::new()), 0);
    assert!(front.session.is_late());
    front
}

fn start(front: &mut Front, ring: u32) {
    front.describe(ring, 0);
    front.say_fd(Request::SetVringKick(VringFd { ring, has_fd: true }), event());
    front.enable(ring, true);
}

/// Where we have each region, from a reply.
fn places(reply: &[u8], skip: usize) -> Vec<(u64, u64)> {
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().unwrap());
    let place = |region: &[u8]| (word(&region[..8]), word(&region[16..24]));
    reply[12 + skip..].chunks(32).map(place).collect()
}

#[test]
fn rings_use_memory_when_the_front_end_has_heard_where_it_is() {
    let mut front = listening();
    for ring in 0..2 {
        start(&mut front, ring);
    }
    let add = Request::AddMemReg(region(0));
    let reply = front.ask(&add, vec![memory(REGION_BYTES)]).unwrap();
    let [(guest, here)] = places(&reply, 8)[..] else { panic!("one region: {reply:?}") };
    assert_eq!(guest, GUEST);
    assert!(here != USER && here % 4096 == 0, "{here:#x}");
    assert!(front.running().is_empty(), "nobody would serve its pages");
    let add = Request::AddMemReg(region(1));
    assert_eq!(places(&front.ask(&add, vec![memory(REGION_BYTES)]).unwrap(), 8).len(), 1);
    front.say(Request::MemoryHeard);
    assert_eq!(front.running(), [0, 1]);
    assert!(front.rings.queues.values().all(|ring| ring.late && ring.known));
    // One goes: the next word is about that.
    front.say(Request::RemMemReg(region(1)));
    assert_eq!(front.session.regions(), 2);
    front.say(Request::MemoryHeard);
    assert_eq!((front.session.regions(), front.running()), (1, vec![0, 1]));
    assert_eq!(front.get(Request::PostcopyEnd), 0);
    assert!(!front.session.is_late());
    assert!(front.rings.queues.values().all(|ring| !ring.late));
    assert_eq!(front.get(Request::PostcopyEnd), 0, "once for each queue pair");
    front.say_fd(Request::AddMemReg(region(1)), memory(REGION_BYTES));
    assert_eq!(front.session.regions(), 2);
}

#[test]
fn a_whole_table_is_answered_with_a_whole_table() {
    let mut front = listening();
    let table = Request::SetMemTable(vec![region(0), region(2)]);
    let fds = vec![memory(REGION_BYTES), memory(REGION_BYTES)];
    let reply = front.ask(&table, fds).unwrap();
    let places = places(&reply, 8);
    assert_eq!(
        places.iter().map(|(guest, _)| *guest).collect::<Vec<_>>(),
        [GUEST, GUEST + 2 * REGION_BYTES]
    );
    start(&mut front, 0);
    assert!(front.running().is_empty());
    front.say(Request::SetMemTable(Vec::new()));
    assert_eq!((front.session.regions(), front.running()), (2, vec![0]));
    front.session.close(&mut front.rings);
    assert!(front.running().is_empty() && !front.session.is_late());
}

#[test]
fn what_comes_out_of_order_is_refused() {
    assert_eq!(
        Front::new().refused(Request::PostcopyAdvise, Vec::new()),
        "POSTCOPY_ADVISE without its protocol feature"
    );
    let mut early = front();
    assert_eq!(
        early.refused(Request::PostcopyListen, Vec::new()),
        "POSTCOPY_LISTEN before POSTCOPY_ADVISE"
    );
    assert_eq!(
        early.refused(Request::MemoryHeard, Vec::new()),
        "an answer about memory, and nothing was told"
    );
    assert_eq!(early.get(Request::PostcopyEnd), 0, "nothing to end");
    early.share();
    let _ = early.bytes(&Request::PostcopyAdvise.write(false), Vec::new()).unwrap();
    assert_eq!(
        early.refused(Request::PostcopyListen, Vec::new()),
        "POSTCOPY_LISTEN while memory regions are shared already"
    );
}

#[test]
fn a_file_whose_pages_cannot_be_waited_for_is_refused() {
    let mut front = listening();
    let file = tempfile::tempfile_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    file.set_len(REGION_BYTES).unwrap();
    let fd = OwnedFd::from(file);
    let _ = front.ask(&Request::AddMemReg(region(0)), vec![fd]).unwrap();
    let error = front.refused(Request::MemoryHeard, Vec::new());
    assert!(error.contains("it must be a memfd, or a file on tmpfs or hugetlbfs"), "{error}");
}
