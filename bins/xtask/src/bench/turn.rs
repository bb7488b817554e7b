//! One turn of a back end: its run, and another if that one can be compared with nothing.

use anyhow::{Context, Result};

use super::regime::Regime;
use crate::steps::Steps;

/// Tries of one run: on a machine that is disturbed for long, more would not help.
const TRIES: u32 = 3;

/// A run that was measured.
pub(crate) trait Measured {
    /// The machine's state in it.
    fn regime(&self) -> Regime;

    /// Its figures in words.
    fn line(&self) -> String;
}

/// Measures until a run was steady, three times at most, and adds every run to `done`. A run that
/// fails is noted as a failed step and not tried again.
pub(crate) fn take<R: Measured>(
    steps: &mut Steps,
    what: &str,
    done: &mut Vec<R>,
    mut measure: impl FnMut() -> Result<R>,
) {
    for _ in 0..TRIES {
        match measure().with_context(|| what.to_owned()) {
            Ok(run) => {
                println!("{what}: {}", run.line());
                let steady = Regime::STEADY.contains(&run.regime());
                done.push(run);
                if steady {
                    return;
                }
            }
            Err(error) => {
                println!("{what}: failed");
                steps.note(what, Err(error));
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Measured for Regime {
        fn regime(&self) -> Regime {
            *self
        }

        fn line(&self) -> String {
            self.name().to_owned()
        }
    }

    fn regimes(regimes: &[Regime]) -> Vec<Regime> {
        let (mut steps, mut done) = (Steps::new(), Vec::new());
        let mut next = regimes.iter().copied();
        take(&mut steps, "run", &mut done, || next.next().context("no more"));
        done
    }

    #[test]
    fn what_cannot_be_compared_is_tried_again_but_not_for_ever() {
        use Regime::{Changed, Disturbed, Far, Near};
        assert_eq!(regimes(&[Near, Far]), [Near]);
        assert_eq!(regimes(&[Changed, Disturbed, Far, Near]), [Changed, Disturbed, Far]);
        assert_eq!(regimes(&[Changed; 9]).len(), 3);
    }

    #[test]
    fn a_failure_ends_the_turn() {
        assert_eq!(regimes(&[Regime::Changed]), [Regime::Changed]);
    }
}
