//! Fds that are kept: as many as a front end can have us keep, while the process may have 1024.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use testkit::SharedMemory;
use testkit::request::*;

use crate::evil::{Evil, MEMORY, event, longs, words};
use crate::world::{Case, Stage, case};

/// How a refusal names the limit.
const LIMIT: &str = "fds of this front end to keep, at most";

fn slot(number: u64) -> Vec<u8> {
    let at = (1 << 40) + (number << 20);
    [longs(&[0]), longs(&[at, 4096, at, number * 4096])].concat()
}

fn of_memory(evil: &Evil) -> OwnedFd {
    evil.memory.as_fd().try_clone_to_owned().unwrap()
}

/// Adds slots until one is refused, and returns its number. More may come from the one before it.
fn fill_slots(stage: &Stage<'_>, evil: &mut Evil) -> u64 {
    let memory = of_memory(evil);
    let fds: &[BorrowedFd<'_>] = &[memory.as_fd()];
    let refused = (0..509).find(|number| !evil.ack(ADD_MEM_REG, &slot(*number), fds));
    stage.complains(LIMIT);
    refused.expect("one is refused")
}

/// What is refused for want of room leaves others all that they need, and what is there as it is.
fn harms_nobody(stage: &Stage<'_>, evil: &mut Evil) {
    stage.world.welcomes();
    stage.world.progress();
    stage.answers(evil);
}

pub(crate) fn cases() -> Vec<Case> {
    vec![
        case("all memory slots that it can get", |stage| {
            let mut evil = Evil::up(stage);
            let refused = fill_slots(stage, &mut evil);
            assert!((40..100).contains(&refused), "{refused} slots");
            harms_nobody(stage, &mut evil);
            stage.is_up(&mut evil);
            // For one that goes another may come.
            let memory = of_memory(&evil);
            assert!(evil.ack(REM_MEM_REG, &slot(7), &[]));
            assert!(evil.ack(ADD_MEM_REG, &slot(refused), &[memory.as_fd()]));
            let again = (ADD_MEM_REG, &slot(7)[..]);
            stage.refuses_fds(&mut evil, again, &[memory.as_fd()], LIMIT);
        }),
        case("kicks, calls and errs of all rings", |stage| {
            let mut evil = Evil::up(stage);
            let mut refused = 0;
            for ring in 2..256u64 {
                for request in [SET_VRING_CALL, SET_VRING_ERR, SET_VRING_KICK] {
                    let fd = event();
                    refused += u32::from(!evil.ack(request, &longs(&[ring]), &[fd.as_fd()]));
                }
            }
            assert!(refused > 600, "{refused} refused");
            stage.complains(LIMIT);
            harms_nobody(stage, &mut evil);
            // Those that it has may be others, and a ring does without.
            for _ in 0..100 {
                assert!(evil.set_fds(1));
            }
            assert!(evil.ack(SET_VRING_ERR, &longs(&[255 | 0x100]), &[]));
            stage.is_up(&mut evil);
        }),
        case("all of it, and then a table, a channel and an err beside it", |stage| {
            let mut evil = Evil::up(stage);
            let _ = fill_slots(stage, &mut evil);
            let (err, memory) = (event(), of_memory(&evil));
            let said = (SET_VRING_ERR, &longs(&[1])[..]);
            stage.refuses_fds(&mut evil, said, &[err.as_fd()], LIMIT);
            let channel = std::os::unix::net::UnixStream::pair().unwrap().0;
            let said = (SET_BACKEND_REQ_FD, &[][..]);
            stage.refuses_fds(&mut evil, said, &[channel.as_fd()], LIMIT);
            // A table is in the place of all slots.
            let table = SharedMemory::table(0, MEMORY);
            assert!(evil.ack(SET_MEM_TABLE, &table, &[memory.as_fd()]));
            assert!(evil.ack(SET_VRING_ERR, &longs(&[1]), &[err.as_fd()]));
            stage.is_up(&mut evil);
        }),
        case("all of it by who leaves and comes again", |stage| {
            for _ in 0..20 {
                let mut evil = Evil::shared(stage);
                assert!(fill_slots(stage, &mut evil) > 40);
            }
            let mut evil = Evil::up(stage);
            harms_nobody(stage, &mut evil);
            let base = evil.front.ask(GET_VRING_BASE, &words(&[1, 0])).unwrap();
            assert_eq!(base.len(), 8);
        }),
    ]
}
