//! The vhost-user session of one port: what a VMM does between its guest and the back end.
//!
//! ```text
//!  open ─► negotiate ─► share_memory ─► start_ring … ─► enable_all ─►  traffic  ─► stop
//! ```
//!
//! The wire is the `vhost` crate's, an implementation that shares no code with our back end.
//!
//! **Not supported.** STATUS, migration, IOTLB.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::{
    VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VringConfigData};
use virtq::driver::Areas;
use vmm_sys_util::eventfd::EventFd;

use crate::cli::Mode;
use crate::memory::Memory;
use crate::stop::Stop;

/// How long a client waits for a back end that is not there yet.
const CONNECT_PATIENCE: Duration = Duration::from_secs(3);
/// How often a waiting server looks whether it should stop.
const LOOK_NS: i64 = 100_000_000;
/// Rings that vhost-user can number.
const MAX_RINGS: u64 = 256;

/// A session with one back end.
pub(crate) struct Session {
    frontend: Frontend,
    /// The same socket, to see when the back end goes away.
    stream: UnixStream,
    protocol: VhostUserProtocolFeatures,
    has_protocol_features: bool,
    /// Ask for what in-flight files need.
    wants_inflight: bool,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Session").field("protocol", &self.protocol).finish_non_exhaustive()
    }
}

/// An in-flight file, kept from one back end to the next.
pub(crate) struct Inflight {
    area: VhostUserInflight,
    file: File,
}

impl std::fmt::Debug for Inflight {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inflight").field("file", &self.file).finish_non_exhaustive()
    }
}

/// What a ring is made of, as the back end is told.
#[derive(Debug)]
pub(crate) struct RingSetup<'a> {
    /// Number of entries.
    pub(crate) size: u16,
    /// Where the back end is to go on.
    pub(crate) base: u16,
    /// Where the areas are.
    pub(crate) areas: &'a Areas,
    /// Driver to device.
    pub(crate) kick: &'a EventFd,
    /// Device to driver.
    pub(crate) call: &'a EventFd,
}

impl Session {
    /// Connects, or waits for the back end; none if it was stopped meanwhile.
    pub(crate) fn open(path: &Path, mode: Mode, stop: &Stop) -> anyhow::Result<Option<Self>> {
        Self::open_within(path, mode, stop, Some(CONNECT_PATIENCE))
    }

    /// The same with another patience; without a limit it waits until it is stopped.
    pub(crate) fn open_within(
        path: &Path,
        mode: Mode,
        stop: &Stop,
        patience: Option<Duration>,
    ) -> anyhow::Result<Option<Self>> {
        let stream = match mode {
            Mode::Client => connect(path, stop, patience)?,
            Mode::Server => accept(path, stop)?,
        };
        let Some(stream) = stream else { return Ok(None) };
        let frontend = Frontend::from_stream(stream.try_clone()?, MAX_RINGS);
        Ok(Some(Self {
            frontend,
            stream,
            protocol: VhostUserProtocolFeatures::empty(),
            has_protocol_features: false,
            wants_inflight: false,
        }))
    }

    /// Asks for in-flight files, or for no more; before features are agreed on.
    pub(crate) fn want_inflight(&mut self, wanted: bool) {
        self.wants_inflight = wanted;
    }

    /// Has a file made in which the back end notes what it has of `rings` rings of `size`.
    pub(crate) fn make_inflight(&mut self, rings: u16, size: u16) -> anyhow::Result<Inflight> {
        let asked = VhostUserInflight::new(0, 0, rings, size);
        let (area, file) = self.frontend.get_inflight_fd(&asked).context("GET_INFLIGHT_FD")?;
        Ok(Inflight { area, file })
    }

    /// Gives the back end the file that its predecessor wrote, or that it has made.
    pub(crate) fn give_inflight(&mut self, kept: &Inflight) -> anyhow::Result<()> {
        let fd = kept.file.as_raw_fd();
        self.frontend.set_inflight_fd(&kept.area, fd).context("SET_INFLIGHT_FD")
    }

    /// Agrees on features: `choose` gets the offer and says what to take.
    pub(crate) fn negotiate(
        &mut self,
        pairs: u16,
        choose: impl FnOnce(u64) -> anyhow::Result<u64>,
    ) -> anyhow::Result<u64> {
        self.frontend.set_owner().context("SET_OWNER")?;
        let offered = self.frontend.get_features().context("GET_FEATURES")?;
        let mut features = choose(offered)?;
        let bit = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.has_protocol_features = offered & bit != 0;
        if self.has_protocol_features {
            features |= bit;
            self.protocol = self.agree_on_protocol(pairs)?;
        }
        if pairs > 1 && !self.protocol.contains(VhostUserProtocolFeatures::MQ) {
            bail!("--queues {pairs}: the back end has one queue pair");
        }
        if self.protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            self.frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        self.frontend.set_features(features).context("SET_FEATURES")?;
        Ok(features)
    }

