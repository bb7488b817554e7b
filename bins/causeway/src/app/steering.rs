//! Uplinks that take frames for known stations only (`steer=mac`) are told which those are: at
//! once when an uplink comes, and soon after the forwarding database changed.
//!
//! **Limits.** A guest that invents addresses changes the database all the time: the uplinks are
//! told at most every [`PAUSE`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use packet::MacAddr;
use port::PortId;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

use super::App;
use super::ports::Side;

/// How long changes are collected.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };

/// The pause between two tellings.
#[derive(Debug)]
pub(super) struct Steering {
    timer: OwnedFd,
}

impl Steering {
    pub(super) fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        Ok(Self { timer: timerfd_create(TimerfdClockId::Monotonic, flags)? })
    }

    pub(super) fn timer(&self) -> &OwnedFd {
        &self.timer
    }

    fn start(&self) {
        let once = Timespec { tv_sec: 0, tv_nsec: 0 };
        let time = Itimerspec { it_interval: once, it_value: PAUSE };
        // If it fails, the next tick tells.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &time);
    }
}

impl App {
    /// Takes care of `fd` if it is about stations.
    pub(super) fn stations_woke(&mut self, fd: RawFd) -> bool {
        let changes = self.switch.fdb_changes().ok().filter(|changes| changes.as_raw_fd() == fd);
        if let Some(changes) = changes {
            let _ = rustix::io::read(changes, &mut [0; 8]);
            self.steering.start();
        } else if self.steering.timer().as_fd().as_raw_fd() == fd {
            let _ = rustix::io::read(self.steering.timer(), &mut [0; 8]);
            self.steer();
        } else {
            return false;
        }
        true
    }

    /// Tells the uplinks that want to know which stations are behind other ports.
    pub(super) fn steer(&mut self) {
        let wants = |side: &Side| match side {
            Side::Uplink(uplink) => uplink.device().is_some_and(|device| device.wants_stations()),
            Side::Absent | Side::Guest(_) => false,
        };
        if !self.ports.iter().any(|port| wants(&port.side)) {
            return;
        }
        // Waited for before it is read, so that no change falls between the two.
        self.switch.watch_fdb();
        let known: Vec<(PortId, MacAddr)> =
            self.switch.fdb().into_iter().map(|entry| (entry.port, entry.mac)).collect();
        for port in &mut self.ports {
            let Side::Uplink(uplink) = &mut port.side else { continue };
            let Some(device) = uplink.device_mut() else { continue };
            if device.wants_stations() {
                let others = known.iter().filter(|(id, _)| *id != port.handle.id);
                let mut stations: Vec<MacAddr> = others.map(|(_, mac)| *mac).collect();
                stations.sort_unstable();
                stations.dedup();
                device.set_stations(stations);
            }
        }
    }
}
