//! A tap as fds: its queues keep nothing between two bursts.

use std::os::fd::AsFd;
use std::sync::Arc;

use port::{OffloadSet, QueueCounters};
use serde::{Deserialize, Serialize};

use crate::interface::{Link, LinkParts};
use crate::parts::{Collected, Parts, PartsError, Remaining, check_queues};

use super::found::{Found, Header};
use super::{Tap, TapEgress, TapIngress, halves};

const KIND: &str = "tap";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    kind: String,
    link: LinkParts,
    queues: u16,
    /// How the tap was found.
    #[serde(default)]
    found: Option<Header>,
}

/// What an open tap is made of. Between this and the time when one of both goes on, nobody may
/// use the queues.
///
/// # Errors
///
/// [`PartsError`]: the process has no fds left.
pub fn parts<'a>(
    link: &Link,
    queues: impl IntoIterator<Item = (&'a mut TapIngress, &'a mut TapEgress)>,
) -> Result<Parts, PartsError> {
    let mut fds = Collected::default();
    let link = link.parts(&mut fds)?;
    let (mut count, mut found) = (0u16, None);
    for (ingress, _) in queues {
        fds.add(ingress.queue.fd.as_ref())?;
        count = count.saturating_add(1);
        found = ingress.queue.found.as_ref().map(|found| found.header());
    }
    fds.finish(&State { kind: KIND.to_owned(), link, queues: count, found })
}

/// Puts together again what [`parts`] took apart, with these offloads: other ones hold at once, so
/// who took it apart and goes on after all sets its own again ([`TapOffloads::set_again`]). Each
/// queue pair counts in its own `counters`.
///
/// [`TapOffloads::set_again`]: super::TapOffloads::set_again
///
/// # Errors
///
/// [`PartsError`] says what does not fit.
pub fn from_parts(
    parts: Parts,
    offloads: OffloadSet,
    counters: &[Arc<QueueCounters>],
) -> Result<Tap, PartsError> {
    let (state, mut fds) = Remaining::open::<State>(parts, KIND)?;
    check_queues(usize::from(state.queues), counters.len())?;
    let mut link = Link::from_parts(&state.link, &mut fds)?;
    let queues = (0..state.queues).map(|_| fds.next()).collect::<Result<Vec<_>, _>>()?;
    let found = match (state.found, queues.first()) {
        (Some(header), Some(fd)) => Some(Found::new(fd.as_fd(), header, link.owned())),
        _ => None,
    };
    let queues = found
        .transpose()
        .and_then(|found| halves(queues, &link, offloads, (counters, found.map(Arc::new))));
    let queues =
        queues.map_err(|error| PartsError::System { what: "set up the queues of a tap", error })?;
    link.own(&state.link);
    Ok(Tap { link, queues })
}
