//! The way of a frame from one guest's transmitq to another's receiveq, without the decision
//! between them: what `virtio-net` costs a frame.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use port::{BURST_MAX, Egress, FrameBuf, Ingress};
use virtio_net::features::{MRG_RXBUF, VERSION_1, queue_options};
use virtio_net::{QueueOptions, Receiveq, ReceiveqParts, Transmitq, TransmitqParts};
use virtq::Layout;
use virtq::driver::{Buffer, BufferPool, DriverConfig, DriverQueue, Used};
use virtq::mem::{GuestMap, GuestPhysAddr};

use crate::SIZE;

/// Bytes of a frame.
const FRAME: u32 = 64;
/// Bytes of a frame that is spread over several buffers, and of those.
const LONG_FRAME: u32 = 1500;
const SHORT_BUFFER: u32 = 512;
/// Bytes of the header before it.
const HEADER: u32 = 12;
const BUFFER_BYTES: u32 = 2048;
const BUFFERS: u32 = 192;
const BUFFERS_AT: GuestPhysAddr = GuestPhysAddr(0x10_0000);
const MEMORY_BYTES: usize = 0x10_0000 + 192 * 2048;

/// A guest's driver with its buffers.
#[derive(Debug)]
struct Side {
    map: GuestMap,
    driver: DriverQueue,
    pool: BufferPool,
    used: [Used; BURST_MAX],
}

impl Side {
    fn new(layout: Layout) -> anyhow::Result<Self> {
        let map = GuestMap::private(MEMORY_BYTES)?;
        let config = DriverConfig::new(layout, SIZE);
        let mut driver = DriverQueue::new(&map, config, GuestPhysAddr(0))?;
        driver.disable_calls();
        let pool = BufferPool::new(&map, BUFFERS_AT, BUFFER_BYTES, BUFFERS)?;
        Ok(Self { map, driver, pool, used: [Used::default(); BURST_MAX] })
    }

    fn buffer(&self, index: u64, len: u32) -> anyhow::Result<Buffer> {
        Ok(self.pool.buffer(u32::try_from(index)?, len))
    }

    fn reclaim(&mut self) -> anyhow::Result<usize> {
        Ok(self.driver.poll_burst(&mut self.used)?)
    }
}

/// Two guests and the device between them.
#[derive(Debug)]
pub struct Path {
    from: Side,
    to: Side,
    transmitq: Transmitq,
    receiveq: Receiveq,
    frames: FrameBuf,
    picked: Vec<u16>,
    /// Bytes of a frame, and of a receiver's buffer.
    frame: u32,
    buffer_bytes: u32,
}

impl Path {
    /// Sets both guests up; the receiver has given all its buffers.
    ///
    /// # Errors
    ///
    /// If memory cannot be mapped or a side refuses the configuration.
    pub fn new(layout: Layout) -> anyhow::Result<Self> {
        Self::with(layout, FRAME, BUFFER_BYTES)
    }

    /// As [`Self::new`], with frames of 1500 bytes that need three buffers of the receiver.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn mergeable(layout: Layout) -> anyhow::Result<Self> {
        Self::with(layout, LONG_FRAME, SHORT_BUFFER)
    }

    fn with(layout: Layout, frame: u32, buffer_bytes: u32) -> anyhow::Result<Self> {
        let (from, mut to) = (Side::new(layout)?, Side::new(layout)?);
        for index in 0..BUFFERS {
            let buffer = to.buffer(u64::from(index), buffer_bytes)?;
            to.driver.add_writable(&[buffer], u64::from(index))?;
        }
        to.driver.publish();
        let options = QueueOptions { retries: 0, ..queue_options(VERSION_1 | MRG_RXBUF, u16::MAX) };
        let transmitq = Transmitq::new(TransmitqParts {
            watch: Default::default(),
            queue: from.driver.queue_config().activate(&from.map)?,
            kick: None,
            call: None,
            counters: Arc::default(),
            options,
        });
        let receiveq = Receiveq::new(ReceiveqParts {
            watch: Default::default(),
            queue: to.driver.queue_config().activate(&to.map)?,
            kick: None,
            call: None,
            counters: Arc::default(),
            options,
        });
        let picked = (0..u16::try_from(BURST_MAX)?).collect();
        let frames = FrameBuf::default();
        Ok(Self { from, to, transmitq, receiveq, frames, picked, frame, buffer_bytes })
    }

    /// The sender's part before: makes `count` frames available, at most a burst.
    ///
    /// # Errors
    ///
    /// If they do not fit.
    #[inline(never)]
    pub fn offer(&mut self, count: u16) -> anyhow::Result<()> {
        for index in 0..u64::from(count) {
            let buffer = self.from.buffer(index, self.frame.wrapping_add(HEADER))?;
            self.from.driver.add_readable(&[buffer], index)?;
        }
        self.from.driver.publish();
        Ok(())
    }

    /// The device's part: delivers a burst. Returns its frames.
    ///
    /// # Errors
    ///
    /// If the receiver broke its ring.
    #[inline(never)]
    pub fn serve(&mut self) -> anyhow::Result<usize> {
        let batch = self.transmitq.receive(&mut self.frames);
        let count = batch.len();
        self.receiveq.send(&batch, self.picked.get(..count).unwrap_or_default())?;
        drop(batch);
        self.transmitq.release();
        // ORDERING: the fence that `notify` asks for, between publication and the look at what
        // the drivers want.
        fence(Ordering::SeqCst);
        let _ = self.transmitq.notify();
        let _ = self.receiveq.notify();
        Ok(count)
    }

    /// The guests' part after: both take back what is used, the receiver gives it again. Returns
    /// how many frames arrived.
    ///
    /// # Errors
    ///
    /// If the device broke a ring.
    #[inline(never)]
    pub fn reclaim(&mut self) -> anyhow::Result<usize> {
        let sent = self.from.reclaim()?;
        let (mut bytes, mut buffers) = (0u32, 0usize);
        loop {
            let filled = self.to.reclaim()?;
            if filled == 0 {
                break;
            }
            buffers = buffers.wrapping_add(filled);
            for at in 0..filled {
                let Some(used) = self.to.used.get(at).copied() else { break };
                bytes = bytes.wrapping_add(used.len);
                let buffer = self.to.buffer(used.cookie, self.buffer_bytes)?;
                self.to.driver.add_writable(&[buffer], used.cookie)?;
            }
        }
        self.to.driver.publish();
        let whole = self.frame.wrapping_add(HEADER);
        let of_each = usize::try_from(whole.div_ceil(self.buffer_bytes))?;
        anyhow::ensure!(
            bytes == whole.wrapping_mul(u32::try_from(sent)?)
                && buffers == of_each.wrapping_mul(sent),
            "{sent} frames of {whole} B were sent, {bytes} B arrived in {buffers} buffers"
        );
        Ok(sent)
    }
}

#[cfg(test)]
mod tests {
    use super::Path;
    use virtq::Layout;

    #[test]
    fn every_frame_arrives() {
        for layout in [Layout::Split, Layout::Packed] {
            for new in [Path::new, Path::mergeable] {
                let mut path = new(layout).unwrap();
                for _ in 0..100 {
                    path.offer(32).unwrap();
                    assert_eq!(path.serve().unwrap(), 32);
                    assert_eq!(path.reclaim().unwrap(), 32);
                }
            }
        }
    }
}
