//! The control queue's commands (virtio 1.3, section 5.1.6.5).
//!
//! ```text
//!  readable: class │ command │ data …          writable: ack
//! ```
//!
//! **Trust.** A command is copied once, at most [`COMMAND_MAX`] bytes of it, and parsed whole
//! before anything changes. What is malformed or was not negotiated is answered with an error.

use virtio_bindings::virtio_net as net;
use virtq::{ChainError, Chains};

use super::activate::ControlQueue;
use super::filter::Table;
use super::{Action, Device, Mac, RxFilter};
use crate::{features, notify};

/// Bytes of the longest command that is understood: two MAC tables of a thousand entries.
const COMMAND_MAX: usize = 16 << 10;
/// Commands that are worked off with one look at the ring.
const BURST: usize = 16;

/// The answer to a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ack {
    /// `VIRTIO_NET_OK`
    Ok,
    /// `VIRTIO_NET_ERR`
    Err,
}

impl Ack {
    /// The byte that the driver reads.
    #[expect(clippy::cast_possible_truncation, reason = "0 and 1")]
    pub fn byte(self) -> u8 {
        match self {
            Self::Ok => net::VIRTIO_NET_OK as u8,
            Self::Err => net::VIRTIO_NET_ERR as u8,
        }
    }
}

/// A command went well, and what it asks of the VMM.
pub(super) type Answer = Option<Option<Action>>;
pub(super) const DONE: Answer = Some(None);

impl Device {
    /// Works off the control queue; call it at every kick of that queue. Answers are published,
    /// the driver is called if it wants that.
    ///
    /// # Errors
    ///
    /// The driver broke the ring: see [`Device::needs_reset`].
    pub fn serve_control(&mut self, control: &mut ControlQueue) -> Result<Vec<Action>, ChainError> {
        let mut actions = Vec::new();
        notify::drain(control.events.kick.as_ref());
        control.queue.disable_kicks();
        loop {
            let chains = control.queue.pop(&mut control.chains, BURST);
            let fault = chains.fault();
            let answers: Vec<_> =
                (0..chains.len()).map(|index| self.one(&chains, index, &mut actions)).collect();
            for (token, written) in &answers {
                control.queue.complete(*token, *written);
            }
            control.publish_and_call();
            if let Some(fault) = fault {
                return Err(fault);
            }
            if answers.is_empty() && !control.queue.enable_kicks() {
                return Ok(actions);
            }
        }
    }

    fn one(
        &mut self,
        chains: &Chains<'_>,
        index: usize,
        actions: &mut Vec<Action>,
    ) -> (virtq::Token, u32) {
        let readable = chains.readable(index);
        let mut bytes = vec![0; (readable.len() as usize).min(COMMAND_MAX)];
        let _ = readable.reader().read(&mut bytes);
        let whole = readable.len() as usize == bytes.len();
        let (ack, action) = match bytes.as_slice() {
            [class, command, data @ ..] if whole => self.command(*class, *command, data),
            _ => (Ack::Err, None),
        };
        actions.extend(action);
        let written = chains.writable(index).writer().write(&[ack.byte()]);
        (chains.token(index), u32::try_from(written).unwrap_or(0))
    }

    /// Executes one command: for VMMs that serve the control queue themselves.
    pub fn command(&mut self, class: u8, command: u8, data: &[u8]) -> (Ack, Option<Action>) {
        let command_of = (u32::from(class), u32::from(command));
        let answer = match command_of.0 {
            net::VIRTIO_NET_CTRL_RX => self.set_mode(command_of.1, data),
            net::VIRTIO_NET_CTRL_MAC => self.set_mac(command_of.1, data),
            net::VIRTIO_NET_CTRL_GUEST_OFFLOADS => self.set_guest_offloads(command_of.1, data),
            net::VIRTIO_NET_CTRL_VLAN => self.set_vlan(command_of.1, data),
            net::VIRTIO_NET_CTRL_ANNOUNCE => self.announced(command_of.1, data),
            net::VIRTIO_NET_CTRL_MQ => match command_of.1 {
                net::VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET => self.set_pairs(data),
                net::VIRTIO_NET_CTRL_MQ_RSS_CONFIG => self.set_rss(data),
                net::VIRTIO_NET_CTRL_MQ_HASH_CONFIG => self.set_hash(data),
                _ => None,
            },
            _ => None,
        };
        match answer {
            Some(action) => (Ack::Ok, action),
            None => (Ack::Err, None),
        }
    }

