//! A guest that comes by postcopy: its front end serves pages late, or never.
#![expect(clippy::arithmetic_side_effects, reason = "test code")]

use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use port::{DropReason, PortState};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use vhost_user_net::codec::{IotlbKind, IotlbMessage, Request};
use vhost_user_net::memory::{FrontendAddr, RegionSpec};
use virtio_net::features::ACCESS_PLATFORM;
use virtq::mem::guard::Watch;
use virtq::mem::{GuestPhysAddr, Userfault};
use virtq::{Access, Iova};

use crate::frames::{PACKED, SPLIT, exchange, frame};
use crate::guest::{GUEST, Guest, MEMORY, USER};
use crate::harness::{Bench, wait_for};

const PAGE: usize = 4096;
const BOTH: [u64; 2] = [SPLIT, PACKED];

/// Sends a request and, if it has a reply, returns its payload and fd.
pub(crate) fn ask(
    stream: &mut UnixStream,
    request: &Request,
    fd: Option<BorrowedFd<'_>>,
    has_reply: bool,
) -> (Vec<u8>, Option<OwnedFd>) {
    let bytes = request.write(false);
    let fds: Vec<_> = fd.into_iter().collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(SendAncillaryMessage::ScmRights(&fds)));
    let sent = sendmsg(&*stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty());
    assert_eq!(sent.unwrap(), bytes.len());
    if !has_reply {
        return (Vec::new(), None);
    }
    let mut head = [0; 12];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut parts = [IoSliceMut::new(&mut head)];
    let got = recvmsg(&*stream, &mut parts, &mut control, RecvFlags::CMSG_CLOEXEC).unwrap();
    assert_eq!(got.bytes, 12);
    let fd = control.drain().find_map(|message| {
        let RecvAncillaryMessage::ScmRights(mut fds) = message else { return None };
        fds.next()
    });
    assert_eq!(head[..4], bytes[..4], "an answer to the request");
    let mut payload = vec![0; usize::from(head[8])];
    stream.read_exact(&mut payload).unwrap();
    (payload, fd)
}

/// Serves the pages of a guest that has moved: to itself and to the back end.
struct Server {
    stop: Arc<AtomicBool>,
    /// Pages that were served.
    served: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

/// Who may sleep in the guest's memory: the fd, and where it has the memory.
type Place = (Userfault, usize);

impl Server {
    /// Each page is served `late` after it was asked for.
    fn start(places: Vec<Place>, file: std::fs::File, old: Vec<u8>, late: Duration) -> Self {
        let (stop, served) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ends, counts) = (Arc::clone(&stop), Arc::clone(&served));
        let thread = thread::spawn(move || {
            let mut there = vec![false; MEMORY / PAGE];
            // ORDERING: Relaxed: the flag guards nothing but itself.
            while !ends.load(Ordering::Relaxed) {
                let missed = places.iter().find_map(|(place, at)| Some(place.missed()? - at));
                let Some(offset) = missed else {
                    thread::sleep(Duration::from_micros(100));
                    continue;
                };
                let offset = offset / PAGE * PAGE;
                if !std::mem::replace(&mut there[offset / PAGE], true) {
                    thread::sleep(late);
                    let page = &old[offset..offset + PAGE];
                    let at = u64::try_from(offset).unwrap();
                    assert_eq!(rustix::io::pwrite(&file, page, at).unwrap(), PAGE);
                    // ORDERING: Relaxed: a count.
                    let _ = counts.fetch_add(1, Ordering::Relaxed);
                }
                places.iter().for_each(|(place, at)| place.wake(at + offset, PAGE));
            }
            // The rest comes by itself, as in a migration.
            for offset in (0..MEMORY).step_by(PAGE).filter(|at| !there[at / PAGE]) {
                let at = u64::try_from(offset).unwrap();
                let _ = rustix::io::pwrite(&file, &old[offset..offset + PAGE], at).unwrap();
            }
            places.iter().for_each(|(place, at)| place.wake(*at, MEMORY));
        });
        Self { stop, served, thread: Some(thread) }
    }

    /// All pages are there when this returns.
    fn finish(&mut self) {
        // ORDERING: Relaxed: see above.
        self.stop.store(true, Ordering::Relaxed);
        self.thread.take().into_iter().for_each(|thread| thread.join().unwrap());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.finish();
    }
}

/// How memory is shared.
#[derive(Clone, Copy)]
enum Share {
    Table,
    /// As QEMU does where it can.
    OneByOne,
}

/// A guest that arrives at port 0, and the front end's raw connection.
struct Mover {
    guest: Guest,
    stream: UnixStream,
    /// Where the back end has the memory, and its fd.
    place: Option<Place>,
    /// The guest's memory as it was.
    old: Vec<u8>,
    _own: Option<(Userfault, Vec<Watch>)>,
}

