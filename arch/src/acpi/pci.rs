//! The PCI root bridge: where its configuration space is (MCFG, PCI Firmware Specification 3.3 section 4.1.2), and
//! its node in the DSDT.
//!
//! Functions interrupt by message only, so there is no `_PRT`: it would route pins that no function has.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Arg, BufferData, CreateDWordField, Device, EISAName, Equal, IO, If,
    Memory32Fixed, Method, Name, ONE, Or, Path, ResourceTemplate, Return, ZERO,
};
use acpi_tables::mcfg::MCFG;

use super::{OEM_ID, OEM_REVISION, OEM_TABLE_ID, address_32};
use crate::layout::{
    PCI_BUSES, PCI_CONFIG_PORT, PCI_ECAM, PCI_FIRST_PORT, PCI_LAST_PORT, PCI_MMIO32, Window,
};

/// The one segment group.
const SEGMENT: u16 = 0;
/// `33DB4D5B-1FF7-401C-9657-7441C03DD766`, which a guest calls a root bridge's `_OSC` with, as it is in memory.
const OSC_UUID: [u8; 16] =
    [0x5B, 0x4D, 0xDB, 0x33, 0xF7, 0x1F, 0x1C, 0x40, 0x96, 0x57, 0x74, 0x41, 0xC0, 0x3D, 0xD7, 0x66];
/// [`PCI_ECAM`]'s size as descriptors want it.
#[allow(clippy::cast_possible_truncation, reason = "checked at compile time")]
const ECAM_SIZE: u32 = {
    assert!(PCI_ECAM.size <= u32::MAX as u64);
    PCI_ECAM.size as u32
};
/// "Unrecognized UUID", in the first word of what `_OSC` returns (ACPI 6.5 section 6.2.11).
const OSC_UNKNOWN_UUID: u8 = 1 << 2;

/// The table that says where the configuration space of all buses is.
pub(super) fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(PCI_ECAM.start.0, SEGMENT, 0, PCI_BUSES - 1);
    mcfg
}

/// The root bridge, with `mmio64` as its window above 4 GiB, and the motherboard resource without which Linux
/// does not believe the MCFG.
pub(super) fn root_bridge(mmio64: Window, aml: &mut Vec<u8>) {
    Device::new(
        "PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &SEGMENT),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CCA".into(), &ONE),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![
                    &AddressSpace::new_bus_number(0_u16, u16::from(PCI_BUSES - 1)),
                    &IO::new(PCI_CONFIG_PORT, PCI_CONFIG_PORT, 1, 8),
                    &AddressSpace::new_io(PCI_FIRST_PORT, PCI_LAST_PORT, None),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        address_32(PCI_MMIO32.start),
                        address_32(PCI_MMIO32.last()),
                        None,
                    ),
                    &AddressSpace::new_memory(
                        AddressSpaceCacheable::NotCacheable,
                        true,
                        mmio64.start.0,
                        mmio64.last().0,
                        None,
                    ),
                ]),
            ),
            // The guest gets all that it asks for: nobody else would take care of it.
            &Method::new(
                "_OSC".into(),
                4,
                true,
                vec![
                    &If::new(
                        &Equal::new(&Arg(0), &BufferData::new(OSC_UUID.to_vec())),
                        vec![&Return::new(&Arg(3))],
                    ),
                    &CreateDWordField::new(&Path::new("CDW1"), &Arg(3), &ZERO),
                    &Or::new(&Path::new("CDW1"), &Path::new("CDW1"), &OSC_UNKNOWN_UUID),
                    &Return::new(&Arg(3)),
                ],
            ),
        ],
    )
    .to_aml_bytes(aml);
    Device::new(
        "MBRD".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new(
                "_CRS".into(),
                &ResourceTemplate::new(vec![&Memory32Fixed::new(
                    true,
                    address_32(PCI_ECAM.start),
                    ECAM_SIZE,
                )]),
            ),
        ],
    )
    .to_aml_bytes(aml);
}
