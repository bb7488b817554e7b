//! The command line: a contract with scripts.

use std::path::PathBuf;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use control::spec::one_line;
use control::{PortSpec, SwitchSettings};

/// The Causeway virtual switch.
#[derive(Debug, Parser)]
#[command(name = "causeway", version, infer_subcommands = false)]
pub(crate) struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a switch
    Run(RunArgs),
    /// Ask or change a running switch
    Ctl(CtlArgs),
    /// Two guests inside this process talk through a switch
    Demo,
}

/// Options of `causeway run`.
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// Configuration file (TOML); SIGHUP and `ctl reload` read it again
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// A port: KIND:key=value,key=value with KIND vhost-user, tap, af-xdp or packet-mmap (keys: see
    /// README, Ports); may stand many times
    #[arg(long = "port", value_name = "SPEC", value_parser = port_spec)]
    pub(crate) ports: Vec<PortSpec>,
    /// CPUs of the workers (0,1 or 0-3), or per-queue
    #[arg(long, value_name = "LIST", value_parser = |text: &str| switch_key("workers", text))]
    pub(crate) workers: Option<String>,
    /// How workers wait: adaptive, busy or interrupt
    #[arg(long, value_name = "HOW", value_parser = |text: &str| switch_key("poll", text))]
    pub(crate) poll: Option<String>,
    /// Microseconds that an adaptive worker spins without work
    #[arg(long, value_name = "N", value_parser = |text: &str| switch_key("poll-us", text))]
    pub(crate) poll_us: Option<String>,
    /// Move queue pairs from busy workers to idle ones: every so many seconds, or off
    #[arg(long, value_name = "SECONDS", value_parser = |text: &str| switch_key("rebalance", text))]
    pub(crate) rebalance: Option<String>,
    /// Control socket
    #[arg(long, value_name = "SOCKET", value_parser = |text: &str| switch_key("control", text))]
    pub(crate) control: Option<String>,
    /// Where ring positions are kept, so that guests survive a crash of the switch; or off
    #[arg(long, value_name = "DIR", value_parser = |text: &str| switch_key("state-dir", text))]
    pub(crate) state_dir: Option<String>,
    /// Serve metrics to scrapers: a TCP port of 127.0.0.1, or ADDRESS:PORT
    #[arg(long, value_name = "ADDR", value_parser = |text: &str| switch_key("metrics", text))]
    pub(crate) metrics: Option<String>,
    /// Give up what the ports do not need: capabilities, system calls, files
    #[arg(long, value_enum, default_value = "on", value_name = "on|off")]
    pub(crate) sandbox: Switched,
    /// A directory in which sockets of ports may come and go later; may stand many times
    #[arg(long = "allow-dir", value_name = "DIR")]
    pub(crate) allow_dirs: Vec<PathBuf>,
    /// A kind of ports that may come later: tap, af-xdp, packet-mmap, or netns for namespaces of
    /// such ports; may stand many times
    #[arg(long = "allow-kind", value_name = "KIND",
          value_parser = ["tap", "af-xdp", "packet-mmap", "netns"])]
    pub(crate) allow_kinds: Vec<String>,
    /// Go on with everything of the switch whose control socket is SOCKET, which then ends; with
    /// its own ports if neither --config nor --port is given
    #[arg(long, value_name = "SOCKET")]
    pub(crate) take_over: Option<PathBuf>,
    /// What is logged to standard error
    #[arg(long, value_enum, default_value = "info")]
    pub(crate) log: LogLevel,
}

impl RunArgs {
    /// The settings of a file with the options over them.
    pub(crate) fn over(&self, file: &SwitchSettings) -> Result<SwitchSettings, String> {
        let mut settings = file.clone();
        let options = [
            ("workers", &self.workers),
            ("poll", &self.poll),
            ("poll-us", &self.poll_us),
            ("rebalance", &self.rebalance),
            ("control", &self.control),
            ("state-dir", &self.state_dir),
            ("metrics", &self.metrics),
        ];
        for (key, value) in options {
            if let Some(value) = value {
                settings.set(key, value).map_err(|error| error.to_string())?;
            }
        }
        Ok(settings)
    }
}

