//! The serial port COM1: the guest's console.

use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Instant;

use resources::TokenBucket;
use vm_superio::Trigger;
use vm_superio::serial::{Error, SerialEvents};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::limit::{Clock, Limited};
use crate::bus::BusDevice;
use crate::counter::{Counters, counters};

mod limit;

counters! {
    /// What the serial port counts.
    UartCounters {
        /// Bytes that the guest read.
        read_count,
        /// Bytes that the guest sent.
        write_count,
        /// Bytes that the output did not take.
        missed_write_count,
        /// Accesses that no UART has, and interrupts that failed.
        error_count,
        /// Bytes beyond the limit.
        rate_limiter_dropped_bytes,
    }
}

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
        let counters = Arc::new(UartCounters::default());
        let observer = Arc::new(Observer { room, counters: Arc::clone(&counters) });
        let output = Limited::new(output, limit, clock, counters);
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

    /// What the port counts, under Firecracker's names.
    pub fn counters(&self) -> Arc<dyn Counters> {
        Arc::clone(&self.observer.counters) as _
    }
}

impl BusDevice for Serial {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match (u8::try_from(offset), data) {
            (Ok(offset), [byte]) => *byte = self.uart.read(offset),
            (_, data) => {
                self.observer.counters.error_count.inc();
                data.fill(0xff);
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        let result = match (u8::try_from(offset), data) {
            (Ok(offset), &[byte]) => self.uart.write(offset, byte),
            _ => return self.observer.counters.error_count.inc(),
        };
        match result {
            // Lost output has been counted.
            Ok(()) | Err(Error::IOError(_)) => {}
            Err(error) => {
                self.observer.counters.error_count.inc();
                log::debug!("serial port: {error}");
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
    counters: Arc<UartCounters>,
}

impl SerialEvents for Observer {
    fn buffer_read(&self) {
        self.counters.read_count.inc();
    }

    fn out_byte(&self) {
        self.counters.write_count.inc();
    }

    fn tx_lost_byte(&self) {
        // Once: the guest decides how many there are.
        if self.counters.missed_write_count.count() == 0 {
            log::warn!("serial port: the console's output does not take what the guest sends; it is lost");
        }
        self.counters.missed_write_count.inc();
    }

    fn in_buffer_empty(&self) {
        // It fails only when the counter is full, and then whoever waits is awake.
        let _ = self.room.write(1);
    }
}

#[cfg(test)]
mod tests;
