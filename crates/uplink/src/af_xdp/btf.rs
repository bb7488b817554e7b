//! What the running kernel says about its own types: where a field stands in a structure, and the
//! number of a function that BPF programs may call.
//!
//! ```text
//!  header │ types: [name, kind and count, size] + what the kind has │ … │ strings
//! ```
//!
//! **Trust.** The kernel wrote it. All lengths are checked all the same: it may be of a version
//! that is not known here, and then says nothing.

use std::io;

const FILE: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
/// Bytes of the header that are known here, and of a type without what its kind has.
const HEADER: usize = 24;
const TYPE: usize = 12;
/// Bytes of a member of a structure.
const MEMBER: usize = 12;

/// How deep parts without a name are looked into.
const DEPTH: u32 = 3;

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNC: u32 = 12;

/// The kernel's types.
#[derive(Debug)]
pub(super) struct Btf {
    types: Vec<u8>,
    strings: Vec<u8>,
}

/// A type.
#[derive(Debug, Clone, Copy)]
struct Type<'a> {
    /// Its number: the first one has 1.
    number: u32,
    name: u32,
    kind: u32,
    /// Members have a width beside their place.
    wide: bool,
    size: u32,
    rest: &'a [u8],
}

/// A structure.
#[derive(Debug, Clone, Copy)]
pub(super) struct Structure<'a> {
    btf: &'a Btf,
    found: Type<'a>,
}

impl Btf {
    /// That of the running kernel.
    pub(super) fn of_kernel() -> io::Result<Self> {
        let bytes = std::fs::read(FILE)?;
        Self::parse(&bytes).ok_or_else(|| io::Error::other(format!("{FILE} is not understood")))
    }

    fn parse(bytes: &[u8]) -> Option<Self> {
        let magic = u16::from_ne_bytes(*bytes.first_chunk()?);
        let at = |place: usize| usize::try_from(word(bytes, place)?).ok();
        let header = at(4)?;
        if magic != MAGIC || header < HEADER {
            return None;
        }
        let part = |offset: usize, len: usize| {
            let start = header.checked_add(offset)?;
            bytes.get(start..start.checked_add(len)?).map(<[u8]>::to_vec)
        };
        Some(Self { types: part(at(8)?, at(12)?)?, strings: part(at(16)?, at(20)?)? })
    }

    /// The number of a function.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        self.find(FUNC, name).map(|found| found.number)
    }

    /// A structure.
    pub(super) fn structure(&self, name: &str) -> Option<Structure<'_>> {
        self.find(STRUCT, name).map(|found| Structure { btf: self, found })
    }

    fn find(&self, kind: u32, name: &str) -> Option<Type<'_>> {
        self.types().find(|found| found.kind == kind && self.is_named(found.name, name))
    }

    /// All types, up to one of a kind that is not known.
    fn types(&self) -> impl Iterator<Item = Type<'_>> {
        let mut left = self.types.as_slice();
        (1u32..).map_while(move |number| {
            let (name, info, size) = (word(left, 0)?, word(left, 4)?, word(left, 8)?);
            let kind = info >> 24 & 0x1f;
            let count = usize::try_from(info & 0xffff).ok()?;
            let len = rest_len(kind, count)?;
            let rest = left.get(TYPE..)?.get(..len)?;
            left = left.get(TYPE.checked_add(len)?..)?;
            Some(Type { number, name, kind, wide: info >> 31 != 0, size, rest })
        })
    }

    fn place(&self, of: Type<'_>, member: &str, depth: u32) -> Option<u32> {
        of.rest.as_chunks::<MEMBER>().0.iter().find_map(|bytes| {
            let (name, number) = (word(bytes, 0)?, word(bytes, 4)?);
            let (bits, width) = match (word(bytes, 8)?, of.wide) {
                (place, true) => (place & 0x00ff_ffff, place >> 24),
                (place, false) => (place, 0),
            };
            let whole = width == 0 && bits.is_multiple_of(8);
            let begins = whole.then_some(bits / 8)?;
            if self.is_named(name, member) {
                return Some(begins);
            }
            let part = self.is_named(name, "").then(|| self.part(number)).flatten()?;
            let within = self.place(part, member, depth.checked_sub(1)?)?;
            begins.checked_add(within)
        })
    }

    /// A structure or union by its number.
    fn part(&self, number: u32) -> Option<Type<'_>> {
        let found = self.types().find(|found| found.number == number);
        found.filter(|found| matches!(found.kind, STRUCT | UNION))
    }

    fn is_named(&self, at: u32, name: &str) -> bool {
        let text = usize::try_from(at).ok().and_then(|at| self.strings.get(at..));
        let rest = text.and_then(|text| text.strip_prefix(name.as_bytes()));
        rest.is_some_and(|rest| rest.first() == Some(&0))
    }
}

