//! How a namespace is joined to the switch, and what that negotiates.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use conformance::process::tied_command;
use conformance::{Netns, Process, Scratch, switch};

const PATIENCE: Duration = Duration::from_secs(20);

/// An end of the matrix.
#[derive(Debug)]
pub(crate) struct Kind {
    pub(crate) name: &'static str,
    how: How,
    /// Whether its stack sends large TCP frames over IPv4 and IPv6.
    pub(crate) sends: [bool; 2],
    /// Whether it takes them.
    pub(crate) takes: [bool; 2],
}

#[derive(Debug, Clone, Copy)]
enum How {
    /// `causeway-guest` with these options.
    Guest(&'static str),
    /// A tap with what its SPEC ends with.
    Tap(&'static str),
    /// An uplink of this kind, with what its SPEC ends with.
    Veth(&'static str, &'static str),
}

const BOTH: [bool; 2] = [true; 2];
const NONE: [bool; 2] = [false; 2];

pub(crate) const ENDS: [Kind; 11] = [
    Kind { name: "split", how: How::Guest("--offloads on"), sends: BOTH, takes: BOTH },
    Kind { name: "packed", how: How::Guest("--offloads on --packed"), sends: BOTH, takes: BOTH },
    Kind { name: "off", how: How::Guest("--offloads off"), sends: NONE, takes: NONE },
    Kind {
        name: "csum",
        how: How::Guest("--packed --offloads csum,guest-csum"),
        sends: NONE,
        takes: NONE,
    },
    Kind {
        name: "tso4-one-buffer",
        how: How::Guest("--mrg-rxbuf off --offloads csum,host-tso4,guest-csum,guest-tso4"),
        sends: [true, false],
        takes: [true, false],
    },
    Kind {
        name: "sends-only",
        how: How::Guest("--indirect --offloads csum,host-tso4,host-tso6,host-ecn,host-uso"),
        sends: BOTH,
        takes: NONE,
    },
    Kind {
        name: "takes-only",
        how: How::Guest("--offloads guest-csum,guest-tso4,guest-tso6,guest-ecn"),
        sends: NONE,
        takes: BOTH,
    },
    Kind { name: "tap", how: How::Tap(""), sends: BOTH, takes: BOTH },
    Kind { name: "packet-mmap", how: How::Veth("packet-mmap", ""), sends: BOTH, takes: BOTH },
    Kind { name: "af-xdp", how: How::Veth("af-xdp", ""), sends: BOTH, takes: BOTH },
    Kind { name: "af-xdp-copy", how: How::Veth("af-xdp", ",mode=copy"), sends: NONE, takes: BOTH },
];

/// Uplinks to which not everything may be left. What arrives at a packet socket is as its sender
/// left it.
pub(crate) const NARROW: [Kind; 4] = [
    Kind { name: "tap-off", how: How::Tap(",offloads=off"), sends: NONE, takes: NONE },
    Kind {
        name: "tap-tso4",
        how: How::Tap(",offloads=csum+tso4"),
        sends: [true, false],
        takes: [true, false],
    },
    Kind {
        name: "packet-mmap-off",
        how: How::Veth("packet-mmap", ",offloads=off"),
        sends: BOTH,
        takes: NONE,
    },
    Kind {
        name: "packet-mmap-tso6",
        how: How::Veth("packet-mmap", ",offloads=csum+tso6"),
        sends: BOTH,
        takes: [false, true],
    },
];

/// A namespace's way to the switch.
#[derive(Debug)]
pub(crate) struct Joined {
    how: How,
    number: usize,
    name: String,
    guest: Option<Process>,
}

impl Joined {
    pub(crate) fn new(kind: &Kind, number: usize) -> Self {
        Self { how: kind.how, number, name: format!("e{number}"), guest: None }
    }

    /// The name of the switch's port.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// The SPEC of the switch's port; veth pairs end in `place`.
    pub(crate) fn port(&self, space: &Netns, place: &Netns, scratch: &Scratch) -> Result<String> {
        let name = &self.name;
        Ok(match self.how {
            How::Guest(_) => {
                format!("vhost-user:name={name},socket={}", self.socket(scratch).display())
            }
            How::Tap(rest) => format!("tap:name={name},ifname=eth0,netns={}{rest}", space.name()),
            How::Veth(kind, rest) => {
                let ends = ["type", "veth", "peer", "name", name, "netns", place.name()];
                let _ = space.ip(&[&["link", "add", "eth0"][..], &ends[..]].concat())?;
                format!("{kind}:name={name},ifname={name},netns={}{rest}", place.name())
            }
        })
    }

    fn socket(&self, scratch: &Scratch) -> std::path::PathBuf {
        scratch.path(&format!("{}.sock", self.name))
    }

    /// Makes `eth0` of the namespace be there.
    pub(crate) fn join(&mut self, space: &Netns, scratch: &Scratch) -> Result<()> {
        let How::Guest(options) = self.how else { return Ok(()) };
        let mac = format!("02:00:00:00:00:{:02x}", self.number.saturating_add(1));
        let mut command = tied_command(switch::guest_program()?);
        let _ = command.arg("--socket").arg(self.socket(scratch)).args(["--mac", &mac]);
        let _ = command.args(["--tap", "eth0", "--netns", space.name()]);
        let _ = command.args(options.split(' '));
        let log = scratch.path(&format!("guest{}.log", self.number));
        let guest = Process::spawn("causeway-guest", &mut command, &log)?;
        let start = Instant::now();
        // The address is set last of all.
        while !space.ip(&["link", "show", "eth0"]).is_ok_and(|shown| shown.contains(&mac)) {
            if start.elapsed() > PATIENCE {
                bail!("no eth0 with {mac} in {}: {}", space.name(), guest.tail());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.guest = Some(guest);
        Ok(())
    }

    /// Ends in order.
    pub(crate) fn leave(self) -> Result<()> {
        let Some(mut guest) = self.guest else { return Ok(()) };
        let status = guest.stop().context("causeway-guest")?;
        ensure!(status.success(), "causeway-guest ended with {status}\n{}", guest.tail());
        Ok(())
    }
}
