//! Where Pinfold's threads live: hierarchies, layout, joining, limits, sums and clean-up.
mod build;
mod cleaner;
mod cpuset;
mod file;
mod hierarchy;
mod limits;
mod parts;
mod path;
mod plan;
mod resources;
mod sums;
mod tree;

pub use cleaner::{Cleaner, CleanerState};
pub use cpuset::{CpuSet, CpuSetError};
pub use file::FileError;
pub use hierarchy::{Hierarchies, HierarchyError, Version};
pub use parts::PartsError;
pub use path::{CgroupPath, GroupName, PathError};
pub use plan::{Names, Plan, PlanError, Request, resolve, resolve_in};
pub use resources::{Cpu, Memory, Owner, Pids, Resources};
pub use sums::{CpuLimits, PERIOD, Sums, weight_from_shares};
pub use tree::{Groups, Place, Role, Tree, TreeState};
