//! The command line: what was asked for, checked before anything is opened.

use std::path::PathBuf;

use clap::error::ErrorKind;
use clap::{ArgGroup, Parser, ValueEnum};

use crate::mac::{MacAddr, STATIONS_MAX};
use crate::offloads::Wanted;

/// Smallest frame: Ethernet without its frame check sequence.
const FRAME_MIN: u32 = 60;
/// Largest frame that the test frame's IPv4 header can describe and a port accepts.
const FRAME_MAX: u32 = 65_535;
const FRAMES: std::ops::RangeInclusive<i64> = FRAME_MIN as i64..=FRAME_MAX as i64;

/// A guest without a VM: a vhost-user front end that generates, checks or forwards frames.
///
/// It connects to the back end behind each SOCKET (or waits for it with `--mode server`) with
/// memory and rings of its own, as a VMM and the driver in its guest would together.
#[derive(Clone, Debug, Parser)]
#[command(name = "causeway-guest", version)]
#[command(group = ArgGroup::new("job").required(true).args(
    ["tap", "generate", "receive", "latency"]))]
pub(crate) struct Cli {
    /// Socket of a vhost-user back end; repeat it for a guest with several ports
    #[arg(long, value_name = "PATH", required = true)]
    pub(crate) socket: Vec<PathBuf>,
    /// Which side of the sockets we are
    #[arg(long, value_enum, default_value_t = Mode::Client)]
    pub(crate) mode: Mode,
    /// When the back end goes away, connect again (or wait for it again) and go on
    #[arg(long)]
    pub(crate) reconnect: bool,
    /// Keep an in-flight file for the back end (`INFLIGHT_SHMFD`), for the next one
    #[arg(long)]
    pub(crate) inflight: bool,
    /// Queue pairs of each port
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=128))]
    pub(crate) queues: u16,
    /// Packed rings instead of split ones
    #[arg(long)]
    pub(crate) packed: bool,
    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,

    /// Forward between the first port and the tap NAME, which is created and brought up
    #[arg(long, value_name = "NAME")]
    pub(crate) tap: Option<String>,
    /// Network namespace of the tap
    #[arg(long, value_name = "NS")]
    pub(crate) netns: Option<String>,
    /// What the tap's kernel may leave to the back end, and the back end to it: on (all that both
    /// know), off, or a LIST of csum, host-tso4, host-tso6, host-ecn, host-uso, guest-csum,
    /// guest-tso4, guest-tso6, guest-ecn, guest-uso4, guest-uso6, which the back end has to offer
    /// [default: on]
    #[arg(long, value_name = "on|off|LIST")]
    pub(crate) offloads: Option<Wanted>,
    /// Send test frames on the first port; check those that arrive at the others
    #[arg(long)]
    pub(crate) generate: bool,
    /// Count the test frames that arrive, with what is missing or out of order
    #[arg(long)]
    pub(crate) receive: bool,
    /// Measure round trips of single frames: between two ports, or to a `--receive --echo`
    #[arg(long)]
    pub(crate) latency: bool,

    /// Frames per second [default: as many as possible]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) rate_pps: Option<u64>,
    /// Bytes of a frame, without its check sequence; receive buffers fit it [default: 64]
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u32).range(FRAMES))]
    pub(crate) size: Option<u32>,
    /// Let the sizes run from --size to N; receive buffers fit them
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u32).range(FRAMES))]
    pub(crate) size_max: Option<u32>,
    /// Stop after N frames
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// Stop after N seconds
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) seconds: Option<u64>,
    /// Seconds of round trips before those that are measured [default: 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub(crate) warm_up: Option<u64>,
    /// Meanwhile let frames go between the ports behind two more sockets, given one after the
    /// other, as fast as the back end takes them
    #[arg(long, value_name = "PATH")]
    pub(crate) neighbour: Vec<PathBuf>,
    /// Bytes of the neighbour's frames [default: --size]
    #[arg(long, value_name = "N", requires = "neighbour",
          value_parser = clap::value_parser!(u32).range(FRAMES))]
    pub(crate) neighbour_size: Option<u32>,
    /// Most frames that are made available at once [default: 32]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub(crate) burst: Option<u16>,
    /// At most N frames on their way from the first port to the others: no queue overflows
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) window: Option<u64>,
    /// Destination address [default: the second port's, else broadcast]
    #[arg(long, value_name = "MAC")]
    pub(crate) dst: Option<MacAddr>,
    /// Number of flows (UDP source ports) that take turns [default: one per queue pair]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub(crate) flows: Option<u16>,
    /// Stations behind each port, whose addresses a switch learns; --generate lets the frames
    /// come from and go to each in turn
    #[arg(long, value_name = "N",
          value_parser = clap::value_parser!(u32).range(1..=i64::from(STATIONS_MAX)))]
    pub(crate) stations: Option<u32>,
    /// Send with an 802.1Q tag
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4094))]
    pub(crate) vlan: Option<u16>,
    /// Fail (exit 1) if a frame is lost, late, doubled or changed, or if none arrives
    #[arg(long)]
    pub(crate) verify: bool,
    /// Meanwhile send frames of --size for the first port into the interface NAME, at the far
    /// side of the switch's uplink, as fast as it takes them; what arrives is counted only
    #[arg(long, value_name = "NAME")]
    pub(crate) inject: Option<String>,
    /// Send every test frame back to where it came from
    #[arg(long)]
    pub(crate) echo: bool,

    /// Address of the first port; further ports count on from it [default: from the socket's path]
    #[arg(long, value_name = "MAC")]
    pub(crate) mac: Option<MacAddr>,
    /// Entries of each ring: a power of two for split rings
    #[arg(long, value_name = "N", default_value_t = 256,
          value_parser = clap::value_parser!(u16).range(2..=32768))]
    pub(crate) queue_size: u16,
    /// Bytes of a receive buffer [default: what a frame needs; with
    /// mergeable buffers 2048, or 16384 where frames may be large]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(64..=131_072))]
    pub(crate) buffer_size: Option<u32>,
    /// Descriptors of a chain
    #[arg(long, value_name = "N", default_value_t = 1,
          value_parser = clap::value_parser!(u16).range(1..=16))]
    pub(crate) descriptors: u16,
    /// Mergeable receive buffers: a back end without them is an error if `on`
    #[arg(long, value_name = "on|off", value_enum)]
    pub(crate) mrg_rxbuf: Option<Switch>,
    /// Event indexes instead of flags to suppress notifications
    #[arg(long, value_name = "on|off", value_enum)]
    pub(crate) event_idx: Option<Switch>,
    /// Put the chains' descriptors into indirect tables
    #[arg(long)]
    pub(crate) indirect: bool,
    /// Ask the back end to use buffers in order
    #[arg(long)]
    pub(crate) in_order: bool,
    /// Never sleep: poll the rings with notifications suppressed
    #[arg(long)]
    pub(crate) busy: bool,
    /// Back the guest's memory with 2 MiB pages
    #[arg(long)]
    pub(crate) hugepages: bool,
}

