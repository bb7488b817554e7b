//! Developer commands of the Causeway tree.

fn main() {}
