//! The limits of our groups: written at the start, and changed while threads live there, all or nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cpuset::CpuSet;
use crate::file::{FileError, Files};
use crate::layout::{Layout, Located};
use crate::path::CgroupPath;
use crate::plan::{Plan, PlanError, never_applied, overhead_cpus};
use crate::reach::Reach;
use crate::resources::Resources;
use crate::settings::{PERIOD_FILE, QUOTA_FILE, Scope, Setting, Unlimited, controller, settings};
use crate::sums::Sums;

/// What a memory limit leaves above what is in use, in bytes.
const MEMORY_MARGIN: u64 = 16 << 20;

/// Why limits could not be changed.
#[derive(Debug, thiserror::Error)]
pub enum ChangeError {
    /// What is asked for cannot be had.
    #[error("no limit was changed")]
    Plan(#[from] PlanError),
    /// A file refused. Those that were written before it have their old values again.
    #[error("no limit was changed")]
    Refused(#[source] FileError),
    /// A file refused, and another did not take its old value back.
    #[error(
        "limits were changed in part, and could not be set back ({}); ask for the change, or for what was \
         before, again",
        unrestored.join("; ")
    )]
    Torn {
        /// What could not be set back, and why.
        unrestored: Vec<String>,
        /// What refused first.
        #[source]
        source: FileError,
    },
}

/// The limits of our groups as plain data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    layout: Layout,
    /// Why a controller is not available (v2), for the notes.
    refused: BTreeMap<String, String>,
    /// What could not be had when the place was chosen.
    placement: Vec<String>,
    wanted: Wanted,
    outcome: Outcome,
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Wanted {
    sums: Sums,
    overhead_cpus: Option<CpuSet>,
    /// What was asked for that is never applied.
    never: Vec<String>,
}

/// What came of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
struct Outcome {
    unapplied: Vec<String>,
    /// The memory limit that waits, in bytes.
    pending: Option<u64>,
}

/// A limit as a file has it now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LimitInForce {
    /// Whose limit it is.
    pub group: Scope,
    /// The group.
    pub path: CgroupPath,
    /// The file.
    pub file: &'static str,
    /// What it says; `None` when it cannot be read.
    pub value: Option<String>,
    /// What it will say once the memory in use has fallen.
    pub pending: Option<String>,
}

/// All limits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LimitsInForce {
    /// Each limit that a file holds.
    pub limits: Vec<LimitInForce>,
    /// Limits that could not be applied, and why, a sentence each.
    pub unapplied: Vec<String>,
    /// Limits that wait for memory to be freed, a sentence each.
    pub pending: Vec<String>,
}

/// What to do about a memory limit below what is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shrink {
    /// Nobody lives in the group yet, and it may have been charged for page cache of old: as low as that allows.
    Floor,
    /// The guest may be about to use what it is still allowed to.
    Wait,
}

impl Limits {
    /// Writes the limits of a plan into its groups, which exist.
    pub(crate) fn establish(
        files: &dyn Files,
        plan: &Plan,
        refused: BTreeMap<String, String>,
    ) -> Result<Self, FileError> {
        let mut limits = Self {
            layout: Layout { v2: plan.v2, sites: plan.sites.clone(), reach: Reach::default() },
            refused,
            placement: plan.unapplied.clone(),
            wanted: Wanted {
                sums: plan.sums.clone(),
                overhead_cpus: plan.overhead_cpus.clone(),
                never: plan.never.clone(),
            },
            outcome: Outcome::default(),
        };
        limits.outcome =
            limits.write(files, &limits.wanted, Shrink::Floor).map_err(|failure| failure.error)?;
        Ok(limits)
    }

    /// Makes the limits those of these containers and this overhead. The order is such that no group is promised
    /// more than the one above it has, at any moment. A memory limit below what is in use (without page cache that
    /// can be dropped) and a margin waits: see [`Limits::retry`].
    ///
    /// # Errors
    /// When CPUs are not the base's, or a file refuses; then all limits are as they were, unless the error says
    /// which are not. A limit whose controller is missing is no error but noted in [`Limits::in_force`].
    pub fn change(
        &mut self,
        containers: &[Resources],
        overhead: Option<&Resources>,
    ) -> Result<(), ChangeError> {
        self.change_in(&self.layout.reach.clone(), containers, overhead)
    }

