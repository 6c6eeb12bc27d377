//! A hostile driver: does to a device, its queues and guest memory what the fuzzer's bytes say.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, Mutex};

use devices::pci::PciFunction;
use devices::virtio::device::{Memory, VirtioDevice};
use devices::virtio::mmio::MmioTransport;
use devices::virtio::pci::VirtioPci;
use devices::virtio::slot::Slot;
use devices::virtio::worker::Worker;
use event_manager::{EventManager, SubscriberOps};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;
use crate::transport::{DeafRoutes, Transport};

/// RAM, with a hole between its two regions.
const LOW_RAM: u64 = 0x10_0000;
const HIGH_RAM: u64 = 0x20_0000;
const HIGH_RAM_LEN: u64 = 0x1_0000;
/// Where queue 0 is, and bytes between two queues: table, available and used ring have a page each at least.
const QUEUES: u64 = 0x1000;
const QUEUE_STRIDE: u64 = 0x4000;
const AVAILABLE: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Queues that have a place.
const MAX_QUEUES: usize = 24;
/// Where buffers are, and indirect tables.
const BUFFERS: u64 = 0x8_0000;
const TABLES: u64 = 0xF_0000;
/// Steps of one input.
const MAX_STEPS: usize = 300;
/// Turns in which the event loop has to come to rest.
const MAX_TURNS: usize = 5000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What devices have counted since somebody looked.
static REACHED: Mutex<BTreeSet<&str>> = Mutex::new(BTreeSet::new());

/// The names of what devices have counted since the last call, so that it shows whether a corpus gets anywhere.
pub fn take_reached() -> BTreeSet<&'static str> {
    std::mem::take(&mut *REACHED.lock().expect("it is only added to"))
}

/// A device with a driver and an event loop.
pub struct Guest {
    transport: Transport,
    memory: GuestMemoryMmap,
    events: EventManager<Worker>,
    queues: usize,
    /// Size of each queue as the driver last set it.
    size: u16,
    /// Where the next buffer is.
    next: u64,
}

/// Fresh guest memory; `shared` is what back-ends in other processes need.
fn guest_memory(shared: bool) -> io::Result<Memory> {
    let ranges = [(0, LOW_RAM), (HIGH_RAM, HIGH_RAM_LEN)];
    let mut regions = Vec::new();
    for (start, len) in ranges {
        let file = match shared {
            true => {
                let file = crate::host::memfd(&[])?;
                file.set_len(len)?;
                Some(FileOffset::new(file, 0))
            }
            false => None,
        };
        regions.push((GuestAddress(start), usize::try_from(len).map_err(io::Error::other)?, file));
    }
    let memory = GuestMemoryMmap::from_ranges_with_files(regions).map_err(io::Error::other)?;
    Ok(Memory::new(memory))
}

impl Guest {
    /// A guest with `device`, by MMIO or by PCI as the input says.
    pub fn new(device: Box<dyn VirtioDevice>, shared: bool, input: &mut Input<'_>) -> io::Result<Self> {
        let memory = guest_memory(shared)?;
        let queues = device.queue_max_sizes().len().min(MAX_QUEUES);
        let transport = match input.flag() {
            false => {
                Transport::Mmio(MmioTransport::new(device, memory.clone(), EventFd::new(EFD_NONBLOCK)?)?)
            }
            true => {
                let routes = Arc::new(DeafRoutes::new(VirtioPci::vectors(device.as_ref()))?);
                Transport::Pci(Box::new(VirtioPci::new(
                    device,
                    memory.clone(),
                    routes,
                    0x1_0000_0000,
                    0x1000,
                )?))
            }
        };
        let mut events = EventManager::new().map_err(|error| io::Error::other(format!("{error:?}")))?;
        events.add_subscriber(Worker::new(Arc::clone(transport.slot())));
        let memory = GuestMemoryMmap::clone(&memory.memory());
        Ok(Self { transport, memory, events, queues, size: 16, next: BUFFERS })
    }

    /// The device in its place.
    pub fn slot(&self) -> &Arc<Slot> {
        self.transport.slot()
    }

