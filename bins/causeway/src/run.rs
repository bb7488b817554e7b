//! `causeway run`: from options to a switch that serves.

use std::io::IsTerminal;
use std::net::SocketAddr;
use std::path::PathBuf;

use control::config::{check_stations, check_unique};
use control::scrape::Scrape;
use control::server::{Server, default_state_dir};
use control::{Config, Poll, PortSpec, StateDir, StaticEntry, SwitchSettings, Workers};
use switch::{FdbLimits, PollMode, Switch, SwitchConfig};
use tracing_subscriber::filter::LevelFilter;
use vhost_user_net::record::prepare_state_dir;

use crate::Failure;
use crate::app::{App, Origin, Source, Taken, pinned};
use crate::cli::{LogLevel, RunArgs, Switched};
use crate::ctl::default_socket;
use crate::open_files;
use crate::sandbox::{Asked, Sandbox};
use crate::service::ServiceManager;
use crate::signals::Signals;

pub(crate) fn run(arguments: &RunArgs) -> Result<(), Failure> {
    let config = match &arguments.config {
        Some(file) => Config::load(file, &arguments.ports)
            .map_err(|error| Failure::Usage(error.to_string()))?,
        None => Config::default(),
    };
    let from_file = config.ports.iter().map(|spec| (spec, Origin::File));
    let given = arguments.ports.iter().map(|spec| (spec, Origin::CommandLine));
    let ports: Vec<Wanted> = from_file
        .chain(given)
        .map(|(spec, origin)| {
            (spec.clone(), config.statics_of(&spec.name).cloned().collect(), origin)
        })
        .collect();
    check(&ports, &config.statics)?;
    let settings = arguments.over(&config.switch).map_err(Failure::Usage)?;
    let wanted = switch_config(&settings, ports.iter().map(|(spec, ..)| spec))?;
    check_placement(&settings, &wanted.workers, ports.iter().map(|(spec, ..)| spec))?;
    log_to_stderr(arguments.log);
    // Before another process sends all its fds.
    let limit = open_files::raise_limit();
    let start = Start { arguments, config, settings, limit };
    let Some(path) = &arguments.take_over else { return start.serve(ports, &mut None) };
    // What is wrong here is known by now: from now on another process is asked.
    let taken = Taken::ask(path).map_err(Failure::Runtime)?;
    let wanted = start.ports_beside(ports, &taken);
    let mut taken = Some(taken);
    let served = wanted.and_then(|ports| start.serve(ports, &mut taken));
    // There is nobody to be told once everything was taken over.
    served.inspect_err(|failure| {
        if let Some(taken) = &mut taken {
            taken.abort(failure.text());
        }
    })
}

/// A port that is to be there.
type Wanted = (PortSpec, Vec<StaticEntry>, Origin);

/// What the program was started with.
struct Start<'a> {
    arguments: &'a RunArgs,
    config: Config,
    settings: SwitchSettings,
    /// Open files that the process may have.
    limit: usize,
}

/// Checks that ports and stations do not contradict each other.
fn check(ports: &[Wanted], statics: &[StaticEntry]) -> Result<(), Failure> {
    let all = || ports.iter().map(|(spec, ..)| spec);
    check_unique(all()).map_err(Failure::Usage)?;
    check_stations(all(), statics).map_err(|clash| Failure::Usage(clash.message))
}

