//! Metrics: figures under Firecracker's names, as a line of JSON every minute and on demand.
//!
//! Only what is measured is there; a group of Firecracker's that is missing from a line has no figure here.

mod devices;
mod exits;
mod figure;
mod writer;

use ::devices::legacy::Timestamp;

pub use exits::VcpuExits;
pub use figure::{Counter, Gauge};
pub use writer::{FlushTimer, MetricsConfig, MetricsError, flush, init, raw_fd};

use self::devices::DeviceFigures;
use exits::AllExits;
use figure::groups;

/// The figures of this process.
pub static METRICS: Metrics = Metrics::new();

groups! {
    /// All figures.
    Metrics {
        /// The start of the process.
        api_server: ApiServer,
        /// Where threads were put.
        cgroup: Cgroup,
        /// What the devices count, a group for each.
        #[serde(flatten)]
        devices: DeviceFigures,
        /// Requests that ask.
        get_api_requests: GetRequests,
        /// How long things took.
        latencies_us: Latencies,
        /// The log and the metrics themselves.
        logger: Logger,
        /// Requests that change.
        patch_api_requests: PatchRequests,
        /// Requests that define or do.
        put_api_requests: PutRequests,
        /// System calls that a seccomp filter forbade.
        seccomp: Seccomp,
        /// Signals that ended us.
        signals: Signals,
        /// All vCPUs together.
        vcpu: Vcpu,
        /// The process.
        vmm: Vmm,
    }

    /// How long it took until the API was served.
    ApiServer {
        /// Microseconds since the time that `--start-time-us` names.
        process_startup_time_us: Gauge,
        /// Microseconds of CPU time, the parent's included.
        process_startup_time_cpu_us: Gauge,
    }

    /// Placement.
    Cgroup {
        /// Threads that joined their group.
        joins: Counter,
        /// Threads that could not.
        join_fails: Counter,
        /// Limits that could not be applied.
        limits_not_applied: Gauge,
        /// Threads that were found elsewhere than they belong, when they were last asked for.
        strays: Gauge,
    }

    /// Requests that ask, by endpoint.
    GetRequests {
        /// `/`
        instance_info_count: Counter,
        /// `/machine-config`
        machine_cfg_count: Counter,
        /// `/mmds`
        mmds_count: Counter,
        /// `/version`
        vmm_version_count: Counter,
    }

    /// Requests that define or do, by endpoint.
    PutRequests {
        /// `/actions`
        actions_count: Counter,
        /// Those refused.
        actions_fails: Counter,
        /// `/boot-source`
        boot_source_count: Counter,
        /// Those refused.
        boot_source_fails: Counter,
        /// `/cpu-config`
        cpu_cfg_count: Counter,
        /// Those refused.
        cpu_cfg_fails: Counter,
        /// `/drives/ID`
        drive_count: Counter,
        /// Those refused.
        drive_fails: Counter,
        /// `/logger`
        logger_count: Counter,
        /// Those refused.
        logger_fails: Counter,
        /// `/machine-config`
        machine_cfg_count: Counter,
        /// Those refused.
        machine_cfg_fails: Counter,
        /// `/metrics`
        metrics_count: Counter,
        /// Those refused.
        metrics_fails: Counter,
        /// `/mmds` and `/mmds/config`
        mmds_count: Counter,
        /// Those refused.
        mmds_fails: Counter,
        /// `/network-interfaces/ID`
        network_count: Counter,
        /// Those refused.
        network_fails: Counter,
        /// `/serial`
        serial_count: Counter,
        /// Those refused.
        serial_fails: Counter,
        /// `/vsock`
        vsock_count: Counter,
        /// Those refused.
        vsock_fails: Counter,
    }

    /// Requests that change, by endpoint.
    PatchRequests {
        /// `/drives/ID`
        drive_count: Counter,
        /// Those refused.
        drive_fails: Counter,
        /// `/machine-config`
        machine_cfg_count: Counter,
        /// Those refused.
        machine_cfg_fails: Counter,
        /// `/mmds`
        mmds_count: Counter,
        /// Those refused.
        mmds_fails: Counter,
        /// `/network-interfaces/ID`
        network_count: Counter,
        /// Those refused.
        network_fails: Counter,
    }

    /// How long the last one of its kind took, in microseconds.
    Latencies {
        /// Pausing all vCPUs.
        pause_vm: Gauge,
        /// Resuming all vCPUs.
        resume_vm: Gauge,
    }

    /// The log and the metrics themselves.
    Logger {
        /// Log lines that their reader had no room for.
        missed_log_count: Counter,
        /// Lines of metrics that could not be written. What they held is in the next one.
        missed_metrics_count: Counter,
        /// Log lines that were suppressed, as there were too many.
        rate_limited_log_count: Counter,
    }

    /// System calls that a seccomp filter forbade: 0, and 1 in the last line of a process that ends of it.
    Seccomp {
        /// Calls.
        num_faults: Gauge,
    }

    /// Signals that ended us: 0 or 1.
    Signals {
        /// SIGHUP.
        sighup: Gauge,
    }

    /// All vCPUs together.
    Vcpu {
        /// Port reads by the guest that left it.
        exit_io_in: Counter,
        /// Port writes.
        exit_io_out: Counter,
        /// Memory-mapped reads.
        exit_mmio_read: Counter,
        /// Memory-mapped writes.
        exit_mmio_write: Counter,
        /// vCPUs that could not go on.
        failures: Counter,
        /// Where the exits are counted.
        #[serde(skip)]
        exits: AllExits,
    }

    /// The process.
    Vmm {
        /// 1 if a thread panicked.
        panic_count: Gauge,
    }
}

