//! The emulated hosts are what the other cases take them for.

use crate::case::{Case, CgroupVersion, Ctx, Failure, Kernel, Needs};
use crate::check;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::Path;

/// The cases of this file.
pub const CASES: &[Case] = &[
    Case {
        name: "host_selfcheck_v2",
        needs: Needs {
            cgroup: Some(CgroupVersion::V2),
            kernel: Some(Kernel::V6_1),
            systemd: true,
            ..Needs::VM
        },
        timeout: Case::TIMEOUT,
        run: |ctx| common(ctx).and_then(|()| unified()),
    },
    Case {
        name: "host_selfcheck_v1",
        needs: Needs {
            cgroup: Some(CgroupVersion::V1),
            kernel: Some(Kernel::V6_1),
            systemd: true,
            ..Needs::VM
        },
        timeout: Case::TIMEOUT,
        run: |ctx| common(ctx).and_then(|()| separate()),
    },
    Case {
        name: "host_selfcheck_v2_7x",
        needs: Needs {
            cgroup: Some(CgroupVersion::V2),
            kernel: Some(Kernel::V7),
            systemd: true,
            ..Needs::VM
        },
        timeout: Case::TIMEOUT,
        run: |ctx| common(ctx).and_then(|()| unified()),
    },
];

/// `_IO(KVMIO, 0x00)` (Documentation/virt/kvm/api.rst, 4.1).
const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;

fn common(ctx: &Ctx) -> Result<(), Failure> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("kernel {}", release.trim());
    let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
    // SAFETY: this ioctl takes no argument and touches no memory of ours.
    let version = unsafe { libc::ioctl(kvm.as_raw_fd(), KVM_GET_API_VERSION, 0) };
    check!(version == 12, "KVM's API version is {version}, not 12");
    check!(
        ["kvm_amd", "kvm_intel"].iter().any(|name| Path::new("/sys/module").join(name).exists()),
        "neither kvm_amd nor kvm_intel is loaded"
    );
    for device in ["/dev/vhost-net", "/dev/net/tun"] {
        File::options().read(true).write(true).open(device)?;
    }
    for file in [&ctx.pinfold, &ctx.vmlinux, &ctx.bzimage, &ctx.initramfs] {
        check!(file.metadata()?.len() > 0, "{} is empty", file.display());
    }
    check!(fs::read_link("/proc/1/exe")?.ends_with("systemd"), "process 1 is not systemd");
    if let Some(disk) = &ctx.scratch_disk {
        File::options().read(true).write(true).open(disk)?;
    }
    Ok(())
}

fn unified() -> Result<(), Failure> {
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers")?;
    println!("controllers {}", controllers.trim());
    for name in ["cpu", "cpuset", "io", "memory", "pids"] {
        check!(controllers.split_whitespace().any(|found| found == name), "no controller {name}");
    }
    Ok(())
}

fn separate() -> Result<(), Failure> {
    for (hierarchy, file) in [
        ("cpu", "cpu.cfs_quota_us"),
        ("cpuacct", "cpuacct.usage"),
        ("cpuset", "cpuset.cpus"),
        ("memory", "memory.use_hierarchy"),
        ("blkio", "blkio.throttle.io_serviced"),
        ("pids", "cgroup.procs"),
    ] {
        let place = Path::new("/sys/fs/cgroup").join(hierarchy);
        check!(place.join(file).exists(), "{} does not exist", place.join(file).display());
    }
    check!(!Path::new("/sys/fs/cgroup/unified").exists(), "a unified hierarchy is mounted too");
    Ok(())
}
