//! Microbenchmarks of virtqueue processing.
