//! From the configuration's `cgroup` section to threads in their cgroups.
//!
//! The main thread joins first, then the process executes itself anew ([`Placement::exec`]): its old address
//! space, which was charged to whoever launched us, is gone, and every page from then on is charged to the pod.

use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::sync::Arc;

use resources::{CgroupSection, CgroupVersion, Driver, InstanceId, MicrovmConfig};
use serde::{Deserialize, Serialize};

use crate::base::{self, BaseError};
use crate::descriptors::{self, Descriptors, HandoverError};
use crate::exit::{Code, chain};
use crate::exit_report::Pending;
use crate::guard::Guard;
use crate::metrics::METRICS;
use crate::reaper::{self, Link, ReaperError};
use crate::seccomp::Filters;
use crate::sink::{self, SinkError};
use crate::vcpu::Enter;

/// Name of the descriptor of the link to the reaper; the others are the cgroups'.
const LINK: &str = "placement.reaper";

/// Why the threads have no place.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// The groups could not be made or joined.
    #[error("cgroup")]
    Cgroup(#[from] cgroup::Error),
    /// There is no group to build in.
    #[error(transparent)]
    Base(#[from] BaseError),
    /// The reaper is missing.
    #[error(transparent)]
    Reaper(#[from] ReaperError),
    /// The report would have nobody to write it.
    #[error(
        "--exit-report: it is written by the process that removes the groups, and with \"driver\": \"none\" in the \
         section cgroup there is none; leave one of the two out"
    )]
    NoReporter,
    /// The report's file.
    #[error("--exit-report")]
    Report(#[from] SinkError),
    /// The state could not be handed on.
    #[error(transparent)]
    Handover(#[from] HandoverError),
    /// A system call failed.
    #[error("cannot execute pinfold anew in its cgroup: {doing}")]
    Exec {
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// Our own executable, by a descriptor: a chroot has no path to it.
pub struct Image(OwnedFd);

impl Image {
    /// The file that this process executes.
    pub fn open() -> Result<Self, PlacementError> {
        let doing = "open /proc/self/exe";
        File::open("/proc/self/exe")
            .map(|file| Self(file.into()))
            .map_err(|source| PlacementError::Exec { doing, source })
    }

    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Where the threads of this process live.
pub enum Placement {
    /// In groups of ours; the main thread has joined.
    Placed {
        /// The groups.
        tree: Arc<cgroup::Tree>,
        /// Their limits, as they were set.
        limits: Box<cgroup::Limits>,
        /// The way to the process that removes them.
        reaper: Link,
    },
    /// Wherever we were started: `"driver": "none"`.
    Unplaced,
}

/// What was asked for at the launch, all files read: some may be FIFOs, which can be read once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    /// The microVM as declared so far.
    pub config: MicrovmConfig,
    /// `linux.cgroupsPath` of the OCI specification.
    pub cgroups_path: Option<String>,
    /// Whether to start it at once.
    pub start: bool,
    /// The metadata for the guest.
    pub metadata: Option<serde_json::Value>,
    /// What threads may ask of the kernel.
    pub filters: Filters,
}

/// What travels to the new image of ourselves.
#[derive(Serialize, Deserialize)]
struct State {
    order: Order,
    tree: cgroup::TreeState,
    limits: Box<cgroup::Limits>,
    reaper: i32,
}

impl Placement {
    /// Makes the groups, joins them with the calling thread, which is the only one, and starts the reaper, which
    /// writes a report to `report` in the end, and removes the API's `socket` if we cannot.
    pub fn establish(
        image: &Image,
        id: &InstanceId,
        order: &Order,
        report: Option<&Path>,
        socket: Option<&Path>,
    ) -> Result<Self, PlacementError> {
        let section = &order.config.cgroup;
        if section.driver == Driver::None {
            return if report.is_some() { Err(PlacementError::NoReporter) } else { Ok(Self::Unplaced) };
        }
        let report = report.map(sink::open).transpose()?;
        let mut request = request(id, section);
        // As they were before a scope is made: at the end we go back to where we were started.
        let hierarchies =
            cgroup::Hierarchies::discover().map_err(|error| cgroup::Error::Plan(error.into()))?;
        request.parent = base::choose(id, section, order.cgroups_path.as_deref(), &request, &hierarchies)?;
        let plan = cgroup::resolve_in(&hierarchies, &request)?;
        let guard = plan.cleaner()?.map(Guard::start).transpose();
        let guard = guard.map_err(|source| ReaperError::Start { doing: "fork", source })?;
        let (tree, limits, cleaner) = plan.create()?;
        let report = report.map(|file| {
            let account = limits.layout().account();
            let account = account.inspect_err(|error| log::warn!("exit report: {}", chain(error))).ok();
            Pending { file: file.into(), account }
        });
        let in_force = limits.in_force();
        for limit in &in_force.unapplied {
            log::warn!("a limit could not be applied: {limit}");
        }
        for limit in &in_force.pending {
            log::warn!("a limit cannot be applied yet: {limit}");
        }
        if let Err(error) = tree.join(cgroup::Role::Overhead) {
            if let Err(second) = cleaner.leave_and_remove(std::time::Duration::from_secs(2)) {
                log::warn!("{}", chain(&second));
            }
            return Err(error.into());
        }
        let reaper = reaper::start(image.as_fd(), id.as_str(), cleaner, report, socket, &order.filters)?;
        drop(guard);
        Ok(Self::Placed { tree: Arc::new(tree), limits: Box::new(limits), reaper })
    }

    /// Executes this process anew with its arguments and `order`, unless its memory is charged to the right
    /// group already.
    pub fn exec(self, image: &Image, order: &Order) -> Result<Self, PlacementError> {
        match self {
            Self::Placed { tree, limits, reaper } if tree.needs_exec() => {
                let Ok(tree) = Arc::try_unwrap(tree) else { unreachable!("no thread shares it yet") };
                match exec(image, order, tree, limits, reaper)? {}
            }
            other => Ok(other),
        }
    }

    /// In the new image: takes over what [`Placement::exec`] handed on.
    pub fn resume(fd: RawFd) -> Result<(Self, Order), PlacementError> {
        // SAFETY: the name is a NUL-terminated string. An execveat names the thread after the descriptor.
        unsafe { libc::prctl(libc::PR_SET_NAME, c"pinfold".as_ptr()) };
        let (state, mut descriptors) = descriptors::unpack::<State>(fd)?;
        let link = descriptors.remove(LINK).ok_or(HandoverError::Foreign(fd))?;
        let tree = cgroup::Tree::from_parts(state.tree, descriptors.into_iter().collect())?;
        let reaper = Link::from_parts(link, state.reaper);
        Ok((Self::Placed { tree: Arc::new(tree), limits: state.limits, reaper }, state.order))
    }

    /// The groups, where there are any.
    pub fn groups(&self) -> Option<&cgroup::Groups> {
        match self {
            Self::Placed { tree, .. } => Some(tree.groups()),
            Self::Unplaced => None,
        }
    }

    /// Counts what was done to place the calling thread, maybe in an earlier image of this process.
    pub fn count(&self) {
        if let Some(limits) = self.limits() {
            METRICS.cgroup.joins.inc();
            METRICS.cgroup.limits_not_applied.store(limits.in_force().unapplied.len() as u64);
        }
    }

    /// Their limits as they were set at the start.
    pub fn limits(&self) -> Option<&cgroup::Limits> {
        match self {
            Self::Placed { limits, .. } => Some(limits),
            Self::Unplaced => None,
        }
    }

    /// What a vCPU thread does first of all.
    pub fn vcpu_join(&self) -> Enter {
        match self {
            Self::Placed { tree, .. } => {
                let tree = Arc::clone(tree);
                Arc::new(move || {
                    let joined = tree.join(cgroup::Role::Vcpu).map_err(|error| chain(&error));
                    let figures = &METRICS.cgroup;
                    if joined.is_ok() { &figures.joins } else { &figures.join_fails }.inc();
                    joined
                })
            }
            Self::Unplaced => Arc::new(|| Ok(())),
        }
    }

    /// Leaves the groups and has them removed. Every other thread has ended, and the process is to end with `code`.
    pub fn dissolve(self, code: Code) {
        if let Self::Placed { tree, reaper, .. } = self {
            drop(tree);
            reaper.finish(code);
        }
    }
}

/// What to ask the crate `cgroup` for, but for the base.
fn request(id: &InstanceId, section: &CgroupSection) -> cgroup::Request {
    cgroup::Request {
        id: id.to_string(),
        version: match section.version {
            CgroupVersion::Auto => cgroup::VersionChoice::Auto,
            CgroupVersion::V1 => cgroup::VersionChoice::V1,
            CgroupVersion::V2 => cgroup::VersionChoice::V2,
        },
        parent: None,
        names: cgroup::Names {
            sandbox: section.sandbox_name.clone(),
            vcpus: section.vcpus_name.clone(),
            overhead: section.overhead_name.clone(),
        },
        containers: section.containers.iter().map(|container| container.resources.clone()).collect(),
        overhead: section.overhead.clone(),
    }
}

/// Replaces this process by a new image of itself.
fn exec(
    image: &Image,
    order: &Order,
    tree: cgroup::Tree,
    limits: Box<cgroup::Limits>,
    reaper: Link,
) -> Result<Infallible, PlacementError> {
    let failed = |doing| move |source| PlacementError::Exec { doing, source };
    let (tree, fds) = tree.into_parts();
    let mut handed = Descriptors::from_iter(fds);
    let (link, reaper) = reaper.into_parts();
    handed.insert(LINK.to_owned(), link);
    let memfd = descriptors::pack(&State { order: order.clone(), tree, limits, reaper }, &handed)?;
    let flag = OsString::from(format!("--handover={}", memfd.as_raw_fd()));
    let to_c = |text: OsString| CString::new(text.into_vec()).map_err(io::Error::from);
    let arguments: Vec<CString> = std::env::args_os()
        .chain([flag])
        .map(to_c)
        .collect::<io::Result<_>>()
        .map_err(failed("the arguments"))?;
    let mut argv: Vec<_> = arguments.iter().map(|argument| argument.as_ptr()).collect();
    argv.push(std::ptr::null());
    let fds: Vec<RawFd> = handed.values().chain([&memfd]).map(AsRawFd::as_raw_fd).collect();
    descriptors::inheritable(&fds).map_err(failed("fcntl"))?;
    // SAFETY: the path is an empty string for AT_EMPTY_PATH, argv and environ are NULL-terminated arrays of
    // NUL-terminated strings that live through the call, and no other thread changes the environment.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            image.as_fd().as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            environ,
            libc::AT_EMPTY_PATH,
        )
    };
    Err(failed("execveat")(io::Error::last_os_error()))
}

unsafe extern "C" {
    /// The environment as the C library keeps it.
    static environ: *const *const libc::c_char;
}