    fn change_in(
        &mut self,
        files: &dyn Files,
        containers: &[Resources],
        overhead: Option<&Resources>,
    ) -> Result<(), ChangeError> {
        let sums = Sums::of(containers, overhead);
        let wanted = Wanted {
            overhead_cpus: overhead_cpus(files, &self.layout.sites, &sums, self.layout.v2)?,
            sums,
            never: never_applied(containers, overhead),
        };
        self.outcome = self.write(files, &wanted, Shrink::Wait).map_err(Failure::into_error)?;
        self.wanted = wanted;
        Ok(())
    }

    /// Whether a memory limit waits for memory to be freed.
    #[must_use]
    pub fn is_pending(&self) -> bool {
        self.outcome.pending.is_some()
    }

    /// Applies a memory limit that waits, if it can be now. Returns whether it still waits.
    ///
    /// # Errors
    /// When a file refuses; the limit still waits then.
    pub fn retry(&mut self) -> Result<bool, FileError> {
        self.retry_in(&self.layout.reach.clone())
    }

    fn retry_in(&mut self, files: &dyn Files) -> Result<bool, FileError> {
        if self.is_pending() {
            let outcome = self.write(files, &self.wanted, Shrink::Wait).map_err(|failure| failure.error)?;
            self.outcome = outcome;
        }
        Ok(self.is_pending())
    }

    /// The limits as the files say now.
    #[must_use]
    pub fn in_force(&self) -> LimitsInForce {
        self.in_force_in(&self.layout.reach)
    }

    fn in_force_in(&self, files: &dyn Files) -> LimitsInForce {
        let mut all = LimitsInForce {
            limits: Vec::new(),
            unapplied: self
                .placement
                .iter()
                .chain(&self.wanted.never)
                .chain(&self.outcome.unapplied)
                .cloned()
                .collect(),
            pending: Vec::new(),
        };
        for Setting { scope, place, file, .. } in self.settings(&self.wanted) {
            let Ok((path, dir)) = place else { continue };
            let full = dir.join(file);
            if !files.exists(&full) {
                continue;
            }
            let value = files.read(&full).ok().map(|text| text.trim().to_owned());
            let pending = self.outcome.pending.filter(|_| controller(file) == "memory");
            if let Some(bytes) = pending {
                all.pending.push(format!(
                    "{file} = {bytes} of {path}: more is in use; it is {} until that has fallen to {} bytes",
                    value.as_deref().unwrap_or("unknown"),
                    bytes.saturating_sub(MEMORY_MARGIN)
                ));
            }
            let pending = pending.map(|bytes| bytes.to_string());
            all.limits.push(LimitInForce { group: scope, path, file, value, pending });
        }
        all
    }

    /// The CPUs of the vCPU threads, where they are limited.
    #[must_use]
    pub fn vcpus_cpus(&self) -> Option<&CpuSet> {
        self.wanted.sums.vcpus.cpus.as_ref()
    }

