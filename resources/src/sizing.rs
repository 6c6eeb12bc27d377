//! `size_vm`: processors and memory by what the containers may use, as Kata sizes a sandbox that does not grow later.

use crate::MicrovmConfig;
use crate::config::{ConfigError, at};
use crate::machine::MAX_VCPUS;

impl MicrovmConfig {
    /// Where the section asks for it: as many vCPUs as the sum of the containers' quotas in whole CPUs, rounded up (and
    /// to an even number with `smt`), and as much memory as their sum in whole MiB, rounded up, beside what
    /// `mem_size_mib` gives the guest itself. What some container may use without a limit stays as it is declared.
    ///
    /// # Errors
    /// When a microVM cannot be that large.
    pub fn size_from_containers(&mut self) -> Result<(), ConfigError> {
        if !self.cgroup.size_vm {
            return Ok(());
        }
        let containers = self.cgroup.containers.iter().map(|container| &container.resources);
        let sums = cgroup::Sums::of(containers, None);
        let machine = &mut self.machine_config;
        if let Some(quota) = sums.vcpus.quota {
            let cpus = quota.div_ceil(cgroup::PERIOD).max(1);
            let vcpus = if machine.smt && cpus > 1 { cpus.next_multiple_of(2) } else { cpus };
            let fits = u8::try_from(vcpus).ok().filter(|vcpus| *vcpus <= MAX_VCPUS);
            machine.vcpu_count = fits.ok_or_else(|| {
                let problem = format!(
                    "the containers may use {cpus} CPUs together, and a microVM has {MAX_VCPUS} vCPUs at most; lower \
                     their quotas, or leave it out and set vcpu_count"
                );
                at("cgroup".to_owned())(("size_vm", problem))
            })?;
        }
        if let Some(bytes) = sums.memory {
            machine.mem_size_mib = machine.mem_size_mib.saturating_add(bytes.div_ceil(1 << 20));
        }
        self.check()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// vCPUs and MiB of a microVM with these containers and `machine-config`.
    fn size(machine: &str, containers: &str) -> Result<(u8, u64), String> {
        let text = format!(
            r#"{{"boot-source": {{"kernel_image_path": "k"}}, "drives": [], "machine-config": {machine}, "cgroup": {{"size_vm": true, "containers": {containers}}}}}"#
        );
        let mut config = MicrovmConfig::from_json(&text).unwrap();
        config.size_from_containers().map_err(|error| error.to_string())?;
        Ok((config.machine_config.vcpu_count, config.machine_config.mem_size_mib))
    }

    fn container(id: &str, quota: i64, memory: i64) -> String {
        format!(
            r#"{{"id": "{id}", "resources": {{"cpu": {{"quota": {quota}, "period": 100000}}, "memory": {{"limit": {memory}}}}}}}"#
        )
    }

    const MACHINE: &str = r#"{"vcpu_count": 1, "mem_size_mib": 128}"#;

    #[test]
    fn sums_are_rounded_up() {
        let record = [container("a", 200_000, 400 << 20), container("b", 300_000, 200 << 20)].join(", ");
        assert_eq!(size(MACHINE, &format!("[{record}]")), Ok((5, 728)));
        let smt = r#"{"vcpu_count": 1, "mem_size_mib": 128, "smt": true}"#;
        assert_eq!(size(smt, &format!("[{record}]")), Ok((6, 728)));
        let odd = [container("a", 100_001, (1 << 20) + 1), container("b", 1000, 1)].join(", ");
        assert_eq!(size(MACHINE, &format!("[{odd}]")), Ok((2, 130)));
        assert_eq!(size(MACHINE, &format!("[{}]", container("a", 1000, 1))), Ok((1, 129)));
    }

    #[test]
    fn what_is_not_limited_stays() {
        assert_eq!(size(MACHINE, "[]"), Ok((1, 128)));
        let free = [container("a", -1, 1 << 20), container("b", 900_000, -1)].join(", ");
        assert_eq!(size(MACHINE, &format!("[{free}]")), Ok((1, 128)));
        let half = container("a", 300_000, -1);
        assert_eq!(size(MACHINE, &format!("[{half}]")), Ok((3, 128)));
    }

    #[test]
    fn what_no_microvm_can_have_is_refused() {
        assert_eq!(size(MACHINE, &format!("[{}]", container("a", 3_200_000, 1))), Ok((32, 129)));
        let error = size(MACHINE, &format!("[{}]", container("a", 3_200_001, 1))).unwrap_err();
        assert!(error.starts_with("cgroup.size_vm: the containers may use 33 CPUs"), "{error}");
        let most = r#"{"vcpu_count": 1, "mem_size_mib": 17592186044415}"#;
        let error = size(most, &format!("[{}]", container("a", -1, 1))).unwrap_err();
        assert!(error.starts_with("machine-config.mem_size_mib"), "{error}");
    }
}
