//! A microVM from its configuration to its end.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::devices::legacy::{ExitKind, ExitSignal};
use arch::acpi::{AcpiError, Platform};
use arch::boot_params::{BootInfo, BootParamsError};
use arch::cmdline::{CmdlineError, RootDrive};
use arch::cpuid::{CpuidError, Topology};
use arch::initrd::InitrdError;
use arch::kernel::{ImagePlacement, KernelError, LoadedKernel};
use arch::layout::{AddressMap, LayoutError, MmioDevice};
use arch::mptable::MpTableError;
use arch::msr::MsrError;
use arch::regs::RegsError;
use kvm_bindings::CpuId;
use kvm_ioctls::VcpuFd;
use resources::{ConfigError, MachineConfig, MicrovmConfig};
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::console::{Input, Output, RawTerminal};
use crate::devices::{DeviceError, Devices};
use crate::event_loop::{ConsoleInput, End, EventLoop, LoopError};
use crate::exit::{Code, Failure};
use crate::memory::{self, MemoryError};
use crate::placement::Placement;
use crate::signals::StopSignals;
use crate::vcpu::{Outside, VcpuError, Vcpus};
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
    #[error("boot-source.{field}: cannot open {path}", path = path.display())]
    Open {
        /// The field that names it.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What the host said.
        source: io::Error,
    },
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
    /// The vCPU threads.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The event loop.
    #[error(transparent)]
    Loop(#[from] LoopError),
    /// Standard input or output, or signals.
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

/// Builds the microVM, runs it to its end and takes it apart. The calling thread is in its cgroup, and so will
/// be every thread that is made here.
pub fn run(config: &MicrovmConfig, placement: &Placement) -> Result<Code, Failure> {
    // Before any thread is made, so that no thread takes these signals.
    let signals = StopSignals::block().map_err(|error| Failure::configuration(&io("signals")(error)))?;
    let exit = ExitSignal::new().map(Arc::new).map_err(|error| Failure::generic(&error))?;
    let mut machine = Machine::build(config, placement, signals, Arc::clone(&exit))
        .map_err(|error| Failure::configuration(&error))?;
    let end = machine.run().map_err(|error| Failure::generic(&error))?;
    drop(machine);
    match end {
        End::Guest(ExitKind::Error(message)) => Err(Failure { code: Code::Generic, message }),
        End::Guest(kind) => {
            log::info!("the guest ended: {kind:?}");
            Ok(Code::Ok)
        }
        End::Signal(libc::SIGHUP) => Ok(Code::Hangup),
        End::Signal(signal) => {
            log::info!("stopped by signal {signal}");
            Ok(Code::Ok)
        }
    }
}

/// A built microVM. The fields are dropped in this order: first nobody runs the guest, then nobody serves it,
/// then its memory goes.
struct Machine {
    vcpus: Vcpus,
    _terminal: RawTerminal,
    event_loop: EventLoop,
    _devices: Devices,
    _vm: Arc<Vm>,
    _memory: GuestMemoryAtomic<GuestMemoryMmap>,
}

impl Machine {
    fn build(
        config: &MicrovmConfig,
        placement: &Placement,
        signals: StopSignals,
        exit: Arc<ExitSignal>,
    ) -> Result<Self, MachineError> {
        let vcpu_count = config.machine_config.vcpu_count;
        let vm = Arc::new(Vm::new(vcpu_count)?);
        let cpuid = vm.supported_cpuid()?;
        // Checked to be below 2^64 with the configuration.
        let size = config.machine_config.mem_size().unwrap_or(u64::MAX);
        let map = AddressMap::new(size, arch::cpuid::physical_address_bits(&cpuid))?;
        let memory = memory::allocate(&map)?;
        vm.set_memory(&memory)?;
        let guest_memory = GuestMemoryAtomic::new(memory.clone());

        let mut event_loop = EventLoop::new(signals, Arc::clone(&exit))?;
        let output = Output::open().map_err(io("standard output"))?;
        let devices = Devices::attach(config, &vm, &guest_memory, &mut event_loop, output, &exit)?;
        let kernel = load_guest(config, &map, &memory, devices.virtio_mmio())?;

        let vcpus = create_vcpus(&vm, &cpuid, &config.machine_config, &kernel)?;
        let outside = Outside { pio: devices.pio(), mmio: devices.mmio(), exit };
        let vcpus = Vcpus::spawn(vcpus, &outside, &placement.vcpu_join())?;

        let input = Input::open().map_err(io("standard input"))?;
        let terminal = RawTerminal::enter().map_err(io("the terminal"))?;
        event_loop.add(ConsoleInput::new(input, devices.serial()));
        Ok(Self { vcpus, _terminal: terminal, event_loop, _devices: devices, _vm: vm, _memory: guest_memory })
    }

    /// Runs the guest until it ends or we are told to end.
    fn run(&mut self) -> Result<End, MachineError> {
        self.vcpus.run()?;
        let end = self.event_loop.run()?;
        // A vCPU that ended the guest is paused already; the others may be in the guest.
        self.vcpus.pause()?;
        Ok(end)
    }
}

fn open(field: &'static str, path: &Path) -> Result<File, MachineError> {
    File::open(path).map_err(|source| MachineError::Open { field, path: path.to_owned(), source })
}

/// Puts the kernel, the initrd and everything that describes the platform into guest memory.
fn load_guest(
    config: &MicrovmConfig,
    map: &AddressMap,
    memory: &GuestMemoryMmap,
    virtio_mmio: &[MmioDevice],
) -> Result<LoadedKernel, MachineError> {
    let source = config.check_bootable()?;
    // Mapping is right here: guest RAM is private anonymous memory, and no device takes pages away from it.
    let how = ImagePlacement::MapPrivate;
    let path = &source.kernel_image_path;
    let kernel = arch::kernel::load(memory, &open("kernel_image_path", path)?, how)
        .map_err(|source| MachineError::Kernel { path: path.clone(), source })?;
    let initrd = source.initrd_path.as_ref().map(|path| {
        arch::initrd::load(memory, &open("initrd_path", path)?, &kernel, how)
            .map_err(|source| MachineError::Initrd { path: path.clone(), source })
    });
    let initrd = initrd.transpose()?;
    let root = config
        .root_drive()
        .map(|(_, drive)| RootDrive { partuuid: drive.partuuid.as_deref(), read_only: drive.is_read_only });
    let cmdline = arch::cmdline::build(source.boot_args.as_deref(), root, virtio_mmio)?;
    let cpus = config.machine_config.vcpu_count;
    let platform = Platform { cpus, max_cpus: cpus, virtio_mmio: virtio_mmio.to_vec() };
    let rsdp = arch::acpi::write_tables(memory, &platform)?;
    arch::mptable::write(memory, cpus)?;
    arch::boot_params::write(memory, &BootInfo { map, kernel: &kernel, initrd, cmdline: &cmdline, rsdp })?;
    arch::regs::write_boot_tables(memory)?;
    Ok(kernel)
}

/// Makes the vCPUs, ready to start.
fn create_vcpus(
    vm: &Vm,
    supported: &CpuId,
    config: &MachineConfig,
    kernel: &LoadedKernel,
) -> Result<Vec<VcpuFd>, MachineError> {
    let topology = Topology::new(config.vcpu_count, config.smt)?;
    let mut vcpus = Vec::with_capacity(usize::from(config.vcpu_count));
    for index in 0..config.vcpu_count {
        let vcpu = vm.create_vcpu(index)?;
        let cpuid = arch::cpuid::for_vcpu(supported, topology, index)?;
        vcpu.set_cpuid2(&cpuid).map_err(|source| MachineError::SetCpuid { index, source })?;
        arch::msr::set_boot_msrs(&vcpu)?;
        vcpus.push(vcpu);
    }
    if let Some(boot) = vcpus.first_mut() {
        arch::regs::set_boot_state(boot, kernel.entry)?;
        crate::vm::start_kernel_workers(boot);
    }
    Ok(vcpus)
}
