//! Puts messages together from what a non-blocking socket gives.
//!
//! It asks for a header, then for exactly that message's payload: never for more, because fds
//! belong to the message whose bytes they came with.

use std::os::fd::OwnedFd;

use super::{CodecError, FDS_MAX, HEADER_BYTES, Header};

/// A message that is complete: header, payload, fds.
#[derive(Debug)]
pub struct Message {
    /// The header.
    pub header: Header,
    /// The payload, as long as the header says.
    pub payload: Vec<u8>,
    /// The fds that came with it.
    pub fds: Vec<OwnedFd>,
}

/// Half a message.
#[derive(Debug, Default)]
pub struct Decoder {
    head: [u8; HEADER_BYTES],
    header: Option<Header>,
    payload: Vec<u8>,
    /// Bytes of the present part (header or payload) that are there.
    filled: usize,
    fds: Vec<OwnedFd>,
}

impl Decoder {
    /// Where the next bytes go: never empty, never beyond the present message.
    pub fn space(&mut self) -> &mut [u8] {
        let part: &mut [u8] =
            if self.header.is_some() { &mut self.payload } else { &mut self.head };
        part.get_mut(self.filled..).unwrap_or_default()
    }

    /// Takes note of `count` bytes written to [`Self::space`] and of the fds beside them.
    ///
    /// # Errors
    ///
    /// [`CodecError`] if the header is not allowed or there are too many fds. The stream cannot be
    /// followed any more then.
    pub fn advance(
        &mut self,
        count: usize,
        fds: impl IntoIterator<Item = OwnedFd>,
    ) -> Result<Option<Message>, CodecError> {
        self.fds.extend(fds);
        if self.fds.len() > FDS_MAX {
            return Err(CodecError::TooManyFds);
        }
        self.filled = self.filled.saturating_add(count);
        let header = match self.header {
            Some(header) => header,
            None if self.filled < HEADER_BYTES => return Ok(None),
            None => {
                let header = Header::parse(self.head)?;
                if header.reply {
                    return Err(CodecError::UnexpectedReply(header.request));
                }
                self.payload = vec![0; usize::try_from(header.size).unwrap_or(0)];
                self.filled = 0;
                *self.header.insert(header)
            }
        };
        if self.filled < self.payload.len() {
            return Ok(None);
        }
        self.header = None;
        self.filled = 0;
        Ok(Some(Message {
            header,
            payload: std::mem::take(&mut self.payload),
            fds: std::mem::take(&mut self.fds),
        }))
    }

    /// A decoder that has read `bytes`, the beginning of a message, and got `fds` beside them.
    /// None if they are none, or a whole message.
    pub fn resume(mut bytes: &[u8], fds: Vec<OwnedFd>) -> Option<Self> {
        let mut decoder = Self::default();
        while !bytes.is_empty() {
            let space = decoder.space();
            let count = space.len().min(bytes.len());
            let (now, later) = bytes.split_at_checked(count)?;
            space.get_mut(..count)?.copy_from_slice(now);
            bytes = later;
            if decoder.advance(count, []).ok()?.is_some() {
                return None;
            }
        }
        decoder.fds = fds;
        Some(decoder)
    }

    /// The bytes of a message that is not complete, and the fds that came with them.
    pub fn unfinished(&self) -> (Vec<u8>, &[OwnedFd]) {
        let mut bytes = Vec::new();
        let part = match self.header {
            None => &self.head[..],
            Some(_) => {
                bytes.extend_from_slice(&self.head);
                &self.payload
            }
        };
        bytes.extend_from_slice(part.get(..self.filled).unwrap_or_default());
        (bytes, &self.fds)
    }

    /// Whether a message has begun and is not complete.
    pub fn is_partial(&self) -> bool {
        self.header.is_some() || self.filled > 0
    }
}
