//! The few integers that driver and device share, as a trait: words of guest memory in production,
//! loom's atomics in the proofs of `crate::loom`.

use std::sync::atomic::Ordering;

/// One integer that the other side reads or writes at any time.
pub(crate) trait Shared<T> {
    /// Reads it; the value is hostile.
    fn load(&self, order: Ordering) -> T;
    /// Writes it.
    fn store(&self, value: T, order: Ordering);
    /// A full fence of the same memory model.
    fn full_fence();
}
