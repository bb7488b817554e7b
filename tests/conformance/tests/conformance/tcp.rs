//! Linux's TCP at both ends, for everything that a sender and a receiver may have negotiated.
//!
//! ```text
//!  namespace a ─ end ─► switch ─────────────────────────────────────► end ─ namespace b
//!  namespace a ─ end ─► switch (access) ─ veth, tagged ─ switch (access) ─► end ─ namespace b
//! ```
//!
//! Each row carries bytes both ways over IPv4 and IPv6 and compares them. Sizes of frames tell
//! whether they were cut where they must be, and only there.

mod driver;
mod end;
mod tunnel;
mod wire;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use conformance::switch::PortStats;
use conformance::{Netns, Scratch, Switch, pairwise};
use libtest_mimic::Trial;

use crate::{full, trial};
use end::{ENDS, Joined, Kind, NARROW};

const BYTES: usize = 3 << 20;
const PATIENCE: Duration = Duration::from_secs(10);
/// Ethernet, a tag, and an MTU of 1500.
const FRAME_MAX: u64 = 1518;
/// Far above what segments are.
const LARGE: u64 = 3000;
const ADDRESSES: [[&str; 2]; 2] = [["10.78.0.1", "10.78.0.2"], ["fd78::1", "fd78::2"]];

pub(crate) fn trials() -> Vec<Trial> {
    let sizes = [ENDS.len(), ENDS.len(), 2];
    // Each row goes both ways: one order of the ends is enough.
    let valid = |row: &[usize]| row.first() <= row.get(1);
    let rows = if full() { pairwise::all(&sizes, valid) } else { pairwise::pairs(&sizes, valid) };
    let matrix = rows.into_iter().filter_map(|row| {
        let (a, b) = (ENDS.get(*row.first()?)?, ENDS.get(*row.get(1)?)?);
        let tagged = *row.get(2)? == 1;
        let name = format!("tcp/{}/{}{}", a.name, b.name, if tagged { "/tagged" } else { "" });
        Some(trial(name, move |_, scratch| carry_all([a, b], tagged, scratch)))
    });
    let narrow = NARROW.iter().map(|a| {
        let name = format!("tcp/{}/split", a.name);
        trial(name, move |_, scratch| carry_all([a, wire::kind("split")?], false, scratch))
    });
    matrix
        .chain(narrow)
        .chain(wire::trials())
        .chain(driver::trials())
        .chain(tunnel::trials())
        .collect()
}

/// Two namespaces with a switch between them, or two switches.
struct Bed {
    spaces: [Netns; 2],
    ends: [Joined; 2],
    switches: Vec<Switch>,
    /// Where veth pairs end.
    _place: Netns,
}

impl Bed {
    fn new(kinds: [&Kind; 2], tagged: bool, scratch: &Scratch) -> Result<Self> {
        let spaces = [Netns::new()?, Netns::new()?];
        let place = Netns::new()?;
        let mut ends = [Joined::new(kinds[0], 0), Joined::new(kinds[1], 1)];
        let mut specs = Vec::new();
        for (end, space) in ends.iter_mut().zip(&spaces) {
            specs.push(end.port(space, &place, scratch)?);
        }
        let mut switches = Vec::new();
        if tagged {
            let _ = place.ip(&["link", "add", "t0", "type", "veth", "peer", "name", "t1"])?;
            for (number, spec) in specs.into_iter().enumerate() {
                let netns = place.name();
                let trunk =
                    format!("packet-mmap:name=t{number},ifname=t{number},netns={netns},trunk=5");
                let folder = folder(scratch, number)?;
                switches.push(Switch::start(&folder, &[format!("{spec},vlan=5"), trunk])?);
            }
        } else {
            switches.push(Switch::start(&folder(scratch, 0)?, &specs)?);
        }
        for (number, (end, space)) in ends.iter_mut().zip(&spaces).enumerate() {
            end.join(space, scratch)?;
            for family in ADDRESSES {
                let address = family.get(number).context("two addresses")?;
                let (bits, nodad): (_, &[&str]) =
                    if address.contains(':') { (64, &["nodad"]) } else { (24, &[]) };
                let full = format!("{address}/{bits}");
                let add = ["address", "add", full.as_str(), "dev", "eth0"];
                let _ = space.ip(&[&add[..], nodad].concat())?;
            }
            let _ = space.ip(&["link", "set", "eth0", "up"])?;
            let switch = if tagged { switches.get(number) } else { switches.first() };
            switch.context("a switch")?.wait_ports_up(&[end.name()])?;
        }
        Ok(Self { spaces, ends, switches, _place: place })
    }

    /// The counters of the port of end `number`.
    fn port(&self, number: usize) -> Result<PortStats> {
        let switch = self.switches.get(number).or(self.switches.first()).context("a switch")?;
        let name = self.ends.get(number).context("an end")?.name();
        Ok(switch.stats()?.port(name)?.clone())
    }

    /// Ends everything in order; the ledgers add up.
    fn stop(self) -> Result<()> {
        for end in self.ends {
            end.leave()?;
        }
        for switch in self.switches {
            let _ = switch.check_ledger()?;
            switch.stop()?;
        }
        Ok(())
    }
}

fn folder(scratch: &Scratch, number: usize) -> Result<PathBuf> {
    let folder = scratch.path(&format!("s{number}"));
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

/// One end of a bed.
#[derive(Clone, Copy)]
struct Side<'a> {
    number: usize,
    kind: &'a Kind,
    space: &'a Netns,
}