/// On or off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switched {
    On,
    Off,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// Options of `causeway ctl`.
#[derive(Debug, Args)]
pub(crate) struct CtlArgs {
    /// Control socket of the switch
    #[arg(long, global = true, value_name = "SOCKET")]
    pub(crate) control: Option<PathBuf>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// What to ask.
    #[command(subcommand)]
    pub(crate) command: CtlCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum CtlCommand {
    /// States of the ports, and why
    Ports,
    /// Counters
    Stats,
    /// Where time goes: rates of workers and ports, again and again
    Top(TopArgs),
    /// Everything that is counted, as text for Prometheus
    Metrics,
    /// The forwarding table
    Fdb {
        #[command(subcommand)]
        command: Option<FdbCommand>,
    },
    /// Version of the running switch
    Version,
    /// Add, remove or reset a port
    Port {
        #[command(subcommand)]
        command: PortCommand,
    },
    /// Read the configuration file again and apply the difference
    Reload,
    /// See what passes a port, as lines or as a pcapng file
    Capture(CaptureArgs),
}

/// Options of `causeway ctl capture`.
#[derive(Debug, Args)]
pub(crate) struct CaptureArgs {
    /// The port
    pub(crate) port: String,
    /// Write pcapng to this file, or - for standard output; without it, a line for each frame
    #[arg(short, long, value_name = "FILE|-")]
    pub(crate) write: Option<PathBuf>,
    /// End after so many frames
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
    /// Only these frames, for example "arp or (ip and host 10.0.0.1)"
    #[arg(long, value_name = "EXPRESSION")]
    pub(crate) filter: Option<String>,
    /// Frames that were dropped at this port too, with the reason
    #[arg(long)]
    pub(crate) drops: bool,
    /// At most so many bytes of each frame
    #[arg(short, long, value_name = "BYTES")]
    pub(crate) snaplen: Option<u32>,
}

/// Options of `causeway ctl top`.
#[derive(Debug, Args)]
pub(crate) struct TopArgs {
    /// One view, over one interval
    #[arg(long)]
    pub(crate) once: bool,
    /// Seconds between two looks
    #[arg(long, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    pub(crate) interval: Duration,
}

#[derive(Debug, Subcommand)]
pub(crate) enum FdbCommand {
    /// Forget all learned addresses
    Flush,
}

#[derive(Debug, Subcommand)]
pub(crate) enum PortCommand {
    /// Add a port
    Add {
        /// KIND:key=value,key=value with KIND vhost-user, tap, af-xdp or packet-mmap (keys: see
        /// README, Ports)
        #[arg(value_parser = |text: &str| port_spec(text).map(Box::new))]
        spec: Box<PortSpec>,
    },
    /// Remove a port
    Del {
        /// Its name
        name: String,
    },
    /// Take a broken or quarantined port back into service
    Reset {
        /// Its name
        name: String,
    },
}

/// Why the command line was not understood: what to print and how to exit.
#[derive(Debug)]
pub(crate) enum Unparsed {
    /// Help or version was asked for.
    Text(String),
    /// Wrong use, in one line.
    Wrong(String),
}

/// Reads the command line.
pub(crate) fn parse(
    arguments: impl IntoIterator<Item = std::ffi::OsString>,
) -> Result<Cli, Unparsed> {
    Cli::try_parse_from(arguments).map_err(|error| {
        let kind = error.kind();
        if matches!(kind, ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            return Unparsed::Text(error.to_string());
        }
        if kind == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            let help = error.to_string();
            let usage = help.lines().find(|line| line.starts_with("Usage:")).unwrap_or_default();
            return Unparsed::Wrong(format!("a subcommand is missing; {usage}; see --help"));
        }
        Unparsed::Wrong(flat(&error.to_string()))
    })
}

