//! The reaper: a small process that removes our cgroups when we are gone, however we went.
//!
//! It is started in the overhead group, in a session of its own, and holds a pidfd of the microVM's process, one
//! end of a socket whose other end we hold, and our standard error. A cgroup that holds a process cannot be
//! removed, so when we end it moves itself (and, when asked to while we still live, us) to where we were
//! started, removes what was made, and only then lets go of standard error: whoever waits for its end of file
//! knows that nothing of ours is left. If we were killed, that includes the API's socket.

use std::ffi::OsString;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::console;
use crate::descriptors::{self, Descriptors, HandoverError};
use crate::exit::{Code, chain};
use crate::exit_report::{Ending, Pending};
use crate::seccomp::{Filters, Role, SeccompError};
use crate::virtiofsd::{Shares, Starter};

/// Names of the descriptors that a reaper is given, beside those of its [`cgroup::Cleaner`].
const LINK: &str = "reaper.link";
const PIDFD: &str = "reaper.pidfd";
const TERMINAL: &str = "reaper.terminal";
const REPORT: &str = "reaper.report";
const STARTER: &str = "reaper.starter";

/// How long a group that was just left may still be busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(2);

/// How long we wait for the reaper to answer: longer than it may take on a slow host.
const ANSWER: Duration = Duration::from_secs(30);

/// The bytes that are said on the link. The exit code follows the second.
const READY: u8 = b'R';
const FINISH: u8 = b'F';

/// Why there is no reaper.
#[derive(Debug, thiserror::Error)]
pub enum ReaperError {
    /// Its state could not be handed to it.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// The cgroups' part of it is wrong.
    #[error(transparent)]
    Parts(#[from] cgroup::Error),
    /// It has no seccomp filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// It could not be started.
    #[error("cannot start the process that removes the cgroups at the end: {doing}")]
    Start {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// What a reaper is told.
#[derive(Serialize, Deserialize)]
struct State {
    id: String,
    pid: i32,
    cleaner: cgroup::CleanerState,
    /// For the report, where there is to be one.
    account: Option<cgroup::Account>,
    /// The API's, relative to where we were started.
    socket: Option<OsString>,
    filters: Filters,
    /// What is started from outside of a jail.
    shares: Option<Shares>,
}

/// Our end of the link to the reaper, which is our child.
pub struct Link {
    stream: UnixStream,
    pid: i32,
}

impl Link {
    /// Takes over a link from the image of ourselves that started the reaper.
    pub fn from_parts(fd: OwnedFd, pid: i32) -> Self {
        Self { stream: fd.into(), pid }
    }

    /// The reaper's id, as the host sees it.
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// For handing the link to another image of ourselves.
    pub fn into_parts(self) -> (OwnedFd, i32) {
        (self.stream.into(), self.pid)
    }

    /// Has everything removed, and returns when it is. The process finds itself where it was started, and is to end
    /// with `code`.
    pub fn finish(mut self, code: Code) {
        let finished = self
            .stream
            .set_read_timeout(Some(ANSWER))
            .and_then(|()| self.stream.write_all(&[FINISH, code as u8]))
            .and_then(|()| self.stream.read_to_end(&mut Vec::new()));
        match finished {
            // It ends with the link; a zombie would be left to whoever is init here.
            // SAFETY: waitpid with no status to store.
            Ok(_) => drop(unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), 0) }),
            Err(error) => log::error!("the process that removes the cgroups does not answer: {error}"),
        }
    }
}

/// Both ends of a link.
pub struct Ends {
    ours: UnixStream,
    theirs: UnixStream,
}

impl Ends {
    /// Of a new link.
    pub fn new() -> Result<Self, ReaperError> {
        let failed = |source| ReaperError::Start { doing: "socketpair", source };
        UnixStream::pair().map(|(ours, theirs)| Self { ours, theirs }).map_err(failed)
    }

    /// Of the two ends ours, to the reaper `pid`.
    pub fn into_link(self, pid: i32) -> Link {
        Link { stream: self.ours, pid }
    }
}

