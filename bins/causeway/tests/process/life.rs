//! How a switch comes and goes.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};

use crate::bed::{Bed, PROGRAM, causeway, eventually};

const ONE_PAIR: &str = "vhost-user:name=g0,socket=g0.sock,queues=1";
const GUEST: [&str; 2] = ["--port", "vhost-user:name=g0,socket=g0.sock"];

#[test]
fn signals_end_it_cleanly() {
    for signal in [Signal::TERM, Signal::INT] {
        let mut bed = Bed::started(&GUEST);
        assert!(bed.path("g0.sock").exists());
        let status = bed.end(signal);
        assert_eq!(status.code(), Some(0), "{}", bed.log());
        assert!(!bed.control().exists() && !bed.path("g0.sock").exists());
        assert!(!bed.log().contains("panicked"));
    }
}

#[test]
fn a_second_switch_on_a_live_socket_says_who_holds_it() {
    let bed = Bed::started(&GUEST);
    let control = bed.control();
    let arguments = ["run", "--log", "off", "--control", control.to_str().unwrap()];
    let (code, _, error) = causeway(bed.folder.path(), &arguments);
    assert_eq!(code, 1);
    assert_eq!(
        error,
        format!("causeway: control socket {} is held by process {}\n", control.display(), bed.id())
    );
    // The first one has not noticed, and its socket is still there.
    assert_eq!(bed.port("g0")["state"], "waiting");
}

#[test]
fn stale_sockets_are_replaced() {
    let mut bed = Bed::started(&GUEST);
    assert!(!bed.end(Signal::KILL).success());
    assert!(bed.control().exists() && bed.path("g0.sock").exists());
    assert_eq!(bed.ctl_full(&["stats"]).0, 1);
    bed.start(&GUEST);
    assert_eq!(bed.port("g0")["state"], "waiting");
    let _ = UnixStream::connect(bed.path("g0.sock")).unwrap();
}

#[test]
fn an_idle_switch_does_nearly_nothing() {
    let bed = Bed::started(&[GUEST[0], GUEST[1], "--port", "vhost-user:name=g1,socket=g1.sock"]);
    let (workers, control): (Vec<_>, Vec<_>) =
        threads(&bed).into_iter().partition(|(name, _)| name.starts_with("worker-"));
    assert!(!workers.is_empty() && control.len() == 1, "{workers:?} {control:?}");
    // What was to be done at the start is done.
    eventually("workers sleep", || {
        let before = (all_ran(&workers), std::thread::sleep(Duration::from_millis(200)));
        (all_ran(&workers), ()) == before
    });
    let ((asleep, before), began) = ((all_ran(&workers), ran(&control[0].1)), Instant::now());
    std::thread::sleep(Duration::from_secs(3));
    let (after, seconds) = (ran(&control[0].1), began.elapsed().as_secs() + 2);
    // Other programs that want the CPU change none of these.
    assert_eq!(all_ran(&workers), asleep, "a worker woke up");
    assert!(after.wakes - before.wakes <= seconds, "once a second: {before:?} {after:?}");
    // Not optimised it takes some milliseconds each time. Conformance has the figure of the
    // shipped program.
    let spent = Duration::from_nanos(after.ran_ns - before.ran_ns);
    assert!(spent <= Duration::from_millis(20 * seconds), "{spent:?}");
}

/// Name and folder of each thread.
fn threads(bed: &Bed) -> Vec<(String, PathBuf)> {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", bed.id())).unwrap();
    let folders = tasks.map(|task| task.unwrap().path());
    folders.map(|at| (std::fs::read_to_string(at.join("comm")).unwrap(), at)).collect()
}

/// What a thread has done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ran {
    ran_ns: u64,
    /// How often it waited for something.
    wakes: u64,
}

fn ran(thread: &Path) -> Ran {
    let read = |name: &str| std::fs::read_to_string(thread.join(name)).unwrap();
    let (times, status) = (read("schedstat"), read("status"));
    let wakes = status.lines().find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
    let ran_ns = times.split_whitespace().next().unwrap().parse().unwrap();
    Ran { ran_ns, wakes: wakes.unwrap().trim().parse().unwrap() }
}

fn all_ran(threads: &[(String, PathBuf)]) -> Vec<Ran> {
    threads.iter().map(|(_, thread)| ran(thread)).collect()
}

/// The CPU time that a switch took so far.
fn ticks(bed: &Bed) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", bed.id())).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

#[test]
fn the_control_thread_leaves_workers_their_cpus() {
    let of = |bed: &Bed, name: &str| {
        let all = threads(bed);
        cpus(&all.iter().find(|(of, _)| of.trim() == name).unwrap().1)
    };
    let own = cpus(Path::new("/proc/thread-self"));
    let (first, others) = own.split_first().unwrap();
    let bed = Bed::started(&[GUEST[0], GUEST[1], "--workers", &first.to_string()]);
    assert_eq!(of(&bed, "worker-0"), [*first]);
    // Where workers have all there are, there is no choice.
    assert_eq!(of(&bed, "causeway"), if others.is_empty() { &*own } else { others });
    let all = own.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
    let bed = Bed::started(&[GUEST[0], GUEST[1], "--workers", &all]);
    assert_eq!(of(&bed, "causeway"), own);
}

