//! The device's state as a stream: what is known of a guest beyond its rings, on its way to the
//! switch that it moves to (`DEVICE_STATE`).
//!
//! ```text
//!  0   magic "CSWYPORT"     │ version 4 │ bytes of the whole 4 │ stations 4 │ flows 4 │
//!  24  frames and bytes from the guest, frames and bytes to it, drops: 5 x 8           │
//!  64  stations: MAC 6, VLAN 2, seconds since it was seen 4                            │
//!      flows:    hash 4, pair 2, zero 2, milliseconds since it was noted 4             │
//! ```
//!
//! Numbers are little endian. All lengths follow from the header, so that what is cut off, or goes
//! on where it should end, is seen. A later version has another number, and is refused by this one.
//!
//! **Trust.** A stream comes from a front end and may hold anything. What it says is bounded and
//! well-formed here; whether the port may have it is the switch's matter ([`port::Fabric`]).
//! **Limits.** [`STREAM_MAX`] bytes, [`FLOWS_MAX`] flows: who has more stations leaves those out
//! that were silent the longest.

use packet::{MacAddr, VlanId};
use port::{FlowPlace, PortSnapshot, PortTotals, Station};

/// The most bytes of a stream: some 87,000 stations.
pub const STREAM_MAX: usize = 1 << 20;
/// The most flows of a port: what its steering table holds.
pub const FLOWS_MAX: usize = 4096;
/// The version that is written, and the only one that is read.
pub const VERSION: u32 = 1;

const MAGIC: [u8; 8] = *b"CSWYPORT";
const HEADER: usize = 64;
const ENTRY: usize = 12;

/// Why a stream is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than a header has.
    #[error("the state has {0} bytes, its header alone has {HEADER}")]
    Short(usize),
    /// Somebody else's.
    #[error("the state begins with {0:02x?}: no Causeway wrote it")]
    Foreign([u8; 8]),
    /// A version that this program does not know.
    #[error("the state is of version {0}, this Causeway reads version {VERSION}")]
    Version(u32),
    /// Another length than its header says.
    #[error("the state has {bytes} bytes, its header says {said}")]
    Length {
        /// Bytes that came.
        bytes: usize,
        /// Bytes that the header says.
        said: u32,
    },
    /// Other counts than fit the length.
    #[error(
        "the state says {stations} stations and {flows} flows (at most {FLOWS_MAX}), which \
         {bytes} bytes do not hold"
    )]
    Counts {
        /// Stations.
        stations: u32,
        /// Flows.
        flows: u32,
        /// Bytes.
        bytes: usize,
    },
    /// A station that cannot be.
    #[error("station {index} of the state is {mac} in VLAN {vlan}, which no station can be")]
    Station {
        /// Which one.
        index: usize,
        /// Its address.
        mac: MacAddr,
        /// Its VLAN.
        vlan: u16,
    },
    /// Bytes without a meaning that are not zero.
    #[error("flow {index} of the state has {reserved:#x} where zeros belong")]
    Reserved {
        /// Which flow.
        index: usize,
        /// What is there.
        reserved: u16,
    },
}

/// The stream of a snapshot, within the limits.
pub fn encode(snapshot: &PortSnapshot) -> Vec<u8> {
    let flows = snapshot.flows.get(..FLOWS_MAX).unwrap_or(&snapshot.flows);
    let of_flows = flows.len().saturating_mul(ENTRY).saturating_add(HEADER);
    let room = STREAM_MAX.saturating_sub(of_flows).div_euclid(ENTRY);
    let stations = snapshot.stations.get(..room).unwrap_or(&snapshot.stations);
    let bytes = stations.len().saturating_mul(ENTRY).saturating_add(of_flows);
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX).to_le_bytes();

    let mut stream = Vec::with_capacity(bytes);
    stream.extend(MAGIC);
    stream.extend(VERSION.to_le_bytes());
    stream.extend([count(bytes), count(stations.len()), count(flows.len())].as_flattened());
    for number in snapshot.totals.to_array() {
        stream.extend(number.to_le_bytes());
    }
    for station in stations {
        stream.extend(station.mac.0);
        stream.extend(station.vlan.get().to_le_bytes());
        stream.extend(station.age_secs.to_le_bytes());
    }
    for flow in flows {
        stream.extend(flow.hash.to_le_bytes());
        stream.extend(flow.pair.to_le_bytes());
        stream.extend([0; 2]);
        stream.extend(flow.age_ms.to_le_bytes());
    }
    stream
}

