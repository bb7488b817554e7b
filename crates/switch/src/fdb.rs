//! The forwarding database: which port a station of a VLAN is behind.
//!
//! ```text
//!  slot: │ key   1 │ VLAN 12 │ MAC 48                      │   0: never used, 1: free again
//!        │ value digest 15 │ static 1 │ seen, s 32 │ port 16 │
//! ```
//!
//! Open addressing with a bounded window. Readers take no lock: they read the key, the value and
//! the key again, and compare a digest of the key that stands in the value, so a slot that is
//! recycled meanwhile never yields another station's port. Writers are under one mutex.
//!
//! **Limits.** A bound as a whole and one per port: a guest that invents addresses fills its own
//! share, and pushes nobody out. Refused addresses are counted; their frames are flooded. Static
//! entries have a bound of their own: what was learned never keeps one out, nor they the learning.
//! **Units.** Time is in seconds from some moment before the switch began, and comes in as an
//! argument.

mod notice;

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};

use crossbeam_utils::CachePadded;
use packet::{MacAddr, VlanId};
use port::PortId;

use notice::Notice;

/// The most static entries.
pub const STATIC_MAX: u32 = 4096;

/// Slots after its hash in which a key may stand. At most half of the slots are for learned
/// entries, so that a full window is a matter of bad luck (below 1 in 1000 at the limit).
const WINDOW: usize = 32;
/// How often a worker that wants to learn tries the lock.
const LOCK_TRIES: u32 = 64;
/// Slots that a removal looks at under one hold of the lock, so that workers can learn between.
const REMOVE_SLOTS: usize = 4096;
const NEVER: u64 = 0;
const FREE: u64 = 1;
const PRESENT: u64 = 1 << 63;
const STATIC: u64 = 1 << 48;
const DIGEST_SHIFT: u32 = 49;

/// How much the database holds, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbLimits {
    /// Most learned entries as a whole.
    pub entries: u32,
    /// Most learned entries of one port.
    pub per_port: u32,
    /// Seconds after which a silent station is forgotten.
    pub age_secs: u32,
}

impl Default for FdbLimits {
    fn default() -> Self {
        Self { entries: 131_072, per_port: 16_384, age_secs: 300 }
    }
}

/// One station, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FdbEntry {
    /// Its VLAN.
    pub vlan: VlanId,
    /// Its address.
    pub mac: MacAddr,
    /// The port that it is behind.
    pub port: PortId,
    /// Seconds since it was seen.
    pub age_secs: u32,
    /// Whether it was configured, not learned.
    pub fixed: bool,
}

/// VLAN and address as one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(u64);

impl Key {
    #[inline(always)]
    pub(crate) fn new(vlan: u16, mac: u64) -> Self {
        Self(PRESENT | u64::from(vlan & 0x0fff) << 48 | mac & 0xffff_ffff_ffff)
    }
}

#[derive(Debug, Clone, Copy)]
struct Value(u64);

impl Value {
    #[inline(always)]
    fn new(digest: u64, port: PortId, now: u32, fixed: bool) -> Self {
        let fixed = if fixed { STATIC } else { 0 };
        Self(digest << DIGEST_SHIFT | fixed | u64::from(now) << 16 | u64::from(port.0))
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the field's 16 bits")]
    fn port(self) -> PortId {
        PortId(self.0 as u16)
    }

    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "the field's 32 bits")]
    fn seen(self) -> u32 {
        (self.0 >> 16) as u32
    }

    fn is_static(self) -> bool {
        self.0 & STATIC != 0
    }

    #[inline(always)]
    fn digest(self) -> u64 {
        self.0 >> DIGEST_SHIFT
    }
}

#[derive(Debug, Default)]
struct Slot {
    key: AtomicU64,
    value: AtomicU64,
}

impl Slot {
    /// The value of a slot that a writer found taken.
    fn present(&self) -> Value {
        // ORDERING: Relaxed: only writers take and free slots, and who asks holds their lock.
        Value(self.value.load(Ordering::Relaxed))
    }

