//! What of FUSE has to be known to answer in the back-end's place (linux/fuse.h).

use crate::virtio::iovec::ChainBuffers;

/// Bytes of a request's and a reply's header.
const IN_HEADER: u32 = 40;
const OUT_HEADER: u32 = 16;
/// Where a request's number is in its header.
const UNIQUE_AT: u32 = 8;

/// Answers a request with ENOTCONN; returns the number of bytes written.
pub(super) fn refuse(buffers: &ChainBuffers<'_>) -> u32 {
    let mut unique = [0; 8];
    if buffers.readable_len() < IN_HEADER
        || buffers.writable_len() < OUT_HEADER
        || buffers.read_at(UNIQUE_AT, &mut unique).is_err()
    {
        // FUSE_FORGET wants no reply.
        return 0;
    }
    let mut reply = [0; OUT_HEADER as usize];
    reply[..4].copy_from_slice(&OUT_HEADER.to_le_bytes());
    reply[4..8].copy_from_slice(&(-libc::ENOTCONN).to_le_bytes());
    reply[8..].copy_from_slice(&unique);
    buffers.write_at(0, &reply).map_or(0, |()| OUT_HEADER)
}
