//! VLAN rules of a port: which frames come in, in which VLAN, and how they go out.
//!
//! | rule | untagged in | tagged in | out |
//! |---|---|---|---|
//! | any | VLAN 0 | VLAN of the tag | as it came: VLAN 0 untagged, others tagged |
//! | access N | VLAN N | drop `vlan_tagged` | VLAN N, untagged |
//! | trunk A+B | drop `vlan_untagged` | A or B, else drop `vlan_not_allowed` | tagged |
//! | trunk A+B, native N | VLAN N | A, B or N | tagged, N untagged |
//!
//! A priority tag (VLAN 0) counts as untagged; its priority is kept where the frame goes out
//! tagged.
//!
//! **Two tags.** The outer one decides, the inner one is payload. It must never become the tag
//! that a trunk's other end goes by, or a guest could choose a VLAN that is not its own: ports
//! with a VLAN of their own drop a priority tag before another tag (`vlan_tagged`), and a trunk
//! leaves the tag of its native VLAN on if another one is behind it.
//!
//! **Service tags** (802.1ad) name no VLAN of ours. As an outer tag they leave a frame untagged, in
//! front of a tag that only others see: Linux strips one of VLAN 0, and then goes by what is behind
//! it. So ports with a VLAN of their own drop it (`vlan_tagged`), and as an inner tag it counts as
//! any other. Where all tags pass, so does it.

use packet::VlanId;
use port::{DropReason, Frame};

const VLAN_BITS: u16 = 0x0fff;

/// A port's rule.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum VlanRule {
    /// All tags pass; untagged frames are in VLAN 0.
    #[default]
    Any,
    /// Untagged frames only, all in one VLAN.
    Access(VlanId),
    /// Tagged frames of some VLANs.
    Trunk {
        /// The VLANs, the native one included.
        allowed: VlanSet,
        /// Where untagged frames belong; none: they are dropped.
        native: Option<VlanId>,
    },
}

/// A rule that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VlanRuleError {
    /// A number that is no VLAN.
    #[error("{0} is not a VLAN: 1 to 4094 are")]
    OutOfRange(u16),
}

impl VlanRule {
    /// The rule of the keys `vlan=N` and `trunk=A+B+C`.
    ///
    /// # Errors
    ///
    /// [`VlanRuleError`] if a number is not a VLAN.
    pub fn from_keys(vlan: Option<u16>, trunk: &[u16]) -> Result<Self, VlanRuleError> {
        let check = |number: u16| match VlanId::new(number) {
            Some(vlan) if vlan != VlanId::NONE => Ok(vlan),
            _ => Err(VlanRuleError::OutOfRange(number)),
        };
        let native = vlan.map(check).transpose()?;
        if trunk.is_empty() {
            return Ok(native.map_or(Self::Any, Self::Access));
        }
        let mut allowed = VlanSet::default();
        for number in trunk {
            allowed.insert(check(*number)?);
        }
        if let Some(native) = native {
            allowed.insert(native);
        }
        Ok(Self::Trunk { allowed, native })
    }

    /// Classifies a frame by its outer tag; `stacked` tells whether another one is behind it, or a
    /// service tag where there is none.
    #[inline(always)]
    pub(crate) fn ingress(
        &self,
        tag: Option<u16>,
        stacked: impl FnOnce() -> bool,
    ) -> Result<Tagging, DropReason> {
        if let (Self::Any, None) = (self, tag) {
            return Ok(Tagging::default());
        }
        self.ingress_by_rule(tag, stacked())
    }