    /// Lives through `input`. `host` is called when it is the turn of the world outside the device. The device is
    /// reset in the end.
    pub fn live(&mut self, input: &mut Input<'_>, mut host: impl FnMut(&Self, &mut Input<'_>)) {
        for _ in 0..MAX_STEPS {
            if input.is_empty() {
                break;
            }
            self.step(input, &mut host);
            self.settle();
        }
        self.transport.slot().reset();
        self.settle();
        let mut reached = REACHED.lock().expect("it is only added to");
        for counters in self.transport.slot().counters() {
            counters.each(&mut |name, counter| {
                if counter.count() > 0 {
                    reached.insert(name);
                }
            });
        }
    }

    fn step(&mut self, input: &mut Input<'_>, host: &mut impl FnMut(&Self, &mut Input<'_>)) {
        match input.u8() % 16 {
            0 => self.start(input),
            1 | 2 => self.lend(input),
            3 => self.transport.slot().kick(usize::from(input.u8())),
            4 | 5 => host(self, input),
            6 => self.access_register(input),
            7 => self.access_config(input),
            8 => {
                let (address, bytes) = (u64::from(input.u32() & 0x3F_FFFF), input.short_bytes());
                // Memory that is not there is no matter.
                let _ = self.memory.write_slice(bytes, GuestAddress(address));
            }
            9 => self.store_descriptor(input),
            10 => {
                let (queue, index) = (self.queue(input), input.u16());
                self.put_u16(queue + AVAILABLE + 2, index);
                self.put_u16(queue + AVAILABLE, input.u8().into());
            }
            11 => {
                // used_event, behind the available ring.
                let (queue, index) = (self.queue(input), input.u16());
                self.put_u16(queue + AVAILABLE + 4 + 2 * u64::from(self.size), index);
            }
            12 => {
                let (queue, entry, head) = (self.queue(input), input.u8(), input.u16());
                self.put_u16(queue + AVAILABLE + 4 + 2 * u64::from(u16::from(entry) % self.size), head);
            }
            13 => self.access_function(input),
            14 => self.transport.slot().reset(),
            _ => {
                let status = input.u8();
                self.transport.set_status(status);
            }
        }
    }

    /// What a driver does up to DRIVER_OK.
    fn start(&mut self, input: &mut Input<'_>) {
        let choice = input.u8();
        let mask = if choice & 1 == 0 { u64::MAX } else { input.u64() | 1 << 32 };
        self.size = 1 << (choice >> 1 & 7);
        for status in [0, 1, 3] {
            self.transport.set_status(status);
        }
        self.transport.negotiate(mask);
        self.transport.set_status(11);
        let missing = if choice & 0x80 == 0 { u32::MAX } else { input.u32() };
        for (index, at) in (0..self.queues).zip(0_u16..) {
            let base = QUEUES + u64::from(at) * QUEUE_STRIDE;
            // A driver begins with empty rings.
            let _ = self.memory.write_slice(&[0; 4], GuestAddress(base + AVAILABLE));
            let _ = self.memory.write_slice(&[0; 4], GuestAddress(base + USED));
            if missing >> (index % 32) & 1 == 0 && missing != u32::MAX {
                continue;
            }
            self.transport.set_up_queue(at, self.size, [base, base + AVAILABLE, base + USED]);
        }
        self.transport.set_status(15);
    }

    fn queue(&self, input: &mut Input<'_>) -> u64 {
        let index = usize::from(input.u8()) % self.queues.max(1);
        QUEUES + u64::try_from(index).unwrap_or_default() * QUEUE_STRIDE
    }

    fn put_u16(&self, address: u64, value: u16) {
        let _ = self.memory.write_slice(&value.to_le_bytes(), GuestAddress(address));
    }

    fn get_u16(&self, address: u64) -> u16 {
        let mut bytes = [0; 2];
        let _ = self.memory.read_slice(&mut bytes, GuestAddress(address));
        u16::from_le_bytes(bytes)
    }

    /// A place for a buffer of `len` bytes, or one that is no place.
    fn place(&mut self, len: u32) -> u64 {
        if self.next + u64::from(len) > TABLES {
            self.next = BUFFERS;
        }
        let at = self.next;
        self.next = (at + u64::from(len)).next_multiple_of(16).min(TABLES);
        at
    }

    /// Makes a chain available and kicks, mostly as the protocol wants it.
    fn lend(&mut self, input: &mut Input<'_>) {
        let (queue, choice) = (input.u8(), input.u8());
        let count = u16::from(choice & 7) + 1;
        let (indirect, kick) = (choice & 8 != 0, choice & 16 == 0);
        let index = usize::from(queue) % self.queues.max(1);
        let base = QUEUES + u64::try_from(index).unwrap_or_default() * QUEUE_STRIDE;
        let position = self.get_u16(base + AVAILABLE + 2);
        let head = if indirect { position % self.size } else { position.wrapping_mul(count) % self.size };
        let table = if indirect { TABLES + u64::from(position % 16) * 0x100 } else { base };
        for step in 0..count {
            let at = if indirect { step } else { (head + step) % self.size };
            let next = if indirect { step + 1 } else { (at + 1) % self.size };
            let flags = if step + 1 < count { NEXT } else { 0 };
            let descriptor = self.buffer(input, flags, next);
            let _ = self.memory.write_slice(&descriptor, GuestAddress(table + 16 * u64::from(at)));
        }
        if indirect {
            let descriptor = bytes_of(table, u32::from(count) * 16, INDIRECT, 0);
            let _ = self.memory.write_slice(&descriptor, GuestAddress(base + 16 * u64::from(head)));
        }
        self.put_u16(base + AVAILABLE + 4 + 2 * u64::from(position % self.size), head);
        self.put_u16(base + AVAILABLE + 2, position.wrapping_add(1));
        if kick {
            self.transport.slot().kick(index);
        }
    }

    /// A buffer as a descriptor; what the device may read of it comes from the input.
    fn buffer(&mut self, input: &mut Input<'_>, flags: u16, next: u16) -> [u8; 16] {
        const LENGTHS: [u32; 8] = [1, 4, 16, 44, 512, 4096, 0x1_1000, 0];
        let choice = input.u8();
        let writable = choice & 1 != 0;
        let contents = if writable || choice & 2 != 0 { &[][..] } else { input.short_bytes() };
        let len = match (choice >> 2 & 7, choice & 2 != 0) {
            (7, _) => input.u32(),
            (0, false) => u32::try_from(contents.len()).unwrap_or_default(),
            (class, _) => LENGTHS[usize::from(class)],
        };
        let place = match choice >> 5 {
            7 => u64::from(input.u32()),
            // Into the hole, or over the end of RAM.
            6 => HIGH_RAM + HIGH_RAM_LEN - 8,
            5 => LOW_RAM - 8,
            _ => self.place(len.min(0x2_0000)),
        };
        let _ = self.memory.write_slice(contents, GuestAddress(place));
        bytes_of(place, len, if writable { flags | WRITE } else { flags }, next)
    }

    fn store_descriptor(&mut self, input: &mut Input<'_>) {
        let (queue, index) = (self.queue(input), input.u8());
        let descriptor = bytes_of(input.u64(), input.u32(), input.u16(), input.u16());
        let _ = self.memory.write_slice(&descriptor, GuestAddress(queue + 16 * u64::from(index)));
    }

    fn access_register(&mut self, input: &mut Input<'_>) {
        let (offset, choice) = (u64::from(input.u16()), input.u8());
        access(choice, input, |data, write| match write {
            true => self.transport.write(offset, data),
            false => self.transport.bus().read(offset, data),
        });
    }

    /// The device's own configuration space.
    fn access_config(&mut self, input: &mut Input<'_>) {
        let (offset, choice) = (u64::from(input.u8()), input.u8());
        let start = if matches!(self.transport, Transport::Mmio(_)) { 0x100 } else { 0x2000 };
        access(choice, input, |data, write| match write {
            true => self.transport.write(start + offset, data),
            false => self.transport.bus().read(start + offset, data),
        });
    }

    /// PCI's configuration space of the device.
    fn access_function(&mut self, input: &mut Input<'_>) {
        let (offset, choice) = (usize::from(input.u16() & 0xFFF), input.u8());
        let Transport::Pci(pci) = &mut self.transport else { return };
        access(choice, input, |data, write| match write {
            true => pci.write_config(offset, data),
            false => pci.read_config(offset, data),
        });
    }

    /// Handles what there is to handle.
    fn settle(&mut self) {
        for _ in 0..MAX_TURNS {
            match self.events.run_with_timeout(0) {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        }
        panic!("the event loop does not come to rest");
    }
}

/// An access of 1, 2, 4 or 8 bytes; a written one takes its data from the input.
pub fn access(choice: u8, input: &mut Input<'_>, mut one: impl FnMut(&mut [u8], bool)) {
    let len = 1 << (choice & 3);
    let mut data = [0x55; 8];
    let write = choice & 4 != 0;
    if write {
        data = input.u64().to_le_bytes();
    }
    one(&mut data[..len], write);
}

fn bytes_of(address: u64, len: u32, flags: u16, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