/// On which CPUs a thread may run.
fn cpus(thread: &Path) -> Vec<usize> {
    let status = std::fs::read_to_string(thread.join("status")).unwrap();
    let list = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap();
    let number = |text: &str| text.parse::<usize>().unwrap();
    let range = |part: &str| match part.split_once('-') {
        Some((from, to)) => number(from)..=number(to),
        None => number(part)..=number(part),
    };
    list.trim().split(',').flat_map(range).collect()
}

#[test]
fn a_switch_without_free_fds_waits_and_then_answers() {
    let bed = Bed::started(&GUEST);
    let id = Pid::from_raw(bed.id().try_into().unwrap());
    let limit = |current| {
        let set = |maximum| Rlimit { current: Some(current), maximum };
        let maximum = rustix::process::getrlimit(Resource::Nofile).maximum;
        let _ = prlimit(id, Resource::Nofile, set(maximum)).unwrap();
    };
    limit(3);
    let before = ticks(&bed);
    let _clients = [(); 3].map(|()| UnixStream::connect(bed.control()).unwrap());
    std::thread::sleep(Duration::from_secs(2));
    let spent = ticks(&bed) - before;
    assert!(spent <= 4, "{spent} ticks");
    assert_eq!(bed.log().matches("cannot accept clients").count(), 1, "{}", bed.log());
    limit(1024);
    assert_eq!(bed.port("g0")["state"], "waiting");
    // From now on it listens without waiting. The machine may be busy with others.
    let took = [(); 5].map(|()| {
        let start = Instant::now();
        let _ = bed.ctl(&["ports"]);
        start.elapsed()
    });
    assert!(took.iter().min() < Some(&Duration::from_millis(700)), "{took:?}");
}

#[test]
fn as_many_files_as_allowed_may_be_open_and_too_few_are_told() {
    let limits = "ulimit -Sn 256 && ulimit -Hn 900 && exec \"$0\" \"$@\"";
    let mut bed = Bed::new();
    bed.start_command(Command::new("sh").args(["-c", limits, PROGRAM]), &GUEST);
    let limit = std::fs::read_to_string(format!("/proc/{}/limits", bed.id())).unwrap();
    let limit = limit.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let limit: Vec<&str> = limit.split_whitespace().collect();
    assert_eq!(limit[..2], ["900", "900"]);
    let told = "900 open files (RLIMIT_NOFILE) are few for 1 vhost-user ports: 168 fds are kept of";
    assert!(bed.log().contains(told), "{}", bed.log());
    let _ = bed.ctl(&["port", "add", "vhost-user:name=g1,socket=g1.sock"]);
    assert!(bed.log().contains("are few for 2 vhost-user ports: 112 fds"), "{}", bed.log());
    assert_eq!(bed.log().matches("RLIMIT_NOFILE").count(), 2);

    let limits = "ulimit -Sn 256 && exec \"$0\" \"$@\"";
    let mut bed = Bed::new();
    bed.start_command(Command::new("sh").args(["-c", limits, PROGRAM]), &["--port", ONE_PAIR]);
    let may = rustix::process::getrlimit(Resource::Nofile).maximum;
    assert_eq!(bed.log().contains("RLIMIT_NOFILE"), may.is_some_and(|may| may < 4096));
}

#[test]
fn a_start_that_somebody_locks_out_says_so() {
    use rustix::fs::{FlockOperation, flock};
    let bed = Bed::new();
    let lock = bed.path("control.sock.lock");
    let held = std::fs::File::create(&lock).unwrap();
    flock(&held, FlockOperation::LockExclusive).unwrap();
    let control = bed.control();
    let arguments = ["run", "--log", "off", "--control", control.to_str().unwrap()];
    let (code, _, error) = causeway(bed.folder.path(), &arguments);
    let text = "is held by another process: end it, or remove the file";
    assert_eq!((code, error), (1, format!("causeway: lock {} {text}\n", lock.display())));
}

#[test]
fn answers_have_the_shapes_of_the_contract() {
    let bed = Bed::started(&GUEST);
    let stats = bed.json(&["stats"]);
    for key in ["flood_copies", "segments_added", "merged", "originated", "held"] {
        assert_eq!(stats["switch"][key], 0, "{key}");
    }
    let port = &stats["ports"][0];
    assert_eq!((&port["name"], &port["kind"]), (&"g0".into(), &"vhost-user".into()));
    assert_eq!(port["state"], "waiting");
    assert!(port["since_ms"].is_u64() && port["queues"].as_array().unwrap().is_empty());
    let workers = stats["workers"].as_array().unwrap();
    assert!(workers.iter().all(|w| w["cpu"].is_u64() && w["busy_ratio"].is_f64()));
    assert!(workers.iter().all(|w| w["frames"].is_u64()));
    assert_eq!(bed.json(&["fdb"]), serde_json::json!({"entries": []}));
    assert_eq!(bed.json(&["version"])["pid"], bed.id());
    assert_eq!(bed.ctl(&["fdb", "flush"]), "forgot 0 addresses\n");
    assert!(bed.ctl(&["ports"]).starts_with("PORT  KIND        STATE"));
    assert!(bed.ctl(&["stats"]).contains("WORKER  CPU"));
}
