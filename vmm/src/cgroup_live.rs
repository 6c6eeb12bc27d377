//! The groups while the microVM lives: their limits follow what is declared.

use std::io;
use std::time::Duration;

use resources::{CgroupSection, chain};
use serde_json::{Value, json};

use crate::alarm::Alarm;
use crate::event_loop::EventLoop;
use crate::placement::Placement;

/// How often a limit that waits for memory to be freed is tried.
const RETRY: Duration = Duration::from_secs(1);

/// Why the groups cannot be looked after.
#[derive(Debug, thiserror::Error)]
#[error("cannot make a timer for the limits of the groups")]
pub struct LiveError(#[from] io::Error);

/// Our groups.
pub struct LiveGroups {
    groups: cgroup::Groups,
    limits: cgroup::Limits,
    retry: Alarm,
}

impl LiveGroups {
    /// The groups that the threads were placed in, if they were.
    pub fn of(placement: &Placement, event_loop: &mut EventLoop) -> Result<Option<Self>, LiveError> {
        let (Some(groups), Some(limits)) = (placement.groups(), placement.limits()) else { return Ok(None) };
        let live = Self { groups: groups.clone(), limits: limits.clone(), retry: Alarm::new(event_loop)? };
        live.wait_if_pending();
        Ok(Some(live))
    }

    /// Where the groups are, and their limits as they are now.
    pub fn in_force(&self) -> Result<Value, serde_json::Error> {
        let mut all = json!({});
        for part in [serde_json::to_value(&self.groups)?, serde_json::to_value(self.limits.in_force())?] {
            if let (Value::Object(all), Value::Object(part)) = (&mut all, part) {
                all.extend(part);
            }
        }
        Ok(all)
    }

    /// Makes the limits those that are declared. A refusal changes nothing.
    pub fn follow(&mut self, section: &CgroupSection) -> Result<(), cgroup::ChangeError> {
        let containers: Vec<_> =
            section.containers.iter().map(|container| container.resources.clone()).collect();
        self.limits.change(&containers, section.overhead.as_ref())?;
        self.wait_if_pending();
        Ok(())
    }

    /// Does what its time has come for. To be called after each turn of the event loop.
    pub fn tend(&mut self) {
        if !self.retry.rang() {
            return;
        }
        match self.limits.retry() {
            Ok(true) => {}
            Ok(false) => log::info!("the memory limit that waited is in force"),
            Err(error) => log::warn!("the memory limit still waits: {}", chain(&error)),
        }
        self.wait_if_pending();
    }

    fn wait_if_pending(&self) {
        if self.limits.is_pending() {
            self.retry.set(RETRY);
        }
    }
}
