//! MP tables (Intel MultiProcessor Specification 1.4, chapter 4) for guests run with `acpi=off`.

use vm_memory::{Bytes, GuestMemoryError, GuestMemoryMmap};

use crate::layout::{EBDA, IOAPIC, IOAPIC_PINS, LAPIC};

#[cfg(test)]
mod tests;

/// vCPUs that fit in [`EBDA`].
pub const MAX_CPUS: u8 = 32;

const SPEC_REVISION: u8 = 4;
const POINTER_LEN: u8 = 16;
const HEADER_LEN: u16 = 44;
/// Versions that KVM's APICs report.
const LAPIC_VERSION: u8 = 0x14;
const IOAPIC_VERSION: u8 = 0x11;
/// The one bus, which all lines belong to.
const ISA_BUS: u8 = 0;
/// "All local APICs".
const ALL: u8 = 0xFF;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INTERRUPT_VECTORED: u8 = 0;
const INTERRUPT_NMI: u8 = 1;
const INTERRUPT_EXTINT: u8 = 3;

const CPU_ENABLED: u8 = 1 << 0;
const CPU_BOOT: u8 = 1 << 1;
const CPU_SIGNATURE: u32 = 0x600;
/// CPUID 1 EDX as of the specification's time: FPU and APIC.
const CPU_FEATURES: u32 = (1 << 0) | (1 << 9);

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
pub enum MpTableError {
    /// Too many vCPUs for the place.
    #[error("{cpus} vCPUs do not fit in the MP tables; they hold 1 to {MAX_CPUS}")]
    Cpus {
        /// vCPUs asked for.
        cpus: u8,
    },
    /// Guest memory could not be written.
    #[error("cannot write the MP tables to guest memory")]
    Write(#[source] GuestMemoryError),
}

/// Writes the floating pointer and the configuration table for `cpus` vCPUs (APIC ids from 0 up) and all
/// lines of the I/O APIC to [`EBDA`].
///
/// # Errors
/// `cpus` is 0 or above [`MAX_CPUS`], or guest memory cannot be written.
pub fn write(mem: &GuestMemoryMmap, cpus: u8) -> Result<(), MpTableError> {
    if cpus == 0 || cpus > MAX_CPUS {
        return Err(MpTableError::Cpus { cpus });
    }
    mem.write_slice(&build(cpus), EBDA.start).map_err(MpTableError::Write)
}

/// The pointer structure (section 4.1) with the table right behind it.
fn build(cpus: u8) -> Vec<u8> {
    let mut pointer = Vec::new();
    pointer.extend_from_slice(b"_MP_");
    pointer.extend_from_slice(&address_32(EBDA.start.0 + u64::from(POINTER_LEN)).to_le_bytes());
    // Length in paragraphs, revision, checksum, then five bytes of features: a table is present, and
    // interrupts come by virtual wire (no IMCR).
    pointer.extend_from_slice(&[POINTER_LEN / 16, SPEC_REVISION, 0, 0, 0, 0, 0, 0]);
    set_checksum(&mut pointer, 10);
    pointer.extend_from_slice(&table(cpus));
    pointer
}

/// The configuration table (sections 4.2 and 4.3).
fn table(cpus: u8) -> Vec<u8> {
    // The I/O APIC's id is the first that no processor has.
    let ioapic_id = cpus;
    let (count, entries) = entries(cpus, ioapic_id);

    let mut table = Vec::new();
    table.extend_from_slice(b"PCMP");
    // At most 32 processors of 20 bytes and 28 entries of 8: far from overflowing.
    let length = u16::try_from(entries.len()).unwrap_or(u16::MAX - HEADER_LEN) + HEADER_LEN;
    table.extend_from_slice(&length.to_le_bytes());
    table.extend_from_slice(&[SPEC_REVISION, 0]);
    table.extend_from_slice(b"PINFOLD ");
    table.extend_from_slice(b"MICROVM     ");
    // No OEM table: pointer and size.
    table.extend_from_slice(&[0; 6]);
    table.extend_from_slice(&count.to_le_bytes());
    table.extend_from_slice(&address_32(LAPIC.start.0).to_le_bytes());
    // No extended table: length, checksum, reserved.
    table.extend_from_slice(&[0; 4]);
    table.extend_from_slice(&entries);
    set_checksum(&mut table, 7);
    table
}

/// The entries and their number.
fn entries(cpus: u8, ioapic_id: u8) -> (u16, Vec<u8>) {
    let mut count = 0;
    let mut bytes = Vec::new();
    let mut add = |entry: &[u8]| {
        count += 1;
        bytes.extend_from_slice(entry);
    };
    for id in 0..cpus {
        let flags = if id == 0 { CPU_ENABLED | CPU_BOOT } else { CPU_ENABLED };
        let mut entry = vec![ENTRY_PROCESSOR, id, LAPIC_VERSION, flags];
        entry.extend_from_slice(&CPU_SIGNATURE.to_le_bytes());
        entry.extend_from_slice(&CPU_FEATURES.to_le_bytes());
        entry.extend_from_slice(&[0; 8]);
        add(&entry);
    }
    add(&[ENTRY_BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);
    let mut entry = vec![ENTRY_IOAPIC, ioapic_id, IOAPIC_VERSION, 1];
    entry.extend_from_slice(&address_32(IOAPIC.start.0).to_le_bytes());
    add(&entry);
    // Line n is pin n. Polarity and trigger 0 are those of the bus: active high, edge.
    for line in 0..IOAPIC_PINS.to_le_bytes()[0] {
        add(&[ENTRY_IO_INTERRUPT, INTERRUPT_VECTORED, 0, 0, ISA_BUS, line, ioapic_id, line]);
    }
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_EXTINT, 0, 0, ISA_BUS, 0, 0, 0]);
    add(&[ENTRY_LOCAL_INTERRUPT, INTERRUPT_NMI, 0, 0, ISA_BUS, 0, ALL, 1]);
    (count, bytes)
}

/// Makes all bytes add up to 0.
fn set_checksum(bytes: &mut [u8], at: usize) {
    bytes[at] = 0;
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[at] = sum.wrapping_neg();
}

/// An address that the layout keeps below 4 GiB.
fn address_32(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(u32::MAX)
}
