//! The keyboard controller, of which only the reset line is left.

use std::convert::Infallible;
use std::sync::Arc;

use vm_superio::{I8042Device, Trigger};

use super::{ExitKind, ExitSignal};
use crate::bus::BusDevice;

/// Ports from the data register (0x60) to the command and status register (0x64). The three between them
/// belong to others: port 0x61 must read as ones, or a guest that calibrates its clock waits for a PIT's
/// output there.
///
/// Status 0 says that the controller takes commands and has nothing to say. Command 0xfe is the reset.
pub struct I8042(I8042Device<Reset>);

impl I8042 {
    /// Number of ports, counted from 0x60.
    pub const LEN: u64 = 5;
    const DATA: u64 = 0;
    const COMMAND: u64 = 4;

    /// A controller whose reset command raises `exit`.
    pub fn new(exit: Arc<ExitSignal>) -> Self {
        Self(I8042Device::new(Reset(exit)))
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (offset, data) {
            (Self::DATA | Self::COMMAND, [byte]) => *byte = self.0.read(0),
            (_, data) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[byte]) = (u8::try_from(offset), data) {
            let Ok(()) = self.0.write(offset, byte);
        }
    }
}

struct Reset(Arc<ExitSignal>);

impl Trigger for Reset {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.raise(ExitKind::Reset);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let exit = Arc::new(ExitSignal::new().unwrap());
        let mut i8042 = I8042::new(exit.clone());
        for (offset, data) in
            [(4, &[0xfd][..]), (0, &[0xfe]), (1, &[0xfe]), (4, &[0xfe, 0]), (4, &[]), (0x104, &[0xfe])]
        {
            i8042.write(offset, data);
            assert_eq!(exit.take(), None, "{offset} {data:?}");
        }
        i8042.write(4, &[0xfe]);
        assert_eq!(exit.take(), Some(ExitKind::Reset));
    }

    #[test]
    fn the_ports_between_are_empty() {
        let mut i8042 = I8042::new(Arc::new(ExitSignal::new().unwrap()));
        let reads: Vec<u8> = (0..I8042::LEN)
            .map(|offset| {
                let mut byte = [0x55];
                i8042.read(offset, &mut byte);
                byte[0]
            })
            .collect();
        assert_eq!(reads, [0, 0xff, 0xff, 0xff, 0]);
    }
}