fn carry_all(kinds: [&Kind; 2], tagged: bool, scratch: &Scratch) -> Result<()> {
    let bed = Bed::new(kinds, tagged, scratch)?;
    let [x, y] = &bed.spaces;
    let one = Side { number: 0, kind: kinds[0], space: x };
    let other = Side { number: 1, kind: kinds[1], space: y };
    for (family, addresses) in ADDRESSES.iter().enumerate() {
        for (from, to, address) in [(one, other, addresses[1]), (other, one, addresses[0])] {
            one_way(&bed, [from, to], family, address.parse()?)
                .with_context(|| format!("from {} to {address}", from.kind.name))?;
        }
    }
    for space in &bed.spaces {
        let wrong = space.inside(bad_checksums)?;
        ensure!(wrong == 0, "{wrong} wrong checksums arrived in {}", space.name());
    }
    bed.stop()
}

fn one_way(bed: &Bed, [from, to]: [Side<'_>; 2], family: usize, address: IpAddr) -> Result<()> {
    let before = [bed.port(from.number)?, bed.port(to.number)?];
    carry(from.space, to.space, address)?;
    let after = [bed.port(from.number)?, bed.port(to.number)?];
    let sizes = Sizes {
        sent: mean(&before[0], &after[0], |port| (port.rx_frames(), rx_bytes(port))),
        arrived: mean(&before[1], &after[1], |port| (port.tx_frames(), tx_bytes(port))),
    };
    let checked = sizes.check([from.kind, to.kind], family);
    checked.with_context(|| format!("{sizes:?}"))
}

/// Mean bytes of the frames that carried data into the switch and out of it.
#[derive(Debug)]
struct Sizes {
    sent: u64,
    arrived: u64,
}

impl Sizes {
    fn check(&self, [from, to]: [&Kind; 2], family: usize) -> Result<()> {
        let (sends, takes) = (from.sends.get(family) == Some(&true), to.takes.get(family));
        ensure!((self.sent > LARGE) == sends, "frames of {} bytes came", self.sent);
        if takes == Some(&true) {
            ensure!(!sends || self.arrived > LARGE, "frames were cut without need");
        } else {
            ensure!(self.arrived <= FRAME_MAX, "large frames went out");
        }
        Ok(())
    }
}

fn mean(before: &PortStats, after: &PortStats, of: impl Fn(&PortStats) -> (u64, u64)) -> u64 {
    let ((frames, bytes), (now, more)) = (of(before), of(after));
    more.saturating_sub(bytes).checked_div(now.saturating_sub(frames)).unwrap_or(0)
}

fn rx_bytes(port: &PortStats) -> u64 {
    port.queues.iter().map(|queue| queue.rx_bytes).sum()
}

fn tx_bytes(port: &PortStats) -> u64 {
    port.queues.iter().map(|queue| queue.tx_bytes).sum()
}

/// Sends bytes from one namespace to the other, and compares them.
fn carry(from: &Netns, to: &Netns, address: IpAddr) -> Result<()> {
    let sent: Vec<u8> =
        (0..BYTES).map(|at| (at.wrapping_mul(31) ^ at.wrapping_shr(9)).to_le_bytes()[0]).collect();
    let listener = to.inside(|| Ok(TcpListener::bind((address, 0))?))?;
    let target: SocketAddr = listener.local_addr()?;
    let got = std::thread::scope(|scope| -> Result<Vec<u8>> {
        let receiver = scope.spawn(move || -> Result<Vec<u8>> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(PATIENCE))?;
            let mut got = Vec::with_capacity(BYTES);
            let _ = stream.read_to_end(&mut got)?;
            Ok(got)
        });
        let written = from.inside(|| {
            let mut stream = connect(target)?;
            stream.set_write_timeout(Some(PATIENCE))?;
            Ok(stream.write_all(&sent)?)
        });
        if written.is_err() {
            // So that the receiver ends, too.
            let _ = to.inside(|| Ok(TcpStream::connect_timeout(&target, PATIENCE)?));
        }
        written?;
        receiver.join().ok().context("the receiver panicked")?
    })?;
    ensure!(got.len() == sent.len(), "{} of {BYTES} bytes came", got.len());
    ensure!(got == sent, "other bytes came");
    Ok(())
}

/// The other side's interface may need a moment.
fn connect(target: SocketAddr) -> Result<TcpStream> {
    let second = Duration::from_secs(1);
    let tries = std::iter::repeat_with(|| TcpStream::connect_timeout(&target, second));
    let mut last = None;
    for connected in tries.take(10) {
        match connected {
            Ok(stream) => return Ok(stream),
            Err(error) => last = Some(error),
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Err(last.context("no try")?.into())
}

/// TCP segments and datagrams with a wrong checksum that this namespace's stack has seen.
fn bad_checksums() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp")?;
    let mut sum = 0u64;
    for protocol in ["Tcp:", "Udp:"] {
        let mut lines = text.lines().filter(|line| line.starts_with(protocol));
        let (names, values) = (lines.next().context("names")?, lines.next().context("values")?);
        let mut fields = names.split(' ').zip(values.split(' '));
        let (_, value) = fields.find(|(name, _)| *name == "InCsumErrors").context("a counter")?;
        sum = sum.saturating_add(value.parse()?);
    }
    // Of TCP there is one counter for both families.
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp6")?;
    let value = text.lines().find_map(|line| line.strip_prefix("Udp6InCsumErrors"));
    Ok(sum.saturating_add(value.context("a counter")?.trim().parse()?))
}
