//! Pairs of guests on one switch, whose workers take their turns here: what a frame costs from
//! guest to guest with everything that the switch does, the decision included.
//!
//! ```text
//!  pair 0: sender ─► transmitq ─► worker 0: Switch::turn ─► receiveq ─► receiver
//!  pair 1: sender ─► transmitq ─► worker 1: Switch::turn ─► receiveq ─► receiver
//! ```
//!
//! The receiver's transmitq is empty: it is armed by and by, and costs a look now and then.

use std::sync::Arc;

use port::{BURST_MAX, Fabric, PortId, QueueCounters, QueueId};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use switch::{
    FdbLimits, PollMode, PortConfig, PortLimits, Rate, Switch, SwitchConfig, Turn, VlanRule,
    Workers,
};
use virtio_net::features::{MRG_RXBUF, VERSION_1, queue_options};
use virtio_net::{QueueOptions, Receiveq, ReceiveqParts, Transmitq, TransmitqParts};
use virtq::driver::{Buffer, BufferPool, DriverConfig, DriverQueue, Used};
use virtq::mem::{DirtyLog, GuestMap, GuestPhysAddr};
use virtq::{Access, Iotlb, IotlbEntry, Iova, Layout, RingIotlb, RingLog};

use crate::SIZE;

/// Bytes of a frame, as it is sent.
const FRAME: u32 = 64;
/// Bytes of the header before it.
const HEADER: u32 = 12;
const TAG: u32 = 4;
const BUFFER_BYTES: u32 = 2048;
/// Buffers that a receiver gives, and the ones after them to send from.
const GIVEN: u32 = 192;
const TO_SEND: u32 = 64;
const TRANSMITQ_AT: GuestPhysAddr = GuestPhysAddr(0);
const RECEIVEQ_AT: GuestPhysAddr = GuestPhysAddr(0x1_0000);
const BUFFERS_AT: GuestPhysAddr = GuestPhysAddr(0x10_0000);
const MEMORY_BYTES: usize = 0x10_0000 + 256 * 2048;
const PAGE: u64 = 4096;
const BUFFER_PAGES: u64 = 256 * 2048 / PAGE;
/// All bits of a page's number but those that there are.
const PAGE_BITS: u32 = u64::BITS - BUFFER_PAGES.ilog2();
/// Where the device sees buffers of [`Traffic::Pages`].
const FAR: u64 = 0x7000_0000_0000;
/// Longer than the switch makes way for a guest that sent little.
const CALM: std::time::Duration = std::time::Duration::from_millis(110);
/// Stations behind a port of [`Traffic::Mixed`].
const STATIONS: u32 = 8;
const VLAN: u16 = 5;

/// What the guests send each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// One station to one other.
    Plain,
    /// The same from an access port to a trunk port: every frame gets a tag.
    Vlan,
    /// Each frame from and to other stations than the one before it.
    Mixed,
    /// As [`Self::Plain`], between ports with two queue pairs each.
    Multiqueue,
    /// As [`Self::Plain`], with limits of both ports that are never hit.
    Limits,
    /// As [`Self::Mixed`], and the sender's flows are spread over two workers.
    Spread,
    /// As [`Self::Plain`], with both guests behind vIOMMUs that translate every address to itself.
    Iommu,
    /// As [`Self::Iommu`], with an entry for each page of buffers, no two of them in one piece.
    Pages,
    /// As [`Self::Plain`], with all writes of both guests' devices noted in a dirty log.
    Logged,
    /// As [`Self::Plain`], after the dirty log was switched on and off again.
    LogOff,
}

/// A dirty log of the guest's memory, for one ring.
fn log(map: &GuestMap, driver: &DriverQueue) -> anyhow::Result<RingLog> {
    let bits = u64::try_from(MEMORY_BYTES)?.div_ceil(PAGE);
    let bytes = bits.div_ceil(8);
    let file = memfd_create("log", MemfdFlags::CLOEXEC)?;
    ftruncate(&file, bytes)?;
    let config = driver.queue_config();
    Ok(RingLog {
        log: DirtyLog::from_file(file.into(), 0, usize::try_from(bytes)?)?,
        memory: map.clone(),
        device: config.device.into(),
        desc: config.desc.into(),
        call: None,
    })
}

