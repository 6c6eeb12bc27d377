//! The KVM virtual machine: its file, its memory slots and its interrupt controllers.

use devices::pci::msix::Message;
use kvm_bindings::{
    CpuId, KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC,
    KVM_MAX_CPUID_ENTRIES, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// KVM's API version; it has not changed since 2007.
const KVM_API_VERSION: i32 = 12;

/// What KVM must be able to do.
const REQUIRED: [(Cap, &str); 8] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Why the virtual machine could not be made.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// There is no usable KVM.
    #[error("cannot open /dev/kvm (is the kvm_intel or kvm_amd module loaded, and may we open it?)")]
    Open(#[source] kvm_ioctls::Error),
    /// Not the API that we speak.
    #[error("/dev/kvm speaks API version {0}, not {KVM_API_VERSION}")]
    Version(i32),
    /// KVM lacks something that we need.
    #[error("this host's KVM lacks {0}")]
    Lacks(&'static str),
    /// More vCPUs than the host's KVM allows.
    #[error("machine-config.vcpu_count: this host's KVM allows {0} vCPUs at most")]
    TooManyVcpus(usize),
    /// More memory than KVM takes.
    #[error(
        "machine-config.mem_size_mib: KVM refused {mib} MiB of guest memory in one piece \
         (KVM_SET_USER_MEMORY_REGION); give less"
    )]
    Memory {
        /// Size of the piece.
        mib: u64,
        /// What the host said.
        source: kvm_ioctls::Error,
    },
    /// A call failed.
    #[error("KVM refused {doing}")]
    Kvm {
        /// The ioctl and what it was for.
        doing: &'static str,
        /// What the host said.
        source: kvm_ioctls::Error,
    },
}

