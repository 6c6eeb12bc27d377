//! ACPI tables of a hardware-reduced platform (ACPI 6.5 sections 3.11.1 and 5.2).
//!
//! The guest finds processors and the I/O APIC in the MADT, COM1, the keyboard and the virtio-mmio devices or
//! the PCI root bridge in the DSDT, and powers off and resets through three I/O ports named in the FADT: a byte register each, to be
//! answered by the VMM. There is no SCI, no PM timer, no CMOS clock, no mouse, no VGA.

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, ProcessorLocalApic};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

pub use crate::layout::MmioDevice;
use crate::layout::{ACPI, IOAPIC, LAPIC, Window};

mod dsdt;
mod pci;
#[cfg(test)]
mod tests;

/// I/O port of the sleep control register (ACPI 6.5 section 4.8.3.7): a byte. `SLP_EN`
/// (bit 5) with [`SLEEP_TYPE_S5`] in bits 2 to 4 switches the machine off.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
/// I/O port of the sleep status register: a byte that reads as 0; writes are ignored.
pub const SLEEP_STATUS_PORT: u16 = 0x601;
/// I/O port of the reset register: writing [`RESET_VALUE`] resets the machine.
pub const RESET_PORT: u16 = 0x602;
/// What a guest writes to [`RESET_PORT`].
pub const RESET_VALUE: u8 = 1;

/// `SLP_TYP` of the soft-off state, named by `\_S5` in the DSDT.
pub const SLEEP_TYPE_S5: u8 = 5;

const OEM_ID: [u8; 6] = *b"PINFLD";
const OEM_TABLE_ID: [u8; 8] = *b"PINFOLD ";
const OEM_REVISION: u32 = 1;

/// Length of the header that all tables but the RSDP share.
const SDT_HEADER: u32 = 36;

/// Tables start at multiples of this.
const ALIGNMENT: u64 = 16;

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    /// A device is not where 32-bit descriptors can say it is.
    #[error("the virtio-mmio device at {base:#x} does not lie below 4 GiB")]
    DeviceAddress {
        /// Its address.
        base: u64,
    },
    /// PCI has no addresses above 4 GiB, or more than there are.
    #[error("the PCI window of {size:#x} bytes at {start:#x} is no range of addresses")]
    PciWindow {
        /// Its first address.
        start: u64,
        /// Its length in bytes.
        size: u64,
    },
    /// There is no room for the tables.
    #[error("the ACPI tables need more than {} KiB: configure fewer devices", ACPI.size >> 10)]
    TooLarge,
    /// Guest memory could not be written.
    #[error("cannot write the ACPI tables to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// What the tables describe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// vCPUs that are there from the start; APIC ids count up from 0.
    pub cpus: u8,
    /// vCPUs that there may be, at least `cpus`: those behind `cpus` are listed as to be plugged in.
    pub max_cpus: u8,
    /// Virtio-mmio devices, in the order in which the guest is to find them.
    pub virtio_mmio: Vec<MmioDevice>,
    /// The PCI root bridge's window above 4 GiB; `None` without PCI.
    pub pci: Option<Window>,
}

/// Writes the tables to the start of [`ACPI`]; gives the address of the RSDP.
///
/// # Errors
/// A device lies above 4 GiB, the PCI window is empty or too long, the tables need too much room, or guest memory cannot be written.
pub fn write_tables(mem: &GuestMemoryMmap, platform: &Platform) -> Result<GuestAddress, AcpiError> {
    if let Some(Window { start, size }) = platform.pci
        && (size == 0 || start.0.checked_add(size).is_none())
    {
        return Err(AcpiError::PciWindow { start: start.0, size });
    }
    let rsdp = ACPI.start;
    let mut area = Area { mem, next: aligned(rsdp, Rsdp::len()) };
    let dsdt = area.add(&bytes(&dsdt::build(platform)?))?;
    let fadt = area.add(&bytes(&fadt(dsdt)))?;
    let madt = area.add(&bytes(&madt(platform)))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt.0);
    xsdt.add_entry(madt.0);
    if platform.pci.is_some() {
        xsdt.add_entry(area.add(&bytes(&pci::mcfg()))?.0);
    }
    let xsdt = area.add(&bytes(&xsdt))?;
    mem.write_slice(&bytes(&Rsdp::new(OEM_ID, xsdt.0)), rsdp).map_err(AcpiError::Write)?;
    Ok(rsdp)
}

/// Tables put one behind the other.
struct Area<'a> {
    mem: &'a GuestMemoryMmap,
    next: GuestAddress,
}

impl Area<'_> {
    fn add(&mut self, table: &[u8]) -> Result<GuestAddress, AcpiError> {
        let at = self.next;
        let next = aligned(at, table.len());
        if next > ACPI.end() {
            return Err(AcpiError::TooLarge);
        }
        self.mem.write_slice(table, at).map_err(AcpiError::Write)?;
        self.next = next;
        Ok(at)
    }
}

/// Where a table can start behind one of `len` bytes at `at`. `at` is within the ACPI area and a table is
/// in our memory, so this cannot overflow.
fn aligned(at: GuestAddress, len: usize) -> GuestAddress {
    GuestAddress((at.0 + len as u64).next_multiple_of(ALIGNMENT))
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

/// Fixed ACPI description table (section 5.2.9).
fn fadt(dsdt: GuestAddress) -> acpi_tables::fadt::FADT {
    // IA-PC boot architecture flags (section 5.2.9.3): a keyboard controller, no VGA, leave PCIe ASPM alone, no
    // CMOS clock. "Legacy devices" is not set since COM1 is in the DSDT.
    const HAS_8042: u16 = 1 << 1;
    const NO_VGA: u16 = 1 << 2;
    const NO_ASPM: u16 = 1 << 4;
    const NO_CMOS_CLOCK: u16 = 1 << 5;

    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, u64::from(port));
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt.0)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        // Set means that there is no such button in fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (HAS_8042 | NO_VGA | NO_ASPM | NO_CMOS_CLOCK).into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(*b"PINFOLD\0").into();
    fadt.finalize()
}

/// Multiple APIC description table (section 5.2.12). Written as plain bytes around acpi_tables' entries,
/// because its own header has the revision of ACPI 1.0, which knows no processors to be plugged in.
fn madt(platform: &Platform) -> Sdt {
    const REVISION: u8 = 5;
    /// Local APIC NMI for all processors on LINT1: type 4, length 6, flags "as the bus", pin 1.
    const NMI: [u8; 6] = [4, 6, 0xFF, 0, 0, 1];

    let mut madt = Sdt::new(*b"APIC", SDT_HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    madt.append_slice(&address_32(LAPIC.start).to_le_bytes());
    // Flags: no 8259s, see the layout's page. Interrupt source overrides are not needed: the DSDT says of the
    // keyboard's and COM1's lines that they are edge triggered and active high, as those of ISA are.
    madt.append_slice(&0_u32.to_le_bytes());
    for id in 0..platform.max_cpus.max(platform.cpus) {
        let status =
            if id < platform.cpus { EnabledStatus::Enabled } else { EnabledStatus::DisabledOnlineCapable };
        madt.append_slice(&bytes(&ProcessorLocalApic::new(id, id, status)));
    }
    madt.append_slice(&bytes(&IoApic::new(0, address_32(IOAPIC.start), 0)));
    madt.append_slice(&NMI);
    madt
}

/// An address that the layout keeps below 4 GiB.
fn address_32(address: GuestAddress) -> u32 {
    u32::try_from(address.0).unwrap_or(u32::MAX)
}
