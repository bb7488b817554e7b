//! How many files the process may have open, and what of that is for front ends.

use control::{PortKind, PortSpec};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use vhost_user_net::fds::{FdPool, most_fds};

/// What a process without a limit is taken to have: what Linux has as `fs.nr_open`.
const NO_LIMIT: u64 = 1 << 20;

/// Raises the limit as far as this process may, and returns it.
pub(crate) fn raise_limit() -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: maximum, maximum };
    let limit = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => maximum,
        Err(error) => {
            tracing::warn!(%error, "the limit of open files (RLIMIT_NOFILE) cannot be raised");
            current
        }
    };
    let limit = limit.unwrap_or(NO_LIMIT);
    tracing::debug!(limit, "open files (RLIMIT_NOFILE)");
    usize::try_from(limit).unwrap_or(usize::MAX)
}

/// Says so if `limit` has no room for what front ends of `ports` may want.
pub(crate) fn warn_if_short<'a>(limit: usize, ports: impl Iterator<Item = &'a PortSpec>) {
    if let Some(text) = shortage(limit, ports) {
        tracing::warn!("{text}");
    }
}

/// How many ports have front ends.
pub(crate) fn guests<'a>(ports: impl Iterator<Item = &'a PortSpec>) -> usize {
    ports.filter_map(queues).count()
}

fn queues(port: &PortSpec) -> Option<u16> {
    match &port.kind {
        PortKind::VhostUser(guest) => Some(guest.queues),
        PortKind::Tap(_) | PortKind::AfXdp(_) | PortKind::PacketMmap(_) => None,
    }
}

fn shortage<'a>(limit: usize, ports: impl Iterator<Item = &'a PortSpec>) -> Option<String> {
    let queues: Vec<u16> = ports.filter_map(queues).collect();
    let wanted = most_fds(queues.iter().copied().max()?);
    let (count, right) = (queues.len(), FdPool::limit_for(queues.len(), wanted));
    let pool = FdPool::of_limit(limit);
    pool.set_ports(count);
    (limit < right).then(|| {
        format!(
            "{limit} open files (RLIMIT_NOFILE) are few for {count} vhost-user ports: {part} fds \
             are kept of each front end (one with all queues and memory slots has {wanted}), more \
             are refused; {right} would be right",
            part = pool.part(),
        )
    })
}

#[cfg(test)]
mod tests {
    use control::PortSpec;

    use super::{guests, shortage};

    fn ports(count: usize, queues: u16) -> Vec<PortSpec> {
        let text = |n| format!("vhost-user:name=g{n},socket=g{n}.sock,queues={queues}");
        let tap = "tap:name=t,ifname=t".parse().unwrap();
        (0..count).map(|n| text(n).parse().unwrap()).chain([tap]).collect()
    }

    #[test]
    fn a_small_limit_is_told_with_the_right_one() {
        let ports_of = ports(3, 128);
        assert_eq!(guests(ports_of.iter()), 3);
        let text = shortage(1024, ports_of.iter()).unwrap();
        assert_eq!(
            text,
            "1024 open files (RLIMIT_NOFILE) are few for 3 vhost-user ports: 96 fds are kept of \
             each front end (one with all queues and memory slots has 1284), more are refused; \
             11296 would be right"
        );
        assert_eq!(shortage(11296, ports_of.iter()), None);
        assert!(shortage(11295, ports_of.iter()).is_some());
        assert_eq!(shortage(4500, ports(2, 1).iter()), None);
        // Few are needed by few ports, and none without.
        assert!(shortage(4000, ports(1, 1).iter()).is_some());
        assert_eq!(shortage(64, ports(0, 1).iter()), None);
        // What the unit of the package allows.
        assert_eq!(shortage(1 << 19, ports(200, 128).iter()), None);
    }
}
