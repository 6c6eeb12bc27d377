//! The small guest: a kernel without an operating system, which starts in a moment. It writes numbered sectors to
//! the first virtio-blk device (virtio 1.2, sections 4.2 and 5.2), flushes them, says so on the serial port, and ends
//! as its command line asks. Everything is polled; there are no interrupts. The build script of `tests` builds it.
//!
//! A round is four writes of one sector each, all in the queue at once, and then a flush. Round `n`, counted from 0,
//! writes the sectors `4n` to `4n + 3`. Each holds, 32 times, two little-endian numbers of 64 bits: [`MARK`] and its own
//! number. Lines on the serial port:
//!
//! | line | meaning |
//! | --- | --- |
//! | `small: ready` | it runs |
//! | `small: flushed N` | rounds 0 to N are on the disk |
//! | `small: failed N` | round N met an I/O error; the next one is tried |
//! | `small: end` | what `then` asks for comes next |
//!
//! Words of the command line: `rounds=N` (default: until the disk is full), and `then=`:
//!
//! | word | what it does at the end |
//! | --- | --- |
//! | `reset` | resets by the keyboard controller; the default |
//! | `triple` | a triple fault |
//! | `spin` | a loop that never leaves the guest |
//! | `sleep` | halts with interrupts off |
//! | `lost` | jumps to where there is no memory, which KVM cannot emulate |
//! | `talk` | prints for ever |

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::fmt::{self, Write};
use core::panic::PanicInfo;
use core::ptr::{addr_of, addr_of_mut, read_volatile, write_volatile};
use core::sync::atomic::{Ordering, fence};

/// What every sector that was written holds, beside its number.
const MARK: u64 = u64::from_le_bytes(*b"PINFOLD!");
const WRITES: u64 = 4;

// The 64-bit boot protocol enters here with the zero page in RSI and a stack of one page. SSE, which compiled code
// uses, is switched on: CR0.MP without CR0.EM, CR4.OSFXSR and CR4.OSXMMEXCPT.
global_asm!(
    ".globl _start",
    "_start:",
    "mov rax, cr0",
    "and rax, ~4",
    "or rax, 2",
    "mov cr0, rax",
    "mov rax, cr4",
    "or rax, 0x600",
    "mov cr4, rax",
    "lea rsp, [rip + {stack} + {size}]",
    "mov rdi, rsi",
    "call {main}",
    "2: hlt",
    "jmp 2b",
    stack = sym STACK,
    size = const STACK_SIZE,
    main = sym main,
);

const STACK_SIZE: usize = 16 << 10;

