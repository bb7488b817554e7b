//! The virtio-net device model.
