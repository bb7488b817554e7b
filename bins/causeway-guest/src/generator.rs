//! Sends test frames: as many as possible, or at a rate.
//!
//! Each slot of a transmitq holds a ready-made frame; to send it, 22 bytes are written, and 12 more
//! if stations take turns. Sizes and flows take turns too.

use std::time::{Duration, Instant};

use anyhow::ensure;

use crate::clock::now_ns;
use crate::frame::{STAMP, Sender, Stamp, hash_of_pattern, port_of};
use crate::mac::station;
use crate::port::GuestPort;
use crate::rings::{NET_HEADER, TxRing};
use crate::totals::Meter;

/// What to send.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    pub(crate) sizes: (u32, u32),
    pub(crate) flows: u16,
    pub(crate) burst: u16,
    pub(crate) rate_pps: Option<u64>,
    pub(crate) count: Option<u64>,
}

/// A sender on one port.
#[derive(Debug)]
pub(crate) struct Generator {
    sender: Sender,
    load: Load,
    /// Hash of each slot's pattern, per pair; for one size only.
    hashes: Vec<Vec<u32>>,
    /// Next sequence number of each flow.
    next_seq: Vec<u32>,
    flow: u16,
    size: u32,
    sent: u64,
    begin: Option<Instant>,
    /// Patterns of all slots at full size, for loads of several sizes.
    patterns: Vec<Vec<u8>>,
    /// Destination and source address of each pair of stations, if there are several.
    stations: Vec<[u8; 12]>,
    station: usize,
}

impl Generator {
    /// Prepares the frames in the slots of `port`, of which the back end may have none: it would
    /// send on what is written here as it comes.
    pub(crate) fn new(port: &GuestPort, sender: Sender, load: Load) -> anyhow::Result<Self> {
        let mut this = Self {
            sender,
            load,
            hashes: Vec::new(),
            next_seq: vec![0; usize::from(load.flows)],
            flow: 0,
            size: load.sizes.0,
            sent: 0,
            begin: None,
            patterns: Vec::new(),
            stations: Vec::new(),
            station: 0,
        };
        for pair in &port.pairs {
            let outstanding = pair.tx.outstanding();
            ensure!(outstanding == 0, "the back end still has {outstanding} of the buffers");
            this.prepare(&pair.tx);
        }
        Ok(this)
    }

    /// Lets the frames go in turn from each of so many stations behind the sender to one behind
    /// the receiver.
    pub(crate) fn with_stations(self, count: u32) -> Self {
        let Sender { src, dst, .. } = self.sender;
        let pair = |number| {
            let mut addresses = [0; 12];
            let (to, from) = addresses.split_at_mut(6);
            to.copy_from_slice(&station(dst, number).0);
            from.copy_from_slice(&station(src, number).0);
            addresses
        };
        Self { stations: (0..count).map(pair).collect(), ..self }
    }

    fn prepare(&mut self, ring: &TxRing) {
        let mut frame = Vec::new();
        let mut hashes = Vec::new();
        let len = self.load.sizes.1 as usize;
        let slots = u32::try_from(ring.pool().len()).unwrap_or(0);
        for slot in 0..slots {
            self.sender.build(&mut frame, len, salt(slot));
            let pattern = frame.get(self.sender.pattern_at()..).unwrap_or_default();
            hashes.push(hash_of_pattern(pattern));
            if self.has_sweep() && self.hashes.is_empty() {
                self.patterns.push(pattern.to_vec());
            }
            let _ = ring.pool().write(slot, 0, &[0; NET_HEADER as usize]);
            let _ = ring.pool().write(slot, NET_HEADER, &frame);
        }
        self.hashes.push(hashes);
    }

    fn has_sweep(&self) -> bool {
        self.load.sizes.0 != self.load.sizes.1
    }

    /// Frames made available so far.
    pub(crate) fn sent(&self) -> u64 {
        self.sent
    }

    /// Whether the load's count is reached.
    pub(crate) fn is_done(&self) -> bool {
        self.load.count.is_some_and(|count| self.sent >= count)
    }

    /// Sends a burst of at most `most` frames on `port`; returns whether it sent any.
    pub(crate) fn turn(
        &mut self,
        port: &mut GuestPort,
        most: u64,
        meter: &mut Meter,
        now: Instant,
    ) -> anyhow::Result<bool> {
        let begin = *self.begin.get_or_insert(now);
        let quota = self.quota(now.duration_since(begin)).min(most);
        if quota == 0 {
            return Ok(false);
        }
        let stamp_ns = now_ns();
        let mut any = false;
        let pairs = port.pairs.len().max(1);
        let share = quota.div_ceil(u64::try_from(pairs).unwrap_or(1));
        let mut left = quota;
        for (index, pair) in port.pairs.iter_mut().enumerate() {
            let (frames, bytes) = self.burst(index, &mut pair.tx, share.min(left), stamp_ns)?;
            left = left.saturating_sub(frames);
            if frames > 0 {
                pair.tx.flush();
                meter.sent(0, frames, bytes);
                any = true;
            }
        }
        if any {
            meter.active(now);
        }
        Ok(any)
    }

