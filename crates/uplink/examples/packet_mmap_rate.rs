//! How many frames a second one thread sends to, or receives from, an interface by `packet_mmap`.
//!
//! `packet_mmap_rate send|receive INTERFACE [FRAME_BYTES [SECONDS]]`
#![expect(clippy::unwrap_used, reason = "a measurement")]
#![expect(clippy::cast_possible_truncation, clippy::print_stdout, reason = "a measurement")]

use std::sync::Arc;
use std::time::{Duration, Instant};

use port::{BURST_MAX, Egress, FrameBuf, Ingress, Offload, QueueCounters, QueueTotals};
use uplink::packet_mmap::{PacketMmap, PacketMmapSettings, open};
use virtq::mem::Pool;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let text = |at: usize| arguments.get(at).cloned().unwrap_or_default();
    let number = |at: usize, default| text(at).parse().unwrap_or(default);
    let mut settings = PacketMmapSettings { ifname: text(1), ..PacketMmapSettings::default() };
    settings.block_size = number(4, settings.block_size);
    settings.blocks = number(5, settings.blocks);
    let counters: Arc<QueueCounters> = Arc::default();
    let mut port = match open(&settings, &[Arc::clone(&counters)]) {
        Ok(port) => port,
        Err(error) => {
            println!("{error}");
            return;
        }
    };
    let time = Duration::from_secs(u64::from(number(3, 3)));
    match text(0).as_str() {
        "send" => send(&mut port, number(2, 64), time),
        _ => receive(&mut port, time),
    }
    let seconds = time.as_secs_f64();
    let rate = |frames: u64| frames as f64 / seconds / 1e6;
    let mut totals: QueueTotals = counters.read_ends();
    counters.read_rx(&mut totals);
    println!(
        "sent {:.3} Mpps, received {:.3} Mpps, dropped {:.3} Mpps, by the kernel {:?}",
        rate(totals.tx_frames),
        rate(totals.rx_frames),
        rate(totals.dropped()),
        port.kernel.first_mut().map(|kernel| kernel.kernel_drops()),
    );
}

fn send(port: &mut PacketMmap, bytes: u32, time: Duration) {
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
        }
    }
}

fn receive(port: &mut PacketMmap, time: Duration) {
    let mut frames = FrameBuf::default();
    let start = Instant::now();
    let ingress = &mut port.queues.first_mut().unwrap().0;
    while start.elapsed() < time {
        for _ in 0..64 {
            let _ = ingress.receive(&mut frames).len();
            ingress.release();
        }
    }
}
