//! DPDK's virtio-user in every ring variant: content, order, size and count of every frame.
//!
//! ```text
//!  UDP sockets ── tap h0 ── switch ──┬── v0 ── testpmd swaps addresses and sends back
//!   (this test)                      └── v1 ── the same
//! ```
//!
//! First the test's datagrams come back byte for byte and in order, in sizes from 60 to 9000; then
//! testpmd bounces frames between `v0` and `v1` as fast as it can, and its counters must agree
//! with the switch's.

use std::net::UdpSocket;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use conformance::virtio_user::{LARGEST_FRAME, PortCount};
use conformance::{
    Environment, HostTap, Scratch, Switch, Topology, VirtioUser, VirtioUserSpec, pairwise,
};
use libtest_mimic::Trial;

use crate::{full, trial};

/// Ethernet, IPv4 and UDP headers.
const HEADER_BYTES: usize = 42;
const MTU: u32 = 8986;
const HOST: &str = "10.78.0.1";
/// UDP ports at testpmd's side; each is a flow of its own.
const FLOWS: [u16; 4] = [9000, 9001, 9002, 9003];
/// Datagrams of a flow on their way at once, so that no socket buffer overflows.
const WINDOW: usize = 4;
/// Around each power of two, the usual sizes, and both ends.
const FRAME_SIZES: [usize; 24] = [
    60,
    61,
    64,
    65,
    127,
    128,
    129,
    255,
    256,
    257,
    511,
    512,
    1000,
    1514,
    1518,
    2047,
    2048,
    2049,
    4095,
    4096,
    4097,
    8192,
    8999,
    LARGEST_FRAME,
];
const QUEUES: [u16; 3] = [1, 2, 4];
/// What has not come after so long does not come.
const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn trials() -> Vec<Trial> {
    let sizes = [2, 2, 2, 2, QUEUES.len(), 2];
    let rows =
        if full() { pairwise::all(&sizes, |_| true) } else { pairwise::pairs(&sizes, |_| true) };
    let mut specs: Vec<VirtioUserSpec> = rows.iter().filter_map(|row| spec_of(row)).collect();
    // All pairs need not hold the one combination in which each ring kind has a vector path.
    for packed in [false, true] {
        let wanted = |spec: &VirtioUserSpec| {
            spec.packed == packed && spec.vectorized && !spec.mrg_rxbuf && spec.in_order == packed
        };
        if !specs.iter().any(wanted) {
            let row = [usize::from(packed), 0, usize::from(packed), 1, 0, 0];
            specs.extend(spec_of(&row));
        }
    }
    let row = |spec: VirtioUserSpec| {
        let name = format!("virtio-user/{}", spec.name());
        trial(name, move |environment, scratch| run(environment, scratch, spec))
    };
    specs.into_iter().map(row).collect()
}

fn spec_of(row: &[usize]) -> Option<VirtioUserSpec> {
    let &[packed, mrg_rxbuf, in_order, vectorized, queues, server] = row else { return None };
    Some(VirtioUserSpec {
        sockets: Vec::new(),
        topology: Topology::Loop,
        server: server == 1,
        packed: packed == 1,
        mrg_rxbuf: mrg_rxbuf == 1,
        in_order: in_order == 1,
        vectorized: vectorized == 1,
        queues: *QUEUES.get(queues)?,
        largest_frame: LARGEST_FRAME,
        small_pages: false,
    })
}

fn run(environment: &Environment, scratch: &Scratch, mut spec: VirtioUserSpec) -> Result<()> {
    spec.sockets = vec![scratch.path("v0"), scratch.path("v1")];
    let tap = HostTap::named("v");
    let mode = if spec.server { "client" } else { "server" };
    // With their MACs known from the start nothing is flooded, which testpmd would answer twice.
    let port = |name: &str, index| {
        let (socket, mac) = (scratch.path(name), VirtioUserSpec::mac(index));
        format!("vhost-user:name={name},socket={},mode={mode},mac={mac}", socket.display())
    };
    let switch = Switch::start(scratch.folder(), &[port("v0", 0), port("v1", 1), tap.spec()])?;
    tap.configure(&format!("{HOST}/24"), MTU)?;
    let mut user = VirtioUser::start(environment, &spec, scratch.folder())?;
    user.wait_up()?;
    switch.wait_ports_up(&["v0", "v1", "h0"])?;
    let _ = user.command("set fwd 5tswap")?;
    let _ = user.command("start")?;
    for (index, address) in ["10.78.0.2", "10.78.0.3"].into_iter().enumerate() {
        tap.neighbour(address, &VirtioUserSpec::mac(index))?;
        wait_for_jumbo(address).with_context(|| switch.counters())?;
        echo(address, &FRAME_SIZES)
            .with_context(|| format!("through port v{index} ({})", switch.counters()))?;
    }
    let _ = switch.check_ledger()?;
    bounce(&mut user, &switch, &spec)?;
    user.quit()?;
    switch.stop()
}