/// What a reaper watches.
#[derive(Clone, Copy)]
pub struct Watch<'a> {
    /// The microVM's name.
    pub id: &'a str,
    /// Its process.
    pub pid: i32,
    /// What threads may ask of the kernel.
    pub filters: &'a Filters,
    /// The API's socket, which is removed if the process is killed.
    pub socket: Option<&'a Path>,
    /// Whether it keeps no standard stream of ours.
    pub quiet: bool,
    /// What may be started from outside of a jail, and that end of the link to who asks for it.
    pub servers: Option<(&'a Shares, BorrowedFd<'a>)>,
}

impl<'a> Watch<'a> {
    /// Over this process.
    pub fn ourselves(id: &'a str, filters: &'a Filters) -> Self {
        Self { id, pid: std::process::id().cast_signed(), filters, socket: None, quiet: false, servers: None }
    }
}

/// Starts the reaper, which `image` is executed for, and waits until it is ready. The calling thread is in the
/// overhead group already, and so is the reaper from its birth. In the end it writes `report`. Without a reaper the groups are left and removed.
pub fn start(
    image: BorrowedFd<'_>,
    watch: Watch<'_>,
    cleaner: cgroup::Cleaner,
    report: Option<Pending>,
    ends: Ends,
) -> Result<Link, ReaperError> {
    let (cleaner, fds) = cleaner.into_parts();
    let mut given = Descriptors::from_iter(fds);
    let account = report.and_then(|Pending { file, account }| {
        given.insert(REPORT.to_owned(), file);
        account
    });
    let Watch { id, pid, filters, socket, quiet, servers } = watch;
    let socket = socket.map(|path| path.as_os_str().to_owned());
    let (shares, link) = servers.unzip();
    let (shares, filters) = (shares.cloned(), filters.clone());
    let state = State { id: id.to_owned(), pid, cleaner, account, socket, filters, shares };
    spawn(image, &state, &mut given, ends, link, quiet).inspect_err(|_| {
        let removed = cgroup::Cleaner::from_parts(state.cleaner, given.into_iter().collect())
            .and_then(|cleaner| cleaner.leave_and_remove(PATIENCE));
        if let Err(error) = removed {
            log::warn!("{}", chain(&error));
        }
    })
}

/// Starts the process with `state` and the descriptors `given`, to which those of the links are added.
fn spawn(
    image: BorrowedFd<'_>,
    state: &State,
    given: &mut Descriptors,
    ends: Ends,
    starter: Option<BorrowedFd<'_>>,
    quiet: bool,
) -> Result<Link, ReaperError> {
    let failed = |doing| move |source| ReaperError::Start { doing, source };
    let Ends { mut ours, theirs } = ends;
    given.insert(LINK.to_owned(), theirs.into());
    if let Some(link) = starter {
        given.insert(STARTER.to_owned(), link.try_clone_to_owned().map_err(failed("dup"))?);
    }
    given.insert(PIDFD.to_owned(), pidfd_open(state.pid).map_err(failed("pidfd_open"))?);
    if console::terminal_settings(io::stdin().as_fd()).is_some() {
        let terminal = io::stdin().as_fd().try_clone_to_owned().map_err(failed("dup"))?;
        given.insert(TERMINAL.to_owned(), terminal);
    }
    let memfd = descriptors::pack(state, given)?;
    let inherited: Vec<RawFd> = given.values().chain([&memfd]).map(AsRawFd::as_raw_fd).collect();
    let mut command = Command::new(format!("/proc/self/fd/{}", image.as_raw_fd()));
    command.arg0("pinfold-reaper").arg(format!("--reap={}", memfd.as_raw_fd()));
    command.stdin(Stdio::null()).stdout(Stdio::null()).env_clear();
    if quiet {
        command.stderr(Stdio::null());
    }
    // SAFETY: between fork and exec only system calls are made: setsid and fcntl.
    unsafe {
        command.pre_exec(move || {
            libc::setsid();
            descriptors::inheritable(&inherited)
        });
    }
    let child = command.spawn().map_err(failed("spawn"))?;
    // With our copy of its end open the link would not end with the reaper.
    given.remove(LINK);
    let mut ready = [0];
    ours.set_read_timeout(Some(ANSWER)).map_err(failed("set_read_timeout"))?;
    ours.read_exact(&mut ready).map_err(failed("it ended before it was ready"))?;
    Ok(Link { stream: ours, pid: child.id().cast_signed() })
}

