//! Frame batches, offload intent, drop reasons and the port traits.
