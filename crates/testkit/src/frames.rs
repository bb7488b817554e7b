//! Frames that say who sent them and what they should contain.
//!
//! ```text
//!  dst 6 │ src 6 │ [tag 4] │ 88b5 │ id 8 │ length 4 │ sum 8 │ bytes that follow from the id …
//! ```

use packet::MacAddr;

use crate::Rng;

/// `EtherType` for local experiments (IEEE 802, 88b5).
const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// Bytes of id, length and sum.
const STAMP: usize = 20;

/// A frame to be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TestFrame {
    /// To whom.
    pub dst: MacAddr,
    /// From whom.
    pub src: MacAddr,
    /// The tag's control information, if it has one.
    pub tci: Option<u16>,
    /// Unique in its test.
    pub id: u64,
    /// Bytes without a tag: at least 60.
    pub len: usize,
}

impl TestFrame {
    /// The frame's bytes.
    pub fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.len.saturating_add(4));
        out.extend_from_slice(&self.dst.0);
        out.extend_from_slice(&self.src.0);
        if let Some(tci) = self.tci {
            out.extend_from_slice(&[0x81, 0]);
            out.extend_from_slice(&tci.to_be_bytes());
        }
        out.extend_from_slice(&ETHERTYPE);
        out.extend_from_slice(&self.payload());
        out
    }

    fn payload(&self) -> Vec<u8> {
        let room = self.len.max(60).saturating_sub(14);
        let mut bytes = vec![0; room.saturating_sub(STAMP)];
        Rng::new(self.id).fill(&mut bytes);
        let mut out = Vec::with_capacity(room);
        out.extend_from_slice(&self.id.to_be_bytes());
        out.extend_from_slice(&u32::try_from(room).unwrap_or(0).to_be_bytes());
        out.extend_from_slice(&sum(&bytes).to_be_bytes());
        out.extend_from_slice(&bytes);
        out
    }
}

/// What a received frame says: addresses, tag and id. None if it is not a test frame, or if any
/// byte of it is not what was sent.
pub fn read_frame(bytes: &[u8]) -> Option<TestFrame> {
    let (dst, rest) = bytes.split_first_chunk::<6>()?;
    let (src, rest) = rest.split_first_chunk::<6>()?;
    let (kind, mut rest) = rest.split_first_chunk::<2>()?;
    let mut tci = None;
    let mut kind = *kind;
    if kind == [0x81, 0] {
        let (tag, after) = rest.split_first_chunk::<2>()?;
        let (inner, after) = after.split_first_chunk::<2>()?;
        (tci, kind, rest) = (Some(u16::from_be_bytes(*tag)), *inner, after);
    }
    let (id, _) = rest.split_first_chunk::<8>()?;
    let frame = TestFrame {
        dst: MacAddr(*dst),
        src: MacAddr(*src),
        tci,
        id: u64::from_be_bytes(*id),
        len: rest.len().saturating_add(14),
    };
    (kind == ETHERTYPE && frame.payload() == rest).then_some(frame)
}

fn sum(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |sum: u64, byte| {
        (sum ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

#[cfg(test)]
mod tests {
    use packet::MacAddr;

    use super::{TestFrame, read_frame};

    #[test]
    fn what_was_sent_is_read_and_nothing_else() {
        for (len, tci) in [(60, None), (61, Some(5)), (1514, None), (9000, Some(0x2001))] {
            let (dst, src) = (MacAddr([2; 6]), MacAddr([4; 6]));
            let frame = TestFrame { dst, src, tci, id: 99, len };
            let mut bytes = frame.bytes();
            assert_eq!(bytes.len(), len + if tci.is_some() { 4 } else { 0 });
            assert_eq!(read_frame(&bytes), Some(frame));
            assert_eq!(read_frame(&bytes[..bytes.len() - 1]), None);
            let last = bytes.len() - 1;
            bytes[last] ^= 1;
            assert_eq!(read_frame(&bytes), None);
        }
        assert_eq!(read_frame(&[0; 60]), None);
        assert_eq!(read_frame(&[]), None);
    }
}
