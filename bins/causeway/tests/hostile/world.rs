//! The switch, the good guests beside it, and what is looked at after each case.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use control::{Reply, Request};
use packet::MacAddr;
use rustix::process::Signal;
use serde_json::Value;
use testkit::request::{GET_FEATURES, SET_VRING_ERR};
use testkit::{GuestSettings, Remote};
use virtq::Layout;

use crate::bed::{Bed, PROGRAM};
use crate::evil::Evil;
use crate::good::{Good, WINDOW};

/// How long something may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// The hostile guest's port.
pub(crate) const EVIL: &str = "evil";

/// The port of good guests that come later.
const LATE: &str = "late";

/// Something that a hostile guest does, and what has to come of it.
pub(crate) struct Case {
    pub(crate) name: String,
    pub(crate) run: Box<dyn Fn(&Stage<'_>)>,
}

/// A case.
pub(crate) fn case(name: impl Into<String>, run: impl Fn(&Stage<'_>) + 'static) -> Case {
    Case { name: name.into(), run: Box::new(run) }
}

/// What a case finds.
pub(crate) struct Stage<'a> {
    pub(crate) world: &'a World,
    pub(crate) layout: Layout,
    began: Instant,
}

impl<'a> Stage<'a> {
    fn new(world: &'a World, layout: Layout) -> Self {
        Self { world, layout, began: Instant::now() }
    }

    /// The front end's connection was closed, and the port says why.
    pub(crate) fn closes(&self, evil: &mut Evil, text: &str) {
        assert!(evil.front.is_closed(), "the connection goes on");
        self.complains(text);
    }

    /// A request is refused with an acknowledgement; the session goes on.
    pub(crate) fn refuses(&self, evil: &mut Evil, request: u32, body: &[u8], text: &str) {
        self.refuses_fds(evil, (request, body), &[], text);
    }

    /// The same of a request with fds.
    pub(crate) fn refuses_fds(
        &self,
        evil: &mut Evil,
        (request, body): (u32, &[u8]),
        fds: &[BorrowedFd<'_>],
        text: &str,
    ) {
        assert!(!evil.ack(request, body, fds), "accepted");
        self.complains(text);
        self.answers(evil);
    }

    /// The session goes on.
    pub(crate) fn answers(&self, evil: &mut Evil) {
        let _ = evil.front.ask(GET_FEATURES, &[]).expect("an answer");
    }

    /// The port is broken, and the session goes on.
    pub(crate) fn breaks(&self, evil: &mut Evil, text: &str) {
        eventually("the port is broken", || self.world.port(EVIL)["state"] == "broken");
        self.complains(text);
        self.answers(evil);
    }

    /// The port was put into quarantine, and the front end sent away.
    pub(crate) fn loses(&self, evil: &mut Evil) {
        eventually("quarantined", || self.world.port(EVIL)["state"] == "quarantined");
        self.complains("lost pages");
        assert!(evil.front.is_closed());
    }

    /// The port carries frames.
    pub(crate) fn is_up(&self, evil: &mut Evil) {
        self.answers(evil);
        eventually("the port is up", || self.world.port(EVIL)["state"] == "up");
    }

    /// The port's last error is of this case, and has this in it.
    pub(crate) fn complains(&self, text: &str) {
        let mut error = Value::Null;
        eventually(&format!("an error with {text:?}"), || {
            error = self.world.port(EVIL)["last_error"].clone();
            let age = error["age_ms"].as_u64().unwrap_or(u64::MAX);
            let now = u128::from(age) <= self.began.elapsed().as_millis() + 1;
            let said = error["text"].as_str().unwrap_or_default();
            now && said.contains(text)
        });
    }
}

pub(crate) struct World {
    bed: Bed,
    /// One connection for all questions: the switch has it before and after.
    control: RefCell<BufReader<UnixStream>>,
    socket: PathBuf,
    good: Good,
    /// Memory of a good guest.
    pub(crate) good_memory: OwnedFd,
}

/// Waits until `done`, with short looks at first: nearly everything is so at once.
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    let mut pause = Duration::from_micros(200);
    while !done() {
        assert!(start.elapsed() < PATIENCE, "not so after {PATIENCE:?}: {what}");
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// How often there is something of each name.
type Counts = BTreeMap<String, usize>;

/// What a process has.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    /// By what they are.
    fds: Counts,
    threads: Counts,
    /// Mappings of files and of kernel objects: guests' memory is among them.
    files: Counts,
}

/// What a thread maps when it makes its first call: at most one for each thread.
const CALLS: &str = "/[aio]";

impl World {
    fn new() -> Self {
        Self::around(&mut Command::new(PROGRAM), 2)
    }