fn kvm(doing: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> VmError {
    move |source| VmError::Kvm { doing, source }
}

/// A virtual machine without vCPUs.
pub struct Vm {
    kvm: Kvm,
    fd: VmFd,
}

impl Vm {
    /// Makes a virtual machine with in-kernel interrupt controllers and no PIT: the PIT's kernel thread would
    /// stay in the root cgroup for ever.
    pub fn new(vcpu_count: u8) -> Result<Self, VmError> {
        let kvm = Kvm::new().map_err(VmError::Open)?;
        let version = kvm.get_api_version();
        if version != KVM_API_VERSION {
            return Err(VmError::Version(version));
        }
        if let Some((_, name)) = REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            return Err(VmError::Lacks(name));
        }
        if usize::from(vcpu_count) > kvm.get_max_vcpus() {
            return Err(VmError::TooManyVcpus(kvm.get_max_vcpus()));
        }
        let fd = loop {
            // KVM_CREATE_VM gives up when a signal arrives.
            match kvm.create_vm() {
                Err(error) if error.errno() == libc::EINTR => continue,
                result => break result.map_err(self::kvm("KVM_CREATE_VM"))?,
            }
        };
        fd.set_identity_map_address(arch::layout::KVM_IDENTITY_MAP.start.0)
            .map_err(self::kvm("KVM_SET_IDENTITY_MAP_ADDR"))?;
        let tss = usize::try_from(arch::layout::KVM_TSS.start.0).unwrap_or(usize::MAX);
        fd.set_tss_address(tss).map_err(self::kvm("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(self::kvm("KVM_CREATE_IRQCHIP"))?;
        let vm = Self { kvm, fd };
        vm.route_messages([]).map_err(self::kvm("KVM_SET_GSI_ROUTING"))?;
        Ok(vm)
    }

    /// Checks for what PCI devices need of KVM.
    pub fn check_pci(&self) -> Result<(), VmError> {
        match self.kvm.check_extension_raw(KVM_CAP_IOEVENTFD_ANY_LENGTH.into()) {
            1.. => Ok(()),
            _ => Err(VmError::Lacks("KVM_CAP_IOEVENTFD_ANY_LENGTH, which devices on PCI need")),
        }
    }

    /// How many interrupts KVM can route.
    pub fn max_routes(&self) -> usize {
        usize::try_from(self.kvm.check_extension_int(Cap::IrqRouting)).unwrap_or(0)
    }

    /// Routes interrupts: every GSI below 24 to the IOAPIC's pin of that number, and these to their messages. KVM's
    /// own routes lead the first 16 to the two 8259s as well, which are no part of the platform that the guest is
    /// told of.
    pub fn route_messages(
        &self,
        messages: impl IntoIterator<Item = (u32, Message)>,
    ) -> Result<(), kvm_ioctls::Error> {
        let pins = (0..arch::layout::IOAPIC_PINS).map(|pin| {
            let mut entry =
                kvm_irq_routing_entry { gsi: pin, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
            entry.u.irqchip = kvm_irq_routing_irqchip { irqchip: KVM_IRQCHIP_IOAPIC, pin };
            entry
        });
        let messages = messages.into_iter().map(|(gsi, Message { address, data })| {
            let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
            let [a, b, c, d, e, f, g, h] = address.to_le_bytes();
            entry.u.msi = kvm_irq_routing_msi {
                address_lo: u32::from_le_bytes([a, b, c, d]),
                address_hi: u32::from_le_bytes([e, f, g, h]),
                data,
                ..Default::default()
            };
            entry
        });
        let entries: Vec<_> = pins.chain(messages).collect();
        let too_many = |_| kvm_ioctls::Error::new(libc::E2BIG);
        self.fd.set_gsi_routing(&KvmIrqRouting::from_entries(&entries).map_err(too_many)?)
    }

    /// The file of the virtual machine, for irqfds and ioeventfds.
    pub fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// The host's KVM.
    pub fn kvm(&self) -> &Kvm {
        &self.kvm
    }

    /// Every CPUID leaf that KVM can offer on this host.
    pub fn supported_cpuid(&self) -> Result<CpuId, VmError> {
        self.kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(kvm("KVM_GET_SUPPORTED_CPUID"))
    }

    /// Gives the guest its memory, a slot for each region. `memory` must stay mapped while the VM lives: the
    /// owner keeps both in one struct, the VM first.
    pub fn set_memory(&self, memory: &GuestMemoryMmap) -> Result<(), VmError> {
        for (slot, region) in (0..).zip(memory.iter()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            // SAFETY: the range is a mapping of `memory`, which outlives the VM, and overlaps no other slot.
            unsafe { self.fd.set_user_memory_region(region) }
                .map_err(|source| VmError::Memory { mib: region.memory_size >> 20, source })?;
        }
        Ok(())
    }

    /// Makes a vCPU, whose id is its APIC id.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, VmError> {
        self.fd.create_vcpu(u64::from(index)).map_err(kvm("KVM_CREATE_VCPU"))
    }
}

/// From Linux 6.12 on KVM starts its worker that recovers huge pages at a VM's first KVM_RUN. It inherits the
/// cgroup of the thread that causes it, so the calling thread runs `vcpu` for no time at all. Older kernels made
/// the worker with the VM, and would wait for a grace period when the vCPU then moves to its own thread.
pub fn start_kernel_workers(vcpu: &mut VcpuFd) {
    // In a jail there is no /proc to ask.
    if kernel_version(&rustix::system::uname().release().to_string_lossy()) < (6, 12) {
        return;
    }
    vcpu.set_kvm_immediate_exit(1);
    match vcpu.run() {
        Err(error) if error.errno() == libc::EINTR => {}
        other => log::warn!("a KVM_RUN that should have returned at once gave {other:?}"),
    }
    vcpu.set_kvm_immediate_exit(0);
}

/// Major and minor number of a kernel release such as `6.12.3-cloud`; zeros if it is of another form.
fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|number| number.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_releases_are_compared_by_number() {
        assert_eq!(kernel_version("6.1.0-48-cloud-amd64\n"), (6, 1));
        assert_eq!(kernel_version("7.3.2+deb13-cloud-amd64"), (7, 3));
        assert_eq!(kernel_version("6.12"), (6, 12));
        assert_eq!(kernel_version("unknown"), (0, 0));
        assert!((6, 9) < (6, 12));
    }
}