/// Waits until the largest frame comes back: the switch looks at the tap's MTU once a second.
fn wait_for_jumbo(address: &str) -> Result<()> {
    let socket = UdpSocket::bind((HOST, 0))?;
    socket.connect((address, 8999))?;
    socket.set_read_timeout(Some(Duration::from_millis(500)))?;
    let mut answer = vec![0; LARGEST_FRAME];
    for _ in 0..10 {
        let _ = socket.send(&pattern(LARGEST_FRAME, 0))?;
        if socket.recv(&mut answer).is_ok() {
            return Ok(());
        }
    }
    anyhow::bail!("no frame of {LARGEST_FRAME} bytes comes back from {address}")
}

/// Every datagram comes back with its content, in its order, in every size and on every flow.
pub(crate) fn echo(address: &str, frame_sizes: &[usize]) -> Result<()> {
    for flow in FLOWS {
        let socket = UdpSocket::bind((HOST, 0))?;
        socket.connect((address, flow))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut answer = vec![0; LARGEST_FRAME];
        for (round, window) in frame_sizes.chunks(WINDOW).enumerate() {
            for &size in window {
                let _ = socket.send(&pattern(size, round))?;
            }
            for &size in window {
                let got = socket
                    .recv(&mut answer)
                    .with_context(|| format!("a frame of {size} bytes is lost"))?;
                let expected = pattern(size, round);
                let same = answer.get(..got) == Some(&expected[..]);
                ensure!(same, "a frame of {size} bytes came back as another one ({got} + 42)");
            }
        }
    }
    Ok(())
}

/// A payload that no other frame has, so that a swap or a torn copy shows.
fn pattern(frame_bytes: usize, round: usize) -> Vec<u8> {
    let seed = frame_bytes.wrapping_mul(0x9e37_79b9).wrapping_add(round.wrapping_mul(0x85eb_ca6b));
    let mut state = u32::try_from(seed & 0xffff_ffff).unwrap_or(1) | 1;
    let byte = |_| {
        state ^= state.wrapping_shl(13);
        state ^= state.wrapping_shr(17);
        state ^= state.wrapping_shl(5);
        state.to_le_bytes()[0]
    };
    (0..frame_bytes.saturating_sub(HEADER_BYTES)).map(byte).collect()
}

/// Frames bounce between the two ports at full speed; then both sides have counted the same.
fn bounce(user: &mut VirtioUser, switch: &Switch, spec: &VirtioUserSpec) -> Result<()> {
    let jumbo = if spec.mrg_rxbuf { "2000,2000,2000,2000,1000" } else { "9000" };
    for size in ["60", "1514", jumbo] {
        let _ = user.command("stop")?;
        let _ = user.command(&format!("set txpkts {size}"))?;
        let _ = user.command("set fwd mac")?;
        let before = user.counts()?;
        let _ = user.command("start tx_first 2")?;
        thread::sleep(Duration::from_millis(500));
        wait_for_frames(user, &before).with_context(|| format!("few frames of {size} bytes"))?;
        let _ = user.command("stop")?;
        // Takes what is still on its way, and sends nothing.
        let _ = user.command("set fwd rxonly")?;
        let _ = user.command("start")?;
        agree(user, switch).with_context(|| format!("after frames of {size} bytes"))?;
        let _ = switch.check_ledger()?;
    }
    Ok(())
}

/// Waits until more than a hundred frames have come to each port since `before`.
fn wait_for_frames(user: &mut VirtioUser, before: &[PortCount]) -> Result<()> {
    let start = Instant::now();
    loop {
        let after = user.counts()?;
        let mut came = before.iter().zip(&after).map(|(old, new)| new.rx.saturating_sub(old.rx));
        if came.all(|count| count > 100) {
            return Ok(());
        }
        ensure!(start.elapsed() < PATIENCE, "{before:?}, {after:?}");
        thread::sleep(Duration::from_millis(50));
    }
}

/// Waits until testpmd's counters and the switch's say the same of both ports.
fn agree(user: &mut VirtioUser, switch: &Switch) -> Result<()> {
    let start = Instant::now();
    loop {
        let theirs = user.counts()?;
        let stats = switch.stats()?;
        let mut ours = Vec::new();
        for name in ["v0", "v1"] {
            let port = stats.port(name)?;
            ours.push(PortCount { rx: port.tx_frames(), tx: port.rx_frames() });
        }
        if ours == theirs {
            return Ok(());
        }
        ensure!(
            start.elapsed() < PATIENCE,
            "testpmd counts {theirs:?}, the switch counts {ours:?}\n{stats:#?}"
        );
        thread::sleep(Duration::from_millis(50));
    }
}
