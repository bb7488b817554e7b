//! Driver and device on two threads that sleep whenever they may: a lost notification hangs, and
//! the time limit tells.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::Duration;

use virtq::driver::{Buffer, BufferPool, DriverConfig, DriverQueue};
use virtq::{ChainBuf, RingFeatures, Virtq};

use crate::bench::{Bench, LAYOUTS};

const FRAMES: u64 = 30_000;
const LIMIT: Duration = Duration::from_secs(20);

/// An eventfd as a channel: many signals before the wait are one.
fn signal(to: &SyncSender<()>) {
    let _ = to.try_send(());
}

/// Waits for a signal; `what` never coming is the failure that this test looks for.
fn wait(from: &Receiver<()>, what: &str) {
    assert!(from.recv_timeout(LIMIT).is_ok(), "lost: {what}");
}

fn drive(
    mut driver: DriverQueue,
    mut pool: BufferPool,
    kick: &SyncSender<()>,
    call: &Receiver<()>,
) {
    let (mut sent, mut back) = (0u64, 0u64);
    driver.disable_calls();
    while back < FRAMES {
        while sent < FRAMES && driver.free() > 0 {
            let index = pool.take().unwrap();
            assert_eq!(pool.write(index, 0, &sent.to_le_bytes()), 8);
            let buffer: Buffer = pool.buffer(index, 8);
            driver.add_readable(&[buffer], u64::from(index)).unwrap();
            sent += 1;
            if sent.is_multiple_of(3) {
                driver.publish();
                if driver.needs_kick() {
                    signal(kick);
                }
            }
        }
        driver.publish();
        if driver.needs_kick() {
            signal(kick);
        }
        let mut any = false;
        while let Some(used) = driver.poll_used().unwrap() {
            pool.give(used.cookie as u32);
            back += 1;
            any = true;
        }
        if !any && back < FRAMES && !driver.enable_calls() {
            wait(call, "a call");
            driver.disable_calls();
        }
    }
}

fn serve(mut device: Virtq, kick: &Receiver<()>, call: &SyncSender<()>) {
    let mut buf = ChainBuf::with_capacity(8);
    let mut tokens = Vec::new();
    let mut seen = 0u64;
    device.disable_kicks();
    while seen < FRAMES {
        let chains = device.pop(&mut buf, 5);
        assert_eq!(chains.fault(), None);
        tokens.clear();
        for index in 0..chains.len() {
            let mut bytes = [0; 8];
            assert_eq!(chains.readable(index).reader().read(&mut bytes), 8);
            assert_eq!(u64::from_le_bytes(bytes), seen, "frames come in order, and whole");
            seen += 1;
            tokens.push(chains.token(index));
        }
        if tokens.is_empty() {
            if !device.enable_kicks() {
                wait(kick, "a kick");
                device.disable_kicks();
            }
            continue;
        }
        device.complete_all(&tokens);
        device.publish();
        // ORDERING: the fence that the interface asks for between publication and look.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        if device.needs_call() {
            signal(call);
        }
    }
}

#[test]
fn no_notification_is_lost_between_two_sleepy_threads() {
    for layout in LAYOUTS {
        for (event_idx, in_order) in [(false, false), (true, false), (false, true), (true, true)] {
            let features = RingFeatures { event_idx, in_order, indirect: false };
            let config = DriverConfig::new(layout, 8).with_features(features, 0);
            let Bench { driver, device, pool, .. } = Bench::new(config, 16);
            let (kick_tx, kick_rx) = sync_channel(1);
            let (call_tx, call_rx) = sync_channel(1);
            thread::scope(|scope| {
                let _ = scope.spawn(move || serve(device, &kick_rx, &call_tx));
                let _ = scope.spawn(move || drive(driver, pool, &kick_tx, &call_rx));
            });
        }
    }
}
