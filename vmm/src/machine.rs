//! A microVM from its configuration to its end.

use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use ::devices::legacy::{ExitSignal, Timestamp};
use ::devices::mmds::Mmds;
use arch::acpi::{AcpiError, Platform};
use arch::boot_params::{BootInfo, BootParamsError};
use arch::cmdline::{CmdlineError, RootDrive};
use arch::cpuid::{CpuidError, Topology};
use arch::initrd::InitrdError;
use arch::kernel::{ImagePlacement, KernelError, LoadedKernel};
use arch::layout::{AddressMap, LayoutError, MmioDevice, Window};
use arch::mptable::MpTableError;
use arch::msr::MsrError;
use arch::regs::RegsError;
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use resources::{ConfigError, InstanceId, MachineConfig, MicrovmConfig};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::console::{self, Input, Output, RawTerminal};
use crate::cpu_template::{self, TemplateError};
use crate::devices::{Board, DeviceError, Devices};
use crate::event_loop::{ConsoleInput, EventLoop};
use crate::exit::chain;
use crate::files::{self, Kind, OpenError};
use crate::footprint;
use crate::io_thread::{IoThread, IoThreadError};
use crate::memory::{self, MemoryError, Sharing};
use crate::placement::Placement;
use crate::seccomp::{Filters, Role, SeccompError};
use crate::vcpu::{Enter, Outside, VcpuError, Vcpus};
use crate::virtiofsd;
use crate::vm::{Vm, VmError};

