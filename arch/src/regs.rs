//! The state in which the boot vCPU enters the kernel: 64-bit mode with identity-mapped low memory, as the
//! Linux 64-bit boot protocol wants it (Documentation/arch/x86/boot.rst). The other vCPUs wait for the
//! kernel's start-up IPI in the state that KVM gives them.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{BOOT_STACK_TOP, GDT, PAGE_DIRECTORIES, PAGE_SIZE, PDPT, PML4, ZERO_PAGE};

#[cfg(test)]
mod tests;

/// Why the boot state could not be set.
#[derive(Debug, thiserror::Error)]
pub enum RegsError {
    /// Guest memory could not be written.
    #[error("cannot write the boot page tables and GDT to guest memory")]
    Tables(#[source] GuestMemoryError),
    /// KVM refused.
    #[error("KVM cannot {what} of the boot vCPU")]
    Kvm {
        /// What was being done.
        what: &'static str,
        /// Its error.
        #[source]
        source: kvm_ioctls::Error,
    },
}

// The selectors that the boot protocol prescribes: __BOOT_CS and __BOOT_DS; then a task.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

// Segment types (SDM volume 3, sections 3.4.5.1 and 3.5).
const TYPE_CODE: u8 = 0xB;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TASK: u8 = 0xB;

const CR0_PROTECTED: u64 = 1 << 0;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE: u64 = (1 << 8) | (1 << 10);

const PRESENT: u64 = 1 << 0;
const WRITABLE: u64 = 1 << 1;
const LARGE_PAGE: u64 = 1 << 7;
const LARGE_PAGE_SHIFT: u32 = 21;
const TABLE_ENTRIES: u64 = 512;
/// Identity-mapped: all of low RAM and the hole.
const MAPPED_GIB: u64 = 4;

/// Bit 1 of RFLAGS is always 1; interrupts are off.
const RFLAGS: u64 = 1 << 1;

/// x87 and SSE control words after a reset with all exceptions masked.
const FPU_CONTROL: u16 = 0x37F;
const MXCSR: u32 = 0x1F80;

// Local APIC (SDM volume 3, section 11.5.1): registers by offset, delivery modes, mask.
const LVT_LINT0: usize = 0x350;
const LVT_LINT1: usize = 0x360;
const DELIVERY_MODE: u32 = 0b111 << 8;
const DELIVER_NMI: u32 = 0b100 << 8;
const DELIVER_EXTINT: u32 = 0b111 << 8;
const MASKED: u32 = 1 << 16;

/// Writes the GDT and the page tables that [`set_boot_state`] points to: 4 GiB mapped onto themselves.
///
/// # Errors
/// Guest memory cannot be written.
pub fn write_boot_tables(mem: &GuestMemoryMmap) -> Result<(), RegsError> {
    let write = |entries: &[u64], at: GuestAddress| {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
        mem.write_slice(&bytes, at).map_err(RegsError::Tables)
    };
    write(&gdt(), GDT.start)?;
    write(&[PDPT.0 | PRESENT | WRITABLE], PML4)?;
    let directories: Vec<u64> =
        (0..MAPPED_GIB).map(|i| (PAGE_DIRECTORIES.0 + i * PAGE_SIZE) | PRESENT | WRITABLE).collect();
    write(&directories, PDPT)?;
    let pages: Vec<u64> = (0..MAPPED_GIB * TABLE_ENTRIES)
        .map(|i| (i << LARGE_PAGE_SHIFT) | PRESENT | WRITABLE | LARGE_PAGE)
        .collect();
    write(&pages, PAGE_DIRECTORIES)
}

/// Sets the boot vCPU's registers to start at `entry`: segments, control registers, general registers,
/// FPU and local APIC. Its CPUID must have been set before.
///
/// # Errors
/// KVM refused one of them.
pub fn set_boot_state(vcpu: &VcpuFd, entry: GuestAddress) -> Result<(), RegsError> {
    let failed = |what| move |source| RegsError::Kvm { what, source };
    let mut sregs = vcpu.get_sregs().map_err(failed("read the special registers"))?;
    set_long_mode(&mut sregs);
    vcpu.set_sregs(&sregs).map_err(failed("set the special registers"))?;
    vcpu.set_regs(&boot_regs(entry)).map_err(failed("set the registers"))?;
    let fpu = kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR, ..Default::default() };
    vcpu.set_fpu(&fpu).map_err(failed("set the FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(failed("read the local APIC"))?;
    set_local_interrupts(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(failed("set the local APIC"))
}

fn boot_regs(entry: GuestAddress) -> kvm_regs {
    kvm_regs {
        rip: entry.0,
        rsi: ZERO_PAGE.0,
        rsp: BOOT_STACK_TOP.0,
        rbp: BOOT_STACK_TOP.0,
        rflags: RFLAGS,
        ..Default::default()
    }
}

fn set_long_mode(sregs: &mut kvm_sregs) {
    let data = segment(DATA_SELECTOR, TYPE_DATA);
    sregs.cs = kvm_segment { l: 1, db: 0, ..segment(CODE_SELECTOR, TYPE_CODE) };
    sregs.ds = data;
    sregs.es = data;
    sregs.fs = data;
    sregs.gs = data;
    sregs.ss = data;
    // A task that is never switched to; entering a VMX guest in long mode needs a busy one.
    sregs.tr = kvm_segment { s: 0, g: 0, db: 0, limit: 0x67, ..segment(TASK_SELECTOR, TYPE_BUSY_TASK) };
    sregs.gdt.base = GDT.start.0;
    sregs.gdt.limit = GDT_LIMIT;
    // No handlers: an exception before the kernel has its own is a triple fault.
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cr0 |= CR0_PROTECTED | CR0_PAGING;
    sregs.cr3 = PML4.0;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_MODE;
}

/// A flat 4 GiB segment in 4 KiB units.
fn segment(selector: u16, type_: u8) -> kvm_segment {
    kvm_segment { selector, type_, limit: 0xFFFF_FFFF, present: 1, s: 1, g: 1, db: 1, ..Default::default() }
}

/// Six descriptors of 8 bytes.
const GDT_LIMIT: u16 = 6 * 8 - 1;

/// Null, unused, 64-bit code, data, and a task whose descriptor takes two entries (SDM volume 3, section
/// 8.2.3). The same as the segments in `set_long_mode`.
fn gdt() -> [u64; 6] {
    [0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x0000_8B00_0000_0067, 0]
}

/// LINT0 is wired for an 8259 but masked, LINT1 is the NMI. KVM starts with LINT0 open, and Linux keeps an
/// open one open; with ACPI's hardware-reduced platform it never sets up the 8259, whose interrupts would
/// then arrive as exceptions.
fn set_local_interrupts(lapic: &mut kvm_lapic_state) {
    change(lapic, LVT_LINT0, |lvt| (lvt & !DELIVERY_MODE) | DELIVER_EXTINT | MASKED);
    change(lapic, LVT_LINT1, |lvt| (lvt & !(DELIVERY_MODE | MASKED)) | DELIVER_NMI);
}

/// Changes a 32-bit register of the APIC's page.
fn change(lapic: &mut kvm_lapic_state, offset: usize, change: impl Fn(u32) -> u32) {
    let mut bytes = [0_u8; 4];
    for (byte, reg) in bytes.iter_mut().zip(&lapic.regs[offset..]) {
        *byte = reg.cast_unsigned();
    }
    let bytes = change(u32::from_le_bytes(bytes)).to_le_bytes();
    for (byte, reg) in bytes.iter().zip(&mut lapic.regs[offset..]) {
        *reg = byte.cast_signed();
    }
}
