//! Values that exist only if they are valid.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;

use port::OffloadSet;

/// A VLAN: 1 to 4094.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VlanId(u16);

impl VlanId {
    /// The VLAN of that number.
    pub fn new(vlan: u16) -> Option<Self> {
        (1..=4094).contains(&vlan).then_some(Self(vlan))
    }

    /// Its number.
    pub fn number(self) -> u16 {
        self.0
    }
}

impl FromStr for VlanId {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        number(text).and_then(Self::new).ok_or(())
    }
}

impl fmt::Display for VlanId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The address of one station: not a group, not zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The address made of these bytes.
    pub fn new(bytes: [u8; 6]) -> Option<Self> {
        let [first, ..] = bytes;
        (first & 1 == 0 && bytes != [0; 6]).then_some(Self(bytes))
    }

    /// Its bytes.
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for MacAddress {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2).ok_or(())?;
            let digits = part.bytes().all(|b| b.is_ascii_hexdigit());
            *byte = u8::from_str_radix(part, 16).ok().filter(|_| digits).ok_or(())?;
        }
        if parts.next().is_some() {
            return Err(());
        }
        Self::new(bytes).ok_or(())
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Who opens a vhost-user socket, seen from the switch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SocketRole {
    /// We listen.
    #[default]
    Server,
    /// We connect, again and again.
    Client,
}

impl FromStr for SocketRole {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "server" => Ok(Self::Server),
            "client" => Ok(Self::Client),
            _ => Err(()),
        }
    }
}

impl fmt::Display for SocketRole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Server => "server",
            Self::Client => "client",
        })
    }
}

/// How frames get from a driver to an `AF_XDP` socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum XdpMode {
    /// The fastest that the driver has.
    #[default]
    Auto,
    /// The device writes into our memory.
    ZeroCopy,
    /// The driver copies.
    Copy,
    /// The kernel's stack copies: any driver.
    Generic,
}

impl FromStr for XdpMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let all = [Self::Auto, Self::ZeroCopy, Self::Copy, Self::Generic];
        all.into_iter().find(|mode| mode.name() == text).ok_or(())
    }
}

impl XdpMode {
    fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::ZeroCopy => "zero-copy",
            Self::Copy => "copy",
            Self::Generic => "generic",
        }
    }
}

impl fmt::Display for XdpMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which frames an uplink takes from the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Steer {
    /// All of them.
    #[default]
    All,
    /// Those for stations behind other ports, and those for groups.
    Mac,
}

impl FromStr for Steer {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        either(text, "all", "mac").map(|mac| if mac { Self::Mac } else { Self::All }).ok_or(())
    }
}

impl fmt::Display for Steer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::Mac { "mac" } else { "all" })
    }
}

/// What a guest may leave to the switch, and the switch to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Offloads {
    /// The offloads that are offered, in both directions.
    pub set: OffloadSet,
    /// Whether segments are made into large frames for a guest that takes these.
    pub gro: bool,
}

impl Default for Offloads {
    fn default() -> Self {
        Self::ON
    }
}

impl Offloads {
    /// All of them.
    const ON: Self = Self { set: OffloadSet::ALL, gro: true };
    /// None.
    const OFF: Self = Self { set: OffloadSet::NONE, gro: false };
    /// What may be written.
    pub const ALLOWED: &str = "on, off, or some of csum, tso4, tso6, ecn, uso and gro joined with \
                               '+' (tso4, tso6 and uso need csum, ecn needs tso4 or tso6, gro \
                               needs tso4, tso6 or uso)";

    /// What may be written for an uplink, of which nobody takes large frames of our making.
    pub const ALLOWED_OF_UPLINK: &str = "on, off, or some of csum, tso4, tso6, ecn and uso joined \
                                         with '+' (tso4, tso6 and uso need csum, ecn needs tso4 \
                                         or tso6)";

    /// Those of an uplink.
    pub(crate) fn of_uplink(text: &str) -> Option<OffloadSet> {
        let some: Self = text.parse().ok()?;
        let named = text.split('+').any(|word| word == "gro");
        Some(some.set).filter(|_| !named)
    }

    /// Those of an uplink as they are written.
    pub(crate) fn uplink_text(set: OffloadSet) -> String {
        Self { set, gro: set == OffloadSet::ALL }.to_string()
    }