/// The reaper's life, in its own process.
pub fn run(fd: RawFd) -> Result<(), ReaperError> {
    let (state, mut given) = descriptors::unpack::<State>(fd)?;
    crate::logger::init(&state.id, log::LevelFilter::Warn);
    // While nothing is forbidden to this process.
    let mut starter = None;
    if let (Some(link), Some(shares)) = (given.remove(STARTER), &state.shares) {
        let started = Starter::start(shares, link, given);
        let (process, rest) = started.map_err(|source| ReaperError::Start { doing: "fork", source })?;
        (starter, given) = (Some(process), rest);
    }
    // SAFETY: the name is a NUL-terminated string.
    unsafe { libc::prctl(libc::PR_SET_NAME, c"pinfold_reaper".as_ptr()) };
    // Without it the kernel may choose us before the process that we are to survive. Needs a privilege.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        log::debug!("cannot lower oom_score_adj: {error}");
    }
    let (Some(link), Some(pidfd)) = (given.remove(LINK), given.remove(PIDFD)) else {
        return Err(HandoverError::Foreign(fd).into());
    };
    let terminal = given.remove(TERMINAL);
    let settings = terminal.as_ref().and_then(|fd| console::terminal_settings(fd.as_fd()));
    let report = given.remove(REPORT).map(|file| Pending { file, account: state.account });
    let cleaner = cgroup::Cleaner::from_parts(state.cleaner, given.into_iter().collect())?;
    let mut link = UnixStream::from(link);
    state.filters.install(Role::Reaper)?;
    // It fails if the process is gone already, which is no reason to leave its groups.
    let _ = link.write_all(&[READY]);
    let mut said = [0; 2];
    // Of a process that was killed the link just ends.
    let _ = link.read_exact(&mut said);
    let ending = if let [FINISH, code] = said {
        // It lives on, without its guest: out with it.
        if let Err(error) = cleaner.move_out(state.pid) {
            log::warn!("{}", chain(&error));
        }
        Ending::Exit(code.into())
    } else {
        // The link also ends a moment before the process does.
        wait(pidfd.as_fd());
        // First of all: once the parent has waited for the process, older kernels do not tell any more.
        let ending = Ending::of(state.pid, pidfd.as_fd());
        if let (Some(fd), Some(settings)) = (&terminal, &settings) {
            let _ = console::set_terminal(fd.as_fd(), settings);
        }
        if let Some(socket) = &state.socket {
            remove_unused_socket(Path::new(socket));
        }
        ending
    };
    if let Some(starter) = starter {
        starter.stop();
    }
    if let Some(report) = report {
        report.write(&state.id, state.pid, ending);
    }
    if let Err(error) = cleaner.leave_and_remove(PATIENCE) {
        log::warn!("{}", chain(&error));
    }
    Ok(())
}

/// Removes the file at `path` if it is a socket's, and no process has that socket any more.
fn remove_unused_socket(path: &Path) {
    let is_socket = path.symlink_metadata().is_ok_and(|data| data.file_type().is_socket());
    // A socket of another type than the one at the path neither waits for it nor disturbs it: the kernel says
    // EPROTOTYPE, unless nobody has that one any more.
    let answer = UnixDatagram::unbound().and_then(|probe| probe.connect(path));
    let unused = answer.is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused);
    if is_socket
        && unused
        && let Err(error) = std::fs::remove_file(path)
    {
        log::warn!("cannot remove the API's socket {}: {error}", path.display());
    }
}

/// Waits for the end of the process behind `pidfd`.
pub fn wait(pidfd: BorrowedFd<'_>) {
    let mut poll = libc::pollfd { fd: pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    while unsafe { libc::poll(&raw mut poll, 1, -1) } < 0
        && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted
    {}
}

pub fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    match RawFd::try_from(fd) {
        // SAFETY: it is a new descriptor, which nobody else owns.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn only_a_socket_that_nobody_has_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        remove_unused_socket(&path);
        assert!(path.exists(), "somebody listens");
        drop(listener);
        remove_unused_socket(&path);
        assert!(!path.exists(), "nobody has it");
        remove_unused_socket(&path);
        std::fs::write(&path, "").unwrap();
        remove_unused_socket(&path);
        assert!(path.exists(), "it is no socket");
    }
}
