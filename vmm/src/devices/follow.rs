//! Running devices follow what is asked of them.

use std::sync::PoisonError;

use ::devices::legacy::I8042Error;
use ::devices::rate_limiter::LimiterUpdate;
use ::devices::virtio::balloon::{Balloon, Stats};
use ::devices::virtio::block::{Block, VhostUserBlock};
use ::devices::virtio::device::VirtioDevice;
use ::devices::virtio::net::{Net, VhostUserNet};
use ::devices::virtio::vsock::Vsock;
use resources::{Action, DrivePatch, NetBackend, NetworkInterfacePatch, RateLimiter, ResourceId};
use serde_json::{Map, Value};

use super::make::bucket;
use super::{DeviceError, Devices, Name};

impl Devices {
    /// Has the devices follow a declaration that was found right. A refusal changes nothing.
    pub fn follow(&self, action: &Action) -> Result<(), DeviceError> {
        match action {
            Action::PatchDrive(patch) => self.drive(patch),
            Action::PatchNetworkInterface(patch) => self.interface(patch),
            Action::PatchBalloon(patch) => Ok(self.update(&Name::Balloon, |balloon: &mut Balloon| {
                balloon.set_amount_mib(patch.amount_mib)
            })??),
            Action::PatchBalloonStats(patch) => Ok(self
                .update(&Name::Balloon, |balloon: &mut Balloon| {
                    balloon.set_stats_polling_interval_s(patch.stats_polling_interval_s)
                })??),
            _ => Ok(()),
        }
    }

    /// Who moves the packets of an interface.
    pub fn net_backend(&self, id: &ResourceId) -> Option<NetBackend> {
        let name = Name::Network(id.clone());
        if self.is_served(&name) {
            return Some(NetBackend::VhostUser);
        }
        let vhost = self.update(&name, |net: &mut Net| net.is_on_vhost()).ok()?;
        Some(if vhost { NetBackend::VhostNet } else { NetBackend::Pinfold })
    }

    /// The balloon's statistics, by Firecracker's names; `None` when it has none.
    pub fn balloon_stats(&self) -> Result<Option<Value>, DeviceError> {
        Ok(self.update(&Name::Balloon, |balloon: &mut Balloon| balloon.stats())?.map(stats))
    }

    /// The microVM runs: from now on what clients of Firecracker's find at its end stays, which is the vsock's
    /// socket. After a launch that failed nothing does, so that it can be tried again.
    pub fn settle(&self) {
        // There may be none.
        let _ = self.update(&Name::Vsock, Vsock::keep_socket);
    }

    /// Presses Ctrl, Alt and Del on the guest's keyboard. A guest that does not listen is none of the caller's
    /// faults: as with Firecracker the keys were pressed.
    pub fn press_ctrl_alt_del(&self) -> Result<(), DeviceError> {
        match self.keyboard.lock().unwrap_or_else(PoisonError::into_inner).press_ctrl_alt_del() {
            Err(I8042Error::NotEnabled) => {
                log::warn!("Ctrl+Alt+Del: the guest does not listen to its keyboard");
                Ok(())
            }
            result => Ok(result?),
        }
    }

    fn drive(&self, patch: &DrivePatch) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Drive { id: patch.drive_id.to_string(), source };
        let name = Name::Drive(patch.drive_id.clone());
        // Of a drive that a server serves nothing can be declared anew.
        if let Ok(refreshed) = self.update(&name, VhostUserBlock::refresh) {
            return refreshed.map_err(failed);
        }
        self.update(&name, |block: &mut Block| {
            // The only step that can fail comes first.
            patch.path_on_host.as_deref().map_or(Ok(()), |path| block.reopen(path)).map_err(failed)?;
            block.set_limiter(limits(patch.rate_limiter));
            Ok(())
        })?
    }

    fn interface(&self, patch: &NetworkInterfacePatch) -> Result<(), DeviceError> {
        let failed = |source| DeviceError::Network { id: patch.iface_id.to_string(), source };
        let name = Name::Network(patch.iface_id.clone());
        // Where a server moves the packets no limit can be declared.
        if self.is_served(&name) {
            return Ok(());
        }
        self.update(&name, |net: &mut Net| {
            net.set_limiters(limits(patch.rx_rate_limiter), limits(patch.tx_rate_limiter)).map_err(failed)
        })?
    }

    /// Whether another process moves the packets of this interface.
    fn is_served(&self, name: &Name) -> bool {
        self.update(name, |_: &mut VhostUserNet| ()).is_ok()
    }

    fn update<D: VirtioDevice, R>(
        &self,
        name: &Name,
        change: impl FnOnce(&mut D) -> R,
    ) -> Result<R, DeviceError> {
        let slot = self.slots.iter().find(|(known, _)| known == name).map(|(_, slot)| slot);
        slot.and_then(|slot| slot.update(change)).ok_or_else(|| DeviceError::Unknown(format!("{name:?}")))
    }
}

fn limits(patch: Option<RateLimiter>) -> LimiterUpdate {
    let patch = patch.unwrap_or_default();
    LimiterUpdate { bandwidth: patch.bandwidth.map(bucket), ops: patch.ops.map(bucket) }
}

fn stats(stats: Stats) -> Value {
    let mut members = Map::new();
    let sizes = [
        ("target_pages", stats.target_pages),
        ("actual_pages", stats.actual_pages),
        ("target_mib", stats.target_mib),
        ("actual_mib", stats.actual_mib),
    ];
    members.extend(sizes.map(|(name, value)| (name.to_owned(), value.into())));
    let told = [
        ("swap_in", stats.swap_in),
        ("swap_out", stats.swap_out),
        ("major_faults", stats.major_faults),
        ("minor_faults", stats.minor_faults),
        ("free_memory", stats.free_memory),
        ("total_memory", stats.total_memory),
        ("available_memory", stats.available_memory),
        ("disk_caches", stats.disk_caches),
        ("hugetlb_allocations", stats.hugetlb_allocations),
        ("hugetlb_failures", stats.hugetlb_failures),
        ("oom_kill", stats.oom_kill),
        ("alloc_stall", stats.alloc_stall),
        ("async_scan", stats.async_scan),
        ("direct_scan", stats.direct_scan),
        ("async_reclaim", stats.async_reclaim),
        ("direct_reclaim", stats.direct_reclaim),
    ];
    members.extend(told.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?.into()))));
    Value::Object(members)
}