/// clap's message in one line, without its hints on usage.
fn flat(message: &str) -> String {
    let mut parts: Vec<String> = Vec::new();
    for line in message.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line.starts_with("Usage:") || line.starts_with("For more information") {
            break;
        }
        parts.push(one_line(line.trim_start_matches("error: ")));
    }
    parts.join(" ")
}

fn interval(text: &str) -> Result<Duration, String> {
    let seconds: Option<f64> = text.parse().ok();
    let allowed = seconds.filter(|seconds| (0.1..=3600.0).contains(seconds));
    allowed
        .map(Duration::from_secs_f64)
        .ok_or_else(|| "0.1 to 3600 seconds are possible".to_owned())
}

fn port_spec(text: &str) -> Result<PortSpec, String> {
    text.parse::<PortSpec>().map_err(|error| error.to_string())
}

fn switch_key(key: &str, text: &str) -> Result<String, String> {
    let set = SwitchSettings::default().set(key, text);
    set.map(|()| text.to_owned()).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::{Cli, Command, CtlCommand, Unparsed, parse};

    fn cli(line: &str) -> Result<Cli, Unparsed> {
        parse(line.split(' ').map(Into::into))
    }

    fn wrong(line: &str) -> String {
        match cli(line) {
            Err(Unparsed::Wrong(text)) => text,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn help_names_every_kind_of_port() {
        for line in ["causeway run --help", "causeway ctl port add --help"] {
            let Err(Unparsed::Text(text)) = cli(line) else { panic!("{line}") };
            for kind in control::spec::KINDS {
                assert!(text.contains(kind), "{line}: no {kind}");
            }
        }
    }

    #[test]
    fn options_of_ctl_stand_before_and_after() {
        for line in [
            "causeway ctl --json --control /s stats",
            "causeway ctl stats --control /s --json",
            "causeway ctl --control /s stats --json",
        ] {
            let Ok(Cli { command: Command::Ctl(ctl) }) = cli(line) else { panic!("{line}") };
            assert!(ctl.json && matches!(ctl.command, CtlCommand::Stats));
            assert_eq!(ctl.control.unwrap().to_str(), Some("/s"));
        }
        assert!(cli("causeway ctl port add tap:name=a,ifname=t --json").is_ok());
        assert!(cli("causeway ctl fdb flush --control /s").is_ok());
        assert!(cli("causeway ctl top --once --json --interval 0.1").is_ok());
    }

    #[test]
    fn wrong_use_is_one_line_that_says_what_is_right() {
        assert_eq!(
            wrong("causeway run --poll lazy"),
            "invalid value 'lazy' for '--poll <HOW>': poll=lazy is not allowed: poll is adaptive, \
             busy or interrupt"
        );
        assert_eq!(
            wrong("causeway run --port tap:name=a"),
            "invalid value 'tap:name=a' for '--port <SPEC>': tap needs ifname=INTERFACE"
        );
        assert_eq!(
            wrong("causeway run --log loud"),
            "invalid value 'loud' for '--log <LOG>' [possible values: off, error, warn, info, \
             debug, trace]"
        );
        for bad in ["0", "-1", "nan", "inf", "3601", "1s"] {
            let text = wrong(&format!("causeway ctl top --interval={bad}"));
            assert!(text.ends_with("0.1 to 3600 seconds are possible"), "{text}");
        }
        let text = wrong("causeway run --state-dir=");
        assert!(text.contains("state-dir is a directory, or off"), "{text}");
        assert!(wrong("causeway run --metrics :1").contains("metrics is a TCP port as 9101"));
        assert!(wrong("causeway run --sandbox maybe").contains("[possible values: on, off]"));
        assert!(wrong("causeway").starts_with("a subcommand is missing"));
        assert!(wrong("causeway ctl stat").contains("stats"));
        assert!(!wrong("causeway ctl port add").contains('\n'));
    }
}
