//! `ctl capture`: what passes a port, as a pcapng file or line by line.

use std::fs::File;
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::path::Path;

use control::Reply;
use control::capture::client::{Part, Stream, begin};
use control::capture::{CaptureEnd, CaptureRequest, lines};
use rustix::event::{PollFd, PollFlags, poll};

use crate::Failure;
use crate::cli::CaptureArgs;
use crate::signals::Signals;

pub(super) fn capture(control: &Path, json: bool, given: CaptureArgs) -> Result<(), Failure> {
    let request = CaptureRequest {
        port: given.port,
        filter: given.filter.unwrap_or_default(),
        snaplen: given.snaplen,
        count: given.count,
        drops: given.drops,
    };
    drop(request.settings().map_err(Failure::Usage)?);
    let signals = Signals::take_over()
        .map_err(|error| Failure::Runtime(format!("cannot take signals over: {error}")))?;
    let mut output = Output::open(given.write.as_deref(), json)?;
    let stream = begin(control, &request).map_err(|reply| match reply {
        Reply::Usage(text) => Failure::Usage(text),
        Reply::Failed(text) => Failure::Runtime(text),
        Reply::Ok(_) => Failure::Runtime("the switch gave an unknown answer".to_owned()),
    })?;
    let end = copy(stream, &mut output, &signals)?;
    output.summary(&end)?;
    match end.reason {
        None => Ok(()),
        Some(reason) => Err(Failure::Runtime(format!("the capture ended: {reason}"))),
    }
}

/// Copies what comes until the end, which a signal or a reader that went away ask for.
fn copy(mut stream: Stream, output: &mut Output, signals: &Signals) -> Result<CaptureEnd, Failure> {
    let lost = |error: io::Error| {
        Failure::Runtime(if error.kind() == ErrorKind::UnexpectedEof {
            "the switch went away".to_owned()
        } else {
            format!("cannot read from the switch: {error}")
        })
    };
    let mut asked = false;
    loop {
        let wants_end = output.is_closed() || waits_for_signal(&stream, output, signals);
        if wants_end && asked && !output.is_closed() {
            return Err(Failure::Runtime("stopped before the end of the capture".to_owned()));
        }
        if wants_end && !asked {
            asked = true;
            stream.ask_for_end().map_err(lost)?;
        }
        match stream.part().map_err(lost)? {
            Part::Piece(piece) => output.write(piece)?,
            Part::End(end) => return Ok(end),
        }
    }
}

/// Waits until there is more to read. True if a signal came instead, whichever.
fn waits_for_signal(stream: &Stream, output: &mut Output, signals: &Signals) -> bool {
    loop {
        let taken = signals.take();
        if taken.stop || taken.reload {
            return true;
        }
        if stream.has_some() {
            return false;
        }
        let socket = stream.as_fd();
        let mut fds = vec![
            PollFd::new(&socket, PollFlags::IN),
            PollFd::from_borrowed_fd(signals.as_fd(), PollFlags::IN),
        ];
        // A reader that went away is told without asking for it.
        fds.push(PollFd::new(&output.file, PollFlags::empty()));
        // Interrupted by a signal, it is tried again.
        if poll(&mut fds, None).is_err() {
            continue;
        }
        let [from_switch, _, reader] = fds.as_slice() else { return true };
        if reader.revents().intersects(PollFlags::ERR) {
            output.closed = true;
            return true;
        }
        if !from_switch.revents().is_empty() {
            return false;
        }
    }
}

/// Where the capture goes.
struct Output {
    file: File,
    /// A name for errors.
    name: String,
    form: Form,
    json: bool,
    /// Nobody reads it any more.
    closed: bool,
}

enum Form {
    /// As a file.
    Pcapng,
    /// A line for each frame; what is no whole block yet.
    Lines(Vec<u8>),
}

impl Output {
    /// A file that is made anew, or standard output.
    fn open(write: Option<&Path>, json: bool) -> Result<Self, Failure> {
        let stdout = write.is_none_or(|path| path == Path::new("-"));
        if write.is_some() && stdout && io::stdout().is_terminal() {
            return Err(Failure::Usage(
                "standard output is a terminal: use -w FILE, or a pipe as in \
                 `causeway ctl capture PORT -w - | tcpdump -r -`"
                    .to_owned(),
            ));
        }
        let name = match write {
            Some(path) if !stdout => path.display().to_string(),
            _ => "standard output".to_owned(),
        };
        let opened = match write {
            Some(path) if !stdout => File::create(path),
            _ => io::stdout().as_fd().try_clone_to_owned().map(File::from),
        };
        let file =
            opened.map_err(|error| Failure::Runtime(format!("cannot write to {name}: {error}")))?;
        let form = if write.is_some() { Form::Pcapng } else { Form::Lines(Vec::new()) };
        Ok(Self { file, name, form, json, closed: false })
    }

    fn is_closed(&self) -> bool {
        self.closed
    }

    fn write(&mut self, piece: &[u8]) -> Result<(), Failure> {
        if self.closed {
            return Ok(());
        }
        let written = match &mut self.form {
            Form::Pcapng => self.file.write_all(piece),
            Form::Lines(bytes) => {
                bytes.extend_from_slice(piece);
                let mut text = String::new();
                for line in lines(bytes) {
                    text += &match self.json {
                        true => serde_json::to_string(&line).unwrap_or_default(),
                        false => line.to_string(),
                    };
                    text.push('\n');
                }
                self.file.write_all(text.as_bytes())
            }
        };
        match written {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::BrokenPipe => {
                self.closed = true;
                Ok(())
            }
            Err(error) => Err(Failure::Runtime(format!("cannot write to {}: {error}", self.name))),
        }
    }

    /// Says what was captured, beside the capture itself.
    fn summary(&mut self, end: &CaptureEnd) -> Result<(), Failure> {
        let text = if self.json {
            let value = serde_json::to_string(end);
            value.map_err(|error| Failure::Runtime(error.to_string()))?
        } else {
            format!(
                "{} frames of port {} captured ({} in, {} out), {} skipped for want of room",
                end.captured, end.port, end.inward.captured, end.outward.captured, end.skipped
            )
        };
        // Nobody may be left to read it.
        let _ = writeln!(io::stderr(), "{text}");
        Ok(())
    }
}
