//! What a test is: a function, and what it needs of the machine.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// A version of the cgroup interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CgroupVersion {
    /// Hierarchies apart, each with its controllers.
    V1,
    /// The unified hierarchy with all controllers.
    V2,
}

impl fmt::Display for CgroupVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V1 => "cgroup v1",
            Self::V2 => "cgroup v2",
        })
    }
}

/// A generation of kernels, told apart by what is different for us.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kernel {
    /// Up to 6.3: vhost workers are kernel threads. The emulated host has Debian 12's 6.1.
    V6_1,
    /// From 6.14: vhost workers and KVM's NX worker are threads of the process, the latter made by the
    /// first KVM_RUN. The emulated host has the 7.x of trixie-backports.
    V7,
}

impl fmt::Display for Kernel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V6_1 => "kernel 6.1",
            Self::V7 => "kernel 7.x",
        })
    }
}

/// What a case needs of the machine that it runs on. Root is always needed.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// A /dev/kvm that runs Linux.
    pub kvm: bool,
    /// A /dev/kvm of any kind, for guests that do nothing, and cgroups of either version.
    pub idle_vm: bool,
    /// /dev/vhost-net.
    pub vhost_net: bool,
    /// systemd as process 1.
    pub systemd: bool,
    /// A block device to overwrite ([`Ctx::scratch_disk`]).
    pub scratch_disk: bool,
    /// A host of its own, whose clock may be set, and in which nobody else makes and takes things.
    pub own_host: bool,
    /// This version of cgroups, with cpu, cpuset, io (v1: blkio), memory and pids.
    pub cgroup: Option<CgroupVersion>,
    /// This generation of kernels.
    pub kernel: Option<Kernel>,
}

impl Needs {
    /// Nothing but root.
    pub const NOTHING: Self = Self {
        kvm: false,
        idle_vm: false,
        vhost_net: false,
        systemd: false,
        scratch_disk: false,
        own_host: false,
        cgroup: None,
        kernel: None,
    };
    /// A VM with a fast network: what most cases need.
    pub const VM: Self = Self { kvm: true, vhost_net: true, ..Self::NOTHING };
}

/// A test.
pub struct Case {
    /// Its name: unique, in snake case.
    pub name: &'static str,
    /// What it needs.
    pub needs: Needs,
    /// How long it may take before it counts as hung.
    pub timeout: Duration,
    /// The test itself.
    pub run: fn(&Ctx) -> Result<(), Failure>,
}

impl Case {
    /// What a case may take unless it says otherwise: emulation makes guests 20 times slower than hardware.
    pub const TIMEOUT: Duration = Duration::from_secs(300);
}

/// Where a running case finds things; travels to its process as JSON.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Ctx {
    /// The binary under test.
    pub pinfold: PathBuf,
    /// The API's client.
    pub pinctl: PathBuf,
    /// The guest's kernel as ELF.
    pub vmlinux: PathBuf,
    /// The guest's kernel as bzImage.
    pub bzimage: PathBuf,
    /// The guest's initramfs (its init: `tests/guest/init`).
    pub initramfs: PathBuf,
    /// An empty folder of the case's own, removed after it.
    pub scratch: PathBuf,
    /// A block device that the case may overwrite.
    pub scratch_disk: Option<PathBuf>,
    /// How many times as often as usual to do what is done many times: `PINFOLD_TEST_REPEAT`.
    pub repeat: usize,
}

impl Ctx {
    /// The context of files named as in a job folder (`pinfold`, `pinctl`, `vmlinux`, `bzImage`, `initramfs`, and
    /// `repeat`, which holds a number).
    pub fn of_job(job: &Path, scratch: &Path, scratch_disk: Option<PathBuf>) -> Self {
        Self {
            pinfold: job.join("pinfold"),
            pinctl: job.join("pinctl"),
            vmlinux: job.join("vmlinux"),
            bzimage: job.join("bzImage"),
            initramfs: job.join("initramfs"),
            scratch: scratch.to_owned(),
            scratch_disk,
            repeat: std::fs::read_to_string(job.join("repeat"))
                .ok()
                .and_then(|text| text.parse().ok())
                .unwrap_or(1),
        }
    }
}

/// Why a case failed. Any error turns into one, with its causes.
#[derive(Debug)]
pub struct Failure(pub String);

impl Failure {
    /// A failure with this text.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<E: std::error::Error> From<E> for Failure {
    fn from(error: E) -> Self {
        Self(with_causes(&error))
    }
}

/// The text of `error` and of all its causes.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// Fails the case with a text when a condition does not hold.
#[macro_export]
macro_rules! check {
    ($condition:expr, $($text:tt)+) => {
        if !$condition {
            return Err($crate::case::Failure::new(format!($($text)+)));
        }
    };
}
