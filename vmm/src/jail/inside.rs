//! What a process in a jail knows of the host, which it does not see any more, and its last wall.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::sync::OnceLock;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};
use serde::{Deserialize, Serialize};

use crate::descriptors::{Descriptors, HandoverError};
use crate::lookup::{self, Root};
use crate::memory;
use crate::virtiofsd::Link;

/// Names of the descriptors that travel into a jail, beside those of the placement.
const TASKS: &str = "jail.tasks";
const LOCK: &str = "jail.lock";
const STARTER: &str = "jail.starter";

/// The jail that this process is in.
static JAIL: OnceLock<Jail> = OnceLock::new();

/// What travels into a jail.
#[derive(Debug, Serialize, Deserialize)]
pub struct Facts {
    /// The process's id as the host sees it.
    pub pid: u32,
    /// Its root, and its mount namespace.
    pub root: Root,
    /// Whether the host gives huge pages unasked.
    pub huge_pages: bool,
    /// Folders of the host's that may be shared.
    pub shares: Vec<PathBuf>,
}

/// A jail from inside.
#[derive(Debug)]
pub struct Jail {
    facts: Facts,
    tasks: OwnedFd,
    servers: Link,
    /// Nobody else uses the jail while it is open.
    _lock: OwnedFd,
}

/// Why a process cannot be in a jail.
#[derive(Debug, thiserror::Error)]
pub enum InsideError {
    /// Something did not arrive.
    #[error("the descriptor {0} did not arrive in the jail")]
    Missing(&'static str),
    /// The kernel has Landlock, and refuses it.
    #[error("cannot restrict this process by Landlock")]
    Landlock(#[from] RulesetError),
    /// The files that Landlock is to leave.
    #[error("cannot restrict this process by Landlock")]
    Root(#[from] landlock::PathFdError),
    /// The state is not ours.
    #[error(transparent)]
    Handover(#[from] HandoverError),
}

/// The descriptors of a jail by name: the threads' directory, what locks the jail, and the link to who starts servers.
pub fn named(tasks: OwnedFd, lock: OwnedFd, starter: Option<OwnedFd>) -> Descriptors {
    let named = [(TASKS, Some(tasks)), (LOCK, Some(lock)), (STARTER, starter)];
    named.into_iter().filter_map(|(name, fd)| Some((name.to_owned(), fd?))).collect()
}

/// Takes over what arrived. From then on this process, which has one thread, may use nothing but the jail's files, neither
/// TCP nor signals to others, where the kernel has Landlock.
pub fn enter(facts: Facts, descriptors: &mut Descriptors) -> Result<(), InsideError> {
    let mut take = |name| descriptors.remove(name).ok_or(InsideError::Missing(name));
    let (tasks, lock) = (take(TASKS)?, take(LOCK)?);
    let servers = Link::new(facts.shares.clone(), descriptors.remove(STARTER));
    restrict(tasks.as_fd())?;
    lookup::set_root(Some(facts.root.clone()));
    memory::know_huge_pages(facts.huge_pages);
    // It is the first.
    let _ = JAIL.set(Jail { facts, tasks, servers, _lock: lock });
    Ok(())
}

/// The jail that this process is in.
pub fn jail() -> Option<&'static Jail> {
    JAIL.get()
}

impl Jail {
    /// The process's id as the host sees it.
    pub fn pid(&self) -> u32 {
        self.facts.pid
    }

    /// Whether it calls threads as the host does.
    pub fn shares_pids(&self) -> bool {
        self.facts.pid == std::process::id()
    }

    /// The way to servers of folders.
    pub fn servers(&self) -> &Link {
        &self.servers
    }

    /// The directory of its threads in the host's /proc.
    pub fn tasks(&self) -> BorrowedFd<'_> {
        self.tasks.as_fd()
    }
}

fn restrict(tasks: BorrowedFd<'_>) -> Result<(), InsideError> {
    // What no microVM does: nodes, links, moves between folders, other programs. Servers are started outside.
    let never =
        AccessFs::MakeChar | AccessFs::MakeBlock | AccessFs::MakeSym | AccessFs::Refer | AccessFs::Execute;
    let all = AccessFs::from_all(ABI::V5);
    let look: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let status = Ruleset::default()
        .handle_access(all)?
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rule(PathBeneath::new(PathFd::new("/")?, all & !never))?
        .add_rule(PathBeneath::new(tasks, look))?
        .restrict_self()?;
    match status.ruleset {
        RulesetStatus::NotEnforced => {
            log::info!("the jail is without Landlock, which this kernel does not have")
        }
        how => log::info!("Landlock restricts the jail ({how:?})"),
    }
    Ok(())
}
