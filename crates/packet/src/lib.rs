//! Views and values of the protocols that a virtual switch reads and writes.
