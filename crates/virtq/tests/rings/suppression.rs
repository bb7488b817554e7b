//! Kicks and calls are counted: a suppression that does nothing, or too much, fails here.

use std::sync::atomic::{Ordering, fence};

use virtq::driver::{Buffer, DriverConfig};
use virtq::mem::GuestPhysAddr;
use virtq::{Layout, RingFeatures};

use crate::bench::{Bench, LAYOUTS, Rng};

fn bench(layout: Layout, size: u16, event_idx: bool) -> Bench {
    let features = RingFeatures { event_idx, ..RingFeatures::default() };
    Bench::new(DriverConfig::new(layout, size).with_features(features, 0), 1)
}

fn cases() -> impl Iterator<Item = (Layout, bool)> {
    LAYOUTS.into_iter().flat_map(|layout| [(layout, false), (layout, true)])
}

impl Bench {
    /// Adds `count` chains of one buffer and publishes them at once.
    fn offer(&mut self, count: u64) {
        for _ in 0..count {
            let buffer = Buffer { addr: GuestPhysAddr(0), len: 1 };
            self.driver.add_readable(&[buffer], 0).unwrap();
        }
        self.driver.publish();
    }

    /// The device uses up to `count` chains and publishes that at once; how many it used.
    fn serve(&mut self, count: u64) -> u64 {
        let Self { device, buf, .. } = self;
        let chains = device.pop(buf, count as usize);
        assert_eq!(chains.fault(), None);
        let tokens: Vec<_> = (0..chains.len()).map(|index| chains.token(index)).collect();
        device.complete_all(&tokens);
        device.publish();
        tokens.len() as u64
    }

    fn call(&mut self) -> bool {
        // ORDERING: the fence that the interface asks for between publication and look.
        fence(Ordering::SeqCst);
        self.device.needs_call()
    }

    fn take(&mut self) -> u64 {
        std::iter::from_fn(|| self.driver.poll_used().unwrap()).count() as u64
    }

    /// One chain through the ring, without a look at notifications.
    fn turn(&mut self) {
        self.offer(1);
        assert_eq!(self.serve(1), 1);
        assert_eq!(self.take(), 1);
    }
}

#[test]
fn no_kicks_while_the_device_wants_none() {
    for (layout, event_idx) in cases() {
        let mut t = bench(layout, 16, event_idx);
        assert!(!t.device.enable_kicks());
        t.offer(1);
        assert!(t.driver.needs_kick(), "{layout:?} {event_idx}: armed");
        assert_eq!((t.serve(1), t.take()), (1, 1));
        t.device.disable_kicks();
        for round in 0..1000 {
            t.offer(1 + round % 3);
            assert!(!t.driver.needs_kick(), "{layout:?} {event_idx}: round {round}");
            assert_eq!(t.serve(3), t.take());
        }
        assert!(!t.device.enable_kicks());
        t.offer(1);
        assert!(t.driver.needs_kick(), "{layout:?} {event_idx}: armed again");
    }
}

#[test]
fn one_kick_per_wish_with_event_idx_and_one_per_publication_with_flags() {
    for (layout, event_idx) in cases() {
        let mut t = bench(layout, 64, event_idx);
        assert!(!t.device.enable_kicks());
        let mut kicks = 0;
        for _ in 0..60 {
            t.offer(1);
            kicks += u32::from(t.driver.needs_kick());
        }
        assert_eq!(kicks, if event_idx { 1 } else { 60 }, "{layout:?} {event_idx}");
    }
}

#[test]
fn enable_kicks_sees_what_is_there_already() {
    for (layout, event_idx) in cases() {
        let mut t = bench(layout, 4, event_idx);
        t.device.disable_kicks();
        t.offer(2);
        assert!(t.device.enable_kicks());
        assert_eq!(t.serve(1), 1);
        assert!(t.device.enable_kicks());
        assert_eq!(t.serve(2), 1);
        assert!(!t.device.enable_kicks());
    }
}

#[test]
fn no_calls_while_the_driver_wants_none() {
    for (layout, event_idx) in cases() {
        let mut t = bench(layout, 16, event_idx);
        assert!(!t.driver.enable_calls());
        t.offer(1);
        assert_eq!(t.serve(1), 1);
        assert!(t.call(), "{layout:?} {event_idx}: armed");
        assert_eq!(t.take(), 1);
        t.driver.disable_calls();
        for round in 0..1000 {
            t.offer(1 + round % 3);
            let used = t.serve(3);
            assert!(!t.call(), "{layout:?} {event_idx}: round {round}");
            assert_eq!(t.take(), used);
        }
        assert!(!t.driver.enable_calls());
        t.offer(1);
        assert_eq!(t.serve(1), 1);
        assert!(t.call(), "{layout:?} {event_idx}: armed again");
    }
}

