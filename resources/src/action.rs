//! What can be asked of a microVM, and when.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    Balloon, BalloonPatch, BalloonStatsPatch, BootSource, CgroupPatch, CgroupSection, Container, CpuConfig,
    Drive, DrivePatch, Entropy, Fs, Logger, MachineConfig, MachineConfigPatch, Metrics, MmdsConfig,
    NetworkInterface, NetworkInterfacePatch, Serial, Vsock,
};

/// Whether the guest runs, for `PATCH /vm`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// No vCPU runs.
    Paused,
    /// All vCPUs run.
    Resumed,
}

/// Which events are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventsQuery {
    /// Those with a higher number than this.
    pub since: u64,
    /// How long to wait for one where there is none, in milliseconds.
    pub timeout_ms: u64,
}

/// How long to look before saying what holds the microVM back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiagnosisQuery {
    /// In milliseconds.
    pub window_ms: u64,
}

/// Which limits of the vCPUs are asked about. What is `None` is as it is in force.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WhatIfQuery {
    /// The quota.
    pub bandwidth: Option<cgroup::Bandwidth>,
    /// The CPUs.
    pub cpus: Option<cgroup::CpuSet>,
    /// How long to record what they use, in milliseconds.
    pub window_ms: u64,
}

/// Everything that can be asked of a microVM, whoever asks and in whatever way.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Its name and state.
    GetInstance,
    /// The version of the VMM.
    GetVersion,
    /// All that was declared.
    GetConfig,
    /// Processors and memory as declared.
    GetMachineConfig,
    /// The balloon as declared.
    GetBalloon,
    /// The balloon's statistics.
    GetBalloonStats,
    /// The metadata.
    GetMmds,
    /// The placement as declared, and the limits in force.
    GetCgroup,
    /// Where each thread is.
    GetCgroupThreads,
    /// What the groups used, and what they waited for.
    GetCgroupStats,
    /// The same in Prometheus's format.
    GetPrometheus,
    /// What happened to the groups.
    GetCgroupEvents(EventsQuery),
    /// What holds the microVM back.
    GetCgroupDiagnosis(DiagnosisQuery),
    /// What other limits would do.
    GetCgroupWhatIf(Box<WhatIfQuery>),

    /// All limits anew.
    PutCgroup(Box<CgroupSection>),
    /// The containers, the overhead, or both anew.
    PatchCgroup(Box<CgroupPatch>),
    /// Some limits of the overhead.
    PatchOverhead(Box<cgroup::Resources>),
    /// A container, new or in the place of the one with its id.
    PutContainer(Box<Container>),
    /// A container is gone: its id.
    DeleteContainer(String),

    /// What to boot.
    PutBootSource(BootSource),
    /// Processors and memory.
    PutMachineConfig(MachineConfig),
    /// Some of processors and memory.
    PatchMachineConfig(MachineConfigPatch),
    /// A CPU template.
    PutCpuConfig(CpuConfig),
    /// A drive, new or in the place of the one with its id.
    PutDrive(Drive),
    /// A network interface, new or in the place of the one with its id.
    PutNetworkInterface(NetworkInterface),
    /// The socket device.
    PutVsock(Vsock),
    /// The entropy device.
    PutEntropy(Entropy),
    /// A file system, new or in the place of the one with its tag.
    PutFs(Fs),
    /// The serial console.
    PutSerial(Serial),
    /// The log.
    PutLogger(Logger),
    /// The metrics.
    PutMetrics(Metrics),
    /// The balloon.
    PutBalloon(Balloon),
    /// The metadata service.
    PutMmdsConfig(MmdsConfig),
    /// Start the guest.
    Start,

    /// Another file behind a drive, other limits on it.
    PatchDrive(DrivePatch),
    /// Other limits on a network interface.
    PatchNetworkInterface(NetworkInterfacePatch),
    /// Another size of the balloon.
    PatchBalloon(BalloonPatch),
    /// Another interval of the balloon's statistics.
    PatchBalloonStats(BalloonStatsPatch),
    /// Pause or resume the guest.
    SetVmState(VmState),
    /// Write a line of metrics now.
    FlushMetrics,
    /// Press Ctrl, Alt and Del on the guest's keyboard.
    SendCtrlAltDel,

    /// Replace the metadata.
    PutMmds(Value),
    /// Merge into the metadata (RFC 7396).
    PatchMmds(Value),
}

