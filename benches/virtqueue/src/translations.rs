//! What a message about a translation costs, whatever is known already.

use virtq::mem::{GuestMap, GuestPhysAddr};
use virtq::{ASKED_MAX, Access, ENTRIES_MAX, Iotlb, IotlbEntry, Iova};

const PAGE: u64 = 4096;
/// Where the device sees the memory.
const FAR: u64 = 0x7000_0000_0000;
/// Where it is asked for what nobody answers.
const ASKED: u64 = 0x6000_0000_0000;
const MEMORY_BYTES: usize = 1 << 20;

/// The translations of a device whose front end sends one message after the other.
#[derive(Debug)]
pub struct Translations {
    iotlb: Iotlb,
    first: u64,
    next: u64,
}

impl Translations {
    /// A device that knows a few entries, or as many as there may be, and waits for a few answers,
    /// or for as many as it may.
    ///
    /// # Errors
    ///
    /// If memory cannot be mapped.
    pub fn new(full: bool) -> anyhow::Result<Self> {
        let iotlb = Iotlb::new(&GuestMap::private(MEMORY_BYTES)?, Box::new(|| ()));
        let (entries, asked) = if full { (ENTRIES_MAX, ASKED_MAX) } else { (16, 4) };
        let mut this = Self { iotlb, first: 0, next: 0 };
        for _ in 1..entries {
            this.update();
        }
        for page in 0..asked as u64 {
            this.iotlb.ask(Iova(ASKED.wrapping_add(page.wrapping_mul(PAGE))), Access::Read);
        }
        Ok(this)
    }

    /// Every other page, so that no entry goes on where another ends.
    fn iova(number: u64) -> Iova {
        Iova(FAR.wrapping_add(number.wrapping_mul(PAGE).wrapping_mul(2)))
    }

    fn update(&mut self) {
        let (iova, addr) =
            (Self::iova(self.next), GuestPhysAddr((self.next % 64).wrapping_mul(PAGE)));
        let entry = IotlbEntry { iova, addr, len: PAGE, access: Access::ReadWrite };
        let _ = self.iotlb.insert(&[entry]);
        self.next = self.next.wrapping_add(1);
    }

    fn invalidate(&mut self) {
        let _ = self.iotlb.remove(Self::iova(self.first), PAGE);
        self.first = self.first.wrapping_add(1);
    }

    /// Takes so many messages: one entry comes, the oldest one goes, over and over.
    #[inline(never)]
    pub fn serve(&mut self, messages: u16) {
        for _ in 0..messages / 2 {
            self.update();
            self.invalidate();
        }
    }

    /// Number of entries.
    pub fn entries(&self) -> usize {
        self.iotlb.len()
    }
}

#[cfg(test)]
mod tests {
    use super::{ENTRIES_MAX, Translations};

    #[test]
    fn entries_come_and_go() {
        for (full, entries) in [(false, 15), (true, ENTRIES_MAX - 1)] {
            let mut translations = Translations::new(full).unwrap();
            translations.serve(200);
            assert_eq!((translations.entries(), translations.first), (entries, 100));
        }
    }
}