    fn ingress_by_rule(&self, tag: Option<u16>, stacked: bool) -> Result<Tagging, DropReason> {
        let tci = tag.unwrap_or(0);
        let (vlan, tagged) = (tci & VLAN_BITS, tag.is_some());
        let vlan = match (self, vlan) {
            (Self::Any, 0) => 0,
            (Self::Access(_) | Self::Trunk { native: Some(_), .. }, 0) if stacked => {
                return Err(DropReason::VlanTagged);
            }
            (Self::Access(access), 0) => access.get(),
            (Self::Trunk { native, .. }, 0) => {
                native.map(VlanId::get).ok_or(DropReason::VlanUntagged)?
            }
            (Self::Access(_), _) => return Err(DropReason::VlanTagged),
            (Self::Any, vlan) if vlan <= VlanId::MAX => vlan,
            (Self::Trunk { allowed, .. }, vlan) if allowed.contains(vlan) => vlan,
            _ => return Err(DropReason::VlanNotAllowed),
        };
        Ok(Tagging { tci: tci & !VLAN_BITS | vlan, tagged, present: tagged })
    }

    /// Whether frames of `vlan` go out here.
    #[inline(always)]
    pub(crate) fn is_member(&self, vlan: u16) -> bool {
        match self {
            Self::Any => true,
            Self::Access(access) => access.get() == vlan,
            Self::Trunk { allowed, .. } => allowed.contains(vlan),
        }
    }

    /// Gives a frame the outer tag that it goes out with.
    #[inline]
    pub(crate) fn apply(&self, tagging: &mut Tagging, frame: &mut Frame) {
        // What came untagged has no tag at all.
        let present = tagging.present;
        let stacked = || tagging.tagged && frame.has_tag_behind(present);
        let tag = self.egress(*tagging, stacked);
        let done = frame.set_tag(present, tag);
        debug_assert!(done, "a head has room for one more tag");
        tagging.present = tag.is_some();
    }

    /// As [`Self::apply`], of frames that came in alike.
    #[inline]
    pub(crate) fn apply_all(&self, tagging: Tagging, frames: &mut [Frame]) {
        if tagging.tagged {
            frames.iter_mut().for_each(|frame| self.apply(&mut { tagging }, frame));
        } else if let tag @ Some(_) = self.egress(tagging, || false) {
            // What came untagged gets one and the same tag, or none.
            for frame in frames {
                let done = frame.set_tag(false, tag);
                debug_assert!(done, "a head has room for one more tag");
            }
        }
    }

    /// The outer tag that a frame goes out with; `stacked` as for [`Self::ingress`].
    #[inline]
    fn egress(&self, tagging: Tagging, stacked: impl FnOnce() -> bool) -> Option<u16> {
        match self {
            Self::Any if tagging.vlan() == 0 => tagging.tagged.then_some(tagging.tci),
            Self::Any => Some(tagging.tci),
            Self::Access(_) => None,
            Self::Trunk { native, .. } => {
                let own = native.is_some_and(|native| native.get() == tagging.vlan());
                (!own || stacked()).then_some(tagging.tci)
            }
        }
    }
}

/// What is known of a frame's VLAN once it is in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Tagging {
    /// Priority as it came, and the VLAN that it is in.
    tci: u16,
    /// Whether it came with a tag.
    tagged: bool,
    /// Whether its outer tag is there now: ways out edit one and the same frame, in turn.
    present: bool,
}

impl Tagging {
    #[inline(always)]
    pub(crate) fn vlan(self) -> u16 {
        self.tci & VLAN_BITS
    }
}

/// A set of VLANs.
#[derive(Clone, PartialEq, Eq)]
pub struct VlanSet(Box<[u64; 64]>);

impl Default for VlanSet {
    fn default() -> Self {
        Self(Box::new([0; 64]))
    }
}

impl VlanSet {
    /// Adds a VLAN.
    pub fn insert(&mut self, vlan: VlanId) {
        if let Some(word) = self.0.get_mut(usize::from(vlan.get() >> 6)) {
            *word |= 1 << (vlan.get() & 63);
        }
    }

    /// Whether `vlan` is in the set.
    #[inline(always)]
    pub fn contains(&self, vlan: u16) -> bool {
        self.0.get(usize::from(vlan >> 6)).is_some_and(|word| word >> (vlan & 63) & 1 == 1)
    }
}

