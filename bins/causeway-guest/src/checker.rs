//! Judges the frames that arrive.

use std::time::Instant;

use hdrhistogram::Histogram;

use crate::clock::now_ns;
use crate::frame::{HEAD_MAX, recognise};
use crate::port::GuestPort;
use crate::rings::Received;
use crate::totals::Meter;
use crate::tracker::Tracker;

/// The largest frame that is looked at as a whole.
const WHOLE: usize = 1 << 16;

/// What is known about the frames that arrived.
#[derive(Debug)]
pub(crate) struct Checker {
    /// Look at every byte, not only at the sequence number.
    verify: bool,
    pub(crate) tracker: Tracker,
    /// From sender to receiver, with `verify`.
    pub(crate) delays: Histogram<u64>,
    whole: Box<[u8]>,
    /// Test frames so far.
    pub(crate) frames: u64,
}

impl Checker {
    pub(crate) fn new(verify: bool) -> anyhow::Result<Self> {
        Ok(Self {
            verify,
            tracker: Tracker::default(),
            delays: Histogram::new_with_max(10_000_000_000, 3)?,
            whole: vec![0; WHOLE].into(),
            frames: 0,
        })
    }

    /// Takes a burst from each pair of `port`, which is number `index`; returns whether any came.
    pub(crate) fn turn(
        &mut self,
        index: usize,
        port: &mut GuestPort,
        meter: &mut Meter,
        now: Instant,
    ) -> anyhow::Result<bool> {
        let mut any = false;
        for pair in &mut port.pairs {
            let count = pair.rx.receive(|frame| {
                self.judge(index, &frame, meter);
                Ok(())
            })?;
            any |= count > 0;
        }
        if any {
            meter.active(now);
        }
        Ok(any)
    }

    #[inline]
    fn judge(&mut self, index: usize, frame: &Received<'_>, meter: &mut Meter) {
        let len = frame.len as usize;
        let want = if self.verify { len.min(WHOLE) } else { len.min(HEAD_MAX) };
        let Some(bytes) = self.whole.get_mut(..want) else { return };
        let got = frame.copy_to(bytes);
        let bytes = bytes.get(..got).unwrap_or_default();
        let Some(seen) = recognise(bytes) else {
            meter.foreign = meter.foreign.wrapping_add(1);
            return;
        };
        meter.received(index, u64::from(frame.len));
        self.frames = self.frames.wrapping_add(1);
        if self.verify {
            if !seen.is_intact(bytes) {
                meter.corrupt = meter.corrupt.wrapping_add(1);
                return;
            }
            self.delays.saturating_record(now_ns().saturating_sub(seen.stamp.sent_ns));
        }
        self.tracker.arrived(seen.origin, seen.stamp.flow, seen.stamp.seq);
    }
}
