//! Our program on the interface: attached by a link that goes with its fd, and what was there
//! before.
//!
//! **Not supported.** A program that another process holds by a link is never taken away. One that
//! was replaced comes back when we end in order; after a kill the interface has none. It takes
//! `CAP_SYS_ADMIN` to tell who holds one and to put another one in its place.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkMessage, LinkXdp, XdpAttached};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use serde::{Deserialize, Serialize};

use crate::interface::Link;
use crate::parts::{Collected, PartsError, Remaining};
use crate::sys::{bpf, netlink_socket};

use super::AfXdpError;

/// Modes of an attachment, as flags of the kernel.
const SKB_MODE: u32 = 1 << 1;
const DRV_MODE: u32 = 1 << 2;
const HW_MODE: u32 = 1 << 3;

/// Where in the kernel a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Hook {
    /// In the driver.
    Native,
    /// Behind it, on socket buffers.
    Generic,
}

impl Hook {
    fn flags(self) -> u32 {
        match self {
            Self::Native => DRV_MODE,
            Self::Generic => SKB_MODE,
        }
    }
}

/// A program that somebody else attached.
#[derive(Debug)]
struct Other {
    program: u32,
    flags: u32,
}

/// A program that was replaced, to come back.
#[derive(Debug)]
pub(super) struct Replaced {
    socket: Socket,
    index: u32,
    program: OwnedFd,
    flags: u32,
}

/// What the fds of an [`Attachment`] do not say.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct AttachmentParts {
    attached: bool,
    /// Of the program that was replaced: the interface's index, and the mode.
    replaced: Option<(u32, u32)>,
}

/// Our program on an interface. Dropped, it takes it off and puts back what was there.
#[derive(Debug)]
pub(super) struct Attachment {
    link: Option<OwnedFd>,
    /// What is to be replaced, and is there still.
    in_the_way: Option<Replaced>,
    replaced: Option<Replaced>,
}

impl Attachment {
    /// Looks whether there is a program on the interface, which has to be none or, with `replace`,
    /// one that no link holds. The calling thread has to be in the interface's namespace.
    pub(super) fn prepare(link: &Link, replace: bool) -> Result<Self, AfXdpError> {
        let name = link.name();
        let failed = |error| AfXdpError::admin(format!("ask for XDP programs on {name}"), error);
        let socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        let Some(other) = query(&socket, link.index()).map_err(failed)? else {
            return Ok(Self { link: None, in_the_way: None, replaced: None });
        };
        let opened = bpf::program_by_id(other.program);
        let of_name = opened.as_ref().ok().and_then(|p| bpf::program_name(p.as_fd()).ok());
        let of_name = of_name.filter(|name| !name.is_empty());
        let program = match of_name {
            Some(name) => format!("program {} ({name})", other.program),
            None => format!("program {}", other.program),
        };
        let mode = mode_name(other.flags);
        match bpf::link_of(other.program, link.index()) {
            Ok(Some(link)) => return Err(AfXdpError::HeldByLink { name, program, link }),
            Ok(None) => {}
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                return Err(AfXdpError::UnknownHolder { name, program, mode });
            }
            Err(error) => {
                let what = format!("ask who holds XDP {program} on {name}");
                return Err(AfXdpError::admin(what, error));
            }
        }
        if !replace {
            return Err(AfXdpError::OtherProgram { name, program, mode });
        }
        let failed = |error| AfXdpError::bpf(format!("replace XDP {program} on {name}"), error);
        let program = opened.map_err(failed)?;
        let other = Replaced { socket, index: link.index(), program, flags: other.flags };
        Ok(Self { link: None, in_the_way: Some(other), replaced: None })
    }

    /// Takes off what is to be replaced.
    pub(super) fn make_room(&mut self, link: &Link) -> Result<(), AfXdpError> {
        let Some(other) = self.in_the_way.take() else { return Ok(()) };
        set(&other.socket, other.index, None, other.flags).map_err(|error| {
            AfXdpError::bpf(format!("replace the XDP program on {}", link.name()), error)
        })?;
        self.replaced = Some(other);
        Ok(())
    }

    /// Attaches `program`.
    pub(super) fn attach(
        &mut self,
        program: BorrowedFd<'_>,
        index: u32,
        hook: Hook,
    ) -> io::Result<()> {
        self.link = Some(bpf::link_xdp(program, index, hook.flags())?);
        Ok(())
    }

    /// Takes our program off.
    pub(super) fn detach(&mut self) {
        self.link = None;
    }

    /// Adds the fds to `fds`; of what was replaced, interface and mode.
    pub(super) fn parts(&self, fds: &mut Collected) -> Result<AttachmentParts, PartsError> {
        if let Some(link) = &self.link {
            fds.add(link)?;
        }
        if let Some(replaced) = &self.replaced {
            fds.add(&replaced.socket)?;
            fds.add(&replaced.program)?;
        }
        let replaced = self.replaced.as_ref().map(|old| (old.index, old.flags));
        Ok(AttachmentParts { attached: self.link.is_some(), replaced })
    }

    /// What [`Self::parts`] took apart. Until [`Self::own`] it puts nothing back when dropped.
    pub(super) fn from_parts(
        parts: &AttachmentParts,
        fds: &mut Remaining,
    ) -> Result<(Self, Option<Replaced>), PartsError> {
        let link = fds.next_if(parts.attached)?;
        let replaced = match parts.replaced {
            None => None,
            Some((index, flags)) => {
                let (socket, program) = (netlink_socket(fds.next()?), fds.next()?);
                Some(Replaced { socket, index, program, flags })
            }
        };
        Ok((Self { link, in_the_way: None, replaced: None }, replaced))
    }

    /// The uplink is whole: what was replaced is to come back in the end.
    pub(super) fn own(&mut self, replaced: Option<Replaced>) {
        self.replaced = replaced;
    }

    /// Lets go without putting back what was replaced: another process holds the program.
    pub(super) fn leave(&mut self) {
        self.replaced = None;
    }

    /// What keeps the program attached.
    pub(super) fn link_fd(&self) -> Option<BorrowedFd<'_>> {
        self.link.as_ref().map(AsFd::as_fd)
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        self.detach();
        let Some(Replaced { socket, index, program, flags }) = &self.replaced else { return };
        if let Err(error) = set(socket, *index, Some(program.as_fd()), *flags) {
            tracing::warn!(index, %error, "cannot put back the XDP program that was replaced");
        }
    }
}

