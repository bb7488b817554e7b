//! Which system calls each thread may make.
//!
//! ```text
//!  control ── main list ── and what the kinds of its ports need (bpf, setns, …)
//!    └► threads it starts inherit it
//!  worker  ── short list: memory, waiting, reading and writing what it was given
//! ```
//!
//! What is on no list fails with EPERM and one line of log ([`super::trap`]). New processes fail
//! with EPERM and no line: the C library blocks all signals while it makes one. `clone3` fails with
//! ENOSYS, so that the C library takes `clone`, whose flags a filter can see: threads can be made,
//! processes cannot. Nothing that is mapped can be executed.

use std::collections::BTreeMap;

use libc::c_long;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::Grants;

/// What every thread may do: use its memory, wait, read and write what it has, and end.
const COMMON: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_preadv2,
    libc::SYS_pwritev2,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_lseek,
    libc::SYS_readlinkat,
    libc::SYS_getcwd,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_brk,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_sched_yield,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    libc::SYS_futex,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_getpid,
    libc::SYS_gettid,
    libc::SYS_restart_syscall,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_getrandom,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_membarrier,
    libc::SYS_ppoll,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_epoll_ctl,
    libc::SYS_dup,
    libc::SYS_fcntl,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_io_uring_enter,
    libc::SYS_io_setup,
    libc::SYS_io_submit,
    libc::SYS_io_getevents,
    libc::SYS_io_destroy,
    libc::SYS_memfd_create,
    libc::SYS_pipe2,
    libc::SYS_timerfd_settime,
    libc::SYS_msync,
    libc::SYS_fdatasync,
];

/// The older forms of calls, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const COMMON_OLD: &[c_long] =
    &[libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_readlink, libc::SYS_stat, libc::SYS_lstat];
#[cfg(not(target_arch = "x86_64"))]
const COMMON_OLD: &[c_long] = &[];

/// What the control thread does besides, whatever its ports are.
const CONTROL: &[c_long] = &[
    libc::SYS_openat,
    libc::SYS_pwrite64,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_shutdown,
    libc::SYS_epoll_create1,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_gettime,
    libc::SYS_signalfd4,
    libc::SYS_dup3,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_mkdirat,
    libc::SYS_fchmod,
    libc::SYS_fchmodat,
    libc::SYS_fchown,
    libc::SYS_fchownat,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getdents64,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_flock,
    libc::SYS_copy_file_range,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_umask,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getgroups,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_getrusage,
    libc::SYS_prlimit64,
    libc::SYS_mlock,
    libc::SYS_mlock2,
    libc::SYS_munlock,
    libc::SYS_mincore,
    libc::SYS_userfaultfd,
    libc::SYS_kcmp,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_register,
    libc::SYS_set_tid_address,
    // What a worker that starts later gives up.
    libc::SYS_capget,
    libc::SYS_capset,
    libc::SYS_seccomp,
    libc::SYS_landlock_create_ruleset,
    libc::SYS_landlock_add_rule,
    libc::SYS_landlock_restrict_self,
];

#[cfg(target_arch = "x86_64")]
const CONTROL_OLD: &[c_long] = &[
    libc::SYS_open,
    libc::SYS_access,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_chmod,
    libc::SYS_chown,
    libc::SYS_lchown,
    libc::SYS_eventfd,
    libc::SYS_epoll_create,
    libc::SYS_dup2,
    libc::SYS_pipe,
    libc::SYS_select,
    libc::SYS_pselect6,
];
#[cfg(not(target_arch = "x86_64"))]
const CONTROL_OLD: &[c_long] = &[libc::SYS_renameat, libc::SYS_pselect6];

/// What makes processes and nothing else.
#[cfg(target_arch = "x86_64")]
const FORK: &[c_long] = &[libc::SYS_fork, libc::SYS_vfork];
#[cfg(not(target_arch = "x86_64"))]
const FORK: &[c_long] = &[];

/// How a program reads its own auxiliary vector: rustix asks for the size of pages.
const PR_GET_AUXV: c_long = 0x4155_5856;

/// What `prctl` may be asked: names of threads and of memory, `no_new_privs`.
const PRCTL: [c_long; 7] = [
    libc::PR_SET_NAME as c_long,
    libc::PR_GET_NAME as c_long,
    libc::PR_SET_NO_NEW_PRIVS as c_long,
    libc::PR_GET_NO_NEW_PRIVS as c_long,
    libc::PR_CAPBSET_READ as c_long,
    libc::PR_SET_VMA as c_long,
    PR_GET_AUXV,
];

type Rules = BTreeMap<c_long, Vec<SeccompRule>>;

/// Restricts the calling thread, and those that it starts, to what a control thread does.
pub(super) fn restrict_control(grants: &Grants) -> Result<(), String> {
    control(grants).map_err(|error| error.to_string())
}

/// Restricts the calling thread to what a worker does.
pub(super) fn restrict_worker() -> Result<(), String> {
    worker().map_err(|error| error.to_string())
}