    /// The value, if the slot still is that of `key`, which was found in it.
    #[inline(always)]
    fn value_of(&self, key: Key, digest: u64) -> Option<(&Self, Value)> {
        // ORDERING: Acquire pairs with the Release of the value in `put`: who sees the value of a
        // recycled slot also sees, in the next line, that the old key is gone.
        let value = Value(self.value.load(Ordering::Acquire));
        let still = self.key.load(Ordering::Relaxed) == key.0;
        (still && value.digest() == digest).then_some((self, value))
    }
}

/// What only writers need.
#[derive(Debug)]
struct Writer {
    learned: u32,
    fixed: u32,
    /// Learned entries by port.
    of_port: Box<[u32]>,
}

/// The database. See the module's text.
#[derive(Debug)]
pub(crate) struct Fdb {
    slots: Box<[Slot]>,
    mask: usize,
    shift: u32,
    seed: u64,
    limits: FdbLimits,
    static_max: u32,
    generation: CachePadded<AtomicU64>,
    writer: CachePadded<Mutex<Writer>>,
    /// Copies for readers that must not hold writers up.
    used: AtomicU32,
    refused: AtomicU64,
    notice: Notice,
}

/// What is known of a source address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// It is where it was.
    Known,
    /// It is new, or has moved.
    ToLearn,
    /// It is fixed to another port.
    Elsewhere(PortId),
}

impl Fdb {
    /// An empty database; `seed` keeps guests from choosing addresses that collide.
    pub(crate) fn new(limits: FdbLimits, static_max: u32, seed: u64) -> Self {
        let entries = usize::try_from(limits.entries).unwrap_or(usize::MAX).clamp(WINDOW, 1 << 24);
        let fixed = usize::try_from(static_max).unwrap_or(usize::MAX).min(1 << 24);
        // A static entry may take a learned one's slot, so its window is full of static ones only.
        let count = entries.saturating_mul(2).max(fixed.saturating_mul(4)).next_power_of_two();
        let of_port = vec![0; usize::from(u16::MAX).saturating_add(1)].into();
        let writer = Writer { learned: 0, fixed: 0, of_port };
        Self {
            slots: std::iter::repeat_with(Slot::default).take(count).collect(),
            mask: count.wrapping_sub(1),
            shift: count.leading_zeros().saturating_add(1),
            seed,
            limits,
            static_max,
            generation: CachePadded::default(),
            writer: CachePadded::new(Mutex::new(writer)),
            used: AtomicU32::new(0),
            refused: AtomicU64::new(0),
            notice: Notice::default(),
        }
    }

    /// Changes whenever an answer of [`Self::lookup`] may have changed.
    #[inline(always)]
    pub(crate) fn generation(&self) -> u64 {
        // ORDERING: Acquire pairs with the Release in `changed`: lookups after this see at least
        // what that generation contains.
        self.generation.load(Ordering::Acquire)
    }

    /// The port of a station.
    #[inline(always)]
    pub(crate) fn lookup(&self, key: Key) -> Option<PortId> {
        self.find(key).map(|(_, value)| value.port())
    }

    /// Notes that `key` sent from `port`. Writes at most once per second and entry.
    #[inline(always)]
    pub(crate) fn touch(&self, key: Key, port: PortId, now: u32) -> Source {
        let Some((slot, value)) = self.find(key) else { return Source::ToLearn };
        if value.port() != port {
            return if value.is_static() {
                Source::Elsewhere(value.port())
            } else {
                Source::ToLearn
            };
        }
        if value.is_static() {
            return Source::Known;
        }
        if value.seen() != now {
            let new = Value::new(value.digest(), port, now, false);
            // ORDERING: Relaxed: nothing is published with it. If the slot was moved or recycled
            // meanwhile the exchange fails, and the other writer wins.
            let _ =
                slot.value.compare_exchange(value.0, new.0, Ordering::Relaxed, Ordering::Relaxed);
        }
        Source::Known
    }

