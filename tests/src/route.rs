//! Where a case runs: on this machine when it has what the case needs, else in the emulated host.

use crate::case::{CgroupVersion, Kernel, Needs};
use std::fmt;
use std::path::Path;

/// An emulated host that can be booted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Kind {
    /// Its kernel.
    pub kernel: Kernel,
    /// The cgroup version that its systemd mounts.
    pub cgroup: CgroupVersion,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.cgroup, self.kernel)
    }
}

/// The decision for one case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// On this machine.
    Native,
    /// In the emulated host of this kind, because this machine lacks something.
    Emulated(Kind, String),
    /// Nowhere, for this reason.
    Nowhere(String),
}

/// What `PINFOLD_TEST_HOST` asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forced {
    /// Nothing: native where possible.
    No,
    /// `native`: what is missing fails the case.
    Native,
    /// `emulated`.
    Emulated,
}

impl Forced {
    /// Reads the environment. An unknown value is an error text.
    pub fn from_environment() -> Result<Self, String> {
        match std::env::var("PINFOLD_TEST_HOST").as_deref() {
            Err(_) | Ok("") => Ok(Self::No),
            Ok("native") => Ok(Self::Native),
            Ok("emulated") => Ok(Self::Emulated),
            Ok(other) => Err(format!("PINFOLD_TEST_HOST is `{other}`: use `native` or `emulated`")),
        }
    }
}

/// What this machine has, as far as cases care.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Whether we are root.
    pub root: bool,
    /// Why /dev/kvm cannot run Linux.
    pub kvm: Result<(), String>,
    /// Whether there is a /dev/kvm of any kind.
    pub any_kvm: bool,
    /// Whether /dev/vhost-net is there.
    pub vhost_net: bool,
    /// Whether systemd is process 1.
    pub systemd: bool,
    /// Which cgroup version has all controllers that cases use.
    pub cgroup: Option<CgroupVersion>,
    /// Major and minor number of the running kernel.
    pub kernel: (u32, u32),
}

impl Machine {
    /// Looks at the machine that we run on.
    pub fn detect() -> Self {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        Self {
            // SAFETY: geteuid has no preconditions and cannot fail.
            root: unsafe { libc::geteuid() == 0 },
            kvm: detect_kvm(),
            any_kvm: Path::new("/dev/kvm").exists(),
            vhost_net: Path::new("/dev/vhost-net").exists(),
            systemd: Path::new("/run/systemd/system").exists(),
            cgroup: detect_cgroup(
                &std::fs::read_to_string("/proc/self/mounts").unwrap_or_default(),
                &std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default(),
            ),
            kernel: parse_release(&release),
        }
    }

    /// What is missing for `needs`, or nothing.
    pub fn lacks(&self, needs: &Needs) -> Option<String> {
        if !self.root {
            return Some("we are not root here".to_owned());
        }
        if needs.kvm
            && let Err(reason) = &self.kvm
        {
            return Some(reason.clone());
        }
        if needs.idle_vm && (!self.any_kvm || self.cgroup.is_none()) {
            return Some("this machine has no /dev/kvm, or no cgroups with all controllers".to_owned());
        }
        if needs.vhost_net && !self.vhost_net {
            return Some("this machine has no /dev/vhost-net (modprobe vhost_net)".to_owned());
        }
        if needs.systemd && !self.systemd {
            return Some("this machine's process 1 is not systemd".to_owned());
        }
        if needs.scratch_disk {
            return Some("this machine has no block device that we may overwrite".to_owned());
        }
        if needs.own_host {
            return Some("this machine is not ours alone".to_owned());
        }
        if let Some(wanted) = needs.cgroup
            && self.cgroup != Some(wanted)
        {
            return Some(format!("this machine does not have {wanted} with all controllers"));
        }
        let fits = match needs.kernel {
            None => true,
            Some(Kernel::V6_1) => self.kernel < (6, 4),
            Some(Kernel::V7) => self.kernel >= (6, 14),
        };
        let (major, minor) = self.kernel;
        (!fits).then(|| format!("this machine's kernel is {major}.{minor}"))
    }
}

/// Decides where a case with these `needs` runs.
pub fn place(needs: &Needs, machine: &Machine, forced: Forced) -> Place {
    let lacking = match (machine.lacks(needs), forced) {
        (None, Forced::No | Forced::Native) => return Place::Native,
        (Some(reason), Forced::Native) => {
            return Place::Nowhere(format!("PINFOLD_TEST_HOST=native, but {reason}"));
        }
        (_, Forced::Emulated) => "PINFOLD_TEST_HOST=emulated".to_owned(),
        (Some(reason), Forced::No) => reason,
    };
    let kind = Kind {
        kernel: needs.kernel.unwrap_or(Kernel::V6_1),
        cgroup: needs.cgroup.unwrap_or(CgroupVersion::V2),
    };
    if kind.kernel == Kernel::V7 && kind.cgroup == CgroupVersion::V1 {
        return Place::Nowhere(
            "no emulated host has both kernel 7.x and cgroup v1: its systemd has v2 alone".to_owned(),
        );
    }
    Place::Emulated(kind, lacking)
}

