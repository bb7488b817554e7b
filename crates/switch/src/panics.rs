//! Panics are bugs; they are caught at a port's boundary.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a panic said.
pub(crate) fn panic_text(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("a panic without a message").to_owned()
}

/// Drops what a panic may have left in disorder: its own drop may panic too.
pub(crate) fn drop_quietly<T>(broken: T) {
    let _ = catch_unwind(AssertUnwindSafe(move || drop(broken)));
}
