//! A VMM in one file: guest memory, the device, eventfds, no socket. Its guest sends a frame, the
//! "wire" of the VMM loops it back, and the guest receives it.
#![forbid(unsafe_code)]

use std::error::Error;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::{Egress, FrameBuf, Ingress};
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use virtio_net::device::{ACKNOWLEDGE, Action, DRIVER, DRIVER_OK, FEATURES_OK, Mac, QueueEvents};
use virtio_net::{Device, DeviceSettings, features};
use virtq::driver::{BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const MAC: Mac = Mac([0x52, 0x54, 0, 0, 0, 1]);
/// Bytes of the header before every frame of a modern driver.
const HEADER: u32 = 12;

/// The guest: the driver's side of one queue pair.
struct Guest {
    receiveq: DriverQueue,
    transmitq: DriverQueue,
    buffers: BufferPool,
}

impl Guest {
    /// Negotiates and sets the queues up, as a driver does through the registers.
    fn boot(memory: &Arc<GuestMemoryMmap>, device: &mut Device) -> Result<Self, Box<dyn Error>> {
        let _ = device.set_status(ACKNOWLEDGE | DRIVER);
        device.set_driver_features(features::VERSION_1 | features::MAC | features::RING_PACKED);
        let _ = device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        let map = GuestMap::new(Arc::clone(memory))?;
        let mut queue = |index: usize, base: u64| -> Result<DriverQueue, Box<dyn Error>> {
            let config = DriverConfig::new(features::layout(device.acked_features()), 64);
            let queue = DriverQueue::new(&map, config, GuestPhysAddr(base))?;
            let setup = device.queue_mut(index).ok_or("no such queue")?;
            let areas = queue.areas();
            (setup.size, setup.desc, setup.ready) = (64, areas.desc, true);
            (setup.driver, setup.device) = (areas.driver, areas.device);
            Ok(queue)
        };
        let (receiveq, transmitq) = (queue(0, 0x1000)?, queue(1, 0x3000)?);
        let buffers = BufferPool::new(&map, GuestPhysAddr(0x1_0000), 2048, 2)?;
        Ok(Self { receiveq, transmitq, buffers })
    }

    fn post_buffer(&mut self) -> Result<(), Box<dyn Error>> {
        self.receiveq.add_writable(&[self.buffers.buffer(0, 2048)], 0)?;
        self.receiveq.publish();
        let _ = self.receiveq.enable_calls();
        Ok(())
    }

    fn send(&mut self, frame: &[u8]) -> Result<bool, Box<dyn Error>> {
        let _ = self.buffers.write(1, 0, &[0; HEADER as usize]);
        let _ = self.buffers.write(1, HEADER, frame);
        let len = HEADER.saturating_add(u32::try_from(frame.len())?);
        self.transmitq.add_readable(&[self.buffers.buffer(1, len)], 1)?;
        self.transmitq.publish();
        Ok(self.transmitq.needs_kick())
    }

    fn receive(&mut self) -> Result<Vec<u8>, Box<dyn Error>> {
        let used = self.receiveq.poll_used()?.ok_or("nothing arrived")?;
        let mut frame = vec![0; used.len.saturating_sub(HEADER) as usize];
        let _ = self.buffers.read(0, HEADER, &mut frame);
        Ok(frame)
    }
}

/// Waits for an eventfd of our own, and takes what is in it: it is readable until then.
fn wait(fd: impl AsFd) -> Result<(), Box<dyn Error>> {
    let _ = poll(&mut [PollFd::new(&fd, PollFlags::IN)], None)?;
    let _ = rustix::io::read(&fd, &mut [0; 8])?;
    Ok(())
}

/// Runs the VMM; the frame that the guest got back.
pub(crate) fn run() -> Result<Vec<u8>, Box<dyn Error>> {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 1 << 20)])?);
    let mut device =
        Device::new(DeviceSettings { mac: MAC, mtu: None, queue_pairs: 1, without: 0 })?;
    let mut guest = Guest::boot(&memory, &mut device)?;

    // The transport's part: the driver is ready, its queues start.
    let action = device.set_status(device.status() | DRIVER_OK);
    if action != Some(Action::Activate) {
        return Err("the driver and the device did not agree".into());
    }
    let event = || eventfd(0, EventfdFlags::CLOEXEC).map(Arc::new);
    let events: [(Arc<OwnedFd>, Arc<OwnedFd>); 2] = [(event()?, event()?), (event()?, event()?)];
    let events_of = |index: usize| match events.get(index) {
        Some((kick, call)) => QueueEvents { kick: Some(kick.clone()), call: Some(call.clone()) },
        None => QueueEvents::default(),
    };
    let queues = device.activate(&memory, events_of, |_| Arc::default())?;
    let pair = queues.pairs.into_iter().next().ok_or("no queue pair")?;
    let mut transmitq = pair.transmitq.ok_or("no transmitq")?;
    let mut receiveq = pair.receiveq.ok_or("no receiveq")?;

    // The guest's part: offer a buffer, send a frame, kick.
    guest.post_buffer()?;
    let more = transmitq.arm();
    let frame = [&MAC.0[..], &MAC.0, &[0x88, 0xb5], b"hello, toy VMM"].concat();
    if guest.send(&frame)? {
        let [_, (kick, _)] = &events;
        let _ = rustix::io::write(kick, &1u64.to_ne_bytes())?;
    }

    // The VMM's I/O thread: wake up, move the burst, give buffers back, call.
    if !more {
        wait(transmitq.wake_fd().ok_or("no kick")?)?;
    }
    transmitq.disarm();
    let mut frames = FrameBuf::default();
    let batch = transmitq.receive(&mut frames);
    receiveq.send(&batch, &[0])?;
    transmitq.release();
    fence(Ordering::SeqCst);
    let _ = transmitq.notify();
    let _ = receiveq.notify();

    let [(_, call), _] = &events;
    wait(call)?;
    guest.receive()
}

fn main() -> Result<(), Box<dyn Error>> {
    let frame = run()?;
    let text = frame.get(14..).unwrap_or_default();
    println!("the guest received: {}", String::from_utf8_lossy(text));
    Ok(())
}
