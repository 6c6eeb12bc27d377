//! What hosts and guests are made of. A change here builds anew whatever it touches.

use crate::case::Kernel;
use std::hash::{DefaultHasher, Hash, Hasher};

/// A Debian release as mmdebstrap gets it.
pub struct Release {
    /// Part of the names of cached artefacts.
    pub name: &'static str,
    /// The suite that decides which release it is.
    pub suite: &'static str,
    /// More suites of the main archive.
    pub more: &'static [&'static str],
    /// The suite of the security archive.
    pub security: &'static str,
    /// The suite that the kernel comes from, when it is not simply the newest of the release.
    pub kernel_from: Option<&'static str>,
    /// Packages that only this host has, beside [`HOST_PACKAGES`].
    pub more_packages: &'static str,
}

/// Kernel 6.1, systemd 252: both cgroup versions.
const DEBIAN_12: Release = Release {
    name: "debian12",
    suite: "bookworm",
    more: &[],
    security: "bookworm-security",
    kernel_from: None,
    more_packages: "",
};

/// Kernel 7.x from backports, systemd 257: cgroup v2 alone.
const DEBIAN_13: Release = Release {
    name: "debian13-backports",
    suite: "trixie",
    more: &["trixie-backports"],
    security: "trixie-security",
    kernel_from: Some("trixie-backports"),
    more_packages: ",virtiofsd,qemu-utils,passt",
};

/// The release that brings `kernel`.
pub fn release(kernel: Kernel) -> &'static Release {
    match kernel {
        Kernel::V6_1 => &DEBIAN_12,
        Kernel::V7 => &DEBIAN_13,
    }
}

impl Release {
    /// Where the kernel comes from, for people.
    pub fn kernel_suite(&self) -> &'static str {
        self.kernel_from.unwrap_or(self.suite)
    }
}

/// The kernel package, and what a static busybox is in.
pub const KERNEL_PACKAGES: &str = "linux-image-cloud-amd64,busybox-static";

/// What the host's root file system holds beside Debian's essential packages.
pub const HOST_PACKAGES: &str = "systemd,systemd-sysv,udev,dbus,dbus-user-session,kmod,iproute2,iputils-ping,procps,util-linux,curl,busybox-static";

/// What the bench's host holds beside: the peer that Debian has, and what loads networks and disks.
pub const BENCH_PACKAGES: &str = "qemu-system-x86,iperf3,fio";

/// What the bench's guests run, from the same packages, with all libraries.
pub const BENCH_TOOLS: [&str; 2] = ["/usr/bin/iperf3", "/usr/bin/fio"];

/// Left out of the root file system: nobody reads it there.
pub const LEFT_OUT: [&str; 4] =
    ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];

/// Units that only cost time or noise in a host without a network or a user.
pub const MASKED_UNITS: [&str; 10] = [
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-timesyncd.service",
    "systemd-networkd.service",
    "systemd-random-seed.service",
    "systemd-update-utmp.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
];

/// Modules with which the host finds its root disk; ext4 is built in.
pub const HOST_INITRD_MODULES: [&str; 2] = ["virtio_pci", "virtio_blk"];

/// Modules of the guests. Init leaves those of file systems to the step that mounts one.
pub const GUEST_MODULES: [&str; 9] = [
    "virtio_ring",
    "virtio_mmio",
    "virtio_pci",
    "virtio_blk",
    "virtio_net",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
    "virtio_balloon",
    "virtiofs",
];

/// Modules of the bench's guests: also those for the platforms of other VMMs.
pub const BENCH_GUEST_MODULES: [&str; 6] =
    ["virtio_ring", "virtio_mmio", "virtio_pci", "virtio_blk", "virtio_net", "vmw_vsock_virtio_transport"];

/// Init of the guests.
pub const GUEST_INIT: &str = include_str!("../../guest/init");
/// Init of the bench's guests.
pub const BENCH_INIT: &str = include_str!("../../guest/bench-init");
/// Init of the host's own small initrd.
pub const HOST_INITRD_INIT: &str = include_str!("../../host/initrd-init");
/// The unit that runs the agent.
pub const AGENT_UNIT: &str = include_str!("../../host/pinfold-agent.service");
/// What the unit starts.
pub const START_JOB: &str = include_str!("../../host/start-job");

/// Raised by hand when the code of [`super::image`] or [`super::guest`] makes something else of the same parts.
const EDITION: u32 = 2;

/// A name for what comes of `parts`. The hash need not be stable across compilers: another one only rebuilds.
pub fn digest(parts: &[&str]) -> String {
    let mut hasher = DefaultHasher::new();
    EDITION.hash(&mut hasher);
    parts.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
