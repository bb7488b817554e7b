//! What both uses of DPDK's testpmd share: its prompt, and the cycles that it counts.

use std::time::Duration;

use anyhow::Result;

use crate::process::Process;

const PROMPT: &str = "testpmd> ";
const START_TIMEOUT: Duration = Duration::from_secs(40);
const COMMAND_TIMEOUT: Duration = Duration::from_secs(20);

/// What testpmd spent on the frames that it forwarded, if it was told to count
/// (`set record-core-cycles on`). Polls that found nothing are not in it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cycles {
    /// Cycles of the time stamp counter for one received frame.
    pub per_frame: f64,
    /// The frequency of that counter.
    pub mhz: f64,
}

/// What testpmd says when it stops to forward.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Forwarded {
    /// If it counted them, and there were frames.
    pub cycles: Option<Cycles>,
    /// Frames that it could not send on, because the next queue was full.
    pub dropped: u64,
}

/// The `-d` options that load what `devices` need (each as `--vdev` takes it) besides the drivers
/// that [`crate::Environment::testpmd`] loads.
#[must_use]
pub fn drivers(devices: &[String]) -> Vec<String> {
    let more = ["net_af_packet", "net_af_xdp"].iter();
    let needed = more.filter(|driver| devices.iter().any(|device| device.starts_with(**driver)));
    needed.flat_map(|driver| ["-d".to_owned(), format!("librte_{driver}.so.23")]).collect()
}

/// Waits for the first prompt and returns what came before it.
///
/// # Errors
/// testpmd ends, or is not ready in time.
pub fn wait_prompt(process: &mut Process) -> Result<String> {
    process.wait_for("the prompt", 0, START_TIMEOUT, up_to_prompt)
}

/// Runs one command and returns what it prints.
///
/// # Errors
/// The prompt does not come back.
pub fn command(process: &mut Process, line: &str) -> Result<String> {
    let from = process.log_end()?;
    process.send(line)?;
    let what = format!("the prompt after `{line}`");
    process.wait_for(&what, from, COMMAND_TIMEOUT, up_to_prompt)
}

fn up_to_prompt(text: &str) -> Option<String> {
    text.contains(PROMPT).then(|| text.to_owned())
}

/// Reads what `stop` says.
#[must_use]
pub fn parse_forwarded(shown: &str) -> Forwarded {
    // The last line is the sum of all ports.
    let dropped = shown.lines().rev().find_map(|line| number(line, "TX-dropped:"));
    Forwarded { cycles: parse_cycles(shown), dropped: dropped.unwrap_or_default() }
}

/// Reads `stop`'s "CPU cycles/packet=85.12 (total cycles=... / ...) at 2300 MHz Clock".
fn parse_cycles(shown: &str) -> Option<Cycles> {
    let (_, rest) = shown.split_once("CPU cycles/packet=")?;
    let line = rest.lines().next()?;
    let per_frame = line.split(' ').next()?.parse().ok()?;
    let (_, clock) = line.rsplit_once(" at ")?;
    let mhz = clock.split(' ').next()?.parse().ok()?;
    Some(Cycles { per_frame, mhz })
}

/// Reads the received frames per second of each port from `show port stats all`.
#[must_use]
pub fn parse_rates(shown: &str) -> Vec<u64> {
    shown.lines().filter_map(|line| number(line, "Rx-pps:")).collect()
}

/// The number that stands behind `name`.
pub(crate) fn number(line: &str, name: &str) -> Option<u64> {
    let (_, rest) = line.split_once(name)?;
    rest.split_whitespace().next()?.parse().ok()
}

/// Reads DPDK's version from the log of a testpmd that was started with `-v`.
#[must_use]
pub fn parse_version(log: &str) -> Option<String> {
    let (_, rest) = log.split_once("RTE Version: '")?;
    Some(rest.split_once('\'')?.0.to_owned())
}

/// The `set txpkts` of frames of this size: no part is larger than testpmd's usual buffers.
pub(crate) fn parts(size: usize) -> String {
    let (whole, rest) = (size.div_euclid(PART), size.rem_euclid(PART));
    let mut parts = vec![PART.to_string(); whole];
    if rest > 0 {
        parts.push(rest.to_string());
    }
    parts.join(",")
}

const PART: usize = 2000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cycles_are_read_from_the_last_words_of_stop() {
        let shown = "Telling cores to stop...\n\n  CPU cycles/packet=85.12 (total cycles=8512 / \
                     total RX packets=100) at 2300 MHz Clock\n\nDone.\n";
        assert_eq!(parse_cycles(shown), Some(Cycles { per_frame: 85.12, mhz: 2300.0 }));
        assert_eq!(parse_cycles("Packet forwarding not started\n"), None);
    }

    #[test]
    fn only_the_drivers_of_uplinks_are_named() {
        let devices = ["net_vhost0,iface=v0", "net_af_xdp1,iface=u"].map(str::to_owned);
        assert_eq!(drivers(&devices), ["-d", "librte_net_af_xdp.so.23"]);
        assert!(drivers(&devices[..1]).is_empty());
    }

    #[test]
    fn drops_are_those_of_all_ports() {
        let shown = "  RX-packets: 9  RX-dropped: 0  RX-total: 9\n\
                     \x20 TX-packets: 9  TX-dropped: 3  TX-total: 12\n\
                     \x20 +++ Accumulated forward statistics for all ports+++\n\
                     \x20 TX-packets: 18  TX-dropped: 7  TX-total: 25\n";
        assert_eq!(parse_forwarded(shown), Forwarded { cycles: None, dropped: 7 });
    }

    #[test]
    fn rates_are_read_port_by_port() {
        let shown = "  Rx-pps:     15100000          Rx-bps:   7731200000\n\
                     \x20 Tx-pps:           15          Tx-bps:            1\n\
                     \n  Rx-pps:            7          Rx-bps:            0\n";
        assert_eq!(parse_rates(shown), [15_100_000, 7]);
    }

    #[test]
    fn the_version_stands_between_quotes() {
        let log = "EAL: Detected CPU lcores: 2\nEAL: RTE Version: 'DPDK 22.11.11'\nEAL: more\n";
        assert_eq!(parse_version(log).unwrap(), "DPDK 22.11.11");
        assert_eq!(parse_version("EAL: none\n"), None);
    }

    #[test]
    fn large_frames_lie_in_several_buffers() {
        assert_eq!(parts(64), "64");
        assert_eq!(parts(4000), "2000,2000");
        assert_eq!(parts(9000), "2000,2000,2000,2000,1000");
    }
}