impl Start<'_> {
    /// The ports that are wanted, and those of the old process that nobody named: all of them if
    /// no port is named at all, else those that clients added and that are in nobody's way.
    fn ports_beside(&self, mut ports: Vec<Wanted>, taken: &Taken) -> Result<Vec<Wanted>, Failure> {
        let named = self.arguments.config.is_some() || !ports.is_empty();
        for (spec, statics, origin) in taken.ports(named).map_err(Failure::Runtime)? {
            let meets = |(other, ..): &Wanted| {
                other.name == spec.name
                    || other.clone().absolute().is_ok_and(|o| o.resource() == spec.resource())
            };
            if !ports.iter().any(meets) {
                ports.push((spec, statics, origin));
            }
        }
        let statics: Vec<_> = ports.iter().flat_map(|(_, statics, _)| statics.clone()).collect();
        check(&ports, &statics)?;
        Ok(ports)
    }

    fn serve(self, ports: Vec<Wanted>, taken: &mut Option<Taken>) -> Result<(), Failure> {
        let Self { arguments, config, settings, limit } = self;
        let specs = || ports.iter().map(|(spec, ..)| spec);
        let mut switch_config = switch_config(&settings, specs())?;
        check_placement(&settings, &switch_config.workers, specs())?;
        let socket = match (&settings.control, &arguments.take_over) {
            (Some(path), _) | (None, Some(path)) => path.clone(),
            (None, None) => default_socket()?,
        };
        let failed = |what: &str| {
            let what = what.to_owned();
            move |error: std::io::Error| Failure::Runtime(format!("cannot {what}: {error}"))
        };
        // Signals first: whatever comes from now on ends in a clean stop.
        let signals = Signals::take_over().map_err(failed("take signals over"))?;
        virtq::mem::guard::install().map_err(failed("take SIGBUS over"))?;
        open_files::warn_if_short(limit, specs());
        warn_if_calls_can_block();
        let adopted = taken.as_mut().map_or(Ok(None), |taken| taken.server(&socket));
        let server = match adopted.map_err(Failure::Runtime)? {
            Some(server) => server,
            None => Server::bind(&socket).map_err(|error| Failure::Runtime(error.to_string()))?,
        };
        let state_dir = state_dir(settings.state_dir.as_ref())?;
        let sandbox = Sandbox::begin(
            &Asked {
                on: arguments.sandbox == Switched::On,
                allow_dirs: &arguments.allow_dirs,
                allow_kinds: &arguments.allow_kinds,
                control: &socket,
                config: arguments.config.as_deref(),
                state_dir: state_dir.as_deref(),
            },
            &specs().collect::<Vec<_>>(),
        )
        .map_err(Failure::Runtime)?;
        switch_config.at_start = sandbox.at_start();
        let switch = Switch::start(&switch_config).map_err(failed("start the workers"))?;
        leave_to_workers(&switch_config.workers);
        let mut service = ServiceManager::of_environment();
        service.or(|| taken.as_mut().and_then(Taken::service));
        let mut app = App::new(switch, server, signals).map_err(Failure::Runtime)?;
        if let Some(retries) = settings.retries {
            app.set_retries(retries);
        }
        app.set_state_dir(state_dir);
        app.set_open_files(limit);
        app.set_service(service);
        app.set_rebalance(settings.rebalance_s.unwrap_or(0));
        serve_metrics(&mut app, settings.metrics, taken.as_mut())?;
        app.plan(specs());
        let count = ports.len();
        for (spec, statics, origin) in ports {
            match taken {
                None => app.add(&spec, statics, origin),
                Some(taken) => app.take_or_open(taken, &spec, statics, origin),
            }
            .map_err(Failure::Runtime)?;
        }
        if let Some(file) = arguments.config.clone() {
            let given = arguments.ports.clone();
            app.remember(Source { file, given, switch: config.switch });
        }
        if let Some(taken) = taken.as_mut() {
            app.go_on(taken).map_err(Failure::Runtime)?;
        }
        *taken = None;
        app.enter(sandbox);
        tracing::info!(control = %socket.display(), ports = count, "listening");
        app.serve().map_err(Failure::Runtime)
    }
}

/// Serves scrapers at the address that was asked for, if one was.
fn serve_metrics(
    app: &mut App,
    asked: Option<SocketAddr>,
    taken: Option<&mut Taken>,
) -> Result<(), Failure> {
    let Some(asked) = asked else { return Ok(()) };
    let scrape = match taken.and_then(|taken| taken.scrape(asked)) {
        Some(scrape) => scrape,
        None => Scrape::bind(asked).map_err(|error| {
            Failure::Runtime(format!("cannot serve metrics at {asked}: {error}"))
        })?,
    };
    let address = scrape.address().unwrap_or(asked);
    app.serve_metrics(scrape, asked).map_err(Failure::Runtime)?;
    tracing::info!(%address, "metrics");
    Ok(())
}

fn warn_if_calls_can_block() {
    if virtio_net::notify::can_block() {
        tracing::warn!(
            "no asynchronous I/O (fs.aio-max-nr, or not in this kernel): a front end that fills \
             its call eventfd and makes it blocking can stop a worker"
        );
    }
}

/// Where ring positions are kept: a directory that was asked for must do, the usual one may not.
fn state_dir(asked: Option<&StateDir>) -> Result<Option<PathBuf>, Failure> {
    let dir = match asked {
        Some(StateDir::Off) => return Ok(None),
        Some(StateDir::At(dir)) => Some(dir.clone()),
        None => default_state_dir(),
    };
    let Some(dir) = dir else { return Ok(None) };
    match prepare_state_dir(&dir) {
        Ok(()) => Ok(Some(dir)),
        Err(error) if asked.is_some() => {
            let dir = dir.display();
            Err(Failure::Runtime(format!("cannot keep ring positions in {dir}: {error}")))
        }
        Err(error) => {
            tracing::warn!(dir = %dir.display(), "ring positions are not kept: {error}");
            Ok(None)
        }
    }
}

