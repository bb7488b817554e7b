//! Why a frame died: one table yields the enum, the names, the texts and the documentation.

macro_rules! drop_reasons {
    ($($variant:ident $name:literal $text:literal;)+) => {
        /// Why a frame died. Every frame that is not delivered is counted under one of these.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum DropReason {
            $(#[doc = $text] $variant,)+
        }

        impl DropReason {
            /// All reasons, in the order of their counters.
            pub const ALL: [Self; DropReason::COUNT] = [$(Self::$variant),+];
            /// How many there are.
            pub const COUNT: usize = [$($name),+].len();

            /// The name in statistics.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }

            /// What it means, in a sentence.
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text),+ }
            }
        }
    };
}

drop_reasons! {
    Runt "runt" "The frame is shorter than an Ethernet header, its tag included.";
    Oversize "oversize" "The frame is longer than the port's MTU allows.";
    RingDisabled "ring_disabled" "The guest sent on a queue that its driver has not enabled.";
    ReservedMac "reserved_mac" "The destination is a link-local address that bridges keep.";
    BadSource "bad_source" "The source address is a group address or zero.";
    Spoofed "spoofed" "The source is none of the addresses that the port may use (antispoof).";
    Storm "storm" "More broadcast, multicast or unknown destinations than storm-kpps allows.";
    SamePort "same_port" "The destination is behind the port that the frame came from.";
    NoDestination "no_destination" "No other port is a member of the frame's VLAN.";
    VlanUntagged "vlan_untagged" "An untagged frame on a port that takes tagged frames only.";
    VlanTagged "vlan_tagged" "A tagged frame on an access port, or a tag behind a tag of no VLAN.";
    VlanNotAllowed "vlan_not_allowed" "The frame's VLAN is not among those of the port.";
    NoBuffer "no_buffer" "The receiving guest had no free buffer.";
    TooLarge "too_large" "The frame is longer than the guest's buffers; enable mergeable ones.";
    PortDown "port_down" "The egress port went away or its queue stopped.";
    HandOverFull "hand_over_full" "The worker that the frame's flow belongs to had no room for it.";
    DeferralFull "deferral_full" "Too many frames wait for a guest whose memory is not there yet.";
    NotTranslated "not_translated" "Too many frames wait for addresses of the guest's vIOMMU.";
    KernelRingFull "kernel_ring_full" "The kernel found the uplink's receive queue full.";
    KernelNoBuffer "kernel_no_buffer" "The kernel had no buffer of the uplink that could take it.";
    KernelTruncated "kernel_truncated" "The kernel had no room for the whole frame in a block.";
    UplinkBusy "uplink_busy" "The kernel's queue of the uplink was full.";
    UplinkError "uplink_error" "The kernel refused the frame.";
    BadOffload "bad_offload" "The virtio-net header contradicts the frame or what was negotiated.";
    RxFiltered "rx_filtered" "The receiving guest's driver filters it out (control queue).";
    Panicked "panicked" "A bug ended the worker's turn that held the frame.";
}

#[cfg(test)]
mod tests {
    use super::DropReason;

    #[test]
    fn counters_stand_in_the_order_of_the_enum() {
        for (index, reason) in DropReason::ALL.iter().enumerate() {
            assert_eq!(*reason as usize, index);
        }
    }

    #[test]
    fn names_are_unique_snake_case() {
        let mut names: Vec<_> = DropReason::ALL.iter().map(|r| r.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), DropReason::COUNT);
        assert!(names.iter().all(|n| n.chars().all(|c| c.is_ascii_lowercase() || c == '_')));
    }
}