impl Mover {
    /// Its memory is shared, no page of it is there, its rings are not started.
    fn new(bench: &Bench, features: u64, share: Share) -> Self {
        let mut stream = UnixStream::connect(bench.socket(0)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut guest = Guest::arriving(stream.try_clone().unwrap(), features);
        guest.fill();
        let mut old = vec![0; MEMORY];
        assert_eq!(rustix::io::pread(&guest.file, &mut old, 0).unwrap(), MEMORY);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&guest.file, hole, 0, u64::try_from(MEMORY).unwrap()).unwrap();
        let (nothing, fd) = ask(&mut stream, &Request::PostcopyAdvise, None, true);
        assert!(nothing.is_empty());
        let _ = ask(&mut stream, &Request::PostcopyListen, None, false);
        let spec = RegionSpec {
            guest: GuestPhysAddr(GUEST),
            size: u64::try_from(MEMORY).unwrap(),
            user: FrontendAddr(USER),
            mmap_offset: 0,
        };
        let (request, heard) = match share {
            Share::Table => (Request::SetMemTable(vec![spec]), Request::SetMemTable(Vec::new())),
            Share::OneByOne => (Request::AddMemReg(spec), Request::MemoryHeard),
        };
        let (reply, _) = ask(&mut stream, &request, Some(guest.file.as_fd()), true);
        assert_eq!(reply.len(), 40);
        let at = usize::from_le_bytes(reply[24..32].try_into().unwrap());
        assert_ne!(at, usize::try_from(USER).unwrap());
        let _ = ask(&mut stream, &heard, None, false);
        let place = Some((Userfault::of(fd.unwrap()), at));
        Self { guest, stream, place, old, _own: None }
    }

    /// Pages are served, so late. The guest itself waits for them as well.
    fn serve(&mut self, late: Duration) -> Server {
        let own = Userfault::open().unwrap();
        let watches = Watch::all(self.guest.map());
        watches.iter().for_each(|watch| own.register(watch).unwrap());
        let at = watches[0].range().0;
        let asks = Userfault::of(own.as_fd().try_clone_to_owned().unwrap());
        self._own = Some((own, watches));
        let file = self.guest.file.try_clone().unwrap();
        let places = vec![(asks, at), self.place.take().unwrap()];
        Server::start(places, file, std::mem::take(&mut self.old), late)
    }

    /// Says where everything is behind the vIOMMU: then rings start.
    fn translate(&mut self) {
        for iova in [GUEST, USER] {
            let message = IotlbMessage {
                iova: Iova(iova),
                size: u64::try_from(MEMORY).unwrap(),
                user: FrontendAddr(USER),
                kind: IotlbKind::Update(Access::ReadWrite),
            };
            self.stream.write_all(&Request::Iotlb(message).write(true)).unwrap();
            let mut answer = [0; 20];
            if self.stream.read_exact(&mut answer).is_err() {
                drop(self.serve(Duration::ZERO));
                panic!("the control thread sleeps in the guest's memory");
            }
            assert_eq!(answer[12..], [0; 8], "it is accepted");
        }
    }

    fn end(&mut self) {
        let (reply, _) = ask(&mut self.stream, &Request::PostcopyEnd, None, true);
        assert_eq!(reply, [0; 8]);
    }
}

fn bench() -> Bench {
    Bench::with(|settings| settings.postcopy = true)
}

fn neighbour(bench: &Bench, features: u64) -> Guest {
    let mut guest = Guest::new(UnixStream::connect(bench.socket(1)).unwrap(), features);
    guest.fill();
    guest.start();
    guest
}

/// Sends, and sees that all buffers come back.
fn send_all(from: &mut Guest, numbers: std::ops::Range<u32>) {
    for number in numbers {
        wait_for("room to send", || from.send(&frame(number)));
    }
    wait_for("the buffers", || from.reclaim());
}

#[test]
fn frames_come_and_go_while_the_memory_arrives() {
    for (features, share) in [(SPLIT, Share::Table), (PACKED, Share::OneByOne)] {
        let bench = bench();
        let mut good = neighbour(&bench, features);
        let mut mover = Mover::new(&bench, features, share);
        let mut server = mover.serve(Duration::from_millis(5));
        mover.guest.start();
        bench.wait(0, PortState::Up, "");
        exchange(&mut good, &mut mover.guest, 0..100);
        exchange(&mut mover.guest, &mut good, 0..100);
        // ORDERING: Relaxed: a count.
        assert!(server.served.load(Ordering::Relaxed) > 20, "rings and buffers were missing");
        server.finish();
        mover.end();
        exchange(&mut good, &mut mover.guest, 100..300);
        exchange(&mut mover.guest, &mut good, 100..300);
        assert_eq!(bench.drops(), 0);
    }
}

