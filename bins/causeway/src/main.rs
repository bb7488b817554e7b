//! The Causeway virtual switch.

fn main() {}