#[repr(align(4096))]
struct Pages<const N: usize>(#[allow(dead_code)] [u8; N]);

static mut STACK: Pages<STACK_SIZE> = Pages([0; STACK_SIZE]);

extern "C" fn main(zero_page: *const u8) -> ! {
    let mut serial = Serial;
    let words = command_line(zero_page);
    say(&mut serial, format_args!("ready"));
    let rounds = words.value("rounds").and_then(|text| text.parse().ok()).unwrap_or(u64::MAX);
    if let Some(mut disk) = Disk::find() {
        for round in 0..rounds.min(disk.sectors / WRITES) {
            match disk.round(round) {
                true => say(&mut serial, format_args!("flushed {round}")),
                false => say(&mut serial, format_args!("failed {round}")),
            }
        }
    }
    say(&mut serial, format_args!("end"));
    match words.value("then").unwrap_or("reset") {
        "triple" => triple_fault(),
        "spin" => loop {
            core::hint::spin_loop();
        },
        "sleep" => loop {
            // SAFETY: it waits for an interrupt, and none can come.
            unsafe { asm!("cli", "hlt", options(nomem, nostack)) }
        },
        // SAFETY: nothing is there, which is the point: see `lost` above.
        "lost" => unsafe { asm!("jmp {}", in(reg) HOLE, options(noreturn)) },
        "talk" => loop {
            say(&mut serial, format_args!("there is no end to it"));
        },
        // The keyboard controller pulses the reset line.
        _ => loop {
            out(0x64, 0xFE);
        },
    }
}

/// An address in the hole below 4 GiB at which there is no device.
const HOLE: u64 = 0xD000_0000;

/// With an empty interrupt descriptor table the first exception has no handler, and neither has the one for that.
fn triple_fault() -> ! {
    let empty = [0_u16; 5];
    // SAFETY: it ends the guest, as it should.
    unsafe { asm!("lidt [{}]", "ud2", in(reg) &empty, options(noreturn)) }
}

/// The kernel's command line.
struct Words(&'static str);

impl Words {
    /// What follows `key=`.
    fn value(&self, key: &str) -> Option<&str> {
        self.0.split_ascii_whitespace().find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
    }
}

fn command_line(zero_page: *const u8) -> Words {
    // `cmd_line_ptr` in struct boot_params (Linux, arch/x86/include/uapi/asm/bootparam.h).
    const CMD_LINE_PTR: usize = 0x228;
    // SAFETY: the boot protocol promises the zero page, and in it the address of a string that ends with a NUL.
    let text = unsafe {
        let start = zero_page.add(CMD_LINE_PTR).cast::<u32>().read_unaligned() as *const u8;
        let len = (0..4096).take_while(|&index| *start.add(index) != 0).count();
        core::slice::from_raw_parts(start, len)
    };
    Words(core::str::from_utf8(text).unwrap_or_default())
}

/// A virtio-blk device with one queue, whose structures are [`Shared`].
struct Disk {
    base: usize,
    sectors: u64,
    /// How many chains were made available so far, modulo 2^16.
    available: u16,
}

/// Descriptors of the queue: three for each of the requests of a round.
const QUEUE_SIZE: u16 = 16;

#[repr(C)]
#[derive(Clone, Copy)]
struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

/// Everything that the device reads and writes (virtio 1.2, sections 2.7.5 to 2.7.8 and 5.2.6).
#[repr(C, align(4096))]
struct Shared {
    descriptors: [Descriptor; QUEUE_SIZE as usize],
    available: [u16; 2 + QUEUE_SIZE as usize],
    _gap: u32,
    /// Flags and index, each 16 bits, then elements of 8 bytes.
    used: [u32; 1 + 2 * QUEUE_SIZE as usize],
    heads: [Head; WRITES as usize],
    data: [[u64; 64]; WRITES as usize],
    status: [u8; WRITES as usize],
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Head {
    kind: u32,
    _reserved: u32,
    sector: u64,
}

static mut SHARED: Shared = Shared {
    descriptors: [Descriptor { address: 0, len: 0, flags: 0, next: 0 }; QUEUE_SIZE as usize],
    available: [0; 2 + QUEUE_SIZE as usize],
    _gap: 0,
    used: [0; 1 + 2 * QUEUE_SIZE as usize],
    heads: [Head { kind: 0, _reserved: 0, sector: 0 }; WRITES as usize],
    data: [[0; 64]; WRITES as usize],
    status: [0; WRITES as usize],
};

impl Disk {
    const WRITE: u32 = 1;
    const FLUSH: u32 = 4;

    /// Looks through the windows in which Pinfold has its virtio-mmio devices, and starts the first disk.
    fn find() -> Option<Self> {
        const FIRST_WINDOW: usize = 0xC000_1000;
        const WINDOWS: usize = 17;
        const BLOCK: u32 = 2;
        let bases = (0..WINDOWS).map(|index| FIRST_WINDOW + index * 0x1000);
        let mut disk = bases
            .map(|base| Self { base, sectors: 0, available: 0 })
            .find(|disk| disk.get(0x000) == u32::from_le_bytes(*b"virt") && disk.get(0x008) == BLOCK)?;
        disk.start();
        Some(disk)
    }

    /// Initialisation in the order of section 3.1.1.
    fn start(&mut self) {
        const ACKNOWLEDGE: u32 = 1;
        const DRIVER: u32 = 2;
        const DRIVER_OK: u32 = 4;
        const FEATURES_OK: u32 = 8;
        const VIRTIO_BLK_F_FLUSH: u32 = 1 << 9;
        const VIRTIO_F_VERSION_1: u32 = 1 << (32 - 32);
        self.set(0x070, 0);
        self.set(0x070, ACKNOWLEDGE | DRIVER);
        self.set(0x014, 0);
        let flush = self.get(0x010) & VIRTIO_BLK_F_FLUSH;
        for (half, features) in [(0, flush), (1, VIRTIO_F_VERSION_1)] {
            self.set(0x024, half);
            self.set(0x020, features);
        }
        self.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK);
        self.set(0x030, 0);
        self.set(0x038, u32::from(QUEUE_SIZE));
        let shared = addr_of_mut!(SHARED);
        // SAFETY: addresses of parts of a static; nothing is read.
        let parts = unsafe {
            [
                (0x080, addr_of!((*shared).descriptors) as u64),
                (0x090, addr_of!((*shared).available) as u64),
                (0x0A0, addr_of!((*shared).used) as u64),
            ]
        };
        for (register, address) in parts {
            self.set(register, address as u32);
            self.set(register + 4, (address >> 32) as u32);
        }
        self.set(0x044, 1);
        self.set(0x070, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        self.sectors = u64::from(self.get(0x100)) | u64::from(self.get(0x104)) << 32;
    }

    /// Writes the sectors of a round, then flushes. Whether all went well.
    fn round(&mut self, round: u64) -> bool {
        for index in 0..WRITES {
            let sector = round * WRITES + index;
            // SAFETY: the device has no request now; the rest of the guest has one thread.
            let data = unsafe { &mut (*addr_of_mut!(SHARED)).data[index as usize] };
            for pair in data.chunks_exact_mut(2) {
                pair.copy_from_slice(&[MARK, sector]);
            }
            self.queue(index as usize, Self::WRITE, sector);
        }
        if !self.complete(WRITES as u16) {
            return false;
        }
        self.queue(0, Self::FLUSH, 0);
        self.complete(1)
    }

    /// Makes a request available: its head, its data if it has any, and the byte for its status.
    fn queue(&mut self, index: usize, kind: u32, sector: u64) {
        const NEXT: u16 = 1;
        const WRITABLE: u16 = 2;
        let first = index * 3;
        // SAFETY: the device does not have these parts now; it sees them by the index that is written last.
        unsafe {
            let shared = addr_of_mut!(SHARED);
            write_volatile(addr_of_mut!((*shared).heads[index]), Head { kind, _reserved: 0, sector });
            write_volatile(addr_of_mut!((*shared).status[index]), 0xFF);
            let head = addr_of!((*shared).heads[index]) as u64;
            let data = addr_of!((*shared).data[index]) as u64;
            let status = addr_of!((*shared).status[index]) as u64;
            let after_head = if kind == Self::WRITE { first + 1 } else { first + 2 };
            for (place, address, len, flags, next) in [
                (first, head, 16, NEXT, after_head),
                (first + 1, data, 512, NEXT, first + 2),
                (first + 2, status, 1, WRITABLE, 0),
            ] {
                let descriptor = Descriptor { address, len, flags, next: next as u16 };
                write_volatile(addr_of_mut!((*shared).descriptors[place]), descriptor);
            }
            let slot = 2 + usize::from(self.available % QUEUE_SIZE);
            write_volatile(addr_of_mut!((*shared).available[slot]), first as u16);
            self.available = self.available.wrapping_add(1);
            fence(Ordering::SeqCst);
            write_volatile(addr_of_mut!((*shared).available[1]), self.available);
        }
    }

    /// Notifies the device and waits until it has used everything; whether the last `count` requests went well.
    fn complete(&mut self, count: u16) -> bool {
        fence(Ordering::SeqCst);
        self.set(0x050, 0);
        // SAFETY: the device writes the index, and what it has used it leaves alone.
        unsafe {
            let shared = addr_of!(SHARED);
            while (read_volatile(addr_of!((*shared).used[0])) >> 16) as u16 != self.available {
                core::hint::spin_loop();
            }
            fence(Ordering::SeqCst);
            (0..usize::from(count)).all(|index| read_volatile(addr_of!((*shared).status[index])) == 0)
        }
    }

    fn get(&self, register: usize) -> u32 {
        // SAFETY: a register in the window of a device, or where a device could be.
        unsafe { read_volatile((self.base + register) as *const u32) }
    }

    fn set(&self, register: usize, value: u32) {
        // SAFETY: as above.
        unsafe { write_volatile((self.base + register) as *mut u32, value) }
    }
}

/// The first serial port, which is never busy.
struct Serial;

impl Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        text.bytes().for_each(|byte| out(0x3F8, byte));
        Ok(())
    }
}

fn say(serial: &mut Serial, text: fmt::Arguments) {
    // The serial port takes everything.
    let _ = writeln!(serial, "small: {text}");
}

fn out(port: u16, value: u8) {
    // SAFETY: ports of devices that touch no memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

#[panic_handler]
fn panic(_: &PanicInfo) -> ! {
    say(&mut Serial, format_args!("panicked"));
    triple_fault()
}