    /// Where the groups are.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    pub(crate) fn set_reach(&mut self, reach: Reach) {
        self.layout.reach = reach;
    }

    /// The files that hold limits, and those that say what a limit is taken from.
    pub(crate) fn files(&self) -> (Vec<PathBuf>, Vec<PathBuf>) {
        let settings = self.settings(&self.wanted);
        let held = |setting: &Setting| Some(setting.place.as_ref().ok()?.1.join(setting.file));
        let taken = |setting: &Setting| match &setting.unlimited {
            Unlimited::Of(path) => Some(path.clone()),
            Unlimited::Text(_) => None,
        };
        (settings.iter().filter_map(held).collect(), settings.iter().filter_map(taken).collect())
    }

    fn settings(&self, wanted: &Wanted) -> Vec<Setting> {
        settings(&self.layout, &wanted.sums, wanted.overhead_cpus.as_ref())
    }

    /// Writes what is wanted, or nothing.
    fn write(&self, files: &dyn Files, wanted: &Wanted, shrink: Shrink) -> Result<Outcome, Failure> {
        let files = &Located { files, layout: &self.layout };
        let mut outcome = Outcome::default();
        let mut writes = Vec::new();
        for setting in self.settings(wanted) {
            let prepared = self.prepare(files, &setting, shrink, &mut outcome);
            writes.extend(prepared.map_err(|error| Failure { error, unrestored: Vec::new() })?);
        }
        // Stable: the rest is as listed.
        writes.sort_by_key(|write| write.turn);
        let mut transaction = Transaction { files, done: Vec::new() };
        for write in writes {
            if let Err(error) = transaction.set(&write) {
                return Err(Failure { error, unrestored: transaction.undo() });
            }
        }
        Ok(outcome)
    }

    /// The write that a setting needs, if any.
    fn prepare(
        &self,
        files: &dyn Files,
        setting: &Setting,
        shrink: Shrink,
        outcome: &mut Outcome,
    ) -> Result<Option<Write>, FileError> {
        let Setting { scope, place, file, value, unlimited } = setting;
        let dir = match place {
            Ok((_, dir)) => dir,
            Err(why) => {
                outcome.unapplied.extend(value.as_ref().map(|value| format!("{file} = {value}: {why}")));
                return Ok(None);
            }
        };
        let path = dir.join(file);
        if !files.exists(&path) {
            if !files.exists(dir) {
                // Says that the group is gone.
                files.read(&path)?;
            }
            if let Some(value) = value {
                let controller = controller(file);
                let why = self.refused.get(controller).map_or_else(String::new, |why| format!(" ({why})"));
                outcome.unapplied.push(format!(
                    "{file} = {value} of {}: the controller {controller} is not available there{why}",
                    dir.display()
                ));
            }
            return Ok(None);
        }
        let old = files.read(&path)?;
        let mut new = match (value, unlimited) {
            (Some(value), _) => value.clone(),
            (None, Unlimited::Text(text)) => (*text).to_owned(),
            (None, Unlimited::Of(other)) => files.read(other)?.trim().to_owned(),
        };
        let turn = Turn::of(*scope, file, &old, &new);
        if turn == Turn::Memory {
            let floor = in_use(files, dir)?.map_or(0, |used| used.saturating_add(MEMORY_MARGIN));
            let (wanted, now) = (amount(&new), amount(&old));
            if wanted < u128::from(floor) && wanted < now {
                outcome.pending = u64::try_from(wanted).ok();
                new = match shrink {
                    Shrink::Floor if u128::from(floor) < now => floor.to_string(),
                    _ => return Ok(None),
                };
            }
        }
        Ok(Some(Write { turn, path, new }))
    }
}

/// When a file is written. At no moment have the groups inside more than the one around them, or one of them a CPU
/// that the other is to give up. Memory, whose restoring could cost the guest its life, comes when nothing can fail
/// after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    OuterGrows,
    InnerShrinks,
    InnerGrows,
    OuterShrinks,
    Memory,
}

impl Turn {
    fn of(scope: Scope, file: &str, old: &str, new: &str) -> Self {
        let grows = match controller(file) {
            "memory" => return Self::Memory,
            "cpuset" => match (new.parse::<CpuSet>(), old.parse::<CpuSet>()) {
                (Ok(new), Ok(old)) => new.is_empty() || !(old.is_empty() || new.is_subset(&old)),
                _ => true,
            },
            // Before the quota, whichever way that goes.
            _ if file == PERIOD_FILE => false,
            _ => amount(new) >= amount(old),
        };
        match (scope, grows) {
            (Scope::Sandbox, true) => Self::OuterGrows,
            (Scope::Sandbox, false) => Self::OuterShrinks,
            (_, true) => Self::InnerGrows,
            (_, false) => Self::InnerShrinks,
        }
    }
}

