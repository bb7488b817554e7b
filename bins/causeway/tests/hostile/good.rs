//! Two good guests that exchange frames all the time, and miss none.

use std::cell::Cell;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use packet::MacAddr;
use testkit::{GuestSettings, Remote, TestFrame, read_frame};
use virtq::Layout;

/// Their addresses.
pub(crate) const GOOD: [MacAddr; 2] = [MacAddr([2, 0, 0, 0, 0, 1]), MacAddr([2, 0, 0, 0, 0, 2])];
/// Frames on their way in each direction: no queue overflows.
pub(crate) const WINDOW: u64 = 16;

/// The thread that plays both.
pub(crate) struct Good {
    /// Frames of each.
    arrived: Arc<[AtomicU64; 2]>,
    stop: Arc<AtomicBool>,
    /// Frames that are to be sent beside the exchange.
    flood: Sender<MacAddr>,
    /// How many were asked for, and how many of them the ring has.
    asked: Cell<u64>,
    flooded: Arc<AtomicU64>,
    guests: Option<([Remote; 2], Receiver<MacAddr>)>,
    thread: Option<JoinHandle<()>>,
}

impl Good {
    /// Both have joined and send nothing yet.
    pub(crate) fn join(sockets: &[PathBuf; 2]) -> Self {
        let layouts = [Layout::Split, Layout::Packed];
        let join = |at: usize| Remote::join(&sockets[at], GuestSettings::new(layouts[at]));
        let (flood, more) = channel();
        Self {
            arrived: Arc::default(),
            stop: Arc::default(),
            flood,
            asked: Cell::default(),
            flooded: Arc::default(),
            guests: Some(([join(0).unwrap(), join(1).unwrap()], more)),
            thread: None,
        }
    }

    /// The memory of the first.
    pub(crate) fn memory(&self) -> OwnedFd {
        let (guests, _) = self.guests.as_ref().unwrap();
        guests[0].memory.as_fd().try_clone_to_owned().unwrap()
    }

    /// The exchange begins: both ports are up.
    pub(crate) fn start(&mut self) {
        let (count, ended) = (Arc::clone(&self.arrived), Arc::clone(&self.stop));
        let flooded = Arc::clone(&self.flooded);
        let (guests, more) = self.guests.take().unwrap();
        let run = move || exchange(guests, &count, (&ended, &more, &flooded));
        self.thread = Some(std::thread::spawn(run));
    }

    /// Frames that have arrived, of each.
    pub(crate) fn arrived(&self) -> [u64; 2] {
        self.arrived.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    /// Sends a frame to `to`, soon.
    pub(crate) fn flood(&self, to: MacAddr) {
        self.asked.set(self.asked.get() + 1);
        self.flood.send(to).expect("the good guests live");
    }

    /// Whether the switch can see all that was to be flooded.
    pub(crate) fn has_flooded(&self) -> bool {
        self.flooded.load(Ordering::Relaxed) == self.asked.get()
    }

    /// Whether the thread has ended before it was asked to.
    pub(crate) fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until what was sent has arrived.
    pub(crate) fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.unwrap().join().expect("no frame is lost");
    }
}

/// One way of the exchange.
#[derive(Default)]
struct Flow {
    sent: u64,
    arrived: u64,
}

fn exchange(
    mut guests: [Remote; 2],
    arrived: &[AtomicU64; 2],
    (stop, more, flooded): (&AtomicBool, &Receiver<MacAddr>, &AtomicU64),
) {
    let mut flows = [Flow::default(), Flow::default()];
    let mut last = Instant::now();
    loop {
        let stopping = stop.load(Ordering::Relaxed);
        let mut moved = false;
        for dst in more.try_iter() {
            let frame = TestFrame { dst, src: GOOD[0], tci: None, id: 0, len: 60 };
            assert!(guests[0].guest.send(&frame.bytes(), 1).unwrap());
            let _ = guests[0].guest.flush();
            let _ = flooded.fetch_add(1, Ordering::Relaxed);
        }
        for (at, flow) in flows.iter_mut().enumerate() {
            let other = 1 - at;
            while !stopping && flow.sent - flow.arrived < WINDOW {
                let len = 60 + (flow.sent as usize * 37) % 1400;
                let (dst, src) = (GOOD[other], GOOD[at]);
                let frame = TestFrame { dst, src, tci: None, id: flow.sent, len };
                if !guests[at].guest.send(&frame.bytes(), 1).unwrap() {
                    break;
                }
                flow.sent += 1;
            }
            let _ = guests[at].guest.flush();
            let frames = guests[other].guest.receive().unwrap();
            // What the hostile one floods comes too.
            for frame in frames.iter().filter_map(|bytes| read_frame(bytes)) {
                if frame.src == GOOD[at] && frame.dst == GOOD[other] {
                    assert_eq!(frame.id, flow.arrived, "a frame was lost or overtaken");
                    flow.arrived += 1;
                    let _ = arrived[at].fetch_add(1, Ordering::Relaxed);
                    moved = true;
                }
            }
        }
        let rest = flows.iter().map(|flow| flow.sent - flow.arrived).sum::<u64>();
        if stopping && rest == 0 {
            return;
        }
        if moved {
            last = Instant::now();
        }
        assert!(last.elapsed() < Duration::from_secs(10), "{rest} frames are lost");
        std::thread::sleep(Duration::from_micros(300));
    }
}
