//! The vhost-user back end of a virtio-net device.