/// Why a microVM could not be built or started. Each text names the field or the file.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// The memory's size.
    #[error("machine-config.mem_size_mib")]
    Layout(#[from] LayoutError),
    /// The memory itself.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The devices.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A file that the guest boots from.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The kernel.
    #[error("boot-source.kernel_image_path: {path}", path = path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: KernelError,
    },
    /// The initrd.
    #[error("boot-source.initrd_path: {path}", path = path.display())]
    Initrd {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: InitrdError,
    },
    /// The kernel's arguments.
    #[error("boot-source.boot_args")]
    Cmdline(#[from] CmdlineError),
    /// The zero page.
    #[error(transparent)]
    BootParams(#[from] BootParamsError),
    /// The ACPI tables.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The MP tables.
    #[error(transparent)]
    MpTable(#[from] MpTableError),
    /// What CPUID says.
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    /// A vCPU's registers.
    #[error(transparent)]
    Msr(#[from] MsrError),
    /// A vCPU's registers.
    #[error(transparent)]
    Regs(#[from] RegsError),
    /// A vCPU's CPUID.
    #[error("KVM refused KVM_SET_CPUID2 for vCPU {index}")]
    SetCpuid {
        /// Which one.
        index: u8,
        /// What the host said.
        source: kvm_ioctls::Error,
    },
    /// The CPU template.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The threads of devices.
    #[error(transparent)]
    IoThread(#[from] IoThreadError),
    /// The main thread's filter.
    #[error(transparent)]
    Seccomp(#[from] SeccompError),
    /// Standard input or output.
    #[error("cannot set up {what}")]
    Io {
        /// What.
        what: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

fn io(what: &'static str) -> impl FnOnce(io::Error) -> MachineError {
    move |source| MachineError::Io { what, source }
}

/// What beside the declared microVM decides how it is built.
#[derive(Clone, Debug)]
pub struct Options {
    /// Its name.
    pub id: InstanceId,
    /// Whether the guest can say that it has booted.
    pub boot_timer: bool,
    /// Whether devices are on PCI even if the configuration does not say so.
    pub enable_pci: bool,
    /// What threads may ask of the kernel.
    pub filters: Filters,
}

/// A built microVM. The fields are dropped in this order: first nobody runs the guest, then no device touches its
/// memory, then their threads end, then the memory goes.
pub struct Machine {
    vcpus: Vcpus,
    paused: bool,
    _terminal: RawTerminal,
    devices: Devices,
    _io_threads: Vec<IoThread>,
    _vm: Arc<Vm>,
    _memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl Machine {
    /// Builds the microVM and runs it. The calling thread is in its cgroup, and so will be every thread that is
    /// made here. `event_loop` serves its devices, also after the machine was dropped: they are at rest then.
    pub fn build(
        options: &Options,
        config: &MicrovmConfig,
        mmds: &Arc<Mutex<Mmds>>,
        placement: &Placement,
        event_loop: &mut EventLoop,
        exit: &Arc<ExitSignal>,
    ) -> Result<Self, MachineError> {
        let boot_timer = options.boot_timer.then(Timestamp::now);
        config.check_bootable()?;
        let vcpu_count = config.machine_config.vcpu_count;
        let vm = Arc::new(Vm::new(vcpu_count)?);
        let cpuid = vm.supported_cpuid()?;
        // Checked to be below 2^64 with the configuration.
        let size = config.machine_config.mem_size().unwrap_or(u64::MAX);
        let map = AddressMap::new(size, arch::cpuid::physical_address_bits(&cpuid))?;
        let sharing = if config.needs_shared_memory() { Sharing::Shared } else { Sharing::Private };
        let memory = memory::allocate(&map, sharing)?;
        vm.set_memory(&memory)?;
        let guest_memory = GuestMemoryAtomic::new(memory.clone());

        let output = Output::open().map_err(io("standard output"))?;
        let pci = (options.enable_pci || config.machine_config.pci).then_some(map.mmio64);
        let board = Board { boot_timer, pci };
        let (devices, workers) = Devices::attach(config, &vm, &guest_memory, output, mmds, board, exit)?;
        let kernel = load_guest(config, &map, &memory, devices.virtio_mmio(), pci)?;

        let vcpus = create_vcpus(&vm, &cpuid, config, &kernel)?;
        let outside = Outside { pio: devices.pio(), mmio: devices.mmio(), exit: Arc::clone(exit) };
        let (join, filters) = (placement.vcpu_join(), options.filters.clone());
        let enter: Enter = Arc::new(move || {
            join()?;
            filters.install(Role::Vcpu).map_err(|error| chain(&error))
        });
        let vcpus = Vcpus::spawn(vcpus, &outside, &enter)?;

        let (mut io_threads, mut on_loop) = (Vec::new(), Vec::new());
        for (worker, thread) in workers {
            match thread {
                Some(id) => io_threads.push(IoThread::spawn(&id, worker, &options.filters)?),
                None => on_loop.push(worker),
            }
        }
        let input = Input::open().map_err(io("standard input"))?;
        let terminal = RawTerminal::enter().map_err(io("the terminal"))?;
        virtiofsd::settle();
        // The last thing before there is a guest. If that does not run, nothing else that was built can be used either.
        options.filters.install(Role::Main)?;
        vcpus.run()?;
        devices.settle();
        on_loop.into_iter().for_each(|worker| event_loop.add(worker));
        if console::in_foreground() {
            event_loop.add(ConsoleInput::new(input, devices.serial()));
        }
        footprint::forget_code();
        log::info!("microVM \"{}\" runs", options.id);
        Ok(Self {
            vcpus,
            paused: false,
            _terminal: terminal,
            devices,
            _io_threads: io_threads,
            _vm: vm,
            _memory: guest_memory,
        })
    }

    /// Stops all vCPUs. On return none runs. Does nothing when they are stopped.
    pub fn pause(&mut self) -> Result<(), MachineError> {
        self.vcpus.pause()?;
        self.paused = true;
        Ok(())
    }

    /// Lets all vCPUs run. Does nothing when they do.
    pub fn resume(&mut self) -> Result<(), MachineError> {
        self.vcpus.run()?;
        self.paused = false;
        Ok(())
    }

    /// Whether the vCPUs are stopped.
    pub fn is_paused(&self) -> bool {
        self.paused
    }

    /// The devices.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }
}

/// Puts the kernel, the initrd and everything that describes the platform into guest memory.
fn load_guest(
    config: &MicrovmConfig,
    map: &AddressMap,
    memory: &GuestMemoryMmap,
    virtio_mmio: &[MmioDevice],
    pci: Option<Window>,
) -> Result<LoadedKernel, MachineError> {
    let source = config.check_bootable()?;
    // In private memory mapping is right, unless a balloon takes pages away from it: those of a file would come back
    // with the file's contents. Others would not see what is mapped. And where the host gives huge pages unasked a copy
    // is the cheaper one: a Linux guest writes to most pages of its kernel while it boots, and each 4 KiB of a mapped
    // file is up to three exits, while 2 MiB of memory are one.
    let how = match config.balloon.is_some() || config.needs_shared_memory() || memory::has_huge_pages() {
        false => ImagePlacement::MapPrivate,
        true => ImagePlacement::Copy,
    };
    let path = &source.kernel_image_path;
    let kernel =
        arch::kernel::load(memory, &files::open("boot-source.kernel_image_path", path, Kind::File)?, how)
            .map_err(|source| MachineError::Kernel { path: path.clone(), source })?;
    let initrd = source.initrd_path.as_ref().map(|path| {
        arch::initrd::load(memory, &files::open("boot-source.initrd_path", path, Kind::File)?, &kernel, how)
            .map_err(|source| MachineError::Initrd { path: path.clone(), source })
    });
    let initrd = initrd.transpose()?;
    let root = config
        .root_drive()
        .map(|(_, drive)| RootDrive { partuuid: drive.partuuid.as_deref(), read_only: drive.is_read_only });
    if pci.is_some() && source.boot_args.as_deref().is_some_and(arch::cmdline::hides_pci) {
        log::warn!(
            "boot-source.boot_args hold pci=off: the guest will find no devices, since they are on PCI"
        );
    }
    let cmdline =
        arch::cmdline::build(source.boot_args.as_deref(), root, pci.is_none().then_some(virtio_mmio))?;
    let cpus = config.machine_config.vcpu_count;
    let platform = Platform { cpus, max_cpus: cpus, virtio_mmio: virtio_mmio.to_vec(), pci };
    let rsdp = arch::acpi::write_tables(memory, &platform)?;
    arch::mptable::write(memory, cpus)?;
    let boot = BootInfo { map, kernel: &kernel, initrd, cmdline: &cmdline, rsdp, pci: pci.is_some() };
    arch::boot_params::write(memory, &boot)?;
    arch::regs::write_boot_tables(memory)?;
    Ok(kernel)
}

/// Makes the vCPUs, ready to start.
fn create_vcpus(
    vm: &Vm,
    supported: &CpuId,
    config: &MicrovmConfig,
    kernel: &LoadedKernel,
) -> Result<Vec<VcpuFd>, MachineError> {
    let MachineConfig { vcpu_count, smt, .. } = config.machine_config;
    let template = config.cpu_config.clone().unwrap_or_default();
    cpu_template::check_capabilities(&template, vm.kvm())?;
    let topology = Topology::new(vcpu_count, smt)?;
    let mut vcpus = Vec::with_capacity(usize::from(vcpu_count));
    for index in 0..vcpu_count {
        let vcpu = vm.create_vcpu(index)?;
        let mut cpuid = arch::cpuid::for_vcpu(supported, topology, index)?;
        cpu_template::apply_cpuid(&template, &mut cpuid)?;
        vcpu.set_cpuid2(&cpuid).map_err(|source| MachineError::SetCpuid { index, source })?;
        arch::msr::set_boot_msrs(&vcpu)?;
        cpu_template::apply_msrs(&template, &vcpu)?;
        vcpus.push(vcpu);
    }
    if let Some(boot) = vcpus.first_mut() {
        arch::regs::set_boot_state(boot, kernel.entry)?;
        crate::vm::start_kernel_workers(boot);
    }
    Ok(vcpus)
}