    fn set_mode(&mut self, command: u32, data: &[u8]) -> Answer {
        let mode: fn(&mut RxFilter) -> &mut bool = match command {
            net::VIRTIO_NET_CTRL_RX_PROMISC => |f| &mut f.promiscuous,
            net::VIRTIO_NET_CTRL_RX_ALLMULTI => |f| &mut f.all_multicast,
            net::VIRTIO_NET_CTRL_RX_ALLUNI => |f| &mut f.all_unicast,
            net::VIRTIO_NET_CTRL_RX_NOMULTI => |f| &mut f.no_multicast,
            net::VIRTIO_NET_CTRL_RX_NOUNI => |f| &mut f.no_unicast,
            net::VIRTIO_NET_CTRL_RX_NOBCAST => |f| &mut f.no_broadcast,
            _ => return None,
        };
        let needs = match command {
            net::VIRTIO_NET_CTRL_RX_PROMISC | net::VIRTIO_NET_CTRL_RX_ALLMULTI => features::CTRL_RX,
            _ => features::CTRL_RX_EXTRA,
        };
        let on = match data {
            [0] => false,
            [1] => true,
            _ => return None,
        };
        if !self.has(needs) {
            return None;
        }
        self.filter.update(|filter| *mode(filter) = on);
        DONE
    }

    fn set_mac(&mut self, command: u32, data: &[u8]) -> Answer {
        match command {
            net::VIRTIO_NET_CTRL_MAC_ADDR_SET if self.has(features::CTRL_MAC_ADDR) => {
                let mac = Mac(data.try_into().ok()?);
                if !mac.is_unicast() {
                    return None;
                }
                self.filter.update(|filter| filter.mac = mac);
                // The driver knows: the generation moves, but no interrupt is raised.
                let _ = self.config_changed(0);
                Some(Some(Action::MacChanged(mac)))
            }
            net::VIRTIO_NET_CTRL_MAC_TABLE_SET if self.has(features::CTRL_RX) => {
                let (unicast, rest) = table(data)?;
                let (multicast, rest) = table(rest)?;
                if !rest.is_empty() {
                    return None;
                }
                self.filter.update(|filter| {
                    (filter.unicast, filter.multicast) = (unicast, multicast);
                });
                DONE
            }
            _ => None,
        }
    }

    fn set_vlan(&mut self, command: u32, data: &[u8]) -> Answer {
        let passes = match command {
            net::VIRTIO_NET_CTRL_VLAN_ADD => true,
            net::VIRTIO_NET_CTRL_VLAN_DEL => false,
            _ => return None,
        };
        let vlan = u16::from_le_bytes(data.try_into().ok()?);
        let known = self.has(features::CTRL_VLAN)
            && self.filter.update(|filter| filter.set_vlan(vlan, passes));
        known.then_some(None)
    }

    fn announced(&mut self, command: u32, data: &[u8]) -> Answer {
        let expected = command == net::VIRTIO_NET_CTRL_ANNOUNCE_ACK
            && data.is_empty()
            && self.has(features::GUEST_ANNOUNCE)
            && self.announcing;
        if !expected {
            return None;
        }
        self.announcing = false;
        let _ = self.config_changed(0);
        Some(Some(Action::Announced))
    }

    fn set_pairs(&mut self, data: &[u8]) -> Answer {
        let pairs = u16::from_le_bytes(data.try_into().ok()?);
        let allowed = self.has(features::MQ) && (1..=self.settings.queue_pairs).contains(&pairs);
        if !allowed {
            return None;
        }
        self.active_pairs = pairs;
        self.rss = None;
        Some(Some(Action::QueuePairs(pairs)))
    }
}

/// Reads a table of addresses: le32 entries, then as many addresses. Returns what follows.
fn table(data: &[u8]) -> Option<(Table, &[u8])> {
    let (count, rest) = data.split_first_chunk::<4>()?;
    let count = usize::try_from(u32::from_le_bytes(*count)).ok()?;
    let (entries, rest) = rest.split_at_checked(count.checked_mul(6)?)?;
    let macs = entries.as_chunks::<6>().0.iter().map(|bytes| Mac(*bytes)).collect();
    Some((Table::new(macs), rest))
}
