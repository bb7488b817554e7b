//! Ports over tap, AF_XDP and packet_mmap.
