//! What arrives, looked at by tshark: every checksum right, no segment above the MTU.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::process::output;
use conformance::{Environment, Netns, Process, Scratch};
use libtest_mimic::Trial;

use super::end::{ENDS, Kind};
use super::{ADDRESSES, Bed, carry};
use crate::trial;

const READ_TIMEOUT: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(20);
/// Without its options, a segment of 3 MiB is one of two thousand.
const LEAST_FRAMES: usize = 1500;
const DATAGRAM: usize = 1000;
const USO_BYTES: usize = 40_000;
/// More than the frames that go beside a datagram that stays whole, fewer than it is cut into.
const FEW: u64 = 20;

pub(crate) fn trials() -> Vec<Trial> {
    let senders = ["split", "packed", "tap", "packet-mmap", "af-xdp", "af-xdp-copy"];
    let wire = senders.into_iter().map(|sender| {
        trial(format!("tcp/wire-from-{sender}"), move |environment, scratch| {
            look(environment, scratch, [kind(sender)?, kind("off")?])
        })
    });
    let ways = [("split", "off"), ("packed", "split"), ("tap", "packet-mmap"), ("af-xdp", "split")];
    let both = ["uso", "uso6"].into_iter().enumerate();
    let rows = both.flat_map(|(family, name)| ways.map(|(from, to)| (family, name, from, to)));
    let uso = rows.map(|(family, name, from, to)| {
        trial(format!("tcp/{name}-from-{from}-to-{to}"), move |environment, scratch| {
            datagrams(environment, scratch, ([kind(from)?, kind(to)?], family))
        })
    });
    wire.chain(uso).collect()
}

pub(super) fn kind(name: &str) -> Result<&'static Kind> {
    ENDS.iter().find(|kind| kind.name == name).context("an end of that name")
}

fn look(environment: &Environment, scratch: &Scratch, kinds: [&Kind; 2]) -> Result<()> {
    let bed = Bed::new(kinds, false, scratch)?;
    let [from, to] = &bed.spaces;
    for [_, address] in ADDRESSES {
        let file = scratch.path("capture.pcapng");
        let mut capture = listen(environment, scratch, to, &file)?;
        carry(from, to, address.parse()?)?;
        ensure!(capture.stop()?.success(), "{}", capture.tail());
        let dst = if address.contains(':') { "ipv6.dst" } else { "ip.dst" };
        let read = |filter: &str| read(environment, &file, filter);
        let seen = read(&format!("{dst}=={address} && tcp.len>0"))?.len();
        ensure!(seen >= LEAST_FRAMES, "only {seen} segments were captured");
        let bad = "tcp.checksum.status!=1 || ip.checksum.status==0 || frame.len>1514";
        let wrong = read(&format!("{dst}=={address} && tcp && ({bad})"))?;
        ensure!(wrong.is_empty(), "{} frames are wrong: {:?}", wrong.len(), wrong.first());
    }
    bed.stop()
}

/// The frames of a capture that a filter finds.
fn read(environment: &Environment, file: &Path, filter: &str) -> Result<Vec<String>> {
    let mut command = environment.wire_program("tshark")?;
    let _ = command.arg("-r").arg(file).args(["-Y", filter, "-T", "fields"]);
    for check in ["tcp", "udp", "ip"] {
        let _ = command.args(["-o", &format!("{check}.check_checksum:TRUE")]);
    }
    for field in ["frame.number", "frame.len", "tcp.checksum", "udp.checksum"] {
        let _ = command.args(["-e", field]);
    }
    Ok(output(&mut command, READ_TIMEOUT)?.lines().map(str::to_owned).collect())
}

/// A capture that runs.
fn listen(
    environment: &Environment,
    scratch: &Scratch,
    space: &Netns,
    file: &Path,
) -> Result<Process> {
    let mut command = environment.wire_program("tshark")?;
    let _ = command.args(["-i", "eth0", "-q", "-B", "64", "-s", "0", "-w"]).arg(file);
    let mut capture = space.spawn("tshark", &command, scratch.folder())?;
    let from = |text: &str| text.contains("Capture started").then_some(());
    capture.wait_for("that it captures", 0, PATIENCE, from)?;
    Ok(capture)
}

