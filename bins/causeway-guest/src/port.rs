//! One port of the guest: a session, memory and queue pairs.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use virtio_bindings::virtio_config::{VIRTIO_F_IN_ORDER, VIRTIO_F_RING_PACKED, VIRTIO_F_VERSION_1};
use virtio_bindings::virtio_net::{VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtq::{Layout, RingFeatures};

use crate::cli::{Cli, Mode, Switch};
use crate::frame::Sender;
use crate::mac::MacAddr;
use crate::memory::Memory;
use crate::offloads::Offloads;
use crate::rings::{ChainShape, NET_HEADER, RingPlan, RxRing, TxRing};
use crate::session::{Inflight, RingSetup, Session};
use crate::stop::Stop;

/// The most bytes of buffers of one ring.
const RING_BUFFERS_MAX: u64 = 256 << 20;
/// The most transmit buffers of one ring: more only spoil the cache.
const TX_SLOTS_MAX: u16 = 512;
/// Bytes of a mergeable receive buffer, as DPDK and Linux use them.
const MERGEABLE_BYTES: u32 = 2048;
/// The same where frames may be large: a ring of 256 holds what a sender's burst may be.
const MERGEABLE_LARGE_BYTES: u32 = 16 * 1024;
/// Bytes of a buffer that holds any frame of a tap, its header, and more: in whole cache lines.
const LARGE_BYTES: u32 = 1026 * 64;
const _: () = assert!(LARGE_BYTES > 65_535 + 14 + 8 + NET_HEADER);

/// How long a back end may take to read a frame that announces an address, on a busy machine and
/// where it is restarted meanwhile.
const PATIENCE: Duration = Duration::from_secs(20);
const TICK: Duration = Duration::from_micros(50);

/// A queue pair.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) rx: RxRing,
    pub(crate) tx: TxRing,
}

/// A connected port whose rings run.
#[derive(Debug)]
pub(crate) struct GuestPort {
    pub(crate) mac: MacAddr,
    pub(crate) pairs: Vec<Pair>,
    pub(crate) features: Agreed,
    session: Session,
    /// Keeps the file that the back end maps.
    memory: Memory,
    /// How to come to another session when the back end goes away, if that is wanted.
    again: Option<Again>,
}

/// What a new session is made from.
#[derive(Debug)]
struct Again {
    path: PathBuf,
    mode: Mode,
    /// What was negotiated, and must be again.
    bits: u64,
    /// What the back end noted.
    inflight: Option<Inflight>,
    stop: Stop,
}

/// What was negotiated.
#[derive(Debug, Clone, Copy, serde::Serialize)]
pub(crate) struct Agreed {
    pub(crate) packed: bool,
    pub(crate) mrg_rxbuf: bool,
    pub(crate) event_idx: bool,
    pub(crate) indirect: bool,
    pub(crate) in_order: bool,
    pub(crate) offloads: Offloads,
}

impl GuestPort {
    /// Connects to the back end at `path` and starts all rings; none if stopped meanwhile. `uso`
    /// says whether who is behind the port knows USO.
    pub(crate) fn open(
        cli: &Cli,
        path: &Path,
        mac: MacAddr,
        uso: bool,
        stop: &Stop,
    ) -> anyhow::Result<Option<Self>> {
        let Some(mut session) = Session::open(path, cli.mode, stop)? else { return Ok(None) };
        session.want_inflight(cli.inflight);
        let bits = session.negotiate(cli.queues, |offered| choose(cli, uso, offered))?;
        let features = Agreed::from_bits(bits);
        let (rx_plan, tx_plan) = plans(cli, features);
        let pairs = u64::from(cli.queues);
        let ring_bytes = rx_plan.ring_bytes()?.saturating_add(tx_plan.ring_bytes()?);
        let pool_bytes = rx_plan.pool_bytes().saturating_add(tx_plan.pool_bytes());
        let mut memory = Memory::new(
            ring_bytes.saturating_mul(pairs),
            pool_bytes.saturating_mul(pairs),
            cli.hugepages,
        )?;
        session.share_memory(&memory)?;
        let inflight = cli
            .inflight
            .then(|| session.make_inflight(cli.queues.saturating_mul(2), cli.queue_size));
        let inflight = inflight.transpose()?;
        if let Some(inflight) = &inflight {
            session.give_inflight(inflight)?;
        }
        let mut rings = Vec::new();
        for pair in 0..usize::from(cli.queues) {
            let rx = RxRing::new(&mut memory, &rx_plan, features.mrg_rxbuf)?;
            let tx = TxRing::new(&mut memory, &tx_plan)?;
            let rings_of_pair = Pair { rx, tx };
            start(&mut session, pair, &rings_of_pair, features.packed)
                .with_context(|| format!("queue pair {pair}"))?;
            rings.push(rings_of_pair);
        }
        session.enable_all(rings.len().saturating_mul(2))?;
        let again = cli.reconnect.then(|| Again {
            path: path.to_owned(),
            mode: cli.mode,
            bits,
            inflight,
            stop: stop.clone(),
        });
        Ok(Some(Self { mac, pairs: rings, features, session, memory, again }))
    }

