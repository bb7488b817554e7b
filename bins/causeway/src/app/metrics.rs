//! The metrics, and the address where scrapers read them.

use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use control::metrics;
use control::protocol::MetricsView;
use control::scrape::{ClientId, Ready, Scrape};
use event_manager::{EventSet, Events, SubscriberOps};
use rustix::time::{ClockId, clock_gettime};

use super::App;

/// Scrapers that are taken at a time.
const ACCEPTED_MAX: usize = 64;
/// CPU time that it takes to be woken, about.
const WAKE: Duration = Duration::from_micros(3);

impl App {
    pub(super) fn metrics_view(&self) -> MetricsView {
        MetricsView { text: metrics::text(&self.stats_view(), &self.version_view()) }
    }

    /// Serves scrapers from now on.
    pub(crate) fn serve_metrics(
        &mut self,
        scrape: Scrape,
        asked: SocketAddr,
    ) -> Result<(), String> {
        self.metrics_at = Some(asked);
        let failed = |error: event_manager::Error| format!("cannot watch for scrapers: {error}");
        let mut ops = self.manager.event_ops(self.hub).map_err(failed)?;
        let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
        ops.add(Events::new(&scrape.listener(), set)).map_err(failed)?;
        self.scrape = Some(scrape);
        Ok(())
    }

    /// Takes care of `fd` if it is the scrapers' or one of them.
    pub(super) fn scraper_woke(&mut self, fd: RawFd) -> bool {
        let Some(scrape) = &self.scrape else { return false };
        if fd == scrape.listener().as_raw_fd() {
            self.accept_scrapers();
        } else if scrape.client(fd).is_some() {
            self.at_their_cost(|app| app.scraper(fd));
        } else {
            return false;
        }
        true
    }

    /// Does something for scrapers, and charges them for it.
    fn at_their_cost<T>(&mut self, job: impl FnOnce(&mut Self) -> T) -> T {
        let before = cpu_time();
        let done = job(self);
        let took = cpu_time().saturating_sub(before).saturating_add(WAKE);
        if let Some(scrape) = &mut self.scrape {
            scrape.charge(took);
        }
        done
    }

    /// Takes those that wait, at most so many at a time: the rest, and those for whom there is no
    /// fd or time left, wait for the next one that comes or for the next tick.
    fn accept_scrapers(&mut self) {
        for _ in 0..ACCEPTED_MAX {
            if !self.at_their_cost(Self::accept_scraper) {
                return;
            }
        }
    }

    fn accept_scraper(&mut self) -> bool {
        let Some(id) = self.scrape.as_mut().and_then(Scrape::accept) else { return false };
        let set = EventSet::IN | EventSet::OUT | EventSet::EDGE_TRIGGERED;
        let client = self.scrape.as_ref().and_then(|scrape| scrape.client(id));
        let added = match (self.manager.event_ops(self.hub), client) {
            (Ok(mut ops), Some(fd)) => ops.add(Events::new(&fd, set)).is_ok(),
            _ => false,
        };
        if added {
            self.scraper(id)
        } else {
            self.close_scraper(id)
        }
        self.close_unwelcome_scrapers();
        true
    }

    fn scraper(&mut self, id: ClientId) {
        let ready = self.scrape.as_mut().map_or(Ready::Gone, |scrape| scrape.ready(id));
        let kept = match ready {
            Ready::Waits => true,
            Ready::Gone => false,
            Ready::Asked => {
                let text = self.metrics_view().text;
                self.scrape.as_mut().is_some_and(|scrape| scrape.answer(id, &text))
            }
        };
        if !kept {
            self.close_scraper(id);
        }
    }

    /// A second has passed: closes those that took too long, and takes those that had to wait.
    pub(super) fn look_after_scrapers(&mut self) {
        self.scrape.iter_mut().for_each(Scrape::second);
        self.close_unwelcome_scrapers();
        self.accept_scrapers();
    }

    /// Closes those that took too long, or the oldest if there are too many.
    fn close_unwelcome_scrapers(&mut self) {
        while let Some(id) = self.scrape.as_ref().and_then(Scrape::unwelcome) {
            self.close_scraper(id);
        }
    }

    fn close_scraper(&mut self, id: ClientId) {
        let Some(scrape) = &mut self.scrape else { return };
        if let (Ok(mut ops), Some(fd)) = (self.manager.event_ops(self.hub), scrape.client(id))
            && let Err(error) = ops.remove(Events::empty(&fd))
        {
            tracing::debug!(%error, "cannot forget a scraper");
        }
        scrape.forget(id);
    }
}

/// CPU time of this thread so far.
fn cpu_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}
