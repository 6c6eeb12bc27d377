//! What the groups used from one moment to another, for who reports when everything in them has ended.

use serde::{Deserialize, Serialize};

use crate::counters::{self, StatsError};
use crate::layout::Layout;

/// The groups, and their counters at the moment at which it was opened: groups may be older than their threads.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Account {
    layout: Layout,
    before: Totals,
}

/// Counters of all groups together. `None` is what the kernel, or the group, does not have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Totals {
    /// Processes in the group of everything that were killed for memory, whoever's limit it was (v2
    /// `memory.events`, v1 `memory.oom_control`).
    pub oom_kills: Option<u64>,
    /// The most memory that was ever in use, in bytes. It does not begin anew with an account.
    pub memory_peak_bytes: Option<u64>,
    /// CPU time in microseconds.
    pub usage_usec: Option<u64>,
    /// Of it in user mode, guest time included.
    pub user_usec: Option<u64>,
    /// Of it in the kernel.
    pub system_usec: Option<u64>,
}

impl Account {
    /// What was used since it was opened. The groups must still exist: those that do not give `None`.
    ///
    /// # Errors
    /// When a file that is there refuses or does not follow the kernel's format, naming it.
    pub fn used(&self) -> Result<Totals, StatsError> {
        let now = self.layout.totals()?;
        let grown = |of: fn(&Totals) -> Option<u64>| Some(of(&now)?.saturating_sub(of(&self.before)?));
        Ok(Totals {
            oom_kills: grown(|totals| totals.oom_kills),
            memory_peak_bytes: now.memory_peak_bytes,
            usage_usec: grown(|totals| totals.usage_usec),
            user_usec: grown(|totals| totals.user_usec),
            system_usec: grown(|totals| totals.system_usec),
        })
    }
}

impl Layout {
    /// Opens an account.
    ///
    /// # Errors
    /// When a file that is there refuses or does not follow the kernel's format, naming it.
    pub fn account(&self) -> Result<Account, StatsError> {
        Ok(Account { before: self.totals()?, layout: self.clone() })
    }

    fn totals(&self) -> Result<Totals, StatsError> {
        let stats = self.stats()?;
        let cpu = stats.sandbox.cpu;
        Ok(Totals {
            oom_kills: self.oom_kills()?,
            memory_peak_bytes: stats.memory.peak_bytes,
            usage_usec: cpu.usage_usec,
            user_usec: cpu.user_usec,
            system_usec: cpu.system_usec,
        })
    }

    fn oom_kills(&self) -> Result<Option<u64>, StatsError> {
        let Some((site, group)) = self.whole("memory") else { return Ok(None) };
        let file = site.dir(group).join(if self.v2 { "memory.events" } else { "memory.oom_control" });
        let kills = counters::read(&self.reach, &file, |text| counters::keyed(text, ["oom_kill"]))?;
        Ok(kills.and_then(|[kills]| kills))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::stats::tests::{fake, layout};

    #[test]
    fn an_account_tells_what_was_used_since_it_was_opened() {
        let dir = fake(&[
            ("p/box/cpu.stat", "usage_usec 90\nuser_usec 60\nsystem_usec 30\n"),
            ("p/box/memory.peak", "1000\n"),
            ("p/box/memory.events", "low 0\nhigh 0\nmax 4\noom 1\noom_kill 1\n"),
        ]);
        let account = layout(dir.path(), &[], Some("/p/box")).account().unwrap();
        // It travels as text.
        let account: Account = serde_json::from_str(&serde_json::to_string(&account).unwrap()).unwrap();
        let write = |name: &str, text: &str| fs::write(dir.path().join("p/box").join(name), text).unwrap();
        write("cpu.stat", "usage_usec 190\nuser_usec 130\nsystem_usec 60\n");
        write("memory.peak", "5000\n");
        write("memory.events", "max 4\noom 2\noom_kill 3\n");
        let used = account.used().unwrap();
        assert_eq!((used.oom_kills, used.memory_peak_bytes), (Some(2), Some(5000)));
        assert_eq!((used.usage_usec, used.user_usec, used.system_usec), (Some(100), Some(70), Some(30)));

        drop(dir);
        assert_eq!(account.used().unwrap(), Totals::default(), "the groups are gone");
    }

    #[test]
    fn on_v1_kills_are_counted_elsewhere() {
        let dir = fake(&[
            ("memory/p/box/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 0\n"),
            ("memory/p/box/memory.max_usage_in_bytes", "7\n"),
        ]);
        let account = layout(dir.path(), &["memory"], Some("/p/box")).account().unwrap();
        let file = dir.path().join("memory/p/box/memory.oom_control");
        fs::write(file, "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n").unwrap();
        let used = account.used().unwrap();
        assert_eq!(
            used,
            Totals { oom_kills: Some(1), memory_peak_bytes: Some(7), ..Totals::default() },
            "there is no cpuacct"
        );
    }
}