fn control(grants: &Grants) -> Result<(), seccompiler::Error> {
    let mut rules = common()?;
    allow(&mut rules, CONTROL);
    allow(&mut rules, CONTROL_OLD);
    let mut families = vec![libc::AF_UNIX];
    if grants.uplinks() {
        let more = [libc::AF_INET, libc::AF_INET6, libc::AF_NETLINK, libc::AF_PACKET, libc::AF_XDP];
        families.extend(more);
        allow(&mut rules, &[libc::SYS_bpf]);
    }
    let families: Vec<c_long> = families.into_iter().map(c_long::from).collect();
    for call in [libc::SYS_socket, libc::SYS_socketpair] {
        let _ = rules.insert(call, one_of(0, &families)?);
    }
    if grants.netns || grants.macvtap {
        allow(&mut rules, &[libc::SYS_setns]);
    }
    if grants.macvtap {
        let mounts = [libc::SYS_unshare, libc::SYS_mount, libc::SYS_umount2, libc::SYS_mknodat];
        allow(&mut rules, &mounts);
    }
    install(rules, SeccompAction::Trap, SeccompAction::Allow)?;
    // Threads, no processes.
    let mut processes = Rules::new();
    allow(&mut processes, FORK);
    let thread = u64::try_from(libc::CLONE_THREAD).unwrap_or(0);
    let _ = processes.insert(libc::SYS_clone, vec![all([bits(0, thread, 0)?])?]);
    install(processes, SeccompAction::Allow, fails_with(libc::EPERM))?;
    let unknown = Rules::from([(libc::SYS_clone3, Vec::new())]);
    install(unknown, SeccompAction::Allow, fails_with(libc::ENOSYS))
}

fn fails_with(error: libc::c_int) -> SeccompAction {
    SeccompAction::Errno(error.cast_unsigned())
}

fn worker() -> Result<(), seccompiler::Error> {
    let mut rules = common()?;
    // A panic reads our program to say where it was.
    let changes = libc::O_ACCMODE | libc::O_CREAT | libc::O_TRUNC;
    let changes = u64::try_from(changes).unwrap_or(u64::MAX);
    let _ = rules.insert(libc::SYS_openat, vec![all([bits(2, changes, 0)?])?]);
    let mut threads = Rules::new();
    allow(&mut threads, FORK);
    allow(&mut threads, &[libc::SYS_clone, libc::SYS_clone3]);
    // The list comes last: it lets nobody install another filter.
    install(threads, SeccompAction::Allow, fails_with(libc::EPERM))?;
    install(rules, SeccompAction::Trap, SeccompAction::Allow)
}

fn common() -> Result<Rules, seccompiler::Error> {
    let mut rules = Rules::new();
    allow(&mut rules, COMMON);
    // Filters of their own decide about these.
    allow(&mut rules, FORK);
    allow(&mut rules, &[libc::SYS_clone, libc::SYS_clone3]);
    allow(&mut rules, COMMON_OLD);
    // Nothing that can be written becomes code.
    let execute = u64::try_from(libc::PROT_EXEC).unwrap_or(u64::MAX);
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let _ = rules.insert(call, vec![all([bits(2, execute, 0)?])?]);
    }
    // A terminal that we write the log to takes no input from us.
    let no_typing = [libc::TIOCSTI, libc::TIOCLINUX]
        .map(|request| condition(1, SeccompCmpOp::Ne, request))
        .into_iter()
        .collect::<Result<Vec<_>, _>>()?;
    let _ = rules.insert(libc::SYS_ioctl, vec![all(no_typing)?]);
    let _ = rules.insert(libc::SYS_prctl, one_of(0, &PRCTL)?);
    // How a program ends itself.
    let ourselves = [c_long::from(rustix::process::getpid().as_raw_nonzero().get())];
    let _ = rules.insert(libc::SYS_tgkill, one_of(0, &ourselves)?);
    Ok(rules)
}

fn allow(rules: &mut Rules, calls: &[c_long]) {
    rules.extend(calls.iter().map(|call| (*call, Vec::new())));
}

/// A rule that holds if all conditions do.
fn all(
    conditions: impl IntoIterator<Item = SeccompCondition>,
) -> Result<SeccompRule, seccompiler::Error> {
    Ok(SeccompRule::new(conditions.into_iter().collect())?)
}

/// Rules of which one holds if the argument is one of `values`.
fn one_of(argument: u8, values: &[c_long]) -> Result<Vec<SeccompRule>, seccompiler::Error> {
    let rule = |value: &c_long| {
        let value = u64::try_from(*value).unwrap_or(u64::MAX);
        all([condition(argument, SeccompCmpOp::Eq, value)?])
    };
    values.iter().map(rule).collect()
}

/// The bits `mask` of the argument are `value`.
fn bits(argument: u8, mask: u64, value: u64) -> Result<SeccompCondition, seccompiler::Error> {
    condition(argument, SeccompCmpOp::MaskedEq(mask), value)
}

/// About the low 32 bits of an argument: all arguments that are looked at here are `int`s.
fn condition(
    argument: u8,
    operator: SeccompCmpOp,
    value: u64,
) -> Result<SeccompCondition, seccompiler::Error> {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

fn install(
    rules: Rules,
    otherwise: SeccompAction,
    matched: SeccompAction,
) -> Result<(), seccompiler::Error> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let filter = SeccompFilter::new(rules, otherwise, matched, arch)?;
    let program: BpfProgram = filter.try_into()?;
    apply_filter(&program)
}
