//! SIGINT and SIGTERM: a flag that loops look at, and that ends every sleep.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use signal_hook::consts::{SIGINT, SIGTERM};

/// Whether somebody asked us to stop.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop {
    asked: Arc<AtomicBool>,
}

impl Stop {
    /// Catches the signals. A second one ends the process at once.
    pub(crate) fn on_signals() -> anyhow::Result<Self> {
        let stop = Self::default();
        for signal in [SIGINT, SIGTERM] {
            let twice = Arc::clone(&stop.asked);
            let _ = signal_hook::flag::register_conditional_shutdown(signal, 1, twice)
                .context("cannot catch signals")?;
            let _ = signal_hook::flag::register(signal, Arc::clone(&stop.asked))
                .context("cannot catch signals")?;
        }
        Ok(stop)
    }

    /// Whether it is time to stop.
    #[inline]
    pub(crate) fn asked(&self) -> bool {
        self.asked.load(Ordering::Relaxed)
    }
}
