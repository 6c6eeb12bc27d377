//! From the configuration's `cgroup` section to threads in their cgroups.
//!
//! The main thread joins first, then the process executes itself anew ([`Placement::exec`]): its old address
//! space, which was charged to whoever launched us, is gone, and every page from then on is charged to the pod.

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use resources::{CgroupSection, CgroupVersion, Driver, InstanceId, MicrovmConfig};
use serde::{Deserialize, Serialize};

use crate::base::{self, BaseError};
use crate::descriptors::{self, Descriptors, HandoverError};
use crate::exit::{Code, chain};
use crate::exit_report::Pending;
use crate::guard::Guard;
use crate::jail::inside::{self, Facts, InsideError, Jail};
use crate::metrics::METRICS;
use crate::reaper::{self, Ends, Link, ReaperError, Watch};
use crate::seccomp::Filters;
use crate::sink::SinkError;
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
    /// The jail.
    #[error(transparent)]
    Jail(#[from] InsideError),
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
    placed: Option<PlacedState>,
    jail: Option<Facts>,
}

/// What of [`Placement::Placed`] is plain data.
#[derive(Serialize, Deserialize)]
struct PlacedState {
    tree: cgroup::TreeState,
    limits: Box<cgroup::Limits>,
    reaper: i32,
}

/// Groups that were made and that the calling thread, the only one, has joined. Until there is a reaper the guard removes
/// them if this process is killed.
pub struct Founded {
    tree: cgroup::Tree,
    limits: Box<cgroup::Limits>,
    cleaner: cgroup::Cleaner,
    report: Option<Pending>,
    guard: Option<Guard>,
}

impl Founded {
    /// Makes the groups and joins them, or does nothing where that is asked for. There is to be a report to what `report`
    /// opens in the end. `around` are values for files of the group that ours are made in.
    pub fn found(
        id: &InstanceId,
        order: &Order,
        report: Option<impl FnOnce() -> Result<File, SinkError>>,
        around: &[(String, String)],
    ) -> Result<Option<Self>, PlacementError> {
        let section = &order.config.cgroup;
        if section.driver == Driver::None {
            return if report.is_some() { Err(PlacementError::NoReporter) } else { Ok(None) };
        }
        let report = report.map(|open| open()).transpose()?;
        let mut request = request(id, section);
        // As they were before a scope is made: at the end we go back to where we were started.
        let hierarchies =
            cgroup::Hierarchies::discover().map_err(|error| cgroup::Error::Plan(error.into()))?;
        request.parent = base::choose(id, section, order.cgroups_path.as_deref(), &request, &hierarchies)?;
        let mut plan = cgroup::resolve_in(&hierarchies, &request)?;
        for (file, value) in around {
            plan.set_around(file, value).map_err(cgroup::Error::from)?;
        }
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
            if let Err(second) = cleaner.leave_and_remove(reaper::PATIENCE) {
                log::warn!("{}", chain(&second));
            }
            return Err(error.into());
        }
        Ok(Some(Self { tree, limits: Box::new(limits), cleaner, report, guard }))
    }

    /// Starts the reaper, which watches this process.
    pub fn settle(self, image: &Image, watch: Watch<'_>) -> Result<Placement, PlacementError> {
        let Self { tree, limits, cleaner, report, guard } = self;
        let reaper = reaper::start(image.as_fd(), watch, cleaner, report, Ends::new()?)?;
        drop(guard);
        Ok(Placement::Placed { tree: Arc::new(tree), limits, reaper })
    }

    /// Starts the reaper, which watches a child of this process that is in the same groups and has the same `ends`. Returns
    /// the reaper's id.
    pub fn watch(self, image: &Image, watch: Watch<'_>, ends: Ends) -> Result<i32, PlacementError> {
        let reaper = reaper::start(image.as_fd(), watch, self.cleaner, self.report, ends)?;
        drop(self.guard);
        Ok(reaper.into_parts().1)
    }

    /// In that child: goes on with what the parent has made.
    pub fn inherit(self, reaper: Link) -> Placement {
        // It is the parent's.
        std::mem::forget(self.guard);
        Placement::Placed { tree: Arc::new(self.tree), limits: self.limits, reaper }
    }
}

