//! What is refused is refused: each check restricts a thread of its own, which ends with it.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use control::PortSpec;

use super::{Asked, Grants, files, filter, restrict_worker, trap};

/// Runs `check` in a thread that is restricted first.
fn within<T: Send>(restrict: impl FnOnce() + Send, check: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            restrict();
            check()
        });
        thread.join().unwrap()
    })
}

fn ports(specs: &[&str]) -> Vec<PortSpec> {
    specs.iter().map(|spec| spec.parse().unwrap()).collect()
}

fn grants(specs: &[&str], kinds: &[&str]) -> Grants {
    let ports = ports(specs);
    let kinds: Vec<String> = kinds.iter().map(|kind| (*kind).to_owned()).collect();
    let asked = Asked { on: true, allow_kinds: &kinds, ..empty() };
    Grants::of(&asked, &ports.iter().collect::<Vec<_>>())
}

fn empty() -> Asked<'static> {
    Asked {
        on: true,
        allow_dirs: &[],
        allow_kinds: &[],
        control: Path::new("/nowhere/c.sock"),
        config: None,
        state_dir: None,
    }
}

const GUEST: &str = "vhost-user:name=g,socket=/nowhere/g.sock";

#[test]
fn a_worker_opens_no_socket_writes_no_file_and_starts_nothing() {
    trap::install().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "text").unwrap();
    let before = trap::refused();
    let restrict = || assert_eq!(restrict_worker(), Vec::<String>::new());
    let (socket, thread, written, read, program) = within(restrict, || {
        (
            std::os::unix::net::UnixDatagram::unbound().map(drop),
            std::thread::Builder::new().spawn(|| ()).map(drop),
            File::options().write(true).open(&file).map(drop),
            File::open(&file).map(drop),
            std::process::Command::new("/bin/true").status().map(drop),
        )
    });
    for result in [socket, thread, written, program] {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    // Landlock, where the kernel has it.
    if files::Places::default().restrict_in_thread() {
        assert_eq!(read.unwrap_err().kind(), ErrorKind::PermissionDenied);
    }
    assert!(trap::refused() >= before + 2);
}

impl files::Places {
    /// Whether this kernel restricts files: tried in a thread that ends.
    fn restrict_in_thread(&self) -> bool {
        let restricted = within(|| (), || self.restrict().unwrap());
        restricted != files::Restricted::Not
    }
}

#[test]
fn a_control_thread_starts_threads_and_no_programs() {
    trap::install().unwrap();
    let restrict = || filter::restrict_control(&grants(&[GUEST], &[])).unwrap();
    within(restrict, || {
        std::thread::spawn(|| ()).join().unwrap();
        let _ = std::os::unix::net::UnixStream::pair().unwrap();
        let program = std::process::Command::new("/bin/true").status();
        assert_eq!(program.unwrap_err().kind(), ErrorKind::PermissionDenied);
        let network = std::net::UdpSocket::bind("127.0.0.1:0");
        assert_eq!(network.unwrap_err().kind(), ErrorKind::PermissionDenied);
    });
    // An uplink's ioctls need such a socket.
    let restrict = || filter::restrict_control(&grants(&[], &["tap"])).unwrap();
    within(restrict, || drop(std::net::UdpSocket::bind("127.0.0.1:0").unwrap()));
}

#[test]
fn sockets_are_made_only_where_they_may() {
    let (inside, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sockets = Some([inside.path().to_owned()].into());
    let places = files::Places { sockets, ..files::Places::default() };
    assert!(places.has_socket_folder(inside.path()) && !places.has_socket_folder(outside.path()));
    if !files::Places::default().restrict_in_thread() {
        return;
    }
    let bind = |folder: &Path| std::os::unix::net::UnixListener::bind(folder.join("s")).map(drop);
    within(
        || assert_ne!(places.restrict().unwrap(), files::Restricted::Not),
        || {
            bind(inside.path()).unwrap();
            std::fs::rename(inside.path().join("s"), inside.path().join("t")).unwrap();
            assert_eq!(bind(outside.path()).unwrap_err().kind(), ErrorKind::PermissionDenied);
            let file = File::create(inside.path().join("file"));
            assert_eq!(file.unwrap_err().kind(), ErrorKind::PermissionDenied);
            let tcp = std::net::TcpListener::bind("127.0.0.1:0");
            // Before Linux 6.7 it is not restricted.
            assert!(tcp.is_err_and(|e| e.kind() == ErrorKind::PermissionDenied) || old_kernel());
        },
    );
}

fn old_kernel() -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    (numbers.next(), numbers.next()) < (Some(6), Some(7))
}

#[test]
fn kinds_that_were_not_there_are_refused_with_what_would_help() {
    let tap: PortSpec = "tap:name=t,ifname=t0".parse().unwrap();
    let elsewhere: PortSpec = "tap:name=t,ifname=t0,netns=x".parse().unwrap();
    let refused = grants(&[GUEST], &[]).permit(&tap).unwrap_err();
    assert_eq!(
        refused,
        "the sandbox gave up CAP_NET_ADMIN, because no port needed it at start: start with a tap \
         port, with --allow-kind tap, or with --sandbox off"
    );
    assert!(grants(&[GUEST, "tap:name=u,ifname=u0"], &[]).permit(&tap).is_ok());
    assert!(grants(&[GUEST], &["tap"]).permit(&tap).is_ok());
    assert!(grants(&[GUEST], &["tap"]).permit(&elsewhere).unwrap_err().contains("CAP_SYS_ADMIN"));
    assert!(grants(&[GUEST], &["tap", "netns"]).permit(&elsewhere).is_ok());
    // Nothing is known of a switch that starts empty.
    assert!(grants(&[], &[]).permit(&elsewhere).is_ok());
}

#[test]
fn a_folder_that_is_not_there_cannot_be_allowed() {
    let missing = [PathBuf::from("/nowhere/at/all")];
    let asked = Asked { allow_dirs: &missing, ..empty() };
    let error = super::Sandbox::begin(&asked, &[]).unwrap_err();
    assert_eq!(error, "--allow-dir /nowhere/at/all: No such file or directory (os error 2)");
}