    fn parts(&mut self) -> [(&'static str, &mut bool); 6] {
        let Self { set: OffloadSet { csum, tso4, tso6, ecn, uso }, gro } = self;
        [("csum", csum), ("tso4", tso4), ("tso6", tso6), ("ecn", ecn), ("uso", uso), ("gro", gro)]
    }
}

impl FromStr for Offloads {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "on" => return Ok(Self::ON),
            "off" => return Ok(Self::OFF),
            _ => {}
        }
        let mut some = Self::OFF;
        for word in text.split('+') {
            let mut parts = some.parts().into_iter();
            let (_, on) = parts.find(|(name, on)| *name == word && !**on).ok_or(())?;
            *on = true;
        }
        let Self { set: OffloadSet { csum, tso4, tso6, ecn, uso }, gro } = some;
        let (tso, large) = (tso4 || tso6, tso4 || tso6 || uso);
        let complete = (csum || !large) && (tso || !ecn) && (large || !gro);
        complete.then_some(some).ok_or(())
    }
}

impl fmt::Display for Offloads {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::ON => f.write_str("on"),
            Self::OFF => f.write_str("off"),
            mut some => {
                let parts = some.parts().into_iter();
                let names: Vec<_> = parts.filter(|(_, on)| **on).map(|(name, _)| name).collect();
                f.write_str(&names.join("+"))
            }
        }
    }
}

/// Permission bits of a socket file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketMode(pub u32);

impl Default for SocketMode {
    fn default() -> Self {
        Self(0o660)
    }
}

impl FromStr for SocketMode {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        let digits = text.strip_prefix("0o").unwrap_or(text);
        let octal = !digits.is_empty() && digits.bytes().all(|b| matches!(b, b'0'..=b'7'));
        let mode = u32::from_str_radix(digits, 8).ok().filter(|m| octal && *m <= 0o777);
        mode.map(Self).ok_or(())
    }
}

impl fmt::Display for SocketMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// Where queues are worked on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Workers {
    /// One worker on each of these CPUs.
    Cpus(Vec<u16>),
    /// One worker for each queue pair, not pinned.
    PerQueue,
}

impl FromStr for Workers {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "per-queue" {
            return Ok(Self::PerQueue);
        }
        let mut cpus = Vec::new();
        for part in text.split([',', '+']) {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (first, last): (u16, u16) =
                (number(first).ok_or(())?, number(last).filter(|n| *n < 4096).ok_or(())?);
            if first > last {
                return Err(());
            }
            cpus.extend(first..=last);
        }
        let count = cpus.len();
        cpus.sort_unstable();
        cpus.dedup();
        if cpus.len() == count { Ok(Self::Cpus(cpus)) } else { Err(()) }
    }
}

impl fmt::Display for Workers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PerQueue => f.write_str("per-queue"),
            Self::Cpus(cpus) => f.write_str(&joined(cpus, ",")),
        }
    }
}

/// Where state is kept for a successor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StateDir {
    /// Nowhere.
    Off,
    /// In this directory.
    At(PathBuf),
}

impl FromStr for StateDir {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "" => Err(()),
            "off" => Ok(Self::Off),
            path => Ok(Self::At(PathBuf::from(path))),
        }
    }
}

impl fmt::Display for StateDir {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::At(path) => write!(f, "{}", path.display()),
        }
    }
}

/// How workers wait for frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Poll {
    /// Spin while work arrives, sleep when it stays away.
    #[default]
    Adaptive,
    /// Never sleep.
    Busy,
    /// Never spin.
    Interrupt,
}

impl FromStr for Poll {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "adaptive" => Ok(Self::Adaptive),
            "busy" => Ok(Self::Busy),
            "interrupt" => Ok(Self::Interrupt),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Poll {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Adaptive => "adaptive",
            Self::Busy => "busy",
            Self::Interrupt => "interrupt",
        })
    }
}

/// A decimal number without sign.
pub(crate) fn number<T: FromStr>(text: &str) -> Option<T> {
    let digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    if digits { text.parse().ok() } else { None }
}

/// A decimal number between two bounds.
pub(crate) fn between<T: FromStr + PartialOrd + Copy>(text: &str, low: T, high: T) -> Option<T> {
    number(text).filter(|n| *n >= low && *n <= high)
}

