use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

const DATA: u64 = 0;
const COMMAND: u64 = 4;

struct Pc {
    i8042: I8042,
    irq: EventFd,
    exit: Arc<ExitSignal>,
}

impl Pc {
    fn new() -> Self {
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let exit = Arc::new(ExitSignal::new().unwrap());
        Self { i8042: I8042::new(irq.try_clone().unwrap(), Arc::clone(&exit)), irq, exit }
    }

    /// As Linux' drivers leave it when they only listen (`i8042.dumbkbd`).
    fn listening() -> Self {
        let mut pc = Self::new();
        pc.command(0x60, &[0x65]);
        pc
    }

    fn inb(&mut self, offset: u64) -> u8 {
        let mut byte = [0x55];
        self.i8042.read(offset, &mut byte);
        byte[0]
    }

    fn outb(&mut self, offset: u64, byte: u8) {
        self.i8042.write(offset, &[byte]);
    }

    fn command(&mut self, command: u8, parameters: &[u8]) {
        self.outb(COMMAND, command);
        parameters.iter().for_each(|byte| self.outb(DATA, *byte));
    }

    fn full(&mut self) -> bool {
        self.inb(COMMAND) & 1 != 0
    }

    /// A command and its answer.
    fn ask(&mut self, command: u8, parameters: &[u8]) -> u8 {
        self.command(command, parameters);
        assert!(self.full(), "{command:#x} is answered at once");
        let answer = self.inb(DATA);
        assert!(!self.full());
        answer
    }

    fn interrupted(&mut self) -> bool {
        self.irq.read().is_ok()
    }

    /// What an interrupt handler gets that reads one byte an interrupt.
    fn received(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.interrupted() {
            assert!(self.full());
            bytes.push(self.inb(DATA));
        }
        assert!(!self.full(), "no byte is left without an interrupt");
        bytes
    }
}

#[test]
fn only_the_reset_command_resets() {
    let mut pc = Pc::new();
    for (offset, data) in
        [(4, &[0xfd][..]), (0, &[0xfe]), (1, &[0xfe]), (4, &[0xfe, 0]), (4, &[]), (0x104, &[0xfe])]
    {
        pc.i8042.write(offset, data);
        assert_eq!(pc.exit.take(), None, "{offset} {data:?}");
    }
    pc.outb(COMMAND, 0xfe);
    assert_eq!(pc.exit.take(), Some(ExitKind::Reset));
}

#[test]
fn the_ports_between_are_empty() {
    let mut pc = Pc::new();
    let reads: Vec<u8> = (0..I8042::LEN).map(|offset| pc.inb(offset)).collect();
    assert_eq!(reads, [0, 0xff, 0xff, 0xff, 0x14]);
    let mut wide = [0; 2];
    pc.i8042.read(DATA, &mut wide);
    assert_eq!(wide, [0xff; 2]);
    // Neither do writes to them come between a command and its parameter.
    pc.outb(COMMAND, 0x60);
    pc.outb(1, 0x11);
    pc.outb(DATA, 0x64);
    assert_eq!(pc.ask(0x20, &[]), 0x64);
}

#[test]
fn every_probe_is_answered_at_once() {
    let mut pc = Pc::new();
    assert_eq!(pc.ask(0xaa, &[]), 0x55, "self test");
    assert_eq!(pc.ask(0xab, &[]), 0, "interface test");
    assert_eq!(pc.ask(0x20, &[]), 0x64, "passed, no auxiliary port, translating");
    assert_eq!(pc.ask(0xd0, &[]), 3);
    assert_eq!(pc.ask(0xd2, &[0x5a]), 0x5a);
    // What Linux does when it comes up: A20 on, and a command that means nothing.
    pc.command(0xd1, &[0xdf]);
    pc.command(0xff, &[]);
    assert_eq!(pc.inb(COMMAND), 0x1c, "nothing to read, and the last write was a command");
    assert!(!pc.interrupted(), "answers are polled for");
}

#[test]
fn the_auxiliary_port_is_seen_to_be_absent() {
    let mut pc = Pc::new();
    // i8042_check_aux: it asks for the loop's byte, does not read it as it is not the mouse's, and tests the port.
    pc.command(0xd3, &[0x5a]);
    assert_eq!(pc.inb(COMMAND) & 0x21, 1, "a byte, not of the auxiliary port");
    assert_eq!(pc.ask(0xa9, &[]), 1, "neither 0, 0xfa nor 0xff");
    // Enabling it is of no use, and neither is its interrupt.
    pc.command(0xa8, &[]);
    pc.command(0x60, &[0x47]);
    assert_eq!(pc.ask(0x20, &[]), 0x65);
    // What is sent to it does not come to the keyboard.
    pc.command(0xd4, &[0xf2]);
    assert!(!pc.full());
}

