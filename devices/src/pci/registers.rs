//! Registers of which the guest can change some bits.

/// Bytes with the bits of each that the guest can change. What is not there reads as 0 and takes nothing.
#[derive(Debug)]
pub(crate) struct Registers {
    bytes: Vec<u8>,
    writable: Vec<u8>,
}

impl Registers {
    /// `len` bytes of zeros that nobody can change.
    pub fn new(len: usize) -> Self {
        Self { bytes: vec![0; len], writable: vec![0; len] }
    }

    /// Sets what is at `offset`.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        for (byte, new) in self.bytes.iter_mut().skip(offset).zip(bytes) {
            *byte = *new;
        }
    }

    /// Lets the guest change these bits at `offset`.
    pub fn allow(&mut self, offset: usize, bits: &[u8]) {
        for (byte, new) in self.writable.iter_mut().skip(offset).zip(bits) {
            *byte = *new;
        }
    }

    /// The guest reads.
    pub fn read(&self, offset: usize, data: &mut [u8]) {
        data.fill(0);
        for (byte, from) in data.iter_mut().zip(self.bytes.iter().skip(offset)) {
            *byte = *from;
        }
    }

    /// The guest writes.
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        let there = self.bytes.iter_mut().zip(&self.writable).skip(offset);
        for ((byte, writable), new) in there.zip(data) {
            *byte = *byte & !writable | new & writable;
        }
    }

    /// What is at `offset`, as a little-endian number.
    pub fn get(&self, offset: usize, len: usize) -> u64 {
        let mut bytes = [0; 8];
        self.read(offset, &mut bytes[..len.min(8)]);
        u64::from_le_bytes(bytes)
    }
}
