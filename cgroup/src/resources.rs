//! What a container, or the pod's overhead, asks for: the OCI runtime specification's `linux.resources`.

use serde::{Deserialize, Deserializer, Serialize, de};
use serde_json::Value;

use crate::cpuset::CpuSet;

/// The kernel's bounds of a CFS period in microseconds.
pub(crate) const PERIODS: std::ops::RangeInclusive<u64> = 1_000..=1_000_000;

/// Whose resources: not every field means something for both.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Owner {
    /// A container inside the guest.
    Container,
    /// The pod's overhead, that is the VMM itself.
    Overhead,
}

/// OCI `LinuxResources`. Unknown fields are refused; known ones that Pinfold does not apply are kept and
/// named by [`Resources::not_applied`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Resources {
    /// CPU time and place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpu: Option<Cpu>,
    /// Memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory: Option<Memory>,
    /// Number of tasks. The overhead's is the sandbox group's; a container's belongs to the guest.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pids: Option<Pids>,
    /// Device rules: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Value>,
    /// Block I/O: not applied.
    #[serde(rename = "blockIO", skip_serializing_if = "Option::is_none")]
    pub block_io: Option<Value>,
    /// Huge pages: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hugepage_limits: Option<Value>,
    /// net_cls and net_prio: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network: Option<Value>,
    /// RDMA: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rdma: Option<Value>,
    /// Raw cgroup v2 files: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub unified: Option<Value>,
}

/// OCI `LinuxCPU`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Cpu {
    /// Relative weight in v1's unit; missing and 0 count as 1024.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shares: Option<u64>,
    /// Microseconds of CPU time in each period; missing, 0 and negative mean no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quota: Option<i64>,
    /// Period in microseconds, 1000 to 1000000; missing and 0 mean 100000.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "deserialize_period")]
    pub period: Option<u64>,
    /// CPUs to run on; missing and empty mean any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cpus: Option<CpuSet>,
    /// Memory nodes to allocate from; missing and empty mean any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mems: Option<CpuSet>,
    /// CFS burst: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<u64>,
    /// Real-time runtime: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_runtime: Option<i64>,
    /// Real-time period: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub realtime_period: Option<u64>,
    /// SCHED_IDLE for the group: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub idle: Option<i64>,
}

/// OCI `LinuxMemory`, in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct Memory {
    /// Hard limit; missing, 0 and negative mean no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
    /// Soft limit: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reservation: Option<i64>,
    /// Memory and swap together: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swap: Option<i64>,
    /// Kernel memory: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel: Option<i64>,
    /// Kernel TCP buffers: not applied.
    #[serde(rename = "kernelTCP", skip_serializing_if = "Option::is_none")]
    pub kernel_tcp: Option<i64>,
    /// Swappiness: not applied.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub swappiness: Option<u64>,
    /// Whether the OOM killer is off: not applied.
    #[serde(rename = "disableOOMKiller", skip_serializing_if = "Option::is_none")]
    pub disable_oom_killer: Option<bool>,
    /// v1 hierarchical accounting: not applied, it is always on by now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub use_hierarchy: Option<bool>,
    /// Whether an update below the use is refused: not applied, Pinfold never writes a limit below the use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub check_before_update: Option<bool>,
}

/// OCI `LinuxPids`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Pids {
    /// Most tasks at a time; missing, 0 and negative mean no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub limit: Option<i64>,
}

impl Resources {
    /// These with every field that `patch` gives in the place of the one here.
    #[must_use]
    pub fn patched(self, patch: Self) -> Self {
        let (cpu, memory, pids) = (self.cpu.unwrap_or_default(), self.memory.unwrap_or_default(), self.pids);
        Self {
            cpu: Some(match patch.cpu {
                None => cpu,
                Some(patch) => Cpu {
                    shares: patch.shares.or(cpu.shares),
                    quota: patch.quota.or(cpu.quota),
                    period: patch.period.or(cpu.period),
                    cpus: patch.cpus.or(cpu.cpus),
                    mems: patch.mems.or(cpu.mems),
                    burst: patch.burst.or(cpu.burst),
                    realtime_runtime: patch.realtime_runtime.or(cpu.realtime_runtime),
                    realtime_period: patch.realtime_period.or(cpu.realtime_period),
                    idle: patch.idle.or(cpu.idle),
                },
            })
            .filter(|cpu| *cpu != Cpu::default()),
            memory: Some(match patch.memory {
                None => memory,
                Some(patch) => Memory {
                    limit: patch.limit.or(memory.limit),
                    reservation: patch.reservation.or(memory.reservation),
                    swap: patch.swap.or(memory.swap),
                    kernel: patch.kernel.or(memory.kernel),
                    kernel_tcp: patch.kernel_tcp.or(memory.kernel_tcp),
                    swappiness: patch.swappiness.or(memory.swappiness),
                    disable_oom_killer: patch.disable_oom_killer.or(memory.disable_oom_killer),
                    use_hierarchy: patch.use_hierarchy.or(memory.use_hierarchy),
                    check_before_update: patch.check_before_update.or(memory.check_before_update),
                },
            })
            .filter(|memory| *memory != Memory::default()),
            pids: match (patch.pids.and_then(|pids| pids.limit), pids) {
                (Some(limit), _) => Some(Pids { limit: Some(limit) }),
                (None, pids) => pids,
            },
            devices: patch.devices.or(self.devices),
            block_io: patch.block_io.or(self.block_io),
            hugepage_limits: patch.hugepage_limits.or(self.hugepage_limits),
            network: patch.network.or(self.network),
            rdma: patch.rdma.or(self.rdma),
            unified: patch.unified.or(self.unified),
        }
    }