fn mode_name(flags: u32) -> &'static str {
    match flags {
        DRV_MODE => "xdpdrv",
        HW_MODE => "xdpoffload",
        _ => "xdpgeneric",
    }
}

/// The program on an interface.
#[expect(clippy::wildcard_enum_match_arm, reason = "of many attributes a few say it")]
fn query(socket: &Socket, index: u32) -> io::Result<Option<Other>> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let answer = ask(socket, RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST)?;
    let Some(RouteNetlinkMessage::NewLink(link)) = answer else { return Ok(None) };
    let mut found = None;
    for attribute in link.attributes {
        let LinkAttribute::Xdp(facts) = attribute else { continue };
        let mode = |fact: &LinkXdp| match fact {
            LinkXdp::Attached(XdpAttached::Driver) => Some(DRV_MODE),
            LinkXdp::Attached(XdpAttached::SocketBuffer) => Some(SKB_MODE),
            LinkXdp::Attached(XdpAttached::Hardware) => Some(HW_MODE),
            _ => None,
        };
        let mode = facts.iter().find_map(mode);
        let one = facts.iter().find_map(|fact| match fact {
            LinkXdp::ProgId(id) => mode.map(|mode| (*id, mode)),
            _ => None,
        });
        // More than one at once: a program of the device beside others.
        let several = facts.iter().find_map(|fact| match fact {
            LinkXdp::DrvProgId(id) => Some((*id, DRV_MODE)),
            LinkXdp::HwProgId(id) => Some((*id, HW_MODE)),
            LinkXdp::SkbProgId(id) => Some((*id, SKB_MODE)),
            _ => None,
        });
        let any = one.or(several).filter(|(id, _)| *id != 0);
        found = found.or(any.map(|(program, flags)| Other { program, flags }));
    }
    Ok(found)
}

/// Sets the program of an interface, or takes it off.
fn set(socket: &Socket, index: u32, program: Option<BorrowedFd<'_>>, flags: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let fd = program.map_or(-1, |program| program.as_raw_fd());
    message.attributes = vec![LinkAttribute::Xdp(vec![LinkXdp::Fd(fd), LinkXdp::Flags(flags)])];
    let _ack = ask(socket, RouteNetlinkMessage::SetLink(message), NLM_F_REQUEST | NLM_F_ACK)?;
    Ok(())
}

/// Sends one request and reads its answer.
#[expect(clippy::wildcard_enum_match_arm, reason = "an acknowledgement says nothing more")]
fn ask(
    socket: &Socket,
    request: RouteNetlinkMessage,
    flags: u16,
) -> io::Result<Option<RouteNetlinkMessage>> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let _sent = socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer);
    match answer.map_err(io::Error::other)?.payload {
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        NetlinkPayload::InnerMessage(answer) => Ok(Some(answer)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests;
