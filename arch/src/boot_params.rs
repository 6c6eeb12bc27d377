//! The zero page: what the kernel reads first (Linux Documentation/arch/x86/zero-page.rst, boot.rst).

use linux_loader::bootparam::{LOADED_HIGH, boot_e820_entry, boot_params, setup_header};
use linux_loader::cmdline::Cmdline;
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::load_cmdline;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use crate::cmdline::MAX_SIZE;
use crate::initrd::LoadedInitrd;
use crate::kernel::LoadedKernel;
use crate::layout::{ACPI, AddressMap, CMDLINE, EBDA, HIMEM, PCI_ECAM, ZERO_PAGE};

#[cfg(test)]
mod tests;

/// `E820_TYPE_RAM`
const E820_RAM: u32 = 1;
/// `E820_TYPE_RESERVED`
const E820_RESERVED: u32 = 2;
/// `E820_TYPE_ACPI`: tables that may be reused once read.
const E820_ACPI: u32 = 3;

/// "HdrS", which the kernel checks for.
const HEADER_MAGIC: u32 = 0x5372_6448;
const BOOT_FLAG: u16 = 0xAA55;
/// The protocol that we speak to an ELF kernel, which has no header to tell its own.
const PROTOCOL: u16 = 0x020F;
/// `type_of_loader`: a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xFF;
/// `vid_mode`: what the "normal" of the VGA would be.
const VIDEO_NORMAL: u16 = 0xFFFF;
/// `kernel_alignment` of an ELF kernel.
const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

/// Why the zero page could not be written.
#[derive(Debug, thiserror::Error)]
pub enum BootParamsError {
    /// The kernel takes shorter command lines.
    #[error("the kernel command line has {len} characters; this kernel takes at most {max}")]
    CmdlineTooLong {
        /// Characters given.
        len: usize,
        /// Characters that the setup header allows.
        max: u32,
    },
    /// The command line could not be written.
    #[error("cannot write the kernel command line to guest memory")]
    Cmdline(#[source] linux_loader::loader::Error),
    /// The command line cannot be written down.
    #[error("the kernel command line is not valid")]
    InvalidCmdline(#[source] linux_loader::cmdline::Error),
    /// The zero page could not be written.
    #[error("cannot write the zero page to guest memory")]
    ZeroPage(#[source] linux_loader::configurator::Error),
}

/// What the zero page tells the kernel.
#[derive(Debug, Clone, Copy)]
pub struct BootInfo<'a> {
    /// Where RAM is.
    pub map: &'a AddressMap,
    /// The kernel, for its setup header.
    pub kernel: &'a LoadedKernel,
    /// The initrd, if there is one.
    pub initrd: Option<LoadedInitrd>,
    /// The command line; it is written to [`CMDLINE`].
    pub cmdline: &'a Cmdline,
    /// The ACPI tables, from [`crate::acpi::write_tables`].
    pub rsdp: GuestAddress,
    /// Whether there is PCI: its configuration space is then reserved, so that the guest may use it there.
    pub pci: bool,
}

/// Writes the command line and the zero page to guest memory.
///
/// # Errors
/// The command line is longer than the kernel takes, or guest memory has no room for them.
pub fn write(mem: &GuestMemoryMmap, info: &BootInfo<'_>) -> Result<(), BootParamsError> {
    let params = build(info)?;
    load_cmdline(mem, CMDLINE.start, info.cmdline).map_err(BootParamsError::Cmdline)?;
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, ZERO_PAGE), mem)
        .map_err(BootParamsError::ZeroPage)
}

fn build(info: &BootInfo<'_>) -> Result<boot_params, BootParamsError> {
    let mut hdr = info.kernel.setup_header.unwrap_or_else(elf_header);
    let len = info.cmdline.as_cstring().map_err(BootParamsError::InvalidCmdline)?.as_bytes().len();
    // The field does not count the NUL.
    let max = hdr.cmdline_size;
    if u32::try_from(len).map_or(true, |len| len > max) {
        return Err(BootParamsError::CmdlineTooLong { len, max });
    }
    hdr.type_of_loader = LOADER_UNDEFINED;
    hdr.vid_mode = VIDEO_NORMAL;
    hdr.cmd_line_ptr = CMDLINE_ADDRESS;
    if let Some(initrd) = info.initrd {
        // An initrd lies in low RAM, below 4 GiB; were it not so, the kernel would find none.
        hdr.ramdisk_image = u32::try_from(initrd.address.0).unwrap_or(0);
        hdr.ramdisk_size = initrd.size;
    }

    let mut params = boot_params { hdr, acpi_rsdp_addr: info.rsdp.0, ..boot_params::default() };
    let mut table = params.e820_table;
    let mut entries = 0;
    for (slot, entry) in table.iter_mut().zip(e820(info.map, info.pci)) {
        *slot = entry;
        entries += 1;
    }
    params.e820_table = table;
    params.e820_entries = entries;
    Ok(params)
}

/// [`CMDLINE`]'s address as the header wants it.
#[allow(clippy::cast_possible_truncation, reason = "checked at compile time")]
const CMDLINE_ADDRESS: u32 = {
    assert!(CMDLINE.start.0 <= u32::MAX as u64);
    CMDLINE.start.0 as u32
};

/// The setup header for a kernel that comes without one.
fn elf_header() -> setup_header {
    setup_header {
        boot_flag: BOOT_FLAG,
        header: HEADER_MAGIC,
        version: PROTOCOL,
        loadflags: LOADED_HIGH,
        kernel_alignment: KERNEL_ALIGNMENT,
        cmdline_size: u32::try_from(MAX_SIZE - 1).unwrap_or(0),
        ..setup_header::default()
    }
}

/// The BIOS memory map (ACPI 6.5 section 15): RAM, the reserved parts of the first megabyte, the ACPI tables, and,
/// with `pci`, its configuration space.
fn e820(map: &AddressMap, pci: bool) -> Vec<boot_e820_entry> {
    let entry = |start: GuestAddress, end: GuestAddress, kind: u32| boot_e820_entry {
        addr: start.0,
        size: end.0 - start.0,
        r#type: kind,
    };
    let mut entries = vec![
        entry(GuestAddress(0), EBDA.start, E820_RAM),
        entry(EBDA.start, ACPI.start, E820_RESERVED),
        entry(ACPI.start, ACPI.end(), E820_ACPI),
    ];
    for (start, size) in &map.ram {
        // AddressMap places RAM within the physical space, so this cannot overflow; low RAM is never
        // smaller than the first megabyte.
        let end = GuestAddress(start.0 + *size as u64);
        entries.push(entry(GuestAddress(start.0.max(HIMEM.0)), end, E820_RAM));
    }
    if pci {
        entries.push(entry(PCI_ECAM.start, PCI_ECAM.end(), E820_RESERVED));
    }
    entries
}