#[derive(Debug)]
struct Write {
    turn: Turn,
    path: PathBuf,
    new: String,
}

impl Write {
    /// Whether the file says so already, in other words perhaps.
    fn is_in(&self, text: &str) -> bool {
        let (old, new) = (text.trim(), self.new.trim());
        let same_set = || matches!((old.parse::<CpuSet>(), new.parse::<CpuSet>()), (Ok(a), Ok(b)) if a == b);
        old == new || same_set() || (self.turn == Turn::Memory && amount(old) == amount(new))
    }
}

/// A limit's size; no limit is the largest.
fn amount(text: &str) -> u128 {
    /// What v1 says for no limit: the largest multiple of a page's size in an i64.
    const NONE: u128 = 0x7fff_ffff_ffff_f000;
    match text.split_whitespace().next().and_then(|word| word.parse::<u128>().ok()) {
        Some(number) if number < NONE => number,
        // "max" and "-1", too.
        _ => u128::MAX,
    }
}

/// The memory of a group that cannot be freed by dropping page cache, in bytes; `None` when nothing is in use.
fn in_use(files: &dyn Files, dir: &Path) -> Result<Option<u64>, FileError> {
    for (usage, prefix) in [("memory.current", ""), ("memory.usage_in_bytes", "total_")] {
        let path = dir.join(usage);
        if !files.exists(&path) {
            continue;
        }
        let all = files.read(&path)?.trim().parse().unwrap_or(0u64);
        let stat = dir.join("memory.stat");
        let stat = if files.exists(&stat) { files.read(&stat)? } else { String::new() };
        let cache = ["inactive_file", "active_file"].iter().filter_map(|name| {
            let value = |line: &str| {
                let (key, value) = line.split_once(' ')?;
                (key.strip_prefix(prefix)? == *name).then(|| value.parse::<u64>().ok())?
            };
            stat.lines().find_map(value)
        });
        let used = cache.fold(all, u64::saturating_sub);
        return Ok((used > 0).then_some(used));
    }
    Ok(None)
}

/// Writes that can be taken back.
struct Transaction<'a> {
    files: &'a dyn Files,
    /// Files with their old texts, in the order of writing.
    done: Vec<(PathBuf, String)>,
}

impl Transaction<'_> {
    /// Writes what the file does not say yet.
    fn set(&mut self, write: &Write) -> Result<(), FileError> {
        let old = self.files.read(&write.path)?;
        if write.is_in(&old) {
            return Ok(());
        }
        if write.path.ends_with(PERIOD_FILE) {
            // A period is refused when the old quota makes no sense in it: first without quota.
            let quota = write.path.with_file_name(QUOTA_FILE);
            let before = self.files.read(&quota)?;
            self.put(quota, before, "-1")?;
        }
        self.put(write.path.clone(), old, &write.new)
    }

    fn put(&mut self, path: PathBuf, old: String, new: &str) -> Result<(), FileError> {
        self.files.write(&path, new)?;
        self.done.push((path, old));
        Ok(())
    }

    /// Takes back what was written, last first; returns what could not be taken back.
    fn undo(self) -> Vec<String> {
        let mut unrestored = Vec::new();
        for (path, old) in self.done.into_iter().rev() {
            // An empty write would not reach the kernel.
            let old = if old.trim().is_empty() { "\n" } else { old.trim() };
            if let Err(error) = self.files.write(&path, old) {
                unrestored.push(format!("{error}: {}", error.answer()));
            }
        }
        unrestored
    }
}

#[derive(Debug)]
struct Failure {
    error: FileError,
    unrestored: Vec<String>,
}

impl Failure {
    fn into_error(self) -> ChangeError {
        match self.unrestored.is_empty() {
            true => ChangeError::Refused(self.error),
            false => ChangeError::Torn { unrestored: self.unrestored, source: self.error },
        }
    }
}

#[cfg(test)]
mod tests;
