//! A guest without a VM: joins a namespace or a traffic generator to a vhost-user switch.

fn main() {}
