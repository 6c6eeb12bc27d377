//! Where Pinfold's threads live: hierarchies, layout, joining, limits, sums and clean-up.
//!
//! Nothing here knows of KVM or of the rest of Pinfold: any process may place its threads so. The example `place` does
//! (`cargo run -p cgroup --example place`).
//!
//! A process that wants its threads in a pod's cgroup from their first moment on
//! 1. finds a place ([`resolve`], which changes nothing but sums up what the containers and the overhead ask for),
//! 2. makes it ([`Plan::create`]),
//! 3. joins with its only thread ([`Tree::join`]),
//! 4. execs itself when [`Tree::needs_exec`] says so, since memory stays charged to where it was first
//!    touched; the tree travels as plain data and descriptors ([`Tree::into_parts`]),
//!    On the way a process that will not see the groups' files any more, as in a jail, takes them along
//!    ([`Limits::open_files`], [`Limits::keep`]),
//! 5. has every later vCPU thread join before it does anything of its own,
//! 6. changes the limits as containers come and go ([`Limits::change`]),
//! 7. in the end leaves and removes what was made ([`Cleaner`]).
//!
//! ```no_run
//! use cgroup::{Names, Parent, Request, Resources, Role, VersionChoice, resolve};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let container: Resources =
//!     serde_json::from_str(r#"{"cpu":{"quota":200000},"memory":{"limit":419430400}}"#)?;
//! let (tree, mut limits, cleaner) = resolve(&Request {
//!     version: VersionChoice::Auto,
//!     parent: Some(Parent::Existing("/kubepods/pod1".parse()?)),
//!     names: Names {
//!         sandbox: "kata-sandbox".parse()?,
//!         vcpus: "kata-sandbox-vcpus".parse()?,
//!         overhead: "kata-sandbox-overhead".parse()?,
//!     },
//!     containers: vec![container],
//!     overhead: None,
//!     id: "vm1".to_owned(),
//! })?
//! .create()?;
//! tree.join(Role::Overhead)?;
//! std::thread::scope(|scope| {
//!     scope.spawn(|| tree.join(Role::Vcpu));
//! });
//! // The container has left.
//! limits.change(&[], None)?;
//! cleaner.leave_and_remove(std::time::Duration::from_secs(2))?;
//! # Ok(())
//! # }
//! ```
//!
//! # Layouts
//! On cgroup v2 all threads of a process share one memory domain, so the two groups of threads are threaded
//! children of one domain (Documentation/admin-guide/cgroup-v2.rst, "Threads"):
//!
//! ```text
//! BASE/kata-sandbox                       domain threaded: memory, io, pids; cpu.max = sum + overhead
//! ├── kata-sandbox-vcpus                  threaded: cpu (the sum), cpuset (the workload's union)
//! └── kata-sandbox-overhead               threaded: cpu (pod overhead), cpuset (remaining CPUs)
//! ```
//!
//! When BASE is our own group, made for the sandbox by the runtime that started us, it plays the part of
//! `kata-sandbox`, with the limits that it has, and the caller may stay in it:
//!
//! ```text
//! BASE                                    domain threaded, not ours
//! ├── kata-sandbox-vcpus
//! └── kata-sandbox-overhead
//! ```
//!
//! On cgroup v1 every hierarchy has its own membership, by thread:
//!
//! ```text
//! cpu, cpuacct, cpuset:  BASE/kata-sandbox   BASE/kata-sandbox-vcpus
//! memory, pids, ...:     BASE/kata-sandbox
//! ```
//!
//! There the overhead lives in `kata-sandbox` itself. When BASE is our own group the process stays in it for
//! memory, pids and so on. A named v1 hierarchy, such as systemd's, only tracks processes for whoever made it:
//! threads are placed there when BASE exists there, else left alone. The v2 hierarchy of a hybrid system is
//! left alone when v1 is used, for the same reason.
//!
//! With the systemd driver BASE is a scope ([`start_scope`]). Nothing stays in its own group, which on v2 could hand
//! no controllers on otherwise: building starts with our sandbox group, to which the process moves first.
//!
//! # What stays behind
//! Controllers that were enabled in the `cgroup.subtree_control` of BASE stay enabled, as runc leaves them.

mod account;
mod bandwidth;
mod build;
mod cleaner;
mod counters;
mod cpuset;
mod diagnosis;
mod error;
mod events;
mod file;
mod hierarchy;
mod layout;
mod limits;
#[cfg(test)]
mod numbers;
mod parent;
mod parts;
mod path;
mod plan;
mod reach;
mod resources;
mod scope;
mod settings;
mod sight;
mod sites;
mod snapshot;
mod stats;
mod sums;
mod tree;
mod what_if;

pub use account::{Account, Totals};
pub use bandwidth::{Bandwidth, BandwidthError};
pub use cleaner::{Cleaner, CleanerState};
pub use counters::{DeviceTransfers, HostTime, Pressure, SchedStat, Share, StatsError, Transfers};
pub use cpuset::{CpuSet, CpuSetError};
pub use diagnosis::{Cause, Diagnosis, GroupDiagnosis, Verdict, diagnose};
pub use error::Error;
pub use events::{Event, EventKind, EventLog, EventNotifier};
pub use file::FileError;
pub use hierarchy::{Hierarchies, HierarchyError, VersionChoice};
pub use layout::Layout;
pub use limits::{ChangeError, LimitInForce, Limits, LimitsInForce};
pub use parent::Parent;
pub use parts::PartsError;
pub use path::{CgroupPath, GroupName, PathError};
pub use plan::{Names, Plan, PlanError, Request, has_own_base, resolve, resolve_in};
pub use resources::{Cpu, Memory, Owner, Pids, Resources, deserialize_period};
pub use scope::{Manager, ScopeError, ScopeName, ScopeNameError, is_scope_form, start_scope};
pub use settings::Scope;
pub use snapshot::{Load, Snapshot, Threads};
pub use stats::{CpuStats, GroupStats, IoStats, MemoryStats, Pressures, Stats, TotalTransfers};
pub use sums::{CpuLimits, PERIOD, Sums, weight_from_shares};
pub use tree::{Groups, Place, Role, Tree, TreeState};
pub use what_if::{Hypothesis, Prediction, Range, Recorded, Sample, WhatIf, what_if};
