//! No message, right or wrong, leaks an fd. Alone in its process, because it counts.

#[path = "frontend/guest.rs"]
#[cfg(test)]
#[expect(dead_code, reason = "shared with the other tests, which use all of it")]
mod guest;

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::IoSlice;
    use std::mem::MaybeUninit;
    use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
    use std::os::unix::net::UnixStream;
    use std::path::Path;
    use std::sync::{Arc, Mutex};
    use std::time::{Duration, Instant};

    use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
    use port::{Egress, Fabric, Ingress, PortId, PortSnapshot, QueueId, Restored, StatusCell};
    use rustix::event::{EventfdFlags, eventfd};
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    use vhost_user_net::codec::{FrontendReq, Request};
    use vhost_user_net::{PortLinks, PortSettings, VhostUserPort};

    /// Keeps what it gets and never moves a frame.
    #[derive(Default)]
    struct Shelf {
        ingress: Mutex<BTreeMap<QueueId, Box<dyn Ingress>>>,
        egress: Mutex<BTreeMap<QueueId, Box<dyn Egress>>>,
    }

    impl Fabric for Shelf {
        fn attach_ingress(&self, at: QueueId, ingress: Box<dyn Ingress>) {
            assert!(self.ingress.lock().unwrap().insert(at, ingress).is_none());
        }
        fn detach_ingress(&self, at: QueueId) -> Option<Box<dyn Ingress>> {
            self.ingress.lock().unwrap().remove(&at)
        }
        fn attach_egress(&self, at: QueueId, egress: Box<dyn Egress>) {
            assert!(self.egress.lock().unwrap().insert(at, egress).is_none());
        }
        fn exchange_egress(
            &self,
            _: QueueId,
            _: &mut dyn FnMut(Box<dyn Egress>) -> Box<dyn Egress>,
        ) -> bool {
            false
        }
        fn detach_egress(&self, at: QueueId) -> Option<Box<dyn Egress>> {
            self.egress.lock().unwrap().remove(&at)
        }
        fn resume_egress(&self, _: QueueId) {}
        fn busy(&self) -> Duration {
            Duration::ZERO
        }

        fn quiesce(&self) {}
        fn originate(&self, _: PortId, _: &[u8]) {}
        fn snapshot(&self, _: PortId) -> PortSnapshot {
            PortSnapshot::default()
        }
        fn restore(&self, _: PortId, _: &PortSnapshot) -> Restored {
            Restored::default()
        }
    }

    fn open_fds() -> usize {
        std::fs::read_dir("/proc/self/fd").unwrap().count()
    }

    fn send(stream: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        }
        // The back end may have closed the connection already.
        let _ = sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    }

    /// Every request with every number of fds, on a connection of its own each time.
    fn storm(path: &Path, run: &mut dyn FnMut(), is_connected: &dyn Fn() -> bool) {
        let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let file = memfd_create("m", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, 4096).unwrap();
        for code in 0..=45u32 {
            for count in [0usize, 1, 2, 31, 32, 33, 253] {
                for fd in [event.as_fd(), file.as_fd()] {
                    let stream = UnixStream::connect(path).unwrap();
                    // It may be left alone for a while, for all that was before.
                    until(run, is_connected);
                    let kind = FrontendReq::try_from(code).unwrap_or(FrontendReq::GET_FEATURES);
                    let protocol = vhost_user_net::session::PROTOCOL_FEATURES;
                    send(&stream, &Request::SetProtocolFeatures(protocol).write(false), &[]);
                    for size in [0u32, 8, 40] {
                        let mut bytes = Request::NotOffered(kind).write(true);
                        bytes[8..12].copy_from_slice(&size.to_le_bytes());
                        bytes.resize(12usize.saturating_add(usize::try_from(size).unwrap()), 0);
                        send(&stream, &bytes, &vec![fd; count]);
                        run();
                    }
                    // Half a message with fds is cut off.
                    send(&stream, &Request::GetFeatures.write(false)[..5], &vec![fd; count]);
                    run();
                    drop(stream);
                    run();
                }
            }
        }
    }

    /// A front end that comes while the process has no fd left is served later, and nobody spins.
    fn too_few_fds(path: &Path, run: &mut dyn FnMut(), is_connected: &dyn Fn() -> bool) {
        let stream = UnixStream::connect(path).unwrap();
        let before = getrlimit(Resource::Nofile);
        // The kernel gave the lowest number that was free.
        let full = u64::try_from(stream.as_raw_fd().wrapping_add(1)).unwrap();
        setrlimit(Resource::Nofile, Rlimit { current: Some(full), ..before }).unwrap();
        // This would never return if the listener stayed readable.
        run();
        assert!(!is_connected());
        setrlimit(Resource::Nofile, before).unwrap();
        until(run, is_connected);
        drop(stream);
    }

    fn until(run: &mut dyn FnMut(), done: &dyn Fn() -> bool) {
        let end = Instant::now().checked_add(Duration::from_secs(10)).unwrap();
        run();
        while !done() {
            assert!(Instant::now() < end);
            std::thread::sleep(Duration::from_millis(2));
            run();
        }
    }

    #[test]
    fn fds_never_leak() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        // What the process needs once is there.
        assert!(!virtio_net::notify::can_block());
        drop(virtq::mem::guard::notice().unwrap());
        let before = open_fds();
        {
            let links = PortLinks {
                id: PortId(0),
                fabric: Arc::new(Shelf::default()),
                status: StatusCell::waiting(""),
                counters: Box::new(|_| Arc::default()),
            };
            let port = VhostUserPort::new(PortSettings::server("g", &path), links).unwrap();
            let port = Arc::new(Mutex::new(port));
            let mut manager = EventManager::<Arc<Mutex<dyn MutEventSubscriber>>>::new().unwrap();
            let _ = manager.add_subscriber(port.clone());
            let idle = open_fds();
            let mut run = || while manager.run_with_timeout(0).unwrap() > 0 {};
            // Threads close what came.
            let none_is_left = || open_fds() == idle;
            storm(&path, &mut run, &|| port.lock().unwrap().is_connected());
            until(&mut run, &none_is_left);
            assert!(!port.lock().unwrap().is_connected());
            too_few_fds(&path, &mut run, &|| port.lock().unwrap().is_connected());
            until(&mut run, &none_is_left);
            // A whole session, and the port goes while it lasts.
            let stream = UnixStream::connect(&path).unwrap();
            let session = std::thread::spawn(move || {
                let mut guest = crate::guest::Guest::new(stream, 1 << 32 | 1 << 30);
                guest.fill();
                guest.start();
                guest
            });
            while !session.is_finished() {
                run();
            }
            let guest = session.join().unwrap();
            assert!(open_fds() > idle);
            drop(guest);
            until(&mut run, &none_is_left);
        }
        until(&mut || (), &|| open_fds() == before);
    }
}
