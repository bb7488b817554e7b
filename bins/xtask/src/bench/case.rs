//! What is measured: a frame size on a kind of ring, through one of the guest's code paths, with
//! its memory on pages of one size.

use clap::{Args, ValueEnum};
use conformance::{Topology, VirtioUserSpec};

/// Bursts of 32 frames that go round from either port.
const BURSTS: u32 = 4;
/// A ring of 256 has room for one burst of frames that need several buffers of 2 KiB each. A frame
/// that is dropped never comes back, and all figures after that would be too low.
const BURSTS_OF_LARGE: u32 = 1;
const LARGE: u16 = 2000;

/// Frames and the rings that they go through.
#[derive(Args, Clone, Debug)]
pub(crate) struct Frames {
    /// Bytes of a frame, without its check sequence
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "64,1500",
          value_parser = clap::value_parser!(u16).range(60..=9000))]
    pub(crate) sizes: Vec<u16>,
    #[command(flatten)]
    pub(crate) layouts: Layouts,
}

/// Layouts of rings.
#[derive(Args, Clone, Debug)]
pub(crate) struct Layouts {
    /// Layouts of the rings
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "split,packed")]
    pub(crate) rings: Vec<Ring>,
}

/// Which cases to measure.
#[derive(Args, Clone, Debug)]
pub(crate) struct Selection {
    #[command(flatten)]
    pub(crate) frames: Frames,
    /// Code paths of the guest's driver
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "mergeable")]
    paths: Vec<Path>,
    /// Pages of the guest's memory
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "2M")]
    pages: Vec<Pages>,
    /// A set of cases instead of sizes, rings and paths
    #[arg(long, value_name = "SET", conflicts_with_all = ["sizes", "rings", "paths"])]
    cases: Option<Set>,
}

/// Cases that are measured together.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
enum Set {
    /// 64 and 1500 bytes on both rings, 64 bytes on every path, 9000 bytes on both rings
    Table,
    /// The same, with each page size
    All,
}

/// The layout of a ring.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Ring {
    Split,
    Packed,
}

/// A code path of DPDK's virtio driver.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Path {
    /// `mrg_rxbuf=1,in_order=0`
    Mergeable,
    /// `mrg_rxbuf=0,in_order=1`
    InOrder,
    /// `mrg_rxbuf=0,vectorized=1`, `in_order=0` with split rings and 1 with packed ones (AVX-512)
    Vector,
}

/// The pages of the guest's memory.
#[derive(Clone, Copy, Debug, Eq, PartialEq, ValueEnum)]
pub(crate) enum Pages {
    /// Hugepages of 2 MiB
    #[value(name = "2M")]
    Huge,
    /// Pages of 4 KiB
    #[value(name = "4K")]
    Small,
}

/// One of the cases.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub(crate) struct Case {
    pub(crate) size: u16,
    pub(crate) ring: Ring,
    pub(crate) path: Path,
    pub(crate) pages: Pages,
}

/// Size, ring and path of the set `table`.
const TABLE: [(u16, Ring, Path); 9] = [
    (64, Ring::Split, Path::Mergeable),
    (64, Ring::Packed, Path::Mergeable),
    (64, Ring::Split, Path::InOrder),
    (64, Ring::Split, Path::Vector),
    (64, Ring::Packed, Path::Vector),
    (1500, Ring::Split, Path::Mergeable),
    (1500, Ring::Packed, Path::Mergeable),
    (9000, Ring::Split, Path::Mergeable),
    (9000, Ring::Packed, Path::Mergeable),
];

impl Selection {
    /// The cases in the order in which they are measured.
    pub(crate) fn cases(&self) -> Vec<Case> {
        let kinds: Vec<_> = match self.cases {
            Some(_) => TABLE.into(),
            None => self.product(),
        };
        let pages = match self.cases {
            Some(Set::All) => &[Pages::Huge, Pages::Small],
            Some(Set::Table) | None => self.pages.as_slice(),
        };
        let on = |pages: &Pages| {
            let pages = *pages;
            kinds.iter().map(move |&(size, ring, path)| Case { size, ring, path, pages })
        };
        pages.iter().flat_map(on).collect()
    }