#[test]
fn linux_binds_its_keyboard() {
    let mut pc = Pc::listening();
    let mut talk = |bytes: &[u8]| {
        bytes.iter().for_each(|byte| pc.outb(DATA, *byte));
        pc.received()
    };
    assert_eq!(talk(&[0xff]), [0xfa, 0xaa], "reset");
    assert_eq!(talk(&[0xf2]), [0xfa, 0xab, 0x41], "identify");
    assert_eq!(talk(&[0xf5]), [0xfa]);
    assert_eq!(talk(&[0xed, 0]), [0xfa, 0xfa], "lamps");
    assert_eq!(talk(&[0xf3, 0]), [0xfa, 0xfa], "repetition");
    assert_eq!(talk(&[0xf0, 0]), [0xfa, 0xfa, 0x41]);
    assert_eq!(talk(&[0xf0, 3]), [0xfa, 0xfe], "there is no scan code set but 2");
    assert_eq!(talk(&[0xf0, 2]), [0xfa, 0xfa]);
    assert_eq!(talk(&[0xee]), [0xee]);
    assert_eq!(talk(&[0xea]), [0xfe], "not a command");
    assert_eq!(talk(&[0xed, 0xf4]), [0xfa, 0xfa], "a command instead of a parameter");
    assert_eq!(talk(&[0]), [0xfe], "so this is none");
    pc.i8042.press_ctrl_alt_del().unwrap();
}

#[test]
fn three_keys_are_pressed_and_released() {
    let mut pc = Pc::listening();
    pc.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(pc.received(), [0x1d, 0x38, 0xe0, 0x53, 0xe0, 0xd3, 0xb8, 0x9d]);
    // Without translation: i8042.direct.
    pc.command(0x60, &[0x25]);
    pc.i8042.press_ctrl_alt_del().unwrap();
    let raw = [0x14, 0x11, 0xe0, 0x71, 0xe0, 0xf0, 0x71, 0xf0, 0x11, 0xf0, 0x14];
    assert_eq!(pc.received(), raw);
    pc.outb(DATA, 0xf2);
    assert_eq!(pc.received(), [0xfa, 0xab, 0x83]);
}

#[test]
fn keys_need_a_guest_that_listens() {
    let mut pc = Pc::new();
    let error = Err(I8042Error::NotEnabled);
    assert_eq!(pc.i8042.press_ctrl_alt_del(), error, "no interrupt");
    pc.command(0x60, &[0x75]);
    assert_eq!(pc.i8042.press_ctrl_alt_del(), error, "no interface");
    pc.command(0xae, &[]);
    assert_eq!(pc.i8042.press_ctrl_alt_del(), Ok(()));
    assert_eq!(pc.received().len(), 8);
    pc.command(0xad, &[]);
    assert_eq!(pc.i8042.press_ctrl_alt_del(), error);
    // Any byte enables the interface, and this one disables the keyboard.
    pc.outb(DATA, 0xf5);
    assert_eq!(pc.received(), [0xfa]);
    assert_eq!(pc.i8042.press_ctrl_alt_del(), error, "not scanning");
    for enabling in [0xf4, 0xf6, 0xff] {
        pc.outb(DATA, 0xf5);
        pc.outb(DATA, enabling);
        pc.received();
        assert_eq!(pc.i8042.press_ctrl_alt_del(), Ok(()), "{enabling:#x}");
        pc.received();
    }
}

#[test]
fn keys_are_pressed_as_a_whole_or_not_at_all() {
    let mut pc = Pc::listening();
    pc.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(pc.i8042.press_ctrl_alt_del(), Err(I8042Error::BufferFull));
    assert_eq!(pc.received().len(), 8);
    pc.i8042.press_ctrl_alt_del().unwrap();
    assert_eq!(pc.received().len(), 8);
}

#[test]
fn keys_wait_behind_an_answer_and_while_the_interface_is_off() {
    let mut pc = Pc::listening();
    pc.outb(COMMAND, 0x20);
    pc.i8042.press_ctrl_alt_del().unwrap();
    assert!(!pc.interrupted(), "the answer is polled for");
    assert_eq!(pc.inb(DATA), 0x65);
    assert!(pc.interrupted(), "and then comes the first key");
    assert_eq!(pc.inb(DATA), 0x1d);
    pc.command(0xad, &[]);
    let _ = pc.irq.read();
    assert!(!pc.full());
    assert_eq!(pc.inb(DATA), 0);
    pc.command(0xae, &[]);
    assert_eq!(pc.received().len(), 7);
    // A new command takes the answer of one before it away.
    pc.outb(COMMAND, 0xaa);
    pc.outb(COMMAND, 0xa8);
    assert!(!pc.full());
}

#[test]
fn bytes_that_came_before_the_interrupt_was_enabled_are_not_stuck() {
    let mut pc = Pc::new();
    pc.outb(DATA, 0xee);
    assert!(pc.full() && !pc.interrupted());
    pc.command(0x60, &[0x65]);
    assert_eq!(pc.received(), [0xee]);
}

#[test]
fn a_guest_that_writes_anything_gets_no_more_than_the_buffer() {
    let mut pc = Pc::new();
    // A full period of a generator modulo 2^16: each byte in each of many states.
    let mut state = 1_u16;
    for _ in 0..u16::MAX {
        state = state.wrapping_mul(25173).wrapping_add(13849);
        let [byte, offset] = state.to_be_bytes();
        pc.outb(u64::from(offset & 4), byte);
        if offset & 0x38 == 0 {
            pc.inb(u64::from(offset & 4));
        }
        let _ = pc.i8042.press_ctrl_alt_del();
    }
    let mut left = 0;
    pc.command(0xae, &[]);
    while pc.full() {
        pc.inb(DATA);
        left += 1;
    }
    assert!(left <= Keyboard::CAPACITY, "{left}");
    // It works as ever.
    pc.command(0x60, &[0x65]);
    pc.outb(DATA, 0xff);
    let _ = pc.irq.read();
    assert_eq!((pc.inb(DATA), pc.inb(DATA)), (0xfa, 0xaa));
}
