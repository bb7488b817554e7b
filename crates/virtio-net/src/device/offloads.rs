//! Offloads towards the driver that it switches on and off while the queues run (virtio 1.3,
//! section 5.1.6.5.7).

use std::sync::{Arc, PoisonError, RwLock};

use virtio_bindings::virtio_net as net;

use super::Device;
use super::control::{Answer, DONE};
use crate::features;

/// The bits of [`features::GUEST_OFFLOADS`] in force. Receiveqs hold them for a burst, so when the
/// driver's command is answered no frame is under way with what it switched off.
#[derive(Debug, Clone, Default)]
pub(crate) struct SharedOffloads(Arc<RwLock<u64>>);

impl SharedOffloads {
    /// Calls `burst` with the bits in force, which stay until it returns.
    pub(crate) fn during<R>(&self, burst: impl FnOnce(u64) -> R) -> R {
        let bits = self.0.read().unwrap_or_else(PoisonError::into_inner);
        burst(*bits)
    }

    pub(crate) fn set(&self, bits: u64) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = bits & features::GUEST_OFFLOADS;
    }
}

impl Device {
    pub(super) fn set_guest_offloads(&mut self, command: u32, data: &[u8]) -> Answer {
        let bits = u64::from_le_bytes(data.try_into().ok()?);
        let allowed = command == net::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET
            && self.has(features::CTRL_GUEST_OFFLOADS)
            && bits & !(self.acked & features::GUEST_OFFLOADS) == 0
            && features::offloads_go_together(bits);
        if !allowed {
            return None;
        }
        self.guest_offloads.set(bits);
        DONE
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use virtio_bindings::virtio_net as net;

    use super::super::{ACKNOWLEDGE, Ack, DRIVER, DRIVER_OK, DeviceSettings, FEATURES_OK, Mac};
    use super::Device;
    use crate::features::{self as f, CTRL_GUEST_OFFLOADS};

    fn running(features: u64) -> Device {
        let settings =
            DeviceSettings { mac: Mac([2, 0, 0, 0, 0, 7]), mtu: None, queue_pairs: 1, without: 0 };
        let mut device = Device::new(settings).unwrap();
        device.set_driver_features(f::VERSION_1 | f::CTRL_VQ | features);
        let _ = device.set_status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        assert_ne!(device.status() & FEATURES_OK, 0);
        let _ = device.set_status(device.status() | DRIVER_OK);
        device
    }

    fn set(device: &mut Device, bits: u64) -> Ack {
        let class = u8::try_from(net::VIRTIO_NET_CTRL_GUEST_OFFLOADS).unwrap();
        let command = u8::try_from(net::VIRTIO_NET_CTRL_GUEST_OFFLOADS_SET).unwrap();
        device.command(class, command, &bits.to_le_bytes()).0
    }

    #[test]
    fn the_driver_switches_what_it_negotiated_and_what_goes_together() {
        let tso = f::GUEST_CSUM | f::GUEST_TSO4;
        let mut device = running(tso | CTRL_GUEST_OFFLOADS);
        let now = |device: &Device| device.guest_offloads.during(|bits| bits);
        assert_eq!(now(&device), tso, "what was negotiated is on at first");
        for (bits, answer) in [
            (0, Ack::Ok),
            (f::GUEST_TSO4, Ack::Err),
            (tso, Ack::Ok),
            (tso | f::GUEST_TSO6, Ack::Err),
            (f::GUEST_CSUM, Ack::Ok),
        ] {
            assert_eq!(set(&mut device, bits), answer, "{bits:#x}");
        }
        assert_eq!(now(&device), f::GUEST_CSUM);
        let class = u8::try_from(net::VIRTIO_NET_CTRL_GUEST_OFFLOADS).unwrap();
        assert_eq!(device.command(class, 0, &[0; 7]).0, Ack::Err);
        assert_eq!(device.command(class, 1, &[0; 8]).0, Ack::Err);
        let _ = device.set_status(0);
        assert_eq!(now(&device), 0);
        assert_eq!(set(&mut running(tso), 0), Ack::Err, "was not negotiated");
    }

    #[test]
    fn a_change_waits_for_the_burst_that_is_under_way() {
        let mut device = running(f::GUEST_CSUM | CTRL_GUEST_OFFLOADS);
        let shared = device.guest_offloads.clone();
        let (began, begins) = channel();
        let (end, ends) = channel::<()>();
        let burst = std::thread::spawn(move || {
            shared.during(|bits| {
                began.send(bits).unwrap();
                let _ = ends.recv();
                bits
            })
        });
        assert_eq!(begins.recv().unwrap(), f::GUEST_CSUM);
        let (done, answered) = channel();
        let command = std::thread::spawn(move || {
            let ack = set(&mut device, 0);
            done.send(()).unwrap();
            ack
        });
        std::thread::yield_now();
        assert!(answered.try_recv().is_err(), "the burst still runs");
        drop(end);
        assert_eq!(burst.join().unwrap(), f::GUEST_CSUM);
        assert_eq!(command.join().unwrap(), Ack::Ok);
    }
}
