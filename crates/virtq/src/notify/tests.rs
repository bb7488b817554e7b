//! The comparisons of positions, against a count that never wraps.
#![expect(clippy::cast_possible_truncation, reason = "test code")]

use super::{PackedStep, packed_event, passes, split_event};

#[test]
fn split_steps_agree_with_a_count_that_does_not_wrap() {
    for start in [0u64, 5, 65_530, 65_536 * 3 - 2] {
        for count in 0..20u64 {
            for event in start..start + 40 {
                let want = (start..start + count).contains(&event);
                let have = passes(event as u16, (start + count) as u16, start as u16);
                assert_eq!(have, want, "{start} {count} {event}");
            }
        }
    }
}

#[test]
fn packed_steps_agree_with_a_count_that_does_not_wrap() {
    for size in [1u64, 2, 3, 8, 11] {
        let place = |at: u64| ((at % size) as u16, (at / size).is_multiple_of(2));
        for old in size..4 * size {
            for passed in 0..=size {
                let new = old + passed;
                let (index, wrap) = place(new);
                let step = PackedStep {
                    index,
                    wrap,
                    passed: passed as u32,
                    size: size as u16,
                    event_idx: true,
                };
                // The driver has looked at what was used at the latest one lap ago, and asks for
                // a position up to a lap from where it is.
                for event in old.saturating_sub(size)..old + size {
                    let (at, lap) = place(event);
                    let position = split_event(packed_event(at, lap, 0)).0;
                    let want = (old..new).contains(&event);
                    assert_eq!(step.passes(position), want, "{size} {old} {passed} {event}");
                }
            }
        }
    }
}
