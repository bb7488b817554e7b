//! Frames into the far side of an uplink, while the guest receives: an open loop, in which what is
//! lost on the way is lost.

use anyhow::{Context, ensure};
use port::{Batch, Egress, FrameBuf, Offload};
use uplink::packet_mmap::{PacketMmap, PacketMmapSettings, open};
use virtq::mem::Pool;

use crate::cli::Cli;
use crate::frame::Sender;
use crate::mac::MacAddr;
use crate::port::GuestPort;
use crate::totals::Meter;

/// Frames that are sent between two looks at the guest's ring.
const BURST: u16 = 64;
/// The station that frames come from.
const FAR: MacAddr = MacAddr([0x02, 0x01, 0x02, 0x03, 0x04, 0x06]);
/// Nobody reads what the far side receives: the smallest ring.
const BLOCKS: u32 = 2;

/// Sends the same burst again and again.
#[derive(Debug)]
pub(crate) struct Injector {
    far: PacketMmap,
    pool: Pool,
    frames: FrameBuf,
    picked: Vec<u16>,
    size: u32,
    sent: u64,
}

impl Injector {
    /// Opens the interface that `--inject` names; frames are for `port`.
    pub(crate) fn open(cli: &Cli, port: &GuestPort) -> anyhow::Result<Option<Self>> {
        let Some(ifname) = cli.inject.clone() else { return Ok(None) };
        let settings = PacketMmapSettings { ifname, blocks: BLOCKS, ..Default::default() };
        let far = open(&settings, &[std::sync::Arc::default()]).context("--inject")?;
        let (size, _) = cli.sizes();
        let slot = size.next_multiple_of(64);
        let mut pool = Pool::new(BURST.into(), slot).context("--inject")?;
        let mut frames = FrameBuf::default();
        let sender = Sender { src: FAR, dst: port.mac, vlan: cli.vlan, run: 0 };
        let mut bytes = Vec::new();
        for number in 0..u32::from(BURST) {
            sender.build(&mut bytes, size as usize, 0);
            let place = pool.slot_mut(number).and_then(|slot| slot.get_mut(..bytes.len()));
            if let Some(place) = place {
                place.copy_from_slice(&bytes);
            }
        }
        for number in 0..u32::from(BURST) {
            let span = Pool::span(number, 0, size);
            let reader = pool.store().reader(span);
            let filled =
                frames.slot().is_some_and(|frame| frame.fill(reader, span, Offload::default()));
            ensure!(filled, "--inject: a frame of {size} bytes is none");
            frames.keep();
        }
        Ok(Some(Self { far, pool, frames, picked: (0..BURST).collect(), size, sent: 0 }))
    }

    /// Sends a burst.
    pub(crate) fn burst(&mut self) -> anyhow::Result<()> {
        let Some((_, egress)) = self.far.queues.first_mut() else { return Ok(()) };
        let batch: Batch<'_> = self.frames.batch(self.pool.store(), None);
        egress.send(&batch, &self.picked).map_err(|fault| anyhow::anyhow!("--inject: {fault}"))?;
        let _ = egress.notify();
        Ok(())
    }

    /// Counts what the interface took.
    pub(crate) fn count(&mut self, meter: &mut Meter) {
        let Some((_, egress)) = self.far.queues.first() else { return };
        let sent = egress.counters().read_ends().tx_frames;
        let new = sent.wrapping_sub(self.sent);
        self.sent = sent;
        meter.sent(0, new, new.wrapping_mul(self.size.into()));
    }
}

/// Counts what arrives, and looks at nothing of it.
pub(crate) fn take(
    port: &mut GuestPort,
    meter: &mut Meter,
    now: std::time::Instant,
) -> anyhow::Result<bool> {
    let mut any = false;
    for pair in &mut port.pairs {
        let count = pair.rx.receive(|frame| {
            meter.received(0, u64::from(frame.len));
            Ok(())
        })?;
        any |= count > 0;
    }
    if any {
        meter.active(now);
    }
    Ok(any)
}