/// A guest's driver with its buffers.
#[derive(Debug)]
struct Guest {
    transmitq: DriverQueue,
    receiveq: DriverQueue,
    pool: BufferPool,
    used: [Used; BURST_MAX],
    /// Whether descriptors name buffers by [`far`] addresses.
    far: bool,
}

impl Guest {
    /// A guest that has given all its buffers, and its two queues.
    fn new(
        layout: Layout,
        counters: &Arc<QueueCounters>,
        traffic: Traffic,
    ) -> anyhow::Result<(Self, Transmitq, Receiveq)> {
        let map = GuestMap::private(MEMORY_BYTES)?;
        let far = traffic == Traffic::Pages;
        let same = (traffic == Traffic::Iommu).then(|| identity(&map));
        let iotlb = if far { Some(page_by_page(&map)) } else { same };
        let activate = |driver: &DriverQueue, access| {
            let mut queue = driver.queue_config().activate(&map)?;
            if matches!(traffic, Traffic::Logged | Traffic::LogOff) {
                queue.set_log(Some(log(&map, driver)?));
            }
            if traffic == Traffic::LogOff {
                queue.set_log(None);
            }
            queue.set_iotlb(iotlb.clone().map(|iotlb| RingIotlb::new(iotlb, access)));
            anyhow::Ok(queue)
        };
        let config = DriverConfig::new(layout, SIZE);
        let transmitq = DriverQueue::new(&map, config, TRANSMITQ_AT)?;
        let receiveq = DriverQueue::new(&map, config, RECEIVEQ_AT)?;
        let pool = BufferPool::new(&map, BUFFERS_AT, BUFFER_BYTES, GIVEN.wrapping_add(TO_SEND))?;
        let options = QueueOptions { retries: 0, ..queue_options(VERSION_1 | MRG_RXBUF, u16::MAX) };
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let way_in = Transmitq::new(TransmitqParts {
            watch: Default::default(),
            queue: activate(&transmitq, Access::Read)?,
            kick: Some(Arc::new(kick)),
            call: None,
            counters: Arc::clone(counters),
            options,
        });
        let way_out = Receiveq::new(ReceiveqParts {
            watch: Default::default(),
            queue: activate(&receiveq, Access::Write)?,
            kick: None,
            call: None,
            counters: Arc::clone(counters),
            options,
        });
        let used = [Used::default(); BURST_MAX];
        let mut guest = Self { transmitq, receiveq, pool, used, far };
        // A guest under load polls: no calls.
        guest.transmitq.disable_calls();
        guest.receiveq.disable_calls();
        for index in 0..GIVEN {
            guest.give(u64::from(index))?;
        }
        guest.receiveq.publish();
        Ok((guest, way_in, way_out))
    }

    fn buffer(&self, index: u32, len: u32) -> Buffer {
        let buffer = self.pool.buffer(index, len);
        if self.far { Buffer { addr: far(buffer.addr), ..buffer } } else { buffer }
    }

    fn give(&mut self, index: u64) -> anyhow::Result<()> {
        let buffer = self.buffer(u32::try_from(index)?, BUFFER_BYTES);
        Ok(self.receiveq.add_writable(&[buffer], index)?)
    }

    /// Writes the frames that [`Self::offer`] offers.
    fn write(&self, of: impl Fn(u32) -> Vec<u8>) {
        for number in 0..TO_SEND {
            let bytes = [vec![0; HEADER as usize], of(number)].concat();
            let _ = self.pool.write(GIVEN.wrapping_add(number), 0, &bytes);
        }
    }

    fn offer(&mut self, count: u16, frame_bytes: u32) -> anyhow::Result<()> {
        for number in 0..u32::from(count) {
            let index = GIVEN.wrapping_add(number % TO_SEND);
            let buffer = self.buffer(index, frame_bytes.wrapping_add(HEADER));
            self.transmitq.add_readable(&[buffer], u64::from(index))?;
        }
        self.transmitq.publish();
        Ok(())
    }

