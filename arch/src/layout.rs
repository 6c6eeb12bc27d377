//! The map of guest physical addresses, I/O ports and interrupt lines.
//!
//! | from | to (exclusive) | what |
//! | --- | --- | --- |
//! | `0x500` | `0x600` | boot GDT ([`GDT`]) |
//! | `0x7000` | `0x8000` | zero page, `struct boot_params` ([`ZERO_PAGE`]) |
//! | `0x8000` | `0x9000` | boot stack, growing down from its end ([`BOOT_STACK_TOP`]) |
//! | `0x9000` | `0xF000` | boot page tables: PML4, PDPT, four page directories ([`PML4`], ..) |
//! | `0x2_0000` | `0x2_0800` | kernel command line ([`CMDLINE`]) |
//! | `0x9_FC00` | `0xA_0000` | EBDA with the MP tables ([`EBDA`]) |
//! | `0xA_0000` | `0xE_0000` | nothing; reserved, where a PC has its VGA and option ROMs |
//! | `0xE_0000` | `0x10_0000` | ACPI tables, the RSDP first ([`ACPI`]) |
//! | `0x10_0000` | end of low RAM, at most `0xC000_0000` | RAM: kernel, initrd at the top ([`HIMEM`]) |
//! | `0xC000_0000` | `0xC000_1000` | boot timer, where Firecracker has it ([`BOOT_TIMER`]) |
//! | `0xC000_1000` | `0xC010_0000` | virtio-mmio, a page for each device ([`VIRTIO_MMIO`]) |
//! | `0xC010_0000` | `0xE000_0000` | 32-bit PCI memory ([`PCI_MMIO32`]) |
//! | `0xE000_0000` | `0xE010_0000` | PCI configuration space, ECAM ([`PCI_ECAM`]); more buses would follow |
//! | `0xFEC0_0000` | `0xFEC0_1000` | I/O APIC ([`IOAPIC`]) |
//! | `0xFEE0_0000` | `0xFEE0_1000` | local APIC ([`LAPIC`]) |
//! | `0xFFFB_C000` | `0xFFFC_0000` | KVM's identity map page and TSS ([`KVM_IDENTITY_MAP`], [`KVM_TSS`]) |
//! | `0x1_0000_0000` | end of high RAM | RAM that did not fit below ([`HIGH_RAM`]) |
//! | next GiB boundary | start of the 64-bit window | reserved: hotplugged memory ([`AddressMap::hotplug`]) |
//! | near the top of the physical space | | 64-bit PCI memory ([`AddressMap::mmio64`]) |
//!
//! I/O ports: COM1 `0x3F8` ([`COM1_PORT`]), i8042 `0x60` ([`I8042_DATA_PORT`]) and `0x64`
//! ([`I8042_COMMAND_PORT`]), ACPI sleep and reset `0x600` to
//! `0x602` ([`crate::acpi`]), and, with PCI, its configuration `0xCF8` to `0xCFF` ([`PCI_CONFIG_PORT`]) and what its
//! devices have, `0x1000` to `0x2FFF` ([`PCI_FIRST_PORT`], [`PCI_LAST_PORT`]).
//!
//! Interrupts: one I/O APIC with 24 pins, GSI n on pin n. Line 1 is the keyboard's, line 4 COM1's; line 8 is left
//! free because a guest that looks for a CMOS clock claims it for itself; line 9 is kept for a generic event
//! device; the other lines from 5 on are for devices ([`device_gsis`]). The 8259 that KVM creates with its I/O
//! APIC is not part of this platform: route GSIs to the I/O APIC only.

use vm_memory::GuestAddress;

#[cfg(test)]
mod tests;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Guest page size in bytes.
pub const PAGE_SIZE: u64 = 4 * KIB;

/// A range of guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// First address.
    pub start: GuestAddress,
    /// Length in bytes.
    pub size: u64,
}

impl Window {
    const fn new(start: u64, size: u64) -> Self {
        Self { start: GuestAddress(start), size }
    }

    /// The first address behind the window. No window ends beyond the physical space, so this cannot
    /// overflow for the windows of this module; for others it saturates.
    #[must_use]
    pub const fn end(&self) -> GuestAddress {
        GuestAddress(self.start.0.saturating_add(self.size))
    }

    /// The last address in the window, which is not empty.
    #[must_use]
    pub const fn last(&self) -> GuestAddress {
        GuestAddress(self.end().0.saturating_sub(1))
    }

    /// Whether `address` lies in the window.
    #[must_use]
    pub const fn contains(&self, address: GuestAddress) -> bool {
        address.0 >= self.start.0 && address.0 < self.end().0
    }
}

