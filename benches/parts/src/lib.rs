//! Nothing: the package's content is its benches.
//!
//! ```text
//! cargo bench -p parts --bench fdb
//! cargo bench -p parts --bench packet
//! ```
#![forbid(unsafe_code)]
