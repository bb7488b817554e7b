//! What is to become of each frame of a burst.

use port::{Alike, BURST_MAX, DropReason, Frame, PortId, QueueId};

use super::{Env, Origin};
use crate::fdb::{Key, Source};
use crate::table::{Entry, Port};
use crate::vlan::Tagging;

/// What is to become of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// To one port.
    To(PortId),
    /// To all other ports of its VLAN.
    Flood,
    /// Nowhere.
    Drop(DropReason),
    /// As the frame before.
    Same,
    /// Not yet known: the destination is to be looked up.
    LookUp(Key),
}

/// The first 16 bytes of a frame, and which of them decide. Tags of no VLAN (0 and 4095) have no
/// pattern: what follows them decides, too.
#[derive(Debug, Clone, Copy, Default)]
struct Pattern {
    bytes: u128,
    mask: u128,
}

/// Both addresses and the type decide; behind a tag's type its control information too.
const ADDRESSES: u128 = !0 >> 16;
const TAGGED: u128 = !0;
/// The least bytes of a tagged frame.
const TAGGED_HEADER: usize = 18;
/// A tag that no pattern holds.
const NO_PATTERN: [u8; 4] = [0x81, 0, 0xff, 0xff];

impl Pattern {
    #[inline(always)]
    fn bytes(frame: &Frame) -> u128 {
        match frame.head().first_chunk::<TAGGED_HEADER>() {
            Some([bytes @ .., _, _]) => u128::from_le_bytes(*bytes),
            None => Self::short(frame),
        }
    }

    #[cold]
    fn short(frame: &Frame) -> u128 {
        let mut bytes = [0; 16];
        bytes.iter_mut().zip(frame.head()).for_each(|(to, from)| *to = *from);
        if frame.is_runt()
            && let Some(tag) = bytes.last_chunk_mut()
        {
            *tag = NO_PATTERN;
        }
        u128::from_le_bytes(bytes)
    }

    fn of(bytes: u128, tag: Option<u16>) -> Option<Self> {
        match tag {
            None => Some(Self { bytes, mask: ADDRESSES }),
            Some(tci) if matches!(tci & 0x0fff, 0 | 0x0fff) => None,
            Some(_) => Some(Self { bytes, mask: TAGGED }),
        }
    }

    #[inline(always)]
    fn matches(&self, bytes: u128) -> bool {
        (self.bytes ^ bytes) & self.mask == 0
    }
}

/// A (source, destination) pair, and what became of its last frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pair {
    pattern: Pattern,
    tagging: Tagging,
    verdict: Verdict,
}

/// The last pair of a queue, across bursts.
#[derive(Debug, Default)]
pub(crate) struct PairCache {
    pair: Option<Pair>,
    /// The pair's egress, if the port has one only.
    single: Option<QueueId>,
    /// Whether the port that the frames come from has several pairs.
    steered: bool,
    fdb_generation: u64,
    table_generation: u64,
    now: u32,
}

impl PairCache {
    /// Whether the pair would be decided in the same way now, and its source was refreshed in
    /// this second.
    #[inline(always)]
    pub(super) fn is_valid(&self, env: &Env<'_>, fdb_generation: u64) -> bool {
        self.fdb_generation == fdb_generation
            && self.table_generation == env.table.generation
            && self.now == env.now
            && self.pair.is_some()
    }

    /// The pair's egress, if the port has one only, and the pair's tag.
    #[inline(always)]
    pub(super) fn single(&self) -> Option<(QueueId, Tagging)> {
        Some((self.single?, self.pair.as_ref()?.tagging))
    }

    /// Whether the flows of the frames are to be noted.
    #[inline(always)]
    pub(super) fn is_steered(&self) -> bool {
        self.steered
    }

    /// Whether it is found that all frames are of the pair.
    #[inline(always)]
    pub(super) fn holds_for_all(&self, frames: &[Frame]) -> bool {
        let Some(Pair { pattern, .. }) = self.pair else { return false };
        let mut alike = Alike::default();
        frames.iter().for_each(|frame| alike.add(frame, pattern.bytes));
        alike.holds(pattern.mask)
    }