/// Everything for another image of ourselves.
pub struct Parcel {
    memfd: OwnedFd,
    handed: Descriptors,
}

impl Parcel {
    /// Executes `image`, which is one of ours, in this process's place.
    pub fn exec(
        self,
        image: BorrowedFd<'_>,
        arguments: Vec<OsString>,
        environment: bool,
    ) -> Result<Infallible, PlacementError> {
        descriptors::exec(image, arguments, "--handover", &self.memfd, &self.handed, environment)
            .map_err(|source| PlacementError::Exec { doing: "execveat", source })
    }
}

impl Placement {
    /// Executes this process anew with its arguments and `order`, unless its memory is charged to the right
    /// group already.
    pub fn exec(self, image: &Image, order: &Order) -> Result<Self, PlacementError> {
        match &self {
            Self::Placed { tree, .. } if tree.needs_exec() => {
                match self.pack(order, Descriptors::new(), None)?.exec(
                    image.as_fd(),
                    std::env::args_os().collect(),
                    true,
                )? {}
            }
            _ => Ok(self),
        }
    }

    /// Opens the groups' files, for a process that will not see them.
    pub fn open_files(&self) -> Result<Descriptors, PlacementError> {
        self.limits().map_or(Ok(Descriptors::new()), |limits| Ok(limits.open_files()?.into_iter().collect()))
    }

    /// Packs all that another image of ourselves needs, and `handed`; with what it is told in a jail.
    pub fn pack(
        self,
        order: &Order,
        mut handed: Descriptors,
        jail: Option<Facts>,
    ) -> Result<Parcel, PlacementError> {
        let placed = match self {
            Self::Placed { tree, limits, reaper } => {
                let Ok(tree) = Arc::try_unwrap(tree) else { unreachable!("no thread shares it yet") };
                let (tree, fds) = tree.into_parts();
                handed.extend(fds);
                let (link, reaper) = reaper.into_parts();
                handed.insert(LINK.to_owned(), link);
                Some(PlacedState { tree, limits, reaper })
            }
            Self::Unplaced => None,
        };
        let memfd = descriptors::pack(&State { order: order.clone(), placed, jail }, &handed)?;
        Ok(Parcel { memfd, handed })
    }

    /// In the new image: takes over what [`Placement::exec`] handed on.
    pub fn resume(fd: RawFd) -> Result<(Self, Order), PlacementError> {
        // SAFETY: the name is a NUL-terminated string. An execveat names the thread after the descriptor.
        unsafe { libc::prctl(libc::PR_SET_NAME, c"pinfold".as_ptr()) };
        let (state, mut descriptors) = descriptors::unpack::<State>(fd)?;
        let jailed = state.jail.is_some();
        if let Some(facts) = state.jail {
            inside::enter(facts, &mut descriptors)?;
        }
        let Some(PlacedState { tree, mut limits, reaper }) = state.placed else {
            return Ok((Self::Unplaced, state.order));
        };
        let link = descriptors.remove(LINK).ok_or(HandoverError::Foreign(fd))?;
        let mut rest = descriptors.into_iter().collect();
        if jailed {
            rest = limits.keep(rest);
        }
        let tree = cgroup::Tree::from_parts(tree, rest)?;
        let reaper = Link::from_parts(link, reaper);
        Ok((Self::Placed { tree: Arc::new(tree), limits, reaper }, state.order))
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

    /// In a jail, where a look at /proc does not show them: the threads in the overhead group, but for the reaper. In a PID
    /// namespace of our own none, as the kernel has no ids for them there.
    pub fn others(&self) -> Vec<u32> {
        match self {
            Self::Placed { limits, reaper, .. } if inside::jail().is_some_and(Jail::shares_pids) => {
                let ids = limits.layout().thread_ids(cgroup::Scope::Overhead);
                ids.into_iter().filter(|id| i32::try_from(*id) != Ok(reaper.pid())).collect()
            }
            _ => Vec::new(),
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
