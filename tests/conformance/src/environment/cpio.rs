//! Writes a cpio archive in the "newc" form that the Linux kernel unpacks as its initramfs.
//!
//! ```text
//!  header: magic (6 bytes), 13 fields of 8 hexadecimal digits │ name, NUL │ pad │ data │ pad
//! ```

use std::io::Write;

use anyhow::{Context, Result};

const MAGIC: &str = "070701";
const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const CHARACTER_DEVICE: u32 = 0o020_600;
const TRAILER: &str = "TRAILER!!!";

/// An archive that is being written.
pub(super) struct Archive<W> {
    out: W,
    next_inode: u32,
}

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self { out, next_inode: 1 }
    }

    pub(super) fn folder(&mut self, name: &str) -> Result<()> {
        self.entry(name, FOLDER, (0, 0), &[])
    }

    /// A file that may be executed, as all files of our guest.
    pub(super) fn file(&mut self, name: &str, data: &[u8]) -> Result<()> {
        self.entry(name, PROGRAM, (0, 0), data)
    }

    pub(super) fn character_device(&mut self, name: &str, numbers: (u32, u32)) -> Result<()> {
        self.entry(name, CHARACTER_DEVICE, numbers, &[])
    }

    pub(super) fn finish(mut self) -> Result<()> {
        self.entry(TRAILER, 0, (0, 0), &[])?;
        self.out.flush().context("cannot write the initramfs")
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), data: &[u8]) -> Result<()> {
        let size = u32::try_from(data.len()).context("a file above 4 GiB")?;
        let name_bytes = u32::try_from(name.len())?.saturating_add(1);
        let inode = self.next_inode;
        self.next_inode = inode.saturating_add(1);
        let fields = [inode, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_bytes, 0];
        let mut head = MAGIC.to_owned();
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        head.push_str(name);
        head.push('\0');
        self.padded(head.as_bytes())?;
        self.padded(data)
    }

    fn padded(&mut self, bytes: &[u8]) -> Result<()> {
        self.out.write_all(bytes)?;
        let padding = bytes.len().next_multiple_of(4).saturating_sub(bytes.len());
        let zeros = [0; 4];
        self.out.write_all(zeros.get(..padding).unwrap_or_default())?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_padded_to_four_bytes() {
        let mut bytes = Vec::new();
        let mut archive = Archive::new(&mut bytes);
        archive.file("init", b"hello").unwrap();
        archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], MAGIC.as_bytes());
        // 110 bytes of header, "init\0" and one byte of padding, then the data.
        assert_eq!(&bytes[110..121], b"init\0\0hello");
        assert!(String::from_utf8(bytes).unwrap().contains(TRAILER));
    }
}
