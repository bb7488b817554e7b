//! How many frames a second an interface takes from, or gives to, one thread through `AF_XDP`, and
//! how much of the time is the kernel's.
//!
//! `af_xdp_rate send|receive INTERFACE [FRAME_BYTES [SECONDS [auto|copy|generic]]]`
#![expect(clippy::unwrap_used, clippy::arithmetic_side_effects, reason = "a measurement")]
#![expect(clippy::cast_possible_truncation, reason = "a measurement")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{BURST_MAX, Egress, FrameBuf, Ingress, Offload, QueueCounters, QueueTotals};
use uplink::af_xdp::{AfXdp, AfXdpSettings, Mode, Steer, open};
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
        patience: Duration::from_secs(1),
    };
    let counters: Arc<QueueCounters> = Arc::default();
    let mut port = match open(&settings, &[Arc::clone(&counters)]) {
        Ok(port) => port,
        Err(error) => {
            println!("{error}");
            return;
        }
    };
    let time = Duration::from_secs(u64::from(number(3, 3)));
    let before = cpu_ticks();
    match text(0).as_str() {
        "send" => send(&mut port, number(2, 64), time),
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

fn send(port: &mut AfXdp, bytes: u32, time: Duration) {
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
    let egress = &mut port.queues.first_mut().unwrap().1;
    while start.elapsed() < time {
        for _ in 0..16 {
            let batch = frames.batch(pool.store(), None);
            egress.send(&batch, &picked).unwrap();
            let _ = egress.notify();
        }
    }
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
