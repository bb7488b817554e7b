//! A wire between two vhost-user front ends: `wire [--client] SOCKET SOCKET`.
//!
//! Each front end's transmitqs are connected to the other one's receiveqs.

mod fabric;

use std::error::Error;
use std::sync::{Arc, Mutex};
use std::thread;

use event_manager::{EventManager, MutEventSubscriber, SubscriberOps};
use port::{PortId, StatusCell};
use tracing_subscriber::EnvFilter;
use vhost_user_net::{PortLinks, PortSettings, RingIndex, SocketMode, VhostUserPort};

fn main() -> Result<(), Box<dyn Error>> {
    // RUST_LOG=vhost_user_net=trace shows every message.
    tracing_subscriber::fmt().with_env_filter(EnvFilter::from_default_env()).init();
    let wire = Arc::new(fabric::Wire::default());
    let worker = wire.start();
    let mut manager = EventManager::<Arc<Mutex<dyn MutEventSubscriber>>>::new()?;
    let mut ports = Vec::new();
    let (options, sockets): (Vec<_>, Vec<_>) =
        std::env::args().skip(1).partition(|argument| argument == "--client");
    let mode = if options.is_empty() { SocketMode::Server } else { SocketMode::Client };
    for (number, socket) in (0u16..2).zip(sockets) {
        let counters = Arc::default();
        let links = PortLinks {
            id: PortId(number),
            fabric: wire.clone(),
            status: StatusCell::waiting(""),
            counters: Box::new(move |_| Arc::clone(&counters)),
        };
        let name = format!("g{number}");
        let settings = PortSettings { mode, ..PortSettings::server(name, socket) };
        let status = links.status.clone();
        let port = Arc::new(Mutex::new(VhostUserPort::new(settings, links)?));
        let _ = manager.add_subscriber(port.clone());
        ports.push((port, status, String::new()));
    }
    println!("ready; the end of standard input ends this program");
    let input = thread::spawn(|| std::io::copy(&mut std::io::stdin(), &mut std::io::sink()));
    while !input.is_finished() {
        let _ = manager.run_with_timeout(100)?;
        for ((at, side), fault) in wire.faults() {
            let Some((port, ..)) = ports.get(usize::from(at.port.0)) else { continue };
            let ring = RingIndex(at.pair.saturating_mul(2).saturating_add(side as u16));
            if let Ok(mut port) = port.lock() {
                port.ring_fault(ring, &fault);
            }
        }
        for (number, (_, status, shown)) in ports.iter_mut().enumerate() {
            let now = status.read();
            let error = now.last_error.map_or_else(String::new, |(text, _)| text);
            let text = format!("port {number}: {} {} {error}", now.state.name(), now.reason);
            if *shown != text {
                println!("{text}");
                *shown = text;
            }
        }
    }
    wire.stop();
    worker.join().map_err(|_| "the worker panicked")?;
    Ok(())
}
