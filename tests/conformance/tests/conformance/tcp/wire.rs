//! What arrives, looked at by tshark: every checksum right, no segment above the MTU.

use std::net::UdpSocket;
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

pub(crate) fn trials() -> Vec<Trial> {
    let senders = ["split", "packed", "tap", "packet-mmap", "af-xdp", "af-xdp-copy"];
    let wire = senders.into_iter().map(|sender| {
        trial(format!("tcp/wire-from-{sender}"), move |environment, scratch| {
            look(environment, scratch, [kind(sender)?, kind("off")?])
        })
    });
    let ways = [("split", "off"), ("packed", "split"), ("tap", "packet-mmap"), ("af-xdp", "split")];
    let uso = ways.map(|(from, to)| {
        trial(format!("tcp/uso-from-{from}-to-{to}"), move |environment, scratch| {
            datagrams(environment, scratch, [kind(from)?, kind(to)?])
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
        let read = |filter: &str| -> Result<Vec<String>> {
            let mut command = environment.wire_program("tshark")?;
            let _ = command.arg("-r").arg(&file).args(["-Y", filter, "-T", "fields"]);
            for check in ["tcp", "udp", "ip"] {
                let _ = command.args(["-o", &format!("{check}.check_checksum:TRUE")]);
            }
            for field in ["frame.number", "frame.len", "tcp.checksum", "tcp.checksum_calculated"] {
                let _ = command.args(["-e", field]);
            }
            Ok(output(&mut command, READ_TIMEOUT)?.lines().map(str::to_owned).collect())
        };
        let seen = read(&format!("{dst}=={address} && tcp.len>0"))?.len();
        ensure!(seen >= LEAST_FRAMES, "only {seen} segments were captured");
        let bad = "tcp.checksum.status!=1 || ip.checksum.status==0 || frame.len>1514";
        let wrong = read(&format!("{dst}=={address} && tcp && ({bad})"))?;
        ensure!(wrong.is_empty(), "{} frames are wrong: {:?}", wrong.len(), wrong.first());
    }
    bed.stop()
}

/// A capture that runs.
fn listen(
    environment: &Environment,
    scratch: &Scratch,
    space: &Netns,
    file: &std::path::Path,
) -> Result<Process> {
    let mut command = environment.wire_program("tshark")?;
    let _ = command.args(["-i", "eth0", "-q", "-B", "64", "-s", "0", "-w"]).arg(file);
    let mut capture = space.spawn("tshark", &command, scratch.folder())?;
    let from = |text: &str| text.contains("Capture started").then_some(());
    capture.wait_for("that it captures", 0, PATIENCE, from)?;
    Ok(capture)
}

/// A socket that leaves its datagrams to be cut (`UDP_SEGMENT`): all of them arrive, and are right.
fn datagrams(environment: &Environment, scratch: &Scratch, kinds: [&Kind; 2]) -> Result<()> {
    let bed = Bed::new(kinds, false, scratch)?;
    let [from, to] = &bed.spaces;
    let sent: Vec<u8> =
        (0..USO_BYTES).map(|at| (at.wrapping_mul(7) >> 3).to_le_bytes()[0]).collect();
    let file = scratch.path("datagrams");
    std::fs::write(&file, &sent)?;
    let address = ADDRESSES[0][1];
    let socket = to.inside(|| Ok(UdpSocket::bind((address, 0))?))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let port = socket.local_addr()?.port();
    let before = bed.port(0)?.rx_frames();
    let mut command = environment.wire_program("socat")?;
    // SOL_UDP, UDP_SEGMENT.
    let target = format!("UDP4-SENDTO:{address}:{port},setsockopt=17:103:i{DATAGRAM}");
    let _ = command.args(["-u", "-b", "60000"]).arg(format!("OPEN:{}", file.display())).arg(target);
    let _ = output(&mut from.command(&command)?, PATIENCE)?;
    let (mut got, mut buffer) = (Vec::new(), [0; 2000]);
    let start = Instant::now();
    while got.len() < sent.len() && start.elapsed() < PATIENCE {
        let Ok(len) = socket.recv(&mut buffer) else { continue };
        ensure!(len == DATAGRAM, "a datagram of {len} bytes");
        got.extend_from_slice(buffer.get(..len).unwrap_or_default());
    }
    ensure!(got == sent, "{} of {USO_BYTES} bytes came, or others", got.len());
    let frames = bed.port(0)?.rx_frames().saturating_sub(before);
    ensure!(frames < 20, "{frames} frames came: they were cut by the sender");
    let wrong = to.inside(super::bad_checksums)?;
    ensure!(wrong == 0, "{wrong} wrong checksums arrived");
    bed.stop()
}
