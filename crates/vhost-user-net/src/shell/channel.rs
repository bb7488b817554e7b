//! What a front end may give us to ask it on.
//!
//! **Trust.** What a front end gives is held, and closed later. So it must not be what keeps its
//! connection alive, its own end of it: the port would never hear that the front end is gone, and
//! nobody could come after it. And it must hold nothing itself: what waits in a socket's queue is
//! closed with it, and that may take its time.
//!
//! **Limits.** A byte that was sent out of band and taken leaves its fds in a queue that looks
//! empty. So a thread closes channels (see `closer`); one with its own connection in it that way
//! keeps the port connected until `ctl port reset`.

use std::os::fd::BorrowedFd;

use rustix::io::ioctl_fionread;
use rustix::net::sockopt::{socket_domain, socket_type};
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrAny, SocketAddrUnix, SocketType, getpeername, getsockname,
    shutdown,
};

/// Whether a socket is one end of a connection within this machine that holds nothing that can be
/// seen, and takes nothing in: nothing is read there, so it is shut for that.
pub(super) fn is_empty(socket: BorrowedFd<'_>) -> bool {
    let is = |wanted: AddressFamily| socket_domain(socket).is_ok_and(|domain| domain == wanted);
    is(AddressFamily::UNIX)
        && socket_type(socket).is_ok_and(|kind| kind == SocketType::STREAM)
        // Others can be made to listen later; connections that wait then hold anything.
        && getpeername(socket).is_ok()
        && shutdown(socket, Shutdown::Read).is_ok()
        && ioctl_fionread(socket).is_ok_and(|unread| unread == 0)
}

/// Whether one may be the other's peer: each shows the other's name. Connections without names,
/// which have no listener, cannot be told apart.
pub(super) fn is_other_end(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let shown = |name: SocketAddrAny| {
        let name = SocketAddrUnix::try_from(name).ok()?;
        let bytes = name.path_bytes().or(name.abstract_name());
        bytes.filter(|bytes| !bytes.is_empty()).map(<[u8]>::to_vec)
    };
    let names = |fd: BorrowedFd<'_>| {
        let peer = getpeername(fd).ok()?.and_then(shown);
        Some((getsockname(fd).ok().and_then(shown), peer))
    };
    let (Some(one), Some(other)) = (names(one), names(other)) else { return false };
    one.0 == other.1 && one.1 == other.0 && one != (None, None)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use rustix::net::{SocketFlags, bind, connect, socket, socketpair};

    use super::*;

    #[test]
    fn the_other_end_is_known_whatever_it_calls_itself() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let theirs = UnixStream::connect(&path).unwrap();
        let (ours, _) = listener.accept().unwrap();
        assert!(is_other_end(theirs.as_fd(), ours.as_fd()));
        // The same where they listen, and we come.
        assert!(is_other_end(ours.as_fd(), theirs.as_fd()));

        // The listener's own name, as in a mount namespace of theirs.
        let theirs = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        std::fs::rename(&path, dir.path().join("elsewhere")).unwrap();
        bind(&theirs, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        connect(&theirs, &SocketAddrUnix::new(dir.path().join("elsewhere")).unwrap()).unwrap();
        let (ours, _) = listener.accept().unwrap();
        assert!(is_other_end(theirs.as_fd(), ours.as_fd()));

        let (other, _end) = UnixStream::pair().unwrap();
        assert!(!is_other_end(other.as_fd(), ours.as_fd()));
        // Connections without names, as between tests.
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(!is_other_end(other.as_fd(), ours.as_fd()));
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(!is_other_end(null.as_fd(), ours.as_fd()));
    }

    #[test]
    fn what_holds_something_or_can_is_not_empty() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("t")).unwrap();
        assert!(!is_empty(listener.as_fd()), "connections wait in it, and hold fds");
        let single = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        assert!(!is_empty(single.as_fd()), "it can listen later");
        for kind in [SocketType::DGRAM, SocketType::SEQPACKET] {
            let (one, _end) =
                socketpair(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).unwrap();
            assert!(!is_empty(one.as_fd()), "fds beside no byte");
        }
        let (datagrams, _end) = UnixDatagram::pair().unwrap();
        assert!(!is_empty(datagrams.as_fd()));
        let (full, mut end) = UnixStream::pair().unwrap();
        end.write_all(&[0]).unwrap();
        assert!(!is_empty(full.as_fd()));
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(!is_empty(null.as_fd()));
    }

    #[test]
    fn what_front_ends_give_is_empty_and_takes_nothing_in() {
        let (channel, mut end) = UnixStream::pair().unwrap();
        assert!(is_empty(channel.as_fd()));
        assert!(end.write_all(&[0]).is_err(), "it could be filled later");
        (&channel).write_all(&[7]).unwrap();
        assert!(is_empty(channel.as_fd()), "as often as it is given");
    }
}