    /// The frames that this port sends.
    pub(crate) fn sender(&self, dst: MacAddr, vlan: Option<u16>, run: u16) -> Sender {
        Sender { src: self.mac, dst, vlan, run }
    }

    /// Tells a switch that `mac` is here, as a guest does when its link comes up (RARP).
    pub(crate) fn announce(&mut self, mac: MacAddr, vlan: Option<u16>) -> anyhow::Result<()> {
        let mut frame = Vec::with_capacity(64);
        frame.extend_from_slice(&MacAddr::BROADCAST.0);
        frame.extend_from_slice(&mac.0);
        if let Some(vlan) = vlan {
            frame.extend_from_slice(&[0x81, 0]);
            frame.extend_from_slice(&vlan.to_be_bytes());
        }
        frame.extend_from_slice(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        for _ in 0..2 {
            frame.extend_from_slice(&mac.0);
            frame.extend_from_slice(&[0; 4]);
        }
        frame.resize(64, 0);
        let begin = Instant::now();
        let slot = loop {
            let Some(pair) = self.pairs.first_mut() else { return Ok(()) };
            if let Some(slot) = pair.tx.take()? {
                break slot;
            }
            if begin.elapsed() > PATIENCE {
                bail!("the back end reads no frames");
            }
            self.check()?;
            std::thread::sleep(TICK);
        };
        if let Some(pair) = self.pairs.first_mut() {
            let _ = pair.tx.pool().write(slot, 0, &[0; NET_HEADER as usize]);
            let _ = pair.tx.pool().write(slot, NET_HEADER, &frame);
            pair.tx.send(slot, 64)?;
            pair.tx.flush();
        }
        Ok(())
    }

    /// Waits until the back end has read everything that was sent: until then the frames are its
    /// own, and whoever writes into their buffers changes what is on its way.
    pub(crate) fn settle(&mut self) -> anyhow::Result<()> {
        let begin = Instant::now();
        loop {
            let mut unread = 0u16;
            for pair in &mut self.pairs {
                let _ = pair.tx.reclaim()?;
                unread = unread.saturating_add(pair.tx.outstanding());
            }
            if unread == 0 {
                return Ok(());
            }
            if begin.elapsed() > PATIENCE {
                bail!("the back end leaves {unread} of the first frames unread");
            }
            self.check()?;
            std::thread::sleep(TICK);
        }
    }

    /// If the back end went away, goes on with the next one, or fails.
    pub(crate) fn check(&mut self) -> anyhow::Result<()> {
        if self.session.is_alive() {
            return Ok(());
        }
        let Some(again) = &self.again else { bail!("the back end closed the connection") };
        // One that dies while it is told what there is gets a successor, too.
        while !again.stop.asked() {
            let Some(session) = Session::open_within(&again.path, again.mode, &again.stop, None)?
            else {
                break;
            };
            match resume(session, again, (&self.memory, &self.pairs), self.features.packed) {
                Ok(session) => {
                    self.session = session;
                    return Ok(());
                }
                Err(error) if error.is::<OtherFeatures>() => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        Ok(())
    }

    /// Becomes readable when the back end goes away.
    pub(crate) fn session_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.session.fd()
    }

    /// Stops all rings: when this returns, the back end touches none of them.
    pub(crate) fn stop(&mut self) -> anyhow::Result<()> {
        for ring in 0..self.pairs.len().saturating_mul(2) {
            let _ = self.session.stop_ring(ring).with_context(|| format!("ring {ring}"))?;
        }
        Ok(())
    }
}

/// Tells a new back end what the last one knew: the rings go on as they are.
fn resume(
    mut session: Session,
    again: &Again,
    (memory, pairs): (&Memory, &[Pair]),
    packed: bool,
) -> anyhow::Result<Session> {
    session.want_inflight(again.inflight.is_some());
    let pair_count = u16::try_from(pairs.len()).unwrap_or(u16::MAX);
    let _ = session.negotiate(pair_count, |offered| {
        let missing = again.bits & !offered;
        if missing == 0 { Ok(again.bits) } else { Err(OtherFeatures(missing).into()) }
    })?;
    session.share_memory(memory)?;
    if let Some(inflight) = &again.inflight {
        session.give_inflight(inflight)?;
    }
    for (index, pair) in pairs.iter().enumerate() {
        start(&mut session, index, pair, packed)?;
    }
    session.enable_all(pairs.len().saturating_mul(2))?;
    Ok(session)
}

/// A back end came that cannot go on with what its predecessor agreed on.
#[derive(Debug)]
struct OtherFeatures(u64);

impl std::fmt::Display for OtherFeatures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "the new back end lacks features that the last one had: {:#x}", self.0)
    }
}

impl std::error::Error for OtherFeatures {}