impl std::fmt::Debug for VlanSet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries((0..=VlanId::MAX).filter(|vlan| self.contains(*vlan))).finish()
    }
}

#[cfg(test)]
mod tests {
    use port::DropReason;

    use super::{VlanRule, VlanRuleError};

    fn through(
        from: &VlanRule,
        tag: Option<u16>,
        to: &VlanRule,
    ) -> Result<Option<u16>, DropReason> {
        from.ingress(tag, || false).map(|tagging| to.egress(tagging, || false))
    }

    #[test]
    fn the_table_of_the_module() {
        let any = VlanRule::Any;
        let access = VlanRule::from_keys(Some(5), &[]).unwrap();
        let trunk = VlanRule::from_keys(None, &[5, 6]).unwrap();
        let native = VlanRule::from_keys(Some(5), &[6]).unwrap();

        assert_eq!(through(&any, None, &any), Ok(None));
        assert_eq!(through(&any, Some(0xa005), &any), Ok(Some(0xa005)));
        assert_eq!(through(&any, Some(0xa000), &any), Ok(Some(0xa000)), "priority tag");
        assert_eq!(any.ingress(Some(4095), || false), Err(DropReason::VlanNotAllowed));

        assert_eq!(through(&access, None, &trunk), Ok(Some(5)));
        assert_eq!(through(&access, None, &any), Ok(Some(5)));
        assert_eq!(through(&access, Some(0xe000), &trunk), Ok(Some(0xe005)), "priority kept");
        assert_eq!(access.ingress(Some(5), || false), Err(DropReason::VlanTagged));

        assert_eq!(trunk.ingress(None, || false), Err(DropReason::VlanUntagged));
        assert_eq!(trunk.ingress(Some(0x2000), || false), Err(DropReason::VlanUntagged));
        assert_eq!(trunk.ingress(Some(7), || false), Err(DropReason::VlanNotAllowed));
        assert_eq!(through(&trunk, Some(0x3005), &access), Ok(None));
        assert_eq!(through(&trunk, Some(0x3006), &native), Ok(Some(0x3006)));

        assert_eq!(through(&native, None, &trunk), Ok(Some(5)));
        assert_eq!(through(&trunk, Some(5), &native), Ok(None));
        assert_eq!(through(&native, Some(5), &native), Ok(None));
        assert!(native.is_member(5) && native.is_member(6) && !native.is_member(0));
        assert!(any.is_member(0) && any.is_member(4094) && !access.is_member(6));
    }

    #[test]
    fn an_inner_tag_never_decides() {
        let any = VlanRule::Any;
        let access = VlanRule::from_keys(Some(5), &[]).unwrap();
        let trunk = VlanRule::from_keys(None, &[5, 6]).unwrap();
        let native = VlanRule::from_keys(Some(5), &[6]).unwrap();
        for rule in [&access, &native] {
            assert_eq!(rule.ingress(Some(0x2000), || true), Err(DropReason::VlanTagged));
        }
        assert_eq!(trunk.ingress(Some(0), || true), Err(DropReason::VlanUntagged));
        let out = |from: &VlanRule, tag, to: &VlanRule| {
            from.ingress(Some(tag), || true).map(|tagging| to.egress(tagging, || true))
        };
        assert_eq!(out(&trunk, 5, &native), Ok(Some(5)), "or the inner one would count");
        assert_eq!(out(&native, 5, &native), Ok(Some(5)));
        assert_eq!(out(&trunk, 5, &access), Ok(None), "payload of an access port");
        assert_eq!(out(&any, 0, &any), Ok(Some(0)));
    }

    #[test]
    fn numbers_that_are_no_vlan_are_refused() {
        assert_eq!(VlanRule::from_keys(Some(0), &[]), Err(VlanRuleError::OutOfRange(0)));
        assert_eq!(VlanRule::from_keys(None, &[1, 4095]), Err(VlanRuleError::OutOfRange(4095)));
        assert_eq!(VlanRule::from_keys(None, &[]), Ok(VlanRule::Any));
    }
}
