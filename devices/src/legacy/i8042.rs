//! The keyboard controller: a keyboard with three keys, and the reset line.

use std::sync::Arc;

use vmm_sys_util::eventfd::EventFd;

use self::keyboard::Keyboard;
use super::{ExitKind, ExitSignal};
use crate::bus::BusDevice;
use crate::counter::{Counters, counters};

mod keyboard;
#[cfg(test)]
mod tests;

/// Why keys could not be pressed.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum I8042Error {
    /// Nobody in the guest listens.
    #[error(
        "cannot press Ctrl+Alt+Del: the guest has not enabled its keyboard; wait for it to boot, with a \
         kernel that has the i8042 and atkbd drivers"
    )]
    NotEnabled,
    /// The guest has not read what was pressed before.
    #[error("cannot press Ctrl+Alt+Del: the keyboard's buffer is full; try again when the guest has read it")]
    BufferFull,
}

/// Ports from the data register (0x60) to the command and status register (0x64). The three between them
/// belong to others: port 0x61 must read as ones, or a guest that calibrates its clock waits for a PIT's
/// output there.
///
/// Every command is done and answered when the write of it returns, so the input buffer is never full and no
/// probe waits. There is no auxiliary (mouse) port, and what looks for one gets an answer that says so: Linux
/// does not look if it has found the keyboard by ACPI alone, and else gives up at the first two commands,
/// while a command without an answer would cost it half a second.
///
/// The answer to a command is one byte that the guest polls for, without an interrupt. It goes before what the
/// keyboard sends, of which every byte raises IRQ 1, if the guest enabled that.
pub struct I8042 {
    irq: EventFd,
    exit: Arc<ExitSignal>,
    keyboard: Keyboard,
    /// The command byte, of the bits in [`control`].
    control: u8,
    /// The last write went to the command register.
    commanded: bool,
    /// The command whose parameter comes to the data register next.
    awaiting: Option<u8>,
    /// The answer to the last command, until it is read.
    answer: Option<u8>,
    counters: Arc<KeyboardCounters>,
}

counters! {
    /// What the keyboard controller counts.
    KeyboardCounters {
        /// Reads of its ports.
        read_count,
        /// Writes to its ports.
        write_count,
        /// Accesses that it does not know.
        error_count,
        /// Resets that the guest asked for.
        reset_count,
    }
}

/// Bits of the status register.
mod status {
    pub const OUTPUT_FULL: u8 = 1 << 0;
    pub const COMMAND: u8 = 1 << 3;
    /// The keyboard is not locked by a key.
    pub const UNLOCKED: u8 = 1 << 4;
}

/// Bits of the command byte.
mod control {
    pub const KEYBOARD_INTERRUPT: u8 = 1 << 0;
    pub const AUX_INTERRUPT: u8 = 1 << 1;
    /// The self test was passed; the status register has the same bit.
    pub const SYSTEM: u8 = 1 << 2;
    pub const KEYBOARD_DISABLED: u8 = 1 << 4;
    pub const AUX_DISABLED: u8 = 1 << 5;
    /// Scan codes of set 2 are translated to set 1.
    pub const TRANSLATE: u8 = 1 << 6;
}

/// What is written to the command register. What is not listed has no effect and no answer.
mod command {
    pub const READ_CONTROL: u8 = 0x20;
    pub const WRITE_CONTROL: u8 = 0x60;
    pub const TEST_AUX: u8 = 0xa9;
    pub const TEST_CONTROLLER: u8 = 0xaa;
    pub const TEST_KEYBOARD: u8 = 0xab;
    pub const DISABLE_KEYBOARD: u8 = 0xad;
    pub const ENABLE_KEYBOARD: u8 = 0xae;
    pub const READ_OUTPUT_PORT: u8 = 0xd0;
    pub const WRITE_OUTPUT_PORT: u8 = 0xd1;
    pub const LOOP_KEYBOARD: u8 = 0xd2;
    pub const LOOP_AUX: u8 = 0xd3;
    pub const WRITE_AUX: u8 = 0xd4;
    pub const RESET: u8 = 0xfe;
}

impl I8042 {
    /// Number of ports, counted from 0x60.
    pub const LEN: u64 = 5;
    const DATA: u64 = 0;
    const COMMAND: u64 = 4;

    const TEST_PASSED: u8 = 0x55;
    const INTERFACE_GOOD: u8 = 0x00;
    const CLOCK_STUCK_LOW: u8 = 0x01;
    /// A20 is on and the processor not in reset.
    const OUTPUT_PORT: u8 = 0b11;

    /// A controller that writes to `irq` for each byte that the keyboard sends, and whose reset command raises
    /// `exit`.
    pub fn new(irq: EventFd, exit: Arc<ExitSignal>) -> Self {
        Self {
            irq,
            exit,
            keyboard: Keyboard::new(),
            // As firmware leaves it.
            control: control::SYSTEM | control::AUX_DISABLED | control::TRANSLATE,
            commanded: false,
            awaiting: None,
            answer: None,
            counters: Arc::default(),
        }
    }

