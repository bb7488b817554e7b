//! Memory tables: regions that lie, overlap, wrap or are none.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;
use rustix::fs::{
    MemfdFlags, Mode, OFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create, open,
};
use rustix::pipe::{PipeFlags, pipe_with};
use testkit::Guest;
use testkit::request::*;

use crate::evil::{BUFFERS, Evil, MEMORY, NEXT, areas, desc, event, longs, words};
use crate::good::GOOD;
use crate::world::{Case, Stage, case};

/// A region: guest address, size, front end address, offset.
type Region = [u64; 4];

fn table(regions: &[Region]) -> Vec<u8> {
    let mut body = words(&[regions.len() as u32, 0]);
    for region in regions {
        body.extend_from_slice(&longs(region));
    }
    body
}

fn single(region: Region) -> Vec<u8> {
    [longs(&[0]), longs(&region)].concat()
}

pub(crate) fn cases() -> Vec<Case> {
    let mut all = regions();
    all.extend(tables());
    all.extend(files());
    all.extend(slots());
    all.extend(swaps());
    all.extend(lost());
    all.push(case("another guest's memory, where frames are copied to", alias));
    all
}

/// Bytes of a page.
const P: u64 = 4096;

fn regions() -> Vec<Case> {
    let refused = |name: &'static str, regions: &'static [Region], text: &'static str| {
        case(format!("table: {name}"), move |stage| {
            let mut evil = Evil::negotiated(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            let fds = vec![memory.as_fd(); regions.len()];
            let body = table(regions);
            stage.refuses_fds(&mut evil, (SET_MEM_TABLE, &body), &fds, text);
        })
    };
    vec![
        refused("an empty region", &[[0, 0, 0, 0]], "is empty"),
        refused("one empty region of two", &[[0, P, 0, 0], [P, 0, P, 0]], "is empty"),
        refused("a guest address that wraps", &[[u64::MAX - 9, P, 0, 0]], "wraps around"),
        refused("a front end address that wraps", &[[0, P, u64::MAX - 9, 0]], "wraps around"),
        refused("an offset that wraps", &[[0, P, 0, u64::MAX - 9]], "wraps around"),
        refused("a size of all addresses", &[[0, u64::MAX, 0, 0]], "bytes"),
        refused("a size and an offset of all", &[[1, u64::MAX, 1, 1]], "wraps around"),
        refused("one byte more than the file", &[[0, MEMORY + 1, 0, 0]], "are needed"),
        refused("an offset behind the file", &[[0, P, 0, MEMORY]], "are needed"),
        refused("an offset far behind the file", &[[0, P, 0, 1 << 50]], "are needed"),
        refused("more than may be shared", &[[0, 1 << 45, 0, 0]], "bytes"),
        refused("the same twice", &[[0, P, 0, 0], [0, P, 0, 0]], "overlaps"),
        refused(
            "guest addresses that overlap",
            &[[0, 2 * P, 0, 0], [P, P, 1 << 20, 0]],
            "overlaps",
        ),
        refused(
            "front end addresses that overlap",
            &[[0, 2 * P, 0, 0], [9 * P, P, P, 0]],
            "overlaps",
        ),
        refused("one within the other", &[[0, 9 * P, 0, 0], [P, P, P, 0]], "overlaps"),
        refused("one byte that overlaps", &[[0, P + 1, 0, 0], [P, P, 1 << 30, 0]], "overlaps"),
    ]
}

