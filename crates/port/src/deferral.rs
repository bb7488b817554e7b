//! Halves of a queue pair that are served by a thread of their own, because whoever touches the
//! memory behind them may have to wait for it.
//!
//! ```text
//!  worker                             a lane                      a thread of the half's own
//!  DeferredIngress::receive ◄──── parcels, bounded ◄──── copy ◄── receive, release, notify ◄─ ring
//!  DeferredEgress::send ── copy ─► parcels, bounded ───────────── send, notify ─────────────► ring
//! ```
//!
//! A guest that migrates with postcopy runs before its memory has arrived: rings and buffers alike
//! may be missing, and who touches them sleeps until its front end has served the page. Workers,
//! and other guests' frames, must not: they meet private copies only. So what the thread does is
//! what a worker would have done, and what the worker sees is an ingress or egress like any other.
//!
//! **Control never waits for the thread.** It asks it to rest ([`Pacer::rest`]); the thread says
//! (the notice) when it is between two bursts, where it touches nothing. Only then a half is taken
//! apart. What waits in the lane goes on with the next half of that ring ([`IngressRest`],
//! [`EgressRest`]): nothing is lost or overtaken on the way into the thread and out of it.
//! **Accounting.** What waits is `held`. The thread counts in counters of its own, or in those that
//! nobody else writes meanwhile.
//! **Limits.** 128 sends or bursts wait, of 64 frames or 128 KiB each: to the guest more
//! are dropped (`deferral_full`), from the guest they stay in its ring.

mod edges;
mod egress;
mod ingress;
mod pacer;

pub use egress::{DeferredEgress, EgressRest};
pub use ingress::{DeferredIngress, IngressRest};
pub use pacer::{Notice, Pacer, Plan};

/// Parcels of a lane to or from a guest.
const PARCELS: usize = 128;

#[cfg(test)]
mod tests;