impl Metrics {
    /// Counts a request of the API, if its endpoint has a figure: `method` in upper case, the path from its first
    /// slash, and whether it was refused.
    pub fn count_request(&self, method: &str, path: &str, refused: bool) {
        let endpoint = path.trim_start_matches('/').split(['/', '?']).next().unwrap_or_default();
        let (get, put, patch) = (&self.get_api_requests, &self.put_api_requests, &self.patch_api_requests);
        let (count, fails) = match (method, endpoint) {
            ("GET", "") => (&get.instance_info_count, None),
            ("GET", "machine-config") => (&get.machine_cfg_count, None),
            ("GET", "mmds") => (&get.mmds_count, None),
            ("GET", "version") => (&get.vmm_version_count, None),
            ("PUT", "actions") => (&put.actions_count, Some(&put.actions_fails)),
            ("PUT", "boot-source") => (&put.boot_source_count, Some(&put.boot_source_fails)),
            ("PUT", "cpu-config") => (&put.cpu_cfg_count, Some(&put.cpu_cfg_fails)),
            ("PUT", "drives") => (&put.drive_count, Some(&put.drive_fails)),
            ("PUT", "logger") => (&put.logger_count, Some(&put.logger_fails)),
            ("PUT", "machine-config") => (&put.machine_cfg_count, Some(&put.machine_cfg_fails)),
            ("PUT", "metrics") => (&put.metrics_count, Some(&put.metrics_fails)),
            ("PUT", "mmds") => (&put.mmds_count, Some(&put.mmds_fails)),
            ("PUT", "network-interfaces") => (&put.network_count, Some(&put.network_fails)),
            ("PUT", "serial") => (&put.serial_count, Some(&put.serial_fails)),
            ("PUT", "vsock") => (&put.vsock_count, Some(&put.vsock_fails)),
            ("PATCH", "drives") => (&patch.drive_count, Some(&patch.drive_fails)),
            ("PATCH", "machine-config") => (&patch.machine_cfg_count, Some(&patch.machine_cfg_fails)),
            ("PATCH", "mmds") => (&patch.mmds_count, Some(&patch.mmds_fails)),
            ("PATCH", "network-interfaces") => (&patch.network_count, Some(&patch.network_fails)),
            _ => return,
        };
        count.inc();
        if let Some(fails) = fails.filter(|_| refused) {
            fails.inc();
        }
    }

    /// Notes how long the start took, from what the jailer hands over by `--start-time-us`,
    /// `--start-time-cpu-us` and `--parent-cpu-time-us`: microseconds of CLOCK_MONOTONIC, of our CPU time, and of
    /// the parent's.
    pub fn note_start(&self, start_us: Option<u64>, start_cpu_us: Option<u64>, parent_cpu_us: Option<u64>) {
        let now = Timestamp::now();
        if let Some(start) = start_us {
            let took = now.wall_us.saturating_sub(start);
            self.api_server.process_startup_time_us.store(took);
        }
        if let Some(start) = start_cpu_us {
            let took = now.cpu_us.saturating_sub(start);
            let parent = parent_cpu_us.unwrap_or_default();
            self.api_server.process_startup_time_cpu_us.store(took.saturating_add(parent));
        }
    }
}

#[cfg(test)]
mod tests;