    /// What the controller counts, under Firecracker's names.
    pub fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.counters) as _
    }

    /// Presses Ctrl, Alt and Del and lets them go. The guest may act on it or not.
    ///
    /// # Errors
    /// The guest has not enabled its keyboard, or has not read what it was sent before. Then nothing is pressed.
    pub fn press_ctrl_alt_del(&mut self) -> Result<(), I8042Error> {
        let enabled = control::KEYBOARD_INTERRUPT | control::KEYBOARD_DISABLED;
        if self.control & enabled != control::KEYBOARD_INTERRUPT || !self.keyboard.is_scanning() {
            return Err(I8042Error::NotEnabled);
        }
        if !self.keyboard.press_ctrl_alt_del() {
            return Err(I8042Error::BufferFull);
        }
        self.interrupt();
        Ok(())
    }

    fn status(&self) -> u8 {
        let mut status = status::UNLOCKED | (self.control & control::SYSTEM);
        if self.answer.is_some() || self.keyboard_has_byte() {
            status |= status::OUTPUT_FULL;
        }
        if self.commanded {
            status |= status::COMMAND;
        }
        status
    }

    /// Whether the controller would take a byte from the keyboard.
    fn keyboard_has_byte(&self) -> bool {
        self.control & control::KEYBOARD_DISABLED == 0 && !self.keyboard.is_silent()
    }

    /// Tells the guest of a byte from the keyboard, if there is one to be read next.
    fn interrupt(&self) {
        if self.answer.is_none()
            && self.keyboard_has_byte()
            && self.control & control::KEYBOARD_INTERRUPT != 0
        {
            // It fails only when the counter is full, and then the interrupt is on its way.
            let _ = self.irq.write(1);
        }
    }

    fn data(&mut self) -> u8 {
        if let Some(answer) = self.answer.take() {
            return answer;
        }
        if !self.keyboard_has_byte() {
            return 0;
        }
        let translate = self.control & control::TRANSLATE != 0;
        self.keyboard.take(translate)
    }

    fn command(&mut self, command: u8) {
        self.awaiting = None;
        self.answer = match command {
            command::READ_CONTROL => Some(self.control),
            command::TEST_CONTROLLER => {
                self.control |= control::SYSTEM;
                Some(Self::TEST_PASSED)
            }
            command::TEST_KEYBOARD => Some(Self::INTERFACE_GOOD),
            // Of the answers there are, the one that Linux takes for the absence of the port.
            command::TEST_AUX => Some(Self::CLOCK_STUCK_LOW),
            command::READ_OUTPUT_PORT => Some(Self::OUTPUT_PORT),
            _ => None,
        };
        match command {
            command::WRITE_CONTROL
            | command::WRITE_OUTPUT_PORT
            | command::LOOP_KEYBOARD
            | command::LOOP_AUX
            | command::WRITE_AUX => self.awaiting = Some(command),
            command::DISABLE_KEYBOARD => self.control |= control::KEYBOARD_DISABLED,
            command::ENABLE_KEYBOARD => self.control &= !control::KEYBOARD_DISABLED,
            command::RESET => {
                self.counters.reset_count.inc();
                self.exit.raise(ExitKind::Reset);
            }
            _ => {}
        }
    }

    fn parameter(&mut self, command: u8, byte: u8) {
        match command {
            // Without an auxiliary port its bits cannot be changed: one more way to see that it is not there.
            command::WRITE_CONTROL => {
                self.control = (byte & !control::AUX_INTERRUPT) | control::AUX_DISABLED;
            }
            // Looped back to the auxiliary port as well, the byte comes as from the keyboard, which Linux takes
            // for an error at once.
            command::LOOP_KEYBOARD | command::LOOP_AUX => self.answer = Some(byte),
            // A20 cannot be switched off, and no mouse hears what it is sent.
            _ => {}
        }
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        self.counters.read_count.inc();
        match (offset, data) {
            (Self::DATA, [byte]) => {
                *byte = self.data();
                self.interrupt();
            }
            (Self::COMMAND, [byte]) => *byte = self.status(),
            (_, data) => {
                self.counters.error_count.inc();
                data.fill(0xff);
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.counters.write_count.inc();
        let &[byte] = data else { return self.counters.error_count.inc() };
        match (offset, self.awaiting.take()) {
            (Self::COMMAND, _) => {
                self.commanded = true;
                self.command(byte);
            }
            (Self::DATA, awaiting) => {
                self.commanded = false;
                match awaiting {
                    Some(command) => self.parameter(command, byte),
                    None => {
                        // As on a PC, speaking to the keyboard enables its interface.
                        self.control &= !control::KEYBOARD_DISABLED;
                        self.keyboard.receive(byte);
                    }
                }
            }
            // Not ours, so no parameter either.
            (_, awaiting) => {
                self.awaiting = awaiting;
                return self.counters.error_count.inc();
            }
        }
        self.interrupt();
    }
}
