//! The VMMs and their command lines.

use super::figures::Group;
use crate::case::{Ctx, Failure};
use crate::lab::containers_of_record;
use serde_json::json;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The guest's memory where its start is measured, in MiB.
pub const SMALL_MIB: u64 = 256;
/// The guest's memory where it works: fio and its libraries are in it.
const WORKING_MIB: u64 = 512;

/// A VMM in one of its forms.
#[derive(Debug)]
pub struct Vmm {
    /// Its name on the command line and in tables.
    pub name: &'static str,
    family: Family,
    /// What it is measured in.
    pub groups: &'static [Group],
}

#[derive(Debug, Clone, Copy)]
enum Family {
    /// Pinfold with these differences from its defaults, placement apart.
    Pinfold {
        pci: bool,
        vhost: &'static str,
        io_engine: &'static str,
        placed: bool,
    },
    Qemu {
        machine: &'static str,
        bus: &'static str,
    },
    Firecracker {
        pci: bool,
    },
    CloudHypervisor,
}

const MMIO: Family = Family::Pinfold { pci: false, vhost: "auto", io_engine: "Sync", placed: false };
const PCI: Family = Family::Pinfold { pci: true, vhost: "auto", io_engine: "Sync", placed: false };

/// All of them, in the order in which they are measured and shown.
pub const ALL: &[Vmm] = &[
    Vmm { name: "pinfold", family: MMIO, groups: &Group::ALL },
    Vmm { name: "pinfold-pci", family: PCI, groups: &Group::ALL },
    Vmm {
        name: "pinfold-user",
        family: Family::Pinfold { pci: false, vhost: "off", io_engine: "Sync", placed: false },
        groups: &[Group::Net],
    },
    Vmm {
        name: "pinfold-pci-user",
        family: Family::Pinfold { pci: true, vhost: "off", io_engine: "Sync", placed: false },
        groups: &[Group::Net],
    },
    Vmm {
        name: "pinfold-async",
        family: Family::Pinfold { pci: false, vhost: "auto", io_engine: "Async", placed: false },
        groups: &[Group::Blk],
    },
    Vmm {
        name: "pinfold-pci-async",
        family: Family::Pinfold { pci: true, vhost: "auto", io_engine: "Async", placed: false },
        groups: &[Group::Blk],
    },
    Vmm {
        name: "pinfold-placed",
        family: Family::Pinfold { pci: false, vhost: "auto", io_engine: "Sync", placed: true },
        groups: &[Group::Boot],
    },
    Vmm { name: "firecracker", family: Family::Firecracker { pci: false }, groups: &Group::ALL },
    Vmm { name: "firecracker-pci", family: Family::Firecracker { pci: true }, groups: &Group::ALL },
    Vmm { name: "cloud-hypervisor", family: Family::CloudHypervisor, groups: &Group::ALL },
    Vmm {
        name: "qemu-microvm",
        family: Family::Qemu { machine: "microvm,rtc=off,pit=off,pic=off,isa-serial=on", bus: "device" },
        groups: &Group::ALL,
    },
    Vmm { name: "qemu-q35", family: Family::Qemu { machine: "q35", bus: "pci" }, groups: &Group::ALL },
];

/// Where things are in the measuring host.
pub struct Place<'a> {
    /// The job's files.
    pub ctx: &'a Ctx,
    /// The job's folder.
    pub job: &'a Path,
}

/// What a working guest gets beside its console.
#[derive(Debug, Clone)]
pub struct Devices {
    /// The disk's file.
    pub disk: PathBuf,
    /// The TAP's name.
    pub tap: String,
}

/// The guest's context id of vsock.
pub const CID: u32 = 3;

impl Vmm {
    /// Whether this is a form of ours.
    pub fn ours(&self) -> bool {
        self.name.starts_with("pinfold")
    }

    /// Whether vsock is the host kernel's, so that the guest's connections arrive at AF_VSOCK sockets.
    pub fn kernel_vsock(&self) -> bool {
        matches!(self.family, Family::Qemu { .. })
    }

    /// The API's socket speaks QEMU's protocol; else the path of its cheapest GET.
    pub fn api(&self) -> Option<&'static str> {
        match self.family {
            Family::Qemu { .. } => None,
            Family::CloudHypervisor => Some("/api/v1/vmm.ping"),
            _ => Some("/"),
        }
    }

    /// A VM with nothing but a console, whose start is measured.
    pub fn small(&self, place: &Place) -> Result<Command, Failure> {
        self.command(place, SMALL_MIB, &place.ctx.initramfs, None)
    }

    /// A VM with `devices`, vsock and the API, whose init has tools.
    pub fn working(&self, place: &Place, devices: &Devices) -> Result<Command, Failure> {
        self.command(place, WORKING_MIB, &place.job.join("tools"), Some(devices))
    }

    fn command(
        &self,
        place: &Place,
        mib: u64,
        initramfs: &Path,
        devices: Option<&Devices>,
    ) -> Result<Command, Failure> {
        let scratch = &place.ctx.scratch;
        for socket in [api_socket(scratch), vsock_socket(scratch)] {
            // Left by the one before.
            drop(std::fs::remove_file(socket));
        }
        match self.family {
            Family::Pinfold { pci, .. } => {
                let config = firecracker_config(self.family, place, mib, initramfs, devices);
                firecracker_command(&place.ctx.pinfold, pci, scratch, &config, devices.is_some())
            }
            Family::Firecracker { pci } => {
                let program = given(place, "firecracker", "PINFOLD_BENCH_FIRECRACKER")?;
                let config = firecracker_config(self.family, place, mib, initramfs, devices);
                firecracker_command(&program, pci, scratch, &config, devices.is_some())
            }
            Family::CloudHypervisor => {
                let program = given(place, "cloud-hypervisor", "PINFOLD_BENCH_CLOUD_HYPERVISOR")?;
                Ok(cloud_hypervisor(&program, place, mib, initramfs, devices))
            }
            Family::Qemu { machine, bus } => Ok(qemu(machine, bus, place, mib, initramfs, devices)),
        }
    }
}

