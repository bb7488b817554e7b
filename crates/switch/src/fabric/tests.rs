use std::collections::BTreeSet;
use std::sync::Arc;

use port::{PortId, PortTotals};

use super::{FEW_IDS, free_id, new_port};
use crate::PortConfig;
use crate::table::{Record, Records};

fn records(count: u16, taken: impl Fn(u16) -> bool) -> Records {
    let new = |id| Record {
        port: Arc::new(new_port(PortId(id), &PortConfig::new(id.to_string()))),
        attached: BTreeSet::new(),
        pairs_seen: 0,
        quarantined: false,
        guard: None,
        taps: Vec::new(),
        hashed: None,
        elsewhere: PortTotals::default(),
    };
    (0..count).map(|id| taken(id).then(|| new(id))).collect()
}

#[test]
fn ids_go_round_and_skip_what_is_taken() {
    let few = records(4, |id| id == 1);
    assert_eq!(free_id(&few, 0), Some(0));
    assert_eq!(free_id(&few, 1), Some(2));
    assert_eq!(free_id(&few, FEW_IDS - 1), Some(FEW_IDS - 1));
    assert_eq!(free_id(&few, FEW_IDS), Some(0), "tables stay small");
    let many = records(FEW_IDS, |_| true);
    assert_eq!(free_id(&many, 0), Some(FEW_IDS));
    assert_eq!(free_id(&many, u16::MAX - 1), Some(u16::MAX - 1));
    assert_eq!(free_id(&many, u16::MAX), Some(FEW_IDS));
    assert_eq!(free_id(&records(u16::MAX, |_| true), 7), None);
}
