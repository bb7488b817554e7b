//! Conformance with QEMU and DPDK.
