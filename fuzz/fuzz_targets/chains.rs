//! A hostile driver: arbitrary ring contents at arbitrary addresses, split and packed, while the
//! device pops, completes and asks for notifications.
//!
//! Nothing may panic; every byte that a chain gives out lies in guest memory; lengths add up; a
//! broken queue stays broken; and where a queue stops, one starts.
#![no_main]

use std::sync::Arc;

use libfuzzer_sys::fuzz_target;
use virtq::mem::{GuestMap, GuestPhysAddr, Reader};
use virtq::{ChainBuf, Chains, Layout, QueueConfig, RingFeatures, RingPosition, Token, Virtq};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Two regions side by side, one apart, one far up.
const REGIONS: [(u64, usize); 4] =
    [(0, 0x4000), (0x4000, 0x1000), (0x8000, 0x1000), (u64::MAX - 0x1fff, 0x1000)];

/// The input, read from the front; zeros behind its end.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut out = [0; N];
        let count = N.min(self.0.len());
        let (now, rest) = self.0.split_at(count);
        out[..count].copy_from_slice(now);
        self.0 = rest;
        out
    }

    fn byte(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    /// Mostly aligned and in memory, sometimes anywhere.
    fn addr(&mut self) -> GuestPhysAddr {
        let at = u64::from(self.u16());
        GuestPhysAddr(match at & 3 {
            0 => at & 0x7ff0,
            1 => at & 0x0ff0,
            2 => REGIONS[3].0.wrapping_add(at & 0x1ff0),
            _ => at,
        })
    }
}

fn memory() -> Arc<GuestMemoryMmap> {
    thread_local! {
        static MEMORY: Arc<GuestMemoryMmap> = Arc::new(
            GuestMemoryMmap::from_ranges(&REGIONS.map(|(base, len)| (GuestAddress(base), len)))
                .unwrap(),
        );
    }
    MEMORY.with(Arc::clone)
}

fn config(input: &mut Input<'_>) -> QueueConfig {
    let choice = input.byte();
    let layout = if choice & 1 == 0 { Layout::Split } else { Layout::Packed };
    let size = match choice >> 5 {
        0 => input.u16(),
        power => 1 << power,
    };
    let position = match choice & 16 {
        0 => RingPosition::start(layout),
        _ if layout == Layout::Split => {
            RingPosition::Split { avail: input.u16(), used: input.u16() }
        }
        _ => {
            let [low, high] = [input.u16(), input.u16()];
            RingPosition::from_vhost_base(layout, u32::from(low) | u32::from(high) << 16)
        }
    };
    QueueConfig {
        layout,
        size,
        desc: input.addr(),
        driver: input.addr(),
        device: input.addr(),
        features: RingFeatures {
            event_idx: choice & 2 != 0,
            indirect: choice & 4 != 0,
            in_order: choice & 8 != 0,
        },
        position,
    }
}

/// Checks that all pieces lie in memory, and that there are as many bytes as promised.
fn walk(memory: &GuestMemoryMmap, mut reader: Reader<'_>, len: u32) {
    assert_eq!(reader.remaining(), len);
    let mut sum = 0u64;
    while let Some(piece) = reader.next_piece(u32::MAX) {
        let start = piece.as_ptr().addr();
        let end = start.checked_add(piece.len()).unwrap();
        let inside = memory.iter().any(|region| {
            let host = region.get_host_address(vm_memory::MemoryRegionAddress(0)).unwrap().addr();
            host <= start && end <= host + region.len() as usize
        });
        assert!(inside, "a piece outside of guest memory");
        sum += piece.len() as u64;
    }
    assert_eq!(sum, u64::from(len));
}

/// Uses every chain of a burst; returns what to complete.
fn serve(memory: &GuestMemoryMmap, chains: Chains<'_>) -> Vec<(Token, u32)> {
    let serve_one = |i| {
        let (readable, writable) = (chains.readable(i), chains.writable(i));
        assert!(u64::from(readable.len()) + u64::from(writable.len()) < 1 << 32);
        walk(memory, readable.reader(), readable.len());
        let skip = readable.len() / 2;
        walk(memory, chains.store().reader(chains.span(i, skip)), readable.len() - skip);
        let mut writer = writable.writer();
        let copied = writer.copy_from(&mut readable.reader(), 4096);
        assert_eq!(copied, readable.len().min(writable.len()).min(4096));
        let wrote = writer.write_if_different(b"abcd") as u32;
        assert_eq!(wrote, (writable.len() - copied).min(4));
        assert_eq!(writer.skip(u32::MAX), writable.len() - copied - wrote);
        (chains.token(i), copied + wrote)
    };
    (0..chains.len()).map(serve_one).collect()
}

fn run(input: &mut Input<'_>) -> Option<()> {
    let memory = memory();
    let map = GuestMap::new(memory.clone()).unwrap();
    let config = config(input);
    let script: [u8; 16] = input.bytes();
    for (base, len) in REGIONS {
        let mut contents = vec![0; len];
        let given = input.0.split_off(..len.min(input.0.len()))?;
        contents[..given.len()].copy_from_slice(given);
        memory.write_slice(&contents, GuestAddress(base)).unwrap();
    }
    let config = config.resume_at_used(&map).unwrap_or(config);
    let mut queue: Virtq = config.activate(&map).ok()?;
    let mut buf = ChainBuf::default();
    for step in script {
        let chains = queue.pop(&mut buf, usize::from(step >> 2));
        assert!(chains.len() <= usize::from(step >> 2));
        let fault = chains.fault();
        let done = serve(&memory, chains);
        assert_eq!(queue.fault(), fault);
        if fault.is_some() {
            let _ = fault.map(|fault| fault.to_string());
            assert!(!queue.has_available());
            assert!(queue.pop(&mut buf, 1).is_empty());
        }
        let tokens: Vec<Token> = done.iter().map(|(token, _)| *token).collect();
        match step & 3 {
            0 => queue.complete_all(&tokens),
            1 => done.iter().for_each(|(token, written)| queue.complete(*token, *written)),
            2 => queue.unpop(&tokens),
            _ => {
                let (first, rest) = tokens.split_at(tokens.len() / 2);
                queue.complete_all(first);
                queue.unpop(rest);
            }
        }
        queue.publish();
        let _ = queue.needs_call();
        if step & 4 == 0 {
            assert_eq!(queue.enable_kicks(), queue.has_available());
        } else {
            queue.disable_kicks();
        }
    }
    let config = queue.stop();
    assert!(config.activate(&map).is_ok(), "{config:?}");
    Some(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Input(data));
});
