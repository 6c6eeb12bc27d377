//! The DSDT: devices that a guest cannot find by looking for them, and the soft-off state.

use acpi_tables::Aml;
use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path, ResourceTemplate, Scope, ZERO,
};
use acpi_tables::sdt::Sdt;

use super::{
    AcpiError, MmioDevice, OEM_ID, OEM_REVISION, OEM_TABLE_ID, Platform, SDT_HEADER, SLEEP_TYPE_S5, pci,
};
use crate::layout::{COM1_GSI, COM1_PORT, I8042_COMMAND_PORT, I8042_DATA_PORT, I8042_GSI};

/// From this revision on integers have 64 bits.
const REVISION: u8 = 2;
/// Ports of a 16550.
const UART_PORTS: u8 = 8;

pub(super) fn build(platform: &Platform) -> Result<Sdt, AcpiError> {
    let mut aml = Vec::new();
    for (index, device) in platform.virtio_mmio.iter().enumerate() {
        virtio_mmio(index, device, &mut aml)?;
    }
    if let Some(mmio64) = platform.pci {
        pci::root_bridge(mmio64, &mut aml);
    }
    com1(&mut aml);
    keyboard(&mut aml);
    let mut dsdt = Sdt::new(*b"DSDT", SDT_HEADER, REVISION, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&Scope::raw(Path::new("_SB_"), aml));

    // Section 7.4.2: the values for the sleep type field; hardware-reduced platforms use the first.
    let mut soft_off = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]))
        .to_aml_bytes(&mut soft_off);
    dsdt.append_slice(&soft_off);
    Ok(dsdt)
}

/// A virtio-mmio device as Linux' and others' drivers know it: `LNRO0005`, registers and interrupt in
/// `_CRS`, in the order that the drivers expect.
fn virtio_mmio(index: usize, device: &MmioDevice, aml: &mut Vec<u8>) -> Result<(), AcpiError> {
    let too_high = || AcpiError::DeviceAddress { base: device.base.0 };
    let base = u32::try_from(device.base.0).map_err(|_| too_high())?;
    let size = u32::try_from(device.size).map_err(|_| too_high())?;
    base.checked_add(size).ok_or_else(too_high)?;
    // Names have four characters; more devices than that cannot be addressed.
    if index > 0xFFF {
        return Err(AcpiError::TooLarge);
    }
    Device::new(
        format!("V{index:03X}").as_str().into(),
        vec![
            &Name::new("_HID".into(), &"LNRO0005"),
            &Name::new("_UID".into(), &index),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, base, size),
                    &Interrupt::new(true, true, false, false, device.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
    Ok(())
}

/// The serial port, so that a kernel gets its interrupt and ports from here and need not probe.
fn com1(aml: &mut Vec<u8>) {
    Device::new(
        "COM1".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0501")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_DDN".into(), &"COM1"),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(COM1_PORT, COM1_PORT, 1, UART_PORTS),
                    &Interrupt::new(true, true, false, false, COM1_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}

/// The keyboard behind the i8042. Linux' driver takes the first two ports and the first interrupt; that there is
/// no node of a mouse (PNP0F13) keeps it from looking for one.
fn keyboard(aml: &mut Vec<u8>) {
    Device::new(
        "KBD_".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0303")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &IO::new(I8042_DATA_PORT, I8042_DATA_PORT, 1, 1),
                    &IO::new(I8042_COMMAND_PORT, I8042_COMMAND_PORT, 1, 1),
                    &Interrupt::new(true, true, false, false, I8042_GSI),
                ]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}
