//! What a learning bridge does with a frame, in its simplest form: the oracle of simulations.
//!
//! **Not supported.** Ageing, limits, static entries, priority tags.

use std::collections::HashMap;

use packet::MacAddr;
use switch::VlanRule;

use crate::TestFrame;

/// What has to happen to a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It arrives at these ports, with these tags.
    Delivered(Vec<(usize, Option<u16>)>),
    /// It dies for this reason.
    Dropped(port::DropReason),
}

/// A bridge with numbered ports.
#[derive(Debug)]
pub struct SwitchModel {
    rules: Vec<VlanRule>,
    up: Vec<bool>,
    stations: HashMap<(u16, MacAddr), usize>,
}

impl SwitchModel {
    /// A bridge whose ports have these rules and are all down.
    pub fn new(rules: Vec<VlanRule>) -> Self {
        let up = vec![false; rules.len()];
        Self { rules, up, stations: HashMap::new() }
    }

    /// A port came up or went down. A port that goes down keeps its stations.
    pub fn set_up(&mut self, port: usize, up: bool) {
        if let Some(place) = self.up.get_mut(port) {
            *place = up;
        }
    }

    /// A frame arrives at `port`.
    pub fn frame(&mut self, port: usize, frame: &TestFrame) -> Outcome {
        use port::DropReason;
        let vlan = match self.rules.get(port).map(|rule| enter(rule, frame.tci)) {
            Some(Ok(vlan)) => vlan,
            Some(Err(reason)) => return Outcome::Dropped(reason),
            None => return Outcome::Dropped(DropReason::NoDestination),
        };
        if frame.src.is_group() || frame.src == MacAddr::ZERO {
            return Outcome::Dropped(DropReason::BadSource);
        }
        if frame.dst.is_reserved() {
            return Outcome::Dropped(DropReason::ReservedMac);
        }
        let _ = self.stations.insert((vlan, frame.src), port);
        let known = self.stations.get(&(vlan, frame.dst)).copied();
        if !frame.dst.is_group()
            && let Some(to) = known
        {
            if to == port {
                return Outcome::Dropped(DropReason::SamePort);
            }
            if !self.up.get(to).copied().unwrap_or(false) {
                return Outcome::Dropped(DropReason::PortDown);
            }
            return match self.rules.get(to).and_then(|rule| leave(rule, vlan)) {
                Some(tci) => Outcome::Delivered(vec![(to, tci)]),
                None => Outcome::Dropped(DropReason::VlanNotAllowed),
            };
        }
        let ports = self.rules.iter().zip(&self.up).enumerate();
        let members = ports.filter(|(to, (_, up))| *to != port && **up);
        let all: Vec<_> =
            members.filter_map(|(to, (rule, _))| Some((to, leave(rule, vlan)?))).collect();
        if all.is_empty() {
            return Outcome::Dropped(DropReason::NoDestination);
        }
        Outcome::Delivered(all)
    }
}

/// The VLAN of a frame that enters by a rule.
fn enter(rule: &VlanRule, tci: Option<u16>) -> Result<u16, port::DropReason> {
    use port::DropReason;
    match (rule, tci.map(|tci| tci & 0xfff)) {
        (VlanRule::Any, vlan) => Ok(vlan.unwrap_or(0)),
        (VlanRule::Access(vlan), None) => Ok(vlan.get()),
        (VlanRule::Access(_), Some(_)) => Err(DropReason::VlanTagged),
        (VlanRule::Trunk { native: Some(vlan), .. }, None) => Ok(vlan.get()),
        (VlanRule::Trunk { native: None, .. }, None) => Err(DropReason::VlanUntagged),
        (VlanRule::Trunk { allowed, .. }, Some(vlan)) if allowed.contains(vlan) => Ok(vlan),
        (VlanRule::Trunk { .. }, Some(_)) => Err(DropReason::VlanNotAllowed),
    }
}

/// The tag of a frame that leaves by a rule; none if the rule keeps it in.
fn leave(rule: &VlanRule, vlan: u16) -> Option<Option<u16>> {
    match rule {
        VlanRule::Any => Some((vlan != 0).then_some(vlan)),
        VlanRule::Access(own) => (own.get() == vlan).then_some(None),
        VlanRule::Trunk { native: Some(native), .. } if native.get() == vlan => Some(None),
        VlanRule::Trunk { allowed, .. } => allowed.contains(vlan).then_some(Some(vlan)),
    }
}

#[cfg(test)]
mod tests {
    use packet::MacAddr;
    use port::DropReason;
    use switch::VlanRule;

    use super::{Outcome, SwitchModel};
    use crate::TestFrame;

    fn frame(src: u8, dst: u8, tci: Option<u16>) -> TestFrame {
        let mac = |n| MacAddr([2, 0, 0, 0, 0, n]);
        TestFrame { dst: mac(dst), src: mac(src), tci, id: 1, len: 60 }
    }

    #[test]
    fn it_learns_and_floods() {
        let mut bridge = SwitchModel::new(vec![VlanRule::Any; 3]);
        assert_eq!(
            bridge.frame(0, &frame(1, 2, None)),
            Outcome::Dropped(DropReason::NoDestination)
        );
        for port in 0..3 {
            bridge.set_up(port, true);
        }
        let flood = Outcome::Delivered(vec![(1, None), (2, None)]);
        assert_eq!(bridge.frame(0, &frame(1, 2, None)), flood);
        assert_eq!(bridge.frame(1, &frame(2, 1, None)), Outcome::Delivered(vec![(0, None)]));
        assert_eq!(bridge.frame(0, &frame(1, 2, None)), Outcome::Delivered(vec![(1, None)]));
        assert_eq!(bridge.frame(1, &frame(3, 2, None)), Outcome::Dropped(DropReason::SamePort));
        bridge.set_up(1, false);
        assert_eq!(bridge.frame(0, &frame(1, 2, None)), Outcome::Dropped(DropReason::PortDown));
    }

    #[test]
    fn vlans_are_kept_apart() {
        let access = VlanRule::from_keys(Some(5), &[]).unwrap();
        let trunk = VlanRule::from_keys(None, &[5, 6]).unwrap();
        let mut bridge = SwitchModel::new(vec![access.clone(), access, trunk]);
        (0..3).for_each(|port| bridge.set_up(port, true));
        let out = Outcome::Delivered(vec![(1, None), (2, Some(5))]);
        assert_eq!(bridge.frame(0, &frame(1, 9, None)), out);
        let none = Outcome::Dropped(DropReason::NoDestination);
        assert_eq!(bridge.frame(2, &frame(3, 9, Some(6))), none);
        let tagged = Outcome::Dropped(DropReason::VlanTagged);
        assert_eq!(bridge.frame(0, &frame(1, 9, Some(5))), tagged);
    }
}