    pub(super) fn set(&mut self, pair: Pair, env: &Env<'_>, from: &Entry, fdb_generation: u64) {
        self.single = None;
        self.steered = from.steering.is_some();
        if let Verdict::To(port) = pair.verdict
            && let Some(entry) = env.table.entry(port)
            && let [pair] = *entry.pairs
        {
            self.single = Some(QueueId { port, pair });
        }
        self.pair = Some(pair);
        self.fdb_generation = fdb_generation;
        self.table_generation = env.table.generation;
        self.now = env.now;
    }

    pub(super) fn clear(&mut self) {
        self.pair = None;
        self.single = None;
    }
}

/// Verdicts of one burst.
#[derive(Debug)]
pub(super) struct Classifier {
    verdicts: [Verdict; BURST_MAX],
    taggings: [Tagging; BURST_MAX],
    to_learn: Vec<Key>,
    drops: [usize; DropReason::COUNT],
    /// The pair of the frame before.
    last: Option<Pair>,
    /// The source of the last frame that was let in, and whether it is in the database.
    source: Option<Key>,
    source_known: bool,
}

impl Default for Classifier {
    fn default() -> Self {
        Self {
            verdicts: [Verdict::Same; BURST_MAX],
            taggings: [Tagging::default(); BURST_MAX],
            to_learn: crate::room::vec(BURST_MAX),
            drops: [0; DropReason::COUNT],
            last: None,
            source: None,
            source_known: false,
        }
    }
}

impl Classifier {
    pub(super) fn verdicts(&self, count: usize) -> &[Verdict] {
        self.verdicts.get(..count).unwrap_or_default()
    }

    /// Frames that are dropped, and why.
    pub(super) fn drops(&self, count: usize) -> impl Iterator<Item = (usize, DropReason)> {
        self.verdicts(count).iter().enumerate().filter_map(|(index, verdict)| match verdict {
            Verdict::Drop(reason) => Some((index, *reason)),
            Verdict::To(_) | Verdict::Flood | Verdict::Same | Verdict::LookUp(_) => None,
        })
    }

    pub(super) fn tagging(&self, index: u16) -> Tagging {
        self.taggings.get(usize::from(index)).copied().unwrap_or_default()
    }

    pub(super) fn taggings(&self) -> &[Tagging; BURST_MAX] {
        &self.taggings
    }

    /// First pass: everything that the frame itself and its source decide; then learns. The
    /// origin's cache is empty or valid.
    pub(super) fn classify(
        &mut self,
        env: &Env<'_>,
        from: &Entry,
        origin: &Origin,
        frames: &[Frame],
    ) {
        self.last = origin.cache.pair;
        self.source = None;
        self.source_known = self.last.is_some();
        self.to_learn.clear();
        for (index, frame) in frames.iter().enumerate().take(BURST_MAX) {
            let bytes = Pattern::bytes(frame);
            let (verdict, tagging) = match &self.last {
                Some(last) if last.pattern.matches(bytes) => (Verdict::Same, last.tagging),
                _ => self.judge(env, from, frame, bytes),
            };
            if let (Some(place), Some(tag)) =
                (self.verdicts.get_mut(index), self.taggings.get_mut(index))
            {
                (*place, *tag) = (verdict, tagging);
            }
        }
        if !self.to_learn.is_empty() {
            env.fdb.learn(&self.to_learn, origin.port, env.now);
        }
    }

