//! Ring words: the few shared integers of a virtqueue, read and written atomically.

/// A checked, contiguous part of guest memory that holds a ring area.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RingMem {
    _ptr: *mut u8,
    _len: u32,
}
