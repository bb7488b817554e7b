//! A link as fds and numbers, for a process that goes on with it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use serde::{Deserialize, Serialize};

use crate::parts::{Collected, PartsError, Remaining};
use crate::sys::{InterfaceSocket, Promiscuous};

use super::query::Query;
use super::watch::Watch;
use super::{Cuts, Link, Namespace};

/// What the fds of a link do not say.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct LinkParts {
    ifname: String,
    index: u32,
    netns: Option<String>,
    mtu: u32,
    promiscuous: bool,
    restore_down: bool,
    #[serde(default)]
    restore_tags: bool,
    made: bool,
    deleted: bool,
}

impl Link {
    /// Adds the link's fds to `fds`.
    pub(crate) fn parts(&self, fds: &mut Collected) -> Result<LinkParts, PartsError> {
        if let Some(namespace) = self.namespace.fd() {
            fds.add(namespace)?;
        }
        fds.add(&self.socket)?;
        fds.add(self.watch.fd())?;
        fds.add(self.query.fd())?;
        if let Some(promiscuous) = &self.promiscuous {
            fds.add(promiscuous.fd())?;
        }
        Ok(LinkParts {
            ifname: self.ifname.clone(),
            index: self.index,
            netns: self.namespace.name().map(str::to_owned),
            mtu: self.current_mtu(),
            promiscuous: self.promiscuous.is_some(),
            restore_down: self.restore_down,
            restore_tags: self.restore_tags,
            made: self.made,
            deleted: self.deleted,
        })
    }

    /// The link that those parts are of. Until [`Self::own`] it undoes nothing when it is dropped.
    pub(crate) fn from_parts(parts: &LinkParts, fds: &mut Remaining) -> Result<Self, PartsError> {
        let namespace = fds.next_if(parts.netns.is_some())?;
        let namespace = Namespace::from_parts(parts.netns.clone().zip(namespace));
        let socket = InterfaceSocket::from_fd(fds.next()?);
        let watch = Watch::from_fd(fds.next()?);
        let query = Query::from_fd(fds.next()?);
        let promiscuous = fds.next_if(parts.promiscuous)?.map(Promiscuous::from_fd);
        let cuts = Arc::new(Cuts::default());
        // It may have another name by now.
        let name = socket.name_of(parts.index).ok().flatten();
        cuts.set(socket.cuts(name.as_deref().unwrap_or(&parts.ifname)));
        Ok(Self {
            namespace,
            ifname: parts.ifname.clone(),
            index: parts.index,
            socket,
            watch,
            query,
            promiscuous,
            restore_down: false,
            restore_tags: false,
            made: parts.made,
            deleted: parts.deleted,
            owned: Arc::new(AtomicBool::new(false)),
            mtu: Arc::new(AtomicU32::new(parts.mtu)),
            carrier: Arc::new(AtomicBool::new(true)),
            cuts,
        })
    }

    /// The uplink is whole: what was changed on the interface is to be undone in the end.
    pub(crate) fn own(&mut self, parts: &LinkParts) {
        self.restore_down = parts.restore_down;
        self.restore_tags = parts.restore_tags;
        // ORDERING: read by who drops the queues, after this.
        self.owned.store(true, Ordering::Relaxed);
    }

    /// Lets go of the interface without undoing what was changed on it: another process goes on.
    pub fn leave(mut self) {
        self.restore_down = false;
        self.restore_tags = false;
        // ORDERING: as in `own`.
        self.owned.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use port::OffloadSet;
    use serde::{Deserialize, Serialize};

    use super::{Collected, Link, LinkParts, Namespace, Remaining};

    #[derive(Serialize, Deserialize)]
    struct State {
        kind: String,
        link: LinkParts,
    }

    fn run(program: &str, arguments: &[&str]) {
        let status = Command::new(program).args(arguments).status().unwrap();
        assert!(status.success(), "{program} {arguments:?} (as root)");
    }

    #[test]
    fn what_the_device_takes_is_asked_of_the_interface_that_was_renamed() {
        let netns = format!("cw-link-{}", std::process::id());
        run("ip", &["netns", "add", &netns]);
        let ip = |arguments: &[&str]| run("ip", &[&["-n", &netns], arguments].concat());
        ip(&["link", "add", "old0", "type", "veth", "peer", "name", "peer0"]);
        let namespace = Namespace::open(Some(&netns)).unwrap();
        let link = namespace.run(|| Link::find(&namespace, "old0")).unwrap().unwrap();
        assert!(link.cuts().of(OffloadSet::ALL).tso4);
        run("ip", &["netns", "exec", &netns, "ethtool", "-K", "old0", "tso", "off"]);
        ip(&["link", "set", "old0", "name", "new0"]);
        let mut fds = Collected::default();
        let parts = link.parts(&mut fds).unwrap();
        let parts = fds.finish(&State { kind: "link".to_owned(), link: parts }).unwrap();
        let (state, mut fds) = Remaining::open::<State>(parts, "link").unwrap();
        let other = Link::from_parts(&state.link, &mut fds).unwrap();
        run("ip", &["netns", "del", &netns]);
        assert!(!other.cuts().of(OffloadSet::ALL).tso4);
    }
}