fn log_to_stderr(level: LogLevel) {
    let level = match level {
        LogLevel::Off => LevelFilter::OFF,
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .with_max_level(level)
        .init();
}

fn switch_config<'a>(
    settings: &SwitchSettings,
    ports: impl Iterator<Item = &'a PortSpec>,
) -> Result<SwitchConfig, Failure> {
    let defaults = SwitchConfig::default();
    let limits = FdbLimits::default();
    Ok(SwitchConfig {
        workers: workers(settings.workers.as_ref(), ports)?,
        poll: match settings.poll.unwrap_or_default() {
            Poll::Adaptive => PollMode::Adaptive,
            Poll::Busy => PollMode::Busy,
            Poll::Interrupt => PollMode::Interrupt,
        },
        poll_us: settings.poll_us.unwrap_or(defaults.poll_us),
        fdb: FdbLimits {
            entries: settings.fdb_entries.unwrap_or(limits.entries),
            per_port: settings.fdb_entries_per_port.unwrap_or(limits.per_port),
            age_secs: settings.ageing_s.unwrap_or(limits.age_secs),
        },
        at_start: defaults.at_start,
        forward_reserved: settings.forward_reserved.unwrap_or(defaults.forward_reserved),
    })
}

/// What is asked of the placement must be possible with these workers.
fn check_placement<'a>(
    settings: &SwitchSettings,
    workers: &switch::Workers,
    ports: impl Iterator<Item = &'a PortSpec>,
) -> Result<(), Failure> {
    let cpus: Vec<Option<usize>> = match workers {
        switch::Workers::Cpus(cpus) => cpus.iter().copied().map(Some).collect(),
        switch::Workers::PerQueue | switch::Workers::Unpinned(_) | switch::Workers::Manual(_) => {
            Vec::new()
        }
    };
    if cpus.is_empty() && settings.rebalance_s.is_some_and(|seconds| seconds > 0) {
        return Err(Failure::Usage(
            "rebalance has nothing to move with workers=per-queue: every pair has its own worker"
                .to_owned(),
        ));
    }
    for port in ports {
        let in_port = |error: String| Failure::Usage(format!("port {}: {error}", port.name));
        let _ = pinned(&port.cpus, &cpus).map_err(in_port)?;
        if cpus.is_empty() && port.kind.interface().is_some_and(|interface| interface.spread) {
            return Err(in_port(
                "spread=on has no workers to share with: workers=per-queue".into(),
            ));
        }
    }
    Ok(())
}

/// The CPUs that were asked for, or those that the process may use, at most one per pair.
fn workers<'a>(
    asked: Option<&Workers>,
    ports: impl Iterator<Item = &'a PortSpec>,
) -> Result<switch::Workers, Failure> {
    let usable = usable_cpus()?;
    match asked {
        Some(Workers::PerQueue) => Ok(switch::Workers::PerQueue),
        Some(Workers::Cpus(cpus)) => {
            let cpus: Vec<usize> = cpus.iter().copied().map(usize::from).collect();
            match cpus.iter().find(|cpu| !usable.contains(cpu)) {
                None => Ok(switch::Workers::Cpus(cpus)),
                Some(cpu) => {
                    let usable: Vec<String> = usable.iter().map(usize::to_string).collect();
                    Err(Failure::Usage(format!(
                        "workers names CPU {cpu}; this process may use {}",
                        usable.join(",")
                    )))
                }
            }
        }
        None => {
            let pairs: usize =
                ports.map(|port| usize::from(port.kind.pairs())).fold(0, usize::saturating_add);
            // Ports that are added later are to find more than one worker.
            let most = if pairs == 0 { usable.len() } else { pairs };
            Ok(switch::Workers::Cpus(usable.into_iter().take(most).collect()))
        }
    }
}

/// Keeps this thread, and those that it starts from now on, off the workers' CPUs, if there are
/// others: what a front end has the control thread do is not to cost a worker time.
fn leave_to_workers(workers: &switch::Workers) {
    let switch::Workers::Cpus(taken) = workers else { return };
    let mut others = rustix::thread::CpuSet::new();
    let usable = usable_cpus().unwrap_or_default();
    usable.into_iter().filter(|cpu| !taken.contains(cpu)).for_each(|cpu| others.set(cpu));
    if others.count() > 0
        && let Err(error) = rustix::thread::sched_setaffinity(None, &others)
    {
        tracing::warn!(%error, "the control thread may take CPUs of workers");
    }
}

fn usable_cpus() -> Result<Vec<usize>, Failure> {
    use rustix::thread::{CpuSet, sched_getaffinity};
    let set = sched_getaffinity(None)
        .map_err(|error| Failure::Runtime(format!("cannot ask for usable CPUs: {error}")))?;
    Ok((0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect())
}