/// What a stream says.
///
/// # Errors
///
/// [`FormatError`] if it is not one that [`encode`] writes.
pub fn decode(stream: &[u8]) -> Result<PortSnapshot, FormatError> {
    let bytes = stream.len();
    let Some((header, entries)) = stream.split_first_chunk::<HEADER>() else {
        return Err(FormatError::Short(bytes));
    };
    let magic = header.first_chunk().copied().unwrap_or_default();
    if magic != MAGIC {
        return Err(FormatError::Foreign(magic));
    }
    let (version, said) = (u32_at(header, 8), u32_at(header, 12));
    if version != VERSION {
        return Err(FormatError::Version(version));
    }
    if u32::try_from(bytes) != Ok(said) {
        return Err(FormatError::Length { bytes, said });
    }
    let (stations, flows) = (u32_at(header, 16), u32_at(header, 20));
    let size = |count: u32| usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(ENTRY);
    let whole = size(stations).saturating_add(size(flows)) == entries.len();
    let few = size(flows) <= FLOWS_MAX.saturating_mul(ENTRY);
    let Some((of_stations, of_flows)) =
        entries.split_at_checked(size(stations)).filter(|_| whole && few)
    else {
        return Err(FormatError::Counts { stations, flows, bytes });
    };
    let of_stations = of_stations.as_chunks().0.iter().enumerate();
    let of_flows = of_flows.as_chunks().0.iter().enumerate();
    let numbers = header.as_chunks().0;
    let number = |n: usize| numbers.get(n).map_or(0, |bytes| u64::from_le_bytes(*bytes));
    Ok(PortSnapshot {
        stations: of_stations.map(station).collect::<Result<_, _>>()?,
        flows: of_flows.map(flow).collect::<Result<_, _>>()?,
        totals: PortTotals::from_array([3, 4, 5, 6, 7].map(number)),
    })
}

fn station((index, entry): (usize, &[u8; ENTRY])) -> Result<Station, FormatError> {
    let [a, b, c, d, e, f, low, high, age @ ..] = *entry;
    let (mac, vlan) = (MacAddr([a, b, c, d, e, f]), u16::from_le_bytes([low, high]));
    match VlanId::new(vlan) {
        Some(vlan) if !mac.is_group() && mac != MacAddr::ZERO => {
            Ok(Station { vlan, mac, age_secs: u32::from_le_bytes(age) })
        }
        _ => Err(FormatError::Station { index, mac, vlan }),
    }
}

