//! Devices of a PC: serial port, keyboard controller, ACPI's power register, boot timer.

use std::io;
use std::sync::{Arc, Mutex};

use devices::bus::Bus;
use devices::legacy::{BootTimer, ExitSignal, I8042, Power, Serial, Timestamp};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::guest::access;
use crate::input::Input;

fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).expect("the host has descriptors")
}

/// Accesses by a guest; the host types, and presses Ctrl-Alt-Del.
pub fn run(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let exit = Arc::new(ExitSignal::new().expect("the host has descriptors"));
    let serial = Serial::new(eventfd(), Box::new(io::sink()), None).expect("the host has descriptors");
    let serial = Arc::new(Mutex::new(serial));
    let keyboard = Arc::new(Mutex::new(I8042::new(eventfd(), Arc::clone(&exit))));
    let bus = Bus::new();
    let put = |at, len, device| bus.insert(at, len, device).expect("their places are their own");
    put(0x3F8, 8, Arc::clone(&serial) as _);
    put(0x60, 5, Arc::clone(&keyboard) as _);
    put(0x600, 4, Arc::new(Mutex::new(Power::new(Arc::clone(&exit)))) as _);
    put(0x700, 1, Arc::new(Mutex::new(BootTimer::new(Timestamp::now()))) as _);
    for _ in 0..1000 {
        if input.is_empty() {
            break;
        }
        let choice = input.u8();
        let offset = u64::from(input.u8() & 7);
        let address = match choice >> 4 & 7 {
            0 | 1 => 0x3F8 + offset,
            2 | 3 => 0x60 + offset,
            4 => 0x600 + offset,
            5 => 0x700 + (offset & 1),
            6 => {
                let mut serial = serial.lock().expect("nobody panicked with it");
                let room = serial.room();
                assert!(serial.input(input.short_bytes()) <= room);
                serial.drain_room_event();
                continue;
            }
            _ => {
                let _ = keyboard.lock().expect("nobody panicked with it").press_ctrl_alt_del();
                let _ = exit.take();
                continue;
            }
        };
        access(choice, &mut input, |data, write| match write {
            true => bus.write(address, data),
            false => bus.read(address, data),
        });
    }
}
