//! Constants that `cargo xtask bench sweep` tries with other values.
//!
//! Only a build with `--cfg sweep` looks at the environment of its compiler. What is shipped has
//! the number that stands in the source.

/// A constant's value: `swept!("NAME", 8)` is 8, and in a build with `--cfg sweep` what
/// `CAUSEWAY_SWEEP_NAME` says, if it is set.
#[doc(hidden)]
#[macro_export]
#[cfg(not(sweep))]
macro_rules! swept {
    ($name:literal, $shipped:expr) => {
        $shipped
    };
}

/// The same in a build with `--cfg sweep`.
#[doc(hidden)]
#[macro_export]
#[cfg(sweep)]
macro_rules! swept {
    ($name:literal, $shipped:expr) => {
        $crate::sweep::value(option_env!(concat!("CAUSEWAY_SWEEP_", $name)), $shipped)
    };
}

/// The number that `text` is.
#[cfg(sweep)]
#[must_use]
pub const fn value(text: Option<&str>, shipped: usize) -> usize {
    let Some(text) = text else { return shipped };
    let mut rest = text.as_bytes();
    let mut value = 0usize;
    while let Some((digit, more)) = rest.split_first() {
        assert!(digit.is_ascii_digit(), "CAUSEWAY_SWEEP_* is a number");
        value = value.wrapping_mul(10).wrapping_add(digit.wrapping_sub(b'0') as usize);
        rest = more;
    }
    assert!(value > 0, "CAUSEWAY_SWEEP_* is at least 1");
    value
}