    /// Takes back what was sent; how many.
    fn sent(&mut self) -> anyhow::Result<usize> {
        Ok(self.transmitq.poll_burst(&mut self.used)?)
    }

    /// Takes whatever arrived and gives its buffers again.
    fn discard(&mut self) -> anyhow::Result<()> {
        while let Some(used) = self.receiveq.poll_used()? {
            self.give(used.cookie)?;
        }
        self.receiveq.publish();
        Ok(())
    }

    /// Takes frames of `frame_bytes` and gives their buffers again; how many arrived.
    fn receive(&mut self, frame_bytes: u32) -> anyhow::Result<usize> {
        let arrived = self.receiveq.poll_burst(&mut self.used)?;
        for at in 0..arrived {
            let Some(used) = self.used.get(at).copied() else { break };
            let frame = used.len.wrapping_sub(HEADER);
            anyhow::ensure!(frame == frame_bytes, "a frame of {frame} B, not {frame_bytes}");
            self.give(used.cookie)?;
        }
        self.receiveq.publish();
        Ok(arrived)
    }
}

/// Translations of a whole memory to itself.
fn identity(map: &GuestMap) -> Arc<Iotlb> {
    let iotlb = Iotlb::new(map, Box::new(|| ()));
    let (addr, len) = (GuestPhysAddr(0), MEMORY_BYTES as u64);
    let all = IotlbEntry { iova: Iova(0), addr, len, access: Access::ReadWrite };
    let _ = iotlb.insert(&[all]);
    Arc::new(iotlb)
}

/// Where the device sees a buffer: the pages are in another order there.
fn far(addr: GuestPhysAddr) -> GuestPhysAddr {
    let offset = addr.0.wrapping_sub(BUFFERS_AT.0);
    let (page, rest) = (offset / PAGE, offset % PAGE);
    let page = page.reverse_bits().unbounded_shr(PAGE_BITS);
    GuestPhysAddr(FAR.wrapping_add(page.wrapping_mul(PAGE)).wrapping_add(rest))
}

/// A translation for each page of buffers.
fn page_by_page(map: &GuestMap) -> Arc<Iotlb> {
    let iotlb = Iotlb::new(map, Box::new(|| ()));
    for page in 0..BUFFER_PAGES {
        let addr = GuestPhysAddr(BUFFERS_AT.0.wrapping_add(page.wrapping_mul(PAGE)));
        let (iova, access) = (Iova(far(addr).0), Access::ReadWrite);
        let _ = iotlb.insert(&[IotlbEntry { iova, addr, len: PAGE, access }]);
    }
    Arc::new(iotlb)
}

/// A sender and a receiver, served by one worker.
#[derive(Debug)]
pub struct Pair {
    switch: Arc<Switch>,
    worker: usize,
    /// Whether the worker after it has a share of the frames.
    spread: bool,
    from: Guest,
    to: Guest,
    /// Bytes of a frame when it arrives.
    arriving: u32,
}

/// A guest's address: which pair, which side, which station of it.
fn address(pair: usize, side: u8, station: u32) -> [u8; 6] {
    let [.., station] = station.to_be_bytes();
    let [.., pair] = pair.to_be_bytes();
    [2, 0, 0, pair, side, station]
}

fn frame(to: [u8; 6], from: [u8; 6], tagged: bool) -> Vec<u8> {
    let tag: &[u8] = if tagged { &[0x81, 0, 0, 5] } else { &[] };
    let mut frame = [&to[..], &from, tag, &[0x88, 0xb5]].concat();
    frame.resize(FRAME as usize, 0);
    frame
}