    /// When the next frame is due at the load's rate.
    pub(crate) fn due(&self) -> Option<Instant> {
        let rate = self.load.rate_pps?;
        let nanos = u128::from(self.sent).saturating_mul(1_000_000_000);
        let nanos = nanos.checked_div(u128::from(rate)).unwrap_or(0);
        self.begin?.checked_add(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }

    fn quota(&self, elapsed: Duration) -> u64 {
        let burst = u64::from(self.load.burst);
        let by_count = self.load.count.map_or(burst, |count| count.saturating_sub(self.sent));
        let by_rate = self.load.rate_pps.map_or(burst, |rate| {
            let due = elapsed.as_nanos().saturating_mul(u128::from(rate)) / 1_000_000_000;
            u64::try_from(due).unwrap_or(u64::MAX).saturating_add(1).saturating_sub(self.sent)
        });
        burst.min(by_count).min(by_rate)
    }

    /// A flow stays on one pair: flow f uses pair f modulo the number of pairs.
    fn burst(
        &mut self,
        pair: usize,
        ring: &mut TxRing,
        count: u64,
        sent_ns: u64,
    ) -> anyhow::Result<(u64, u64)> {
        let (mut frames, mut bytes) = (0u64, 0u64);
        let pairs = self.hashes.len().max(1);
        while frames < count {
            let Some(flow) = self.next_flow(pair, pairs) else { break };
            let Some(slot) = ring.take()? else { break };
            let len = self.size;
            self.stamp(ring, (pair, slot), flow, sent_ns);
            ring.send(slot, len)?;
            frames = frames.wrapping_add(1);
            bytes = bytes.wrapping_add(u64::from(len));
            self.size =
                if len >= self.load.sizes.1 { self.load.sizes.0 } else { len.wrapping_add(1) };
        }
        self.sent = self.sent.wrapping_add(frames);
        Ok((frames, bytes))
    }

    #[inline]
    fn next_flow(&mut self, pair: usize, pairs: usize) -> Option<u16> {
        if self.load.flows == 1 {
            return (pair == 0).then_some(0);
        }
        for _ in 0..self.load.flows {
            let flow = self.flow;
            let next = flow.wrapping_add(1);
            self.flow = if next >= self.load.flows { 0 } else { next };
            if usize::from(flow).checked_rem(pairs) == Some(pair) {
                return Some(flow);
            }
        }
        None
    }

    #[inline]
    fn stamp(&mut self, ring: &TxRing, (pair, slot): (usize, u32), flow: u16, sent_ns: u64) {
        let Some(next) = self.next_seq.get_mut(usize::from(flow)) else { return };
        let stamp = Stamp { seq: *next, flow, sent_ns };
        *next = next.wrapping_add(1);
        let (len, salt) = (self.size as usize, salt(slot));
        let pattern_len = len.saturating_sub(self.sender.pattern_at());
        let hash = if self.patterns.is_empty() {
            self.hashes.get(pair).and_then(|h| h.get(slot as usize)).copied().unwrap_or(0)
        } else {
            self.resize(ring, slot, pattern_len)
        };
        let bytes: [u8; STAMP] = stamp.bytes(len, salt, hash);
        let at = |offset: usize| NET_HEADER.saturating_add(u32::try_from(offset).unwrap_or(0));
        if self.load.flows > 1 {
            let _ = ring.pool().write(slot, at(self.sender.port_at()), &port_of(flow));
        }
        if let Some(addresses) = self.stations.get(self.station) {
            let _ = ring.pool().write(slot, at(0), addresses);
            let next = self.station.wrapping_add(1);
            self.station = if next < self.stations.len() { next } else { 0 };
        }
        let _ = ring.pool().write(slot, at(self.sender.stamp_at()), &bytes);
        if let Some(tail) = stamp.tail(pattern_len) {
            let _ = ring.pool().write(slot, at(len.saturating_sub(tail.len())), &tail);
        }
    }

    /// Makes slot `slot` a frame with `pattern_len` bytes of pattern; returns the pattern's hash.
    fn resize(&self, ring: &TxRing, slot: u32, pattern_len: usize) -> u32 {
        let whole = self.patterns.get(slot as usize).map(Vec::as_slice).unwrap_or_default();
        let pattern = whole.get(..pattern_len).unwrap_or(whole);
        let at = |offset: usize| NET_HEADER.saturating_add(u32::try_from(offset).unwrap_or(0));
        let ip = self.sender.ipv4(self.size as usize, salt(slot));
        let udp = self.size as usize;
        let udp = udp.saturating_sub(self.sender.l3()).saturating_sub(20);
        let udp = u16::try_from(udp).unwrap_or(u16::MAX).to_be_bytes();
        let _ = ring.pool().write(slot, at(self.sender.l3()), &ip);
        let _ = ring.pool().write(slot, at(self.sender.port_at().saturating_add(4)), &udp);
        let _ = ring.pool().write(slot, at(self.sender.pattern_at()), pattern);
        hash_of_pattern(pattern)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "a ring has at most 512 slots")]
fn salt(slot: u32) -> u16 {
    slot as u16
}