fn flow((index, entry): (usize, &[u8; ENTRY])) -> Result<FlowPlace, FormatError> {
    let [h0, h1, h2, h3, p0, p1, r0, r1, age @ ..] = *entry;
    let reserved = u16::from_le_bytes([r0, r1]);
    if reserved != 0 {
        return Err(FormatError::Reserved { index, reserved });
    }
    Ok(FlowPlace {
        hash: u32::from_le_bytes([h0, h1, h2, h3]),
        pair: u16::from_le_bytes([p0, p1]),
        age_ms: u32::from_le_bytes(age),
    })
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let field = bytes.get(at..).and_then(|bytes| bytes.first_chunk());
    u32::from_le_bytes(field.copied().unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> PortSnapshot {
        let station = |n: u8| Station {
            vlan: VlanId::new(u16::from(n)).unwrap(),
            mac: MacAddr([2, 0, 0, 0, 0, n]),
            age_secs: 7,
        };
        let totals =
            PortTotals { rx_frames: 1, rx_bytes: 1 << 40, tx_frames: 3, tx_bytes: 4, drops: 5 };
        PortSnapshot {
            stations: (0..3).map(station).collect(),
            flows: vec![FlowPlace { hash: 0x1234_5678, pair: 1, age_ms: 20 }],
            totals,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        for snapshot in [snapshot(), PortSnapshot::default()] {
            assert_eq!(decode(&encode(&snapshot)), Ok(snapshot));
        }
    }

    /// The format of version 1, once and for all: another one has another number.
    #[test]
    fn version_1_is_these_bytes() {
        let stream = encode(&snapshot());
        assert_eq!(stream.len(), 64 + 4 * 12);
        assert_eq!(stream[..24], *b"CSWYPORT\x01\0\0\0\x70\0\0\0\x03\0\0\0\x01\0\0\0");
        assert_eq!(stream[32..40], (1u64 << 40).to_le_bytes());
        assert_eq!(stream[76..88], [2, 0, 0, 0, 0, 1, 1, 0, 7, 0, 0, 0]);
        assert_eq!(stream[100..], [0x78, 0x56, 0x34, 0x12, 1, 0, 0, 0, 20, 0, 0, 0]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        type Change = fn(&mut Vec<u8>);
        let cases: [(&str, Change); 10] = [
            ("the state has 63 bytes, its header alone has 64", |s| s.truncate(63)),
            ("no Causeway wrote it", |s| s[0] = b'X'),
            ("the state is of version 2, this Causeway reads version 1", |s| s[8] = 2),
            ("the state is of version 0,", |s| s[8] = 0),
            ("the state has 111 bytes, its header says 112", |s| s.truncate(111)),
            ("the state has 113 bytes, its header says 112", |s| s.push(0)),
            ("4 stations and 1 flows (at most 4096), which 112 bytes do not hold", |s| s[16] = 4),
            ("3 stations and 4294967041 flows", |s| s[21..24].fill(0xff)),
            ("station 1 of the state is 03:00:00:00:00:01 in VLAN 1", |s| s[76] = 3),
            ("flow 0 of the state has 0x100 where zeros belong", |s| s[107] = 1),
        ];
        for (text, change) in cases {
            let mut stream = encode(&snapshot());
            change(&mut stream);
            let error = decode(&stream).unwrap_err().to_string();
            assert!(error.contains(text), "{error}: not {text}");
        }
    }

    #[test]
    fn a_database_that_is_too_large_loses_those_that_were_silent_longest() {
        let station = |n: u32| Station {
            vlan: VlanId::NONE,
            mac: MacAddr::from_u64(0x0200_0000_0000 | u64::from(n)),
            age_secs: n,
        };
        let flow = |hash| FlowPlace { hash, pair: 0, age_ms: 0 };
        let all = PortSnapshot {
            stations: (0..100_000).map(station).collect(),
            flows: (0..5000).map(flow).collect(),
            totals: PortTotals::default(),
        };
        let stream = encode(&all);
        assert!(stream.len() <= STREAM_MAX && stream.len() > STREAM_MAX - ENTRY);
        let read = decode(&stream).unwrap();
        assert_eq!(read.flows, all.flows[..FLOWS_MAX]);
        assert_eq!(read.stations, all.stations[..read.stations.len()]);
    }

    #[test]
    fn no_bytes_make_it_panic() {
        let stream = encode(&snapshot());
        for at in 0..stream.len() {
            for bit in 0..8 {
                let mut stream = stream.clone();
                stream[at] ^= 1 << bit;
                if let Ok(read) = decode(&stream) {
                    assert_eq!(encode(&read), stream);
                }
            }
            assert!(decode(&stream[..at]).is_err());
        }
    }
}
