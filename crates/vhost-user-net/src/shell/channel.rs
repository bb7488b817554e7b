//! What a front end may give us to ask it on.
//!
//! **Trust.** A channel is held as long as the connection lives. So it must not be what keeps that
//! alive: the front end's own end of the connection, or a socket that has this end in its queue.
//! The port would never hear that the front end is gone, and nobody could come after it.

use std::os::fd::BorrowedFd;

use rustix::net::sockopt::{socket_acceptconn, socket_type};
use rustix::net::{
    RecvFlags, Shutdown, SocketAddrAny, SocketAddrUnix, SocketType, getpeername, getsockname, recv,
    shutdown,
};

/// Whether a channel could keep the connection from ending. What is no socket cannot; nothing is
/// asked on it either.
pub(super) fn is_snare(channel: BorrowedFd<'_>, connection: BorrowedFd<'_>) -> bool {
    let Ok(kind) = socket_type(channel) else { return false };
    // We read nothing there: nothing more gets into its queue, and nothing has to be there.
    let _ = shutdown(channel, Shutdown::Read);
    let holds = || {
        let peeked = recv(channel, &mut [0u8; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        peeked.is_ok_and(|(_, count)| count > 0)
    };
    let listens = socket_acceptconn(channel).unwrap_or(true);
    kind != SocketType::STREAM || listens || is_other_end(channel, connection) || holds()
}

/// Whether one may be the other's peer: one end of a connection to a listener has its name.
fn is_other_end(one: BorrowedFd<'_>, other: BorrowedFd<'_>) -> bool {
    let shown = |name: SocketAddrAny| {
        let name = SocketAddrUnix::try_from(name).ok()?;
        let bytes = name.path_bytes().or(name.abstract_name());
        bytes.map(<[u8]>::to_vec)
    };
    let names = |fd: BorrowedFd<'_>| {
        let peer = getpeername(fd).ok().flatten();
        (getsockname(fd).ok().and_then(shown), peer.and_then(shown))
    };
    let (one, other) = (names(one), names(other));
    one.0 == other.1 && one.1 == other.0 && one.0 != one.1
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::fd::{AsFd, OwnedFd};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    use super::*;

    #[test]
    fn what_keeps_the_connection_alive_is_no_channel() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let theirs = UnixStream::connect(dir.path().join("s")).unwrap();
        let (ours, _) = listener.accept().unwrap();
        assert!(is_snare(theirs.as_fd(), ours.as_fd()));
        // The same where they listen, and we come.
        assert!(is_snare(ours.as_fd(), theirs.as_fd()));

        let other = UnixListener::bind(dir.path().join("t")).unwrap();
        assert!(is_snare(other.as_fd(), ours.as_fd()), "connections wait in it, and hold fds");
        let (datagrams, _end) = UnixDatagram::pair().unwrap();
        assert!(is_snare(datagrams.as_fd(), ours.as_fd()), "fds beside no byte");
        let (full, mut end) = UnixStream::pair().unwrap();
        end.write_all(&[0]).unwrap();
        assert!(is_snare(full.as_fd(), ours.as_fd()));
    }

    #[test]
    fn what_front_ends_give_is_one_and_takes_nothing_in() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let _theirs = UnixStream::connect(dir.path().join("s")).unwrap();
        let (ours, _) = listener.accept().unwrap();
        let (channel, mut end) = UnixStream::pair().unwrap();
        assert!(!is_snare(channel.as_fd(), ours.as_fd()));
        assert!(end.write_all(&[0]).is_err(), "it could be filled later");
        (&channel).write_all(&[7]).unwrap();
        let null: OwnedFd = std::fs::File::open("/dev/null").unwrap().into();
        assert!(!is_snare(null.as_fd(), ours.as_fd()));
        // Connections without names, as between tests.
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert!(!is_snare(channel.as_fd(), ours.as_fd()));
    }
}