#[test]
fn nobody_waits_for_pages_that_are_not_served() {
    let behind = BOTH.map(|features| features | ACCESS_PLATFORM);
    for features in BOTH.into_iter().chain(behind) {
        let bench = bench();
        let mut good = neighbour(&bench, features & !ACCESS_PLATFORM);
        let mut mover = Mover::new(&bench, features, Share::Table);
        mover.guest.start_anew(0);
        if features & ACCESS_PLATFORM != 0 {
            mover.translate();
        }
        // Nothing of the mover's is there, not even its ring.
        send_all(&mut good, 0..20);
        let mut server = mover.serve(Duration::ZERO);
        let mut next = 0;
        wait_for("the frames", || {
            if let Some(got) = mover.guest.receive() {
                assert_eq!(got, frame(next));
                next += 1;
            }
            next == 20
        });
        server.finish();
        mover.end();
        mover.guest.start_anew(1);
        exchange(&mut good, &mut mover.guest, 20..60);
        exchange(&mut mover.guest, &mut good, 0..60);
        assert_eq!(bench.drops(), 0);
    }
}

#[test]
fn too_many_frames_for_a_guest_that_sleeps_are_dropped_and_counted() {
    let bench = bench();
    let mut good = neighbour(&bench, SPLIT);
    let mut mover = Mover::new(&bench, SPLIT, Share::Table);
    mover.guest.start_anew(0);
    let mut number = 0;
    let full = DropReason::DeferralFull as usize;
    wait_for("drops", || {
        send_all(&mut good, number..number + 32);
        number += 32;
        bench.totals(0).drops[full] > 0
    });
    let lost = bench.totals(0).drops[full];
    let mut server = mover.serve(Duration::ZERO);
    let (mut got, mut last) = (0, None);
    wait_for("the others", || {
        while let Some(frame) = mover.guest.receive() {
            let number = u32::from_be_bytes(frame[14..18].try_into().unwrap());
            assert!(last.is_none_or(|last| last < number), "in order");
            last = Some(number);
            got += 1;
        }
        let totals = bench.totals(0);
        got == totals.tx_frames && got + totals.dropped() == u64::from(number)
    });
    assert!(bench.totals(0).drops[full] == lost && got >= 64, "{got} of {number}");
    server.finish();
    mover.end();
}

#[test]
fn a_front_end_that_serves_no_page_goes_as_any_other() {
    let bench = bench();
    let mut good = neighbour(&bench, SPLIT);
    for _ in 0..3 {
        let mut mover = Mover::new(&bench, SPLIT, Share::OneByOne);
        mover.guest.start_anew(0);
        send_all(&mut good, 0..20);
        let asleep = || mover.place.as_ref().is_some_and(|(place, _)| place.missed().is_some());
        wait_for("its ring to be missed", asleep);
        // It wants something changed, too, and gets no answer, since its ring sleeps.
        let stop = Request::GetVringBase { ring: 0 };
        mover.stream.write_all(&stop.write(false)).unwrap();
        mover.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        assert!(mover.stream.read(&mut [0; 1]).is_err());
        drop(mover);
        bench.wait(0, PortState::Waiting, "waiting for the front end to connect to");
    }
    // Another one is served.
    let mut next = Guest::new(UnixStream::connect(bench.socket(0)).unwrap(), SPLIT);
    next.fill();
    next.start();
    bench.wait(0, PortState::Up, "");
    exchange(&mut good, &mut next, 0..50);
    // And a port can go while its threads sleep.
    let mut mover_bench = self::bench();
    let mut mover = Mover::new(&mover_bench, PACKED, Share::Table);
    mover.guest.start_anew(0);
    let asleep = || mover.place.as_ref().is_some_and(|(place, _)| place.missed().is_some());
    wait_for("its ring to be missed", asleep);
    mover_bench.finish();
}

#[test]
fn postcopy_is_offered_to_trusted_front_ends_only() {
    let bench = Bench::with(|_| ());
    let mut stream = UnixStream::connect(bench.socket(0)).unwrap();
    let (offered, _) = ask(&mut stream, &Request::GetProtocolFeatures, None, true);
    assert_eq!(u64::from_le_bytes(offered.try_into().unwrap()) & (1 << 8), 0);
    let _ = ask(&mut stream, &Request::PostcopyAdvise, None, false);
    bench.wait_error(0, "POSTCOPY_ADVISE without its protocol feature");
}