/// A decimal number above 0 and up to `high` with at most three decimals, in thousandths.
pub(crate) fn thousandths(text: &str, high: u64) -> Option<u64> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, "0"));
    let scale = match decimals.len() {
        1 => 100,
        2 => 10,
        3 => 1,
        _ => return None,
    };
    let whole: u64 = between(whole, 0, high)?;
    let digits = decimals.bytes().all(|digit| digit.is_ascii_digit());
    let part = decimals.parse::<u64>().ok().filter(|_| digits)?.checked_mul(scale)?;
    let all = whole.checked_mul(1000)?.checked_add(part)?;
    (all > 0 && all <= high.checked_mul(1000)?).then_some(all)
}

/// As [`thousandths`] takes it.
pub(crate) fn show_thousandths(all: u64) -> String {
    let text = format!("{}.{:03}", all / 1000, all % 1000);
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `on` or `off`.
pub(crate) fn switch(text: &str) -> Option<bool> {
    either(text, "off", "on")
}

/// Whether `text` is the second of two words; none if it is neither.
pub(crate) fn either(text: &str, no: &str, yes: &str) -> Option<bool> {
    (text == no || text == yes).then_some(text == yes)
}

/// An address with a TCP port; a port alone is one of this host only.
pub(crate) fn address(text: &str) -> Option<SocketAddr> {
    match number::<u16>(text) {
        Some(port) => Some((Ipv4Addr::LOCALHOST, port).into()),
        None => text.parse().ok(),
    }
}

pub(crate) fn joined<T: fmt::Display>(items: &[T], by: &str) -> String {
    items.iter().map(T::to_string).collect::<Vec<_>>().join(by)
}

#[cfg(test)]
mod tests {
    use super::{MacAddress, Offloads, SocketMode, VlanId, Workers, address};

    #[test]
    fn only_valid_values_exist() {
        for bad in ["0", "4095", "", "+1", "x", "70000"] {
            assert!(bad.parse::<VlanId>().is_err(), "{bad}");
        }
        for bad in ["", "02:00:00:00:00", "01:00:5e:00:00:01", "00:00:00:00:00:00", "2:0:0:0:0:1"] {
            assert!(bad.parse::<MacAddress>().is_err(), "{bad}");
        }
        for bad in ["", "0888", "1777", "-1", "+1"] {
            assert!(bad.parse::<SocketMode>().is_err(), "{bad}");
        }
        for bad in ["", ":9101", "65536", "localhost:1", "1.2.3.4", "::1:1", "*:1"] {
            assert!(address(bad).is_none(), "{bad}");
        }
        for bad in ["", ",", "1,1", "3-1", "a", "1-", "0-70000"] {
            assert!(bad.parse::<Workers>().is_err(), "{bad}");
        }
    }

    #[test]
    fn offloads_come_with_those_that_they_need() {
        for bad in
            ["", "csum+", "tso4", "uso", "csum+ecn", "csum+csum", "csum,tso4", "csum+gro", "On"]
        {
            assert!(bad.parse::<Offloads>().is_err(), "{bad}");
        }
        for good in ["on", "off", "csum", "csum+tso4", "csum+tso6+ecn", "csum+uso+gro"] {
            assert_eq!(good.parse::<Offloads>().unwrap().to_string(), good);
        }
        let all: Offloads = "gro+uso+ecn+tso6+tso4+csum".parse().unwrap();
        assert_eq!(all, Offloads::default());
    }

    #[test]
    fn texts_are_read_as_people_write_them() {
        assert_eq!("0-2,5".parse(), Ok(Workers::Cpus(vec![0, 1, 2, 5])));
        assert_eq!("0o660".parse(), Ok(SocketMode(0o660)));
        assert_eq!("660".parse(), Ok(SocketMode(0o660)));
        assert_eq!(address("9101").unwrap().to_string(), "127.0.0.1:9101");
        assert_eq!(address("[::1]:9101").unwrap().to_string(), "[::1]:9101");
        assert!(address("0.0.0.0:0").unwrap().ip().is_unspecified());
        let mac: MacAddress = "02:AB:00:00:00:01".parse().unwrap();
        assert_eq!(mac.to_string(), "02:ab:00:00:00:01");
    }
}