/// Starts a pair's rings. The base is what QEMU would say: of a split ring where the device is, of
/// a packed one, which does not show that, where it was at first.
fn start(session: &mut Session, pair: usize, rings: &Pair, packed: bool) -> anyhow::Result<()> {
    let Pair { rx, tx } = rings;
    let rings = [(rx.queue(), rx.kick(), rx.call()), (tx.queue(), tx.kick(), tx.call())];
    for (way, (queue, kick, call)) in rings.into_iter().enumerate() {
        let base = if packed { 0x8000 } else { queue.used_index().unwrap_or(0) };
        let setup = RingSetup { size: queue.size(), base, areas: queue.areas(), kick, call };
        session.start_ring(pair.saturating_mul(2).saturating_add(way), &setup)?;
    }
    Ok(())
}

/// Picks features from the offer.
fn choose(cli: &Cli, uso: bool, offered: u64) -> anyhow::Result<u64> {
    let wishes = [
        (VIRTIO_F_VERSION_1, "VERSION_1", Some(Switch::On)),
        (VIRTIO_F_RING_PACKED, "RING_PACKED (--packed)", only(cli.packed)),
        (VIRTIO_F_IN_ORDER, "IN_ORDER (--in-order)", only(cli.in_order)),
        (VIRTIO_RING_F_INDIRECT_DESC, "INDIRECT_DESC (--indirect)", only(cli.indirect)),
        (VIRTIO_RING_F_EVENT_IDX, "EVENT_IDX (--event-idx on)", cli.event_idx),
        (VIRTIO_NET_F_MRG_RXBUF, "MRG_RXBUF (--mrg-rxbuf on)", cli.mrg_rxbuf),
        (VIRTIO_NET_F_MQ, "MQ (--queues)", if cli.queues > 1 { None } else { Some(Switch::Off) }),
    ];
    let mut features = 0;
    for (bit, name, wish) in wishes {
        let bit = 1u64.checked_shl(bit).unwrap_or(0);
        match wish {
            Some(Switch::Off) => {}
            Some(Switch::On) if offered & bit == 0 => bail!("the back end does not offer {name}"),
            Some(Switch::On) | None => features |= offered & bit,
        }
    }
    // Test frames are made whole, and are to arrive so.
    let offloads = cli.tap.as_ref().map(|_| cli.offloads().choose(offered, uso)).transpose()?;
    Ok(features | offloads.unwrap_or_default().bits())
}

/// A feature that is used if and only if it was asked for.
fn only(asked: bool) -> Option<Switch> {
    Some(if asked { Switch::On } else { Switch::Off })
}

impl Agreed {
    fn from_bits(bits: u64) -> Self {
        let has = |bit: u32| bits & 1u64.checked_shl(bit).unwrap_or(0) != 0;
        Self {
            packed: has(VIRTIO_F_RING_PACKED),
            mrg_rxbuf: has(VIRTIO_NET_F_MRG_RXBUF),
            event_idx: has(VIRTIO_RING_F_EVENT_IDX),
            indirect: has(VIRTIO_RING_F_INDIRECT_DESC),
            in_order: has(VIRTIO_F_IN_ORDER),
            offloads: Offloads::from_bits(bits),
        }
    }
}

/// The receiveq and the transmitq.
fn plans(cli: &Cli, agreed: Agreed) -> (RingPlan, RingPlan) {
    let frame_bytes = cli.largest_frame().saturating_add(NET_HEADER);
    let default = match (agreed.mrg_rxbuf, agreed.offloads.receives_large()) {
        (true, false) => MERGEABLE_BYTES,
        (true, true) => MERGEABLE_LARGE_BYTES,
        (false, false) => frame_bytes.max(MERGEABLE_BYTES),
        (false, true) => LARGE_BYTES,
    };
    let rx_bytes = cli.buffer_size.unwrap_or(default);
    let common = RingPlan {
        layout: if agreed.packed { Layout::Packed } else { Layout::Split },
        size: cli.queue_size,
        features: RingFeatures {
            event_idx: agreed.event_idx,
            indirect: agreed.indirect,
            in_order: agreed.in_order,
        },
        shape: ChainShape { descriptors: cli.descriptors, indirect: cli.indirect },
        buffers: 0,
        buffer_bytes: 0,
    };
    let rx =
        RingPlan { buffers: fitting(cli.queue_size, rx_bytes), buffer_bytes: rx_bytes, ..common };
    let tx_bytes = if cli.tap.is_some() { LARGE_BYTES } else { frame_bytes.next_multiple_of(64) };
    let slots = fitting(cli.queue_size.min(TX_SLOTS_MAX), tx_bytes);
    (rx, RingPlan { buffers: slots, buffer_bytes: tx_bytes, ..common })
}

/// Buffers of `bytes` that are worth having for a ring of `size`.
fn fitting(size: u16, bytes: u32) -> u32 {
    let most = RING_BUFFERS_MAX.checked_div(u64::from(bytes)).unwrap_or(1).max(1);
    u32::from(size).min(u32::try_from(most).unwrap_or(u32::MAX))
}