fn detect_kvm() -> Result<(), String> {
    if !Path::new("/dev/kvm").exists() {
        return Err("this machine has no /dev/kvm".to_owned());
    }
    if Path::new("/sys/module/kvm_intel").exists() || Path::new("/sys/module/kvm_amd").exists() {
        return Ok(());
    }
    let name = if Path::new("/sys/module/kvm_pvm").exists() { "kvm_pvm" } else { "a software variant" };
    Err(format!("this machine's /dev/kvm is {name} and cannot run Linux"))
}

/// The version that has all controllers, from /proc/mounts and the unified root's `cgroup.controllers`.
fn detect_cgroup(mounts: &str, controllers: &str) -> Option<CgroupVersion> {
    let has = |list: &mut dyn Iterator<Item = &str>, wanted: &[&str]| {
        let list: Vec<&str> = list.collect();
        wanted.iter().all(|name| list.contains(name))
    };
    if has(&mut controllers.split_whitespace(), &["cpu", "cpuset", "io", "memory", "pids"]) {
        return Some(CgroupVersion::V2);
    }
    let mut v1 = mounts
        .lines()
        .filter_map(|line| {
            let fields: Vec<&str> = line.split(' ').collect();
            (*fields.get(2)? == "cgroup").then(|| fields.get(3).copied()).flatten()
        })
        .flat_map(|options| options.split(','));
    has(&mut v1, &["cpu", "cpuset", "blkio", "memory", "pids"]).then_some(CgroupVersion::V1)
}

fn parse_release(release: &str) -> (u32, u32) {
    let mut numbers =
        release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            root: true,
            kvm: Ok(()),
            any_kvm: true,
            vhost_net: true,
            systemd: true,
            cgroup: Some(CgroupVersion::V2),
            kernel: (6, 1),
        }
    }

    #[test]
    fn a_machine_that_has_it_all_is_used() {
        let needs = Needs { cgroup: Some(CgroupVersion::V2), kernel: Some(Kernel::V6_1), ..Needs::VM };
        assert_eq!(place(&needs, &machine(), Forced::No), Place::Native);
        assert!(matches!(place(&needs, &machine(), Forced::Emulated), Place::Emulated(..)));
    }

    #[test]
    fn what_is_missing_moves_the_case_or_fails_it() {
        let machine = Machine { kvm: Err("no kvm".to_owned()), ..machine() };
        let needs = Needs { cgroup: Some(CgroupVersion::V1), ..Needs::VM };
        let kind = Kind { kernel: Kernel::V6_1, cgroup: CgroupVersion::V1 };
        assert_eq!(place(&needs, &machine, Forced::No), Place::Emulated(kind, "no kvm".to_owned()));
        assert!(matches!(place(&needs, &machine, Forced::Native), Place::Nowhere(_)));
        assert_eq!(place(&Needs::NOTHING, &machine, Forced::No), Place::Native);
        let idle = Needs { idle_vm: true, ..Needs::NOTHING };
        assert_eq!(place(&idle, &machine, Forced::No), Place::Native);
        let without = Machine { any_kvm: false, ..machine };
        assert!(matches!(place(&idle, &without, Forced::No), Place::Emulated(..)));
    }

    #[test]
    fn kernels_are_told_apart() {
        let needs = Needs { kernel: Some(Kernel::V7), ..Needs::NOTHING };
        assert!(machine().lacks(&needs).is_some());
        assert!(Machine { kernel: (7, 3), ..machine() }.lacks(&needs).is_none());
        assert_eq!(parse_release("6.1.0-56-cloud-amd64"), (6, 1));
        let both = Needs { cgroup: Some(CgroupVersion::V1), ..needs };
        assert!(matches!(place(&both, &machine(), Forced::No), Place::Nowhere(_)));
    }

    #[test]
    fn cgroup_versions_are_told_apart() {
        let v2 = detect_cgroup("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0", "cpuset cpu io memory pids\n");
        assert_eq!(v2, Some(CgroupVersion::V2));
        let hybrid = "cgroup /sys/fs/cgroup/cpu,cpuacct cgroup rw,cpu,cpuacct 0 0\n\
                      cgroup /c cgroup rw,cpuset 0 0\ncgroup /b cgroup rw,blkio 0 0\n\
                      cgroup /m cgroup rw,memory 0 0\ncgroup /p cgroup rw,pids 0 0\n\
                      cgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(detect_cgroup(hybrid, ""), Some(CgroupVersion::V1));
        assert_eq!(detect_cgroup("cgroup2 /sys/fs/cgroup cgroup2 rw 0 0", "cpu"), None);
    }
}
