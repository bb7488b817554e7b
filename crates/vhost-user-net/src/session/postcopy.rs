//! Postcopy: a guest runs here before its memory has arrived.
//!
//! ```text
//!  POSTCOPY_ADVISE ─► userfaultfd, handed to the front end          the guest runs elsewhere
//!  POSTCOPY_LISTEN ─► from now on memory is late                    no region is shared yet
//!  ADD_MEM_REG … / SET_MEM_TABLE ─► mapped; the reply says where
//!  "heard" ─► registered: who touches a missing page sleeps;        the front end serves pages
//!             rings use the regions, each in a thread of its own
//!  POSTCOPY_END ─► all pages are there: unregistered, rings go back to the workers
//! ```
//!
//! **Trust.** Off unless [`super::SessionSettings::postcopy`] says that the front end is trusted:
//! see [`Userfault`]. What it does not serve keeps its own guest waiting; [`Session::close`] gives
//! the memory up, so that nobody sleeps in it for ever.
//! **Limits.** Regions that were shared before `POSTCOPY_LISTEN` are refused: the front end does
//! not know where we have them.

use std::os::fd::{AsFd, OwnedFd};

use virtq::mem::Userfault;

use super::{
    Answer, FrontendReq, RegionTable, Reply, Rings, Session, SessionError,
    VhostUserProtocolFeatures,
};
use crate::codec::CodecError;
use crate::memory::RegionSpec;

/// How far a postcopy migration to us is.
#[derive(Debug)]
pub(super) enum Postcopy {
    /// There is none.
    Off,
    /// The front end has the fd; the guest still runs elsewhere.
    Advised(Userfault),
    /// Memory arrives while it is used.
    Listening {
        userfault: Userfault,
        /// Memory whose addresses we have told, and the front end has not said that it heard.
        told: Option<RegionTable>,
    },
}

/// What changed the memory.
enum Asked {
    /// All regions were named.
    Table(Vec<RegionSpec>),
    /// One came.
    Region(RegionSpec),
    /// One went.
    Less,
}

impl Session {
    /// Whether the guest's memory is still arriving.
    pub fn is_late(&self) -> bool {
        matches!(self.postcopy, Postcopy::Listening { .. })
    }

    pub(super) fn postcopy_advise(&mut self) -> Result<Answer, SessionError> {
        self.needs(VhostUserProtocolFeatures::PAGEFAULT, FrontendReq::POSTCOPY_ADVISE)?;
        if matches!(self.postcopy, Postcopy::Off) {
            let userfault = Userfault::open().map_err(failed("cannot open a userfaultfd"))?;
            self.postcopy = Postcopy::Advised(userfault);
        }
        // A front end with several queue pairs asks once for each.
        match &self.postcopy {
            Postcopy::Off => Err(SessionError::NotNegotiated(FrontendReq::POSTCOPY_ADVISE)),
            Postcopy::Advised(userfault) | Postcopy::Listening { userfault, .. } => {
                let fd = userfault.as_fd().try_clone_to_owned();
                Ok(Answer::WithFd(Reply::Empty, fd.map_err(failed("no fd is left"))?))
            }
        }
    }

    pub(super) fn postcopy_listen(&mut self) -> Result<(), SessionError> {
        self.needs(VhostUserProtocolFeatures::PAGEFAULT, FrontendReq::POSTCOPY_LISTEN)?;
        match std::mem::replace(&mut self.postcopy, Postcopy::Off) {
            Postcopy::Off => {
                Err(SessionError::PostcopyOrder("POSTCOPY_LISTEN before POSTCOPY_ADVISE"))
            }
            Postcopy::Advised(userfault) if !self.memory.is_empty() => {
                self.postcopy = Postcopy::Advised(userfault);
                let what = "POSTCOPY_LISTEN while memory regions are shared already";
                Err(SessionError::PostcopyOrder(what))
            }
            Postcopy::Advised(userfault) => {
                self.postcopy = Postcopy::Listening { userfault, told: None };
                Ok(())
            }
            listening @ Postcopy::Listening { .. } => {
                self.postcopy = listening;
                Ok(())
            }
        }
    }