    /// Learns that `keys` are behind `port`. If others keep writing just now nothing is learned:
    /// the stations' next frames will do it.
    #[cold]
    pub(crate) fn learn(&self, keys: &[Key], port: PortId, now: u32) {
        let Some(mut writer) = self.try_lock() else { return };
        for key in keys {
            if !self.put(&mut writer, *key, (port, now, false)) {
                // ORDERING: Relaxed: a count, written under the lock.
                let _ = self.refused.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Fixes a station to a port. Returns false if there is no room.
    pub(crate) fn add_static(&self, vlan: VlanId, mac: MacAddr, port: PortId) -> bool {
        let key = Key::new(vlan.get(), mac.to_u64());
        let is_so = |(_, value): (_, Value)| value.is_static() && value.port() == port;
        self.find(key).is_some_and(is_so) || self.put(&mut self.lock(), key, (port, 0, true))
    }

    /// Whether a station is fixed to a port.
    pub(crate) fn is_fixed(&self, vlan: VlanId, mac: MacAddr) -> bool {
        let key = Key::new(vlan.get(), mac.to_u64());
        self.find(key).is_some_and(|(_, value)| value.is_static())
    }

    /// Says that a station that is fixed to `from` is behind `to` until it is fixed anew. Returns
    /// false, and nothing changes, if others keep writing just now.
    #[cold]
    pub(crate) fn lend(&self, key: Key, from: PortId, to: PortId) -> bool {
        let Some(writer) = self.try_lock() else { return false };
        if let Some((slot, value)) = self.find(key)
            && value.is_static()
            && value.port() == from
        {
            // ORDERING: Release as in `put`; its slot stays the key's.
            slot.value.store(Value::new(value.digest(), to, 0, true).0, Ordering::Release);
            self.changed(&writer);
        }
        true
    }

    /// Forgets a station that is fixed, whatever port it is behind.
    pub(crate) fn remove_static(&self, vlan: VlanId, mac: MacAddr) {
        let key = Key::new(vlan.get(), mac.to_u64());
        let mut writer = self.lock();
        let Some((slot, value)) = self.find(key).filter(|(_, value)| value.is_static()) else {
            return;
        };
        // ORDERING: Relaxed: only writers change keys, and we hold their lock.
        slot.key.store(FREE, Ordering::Relaxed);
        writer.uncount(value);
        self.changed(&writer);
    }

    /// Notes a station that was learned by another process. Returns false if there is no room.
    pub(crate) fn restore(&self, entry: &FdbEntry, now: u32) -> bool {
        let key = Key::new(entry.vlan.get(), entry.mac.to_u64());
        let seen = now.saturating_sub(entry.age_secs);
        self.put(&mut self.lock(), key, (entry.port, seen, false))
    }

    /// Adds what another process had refused.
    pub(crate) fn add_refused(&self, count: u64) {
        // ORDERING: Relaxed: a count.
        let _ = self.refused.fetch_add(count, Ordering::Relaxed);
    }

    /// Seconds after which a silent station is forgotten.
    pub(crate) fn age_secs(&self) -> u32 {
        self.limits.age_secs
    }

    /// Forgets learned stations that were silent for too long. Returns how many.
    pub(crate) fn age(&self, now: u32) -> usize {
        let limit = self.limits.age_secs;
        self.remove_where(|value| !value.is_static() && now.saturating_sub(value.seen()) >= limit)
    }

    /// Forgets learned stations: of `port`, or all. Returns how many.
    pub(crate) fn flush(&self, port: Option<PortId>) -> usize {
        self.remove_where(|value| {
            !value.is_static() && port.is_none_or(|port| value.port() == port)
        })
    }

    /// Forgets everything about `port`, which goes away.
    pub(crate) fn forget(&self, port: PortId) -> usize {
        self.remove_where(|value| value.port() == port)
    }

    /// All entries, unsorted; those that change meanwhile may be missing.
    pub(crate) fn entries(&self, now: u32) -> Vec<FdbEntry> {
        let entry = |slot: &Slot| {
            // ORDERING: Acquire pairs with the Release of the key in `put`: the value is there.
            let key = Key(slot.key.load(Ordering::Acquire));
            if key.0 & PRESENT == 0 {
                return None;
            }
            let (_, value) = slot.value_of(key, self.place(key).1)?;
            Some(FdbEntry {
                vlan: u16::try_from(key.0 >> 48 & 0x0fff).ok().and_then(VlanId::new)?,
                mac: MacAddr::from_u64(key.0),
                port: value.port(),
                age_secs: if value.is_static() { 0 } else { now.saturating_sub(value.seen()) },
                fixed: value.is_static(),
            })
        };
        self.slots.iter().filter_map(entry).collect()
    }

    /// What becomes readable when the database changed, once after each [`Self::watch`].
    pub(crate) fn changes(&self) -> std::io::Result<std::os::fd::BorrowedFd<'_>> {
        self.notice.fd()
    }

    /// Waits for the next change; look at the entries after this, not before.
    pub(crate) fn watch(&self) {
        self.notice.arm();
    }

    /// Number of entries, and of addresses that were refused for want of room.
    pub(crate) fn usage(&self) -> (u32, u64) {
        // ORDERING: Relaxed: counts for people.
        (self.used.load(Ordering::Relaxed), self.refused.load(Ordering::Relaxed))
    }

    /// The writers' lock, if it is free within a few microseconds.
    fn try_lock(&self) -> Option<MutexGuard<'_, Writer>> {
        for _ in 0..LOCK_TRIES {
            match self.writer.try_lock() {
                Ok(writer) => return Some(writer),
                Err(TryLockError::Poisoned(poisoned)) => return Some(poisoned.into_inner()),
                Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
            }
        }
        None
    }

    fn lock(&self) -> MutexGuard<'_, Writer> {
        self.writer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Index of the first slot of the key's window, and the key's digest.
    #[inline(always)]
    #[expect(clippy::cast_possible_truncation, reason = "usize has 64 bits; the digest is masked")]
    fn place(&self, key: Key) -> (usize, u64) {
        let product = u128::from(key.0 ^ self.seed).wrapping_mul(0x9e37_79b9_7f4a_7c15_u128);
        let hash = product as u64 ^ (product >> 64) as u64;
        ((hash >> self.shift) as usize, hash & 0x7fff)
    }

    #[inline(always)]
    fn window(&self, start: usize) -> impl Iterator<Item = &Slot> {
        let index = move |step: usize| start.wrapping_add(step) & self.mask;
        (0..WINDOW).filter_map(move |step| self.slots.get(index(step)))
    }

    #[inline(always)]
    fn find(&self, key: Key) -> Option<(&Slot, Value)> {
        let (start, digest) = self.place(key);
        let first = self.slots.get(start & self.mask)?;
        // ORDERING: Acquire pairs with the Release of the key in `put`: the value is there.
        match first.key.load(Ordering::Acquire) {
            found if found == key.0 => first.value_of(key, digest),
            NEVER => None,
            _ => self.find_later(key, start, digest),
        }
    }

    /// Looks at the rest of the window.
    #[inline(never)]
    fn find_later(&self, key: Key, start: usize, digest: u64) -> Option<(&Slot, Value)> {
        for slot in self.window(start).skip(1) {
            // ORDERING: Acquire pairs with the Release of the key in `put`: the value is there.
            match slot.key.load(Ordering::Acquire) {
                found if found == key.0 => return slot.value_of(key, digest),
                NEVER => return None,
                _ => {}
            }
        }
        None
    }

    /// Writes an entry. Returns false if it is refused.
    fn put(&self, writer: &mut Writer, key: Key, entry: (PortId, u32, bool)) -> bool {
        let (port, now, fixed) = entry;
        if !fixed && writer.learned_of(port) >= self.limits.per_port {
            // A port that invents addresses costs no look for places.
            return false;
        }
        let (start, digest) = self.place(key);
        let value = Value::new(digest, port, now, fixed);
        let (mut free, mut old, mut learned) = (None, None, None);
        for slot in self.window(start) {
            // ORDERING: Relaxed: only writers change keys, and we hold their lock.
            let found = slot.key.load(Ordering::Relaxed);
            if found == key.0 {
                old = Some(slot);
                break;
            }
            if found & PRESENT == 0 {
                free = free.or(Some(slot));
                if found == NEVER {
                    break;
                }
            } else if fixed && !slot.present().is_static() {
                learned = learned.or(Some(slot));
            }
        }
        let before = old.map(Slot::present);
        if let Some(before) = before
            && !fixed
            && (before.is_static() || before.port() == port)
        {
            return true;
        }
        let Some(slot) = old.or(free).or(learned) else { return false };
        if !self.has_room(writer, before, fixed) {
            return false;
        }
        if old.is_some() || free.is_none() {
            writer.uncount(slot.present());
        }
        if old.is_none() {
            // ORDERING: Relaxed: the Release of the value follows.
            slot.key.store(FREE, Ordering::Relaxed);
        }
        writer.count(value);
        // ORDERING: Release of the value pairs with its Acquire in `find` and comes after the
        // store that freed the slot; Release of the key publishes the value.
        slot.value.store(value.0, Ordering::Release);
        slot.key.store(key.0, Ordering::Release);
        self.changed(writer);
        true
    }

    /// Whether an entry fits into the bounds of the whole, in place of `before`.
    fn has_room(&self, writer: &Writer, before: Option<Value>, fixed: bool) -> bool {
        if fixed {
            return before.is_some_and(Value::is_static) || writer.fixed < self.static_max;
        }
        before.is_some() || writer.learned < self.limits.entries
    }

    fn remove_where(&self, condition: impl Fn(Value) -> bool) -> usize {
        let pieces = self.slots.chunks(REMOVE_SLOTS);
        pieces.map(|slots| self.remove_in(slots, &condition)).sum()
    }

    fn remove_in(&self, slots: &[Slot], condition: impl Fn(Value) -> bool) -> usize {
        let mut writer = self.lock();
        let mut removed = 0usize;
        for slot in slots {
            // ORDERING: Relaxed: only writers change keys, and we hold their lock.
            let key = slot.key.load(Ordering::Relaxed);
            let value = Value(slot.value.load(Ordering::Relaxed));
            if key & PRESENT != 0 && condition(value) {
                slot.key.store(FREE, Ordering::Relaxed);
                writer.uncount(value);
                removed = removed.saturating_add(1);
            }
        }
        if removed > 0 {
            self.changed(&writer);
        }
        removed
    }

    fn changed(&self, writer: &Writer) {
        // ORDERING: Relaxed: a count for people.
        self.used.store(writer.learned.saturating_add(writer.fixed), Ordering::Relaxed);
        // ORDERING: Release pairs with the Acquire in `generation`; one writer at a time.
        let next = self.generation.load(Ordering::Relaxed).wrapping_add(1);
        self.generation.store(next, Ordering::Release);
        self.notice.changed();
    }
}

impl Writer {
    fn learned_of(&self, port: PortId) -> u32 {
        self.of_port.get(usize::from(port.0)).copied().unwrap_or(0)
    }

    /// Takes an entry into the counts.
    fn count(&mut self, value: Value) {
        self.change(value, |count| count.saturating_add(1));
    }

    /// Takes an entry out of the counts.
    fn uncount(&mut self, value: Value) {
        self.change(value, |count| count.saturating_sub(1));
    }

    fn change(&mut self, value: Value, by: impl Fn(u32) -> u32) {
        if value.is_static() {
            self.fixed = by(self.fixed);
            return;
        }
        self.learned = by(self.learned);
        if let Some(count) = self.of_port.get_mut(usize::from(value.port().0)) {
            *count = by(*count);
        }
    }
}

#[cfg(test)]
mod tests;
