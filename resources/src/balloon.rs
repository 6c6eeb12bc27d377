//! `balloon`.

use serde::{Deserialize, Serialize};

/// The memory balloon.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Balloon {
    /// Memory in MiB that the guest is asked to give back.
    pub amount_mib: u32,
    /// Whether the guest may take memory out of the balloon before its own out-of-memory killer acts.
    pub deflate_on_oom: bool,
    /// Seconds between two requests for statistics; 0: no statistics.
    #[serde(default)]
    pub stats_polling_interval_s: u16,
    /// Whether the host can have the guest hint at free pages.
    #[serde(default)]
    pub free_page_hinting: bool,
    /// Whether the guest reports free pages by itself.
    #[serde(default)]
    pub free_page_reporting: bool,
}

impl Balloon {
    /// What is wrong with the values, as the field and why.
    pub(crate) fn check(&self, mem_size_mib: u64) -> Result<(), (&'static str, String)> {
        if u64::from(self.amount_mib) > mem_size_mib {
            let problem = format!("{} MiB is more than the guest has ({mem_size_mib} MiB)", self.amount_mib);
            return Err(("amount_mib", problem));
        }
        if self.free_page_hinting {
            let problem = "is not supported yet; use free_page_reporting".to_owned();
            return Err(("free_page_hinting", problem));
        }
        Ok(())
    }
}

/// `PATCH /balloon`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonPatch {
    /// Memory in MiB that the guest is asked to give back.
    pub amount_mib: u32,
}

/// `PATCH /balloon/statistics`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BalloonStatsPatch {
    /// Seconds between two requests for statistics.
    pub stats_polling_interval_s: u16,
}
