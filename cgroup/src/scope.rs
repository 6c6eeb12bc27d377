//! The systemd driver: a transient scope that systemd makes for this process, on which our groups are built.
//!
//! systemd moves us into the scope, whose tree of groups is ours from then on (`Delegate=yes`,
//! systemd.resource-control(5)): it leaves alone what is below, and it removes the scope when nobody is in it any
//! more. It is spoken to over D-Bus at the start only, as runc does.

mod bus;
mod name;

use crate::hierarchy::{Hierarchies, HierarchyError, VersionChoice};
use crate::path::CgroupPath;
use bus::Bus;
pub use name::{Manager, ScopeName, ScopeNameError, is_scope_form};

/// How often a scope is started: whatever is in the way has been cleared then, unless somebody puts it back.
const ATTEMPTS: u32 = 3;

/// Why systemd has not made the scope.
#[derive(Debug, thiserror::Error)]
pub enum ScopeError {
    /// There is nobody to ask.
    #[error(
        "cannot reach systemd over the {0} bus; see that systemd and the bus run, or set \"driver\": \"cgroupfs\" in \
         the cgroup section"
    )]
    Unreachable(Manager, #[source] Box<zbus::Error>),
    /// systemd does not take a request.
    #[error("systemd refuses to {doing} {unit}")]
    Refused {
        /// What it was asked to do.
        doing: &'static str,
        /// The scope.
        unit: String,
        /// Its answer.
        #[source]
        source: Box<zbus::Error>,
    },
    /// It took the request, and failed.
    #[error("systemd could not {doing} {unit}: its job ended with `{result}`; its journal says why")]
    Job {
        /// What it was asked to do.
        doing: &'static str,
        /// The scope.
        unit: String,
        /// The job's result (org.freedesktop.systemd1(5), "JobRemoved").
        result: String,
    },
    /// It does not answer.
    #[error("systemd has not answered for {} s to the request to {doing} {unit}", bus::PATIENCE.as_secs())]
    Silent {
        /// What it was asked to do.
        doing: &'static str,
        /// The scope.
        unit: String,
    },
    /// Somebody is in a scope of that name.
    #[error(
        "the scope {0} exists and is populated: another microVM or a leftover process is in it; end that, or choose \
         another --id or cgroup.parent"
    )]
    Populated(String),
    /// A unit of that name comes back whenever it is cleared away.
    #[error(
        "there is a unit {0} already, which systemd does not give up; choose another --id or cgroup.parent"
    )]
    Taken(String),
    /// systemd says that we are in the scope, and the kernel says something else.
    #[error("systemd has made {unit}, yet this process is in {found}: its hierarchy is not mounted here")]
    Elsewhere {
        /// The scope.
        unit: String,
        /// Where we are.
        found: String,
    },
    /// The hierarchies cannot be used.
    #[error(transparent)]
    Hierarchy(#[from] HierarchyError),
    /// The runtime for D-Bus could not be made.
    #[error("cannot set up the connection to systemd")]
    Setup(#[source] std::io::Error),
}

/// What became of a request to start a scope.
#[derive(Debug, PartialEq, Eq)]
enum Started {
    /// It is there, with us in it.
    Done,
    /// A unit of its name is there already.
    Exists,
}

/// What systemd is asked for, so that tests can stand in for it. A unit that is not there is no error.
trait Units {
    /// Starts the scope with this process in it.
    fn start(&mut self, name: &ScopeName) -> Result<Started, ScopeError>;
    /// Whether processes are in the unit.
    fn populated(&mut self, unit: &str) -> Result<bool, ScopeError>;
    /// Forgets that the unit has failed.
    fn reset_failed(&mut self, unit: &str) -> Result<(), ScopeError>;
    /// Stops the unit.
    fn stop(&mut self, unit: &str) -> Result<(), ScopeError>;
}

/// Has systemd make the scope and move this process into it, and says where it is. The calling thread is the only
/// one; nothing of the connection is left when this returns.
///
/// # Errors
/// When systemd cannot be reached ([`ScopeError::Unreachable`]; nothing has happened then), refuses or fails, and
/// when processes are in a unit of that name. What else is in the way of the name, a unit that failed or is about to
/// go, is cleared away.
pub fn start_scope(name: &ScopeName, version: VersionChoice) -> Result<CgroupPath, ScopeError> {
    Hierarchies::discover()?.choose(version)?;
    {
        let runtime = bus::runtime()?;
        let _inside = runtime.enter();
        bring_up(&mut Bus::connect(name.manager(), &runtime)?, name)?;
    }
    let now = Hierarchies::discover()?;
    let own = now.own_cgroup("name=systemd").or_else(|| now.own_cgroup(""));
    own.filter(|own| own.as_str().ends_with(&name.path())).cloned().ok_or_else(|| ScopeError::Elsewhere {
        unit: name.unit().to_owned(),
        found: own.map_or("a group out of sight".to_owned(), ToString::to_string),
    })
}

fn bring_up(units: &mut dyn Units, name: &ScopeName) -> Result<(), ScopeError> {
    let unit = name.unit();
    for _ in 0..ATTEMPTS {
        if units.start(name)? == Started::Done {
            return Ok(());
        }
        if units.populated(unit)? {
            return Err(ScopeError::Populated(unit.to_owned()));
        }
        units.reset_failed(unit)?;
        units.stop(unit)?;
    }
    Err(ScopeError::Taken(unit.to_owned()))
}

#[cfg(test)]
mod tests;
