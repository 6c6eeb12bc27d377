//! The serial port COM1: the guest's console.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use resources::TokenBucket;
use vm_superio::Trigger;
use vm_superio::serial::{Error, SerialEvents};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::limit::{Clock, Limited};
use crate::bus::BusDevice;

mod limit;

/// A 16550A with its eight byte-wide ports (COM1: 0x3f8, IRQ 4).
///
/// What the guest sends is written to the output byte by byte, on the vCPU thread. Bytes that the output does
/// not take are counted and lost: the guest goes on. So are those beyond the limit, if there is one. An output
/// that may block is the caller's to avoid.
pub struct Serial {
    uart: vm_superio::Serial<Irq, Arc<Observer>, Limited>,
    observer: Arc<Observer>,
}

impl Serial {
    /// Number of ports.
    pub const LEN: u64 = 8;

    /// A port that writes to `irq` for each interrupt and to `output` what the guest sends, of that only as many
    /// bytes as `limit` has tokens.
    pub fn new(irq: EventFd, output: Box<dyn Write + Send>, limit: Option<TokenBucket>) -> io::Result<Self> {
        Self::with_clock(irq, output, limit, Box::new(Instant::now))
    }

    fn with_clock(
        irq: EventFd,
        output: Box<dyn Write + Send>,
        limit: Option<TokenBucket>,
        clock: Clock,
    ) -> io::Result<Self> {
        let room = EventFd::new(EFD_NONBLOCK)?;
        let observer = Arc::new(Observer { room, lost: AtomicU64::new(0) });
        let output = Limited::new(output, limit, clock);
        Ok(Self { uart: vm_superio::Serial::with_events(Irq(irq), Arc::clone(&observer), output), observer })
    }

    /// How many bytes [`Self::input`] takes now.
    pub fn room(&self) -> usize {
        self.uart.fifo_capacity()
    }

    /// Sends bytes to the guest; returns how many of them found room. In loopback mode the port hears nothing
    /// from outside, and none does.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = self.room();
        match self.uart.enqueue_raw_bytes(bytes) {
            Ok(taken) => taken,
            Err(error) => {
                // Either there was no room, or the bytes are in and only their interrupt failed.
                log::debug!("serial port: {error}");
                bytes.len().min(room)
            }
        }
    }

    /// An eventfd that is signalled when the guest has read the last byte: input may go on. It stays
    /// signalled until [`Self::drain_room_event`].
    pub fn room_event(&self) -> RawFd {
        self.observer.room.as_raw_fd()
    }

    /// Makes [`Self::room_event`] unreadable until the guest reads the last byte again.
    pub fn drain_room_event(&self) {
        // It fails when there is nothing to drain.
        let _ = self.observer.room.read();
    }

    /// How many bytes the output did not take.
    pub fn lost_bytes(&self) -> u64 {
        self.observer.lost.load(Ordering::Relaxed)
    }

    /// How many bytes were beyond the limit.
    pub fn dropped_bytes(&self) -> u64 {
        self.uart.writer().dropped()
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (u8::try_from(offset), data) {
            (Ok(offset), [byte]) => *byte = self.uart.read(offset),
            (_, data) => data.fill(0xff),
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let (Ok(offset), &[byte]) = (u8::try_from(offset), data) {
            match self.uart.write(offset, byte) {
                // Lost output has been counted.
                Ok(()) | Err(Error::IOError(_)) => {}
                Err(error) => log::debug!("serial port: {error}"),
            }
        }
    }
}

struct Irq(EventFd);

impl Trigger for Irq {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct Observer {
    room: EventFd,
    lost: AtomicU64,
}

impl SerialEvents for Observer {
    fn buffer_read(&self) {}

    fn out_byte(&self) {}

    fn tx_lost_byte(&self) {
        // Once: the guest decides how many there are.
        if self.lost.fetch_add(1, Ordering::Relaxed) == 0 {
            log::warn!("serial port: the console's output does not take what the guest sends; it is lost");
        }
    }

    fn in_buffer_empty(&self) {
        // It fails only when the counter is full, and then whoever waits is awake.
        let _ = self.room.write(1);
    }
}

#[cfg(test)]
mod tests;