/// When something can be asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Before the guest is started.
    BeforeStart,
    /// After the guest was started.
    AfterStart,
    /// At any time.
    Always,
}

/// What was asked cannot be done now. The texts are Firecracker's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PhaseError {
    /// It has to wait.
    #[error("The requested operation is not supported before starting the microVM.")]
    TooEarly,
    /// A device came too late.
    #[error(
        "The requested operation is not supported after starting the microVM: hotplug of devices is not supported yet."
    )]
    Hotplug,
    /// It is too late.
    #[error("The requested operation is not supported after starting the microVM.")]
    TooLate,
}

impl Action {
    /// When this can be asked.
    pub fn phase(&self) -> Phase {
        match self {
            Self::GetInstance
            | Self::GetVersion
            | Self::GetConfig
            | Self::GetMachineConfig
            | Self::GetBalloon
            | Self::GetMmds
            | Self::GetCgroup
            | Self::GetCgroupThreads
            | Self::GetCgroupStats
            | Self::GetPrometheus
            | Self::GetCgroupEvents(_)
            | Self::GetCgroupDiagnosis(_)
            | Self::GetCgroupWhatIf(_)
            | Self::PutCgroup(_)
            | Self::PatchCgroup(_)
            | Self::PatchOverhead(_)
            | Self::PutContainer(_)
            | Self::DeleteContainer(_)
            | Self::PutMmds(_)
            | Self::PatchMmds(_) => Phase::Always,
            Self::PutBootSource(_)
            | Self::PutMachineConfig(_)
            | Self::PatchMachineConfig(_)
            | Self::PutCpuConfig(_)
            | Self::PutDrive(_)
            | Self::PutNetworkInterface(_)
            | Self::PutVsock(_)
            | Self::PutEntropy(_)
            | Self::PutFs(_)
            | Self::PutSerial(_)
            | Self::PutLogger(_)
            | Self::PutMetrics(_)
            | Self::PutBalloon(_)
            | Self::PutMmdsConfig(_)
            | Self::Start => Phase::BeforeStart,
            Self::GetBalloonStats
            | Self::PatchDrive(_)
            | Self::PatchNetworkInterface(_)
            | Self::PatchBalloon(_)
            | Self::PatchBalloonStats(_)
            | Self::SetVmState(_)
            | Self::FlushMetrics
            | Self::SendCtrlAltDel => Phase::AfterStart,
        }
    }

    /// Whether the answer may be a while in coming, so that others must not wait for it.
    pub fn takes_time(&self) -> bool {
        matches!(self, Self::GetCgroupEvents(_) | Self::GetCgroupDiagnosis(_) | Self::GetCgroupWhatIf(_))
    }

    /// Whether this can be asked of a microVM that was, or was not, started.
    pub fn check_phase(&self, started: bool) -> Result<(), PhaseError> {
        match (self.phase(), started) {
            (Phase::BeforeStart, true) => match self {
                Self::PutDrive(_) | Self::PutNetworkInterface(_) | Self::PutFs(_) => Err(PhaseError::Hotplug),
                _ => Err(PhaseError::TooLate),
            },
            (Phase::AfterStart, false) => Err(PhaseError::TooEarly),
            _ => Ok(()),
        }
    }
}

/// An answer that is not a refusal.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// It is done.
    Done,
    /// What was asked for.
    Json(Value),
    /// What was asked for, as text of this media type.
    Text(&'static str, String),
}

/// A refusal. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What is wrong with what, and the way out.
    pub message: String,
    /// Whether it is that there is too much of something.
    pub too_large: bool,
}

impl From<String> for Fault {
    fn from(message: String) -> Self {
        Self { message, too_large: false }
    }
}

/// The answer to an [`Action`].
pub type Outcome = Result<Reply, Fault>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_held_to() {
        assert_eq!(Action::Start.check_phase(true), Err(PhaseError::TooLate));
        assert_eq!(Action::FlushMetrics.check_phase(false), Err(PhaseError::TooEarly));
        for (action, started) in [
            (Action::Start, false),
            (Action::FlushMetrics, true),
            (Action::GetConfig, false),
            (Action::GetConfig, true),
        ] {
            assert_eq!(action.check_phase(started), Ok(()));
        }
    }
}
