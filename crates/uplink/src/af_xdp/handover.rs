//! An interface's `AF_XDP` sockets as fds, and which chunks of the UMEM are ours.
//!
//! Positions in the rings stand in the rings themselves. A chunk that is not ours is the kernel's,
//! or stands in a ring: it comes to whoever looks there next. So no frame is lost, and none is sent
//! twice.
//! **Limits.** Linux 6.4: earlier kernels let no bound socket's rings be mapped again.

use std::io;
use std::sync::Arc;

use port::{Ingress, QueueCounters};
use serde::{Deserialize, Serialize};

use crate::direct::{Direct, VnetHeader};
use crate::interface::{Link, LinkParts};
use crate::parts::{Collected, Parts, PartsError, Remaining, check_layout, check_queues};

use super::attach::{Attachment, AttachmentParts};
use super::deferral::Deferral;
use super::layout::{CHUNK, RX_FRAMES, TX_FRAMES};
use super::program::{Program, ProgramParts};
use super::socket::{Abilities, Opened, Ours, Queues};
use super::umem::{Knows, Of, Shared, Umem, Umems};
use super::{AfXdp, AfXdpControl, AfXdpEgress, AfXdpIngress, Obtained};

const KIND: &str = "af-xdp";

#[derive(Debug, Serialize, Deserialize)]
struct State {
    kind: String,
    link: LinkParts,
    attachment: AttachmentParts,
    program: ProgramParts,
    mode: Obtained,
    can: Abilities,
    /// Each queue has a socket to send, too.
    #[serde(default)]
    senders: bool,
    /// Large frames go by a socket of their own, with this header.
    large: Option<VnetHeader>,
    /// The UMEM, if others may share it.
    #[serde(default)]
    umem: Option<Shared>,
    /// How the UMEM is divided.
    chunk: u32,
    rx_frames: u32,
    tx_frames: u32,
    queues: Vec<Ours>,
    /// How the driver was started before workers polled it; its fds are the last.
    #[serde(default)]
    deferral: Vec<u64>,
}

/// What an open interface is made of. Between this and the time when one of both goes on, nobody
/// may use the queues.
///
/// # Errors
///
/// [`PartsError`]: the process has no fds left.
pub fn parts<'a>(
    control: &AfXdpControl,
    link: &Link,
    queues: impl IntoIterator<Item = (&'a mut AfXdpIngress, &'a mut AfXdpEgress)>,
) -> Result<Parts, PartsError> {
    let mut fds = Collected::default();
    let link = link.parts(&mut fds)?;
    let attachment = control.attachment.parts(&mut fds)?;
    let program = control.program.parts(&mut fds)?;
    fds.add(control.umem.fd())?;
    let (mut ours, mut large) = (Vec::new(), None);
    for ((ingress, egress), socket) in queues.into_iter().zip(&control.sockets) {
        ingress.release();
        egress.settle();
        fds.add(socket.receive.as_ref())?;
        fds.add(socket.send.as_ref())?;
        if let Some(direct) = egress.large() {
            fds.add(&direct.fd)?;
            large = Some(direct.header);
        }
        ours.push(Ours { taken: ingress.taken.clone(), free: egress.free.clone() });
    }
    let deferral = control.deferral.parts(&mut fds)?;
    fds.finish(&State {
        kind: KIND.to_owned(),
        link,
        attachment,
        program,
        mode: control.mode,
        can: control.can,
        senders: true,
        large,
        umem: control.umem.shared(&control.leases),
        chunk: CHUNK,
        rx_frames: RX_FRAMES,
        tx_frames: TX_FRAMES,
        queues: ours,
        deferral,
    })
}

/// Puts together again what [`parts`] took apart. Each queue pair counts in its own `counters`;
/// `umems` are what it may share with others of this process.
///
/// # Errors
///
/// [`PartsError`] says what does not fit.
pub fn from_parts(
    parts: Parts,
    umems: &Umems,
    counters: &[Arc<QueueCounters>],
) -> Result<AfXdp, PartsError> {
    let (state, mut fds) = Remaining::open::<State>(parts, KIND)?;
    check_queues(state.queues.len(), counters.len())?;
    check_layout("bytes a chunk", state.chunk, CHUNK)?;
    check_layout("frames to receive", state.rx_frames, RX_FRAMES)?;
    check_layout("frames to send", state.tx_frames, TX_FRAMES)?;
    if !state.queues.iter().all(Ours::is_valid) {
        return Err(PartsError::state("it names chunks that do not exist"));
    }
    let mut link = Link::from_parts(&state.link, &mut fds)?;
    let (mut attachment, replaced) = Attachment::from_parts(&state.attachment, &mut fds)?;
    let program = Program::from_parts(&state.program, &mut fds)?;
    let name = link.name();
    let failed = |error: io::Error| PartsError::Map { name: name.clone(), error };
    let count = u16::try_from(state.queues.len()).unwrap_or(u16::MAX);
    let (umem, places) = match &state.umem {
        Some(shared) => (umems.adopt(shared, fds.next()?)?, shared.places.clone()),
        None => {
            let umem = Umem::map(Of::Interface(name.clone()), fds.next()?, count);
            (umem.map_err(failed)?, (0..u32::from(count)).collect())
        }
    };
    check_queues(places.len(), counters.len())?;
    let leases = umem.claim(&places)?;
    let Abilities { metadata, spread, .. } = state.can;
    umem.set_knows(Knows { metadata, spread });
    let mut opened = Vec::with_capacity(counters.len());
    for _ in counters {
        let (receive, send) = (fds.next()?, fds.next_if(state.senders)?);
        let queue = Opened::anew(receive, send).map_err(failed)?;
        umem.bound(queue.receive());
        opened.push(queue);
    }
    let large = match state.large {
        Some(header) => Some(Direct { fd: fds.next()?, header }),
        None => None,
    };
    let queues = Queues::of((opened, leases), state.can, (&link, large));
    let (sockets, leases) = (queues.sockets().cloned().collect(), queues.leases().to_vec());
    let (queues, left) = queues
        .into_halves(&umem, &link, (counters, state.queues))
        .map_err(|error| failed(io::Error::other(error)))?;
    let deferral = Deferral::from_parts(&state.deferral, &mut fds)?;
    attachment.own(replaced);
    let (mode, can) = (state.mode, state.can);
    let control =
        AfXdpControl { attachment, program, umem, sockets, mode, can, deferral, left, leases };
    link.own(&state.link);
    Ok(AfXdp { control, link, queues })
}