/// Which side of a socket we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Mode {
    /// We connect.
    Client,
    /// We listen and the back end connects.
    Server,
}

/// A feature that is wanted or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Needed.
    On,
    /// Not used even if offered.
    Off,
}

/// Why there is nothing to do: what to print and how to exit.
#[derive(Debug)]
pub(crate) enum Unparsed {
    /// Help or version was asked for.
    Text(String),
    /// Wrong use, in one line.
    Wrong(String),
}

/// Reads and checks the command line.
pub(crate) fn parse(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<Cli, Unparsed> {
    let cli = Cli::try_parse_from(arguments).map_err(|error| {
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            return Unparsed::Text(error.to_string());
        }
        Unparsed::Wrong(flat(&error.to_string()))
    })?;
    cli.check().map_err(|wrong| Unparsed::Wrong(escaped(&wrong)))?;
    Ok(cli)
}

/// clap's message in one line, without its hints on usage.
fn flat(message: &str) -> String {
    let lines = message.lines().map(str::trim).filter(|line| !line.is_empty());
    let told = lines
        .take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"))
        .map(|line| escaped(line.trim_start_matches("error: ")));
    told.collect::<Vec<_>>().join(" ")
}

/// Control characters come from paths and values that somebody else chose.
fn escaped(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) }
    }
    line
}

