//! `causeway demo`: two guests inside this process talk through the real switch.
//!
//! ```text
//!  left: packed rings ──► transmitq ─┐                ┌─► receiveq ──► right: split rings
//!        receiveq ◄──────────────────┴─ the switch ───┴── transmitq ◄──
//! ```

mod guest;

use std::sync::Arc;
use std::time::{Duration, Instant};

use control::table;
use port::{Fabric, PortState, QueueId};
use switch::{PortConfig, Switch, SwitchConfig, Workers};
use virtq::Layout;

use crate::app::view::{port_stats, with_ports};
use crate::{Failure, print};
use guest::Guest;

/// Frames that each guest sends.
const FRAMES: u64 = 200_000;
/// Frames on the way at a time: fewer than a receiveq has buffers, so that none is dropped.
const WINDOW: u64 = 192;
/// The demo fails if nothing moves for so long.
const STALL: Duration = Duration::from_secs(10);
/// How long counters may take to come to rest.
const REST: Duration = Duration::from_secs(2);

pub(crate) fn demo() -> Result<(), Failure> {
    run().map_err(|error| Failure::Runtime(format!("demo: {error}")))
}

fn run() -> Result<(), String> {
    let config = SwitchConfig { workers: Workers::Unpinned(1), ..SwitchConfig::default() };
    let switch = Switch::start(&config).map_err(|e| format!("cannot start the switch: {e}"))?;
    let switch = Arc::new(switch);
    let mut left = join(&switch, "left", Layout::Packed)?;
    let mut right = join(&switch, "right", Layout::Split)?;
    let start = Instant::now();
    talk(&mut left, &mut right)?;
    let seconds = start.elapsed().as_secs_f64();
    print(&format!(
        "left (packed rings) and right (split rings) sent each other {FRAMES} frames of {} to {} \
         bytes in {seconds:.2} s; contents and order were right, none was lost\n\n",
        guest::FRAME_MIN,
        guest::FRAME_MAX,
    ));
    show(&switch)
}

/// A guest and its port.
fn join(switch: &Arc<Switch>, name: &str, layout: Layout) -> Result<Guest, String> {
    let handle = switch.add_port(&PortConfig::new(name)).map_err(|error| error.to_string())?;
    let counters = handle.counters(0).ok_or("a port has no queue pair")?;
    let (guest, transmitq, receiveq) = Guest::new(layout, &counters).map_err(|e| e.to_string())?;
    let at = QueueId { port: handle.id, pair: 0 };
    switch.attach_egress(at, Box::new(receiveq));
    switch.attach_ingress(at, Box::new(transmitq));
    handle.status.set(PortState::Up, "");
    Ok(guest)
}

/// Both send and check what the other sent, until everything has arrived.
fn talk(left: &mut Guest, right: &mut Guest) -> Result<(), String> {
    let mut moved_at = Instant::now();
    while left.received < FRAMES || right.received < FRAMES {
        let before = left.received.wrapping_add(right.received);
        left.send_until(right.received.saturating_add(WINDOW).min(FRAMES), right.address())?;
        right.send_until(left.received.saturating_add(WINDOW).min(FRAMES), left.address())?;
        left.receive(right.address())?;
        right.receive(left.address())?;
        if left.received.wrapping_add(right.received) != before {
            moved_at = Instant::now();
        } else if moved_at.elapsed() > STALL {
            return Err(format!(
                "frames were lost: {} and {} of {FRAMES} arrived",
                left.received, right.received
            ));
        } else {
            std::thread::yield_now();
        }
    }
    Ok(())
}

/// Prints the counters, once they are at rest, and checks that they add up.
fn show(switch: &Switch) -> Result<(), String> {
    let start = Instant::now();
    let stats = loop {
        let stats = switch.stats();
        if stats.held == 0 {
            break stats;
        }
        if start.elapsed() > REST {
            return Err(format!("{} frames are on their way for ever", stats.held));
        }
        std::thread::yield_now();
    };
    let ports = stats.ports.iter().map(|port| port_stats(port, "in-process")).collect();
    let view = with_ports(&stats, ports);
    print(&table::stats(&view));
    let queues = || view.ports.iter().flat_map(|port| &port.queues);
    let dropped: u64 = queues().map(control::protocol::QueueStats::dropped).sum();
    let delivered: u64 = queues().map(|queue| queue.tx_frames).sum();
    if dropped > 0 || delivered != FRAMES.saturating_mul(2) {
        return Err(format!("{delivered} frames were delivered and {dropped} dropped"));
    }
    Ok(())
}
