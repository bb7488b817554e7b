//! A guest inside this process: memory, a driver for both rings, and frames that can be checked.

use std::sync::Arc;

use port::QueueCounters;
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use virtio_net::features::{EVENT_IDX, VERSION_1, queue_options, ring_features};
use virtio_net::{Receiveq, ReceiveqParts, Transmitq, TransmitqParts};
use virtq::Layout;
use virtq::driver::{BufferPool, DriverConfig, DriverQueue};
use virtq::mem::{GuestMap, GuestPhysAddr};

/// Sizes of the frames, one after the other.
pub(super) const FRAME_MIN: u32 = 60;
pub(super) const FRAME_MAX: u32 = 1514;
const MTU: u16 = 1500;
const RING: u16 = 256;
const BUFFER: u32 = 2048;
/// Bytes of the virtio-net header before each frame.
const HEADER: u32 = 12;
/// Where things are in the guest's memory.
const MEMORY: usize = 4 << 20;
const TRANSMITQ_AT: GuestPhysAddr = GuestPhysAddr(0);
const RECEIVEQ_AT: GuestPhysAddr = GuestPhysAddr(0x10000);
const TRANSMIT_BUFFERS_AT: GuestPhysAddr = GuestPhysAddr(0x10_0000);
const RECEIVE_BUFFERS_AT: GuestPhysAddr = GuestPhysAddr(0x20_0000);
/// An `EtherType` for experiments (IEEE 802, local experimental 1).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];

/// Address of a station.
pub(super) type Address = [u8; 6];

/// The driver's side of a guest.
#[derive(Debug)]
pub(super) struct Guest {
    address: Address,
    transmitq: DriverQueue,
    transmit_buffers: BufferPool,
    kick: Arc<OwnedFd>,
    receiveq: DriverQueue,
    receive_buffers: BufferPool,
    sent: u64,
    /// Frames that arrived and were right.
    pub(super) received: u64,
}

impl Guest {
    /// A guest, and the device sides of its two rings.
    pub(super) fn new(
        layout: Layout,
        counters: &Arc<QueueCounters>,
    ) -> Result<(Self, Transmitq, Receiveq), Box<dyn std::error::Error>> {
        let features = VERSION_1 | EVENT_IDX;
        let map = GuestMap::private(MEMORY)?;
        let config = DriverConfig::new(layout, RING).with_features(ring_features(features), 0);
        let transmitq = DriverQueue::new(&map, config, TRANSMITQ_AT)?;
        let receiveq = DriverQueue::new(&map, config, RECEIVEQ_AT)?;
        let count = u32::from(RING);
        let kick = Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?);
        let options = queue_options(features, MTU);
        // This driver polls: it needs no calls, and the receiveq is never waited for.
        let device = Transmitq::new(TransmitqParts {
            watch: Default::default(),
            queue: transmitq.queue_config().activate(&map)?,
            kick: Some(Arc::clone(&kick)),
            call: None,
            counters: Arc::clone(counters),
            options,
        });
        let device_receiveq = Receiveq::new(ReceiveqParts {
            watch: Default::default(),
            queue: receiveq.queue_config().activate(&map)?,
            kick: None,
            call: None,
            counters: Arc::clone(counters),
            options,
        });
        let mut guest = Self {
            address: match layout {
                Layout::Packed => [2, 0, 0, 0, 0, 1],
                Layout::Split => [2, 0, 0, 0, 0, 2],
            },
            transmitq,
            transmit_buffers: BufferPool::new(&map, TRANSMIT_BUFFERS_AT, BUFFER, count)?,
            kick,
            receiveq,
            receive_buffers: BufferPool::new(&map, RECEIVE_BUFFERS_AT, BUFFER, count)?,
            sent: 0,
            received: 0,
        };
        guest.receiveq.disable_calls();
        guest.transmitq.disable_calls();
        while let Some(index) = guest.receive_buffers.take() {
            guest.offer(index)?;
        }
        guest.receiveq.publish();
        Ok((guest, device, device_receiveq))
    }

    pub(super) fn address(&self) -> Address {
        self.address
    }

    /// Sends to `to` until `limit` frames were sent or the ring is full.
    pub(super) fn send_until(&mut self, limit: u64, to: Address) -> Result<(), String> {
        while let Some(used) = self.transmitq.poll_used().map_err(|e| e.to_string())? {
            self.transmit_buffers.give(narrow(used.cookie));
        }
        while self.sent < limit {
            let Some(index) = self.transmit_buffers.take() else { break };
            let frame = frame(self.sent, to, self.address);
            let _ = self.transmit_buffers.write(index, 0, &[0; HEADER as usize]);
            let _ = self.transmit_buffers.write(index, HEADER, &frame);
            let len = HEADER.saturating_add(narrow(frame.len() as u64));
            let buffer = self.transmit_buffers.buffer(index, len);
            let added = self.transmitq.add_readable(&[buffer], u64::from(index));
            added.map_err(|error| error.to_string())?;
            self.sent = self.sent.saturating_add(1);
        }
        self.transmitq.publish();
        if self.transmitq.needs_kick() {
            let wrote = rustix::io::write(&self.kick, &1u64.to_ne_bytes());
            let _ = wrote.map_err(|error| format!("cannot kick: {error}"))?;
        }
        Ok(())
    }

    /// Takes all frames that arrived and compares them with what `from` sent.
    pub(super) fn receive(&mut self, from: Address) -> Result<(), String> {
        let mut bytes = [0; BUFFER as usize];
        while let Some(used) = self.receiveq.poll_used().map_err(|e| e.to_string())? {
            let index = narrow(used.cookie);
            let got = self.receive_buffers.read(index, HEADER, &mut bytes);
            let len = used.len.saturating_sub(HEADER) as usize;
            let expected = frame(self.received, self.address, from);
            if bytes.get(..len.min(got)) != Some(expected.as_slice()) {
                return Err(format!("frame {} arrived with wrong contents", self.received));
            }
            self.received = self.received.saturating_add(1);
            self.offer(index)?;
        }
        self.receiveq.publish();
        Ok(())
    }

    fn offer(&mut self, index: u32) -> Result<(), String> {
        let buffer = self.receive_buffers.buffer(index, BUFFER);
        self.receiveq.add_writable(&[buffer], u64::from(index)).map_err(|error| error.to_string())
    }
}

/// Frame `number` between two stations: its size and every byte follow from the number.
fn frame(number: u64, to: Address, from: Address) -> Vec<u8> {
    let sizes = u64::from(FRAME_MAX.saturating_sub(FRAME_MIN)).saturating_add(1);
    let more = narrow(number.checked_rem(sizes).unwrap_or(0));
    let len = FRAME_MIN.saturating_add(more) as usize;
    let mut frame = Vec::with_capacity(len);
    frame.extend_from_slice(&to);
    frame.extend_from_slice(&from);
    frame.extend_from_slice(&ETHERTYPE);
    frame.extend_from_slice(&number.to_be_bytes());
    let [seed, ..] = number.to_le_bytes();
    let mut byte = seed;
    frame.resize_with(len, || {
        byte = byte.wrapping_mul(5).wrapping_add(3);
        byte
    });
    frame
}

fn narrow(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
