//! Captures: each has a thread of its own, which the client's connection is given to.

use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use control::Reply;
use control::capture::{CAPTURES_MAX, CaptureRequest, Prepared};
use control::server::ClientId;
use event_manager::{Events, SubscriberOps};
use switch::Switch;

use super::App;

/// Captures that run, or ran since the last one began.
#[derive(Debug, Default)]
pub(super) struct Captures(Vec<JoinHandle<()>>);

impl Captures {
    fn running(&mut self) -> usize {
        self.0.retain(|thread| !thread.is_finished());
        self.0.len()
    }

    /// Waits for their ends, which the end of their ports has brought about.
    pub(super) fn join(&mut self) {
        for thread in self.0.drain(..) {
            let _ = thread.join();
        }
    }
}

impl App {
    /// Begins a capture for a client, whose connection belongs to it from then on. The reply is
    /// one that the client has still to be given.
    pub(super) fn capture(&mut self, client: ClientId, request: CaptureRequest) -> Option<Reply> {
        let Some(port) = self.switch.port(&request.port) else {
            return Some(self.no_port(&request.port));
        };
        if self.captures.running() >= CAPTURES_MAX {
            return Some(Reply::Failed(format!("{CAPTURES_MAX} captures run already")));
        }
        let (prepared, tap) = match Prepared::new(request) {
            Ok(new) => new,
            Err(text) => return Some(Reply::Usage(text)),
        };
        // No frame after the reply is missed.
        let _ = self.switch.add_tap(port.id, &tap);
        let name = port.name().to_owned();
        let detach = {
            let switch: Weak<Switch> = Arc::downgrade(&self.switch);
            let tap = tap.clone();
            move || {
                if let Some(switch) = switch.upgrade() {
                    let _ = switch.remove_tap(port.id, &tap);
                }
            }
        };
        let answered = self.server.reply(client, &Reply::done(format!("capturing port {name}")));
        if let (Ok(mut ops), Some(fd)) =
            (self.manager.event_ops(self.hub), self.server.client(client))
        {
            let _ = ops.remove(Events::empty(&fd));
        }
        // The answer is short: it went out at once, or the client does not read at all.
        let stream = self.server.release(client).filter(|_| answered);
        let pump = stream.map(|stream| prepared.to(stream));
        let Some(Ok(pump)) = pump else {
            detach();
            return None;
        };
        let thread = std::thread::Builder::new().name("capture".to_owned());
        let ended = name.clone();
        let run = move || {
            pump.run(detach);
            tracing::info!(port = ended, "capture ended");
        };
        match thread.spawn(run) {
            Ok(thread) => {
                tracing::info!(port = name, "capture began");
                self.captures.0.push(thread);
            }
            Err(error) => {
                tracing::error!(%error, "cannot start a thread for a capture");
                let _ = self.switch.remove_tap(port.id, &tap);
            }
        }
        None
    }
}