impl Cli {
    /// The rules that concern several options: an error says what is wrong and what is allowed.
    pub(crate) fn check(&self) -> Result<(), String> {
        self.check_jobs()?;
        if !self.packed && !self.queue_size.is_power_of_two() {
            return Err(format!(
                "--queue-size {}: a split ring has a power of two of entries",
                self.queue_size
            ));
        }
        if self.descriptors > self.queue_size {
            return Err(format!("--descriptors {}: more than --queue-size", self.descriptors));
        }
        let (size, max) = self.sizes();
        if max < size {
            return Err(format!("--size-max {max}: below --size {size}"));
        }
        let least = FRAME_MIN.saturating_add(if self.vlan.is_some() { 4 } else { 0 });
        if size < least {
            return Err(format!("--size {size}: a tagged test frame has at least {least} bytes"));
        }
        if self.tap.is_some() && self.socket.len() > 1 {
            return Err("--tap: takes exactly one --socket".into());
        }
        if self.latency && self.socket.len() > 2 {
            return Err("--latency: takes one --socket or two".into());
        }
        if self.latency && self.socket.len() == 1 && self.dst.is_none() {
            return Err("--latency: with one --socket, --dst names who echoes".into());
        }
        if self.window.is_some() && self.socket.len() < 2 {
            return Err("--window: needs a second --socket where the frames arrive".into());
        }
        if self.generate && self.verify && self.socket.len() < 2 {
            return Err("--verify: needs a second --socket where the frames arrive".into());
        }
        if self.generate && self.stations.is_some() && self.dst.is_some() {
            return Err("--stations: the second --socket has the destinations, not --dst".into());
        }
        if self.generate && self.stations.is_some() && self.socket.len() < 2 {
            return Err("--stations: needs a second --socket where the frames arrive".into());
        }
        if self.inject.is_some() && (self.echo || self.verify || self.socket.len() > 1) {
            return Err("--inject: goes with one --socket, and not with --echo or --verify".into());
        }
        if self.echo && self.verify {
            return Err("--echo: does not check frames, --verify has no effect".into());
        }
        if !matches!(self.neighbour.len(), 0 | 2) {
            return Err(format!("--neighbour: given {} times, not twice", self.neighbour.len()));
        }
        let sockets: Vec<_> = self.socket.iter().chain(&self.neighbour).collect();
        for (index, path) in sockets.iter().enumerate() {
            if sockets.iter().take(index).any(|other| other == path) {
                return Err(format!("--socket {}: given twice", path.display()));
            }
        }
        Ok(())
    }

    /// Options that would have no effect are refused.
    fn check_jobs(&self) -> Result<(), String> {
        let (tap, generate) = (self.tap.is_some(), self.generate);
        let (receive, latency) = (self.receive, self.latency);
        let rules = [
            ("--netns", self.netns.is_some(), tap, "--tap"),
            ("--offloads", self.offloads.is_some(), tap, "--tap"),
            ("--warm-up", self.warm_up.is_some(), latency, "--latency"),
            ("--neighbour", !self.neighbour.is_empty(), latency, "--latency"),
            ("--echo", self.echo, receive, "--receive"),
            ("--inject", self.inject.is_some(), receive, "--receive"),
            ("--window", self.window.is_some(), generate, "--generate"),
            ("--burst", self.burst.is_some(), generate, "--generate"),
            ("--flows", self.flows.is_some(), generate, "--generate"),
            ("--rate-pps", self.rate_pps.is_some(), generate || latency, "--generate, --latency"),
            ("--dst", self.dst.is_some(), generate || latency, "--generate, --latency"),
            ("--stations", self.stations.is_some(), generate || receive, "--generate, --receive"),
            ("--verify", self.verify, generate || receive, "--generate, --receive"),
            ("--size-max", self.size_max.is_some(), !latency, "--generate, --receive, --tap"),
            ("--count", self.count.is_some(), !tap, "--generate, --receive, --latency"),
            ("--vlan", self.vlan.is_some(), !tap, "--generate, --receive, --latency"),
        ];
        match rules.iter().find(|(_, given, fits, _)| *given && !*fits) {
            Some((option, _, _, jobs)) => Err(format!("{option}: goes with {jobs}")),
            None => Ok(()),
        }
    }

    /// The offloads of a tap.
    pub(crate) fn offloads(&self) -> Wanted {
        self.offloads.unwrap_or(Wanted::All)
    }

    /// Smallest and largest frame to send.
    pub(crate) fn sizes(&self) -> (u32, u32) {
        let size = self.size.unwrap_or(64);
        (size, self.size_max.unwrap_or(size))
    }

