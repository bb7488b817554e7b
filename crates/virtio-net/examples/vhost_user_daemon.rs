//! Serves the device with `vhost-user-backend`'s daemon: every frame goes back to its sender.
//!
//! `cargo run --example vhost_user_daemon -- /tmp/net.sock`
#![forbid(unsafe_code)]

use std::error::Error;
use std::sync::{Arc, RwLock};

use port::{BURST_MAX, Egress, FrameBuf, Ingress, QueueFault};
use vhost_user_backend::VhostUserDaemon;
use virtio_net::daemon::{NetBackend, PairHandler};
use virtio_net::{Receiveq, Transmitq};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

/// Sends frames back, with their addresses swapped.
#[derive(Default)]
struct Reflector {
    frames: FrameBuf,
}

impl PairHandler for Reflector {
    fn handle(&mut self, tx: &mut Transmitq, rx: &mut Receiveq) -> Result<(), QueueFault> {
        let mut batch = tx.receive(&mut self.frames);
        for frame in batch.frames_mut() {
            if let Some((to, rest)) = frame.head_mut().split_first_chunk_mut::<6>()
                && let Some(from) = rest.first_chunk_mut::<6>()
            {
                std::mem::swap(to, from);
            }
        }
        let all: [u16; BURST_MAX] = std::array::from_fn(|n| u16::try_from(n).unwrap_or(0));
        rx.send(&batch, all.get(..batch.len()).unwrap_or_default())?;
        batch.fault().cloned().map_or(Ok(()), Err)
    }
}

/// Serves one connection on `socket`.
pub(crate) fn serve(socket: &std::path::Path) -> Result<(), Box<dyn Error>> {
    let backend = Arc::new(RwLock::new(NetBackend::new(1, 1500, Reflector::default())));
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let mut daemon = VhostUserDaemon::new("net".to_owned(), backend, memory)
        .map_err(|error| format!("cannot make the daemon: {error}"))?;
    daemon.serve(socket).map_err(|error| format!("cannot serve: {error}").into())
}

fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: vhost_user_daemon SOCKET")?;
    serve(socket.as_ref())
}