impl Structure<'_> {
    /// The number of the type.
    pub(super) fn number(&self) -> u32 {
        self.found.number
    }

    /// Bytes of it.
    pub(super) fn size(&self) -> u32 {
        self.found.size
    }

    /// Where a member begins, in bytes; it may be one of a part without a name.
    pub(super) fn place(&self, member: &str) -> Option<u32> {
        self.btf.place(self.found, member, DEPTH)
    }
}

/// Bytes behind a type that has so many members, values or parameters.
fn rest_len(kind: u32, count: usize) -> Option<usize> {
    match kind {
        // Of an integer, a variable, a tag: one word.
        1 | 14 | 17 => Some(4),
        // An array.
        3 => Some(12),
        // Pointers, forward declarations, other names, qualifiers, functions, floats.
        2 | 7..=12 | 16 | 18 => Some(0),
        // Structures, unions, sections, wide enumerations.
        4 | 5 | 15 | 19 => count.checked_mul(12),
        // Enumerations, parameters.
        6 | 13 => count.checked_mul(8),
        _ => None,
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|word| u32::from_ne_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::{Btf, FUNC, MAGIC, STRUCT, UNION};

    /// An integer, a structure `two` of `a` at bit 0, `bits` of 3 bits, `b` at byte 6 and a union
    /// without a name, of `in` and itself, at byte 8, and a function `call`.
    fn made() -> Vec<u8> {
        let strings = b"\0two\0a\0b\0call\0bits\0tw\0in\0";
        let types: Vec<u8> = [
            [0u32, 1 << 24, 4].as_slice(),
            &[32],
            &[1, STRUCT << 24 | 1 << 31 | 4, 12],
            &[5, 1, 0],
            &[14, 1, 3 << 24 | 16],
            &[7, 1, 48],
            &[0, 4, 64],
            &[9, FUNC << 24, 0],
            &[0, UNION << 24 | 2, 4],
            &[0, 4, 0],
            &[22, 1, 16],
        ]
        .concat()
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
        let mut bytes = [&MAGIC.to_ne_bytes()[..], &[1, 0]].concat();
        let (types_len, strings_len) =
            (u32::try_from(types.len()).unwrap(), u32::try_from(strings.len()).unwrap());
        for word in [24, 0, types_len, types_len, strings_len] {
            bytes.extend(word.to_ne_bytes());
        }
        [bytes, types, strings.to_vec()].concat()
    }

    #[test]
    fn what_is_there_is_found_by_its_whole_name() {
        let btf = Btf::parse(&made()).unwrap();
        assert_eq!(
            (btf.function("call"), btf.function("two"), btf.function("cal")),
            (Some(3), None, None)
        );
        let two = btf.structure("two").unwrap();
        assert_eq!((two.number(), two.size()), (2, 12));
        assert_eq!((two.place("a"), two.place("b")), (Some(0), Some(6)));
        assert_eq!(two.place("in"), Some(10), "two bytes into the part without a name");
        assert_eq!((two.place("bits"), two.place("c")), (None, None), "no whole bytes, no member");
        assert!(btf.structure("tw").is_none() && btf.structure("call").is_none());
    }

    #[test]
    fn what_is_cut_short_says_nothing_beyond() {
        let whole = made();
        for len in 0..whole.len() {
            assert!(Btf::parse(&whole[..len]).is_none(), "{len}");
        }
        let mut wrong = whole.clone();
        wrong[0] ^= 1;
        assert!(Btf::parse(&wrong).is_none());
        // A kind that nobody knows ends the list.
        let mut unknown = whole;
        unknown[24 + 7] = 31;
        let btf = Btf::parse(&unknown).unwrap();
        assert!(btf.structure("two").is_none() && btf.function("call").is_none());
    }
}
