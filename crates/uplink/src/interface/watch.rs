//! Changes of interfaces, as the kernel tells them: rtnetlink's group of links.
//!
//! **Trust.** The messages say when to look; what is believed is what the interface then answers.
//! Only that our index was deleted is taken from them, and from the kernel alone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use netlink_packet_core::NetlinkBuffer;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::link::LinkHeader;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// Bytes for one read: more than the kernel puts into one.
const READ_BYTES: usize = 32 * 1024;
/// Reads in one go: a flood of changes must not hold the control thread.
const READS_MAX: usize = 64;

/// A socket that hears of changes in the namespace where it was made.
#[derive(Debug)]
pub(super) struct Watch {
    socket: Socket,
}

/// What was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct News {
    /// Something that may be of interest.
    pub(super) any: bool,
    /// The interface of our index was deleted or went to another namespace.
    pub(super) deleted: bool,
}

impl Watch {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.set_non_blocking(true)?;
        let groups = u32::try_from(libc::RTMGRP_LINK).unwrap_or(1);
        socket.bind(&SocketAddr::new(0, groups))?;
        Ok(Self { socket })
    }

    pub(super) fn from_fd(fd: OwnedFd) -> Self {
        Self { socket: crate::sys::netlink_socket(fd) }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Reads what is there.
    pub(super) fn read(&self, index: u32) -> News {
        let mut news = News::default();
        let mut buffer = Vec::with_capacity(READ_BYTES);
        for _ in 0..READS_MAX {
            buffer.clear();
            match self.socket.recv_from(&mut buffer, 0) {
                Ok((_, from)) if from.port_number() != 0 => {}
                Ok(_) => understand(&buffer, index, &mut news),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                // Messages were lost (ENOBUFS): anything may have happened.
                Err(_) => news.any = true,
            }
        }
        news
    }
}

/// Reads the messages of one datagram.
fn understand(mut bytes: &[u8], index: u32, news: &mut News) {
    while let Ok(message) = NetlinkBuffer::new_checked(bytes) {
        let is_link = matches!(message.message_type(), libc::RTM_NEWLINK | libc::RTM_DELLINK);
        let header = LinkHeader::parse(message.payload()).ok();
        if let (true, Some(header)) = (is_link, header) {
            let deleted = message.message_type() == libc::RTM_DELLINK;
            let ours = header.index == index;
            // A bridge says DELLINK in its own family of a port that it gives up.
            let of_bridge = header.interface_family == AddressFamily::Bridge;
            news.deleted |= deleted && ours && !of_bridge;
            // A new interface may have our name.
            news.any |= ours || !deleted;
        }
        let len = usize::try_from(message.length()).unwrap_or(usize::MAX).next_multiple_of(4);
        let Some(rest) = bytes.get(len..) else { return };
        bytes = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::{News, understand};

    /// A message of that type about an interface.
    fn message(kind: u16, family: u8, index: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(32u32.to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend([family, 0, 0, 0]);
        bytes.extend(index.to_ne_bytes());
        bytes.extend([0; 8]);
        bytes
    }

    fn heard(bytes: &[u8]) -> News {
        let mut news = News::default();
        understand(bytes, 7, &mut news);
        news
    }

    #[test]
    fn only_the_own_index_is_deleted() {
        let deleted = News { any: true, deleted: true };
        assert_eq!(heard(&message(libc::RTM_DELLINK, 0, 7)), deleted);
        assert_eq!(heard(&message(libc::RTM_DELLINK, 0, 8)), News::default());
        let bridge = u8::try_from(libc::AF_BRIDGE).unwrap();
        let changed = News { any: true, deleted: false };
        assert_eq!(heard(&message(libc::RTM_DELLINK, bridge, 7)), changed);
        assert_eq!(heard(&message(libc::RTM_NEWLINK, 0, 8)), changed);
        assert_eq!(heard(&message(libc::RTM_NEWADDR, 0, 7)), News::default());
        let two = [message(libc::RTM_NEWLINK, 0, 8), message(libc::RTM_DELLINK, 0, 7)].concat();
        assert_eq!(heard(&two), deleted);
    }

    #[test]
    fn cut_messages_are_survived() {
        let whole = message(libc::RTM_DELLINK, 0, 7);
        for len in 0..whole.len() {
            assert_eq!(heard(&whole[..len]), News::default(), "{len} bytes");
        }
        let mut endless = whole;
        endless[..4].copy_from_slice(&0u32.to_ne_bytes());
        assert_eq!(heard(&endless), News::default());
    }
}
