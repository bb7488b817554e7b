//! `struct virtio_net_config` (virtio 1.3, section 5.1.4): read-only for modern drivers, so writes
//! have no function here.

use virtio_bindings::virtio_net as net;

use super::Device;

/// Bytes of the configuration space that have a meaning; reads behind them give zeros.
///
/// `mac[6] | status: le16 | max_virtqueue_pairs: le16 | mtu: le16 | speed: le32 | duplex: u8 |
/// rss_max_key_size: u8 | rss_max_indirection_table_length: le16 | supported_hash_types: le32`
pub const CONFIG_BYTES: usize = 24;

/// Bits of the status field. They are small: the conversion keeps them.
#[expect(clippy::cast_possible_truncation, reason = "checked by the assertion")]
const fn half(constant: u32) -> u16 {
    assert!(constant < 65536, "the status field has 16 bits");
    constant as u16
}

const LINK_UP: u16 = half(net::VIRTIO_NET_S_LINK_UP);
const ANNOUNCE: u16 = half(net::VIRTIO_NET_S_ANNOUNCE);

impl Device {
    /// The driver reads the configuration space from `offset` on.
    pub fn read_config(&self, offset: usize, out: &mut [u8]) {
        let space = self.config_space();
        let from = space.get(offset..).unwrap_or_default();
        for (index, byte) in out.iter_mut().enumerate() {
            *byte = from.get(index).copied().unwrap_or(0);
        }
    }

    /// Changes whenever the configuration space does: a driver that reads several fields reads
    /// it before and after.
    pub fn config_generation(&self) -> u8 {
        self.generation
    }

    fn config_space(&self) -> [u8; CONFIG_BYTES] {
        let link = if self.link_up { LINK_UP } else { 0 };
        let announce = if self.announcing { ANNOUNCE } else { 0 };
        let [s0, s1] = (link | announce).to_le_bytes();
        let [p0, p1] = self.settings.queue_pairs.to_le_bytes();
        let [m0, m1] = self.settings.mtu.unwrap_or(0).to_le_bytes();
        let [a, b, c, d, e, f] = self.mac().0;
        // Speed and duplex are not offered.
        let link = [0; 5];
        let mut space = [0; CONFIG_BYTES];
        let known = [a, b, c, d, e, f, s0, s1, p0, p1, m0, m1];
        let bytes = known.into_iter().chain(link).chain(self.rss_limits());
        space.iter_mut().zip(bytes).for_each(|(place, byte)| *place = byte);
        space
    }
}
