//! Exits of vCPUs, counted without two vCPUs writing to the same cache line.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::Vcpu;

/// As many as a microVM can have; more would share.
const VCPUS: usize = 32;

/// One vCPU's exits. Its thread alone counts, so that it needs no atomic addition.
#[derive(Debug)]
#[repr(align(64))]
pub struct VcpuExits {
    io_in: AtomicU64,
    io_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
}

fn inc(count: &AtomicU64) {
    count.store(count.load(Relaxed).wrapping_add(1), Relaxed);
}

impl VcpuExits {
    const fn new() -> Self {
        let [io_in, io_out, mmio_read, mmio_write] = [const { AtomicU64::new(0) }; 4];
        Self { io_in, io_out, mmio_read, mmio_write }
    }

    /// The guest read a port.
    pub fn io_in(&self) {
        inc(&self.io_in);
    }

    /// The guest wrote to a port.
    pub fn io_out(&self) {
        inc(&self.io_out);
    }

    /// The guest read memory-mapped registers.
    pub fn mmio_read(&self) {
        inc(&self.mmio_read);
    }

    /// The guest wrote to memory-mapped registers.
    pub fn mmio_write(&self) {
        inc(&self.mmio_write);
    }
}

/// The exits of each vCPU.
#[derive(Debug)]
pub struct AllExits([VcpuExits; VCPUS]);

impl AllExits {
    pub(super) const fn new() -> Self {
        Self([const { VcpuExits::new() }; VCPUS])
    }

    /// Nothing: the totals are settled.
    pub(super) fn settle(&self) {}

    fn total(&self, which: impl Fn(&VcpuExits) -> &AtomicU64) -> u64 {
        self.0.iter().fold(0, |total: u64, exits| total.wrapping_add(which(exits).load(Relaxed)))
    }
}

impl Vcpu {
    /// Where the thread of vCPU `index`, and nobody else, counts.
    pub fn exits(&self, index: u8) -> &VcpuExits {
        &self.exits.0[usize::from(index) % VCPUS]
    }

    /// Adds up what the threads have counted.
    pub(super) fn collect(&self) {
        self.exit_io_in.set_total(self.exits.total(|exits| &exits.io_in));
        self.exit_io_out.set_total(self.exits.total(|exits| &exits.io_out));
        self.exit_mmio_read.set_total(self.exits.total(|exits| &exits.mmio_read));
        self.exit_mmio_write.set_total(self.exits.total(|exits| &exits.mmio_write));
    }
}
