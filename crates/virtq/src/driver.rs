//! The driver side of a virtqueue: the guest in tests, benches and `causeway-guest`.