/// The GDT that the boot vCPU starts with.
pub const GDT: Window = Window::new(0x500, 0x100);
/// The zero page: `struct boot_params` (Linux x86 boot protocol, "The real-mode kernel header").
pub const ZERO_PAGE: GuestAddress = GuestAddress(0x7000);
/// First stack pointer of the boot vCPU; the stack grows down from here.
pub const BOOT_STACK_TOP: GuestAddress = GuestAddress(0x8FF0);
/// Boot page tables, level 4.
pub const PML4: GuestAddress = GuestAddress(0x9000);
/// Boot page tables, level 3.
pub const PDPT: GuestAddress = GuestAddress(0xA000);
/// Boot page tables, level 2: four pages, one for each GiB below 4 GiB.
pub const PAGE_DIRECTORIES: GuestAddress = GuestAddress(0xB000);
/// The kernel command line with its NUL.
pub const CMDLINE: Window = Window::new(0x2_0000, 2 * KIB);
/// The last KiB below 640 KiB, where guests look for the MP tables.
pub const EBDA: Window = Window::new(0x9_FC00, KIB);
/// ACPI tables; the RSDP is at the start, which is also where a guest without boot parameters scans.
pub const ACPI: Window = Window::new(0xE_0000, 128 * KIB);
/// Where RAM goes on behind the first megabyte's reserved areas; kernels are loaded from here on.
pub const HIMEM: GuestAddress = GuestAddress(MIB);

/// The boot timer's page, its register first. Guests made for Firecracker write to this address.
pub const BOOT_TIMER: Window = Window::new(0xC000_0000, PAGE_SIZE);
/// Virtio-mmio register windows: device n at `start + n * VIRTIO_MMIO_SIZE`.
pub const VIRTIO_MMIO: Window = Window::new(0xC000_1000, MIB - PAGE_SIZE);
/// Bytes of one virtio-mmio device's register window.
pub const VIRTIO_MMIO_SIZE: u64 = PAGE_SIZE;
/// PCI memory below 4 GiB.
pub const PCI_MMIO32: Window = Window::new(0xC010_0000, 0x1FF0_0000);
/// PCI buses that there are. A guest looks at every device number of each.
pub const PCI_BUSES: u8 = 1;
/// PCI configuration space: 1 MiB for each bus.
pub const PCI_ECAM: Window = Window::new(0xE000_0000, PCI_BUSES as u64 * MIB);
/// The I/O APIC, where KVM's in-kernel one is.
pub const IOAPIC: Window = Window::new(0xFEC0_0000, PAGE_SIZE);
/// The local APIC's reset address.
pub const LAPIC: Window = Window::new(0xFEE0_0000, PAGE_SIZE);
/// The page for KVM_SET_IDENTITY_MAP_ADDR (needed on Intel hosts).
pub const KVM_IDENTITY_MAP: Window = Window::new(0xFFFB_C000, PAGE_SIZE);
/// The three pages for KVM_SET_TSS_ADDR (needed on Intel hosts).
pub const KVM_TSS: Window = Window::new(0xFFFB_D000, 3 * PAGE_SIZE);

/// Low RAM ends here at the latest: the start of the 32-bit hole.
pub const LOW_RAM_LIMIT: GuestAddress = BOOT_TIMER.start;
/// Where RAM goes on that does not fit below the hole.
pub const HIGH_RAM: GuestAddress = GuestAddress(4 * GIB);

/// First I/O port of COM1, which has eight.
pub const COM1_PORT: u16 = 0x3F8;
/// First port of PCI's configuration address and data registers, four each; there only with PCI.
pub const PCI_CONFIG_PORT: u16 = 0xCF8;
/// First port for BARs of PCI devices: 256 for each device of a bus.
pub const PCI_FIRST_PORT: u16 = 0x1000;
/// The last of them.
pub const PCI_LAST_PORT: u16 = 0x2FFF;
/// The keyboard controller's data port.
pub const I8042_DATA_PORT: u16 = 0x60;
/// The keyboard controller's command and status port.
pub const I8042_COMMAND_PORT: u16 = 0x64;

/// Pins of the I/O APIC; GSI n is pin n.
pub const IOAPIC_PINS: u32 = 24;
/// Interrupt of the keyboard.
pub const I8042_GSI: u32 = 1;
/// Interrupt of COM1.
pub const COM1_GSI: u32 = 4;
/// Claimed by guests that find a CMOS clock; never given to a device.
pub const RTC_GSI: u32 = 8;
/// Kept for a generic event device (ACPI 6.5 section 5.6.9).
pub const GED_GSI: u32 = 9;
/// First interrupt line for devices.
pub const FIRST_DEVICE_GSI: u32 = 5;
/// Last interrupt line for devices.
pub const LAST_DEVICE_GSI: u32 = IOAPIC_PINS - 1;

/// Interrupt lines for devices, in the order to give them out: from [`FIRST_DEVICE_GSI`] to
/// [`LAST_DEVICE_GSI`] without the reserved ones.
pub fn device_gsis() -> impl Iterator<Item = u32> {
    (FIRST_DEVICE_GSI..=LAST_DEVICE_GSI).filter(|gsi| *gsi != RTC_GSI && *gsi != GED_GSI)
}

/// A virtio-mmio device as the guest is told of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioDevice {
    /// First address of its registers.
    pub base: GuestAddress,
    /// Bytes of its register window.
    pub size: u64,
    /// Its interrupt line: edge triggered, active high, not shared.
    pub gsi: u32,
}