#[test]
fn one_call_per_wish_with_event_idx_and_one_per_publication_with_flags() {
    for (layout, event_idx) in cases() {
        let mut t = bench(layout, 64, event_idx);
        t.offer(60);
        assert!(!t.driver.enable_calls());
        let mut calls = 0;
        for _ in 0..60 {
            assert_eq!(t.serve(1), 1);
            calls += u32::from(t.call());
        }
        assert_eq!(calls, if event_idx { 1 } else { 60 }, "{layout:?} {event_idx}");
        assert!(!t.call(), "{layout:?} {event_idx}: nothing new");
    }
}

#[test]
fn enable_calls_sees_what_is_there_already() {
    for (layout, event_idx) in cases() {
        let mut t = bench(layout, 4, event_idx);
        t.driver.disable_calls();
        t.offer(2);
        assert_eq!(t.serve(2), 2);
        assert!(t.driver.enable_calls());
        assert_eq!(t.take(), 2);
        assert!(!t.driver.enable_calls());
    }
}

/// With `EVENT_IDX`, at every place of the ring and through all wraps: a notification exactly when
/// a publication passes the place at which the other side armed.
#[test]
fn events_fire_exactly_when_they_are_passed() {
    for (layout, size) in [(Layout::Split, 8), (Layout::Packed, 8), (Layout::Packed, 5)] {
        let mut t = bench(layout, size, true);
        let mut rng = Rng(u64::from(size));
        assert!(!t.device.enable_kicks() && !t.driver.enable_calls());
        // An event that nobody renews comes again when the numbers of the places do.
        let period = if layout == Layout::Split { 1 << 16 } else { 2 * u64::from(size) };
        let passes =
            |at: u64, old: u64, new: u64| (old..old + new).any(|p| p % period == at % period);
        let (mut offered, mut served, mut taken) = (0u64, 0u64, 0u64);
        let (mut kick_at, mut call_at) = (Some(0u64), Some(0u64));
        let (mut kicks, mut calls) = (0, 0);
        for _ in 0..100_000 {
            let new = rng.below(u64::from(t.driver.free()) + 1);
            t.offer(new);
            let want = kick_at.is_some_and(|at| passes(at, offered, new));
            assert_eq!(
                t.driver.needs_kick(),
                want,
                "{layout:?} {size} at {offered}+{new}, {kick_at:?}"
            );
            offered += new;
            kicks += u32::from(want);

            let limit = rng.below(u64::from(size) + 1);
            let new = t.serve(limit);
            let want = call_at.is_some_and(|at| passes(at, served, new));
            assert_eq!(t.call(), want, "{layout:?} {size} at {served}+{new}");
            served += new;
            calls += u32::from(want);
            if rng.one_in(2) {
                taken += t.take();
            }

            match rng.below(4) {
                0 => {
                    let _ = t.device.enable_kicks();
                    kick_at = Some(served);
                }
                1 => {
                    let _ = t.driver.enable_calls();
                    call_at = Some(taken);
                }
                2 if rng.one_in(4) => {
                    t.device.disable_kicks();
                    // A split device leaves its event where it is: the driver may pass it once.
                    kick_at = kick_at.filter(|_| layout == Layout::Split);
                }
                3 if rng.one_in(4) => {
                    t.driver.disable_calls();
                    call_at = None;
                }
                _ => {}
            }
        }
        assert!(kicks > 1000 && calls > 1000, "{kicks} kicks, {calls} calls");
    }
}

#[test]
fn suppression_survives_the_wrap_of_the_indexes() {
    for (layout, event_idx) in cases() {
        let mut t = bench(layout, 4, event_idx);
        for _ in 0..70_000 {
            assert!(!t.device.enable_kicks());
            t.offer(1);
            assert!(t.driver.needs_kick());
            assert!(!t.driver.enable_calls());
            assert_eq!(t.serve(1), 1);
            assert!(t.call());
            assert_eq!(t.take(), 1);
        }
        t.turn();
    }
}
