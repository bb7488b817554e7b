#![doc = include_str!("../README.md")]
#![forbid(unsafe_code)]

mod clock;
mod faults;
mod frames;
mod front_end;
mod guest;
mod ledger;
mod model;
mod remote;
pub mod request;
mod rng;

pub use clock::VirtualClock;
pub use faults::{Faults, FaultyEgress, FaultyIngress};
pub use frames::{TestFrame, read_frame};
pub use front_end::{FrontEnd, FrontEndError, SharedMemory};
pub use guest::{Guest, GuestError, GuestSettings, ReceivedFrame};
pub use ledger::{Imbalance, Ledger, Moved};
pub use model::{Outcome, SwitchModel};
pub use remote::{Remote, RemoteError};
pub use rng::Rng;
