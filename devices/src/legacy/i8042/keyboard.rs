//! The PS/2 keyboard behind the controller.

use std::collections::VecDeque;

/// A keyboard that speaks scan code set 2 and holds what it sends until the controller takes it.
pub(super) struct Keyboard {
    output: VecDeque<u8>,
    /// Keys are reported. They are from power-on, for drivers that never speak to the keyboard (Linux with
    /// `i8042.dumbkbd`).
    scanning: bool,
    /// The command whose parameter comes next.
    command: Option<u8>,
}

/// Commands, which are all bytes from here on; parameters are below.
const FIRST_COMMAND: u8 = 0xed;
const SET_LEDS: u8 = 0xed;
const ECHO: u8 = 0xee;
const SCAN_SET: u8 = 0xf0;
const IDENTIFY: u8 = 0xf2;
const SET_RATE: u8 = 0xf3;
const ENABLE: u8 = 0xf4;
const DISABLE: u8 = 0xf5;
const DEFAULTS: u8 = 0xf6;
const RESET: u8 = 0xff;

const ACK: u8 = 0xfa;
const NOT_UNDERSTOOD: u8 = 0xfe;
const TEST_PASSED: u8 = 0xaa;
const ID: [u8; 2] = [0xab, 0x83];

const CTRL: u8 = 0x14;
const ALT: u8 = 0x11;
const EXTENDED: u8 = 0xe0;
const DEL: u8 = 0x71;
const RELEASE: u8 = 0xf0;

const CTRL_ALT_DEL: [u8; 11] =
    [CTRL, ALT, EXTENDED, DEL, EXTENDED, RELEASE, DEL, RELEASE, ALT, RELEASE, CTRL];

impl Keyboard {
    /// Bytes that wait at most: what Linux reads away before it takes the controller for absent.
    pub const CAPACITY: usize = 16;

    pub fn new() -> Self {
        Self { output: VecDeque::with_capacity(Self::CAPACITY), scanning: true, command: None }
    }

    /// Whether keys are reported.
    pub fn is_scanning(&self) -> bool {
        self.scanning
    }

    /// Whether there is nothing to take.
    pub fn is_silent(&self) -> bool {
        self.output.is_empty()
    }

    /// Presses and releases the three keys; `false`, and nothing else, if there is no room.
    pub fn press_ctrl_alt_del(&mut self) -> bool {
        self.send(&CTRL_ALT_DEL)
    }

    /// Takes the next byte, translated to scan code set 1 if asked for; 0 if there is none.
    pub fn take(&mut self, translate: bool) -> u8 {
        let mut next = || self.output.pop_front().unwrap_or(0);
        match next() {
            // Set 1 has the release in a bit of the code.
            RELEASE if translate => translated(next()) | 0x80,
            byte if translate => translated(byte),
            byte => byte,
        }
    }

    /// A byte from the host: a command, or a command's parameter.
    pub fn receive(&mut self, byte: u8) {
        // A command in the place of a parameter ends the one before it.
        let command = self.command.take().filter(|_| byte < FIRST_COMMAND);
        match (command, byte) {
            (Some(SCAN_SET), 0) => self.send(&[ACK, 2]),
            (Some(SCAN_SET), 2) | (Some(SET_LEDS | SET_RATE), _) => self.send(&[ACK]),
            (None, SET_LEDS | SET_RATE | SCAN_SET) => {
                self.command = Some(byte);
                self.send(&[ACK])
            }
            (None, ECHO) => self.send(&[ECHO]),
            (None, IDENTIFY) => self.send(&[ACK, ID[0], ID[1]]),
            (None, ENABLE | DISABLE | DEFAULTS) => {
                self.scanning = byte != DISABLE;
                self.send(&[ACK])
            }
            (None, RESET) => {
                self.output.clear();
                self.scanning = true;
                self.send(&[ACK, TEST_PASSED])
            }
            _ => self.send(&[NOT_UNDERSTOOD]),
        };
    }

    /// Sends all of `bytes`, or nothing when they find no room: a guest that does not read misses answers.
    fn send(&mut self, bytes: &[u8]) -> bool {
        let room = bytes.len() <= Self::CAPACITY - self.output.len();
        if room {
            self.output.extend(bytes);
        }
        room
    }
}

/// The controller's translation of those bytes that this keyboard sends.
fn translated(byte: u8) -> u8 {
    match byte {
        CTRL => 0x1d,
        ALT => 0x38,
        DEL => 0x53,
        // The second byte of the identity, and the number of the scan code set.
        0x83 | 2 => 0x41,
        byte => byte,
    }
}
