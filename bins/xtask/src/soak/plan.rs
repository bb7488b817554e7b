//! Which actions come, in which order: a matter of the seed alone.

use std::time::Duration;

/// Ports that guests come to and go from.
pub(super) const EXTRAS: u8 = 4;
/// Uplinks: tap, `AF_XDP`, `packet_mmap`.
pub(super) const UPLINKS: u8 = 3;

/// How a guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Manner {
    pub(super) packed: bool,
    pub(super) queues: u8,
    /// It sends so many frames a second; it only receives if that is zero.
    pub(super) rate_pps: u32,
    pub(super) size: u32,
}

/// Something that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    /// A guest comes to a port; one that is there goes first, as when a guest boots anew with
    /// another number of queues.
    Attach(u8, Manner),
    /// A guest leaves.
    Detach(u8),
    /// A guest's front end dies.
    Kill(u8),
    /// A guest stands still for a moment.
    Freeze(u8),
    /// Somebody says nonsense to a port: a seed of it.
    Lie(u8, u64),
    /// A front end adds and removes memory.
    Hotplug(u8, u64),
    /// An uplink's other end goes down and up.
    Flap(u8),
    /// An uplink's interface is deleted, and comes again.
    Replace(u8),
    /// The configuration file is read again, with one port more or without it.
    Reload(bool),
    /// A port is added and removed by hand.
    PortCycle,
    /// A broken or quarantined port is taken back into service.
    Reset(u8),
    /// Another process takes over.
    TakeOver,
    /// The switch is killed, and starts again.
    Crash,
    /// DPDK's guest lets bursts go round; so many.
    Circulate(u8),
    /// Somebody captures what passes a good guest's port.
    Capture,
    /// The captures end.
    EndCaptures,
    /// Learned addresses are forgotten.
    Flush,
}

/// Actions by seed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan(u64);

impl Plan {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next action, and the pause after it.
    pub(super) fn next(&mut self) -> (Action, Duration) {
        let port = self.below_u8(EXTRAS);
        let uplink = self.below_u8(UPLINKS);
        let action = match self.below(100) {
            0..24 => Action::Attach(port, self.manner()),
            24..32 => Action::Detach(port),
            32..42 => Action::Kill(port),
            42..46 => Action::Freeze(port),
            46..56 => Action::Lie(port, self.number()),
            56..62 => Action::Hotplug(port, self.number()),
            62..68 => Action::Flap(uplink),
            68..72 => Action::Replace(uplink),
            72..76 => Action::Reload(self.below(2) == 0),
            76..79 => Action::PortCycle,
            79..82 => Action::Reset(port),
            82..88 => Action::TakeOver,
            88..92 => Action::Crash,
            92..95 => Action::Circulate(self.below_u8(4).saturating_add(1)),
            95..97 => Action::Capture,
            97..98 => Action::EndCaptures,
            _ => Action::Flush,
        };
        (action, Duration::from_millis(20u64.saturating_add(self.below(180))))
    }

    fn manner(&mut self) -> Manner {
        Manner {
            packed: self.below(2) == 0,
            queues: self.below_u8(3).saturating_add(1),
            rate_pps: [0, 500, 5000].get(self.below_usize(3)).copied().unwrap_or(0),
            size: [60, 600, 1500].get(self.below_usize(3)).copied().unwrap_or(60),
        }
    }

    /// `SplitMix64`.
    pub(super) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ mixed >> 31
    }

    pub(super) fn below(&mut self, bound: u64) -> u64 {
        self.number().checked_rem(bound).unwrap_or(0)
    }

    fn below_u8(&mut self, bound: u8) -> u8 {
        u8::try_from(self.below(bound.into())).unwrap_or(0)
    }

    fn below_usize(&mut self, bound: u64) -> usize {
        usize::try_from(self.below(bound)).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::{Action, Plan};

    #[test]
    fn a_seed_is_a_sequence_of_all_kinds_of_actions() {
        let actions = |seed| {
            let mut plan = Plan::new(seed);
            (0..500).map(|_| plan.next()).collect::<Vec<_>>()
        };
        let one = actions(1);
        assert_eq!(one, actions(1));
        assert_ne!(one, actions(2));
        let kinds: std::collections::HashSet<_> =
            one.iter().map(|(action, _)| std::mem::discriminant(action)).collect();
        assert_eq!(kinds.len(), 17);
        assert!(one.iter().any(|(action, _)| *action == Action::TakeOver));
        assert!(one.iter().all(|(_, pause)| pause.as_millis() < 200));
    }
}