/// A socket that leaves its datagrams to be cut (`UDP_SEGMENT`): all of them arrive, and are right.
/// Who takes them whole gets them so; who does not, as they are to be on the wire.
fn datagrams(
    environment: &Environment,
    scratch: &Scratch,
    (kinds, family): ([&Kind; 2], usize),
) -> Result<()> {
    let bed = Bed::new(kinds, false, scratch)?;
    let [from, to] = &bed.spaces;
    let sent: Vec<u8> =
        (0..USO_BYTES).map(|at| (at.wrapping_mul(7) >> 3).to_le_bytes()[0]).collect();
    let [_, address] = ADDRESSES.get(family).context("a family")?;
    let address: IpAddr = address.parse()?;
    let socket = to.inside(|| Ok(UdpSocket::bind((address, 0))?))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let target = socket.local_addr()?;
    let capture = scratch.path("capture.pcapng");
    let mut listening = listen(environment, scratch, to, &capture)?;
    let before = [bed.port(0)?.rx_frames(), bed.port(1)?.tx_frames()];
    send(environment, scratch, from, (target, &sent))?;
    let (mut got, mut buffer) = (Vec::new(), [0; 2000]);
    let start = Instant::now();
    while got.len() < sent.len() && start.elapsed() < PATIENCE {
        let Ok(len) = socket.recv(&mut buffer) else { continue };
        ensure!(len == DATAGRAM, "a datagram of {len} bytes");
        got.extend_from_slice(buffer.get(..len).unwrap_or_default());
    }
    ensure!(got == sent, "{} of {USO_BYTES} bytes came, or others", got.len());
    let came = bed.port(0)?.rx_frames().saturating_sub(before[0]);
    ensure!(came < FEW, "{came} frames came: they were cut by the sender");
    let went = bed.port(1)?.tx_frames().saturating_sub(before[1]);
    // The capture gets its frames by the block, a moment later.
    let start = Instant::now();
    let bytes = || std::fs::metadata(&capture).map_or(0, |file| file.len());
    while bytes() < USO_BYTES as u64 && start.elapsed() < PATIENCE {
        std::thread::sleep(Duration::from_millis(20));
    }
    ensure!(listening.stop()?.success(), "{}", listening.tail());
    if kinds[1].takes == [true; 2] {
        ensure!(went < FEW, "{went} frames went out: they were cut without need");
    } else {
        let ours = format!("udp.dstport=={}", target.port());
        let all = read(environment, &capture, &ours)?;
        ensure!(all.len() == USO_BYTES / DATAGRAM, "{} frames: {:?}", all.len(), all.first());
        let bad = "udp.checksum.status!=1 || ip.checksum.status==0 || udp.length!=1008";
        let wrong = read(environment, &capture, &format!("{ours} && ({bad})"))?;
        ensure!(wrong.is_empty(), "{} frames are wrong: {:?}", wrong.len(), wrong.first());
    }
    let wrong = to.inside(super::bad_checksums)?;
    ensure!(wrong == 0, "{wrong} wrong checksums arrived");
    bed.stop()
}

/// Sends bytes as one datagram that is to be cut.
fn send(
    environment: &Environment,
    scratch: &Scratch,
    from: &Netns,
    (target, bytes): (SocketAddr, &[u8]),
) -> Result<()> {
    let file = scratch.path("datagrams");
    std::fs::write(&file, bytes)?;
    let mut command = environment.wire_program("socat")?;
    let protocol = if target.is_ipv6() { "UDP6" } else { "UDP4" };
    // SOL_UDP, UDP_SEGMENT.
    let target = format!("{protocol}-SENDTO:{target},setsockopt=17:103:i{DATAGRAM}");
    let _ = command.args(["-u", "-b", "60000"]).arg(format!("OPEN:{}", file.display())).arg(target);
    let _ = output(&mut from.command(&command)?, PATIENCE)?;
    Ok(())
}