    /// The fields, as paths such as `memory.swap`, that were given and that Pinfold does not apply, so that
    /// nothing is ignored in silence. An empty list or object, and a switch that is off, ask for nothing.
    #[must_use]
    pub fn not_applied(&self, owner: Owner) -> Vec<&'static str> {
        let cpu = self.cpu.clone().unwrap_or_default();
        let memory = self.memory.clone().unwrap_or_default();
        let pids = self.pids.as_ref().is_some_and(|pids| pids.limit.is_some_and(|limit| limit > 0));
        [
            ("pids.limit", owner == Owner::Container && pids),
            ("cpu.burst", cpu.burst.is_some_and(|burst| burst != 0)),
            ("cpu.realtimeRuntime", cpu.realtime_runtime.is_some_and(|runtime| runtime != 0)),
            ("cpu.realtimePeriod", cpu.realtime_period.is_some_and(|period| period != 0)),
            ("cpu.idle", cpu.idle.is_some_and(|idle| idle != 0)),
            ("memory.reservation", memory.reservation.is_some_and(|bytes| bytes > 0)),
            ("memory.swap", memory.swap.is_some_and(|bytes| bytes > 0)),
            ("memory.kernel", memory.kernel.is_some_and(|bytes| bytes > 0)),
            ("memory.kernelTCP", memory.kernel_tcp.is_some_and(|bytes| bytes > 0)),
            ("memory.swappiness", memory.swappiness.is_some()),
            ("memory.disableOOMKiller", memory.disable_oom_killer == Some(true)),
            ("devices", asks(self.devices.as_ref())),
            ("blockIO", asks(self.block_io.as_ref())),
            ("hugepageLimits", asks(self.hugepage_limits.as_ref())),
            ("network", asks(self.network.as_ref())),
            ("rdma", asks(self.rdma.as_ref())),
            ("unified", asks(self.unified.as_ref())),
        ]
        .into_iter()
        .filter_map(|(name, asked)| asked.then_some(name))
        .collect()
    }
}

fn asks(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => false,
        Some(Value::Array(list)) => !list.is_empty(),
        Some(Value::Object(map)) => !map.is_empty(),
        Some(_) => true,
    }
}

/// Reads a CFS period in microseconds, for `deserialize_with`.
///
/// # Errors
/// When it is out of the kernel's range: 1000 to 1000000, or 0 for the default.
pub fn deserialize_period<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match Option::<u64>::deserialize(deserializer)? {
        Some(us) if us != 0 && !PERIODS.contains(&us) => Err(de::Error::custom(format!(
            "cpu.period {us} is out of the kernel's range: {} to {} microseconds",
            PERIODS.start(),
            PERIODS.end()
        ))),
        period => Ok(period),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oci_resources_are_read_and_written_back() {
        let text = r#"{"cpu":{"shares":2048,"quota":200000,"period":100000,"cpus":"0-1","mems":"0"},
            "memory":{"limit":419430400,"disableOOMKiller":false},"pids":{"limit":7}}"#;
        let resources: Resources = serde_json::from_str(text).unwrap();
        assert_eq!(resources.cpu.as_ref().unwrap().cpus.as_ref().unwrap().len(), 2);
        assert_eq!(serde_json::to_value(&resources).unwrap(), serde_json::from_str::<Value>(text).unwrap());
        assert!(resources.not_applied(Owner::Overhead).is_empty());
        assert_eq!(resources.not_applied(Owner::Container), ["pids.limit"]);
    }

    #[test]
    fn a_patch_changes_what_it_gives() {
        let resources = |text: &str| serde_json::from_str::<Resources>(text).unwrap();
        let old = resources(r#"{"cpu":{"shares":2,"quota":3,"cpus":"0"},"pids":{"limit":4}}"#);
        assert_eq!(old.clone().patched(Resources::default()), old);
        assert_eq!(Resources::default().patched(old.clone()), old);
        let patch = resources(r#"{"cpu":{"quota":-1},"memory":{"limit":5},"pids":{}}"#);
        let new = r#"{"cpu":{"shares":2,"quota":-1,"cpus":"0"},"memory":{"limit":5},"pids":{"limit":4}}"#;
        assert_eq!(old.patched(patch), resources(new));
    }

    #[test]
    fn nothing_is_ignored_in_silence() {
        let text = r#"{"devices":[{"allow":false}],"blockIO":{"weight":10},"hugepageLimits":[],
            "network":{},"rdma":null,"unified":{"memory.high":"1"},"memory":{"swap":5,"swappiness":0},
            "cpu":{"burst":1,"realtimeRuntime":0}}"#;
        let resources: Resources = serde_json::from_str(text).unwrap();
        assert_eq!(
            resources.not_applied(Owner::Container),
            ["cpu.burst", "memory.swap", "memory.swappiness", "devices", "blockIO", "unified"]
        );
    }

    #[test]
    fn unknown_fields_and_impossible_values_are_refused_by_name() {
        for (text, part) in [
            (r#"{"cpus":"0"}"#, "cpus"),
            (r#"{"cpu":{"weight":1}}"#, "weight"),
            (r#"{"memory":{"limit":"1G"}}"#, "1G"),
            (r#"{"cpu":{"period":999}}"#, "999"),
            (r#"{"cpu":{"period":1000001}}"#, "1000001"),
            (r#"{"cpu":{"cpus":"0-9000"}}"#, "0-9000"),
            (r#"{"cpu":{"shares":-1}}"#, "-1"),
        ] {
            let error = serde_json::from_str::<Resources>(text).unwrap_err().to_string();
            assert!(error.contains(part), "{error}");
        }
        assert!(serde_json::from_str::<Resources>(r#"{"cpu":{"period":0}}"#).is_ok());
    }
}