    fn agree_on_protocol(&mut self, pairs: u16) -> anyhow::Result<VhostUserProtocolFeatures> {
        let offered = self.frontend.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        let wanted = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        let wanted = if self.wants_inflight {
            wanted | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        } else {
            wanted
        };
        let taken = offered & wanted;
        self.frontend.set_protocol_features(taken).context("SET_PROTOCOL_FEATURES")?;
        if pairs > 1 && taken.contains(VhostUserProtocolFeatures::MQ) {
            let limit = self.queue_pairs()?;
            if u64::from(pairs) > limit {
                bail!("--queues {pairs}: the back end has {limit} queue pairs");
            }
        }
        Ok(taken)
    }

    /// Asks for the number of pairs. `Frontend` takes the answer for a number of rings and would
    /// refuse the higher ones from then on, so a second one on the same socket asks.
    fn queue_pairs(&self) -> anyhow::Result<u64> {
        let mut asker = Frontend::from_stream(self.stream.try_clone()?, MAX_RINGS);
        let _ = asker.get_features().context("GET_FEATURES")?;
        let offered = asker.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        let same = offered
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS);
        asker.set_protocol_features(same).context("SET_PROTOCOL_FEATURES")?;
        asker.get_queue_num().context("GET_QUEUE_NUM")
    }

    /// Gives the back end our memory.
    pub(crate) fn share_memory(&mut self, memory: &Memory) -> anyhow::Result<()> {
        let regions = memory.regions();
        if self.protocol.contains(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            for region in &regions {
                let _ = self.frontend.add_mem_region(region).context("ADD_MEM_REG")?;
            }
        } else {
            let _ = self.frontend.set_mem_table(&regions).context("SET_MEM_TABLE")?;
        }
        Ok(())
    }

    /// Starts ring `index` at its base.
    pub(crate) fn start_ring(&mut self, index: usize, ring: &RingSetup<'_>) -> anyhow::Result<()> {
        let address = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: Memory::frontend_addr(ring.areas.desc),
            used_ring_addr: Memory::frontend_addr(ring.areas.device),
            avail_ring_addr: Memory::frontend_addr(ring.areas.driver),
            log_addr: None,
        };
        self.frontend.set_vring_num(index, ring.size).context("SET_VRING_NUM")?;
        self.frontend.set_vring_base(index, ring.base).context("SET_VRING_BASE")?;
        self.frontend.set_vring_addr(index, &address).context("SET_VRING_ADDR")?;
        self.frontend.set_vring_call(index, ring.call).context("SET_VRING_CALL")?;
        self.frontend.set_vring_kick(index, ring.kick).context("SET_VRING_KICK")
    }

    /// Lets frames flow through the first `rings` rings.
    pub(crate) fn enable_all(&mut self, rings: usize) -> anyhow::Result<()> {
        if self.has_protocol_features {
            for index in 0..rings {
                self.frontend.set_vring_enable(index, true).context("SET_VRING_ENABLE")?;
            }
        }
        Ok(())
    }

    /// Stops ring `index`: the back end touches it no more.
    pub(crate) fn stop_ring(&mut self, index: usize) -> anyhow::Result<u32> {
        if self.has_protocol_features {
            self.frontend.set_vring_enable(index, false).context("SET_VRING_ENABLE")?;
        }
        self.frontend.get_vring_base(index).context("GET_VRING_BASE")
    }

    /// Whether the back end is still there.
    pub(crate) fn is_alive(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
        let looked = poll(&mut fds, Some(&zero)).is_ok();
        !looked || !fds.iter().any(|fd| fd.revents().intersects(gone))
    }

    /// Becomes readable when the back end goes away.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn connect(
    path: &Path,
    stop: &Stop,
    patience: Option<Duration>,
) -> anyhow::Result<Option<UnixStream>> {
    let begin = Instant::now();
    let over = || patience.is_some_and(|patience| begin.elapsed() > patience);
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return Ok(Some(stream)),
            Err(error) if !may_come_up(&error) || over() => {
                return Err(error).with_context(|| format!("cannot connect to {}", path.display()));
            }
            Err(_) if stop.asked() => return Ok(None),
            Err(_) => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// Errors of a back end that is about to listen.
fn may_come_up(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.kind() == io::ErrorKind::ConnectionRefused
}

fn accept(path: &Path, stop: &Stop) -> anyhow::Result<Option<UnixStream>> {
    if path.exists() {
        if UnixStream::connect(path).is_ok() {
            bail!("{} is in use by another process", path.display());
        }
        std::fs::remove_file(path)
            .with_context(|| format!("cannot remove the stale {}", path.display()))?;
    }
    let listener =
        UnixListener::bind(path).with_context(|| format!("cannot listen on {}", path.display()))?;
    let stream = wait_for_client(&listener, stop);
    let _ = std::fs::remove_file(path);
    stream
}

fn wait_for_client(listener: &UnixListener, stop: &Stop) -> anyhow::Result<Option<UnixStream>> {
    let look = Timespec { tv_sec: 0, tv_nsec: LOOK_NS };
    while !stop.asked() {
        let mut fds = [PollFd::new(listener, PollFlags::IN)];
        let ready = matches!(poll(&mut fds, Some(&look)), Ok(1..));
        if ready {
            return Ok(Some(listener.accept()?.0));
        }
    }
    Ok(None)
}