    /// Number of flows.
    pub(crate) fn flow_count(&self) -> u16 {
        self.flows.unwrap_or(self.queues)
    }

    /// Bytes that a receive buffer needs without mergeable buffers, header included.
    pub(crate) fn largest_frame(&self) -> u32 {
        self.sizes().1.max(1522)
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::{Cli, Unparsed};

    fn parse(args: &str) -> Result<Cli, String> {
        let words = std::iter::once("causeway-guest").chain(args.split(' '));
        super::parse(words.map(Into::into)).map_err(|unparsed| match unparsed {
            Unparsed::Text(text) => panic!("{text}"),
            Unparsed::Wrong(wrong) => {
                assert_eq!(wrong.lines().count(), 1, "{wrong}");
                wrong
            }
        })
    }

    #[test]
    fn wrong_use_is_one_line() {
        let error = parse("--generate").unwrap_err();
        assert_eq!(error, "the following required arguments were not provided: --socket <PATH>");
        let error = parse("--socket a --generate --mode sideways").unwrap_err();
        assert!(error.contains("sideways") && error.contains("client, server"), "{error}");
        let error = parse("--socket a\nb --socket a\nb --generate").unwrap_err();
        assert_eq!(error, "--socket a\\nb: given twice");
        let help = super::parse(["causeway-guest", "--help"].map(Into::into));
        assert!(matches!(help, Err(Unparsed::Text(text)) if text.lines().count() > 20));
    }

    #[test]
    fn the_definition_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn exactly_one_job() {
        assert!(parse("--socket a").is_err());
        assert!(parse("--socket a --generate --receive").is_err());
        assert!(parse("--socket a --receive --verify").is_ok());
        assert!(parse("--generate").is_err());
    }

    #[test]
    fn wrong_values_are_named() {
        let error = parse("--socket a --generate --queue-size 300").unwrap_err();
        assert!(error.contains("300") && error.contains("power of two"), "{error}");
        assert!(parse("--socket a --generate --queue-size 300 --packed").is_ok());
        let error = parse("--socket a --socket a --generate").unwrap_err();
        assert!(error.contains("twice"), "{error}");
        assert!(parse("--socket a --generate --size 60 --vlan 5").is_err());
        assert!(parse("--socket a --generate --size 59").is_err());
        assert!(parse("--socket a --generate --size 90 --size-max 80").is_err());
        for (job, option) in [
            ("--receive", "--netns x"),
            ("--receive", "--offloads on"),
            ("--generate", "--echo"),
            ("--receive", "--window 5"),
            ("--latency --dst 02:00:00:00:00:01", "--flows 2"),
            ("--receive", "--rate-pps 5"),
            ("--receive", "--warm-up 1"),
            ("--receive", "--neighbour b --neighbour c"),
            ("--tap t", "--stations 5"),
            ("--tap t", "--verify"),
            ("--tap t", "--count 5"),
        ] {
            let error = parse(&format!("--socket a {job} {option}")).unwrap_err();
            assert!(error.contains("goes with"), "{error}");
        }
        assert!(parse("--socket a --socket b --tap t0").is_err());
        assert!(parse("--socket a --generate --window 5").is_err());
        assert!(parse("--socket a --generate --verify").is_err());
        assert!(parse("--socket a --socket b --generate --verify").is_ok());
        assert!(parse("--socket a --receive --inject p0 --seconds 1").is_ok());
        assert!(parse("--socket a --receive --inject p0 --verify").is_err());
        assert!(parse("--socket a --socket b --receive --inject p0").is_err());
        assert!(parse("--socket a --receive --stations 65536").is_ok());
        assert!(parse("--socket a --receive --stations 65537").is_err());
        assert!(parse("--socket a --generate --stations 5").is_err());
        assert!(
            parse("--socket a --socket b --generate --stations 5 --dst 02:00:00:00:00:01").is_err()
        );
        assert!(parse("--socket a --latency").is_err());
        let latency = "--socket a --socket b --latency";
        assert!(parse(&format!("{latency} --neighbour c --neighbour d")).is_ok());
        assert!(parse(&format!("{latency} --neighbour c")).unwrap_err().contains("not twice"));
        assert!(parse(&format!("{latency} --neighbour c --neighbour b")).is_err());
        assert!(parse(&format!("{latency} --neighbour-size 64")).is_err());
        assert!(parse("--socket a --generate --dst 02:00").is_err());
    }
}
