//! A two-port switch: `two_port_switch SOCKET SOCKET`, for vhost-user front ends such as QEMU.
#![forbid(unsafe_code)]

use std::error::Error;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use event_manager::{EventManager, SubscriberOps};
use switch::{PortConfig, Switch, SwitchConfig};
use vhost_user_net::{PortLinks, PortSettings, VhostUserPort};

/// Serves a port on each socket until `stop`.
pub(crate) fn serve(sockets: &[PathBuf], stop: &AtomicBool) -> Result<(), Box<dyn Error>> {
    let switch = Arc::new(Switch::start(&SwitchConfig::default())?);
    let mut manager = EventManager::<VhostUserPort>::new()?;
    for (number, socket) in sockets.iter().enumerate() {
        let name = format!("guest{number}");
        let port = switch.add_port(&PortConfig::new(&name))?;
        let (id, status, fabric) = (port.id, port.status.clone(), Arc::clone(&switch) as _);
        let counters = Box::new(move |pair| port.counters(pair).unwrap_or_default());
        let links = PortLinks { id, fabric, status, counters };
        let settings = PortSettings { queues: 1, ..PortSettings::server(name, socket) };
        let _ = manager.add_subscriber(VhostUserPort::new(settings, links)?);
    }
    while !stop.load(Ordering::Relaxed) {
        let _ = manager.run_with_timeout(100)?;
    }
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let sockets: Vec<_> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    serve(&sockets, &AtomicBool::new(false))
}
