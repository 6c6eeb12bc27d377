//! What a descriptor chain asks of a drive (virtio 1.2, section 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::disk::SECTOR;
use crate::virtio::iovec::{ChainBuffers, ChainError};

/// Bytes of a request's header: type, reserved, sector.
pub(super) const HEADER_LEN: u32 = 16;

/// Bytes of a segment of a discard or write-zeroes request: sector, number of sectors, flags.
const SEGMENT_LEN: u32 = 16;

/// How a request ended, as the byte that the driver reads: VIRTIO_BLK_S_*.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupported = 2,
}

impl Status {
    /// Writes it where the driver reads it, which is the last writable byte; `false` if there is no room for it.
    pub fn tell(self, buffers: &ChainBuffers<'_>) -> bool {
        let at = buffers.writable_len().checked_sub(1);
        at.is_some_and(|at| buffers.write_at(at, &[self as u8]).is_ok())
    }
}

/// The range of a discard or write-zeroes request (struct virtio_blk_discard_write_zeroes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub sector: u64,
    pub sectors: u32,
    pub flags: u32,
}

/// A parsed request; lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Request {
    /// Read `len` bytes from `sector` on into the writable part, which starts with them.
    In { sector: u64, len: u32 },
    /// Write the `len` bytes behind the header to `sector`.
    Out { sector: u64, len: u32 },
    /// Make all writes that completed before durable.
    Flush,
    /// Tell the drive's name into the `len` bytes that the writable part starts with.
    GetId { len: u32 },
    /// The contents are not needed any more. `None`: not exactly one segment, of which we announce one.
    Discard(Option<Segment>),
    /// Reads are to give zeros from now on. `None` as above.
    WriteZeroes(Option<Segment>),
    /// A type that we do not offer.
    Unsupported(u32),
}

impl Request {
    /// Parses a chain whose writable part has room for the status. The header may be spread over descriptors.
    pub(super) fn parse(buffers: &ChainBuffers<'_>) -> Result<Self, ChainError> {
        let mut header = [0; HEADER_LEN as usize];
        buffers.read_at(0, &mut header)?;
        let [t0, t1, t2, t3, _, _, _, _, sector @ ..] = header;
        let sector = u64::from_le_bytes(sector);
        // The status takes the last writable byte; `read_at` found a whole header.
        let writable = buffers.writable_len().saturating_sub(1);
        let readable = buffers.readable_len().saturating_sub(HEADER_LEN);
        Ok(match u32::from_le_bytes([t0, t1, t2, t3]) {
            VIRTIO_BLK_T_IN => Self::In { sector, len: writable },
            VIRTIO_BLK_T_OUT => Self::Out { sector, len: readable },
            VIRTIO_BLK_T_FLUSH => Self::Flush,
            VIRTIO_BLK_T_GET_ID => Self::GetId { len: writable },
            VIRTIO_BLK_T_DISCARD => Self::Discard(segment(buffers, readable)?),
            VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes(segment(buffers, readable)?),
            other => Self::Unsupported(other),
        })
    }

    /// How many bytes of data it moves.
    pub(super) fn data_len(&self) -> u32 {
        match *self {
            Self::In { len, .. } | Self::Out { len, .. } => len,
            _ => 0,
        }
    }
}

fn segment(buffers: &ChainBuffers<'_>, len: u32) -> Result<Option<Segment>, ChainError> {
    if len != SEGMENT_LEN {
        return Ok(None);
    }
    let mut segment = [0; SEGMENT_LEN as usize];
    buffers.read_at(HEADER_LEN, &mut segment)?;
    let [s0, s1, s2, s3, s4, s5, s6, s7, n0, n1, n2, n3, flags @ ..] = segment;
    Ok(Some(Segment {
        sector: u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]),
        sectors: u32::from_le_bytes([n0, n1, n2, n3]),
        flags: u32::from_le_bytes(flags),
    }))
}

/// The byte offset of a transfer of `len` bytes from `sector` on, if it consists of whole sectors and stays
/// within a drive of `sectors` sectors.
pub(super) fn offset(sector: u64, len: u64, sectors: u64) -> Option<u64> {
    let end = sector.checked_add(len / SECTOR)?;
    if !len.is_multiple_of(SECTOR) || end > sectors {
        return None;
    }
    sector.checked_mul(SECTOR)
}
