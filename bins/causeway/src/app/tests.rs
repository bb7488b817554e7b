//! The app by hand, for what no guest can make it do: panic.

use std::any::Any;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use control::Reply;
use control::server::Server;
use packet::MacAddr;
use port::{
    Batch, Fabric, FrameBuf, Ingress, Notified, PortState, PortStatus, QueueCounters, QueueId,
};
use switch::{Switch, SwitchConfig};
use tempfile::TempDir;
use testkit::{Guest, GuestSettings, Remote, TestFrame, read_frame};
use virtq::Layout;

use super::{App, Origin};
use crate::signals::Signals;

/// How long something may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);
const STATIONS: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2])];

/// An ingress with a bug.
struct Buggy(Box<dyn Ingress>);

impl Ingress for Buggy {
    fn receive<'a>(&'a mut self, _: &'a mut FrameBuf) -> Batch<'a> {
        panic!("a bug in the test");
    }

    fn release(&mut self) {
        self.0.release();
    }

    fn notify(&mut self) -> Notified {
        self.0.notify()
    }

    fn arm(&mut self) -> bool {
        self.0.arm()
    }

    fn disarm(&mut self) {
        self.0.disarm();
    }

    fn wake_fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.wake_fd()
    }

    fn counters(&self) -> &Arc<QueueCounters> {
        self.0.counters()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any + Send> {
        self.0.into_any()
    }
}

/// An app with two ports, `g0` and `g1`.
struct Bed {
    folder: TempDir,
    app: App,
}

impl Bed {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let switch = Switch::start(&SwitchConfig::default()).unwrap();
        let server = Server::bind(&folder.path().join("c.sock")).unwrap();
        let mut app = App::new(switch, server, Signals::none().unwrap()).unwrap();
        for name in ["g0", "g1"] {
            let socket = folder.path().join(name);
            let spec = format!("vhost-user:name={name},socket={}", socket.display());
            app.add(&spec.parse().unwrap(), Vec::new(), Origin::CommandLine).unwrap();
        }
        Self { folder, app }
    }

    /// Serves until `done`.
    fn until(&mut self, what: &str, mut done: impl FnMut(&Self) -> bool) {
        let start = Instant::now();
        while !done(self) {
            assert!(start.elapsed() < PATIENCE, "not so after {PATIENCE:?}: {what}");
            let _ = self.app.manager.run_with_timeout(5).unwrap();
            for fd in self.app.woken() {
                self.app.handle(fd);
            }
        }
    }

    fn status(&self, name: &str) -> PortStatus {
        let port = self.app.ports.iter().find(|port| port.spec.name == name).unwrap();
        port.handle.status.read()
    }

    fn join(&mut self, name: &str, layout: Layout) -> Remote {
        let path = self.folder.path().join(name);
        let remote = Remote::join(&path, GuestSettings::new(layout)).unwrap();
        self.until("the guest is served", |bed| bed.status(name).state == PortState::Up);
        remote
    }

    /// A frame from one guest arrives at the other.
    fn passes(&mut self, (from, to): (&mut Guest, &mut Guest), id: u64) {
        let frame = TestFrame { dst: MacAddr::BROADCAST, src: STATIONS[0], tci: None, id, len: 60 };
        assert!(from.send(&frame.bytes(), 1).unwrap());
        let _ = from.flush();
        let mut arrived = false;
        self.until("the frame arrives", |_| {
            let frames = to.receive().unwrap();
            arrived |= frames.iter().filter_map(|frame| read_frame(frame)).any(|f| f.id == id);
            arrived
        });
    }
}

#[test]
fn a_port_is_reset_after_a_panic_and_others_notice_neither() {
    for layout in [Layout::Split, Layout::Packed] {
        let mut bed = Bed::new();
        let (mut bad, mut good) = (bed.join("g0", layout), bed.join("g1", layout));
        bed.passes((&mut bad.guest, &mut good.guest), 1);

        let port = bed.app.ports.iter().find(|port| port.spec.name == "g0").unwrap();
        let at = QueueId { port: port.handle.id, pair: 0 };
        let ingress = bed.app.switch.detach_ingress(at).unwrap();
        bed.app.switch.attach_ingress(at, Box::new(Buggy(ingress)));
        bad.guest.kick();
        bed.until("the port is in quarantine", |bed| {
            bed.status("g0").state == PortState::Quarantined
        });
        let reason = bed.status("g0").reason;
        assert!(reason.contains("a bug: a bug in the test"), "{reason}");
        assert_eq!(bed.status("g1").state, PortState::Up);

        // Whoever is there goes, and the next one is served as if nothing had happened.
        let reply = bed.app.port_reset("g0");
        assert_eq!(reply, Reply::done("port g0 is in service again"));
        assert!(bad.front_end.is_closed());
        let mut again = bed.join("g0", layout);
        bed.passes((&mut again.guest, &mut good.guest), 2);
        bed.passes((&mut good.guest, &mut again.guest), 3);
        let ledger = bed.app.switch.stats();
        assert_eq!(ledger.held, 0);
        assert_eq!(
            bed.app.port_reset("g0"),
            Reply::Failed("port g0 is up: there is nothing to reset".to_owned(),)
        );
    }
}