/// So many pairs on one switch, each with a worker of its own.
///
/// # Errors
///
/// If memory cannot be mapped, the switch refuses something, or the pairs are not disjoint.
pub fn pairs(layout: Layout, traffic: Traffic, count: usize) -> anyhow::Result<Vec<Pair>> {
    let config = SwitchConfig {
        workers: Workers::Manual(if traffic == Traffic::Spread { 2 } else { count }),
        poll: PollMode::Busy,
        // Small, because setting it up is traced too.
        fdb: FdbLimits { entries: 1024, per_port: 256, ..FdbLimits::default() },
        ..SwitchConfig::default()
    };
    let switch = Arc::new(Switch::start(&config)?);
    let (access, trunk) = rules(traffic)?;
    // In this order each worker gets one pair.
    let pairs = if traffic == Traffic::Multiqueue { 2 } else { 1 };
    let port = |rule| PortConfig { vlan: rule, pairs, ..PortConfig::new("") };
    let spread = traffic == Traffic::Spread;
    let workers = if spread { vec![0] } else { Vec::new() };
    let far = Some(Rate { per_second: 100_000_000_000, burst: 1_000_000_000 });
    let limits = if traffic == Traffic::Limits {
        PortLimits { bytes: far, frames: far, storm: far, ..PortLimits::default() }
    } else {
        PortLimits::default()
    };
    let port = |rule| PortConfig {
        workers: workers.clone(),
        spread,
        limits: limits.clone(),
        ..port(rule)
    };
    let how = (layout, traffic);
    let senders = join_all(&switch, how, ("sender", &port(access)), count)?;
    let receivers = join_all(&switch, how, ("receiver", &port(trunk)), count)?;
    let mut joined = Vec::new();
    for (worker, (from, to)) in senders.into_iter().zip(receivers).enumerate() {
        let places = switch.placement();
        for port in [from.1, to.1] {
            let here = places.iter().find(|place| place.queue.port == port);
            anyhow::ensure!(here.and_then(|place| place.worker) == Some(worker), "{places:?}");
        }
        let arriving = if traffic == Traffic::Vlan { FRAME.wrapping_add(TAG) } else { FRAME };
        let switch = Arc::clone(&switch);
        let pair = Pair { switch, worker, spread, from: from.0, to: to.0, arriving };
        pair.write(traffic);
        joined.push(pair);
    }
    for pair in &mut joined {
        pair.introduce()?;
    }
    // The receivers sent little just now: for their sake bursts are small for a while.
    for _ in 0..3 {
        std::thread::sleep(CALM);
        for pair in &mut joined {
            let _ = pair.serve()?;
        }
    }
    // Some of that was flooded, to the other pairs too.
    for pair in &mut joined {
        pair.from.discard()?;
        pair.to.discard()?;
    }
    // Who has just said where it is has carried little: bursts are small for a while.
    std::thread::sleep(std::time::Duration::from_millis(150));
    for worker in (0..16).flat_map(|_| 0..count.max(2)) {
        let _ = switch.turn(worker);
    }
    Ok(joined)
}

/// Which VLANs senders and receivers carry.
fn rules(traffic: Traffic) -> anyhow::Result<(VlanRule, VlanRule)> {
    if traffic != Traffic::Vlan {
        return Ok((VlanRule::Any, VlanRule::Any));
    }
    Ok((VlanRule::from_keys(Some(VLAN), &[])?, VlanRule::from_keys(None, &[VLAN, 6])?))
}

fn join_all(
    switch: &Switch,
    (layout, traffic): (Layout, Traffic),
    (name, like): (&str, &PortConfig),
    count: usize,
) -> anyhow::Result<Vec<(Guest, PortId)>> {
    let mut guests = Vec::new();
    for number in 0..count {
        let config = PortConfig { name: format!("{name}{number}"), ..like.clone() };
        let port = switch.add_port(&config)?;
        // The first pair sends, and so the frames of its flows come there.
        for pair in (0..like.pairs).rev() {
            let none = || anyhow::anyhow!("a port without pair {pair}");
            let counters = port.counters(pair).ok_or_else(none)?;
            let (guest, way_in, way_out) = Guest::new(layout, &counters, traffic)?;
            let at = QueueId { port: port.id, pair };
            switch.attach_egress(at, Box::new(way_out));
            if pair == 0 {
                switch.attach_ingress(at, Box::new(way_in));
                guests.push((guest, port.id));
            }
        }
    }
    Ok(guests)
}