/// The API's socket of a working VM.
pub fn api_socket(scratch: &Path) -> PathBuf {
    scratch.join("api.sock")
}

/// The unix socket that stands for vsock.
pub fn vsock_socket(scratch: &Path) -> PathBuf {
    scratch.join("vsock.sock")
}

/// The same for all; `reboot` and `panic` only matter when something goes wrong.
const ARGUMENTS: &str = "console=ttyS0 quiet reboot=k panic=-1";

fn given(place: &Place, name: &str, variable: &str) -> Result<PathBuf, Failure> {
    let program = place.job.join(name);
    if program.exists() { Ok(program) } else { Err(Failure(format!("{variable} names none"))) }
}

/// The configuration file of Pinfold or Firecracker.
fn firecracker_config(
    family: Family,
    place: &Place,
    mib: u64,
    initramfs: &Path,
    devices: Option<&Devices>,
) -> serde_json::Value {
    let mut config = json!({
        "boot-source": {
            "kernel_image_path": place.ctx.vmlinux, "initrd_path": initramfs, "boot_args": ARGUMENTS,
        },
        "drives": [],
        "machine-config": { "vcpu_count": 1, "mem_size_mib": mib },
    });
    if let Some(devices) = devices {
        config["drives"] = json!([{
            "drive_id": "data", "path_on_host": devices.disk, "is_root_device": false, "is_read_only": false,
        }]);
        config["network-interfaces"] =
            json!([{ "iface_id": "eth0", "host_dev_name": devices.tap, "guest_mac": "06:00:ac:1f:00:02" }]);
        config["vsock"] = json!({ "guest_cid": CID, "uds_path": vsock_socket(&place.ctx.scratch) });
    }
    if let Family::Pinfold { vhost, io_engine, placed, .. } = family {
        config["cgroup"] = if placed {
            json!({ "driver": "cgroupfs", "containers": containers_of_record() })
        } else {
            json!({ "driver": "none" })
        };
        if devices.is_some() {
            config["drives"][0]["io_engine"] = json!(io_engine);
            config["network-interfaces"][0]["vhost"] = json!(vhost);
        }
    }
    config
}

fn firecracker_command(
    program: &Path,
    pci: bool,
    scratch: &Path,
    config: &serde_json::Value,
    api: bool,
) -> Result<Command, Failure> {
    let file = scratch.join("vm.json");
    std::fs::write(&file, serde_json::to_vec(config)?)?;
    let mut command = Command::new(program);
    command.arg("--config-file").arg(file).args(["--id", "bench", "--level", "Error"]);
    if api {
        command.arg("--api-sock").arg(api_socket(scratch));
    } else {
        command.arg("--no-api");
    }
    if pci {
        command.arg("--enable-pci");
    }
    Ok(command)
}

fn cloud_hypervisor(
    program: &Path,
    place: &Place,
    mib: u64,
    initramfs: &Path,
    devices: Option<&Devices>,
) -> Command {
    let scratch = &place.ctx.scratch;
    let mut command = Command::new(program);
    command.arg("--kernel").arg(&place.ctx.vmlinux).arg("--initramfs").arg(initramfs);
    command.args(["--cmdline", ARGUMENTS, "--cpus", "boot=1", "--memory", &format!("size={mib}M")]);
    command.args(["--serial", "tty", "--console", "off"]);
    if let Some(devices) = devices {
        command.arg("--disk").arg(format!("path={}", devices.disk.display()));
        command.arg("--net").arg(format!("tap={},mac=06:00:ac:1f:00:02", devices.tap));
        command.arg("--vsock").arg(format!("cid={CID},socket={}", vsock_socket(scratch).display()));
        command.arg("--api-socket").arg(format!("path={}", api_socket(scratch).display()));
    }
    command
}

fn qemu(
    machine: &str,
    bus: &str,
    place: &Place,
    mib: u64,
    initramfs: &Path,
    devices: Option<&Devices>,
) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", machine, "-accel", "kvm", "-cpu", "host", "-smp", "1", "-m", &mib.to_string()]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
    // An ELF kernel is started by its PVH entry, without a real-mode part.
    command.arg("-kernel").arg(&place.ctx.vmlinux).arg("-initrd").arg(initramfs);
    command.args(["-append", ARGUMENTS]);
    if let Some(devices) = devices {
        command.args(["-object", "iothread,id=io"]);
        // tmpfs has no O_DIRECT in Linux 6.1, so the page cache is in the way of all VMMs alike.
        command.arg("-drive").arg(format!(
            "id=data,file={},format=raw,if=none,aio=io_uring,cache=writeback",
            devices.disk.display()
        ));
        command.arg("-device").arg(format!("virtio-blk-{bus},drive=data,iothread=io"));
        command
            .arg("-netdev")
            .arg(format!("tap,id=net,ifname={},script=no,downscript=no,vhost=on", devices.tap));
        let rom = if bus == "pci" { ",romfile=" } else { "" };
        command.arg("-device").arg(format!("virtio-net-{bus},netdev=net,mac=06:00:ac:1f:00:02{rom}"));
        command.arg("-device").arg(format!("vhost-vsock-{bus},guest-cid={CID}"));
        command
            .arg("-qmp")
            .arg(format!("unix:{},server=on,wait=off", api_socket(&place.ctx.scratch).display()));
    }
    command
}
