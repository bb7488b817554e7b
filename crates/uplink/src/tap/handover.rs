//! A tap as fds: its queues keep nothing between two bursts.

use std::sync::Arc;

use port::QueueCounters;
use serde::{Deserialize, Serialize};

use crate::interface::{Link, LinkParts};
use crate::parts::{Collected, Parts, PartsError, Remaining, check_queues};

use super::{Tap, TapEgress, TapIngress, halves};

const KIND: &str = "tap";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    kind: String,
    link: LinkParts,
    queues: u16,
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
    let mut count = 0u16;
    for (ingress, _) in queues {
        fds.add(ingress.queue.fd.as_ref())?;
        count = count.saturating_add(1);
    }
    fds.finish(&State { kind: KIND.to_owned(), link, queues: count })
}

/// Puts together again what [`parts`] took apart. Each queue pair counts in its own `counters`.
///
/// # Errors
///
/// [`PartsError`] says what does not fit.
pub fn from_parts(parts: Parts, counters: &[Arc<QueueCounters>]) -> Result<Tap, PartsError> {
    let (state, mut fds) = Remaining::open::<State>(parts, KIND)?;
    check_queues(usize::from(state.queues), counters.len())?;
    let mut link = Link::from_parts(&state.link, &mut fds)?;
    let queues = (0..state.queues).map(|_| fds.next()).collect::<Result<Vec<_>, _>>()?;
    let queues = halves(queues, &link, counters)
        .map_err(|error| PartsError::System { what: "set up the queues of a tap", error })?;
    link.own(&state.link);
    Ok(Tap { link, queues })
}