impl Pair {
    /// Prepares the frames that the guests send.
    fn write(&self, traffic: Traffic) {
        let (pair, vlan) = (self.worker, traffic == Traffic::Vlan);
        let mixed = matches!(traffic, Traffic::Mixed | Traffic::Spread);
        let station = |number: u32| if mixed { number % STATIONS } else { 0 };
        let here = |number| address(pair, 0, station(number));
        let there = |number| address(pair, 1, station(number));
        self.from.write(|number| frame(there(number), here(number), false));
        self.to.write(|number| frame(here(number), there(number), vlan));
    }

    /// Lets the switch learn all stations of both guests.
    fn introduce(&mut self) -> anyhow::Result<()> {
        let count = u16::try_from(STATIONS)?;
        self.offer(count)?;
        self.to.offer(count, FRAME)?;
        let _ = self.serve()?;
        let taken = (self.from.sent()?, self.to.sent()?);
        let all = usize::from(count);
        anyhow::ensure!(taken == (all, all), "{taken:?} frames were taken, not {count}");
        Ok(())
    }

    /// The sender's part before: makes `count` frames available, at most a burst.
    ///
    /// # Errors
    ///
    /// If they do not fit.
    #[inline(never)]
    pub fn offer(&mut self, count: u16) -> anyhow::Result<()> {
        self.from.offer(count, FRAME)
    }

    /// The switch's part: a turn of the pair's worker. Returns whether frames moved.
    ///
    /// # Errors
    ///
    /// If the switch has no such worker.
    #[inline(never)]
    pub fn serve(&mut self) -> anyhow::Result<bool> {
        let turn = self.switch.turn(self.worker);
        if self.spread {
            let _ = self.switch.turn(self.worker.wrapping_add(1));
        }
        turn.map(|turn| turn == Turn::Worked).ok_or_else(|| anyhow::anyhow!("no such worker"))
    }

    /// The guests' part after: both take back what is used, the receiver gives it again. Returns
    /// how many frames arrived.
    ///
    /// # Errors
    ///
    /// If the switch broke a ring, or a frame is missing or wrong.
    #[inline(never)]
    pub fn reclaim(&mut self) -> anyhow::Result<usize> {
        let sent = self.from.sent()?;
        let arrived = self.to.receive(self.arriving)?;
        anyhow::ensure!(sent == arrived, "{sent} frames were sent, {arrived} arrived");
        Ok(arrived)
    }

    /// A whole round of `count` frames.
    ///
    /// # Errors
    ///
    /// If one of its parts fails, or not all frames arrive.
    pub fn round(&mut self, count: u16) -> anyhow::Result<()> {
        self.offer(count)?;
        let worked = self.serve()?;
        let arrived = self.reclaim()?;
        anyhow::ensure!(worked && arrived == usize::from(count), "{arrived} of {count} arrived");
        Ok(())
    }

    /// The drops of the whole switch.
    pub fn drops(&self) -> u64 {
        let stats = self.switch.stats();
        let queues = stats.ports.iter().flat_map(|port| &port.queues);
        queues.fold(0, |sum, queue| sum.wrapping_add(queue.dropped()))
    }
}

#[cfg(test)]
mod tests {
    use super::Traffic::{Iommu, LogOff, Logged, Mixed, Multiqueue, Pages, Plain, Spread, Vlan};
    use super::{Layout, pairs};

    #[test]
    fn every_frame_arrives() {
        for layout in [Layout::Split, Layout::Packed] {
            let all = [Plain, Vlan, Mixed, Multiqueue, Spread, Iommu, Pages, Logged, LogOff];
            for traffic in all {
                // Frames that are spread arrive at one worker: there is one pair.
                let most = if traffic == Spread { 1 } else { 2 };
                for count in 1..=most {
                    let mut pairs = pairs(layout, traffic, count).unwrap();
                    for _ in 0..100 {
                        for pair in &mut pairs {
                            pair.round(32).unwrap();
                        }
                    }
                    assert_eq!(pairs[0].drops(), 0, "{layout:?} {traffic:?}");
                }
            }
        }
    }
}
