//! One question about an interface that only rtnetlink answers.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Bytes for an answer: more than the kernel says of an interface.
const ANSWER_BYTES: usize = 64 * 1024;

/// Asks in the namespace where it was made.
#[derive(Debug)]
pub(super) struct Query {
    socket: Socket,
}

/// What rtnetlink says of an interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Facts {
    /// Frames that were lost on their way out of the interface, and on their way in.
    pub(crate) dropped: Option<(u64, u64)>,
    /// Whether it is a macvtap: its queues are opened by a device file of its own.
    pub(crate) is_macvtap: bool,
}

impl Query {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        let _ = socket.bind_auto()?;
        Ok(Self { socket })
    }

    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Self { socket: crate::sys::netlink_socket(fd) }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// What the interface of that index is now.
    pub(super) fn ask(&self, index: u32) -> io::Result<Facts> {
        let mut link = LinkMessage::default();
        link.header.index = index;
        let payload = NetlinkPayload::from(RouteNetlinkMessage::GetLink(link));
        let mut message = NetlinkMessage::new(Default::default(), payload);
        message.header.flags = NLM_F_REQUEST;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        let _ = self.socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        let mut answer = Vec::with_capacity(ANSWER_BYTES);
        // The kernel has answered when the request was taken.
        let _ = self.socket.recv(&mut answer, libc::MSG_DONTWAIT)?;
        let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
            .map_err(io::Error::other)?;
        let payload = answer.payload;
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewLink(link)) = payload {
            return Ok(facts(link));
        }
        let NetlinkPayload::Error(error) = payload else {
            return Err(io::Error::other("an answer to another question"));
        };
        Err(error.to_io())
    }
}

fn facts(link: LinkMessage) -> Facts {
    let mut facts = Facts::default();
    for attribute in link.attributes {
        if let LinkAttribute::Stats64(stats) = attribute {
            facts.dropped = Some((stats.tx_dropped, stats.rx_dropped));
        } else if let LinkAttribute::LinkInfo(infos) = attribute {
            facts.is_macvtap = infos.contains(&LinkInfo::Kind(InfoKind::MacVtap));
        }
    }
    facts
}
