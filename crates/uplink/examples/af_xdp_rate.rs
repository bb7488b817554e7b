//! How many frames a second an interface takes from, or gives to, one thread through `AF_XDP`, and
//! how much of the time is the kernel's.
//!
//! `af_xdp_rate send|receive INTERFACE [FRAME_BYTES [SECONDS [auto|copy|generic]]]`
//!
//! `forward` says what a frame costs on its way from an interface to `INTERFACE2`, which shares its
//! UMEM, while `PEER`, the other end of the first one's veth pair, sends bursts:
//! `af_xdp_rate forward INTERFACE FRAME_BYTES SECONDS auto|copy|generic INTERFACE2 PEER`
#![expect(clippy::unwrap_used, clippy::arithmetic_side_effects, reason = "a measurement")]
#![expect(clippy::cast_possible_truncation, reason = "a measurement")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{BURST_MAX, Batch, Egress, FrameBuf, Ingress, Offload, QueueCounters, QueueTotals};
use uplink::af_xdp::{AfXdp, AfXdpSettings, Mode, Steer, Umems, open};
use virtq::mem::Pool;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text = |at: usize| arguments.get(at).cloned().unwrap_or_default();
    let number = |at: usize, default| text(at).parse().unwrap_or(default);
    let settings = AfXdpSettings {
        ifname: text(1),
        queues: 1,
        mode: match text(4).as_str() {
            "copy" => Mode::Copy,
            "generic" => Mode::Generic,
            _ => Mode::Auto,
        },
        replace: false,
        steer: Steer::All,
        busy_poll: false,
        netns: None,
        umem: Some("rate".to_owned()),
        patience: Duration::from_secs(1),
    };
    let counters: Arc<QueueCounters> = Arc::default();
    let umems = Umems::default();
    umems.plan([("rate".to_owned(), 2)].into());
    let mut port = match open(&settings, &umems, &[Arc::clone(&counters)]) {
        Ok(port) => port,
        Err(error) => {
            println!("{error}");
            return;
        }
    };
    let another = |at: usize, umem: Option<String>| {
        let settings = AfXdpSettings { ifname: text(at), umem, ..settings.clone() };
        open(&settings, &umems, &[Arc::default()]).unwrap()
    };
    let time = Duration::from_secs(u64::from(number(3, 3)));
    let before = cpu_ticks();
    match text(0).as_str() {
        "send" => send(&mut port, number(2, 64), time),
        "forward" => {
            let (mut to, mut peer) = (another(5, settings.umem.clone()), another(6, None));
            forward((&mut port, &mut to), (&mut peer, number(2, 64)), time);
        }
        _ => receive(&mut port, time),
    }
    let after = cpu_ticks();
    let rate = |frames: u64| frames as f64 / time.as_secs_f64() / 1e6;
    let mut totals: QueueTotals = counters.read_ends();
    counters.read_rx(&mut totals);
    println!(
        "{} mode: sent {:.3} Mpps, received {:.3} Mpps, dropped {:.3} Mpps, {:?}; ticks of CPU in \
         our code {}, in system calls {}",
        port.control.mode().name(),
        rate(totals.tx_frames),
        rate(totals.rx_frames),
        rate(totals.dropped()),
        port.control.kernel_drops().unwrap_or_default(),
        after.0 - before.0,
        after.1 - before.1,
    );
}

/// Ticks of this process: in its own code, and in the kernel.
fn cpu_ticks() -> (u64, u64) {
    let text = std::fs::read_to_string("/proc/self/stat").unwrap();
    let mut fields = text.rsplit(')').next().unwrap().split_whitespace().skip(11);
    let mut next = || fields.next().unwrap().parse().unwrap();
    (next(), next())
}

/// Does something with a burst of frames until the time is over.
fn with_burst(bytes: u32, time: Duration, mut work: impl FnMut(&Batch<'_>, &[u16])) {
    let mut pool = Pool::new(BURST_MAX as u32, bytes.next_multiple_of(64)).unwrap();
    let mut frames = FrameBuf::default();
    for slot in 0..BURST_MAX as u32 {
        let start = [2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 0x88, 0xb5];
        pool.slot_mut(slot).unwrap().first_chunk_mut().map(|place| *place = start).unwrap();
        let span = Pool::span(slot, 0, bytes);
        let frame = frames.slot().unwrap();
        let _ = frame.fill(pool.store().reader(span), span, Offload::default());
        frames.keep();
    }
    let picked: Vec<u16> = (0..BURST_MAX as u16).collect();
    let start = Instant::now();
    while start.elapsed() < time {
        for _ in 0..16 {
            work(&frames.batch(pool.store(), None), &picked);
        }
    }
}

fn send(port: &mut AfXdp, bytes: u32, time: Duration) {
    let egress = &mut port.queues.first_mut().unwrap().1;
    with_burst(bytes, time, |batch, picked| {
        egress.send(batch, picked).unwrap();
        let _ = egress.notify();
    });
}

/// Medians of bursts, so that what else runs on this CPU hardly counts.
fn forward((from, to): (&mut AfXdp, &mut AfXdp), (peer, bytes): (&mut AfXdp, u32), time: Duration) {
    let sender = &mut peer.queues.first_mut().unwrap().1;
    let ingress = &mut from.queues.first_mut().unwrap().0;
    let egress = &mut to.queues.first_mut().unwrap().1;
    let mut frames = FrameBuf::default();
    let mut parts: [Vec<u32>; 3] = Default::default();
    with_burst(bytes, time, |batch, picked| {
        sender.send(batch, picked).unwrap();
        let _ = sender.notify();
        let begin = Instant::now();
        let batch = ingress.receive(&mut frames);
        let count = batch.len();
        let received = Instant::now();
        egress.send(&batch, picked.get(..count).unwrap_or_default()).unwrap();
        let sent = Instant::now();
        ingress.release();
        let _ = egress.notify();
        let end = Instant::now();
        if count == picked.len() {
            let times = [received - begin, sent - received, end - sent];
            for (part, time) in parts.iter_mut().zip(times) {
                part.push(time.as_nanos() as u32 / count as u32);
            }
        }
        while !ingress.receive(&mut frames).is_empty() {
            ingress.release();
        }
    });
    let [receive, send, call] = parts.map(|mut part| {
        part.sort_unstable();
        part.get(part.len() / 2).copied().unwrap_or(0)
    });
    println!("ns a frame: received in {receive}, put in {send}, given to the kernel in {call}");
}

fn receive(port: &mut AfXdp, time: Duration) {
    let mut frames = FrameBuf::default();
    let start = Instant::now();
    let ingress = &mut port.queues.first_mut().unwrap().0;
    while start.elapsed() < time {
        for _ in 0..64 {
            let _ = ingress.receive(&mut frames).len();
            ingress.release();
            let _ = ingress.notify();
        }
    }
}