/// The virtio-mmio register window of device `index`, counted from 0; `None` behind the last one.
#[must_use]
pub fn virtio_mmio_window(index: u64) -> Option<Window> {
    let window = Window {
        start: GuestAddress(VIRTIO_MMIO.start.0.checked_add(index.checked_mul(VIRTIO_MMIO_SIZE)?)?),
        size: VIRTIO_MMIO_SIZE,
    };
    VIRTIO_MMIO.contains(window.start).then_some(window)
}

/// Smallest guest memory in bytes: the first megabyte and something to put a guest in.
pub const MIN_MEMORY: u64 = 2 * MIB;

/// Physical address bits below which there is no room for the map.
const MIN_PHYSICAL_BITS: u8 = 36;
/// Physical address bits used at most: what four-level second-stage tables reach.
const MAX_PHYSICAL_BITS: u8 = 48;
/// From this many bits on the top of the space is left empty: AMD processors keep their last 12 GiB for
/// HyperTransport, and accesses there do not reach the hypervisor.
const HYPERTRANSPORT_BITS: u8 = 40;
const HYPERTRANSPORT_GAP: u64 = 16 * GIB;
/// The 64-bit PCI window is a quarter of the space, but no larger than this.
const MAX_MMIO64: u64 = 1 << 40;

/// A memory size that cannot be laid out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Less than [`MIN_MEMORY`].
    #[error("guest memory of {bytes} bytes is too small: give it at least {} MiB", MIN_MEMORY / MIB)]
    TooSmall {
        /// The size asked for.
        bytes: u64,
    },
    /// Not a whole number of pages.
    #[error("guest memory of {bytes} bytes is not a whole number of 4 KiB pages")]
    NotPages {
        /// The size asked for.
        bytes: u64,
    },
    /// More than the physical address space holds.
    #[error(
        "guest memory of {} MiB does not fit in {bits} bits of physical address: give it at most {} MiB",
        bytes / MIB,
        max / MIB
    )]
    TooLarge {
        /// The size asked for.
        bytes: u64,
        /// The largest size that fits.
        max: u64,
        /// Physical address bits used.
        bits: u8,
    },
    /// The host's physical address space is too small for the map.
    #[error("this machine has {bits} physical address bits; {MIN_PHYSICAL_BITS} are needed")]
    PhysicalBits {
        /// What the host has.
        bits: u8,
    },
}

/// Where this VM's memory is, from its size and the physical address bits of the machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressMap {
    /// Ranges of RAM with their sizes in bytes: low RAM from 0, then, if need be, high RAM.
    pub ram: Vec<(GuestAddress, usize)>,
    /// Reserved for memory that is plugged in later: from the next GiB boundary behind RAM (and behind
    /// 4 GiB) to the 64-bit window. Empty if memory takes all of it.
    pub hotplug: Window,
    /// PCI memory above 4 GiB.
    pub mmio64: Window,
}

impl AddressMap {
    /// Lays out `memory` bytes of RAM for a machine with `physical_bits` physical address bits (CPUID
    /// 0x8000_0008 EAX[7:0], see [`crate::cpuid::physical_address_bits`]).
    ///
    /// # Errors
    /// The size is too small, not a whole number of pages or too large, or there are too few address bits.
    pub fn new(memory: u64, physical_bits: u8) -> Result<Self, LayoutError> {
        if memory < MIN_MEMORY {
            return Err(LayoutError::TooSmall { bytes: memory });
        }
        if !memory.is_multiple_of(PAGE_SIZE) {
            return Err(LayoutError::NotPages { bytes: memory });
        }
        if physical_bits < MIN_PHYSICAL_BITS {
            return Err(LayoutError::PhysicalBits { bits: physical_bits });
        }
        let bits = physical_bits.min(MAX_PHYSICAL_BITS);
        let space = 1_u64 << bits;
        let gap = if bits >= HYPERTRANSPORT_BITS { HYPERTRANSPORT_GAP } else { 0 };
        let mmio64_size = MAX_MMIO64.min(space / 4);
        let mmio64 = Window::new(space - gap - mmio64_size, mmio64_size);

        let max = LOW_RAM_LIMIT.0 + (mmio64.start.0 - HIGH_RAM.0);
        let too_large = LayoutError::TooLarge { bytes: memory, max, bits };
        if memory > max {
            return Err(too_large);
        }
        let low = memory.min(LOW_RAM_LIMIT.0);
        let high = memory - low;
        let size = |bytes: u64| usize::try_from(bytes).map_err(|_| too_large.clone());
        let mut ram = vec![(GuestAddress(0), size(low)?)];
        if high > 0 {
            ram.push((HIGH_RAM, size(high)?));
        }
        let plug = (HIGH_RAM.0 + high).next_multiple_of(GIB).min(mmio64.start.0);
        Ok(Self { ram, hotplug: Window::new(plug, mmio64.start.0 - plug), mmio64 })
    }
}