    /// Judges a frame of another pair than the one before.
    #[inline]
    fn judge(
        &mut self,
        env: &Env<'_>,
        from: &Entry,
        frame: &Frame,
        bytes: u128,
    ) -> (Verdict, Tagging) {
        let tag = frame.tag();
        let runt = frame.is_runt();
        let pattern = if runt { None } else { Pattern::of(bytes, tag) };
        let [a, b, c, d, e, f, g, h, i, j, k, l, ..] = bytes.to_le_bytes();
        let destination = packet::MacAddr([a, b, c, d, e, f]);
        let source = packet::MacAddr([g, h, i, j, k, l]);
        let judged = match from.port.rule.ingress(tag, || frame.has_tag_behind(tag.is_some())) {
            _ if runt => Err(DropReason::Runt),
            Err(reason) => Err(reason),
            Ok(_) if source.is_group() || source == packet::MacAddr::ZERO => {
                Err(DropReason::BadSource)
            }
            Ok(_) if destination.is_reserved() && !env.forward_reserved => {
                Err(DropReason::ReservedMac)
            }
            Ok(tagging) => Ok(tagging),
        };
        let (verdict, tagging) = match judged {
            Err(reason) => (Verdict::Drop(reason), Tagging::default()),
            Ok(tagging) => {
                let key = Key::new(tagging.vlan(), source.to_u64());
                if self.source != Some(key) {
                    self.source = Some(key);
                    self.source_known = is_known(env, &from.port, key);
                    if !self.source_known {
                        self.to_learn.push(key);
                    }
                }
                let verdict = if destination.is_group() {
                    Verdict::Flood
                } else {
                    Verdict::LookUp(Key::new(tagging.vlan(), destination.to_u64()))
                };
                (verdict, tagging)
            }
        };
        self.last = pattern.map(|pattern| Pair { pattern, tagging, verdict });
        (verdict, tagging)
    }

    /// Second pass: looks destinations up and counts drops. Returns the last pair if its decision
    /// may serve for the next burst.
    pub(super) fn decide(&mut self, env: &Env<'_>, origin: &Origin, count: usize) -> Option<Pair> {
        let mut current = match origin.cache.pair {
            Some(pair) => pair.verdict,
            None => Verdict::Drop(DropReason::Runt),
        };
        let verdicts = self.verdicts.get_mut(..count).unwrap_or_default();
        for (verdict, tagging) in verdicts.iter_mut().zip(&self.taggings) {
            current = match *verdict {
                Verdict::Same => current,
                Verdict::LookUp(key) => look_up(env, origin.port, key, *tagging),
                Verdict::To(_) | Verdict::Flood | Verdict::Drop(_) => *verdict,
            };
            *verdict = current;
            if let Verdict::Drop(reason) = current
                && let Some(drops) = self.drops.get_mut(reason as usize)
            {
                *drops = drops.saturating_add(1);
            }
        }
        for (reason, count) in DropReason::ALL.iter().zip(&mut self.drops) {
            origin.drop_frames(*reason, std::mem::take(count));
        }
        let usable = self.source_known && !matches!(current, Verdict::Drop(_));
        self.last.filter(|_| usable).map(|last| Pair { verdict: current, ..last })
    }
}

/// Whether nothing is to be learned of a source.
#[inline(always)]
fn is_known(env: &Env<'_>, from: &Port, key: Key) -> bool {
    match env.fdb.touch(key, from.id, env.now) {
        Source::Known => true,
        Source::ToLearn => false,
        Source::Elsewhere(port) => {
            !from.outward || !has_left(env, key, port) || env.fdb.lend(key, port, from.id)
        }
    }
}

/// Whether a station that is fixed to a port is not there: the port has no queues, or was only one
/// behind which other hosts have it meanwhile.
#[cold]
fn has_left(env: &Env<'_>, key: Key, port: PortId) -> bool {
    env.table.entry(port).is_none_or(|Entry { pairs, port, .. }| {
        pairs.is_empty() || (port.outward && !port.has_station(key))
    })
}

/// The verdict on a frame to one station.
#[inline]
fn look_up(env: &Env<'_>, from: PortId, key: Key, tagging: Tagging) -> Verdict {
    let Some(port) = env.fdb.lookup(key) else { return Verdict::Flood };
    if port == from {
        return Verdict::Drop(DropReason::SamePort);
    }
    match env.table.entry(port) {
        Some(entry) if !entry.port.rule.is_member(tagging.vlan()) => {
            Verdict::Drop(DropReason::VlanNotAllowed)
        }
        Some(entry) if !entry.pairs.is_empty() => Verdict::To(port),
        _ => Verdict::Drop(DropReason::PortDown),
    }
}