    fn product(&self) -> Vec<(u16, Ring, Path)> {
        let mut kinds = Vec::new();
        for size in &self.frames.sizes {
            for ring in &self.frames.layouts.rings {
                kinds.extend(self.paths.iter().map(|path| (*size, *ring, *path)));
            }
        }
        kinds
    }
}

impl Case {
    /// A case on hugepages with mergeable buffers.
    pub(crate) fn usual(size: u16, ring: Ring) -> Self {
        Self { size, ring, path: Path::Mergeable, pages: Pages::Huge }
    }

    pub(crate) fn name(self) -> String {
        let ring = match self.ring {
            Ring::Split => "split",
            Ring::Packed => "packed",
        };
        let path = match self.path {
            Path::Mergeable => "",
            Path::InOrder => " in-order",
            Path::Vector => " vector",
        };
        let pages = match self.pages {
            Pages::Huge => "",
            Pages::Small => ", 4K pages",
        };
        format!("{} B {ring}{path}{pages}", self.size)
    }

    /// Bursts that either port lets go round.
    pub(crate) fn bursts(self) -> u32 {
        if self.size > LARGE { BURSTS_OF_LARGE } else { BURSTS }
    }

    /// The guest of this case.
    pub(crate) fn guest(self, sockets: Vec<std::path::PathBuf>, server: bool) -> VirtioUserSpec {
        let packed = self.ring == Ring::Packed;
        VirtioUserSpec {
            sockets,
            topology: Topology::Pairs,
            server,
            packed,
            mrg_rxbuf: self.path == Path::Mergeable,
            in_order: match self.path {
                Path::Mergeable => false,
                Path::InOrder => true,
                Path::Vector => packed,
            },
            vectorized: self.path == Path::Vector,
            queues: 1,
            largest_frame: self.size.into(),
            small_pages: self.pages == Pages::Small,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        selection: Selection,
    }

    fn names(options: &str) -> Vec<String> {
        let words = std::iter::once("x").chain(options.split_whitespace());
        let cases = Cli::try_parse_from(words).unwrap_or_else(|e| panic!("{e}")).selection.cases();
        cases.iter().map(|case| case.name()).collect()
    }

    #[test]
    fn every_size_meets_every_ring_and_path() {
        let usual = ["64 B split", "64 B packed", "1500 B split", "1500 B packed"];
        assert_eq!(names(""), usual);
        let some = names("--sizes 64 --rings split --paths in-order,vector --pages 4K,2M");
        let expected = [
            "64 B split in-order, 4K pages",
            "64 B split vector, 4K pages",
            "64 B split in-order",
            "64 B split vector",
        ];
        assert_eq!(some, expected);
    }

    #[test]
    fn sets_have_every_row_of_the_table_once() {
        let mut table = names("--cases table");
        assert_eq!(names("--cases all").len(), 2 * table.len());
        let rows = table.len();
        table.sort();
        table.dedup();
        assert_eq!((table.len(), rows), (9, 9));
        assert!(Cli::try_parse_from(["x", "--cases", "table", "--sizes", "64"]).is_err());
    }

    #[test]
    fn the_vector_path_of_packed_rings_needs_in_order() {
        let guest = |ring, path| {
            let case = Case { path, ..Case::usual(64, ring) };
            let spec = case.guest(Vec::new(), false);
            (spec.mrg_rxbuf, spec.in_order, spec.vectorized)
        };
        assert_eq!(guest(Ring::Split, Path::Mergeable), (true, false, false));
        assert_eq!(guest(Ring::Split, Path::InOrder), (false, true, false));
        assert_eq!(guest(Ring::Split, Path::Vector), (false, false, true));
        assert_eq!(guest(Ring::Packed, Path::Vector), (false, true, true));
    }
}
