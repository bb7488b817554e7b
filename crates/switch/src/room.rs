//! Room between what one worker writes and what another one does.

/// Two cache lines, because processors fetch them in pairs.
const GAP_BYTES: usize = 128;

/// Makes room for `count` more elements and for a gap after them, so that what the allocator puts
/// behind is in no cache line that these elements are in.
pub(crate) fn reserve<T>(vec: &mut Vec<T>, count: usize) {
    let gap = GAP_BYTES.div_ceil(size_of::<T>().max(1));
    vec.reserve(count.saturating_add(gap));
}

/// An empty vector with such room.
pub(crate) fn vec<T>(count: usize) -> Vec<T> {
    let mut vec = Vec::new();
    reserve(&mut vec, count);
    vec
}

#[cfg(test)]
mod tests {
    #[test]
    fn there_is_a_gap_behind() {
        let mut numbers = super::vec::<u16>(64);
        assert!(numbers.capacity() >= 64 + 64);
        numbers.extend(0..64);
        super::reserve(&mut numbers, 3);
        assert!(numbers.capacity() >= 64 + 3 + 64);
    }
}
