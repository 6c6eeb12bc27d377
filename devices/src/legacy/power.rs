//! The registers by which a guest of a hardware-reduced ACPI platform switches off and resets.

use std::sync::Arc;

use super::{ExitKind, ExitSignal};
use crate::bus::BusDevice;

/// Three registers of one byte: sleep control, sleep status (ACPI 6.5, section 4.8.3.7) and reset
/// (section 4.8.3.6). The FADT must describe them so. All read as 0: the machine never sleeps, so there is no
/// wake-up to report or to clear in the status.
pub struct Power(Arc<ExitSignal>);

impl Power {
    /// Number of ports.
    pub const LEN: u64 = 3;
    /// Offset of SLEEP_CONTROL_REG: a write of SLP_EN (bit 5) with SLP_TYP (bits 2 to 4) [`Self::S5`]
    /// switches off.
    pub const SLEEP_CONTROL: u64 = 0;
    /// Offset of SLEEP_STATUS_REG.
    pub const SLEEP_STATUS: u64 = 1;
    /// Offset of RESET_REG: a write of [`Self::RESET_VALUE`] resets.
    pub const RESET: u64 = 2;
    /// The SLP_TYP for soft-off, which the DSDT's `_S5` must name.
    pub const S5: u8 = 5;
    /// The RESET_VALUE that the FADT must name.
    pub const RESET_VALUE: u8 = 1;

    const SLP_TYP_SHIFT: u8 = 2;
    const SLP_TYP: u8 = 0b111 << Self::SLP_TYP_SHIFT;
    const SLP_EN: u8 = 1 << 5;

    /// Registers that raise `exit`.
    pub fn new(exit: Arc<ExitSignal>) -> Self {
        Self(exit)
    }
}

impl BusDevice for Power {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let &[value] = data else { return };
        let off = Self::SLP_EN | Self::S5 << Self::SLP_TYP_SHIFT;
        match offset {
            Self::SLEEP_CONTROL if value & (Self::SLP_EN | Self::SLP_TYP) == off => {
                self.0.raise(ExitKind::PowerOff);
            }
            Self::RESET if value == Self::RESET_VALUE => self.0.raise(ExitKind::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_end_the_guest() {
        let exit = Arc::new(ExitSignal::new().unwrap());
        let mut power = Power::new(exit.clone());
        for (offset, value, kind) in [
            (0, 0x34, Some(ExitKind::PowerOff)),
            // The bits beside the two fields do not matter.
            (0, 0xf7, Some(ExitKind::PowerOff)),
            (0, 0x14, None),
            (0, 0x20, None),
            (0, 0x3c, None),
            (1, 0x34, None),
            (1, 0x80, None),
            (2, 1, Some(ExitKind::Reset)),
            (2, 0, None),
            (2, 0x34, None),
            (3, 1, None),
        ] {
            power.write(offset, &[value]);
            assert_eq!(exit.take(), kind, "{offset} {value:#x}");
        }
        power.write(2, &[1, 0]);
        power.write(0, &[]);
        assert_eq!(exit.take(), None);
    }

    #[test]
    fn every_register_reads_as_zero() {
        let mut power = Power::new(Arc::new(ExitSignal::new().unwrap()));
        power.write(Power::SLEEP_STATUS, &[0x80]);
        let mut data = [0x55; 3];
        power.read(0, &mut data);
        assert_eq!(data, [0; 3]);
    }
}