    /// One whose process may have few files open, with more queues than that is enough for.
    fn short_of_fds() -> Self {
        let mut limited = Command::new("sh");
        let limit = "ulimit -Sn 256 && ulimit -Hn 1024 && exec \"$0\" \"$@\"";
        let _ = limited.args(["-c", limit, PROGRAM]);
        Self::around(&mut limited, 128)
    }

    fn around(program: &mut Command, queues: u16) -> Self {
        let server = |name: &str| format!("vhost-user:name={name},socket={name}.sock");
        let evil = format!("{},queues={queues},mtu=9000", server(EVIL));
        let mut arguments = Vec::new();
        let good = ["good0", "good1", LATE].map(server);
        for port in good.iter().chain([&evil]) {
            arguments.extend(["--port", port]);
        }
        let mut bed = Bed::new();
        bed.start_command(program, &arguments);
        let control = UnixStream::connect(bed.control()).unwrap();
        control.set_read_timeout(Some(PATIENCE)).unwrap();
        let (control, socket) = (RefCell::new(BufReader::new(control)), bed.path("evil.sock"));
        let good = Good::join(&[bed.path("good0.sock"), bed.path("good1.sock")]);
        let good_memory = good.memory();
        let mut world = Self { bed, control, socket, good, good_memory };
        for name in ["good0", "good1"] {
            eventually("the good guests are there", || world.port(name)["state"] == "up");
        }
        world.good.start();
        world
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A good guest comes, and goes.
    pub(crate) fn welcomes(&self) {
        let path = self.bed.path(&format!("{LATE}.sock"));
        let guest = Remote::join(&path, GuestSettings::new(Layout::Split)).unwrap();
        eventually("a good guest that comes is served", || self.port(LATE)["state"] == "up");
        drop(guest);
    }

    fn ask(&self, request: &Request) -> Value {
        let mut control = self.control.borrow_mut();
        let mut line = serde_json::to_string(request).unwrap();
        line.push('\n');
        control.get_mut().write_all(line.as_bytes()).unwrap();
        line.clear();
        let _ = control.read_line(&mut line).unwrap();
        match serde_json::from_str(&line).unwrap() {
            Reply::Ok(value) => value,
            other @ (Reply::Usage(_) | Reply::Failed(_)) => panic!("{other:?}"),
        }
    }

    /// A port of `ctl ports`.
    pub(crate) fn port(&self, name: &str) -> Value {
        let view = self.ask(&Request::Ports);
        let ports = view["ports"].as_array().unwrap();
        ports.iter().find(|port| port["name"] == name).unwrap().clone()
    }

    /// How often a frame of the hostile port was dropped for a reason, on either way.
    pub(crate) fn drops(&self, reason: &str) -> u64 {
        let view = self.ask(&Request::Stats);
        let ports = view["ports"].as_array().unwrap();
        let port = ports.iter().find(|port| port["name"] == EVIL).unwrap();
        let queues = port["queues"].as_array().unwrap().iter();
        queues.map(|queue| queue["drops"][reason].as_u64().unwrap()).sum()
    }

    /// Waits until the good guests have exchanged frames from now on, and the switch has dealt
    /// with all that was flooded before: a case must not meet a frame of the one before it.
    pub(crate) fn progress(&self) {
        eventually("what is to be flooded was sent", || {
            assert!(!self.good.has_ended(), "a good guest lost something");
            self.good.has_flooded()
        });
        let before = self.good.arrived();
        // With a window of frames on their way, one window later they were sent after that, and two
        // windows later they came in a later burst than the flooded ones.
        let enough = 2 * (WINDOW + 1);
        eventually("the good guests go on, in both directions", || {
            assert!(!self.good.has_ended(), "a good guest lost something");
            let now = self.good.arrived();
            now.iter().zip(before).all(|(now, before)| *now >= before + enough)
        });
    }

    /// Has a good guest send a frame to `to`, soon: to an unknown station it reaches every port.
    pub(crate) fn flood(&self, to: MacAddr) {
        self.good.flood(to);
    }

    /// Does something while the switch stands still.
    pub(crate) fn pause<T>(&self, job: impl FnOnce() -> T) -> T {
        self.bed.signal(Signal::STOP);
        let stat = Path::new("/proc").join(self.bed.id().to_string()).join("stat");
        eventually("it stands still", || std::fs::read_to_string(&stat).unwrap().contains(") T "));
        let result = job();
        self.bed.signal(Signal::CONT);
        result
    }

    /// The hostile front end has left: the port waits for the next one.
    fn settle(&self) {
        let mut port = Value::Null;
        eventually("the port can be used again", || {
            port = self.port(EVIL);
            if port["state"] == "quarantined" {
                let name = EVIL.to_owned();
                let _ = self.ask(&Request::PortReset { name });
            }
            let reason = port["reason"].as_str().unwrap();
            port["state"] == "waiting" && reason.starts_with("waiting")
        });
        // What was slow to close has been closed: four of them at once would be too many.
        eventually("nothing is being closed", || !self.held().threads.contains_key("closer"));
    }

    /// What the switch has.
    fn held(&self) -> Held {
        let process = Path::new("/proc").join(self.bed.id().to_string());
        let entries = |what: &str| {
            // What goes meanwhile is not there.
            let entries = std::fs::read_dir(process.join(what)).unwrap();
            entries.filter_map(|entry| Some(entry.ok()?.path()))
        };
        let fds = entries("fd").filter_map(|fd| std::fs::read_link(fd).ok());
        let threads = entries("task").filter_map(|t| std::fs::read_to_string(t.join("comm")).ok());
        let maps = std::fs::read_to_string(process.join("maps")).unwrap();
        let files = maps.lines().filter_map(|line| line.split_whitespace().nth(5));
        let mut files = counted(files.map(str::to_owned));
        let threads = counted(threads.map(|name| name.trim().to_owned()));
        let calls = files.remove(CALLS).unwrap_or(0);
        assert!(calls <= threads.values().sum(), "{calls} contexts for calls: {threads:?}");
        Held { fds: counted(fds.map(|target| kind(&target.to_string_lossy()))), threads, files }
    }

    /// The same as soon as nothing more comes or goes.
    fn settled(&self) -> Held {
        let mut held = self.held();
        eventually("nothing comes or goes", || {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.held();
            std::mem::replace(&mut held, now) == held
        });
        held
    }
}

fn counted(names: impl Iterator<Item = String>) -> Counts {
    let mut counts = Counts::new();
    for name in names {
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// What an fd is, without the number that tells one from the others.
fn kind(target: &str) -> String {
    match target.split_once(":[") {
        Some((kind, number)) if number.trim_end_matches(']').parse::<u64>().is_ok() => {
            kind.to_owned()
        }
        _ => target.to_owned(),
    }
}

/// Runs cases, each with both kinds of rings, and looks after each.
pub(crate) fn run(cases: &[Case]) {
    run_in(World::new(), cases);
}

/// The same where the process may have few files open.
pub(crate) fn run_short_of_fds(cases: &[Case]) {
    run_in(World::short_of_fds(), cases);
}

fn run_in(world: World, cases: &[Case]) {
    // What is made once: a worker's context for calls, what takes the place of an fd that could be
    // slow to close (an epoll set).
    for layout in [Layout::Split, Layout::Packed] {
        let mut evil = Evil::up(&Stage::new(&world, layout));
        evil.frame(&[0xff; 60]);
        evil.wait_used(1, 1);
        let device = std::fs::File::open("/dev/null").unwrap();
        assert!(!evil.ack(SET_VRING_ERR, &0u64.to_le_bytes(), &[device.as_fd()]));
        drop(evil);
        world.settle();
    }
    let before = world.settled();
    for case in cases {
        for layout in [Layout::Split, Layout::Packed] {
            // A failure names the case.
            println!("{} ({layout:?})", case.name);
            (case.run)(&Stage::new(&world, layout));
            world.settle();
            world.progress();
        }
        assert!(!world.bed.log().contains("panic"), "{}", world.bed.log());
    }
    let mut after = world.held();
    let start = Instant::now();
    while after != before {
        assert!(start.elapsed() < PATIENCE, "left behind: {after:#?}\nbefore: {before:#?}");
        std::thread::sleep(Duration::from_millis(20));
        after = world.held();
    }
    world.good.finish();
}