fn tables() -> Vec<Case> {
    vec![
        case("table: no regions", |stage| {
            let mut evil = Evil::up(stage);
            let _ = evil.ack(SET_MEM_TABLE, &table(&[]), &[]);
            stage.answers(&mut evil);
        }),
        case("table: a count of 33", |stage| {
            let mut evil = Evil::negotiated(stage);
            let body = table(&[[0, P, 0, 0]; 33]);
            stage.refuses(&mut evil, SET_MEM_TABLE, &body, "SET_MEM_TABLE");
        }),
        case("table: a count of 4 billion", |stage| {
            let mut evil = Evil::negotiated(stage);
            let body = [words(&[u32::MAX, 0]), longs(&[0, P, 0, 0])].concat();
            stage.refuses(&mut evil, SET_MEM_TABLE, &body, "SET_MEM_TABLE");
        }),
        case("table: a count that the size contradicts", |stage| {
            let mut evil = Evil::negotiated(stage);
            let body = [words(&[2, 0]), longs(&[0, P, 0, 0])].concat();
            stage.refuses(&mut evil, SET_MEM_TABLE, &body, "SET_MEM_TABLE");
        }),
        case("table: one fd for two regions", |stage| {
            let mut evil = Evil::negotiated(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            let body = table(&[[0, P, 0, 0], [P, P, P, P]]);
            let message = (SET_MEM_TABLE, &body[..]);
            stage.refuses_fds(&mut evil, message, &[memory.as_fd()], "1 fds instead of 2");
        }),
        case("table: three fds for one region", |stage| {
            let mut evil = Evil::negotiated(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            let body = table(&[[0, P, 0, 0]]);
            let message = (SET_MEM_TABLE, &body[..]);
            stage.refuses_fds(&mut evil, message, &[memory.as_fd(); 3], "3 fds instead of 1");
        }),
        case("table: an offset within a page", |stage| {
            let mut evil = Evil::negotiated(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            let body = table(&[[0, MEMORY - 100, 0, 100]]);
            assert!(evil.ack(SET_MEM_TABLE, &body, &[memory.as_fd()]));
        }),
        case("table: addresses up to the highest", |stage| {
            let mut evil = Evil::negotiated(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            let top = u64::MAX - P;
            let body = table(&[[top, P, top, 0]]);
            assert!(evil.ack(SET_MEM_TABLE, &body, &[memory.as_fd()]));
        }),
    ]
}

fn no_memory(name: &'static str, fd: fn() -> OwnedFd) -> Case {
    case(format!("memory that is {name}"), move |stage| {
        let mut evil = Evil::negotiated(stage);
        let fd = fd();
        let body = table(&[[0, 4096, 0, 0]]);
        stage.refuses_fds(&mut evil, (SET_MEM_TABLE, &body), &[fd.as_fd()], "memory region at 0x0");
    })
}

fn file(seal: Option<SealFlags>) -> OwnedFd {
    let fd = memfd_create("m", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, MEMORY).unwrap();
    if let Some(seal) = seal {
        fcntl_add_seals(&fd, seal).unwrap();
    }
    fd
}

fn opened(path: &str, flags: OFlags) -> OwnedFd {
    open(path, flags | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

fn files() -> Vec<Case> {
    vec![
        no_memory("an eventfd", event),
        no_memory("a pipe", || pipe_with(PipeFlags::CLOEXEC).unwrap().0),
        no_memory("a socket", || std::os::unix::net::UnixStream::pair().unwrap().0.into()),
        no_memory("/dev/null", || opened("/dev/null", OFlags::RDWR)),
        no_memory("/dev/zero", || opened("/dev/zero", OFlags::RDWR)),
        no_memory("a directory", || opened("/", OFlags::RDONLY)),
        no_memory("a path", || opened("/", OFlags::PATH)),
        no_memory("an epoll set", || epoll::create(epoll::CreateFlags::CLOEXEC).unwrap()),
        no_memory("a file of /proc", || opened("/proc/self/status", OFlags::RDONLY)),
        no_memory("an empty file", || memfd_create("m", MemfdFlags::CLOEXEC).unwrap()),
        no_memory("sealed against writing", || file(Some(SealFlags::WRITE))),
        no_memory("open to read only", || {
            let path = std::env::temp_dir().join(format!("hostile-{}", std::process::id()));
            std::fs::write(&path, [0; 8192]).unwrap();
            let file = File::open(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            file.into()
        }),
        case("memory sealed against shrinking", |stage| {
            let mut evil = Evil::negotiated(stage);
            let fd = file(Some(SealFlags::SHRINK | SealFlags::GROW));
            assert!(evil.ack(SET_MEM_TABLE, &table(&[[0, MEMORY, 0, 0]]), &[fd.as_fd()]));
            assert!(ftruncate(&fd, 0).is_err());
        }),
    ]
}

fn slots() -> Vec<Case> {
    vec![
        case("more slots than there are", |stage| {
            let mut evil = Evil::negotiated(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            // Each slot shows bytes of its own.
            const { assert!(MEMORY >= 510 * 4096) };
            for slot in 0..509u64 {
                let at = slot << 20;
                let body = single([at, 4096, at, slot * 4096]);
                assert!(evil.ack(ADD_MEM_REG, &body, &[memory.as_fd()]), "slot {slot}");
            }
            let body = single([1 << 40, 4096, 1 << 40, 0]);
            let fds: &[BorrowedFd<'_>] = &[memory.as_fd()];
            stage.refuses_fds(&mut evil, (ADD_MEM_REG, &body), fds, "more than 509");
        }),
        case("a slot removed that was not there", |stage| {
            let mut evil = Evil::shared(stage);
            let body = single([1 << 30, 4096, 1 << 30, 0]);
            stage.refuses(&mut evil, REM_MEM_REG, &body, "no memory region");
        }),
        case("a slot removed with another size", |stage| {
            let mut evil = Evil::up(stage);
            let body = single([0, MEMORY - 4096, 0, 0]);
            stage.refuses(&mut evil, REM_MEM_REG, &body, "no memory region");
            stage.is_up(&mut evil);
        }),
        case("a slot added without an fd", |stage| {
            let mut evil = Evil::negotiated(stage);
            stage.refuses(&mut evil, ADD_MEM_REG, &single([0, 4096, 0, 0]), "0 fds instead of 1");
        }),
        case("a slot over another", |stage| {
            let mut evil = Evil::up(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            let body = single([4096, 4096, 1 << 40, 0]);
            stage.refuses_fds(&mut evil, (ADD_MEM_REG, &body), &[memory.as_fd()], "overlaps");
            stage.is_up(&mut evil);
        }),
        case("one file in many slots", |stage| {
            let mut evil = Evil::up(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            // Of the same bytes two; the others are of parts of their own, in the file's holes.
            ftruncate(&evil.file, 64 * MEMORY).unwrap();
            for slot in 1..64u64 {
                let (at, offset) = (slot << 30, (slot - 1) * MEMORY);
                let body = single([at, MEMORY, at, offset]);
                assert!(evil.ack(ADD_MEM_REG, &body, &[memory.as_fd()]), "slot {slot}");
            }
            // A frame in the second that shows the first bytes: the same as in slot 0.
            evil.write(BUFFERS, &[[0; 12].to_vec(), vec![0xff; 60]].concat());
            let far = crate::evil::Desc { addr: (1 << 30) + BUFFERS, ..desc(72, 0) };
            evil.offer(1, &[far]);
            evil.wait_used(1, 1);
            stage.is_up(&mut evil);
        }),
        case("the same bytes in more and more slots", |stage| {
            let mut evil = Evil::up(stage);
            let memory = evil.memory.as_fd().try_clone_to_owned().unwrap();
            // A larger file does not make room for it.
            ftruncate(&evil.file, 1 << 40).unwrap();
            let twice = single([1 << 40, MEMORY, 1 << 40, 0]);
            assert!(evil.ack(ADD_MEM_REG, &twice, &[memory.as_fd()]));
            let fds: &[BorrowedFd<'_>] = &[memory.as_fd()];
            for slot in 2..8u64 {
                let body = single([slot << 40, MEMORY, slot << 40, 0]);
                stage.refuses_fds(&mut evil, (ADD_MEM_REG, &body), fds, "from 0x0 on as 2 others");
            }
            let body = table(&[1, 2, 3].map(|slot| [slot << 40, P, slot << 40, MEMORY - P]));
            let fds: &[BorrowedFd<'_>] = &[memory.as_fd(); 3];
            stage.refuses_fds(&mut evil, (SET_MEM_TABLE, &body), fds, "from 0x3ff000 on as 2 oth");
            stage.is_up(&mut evil);
        }),
    ]
}

/// Memory that goes away while rings are in it.
fn swaps() -> Vec<Case> {
    vec![
        case("the rings' memory is removed", |stage| {
            let mut evil = Evil::up(stage);
            assert!(evil.ack(REM_MEM_REG, &single([0, MEMORY, 0, 0]), &[]));
            evil.kick(1);
            stage.answers(&mut evil);
            assert_eq!(stage.world.port("evil")["state"], "waiting");
        }),
        case("the memory moves", |stage| {
            let mut evil = Evil::up(stage);
            assert!(evil.table(&table(&[[1 << 32, MEMORY, 1 << 32, 0]])));
            evil.kick(1);
            stage.answers(&mut evil);
            assert!(evil.share());
            stage.is_up(&mut evil);
        }),
        case("the memory is swapped again and again", |stage| {
            let mut evil = Evil::up(stage);
            for _ in 0..30 {
                assert!(evil.share());
                evil.kick(1);
            }
            stage.is_up(&mut evil);
        }),
        case("a smaller memory that ends in a ring", |stage| {
            let mut evil = Evil::up(stage);
            let end = areas(1)[0] + 20;
            let _ = evil.table(&table(&[[0, end, 0, 0]]));
            evil.kick(1);
            stage.answers(&mut evil);
        }),
    ]
}

/// Both ports map one file: what is copied to the good guest comes from its own receive buffers, at
/// every distance from where it goes to.
fn alias(stage: &Stage<'_>) {
    let mut evil = Evil::negotiated(stage);
    assert!(evil.adopt(&stage.world.good_memory, Guest::BYTES));
    // The front end before this one has left its rings there.
    for ring in 0..2 {
        for area in areas(ring) {
            evil.write(area, &[0; 512]);
        }
        evil.set_ring(ring);
    }
    stage.is_up(&mut evil);
    let station = [2, 0, 0, 0, 0, 0x66];
    evil.write(BUFFERS, &[&[0; 12][..], &GOOD[0].0, &station, &[0x88, 0xb5]].concat());
    for round in 0..7u64 {
        let body = (8 << 20) + round * 2048 + round * 101;
        let body = crate::evil::Desc { addr: body, len: 1400 + round as u32, flags: 0, next: 0 };
        evil.offer(1, &[desc(26, NEXT), body]);
        if stage.layout == virtq::Layout::Split {
            evil.wait_used(1, round as u16 + 1);
        }
    }
    evil.wait_used(1, 7);
    stage.is_up(&mut evil);
    for ring in 0..2 {
        let _ = evil.front.ask(GET_VRING_BASE, &words(&[ring, 0])).unwrap();
    }
}

fn lost() -> Vec<Case> {
    let cut = |name: &'static str, left: u64, run: fn(&Stage<'_>, &mut Evil)| {
        case(format!("memory cut short: {name}"), move |stage| {
            let mut evil = Evil::up(stage);
            ftruncate(&evil.file, left).unwrap();
            run(stage, &mut evil);
            stage.loses(&mut evil);
        })
    };
    vec![
        cut("all of it", 0, |_, evil| evil.kick(1)),
        cut("the transmitq", areas(1)[0], |_, evil| evil.kick(1)),
        cut("the used ring, which is written", areas(1)[1], |_, evil| {
            // The frame is there; what says that it was taken has no place.
            evil.write(BUFFERS, &[0xff; 80]);
            ftruncate(&evil.file, areas(1)[1]).unwrap();
            evil.file.set_len(areas(1)[1]).unwrap();
            evil.offer(1, &[desc(0, 0)]);
        }),
        cut("the buffers", BUFFERS, |_, evil| evil.offer(1, &[desc(1500, 0)])),
        case("memory cut short before it is shared", |stage| {
            let mut evil = Evil::negotiated(stage);
            ftruncate(&evil.file, 4096).unwrap();
            assert!(!evil.share());
            stage.answers(&mut evil);
        }),
        case("memory cut short and grown again", |stage| {
            let mut evil = Evil::up(stage);
            ftruncate(&evil.file, 0).unwrap();
            ftruncate(&evil.file, MEMORY).unwrap();
            evil.kick(1);
            // New pages of zeros: an idle ring, or an index that went back.
            stage.answers(&mut evil);
        }),
    ]
}