    pub(super) fn postcopy_end(&mut self, rings: &mut dyn Rings) -> Result<Answer, SessionError> {
        self.needs(VhostUserProtocolFeatures::PAGEFAULT, FrontendReq::POSTCOPY_END)?;
        if let Postcopy::Listening { userfault, told } =
            std::mem::replace(&mut self.postcopy, Postcopy::Off)
        {
            for watch in self.memory.watches() {
                if userfault.unregister(watch).is_err() {
                    // Nobody would wake who sleeps there.
                    userfault.abandon(watch);
                }
            }
            let table = told.unwrap_or_else(|| self.memory.clone());
            self.swap_memory(table, rings);
        }
        Ok(Answer::Reply(Reply::U64(0)))
    }

    pub(super) fn set_mem_table(
        &mut self,
        specs: &[RegionSpec],
        fds: Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<Answer, SessionError> {
        if specs.is_empty() && matches!(self.postcopy, Postcopy::Listening { told: Some(_), .. }) {
            self.memory_heard(rings)?;
            return Ok(Answer::Done);
        }
        let table = RegionTable::new(specs, fds)?;
        Ok(self.take_memory(table, Asked::Table(specs.to_vec()), rings))
    }

    pub(super) fn add_mem_reg(
        &mut self,
        spec: RegionSpec,
        mut fds: Vec<OwnedFd>,
        rings: &mut dyn Rings,
    ) -> Result<Answer, SessionError> {
        self.needs(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS, FrontendReq::ADD_MEM_REG)?;
        let fd = fds.pop().ok_or(CodecError::TooManyFds)?;
        let table = self.coming_memory().with(spec, fd)?;
        Ok(self.take_memory(table, Asked::Region(spec), rings))
    }

    pub(super) fn remove_mem_reg(
        &mut self,
        spec: &RegionSpec,
        rings: &mut dyn Rings,
    ) -> Result<Answer, SessionError> {
        self.needs(VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS, FrontendReq::REM_MEM_REG)?;
        let table = self.coming_memory().without(spec)?;
        Ok(self.take_memory(table, Asked::Less, rings))
    }

    /// The memory that the next change is about.
    pub(super) fn coming_memory(&self) -> &RegionTable {
        match &self.postcopy {
            Postcopy::Listening { told: Some(table), .. } => table,
            Postcopy::Off | Postcopy::Advised(_) | Postcopy::Listening { told: None, .. } => {
                &self.memory
            }
        }
    }

    /// Goes over to other memory: at once, or when the front end knows where we have it.
    fn take_memory(&mut self, table: RegionTable, asked: Asked, rings: &mut dyn Rings) -> Answer {
        let Postcopy::Listening { told, .. } = &mut self.postcopy else {
            self.swap_memory(table, rings);
            return Answer::Done;
        };
        let mapped = |spec: &RegionSpec| table.mapped(spec).unwrap_or(*spec);
        let answer = match asked {
            Asked::Table(specs) => Answer::Reply(Reply::Table(specs.iter().map(mapped).collect())),
            Asked::Region(spec) => Answer::Reply(Reply::Region(mapped(&spec))),
            Asked::Less => Answer::Done,
        };
        *told = Some(table);
        answer
    }

    /// The front end is ready to serve the pages of what it was told.
    pub(super) fn memory_heard(&mut self, rings: &mut dyn Rings) -> Result<(), SessionError> {
        let Postcopy::Listening { userfault, told } = &mut self.postcopy else {
            return Err(SessionError::PostcopyOrder(
                "an answer about memory, and nothing was told",
            ));
        };
        let Some(table) = told.take() else { return Ok(()) };
        for watch in table.beyond(&self.memory) {
            userfault.register(watch).map_err(failed(
                "pages of a memory region cannot be waited for; it must be a memfd, or a file on \
                 tmpfs or hugetlbfs",
            ))?;
        }
        self.swap_memory(table, rings);
        Ok(())
    }

    /// Gives memory up that is still arriving: who sleeps in it goes on, with zeros that nobody
    /// sees. Returns whether it was.
    pub(super) fn abandon(&mut self) -> bool {
        let Postcopy::Listening { userfault, .. } =
            std::mem::replace(&mut self.postcopy, Postcopy::Off)
        else {
            return false;
        };
        self.memory.watches().for_each(|watch| userfault.abandon(watch));
        true
    }
}

fn failed(what: &'static str) -> impl FnOnce(std::io::Error) -> SessionError {
    move |error| SessionError::Postcopy { what, error }
}
