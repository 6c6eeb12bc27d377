//! The file or block device behind a drive, and the boundary that requests reach it through.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use libc::iovec;

use crate::virtio::iovec::ChainBuffers;

/// Bytes in a sector, the unit of capacity and of every transfer (virtio 1.2, section 5.2.4).
pub(super) const SECTOR: u64 = 512;

/// Pieces of memory passed to the kernel in one call: a request of the greatest number of segments that we
/// announce fits, and the array stays small enough for the stack.
const BATCH: usize = 256;

/// Why a drive cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum BlockError {
    /// No such file.
    #[error("drive {id}: {} does not exist: create it, or correct the drive's path", path.display())]
    Missing {
        /// The drive's name.
        id: String,
        /// The path of the drive's file.
        path: PathBuf,
    },
    /// The file may not be opened like this.
    #[error(
        "drive {id}: {} may not be opened for {access}: give this user the permission, or make the drive \
         read-only if that is enough",
        path.display()
    )]
    Permission {
        /// The drive's name.
        id: String,
        /// The path of the drive's file.
        path: PathBuf,
        /// What for.
        access: &'static str,
    },
    /// Something that has no sectors.
    #[error("drive {id}: {} is {what}: a drive needs a regular file or a block device", path.display())]
    NotADisk {
        /// The drive's name.
        id: String,
        /// The path of the drive's file.
        path: PathBuf,
        /// What the path names, with its article.
        what: &'static str,
    },
    /// No timer for its rate limiter.
    #[error("drive {id}: could not make a timer for its rate_limiter")]
    Limiter {
        /// The drive's name.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// Anything else.
    #[error("drive {id}: could not {doing} {}", path.display())]
    Host {
        /// The drive's name.
        id: String,
        /// The path of the drive's file.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What the host said.
        source: io::Error,
    },
}

/// What carries out the transfers of a drive. A call returns when the transfer is complete as far as the page
/// cache; only `flush` makes writes durable.
pub(super) trait Disk: Send {
    /// Fills the first `len` bytes of the writable part of `buffers` from byte `offset` on.
    fn read(&mut self, offset: u64, buffers: &ChainBuffers<'_>, len: u32) -> io::Result<()>;

    /// Writes the `len` bytes behind the first `skip` of the readable part of `buffers` to byte `offset`.
    fn write(&mut self, offset: u64, buffers: &ChainBuffers<'_>, skip: u32, len: u32) -> io::Result<()>;

    /// Returns when everything written before is on stable storage.
    fn flush(&mut self) -> io::Result<()>;
}

/// A regular file or a block device of the host, used through blocking calls.
#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
    /// Whole sectors at the time of opening.
    sectors: u64,
}

impl DiskFile {
    /// Opens `path` for the drive named `id`.
    pub(super) fn open(id: &str, path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let host = |doing, source| BlockError::Host { id: id.into(), path: path.into(), doing, source };
        let access = if read_only { "reading" } else { "reading and writing" };
        let refused = |doing, error: io::Error| match error.kind() {
            io::ErrorKind::NotFound => BlockError::Missing { id: id.into(), path: path.into() },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                BlockError::Permission { id: id.into(), path: path.into(), access }
            }
            _ => host(doing, error),
        };
        // Before opening: opening a FIFO would wait for somebody at its other end.
        let metadata = path.metadata().map_err(|error| refused("look at", error))?;
        if let Some(what) = unsuitable(&metadata) {
            return Err(BlockError::NotADisk { id: id.into(), path: path.into(), what });
        }
        // The standard library opens with O_CLOEXEC.
        let mut file = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .open(path)
            .map_err(|error| refused("open", error))?;
        // A block device's metadata says nothing of its size.
        let bytes = file.seek(SeekFrom::End(0)).map_err(|error| host("find the size of", error))?;
        if !bytes.is_multiple_of(SECTOR) {
            log::warn!(
                "drive {id}: the size of {} is not a multiple of {SECTOR} bytes; the last {} bytes are out \
                 of the guest's reach",
                path.display(),
                bytes % SECTOR
            );
        }
        Ok(Self { file, sectors: bytes / SECTOR })
    }

    /// Capacity in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }
}

impl Disk for DiskFile {
    fn read(&mut self, offset: u64, buffers: &ChainBuffers<'_>, len: u32) -> io::Result<()> {
        transfer(offset, buffers.writable_range(0, len), |pieces, count, offset| {
            // SAFETY: the pieces are writable guest memory, kept mapped by the borrow of `buffers`; nobody
            // makes Rust references to it.
            unsafe { libc::preadv(self.file.as_raw_fd(), pieces, count, offset) }
        })
    }

    fn write(&mut self, offset: u64, buffers: &ChainBuffers<'_>, skip: u32, len: u32) -> io::Result<()> {
        transfer(offset, buffers.readable_range(skip, len), |pieces, count, offset| {
            // SAFETY: the pieces are guest memory, kept mapped by the borrow of `buffers`; the kernel only
            // reads it.
            unsafe { libc::pwritev(self.file.as_raw_fd(), pieces, count, offset) }
        })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.sync_data()
    }
}

/// Says what `metadata` describes, if that cannot be a drive.
fn unsuitable(metadata: &Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    if kind.is_file() || kind.is_block_device() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_char_device() {
        Some("a character device")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else {
        Some("a socket")
    }
}

/// Repeats `call`, which transfers a prefix of some pieces from or to a byte offset, until all `pieces` are
/// done.
fn transfer(
    mut offset: u64,
    mut pieces: impl Iterator<Item = iovec>,
    mut call: impl FnMut(*const iovec, libc::c_int, libc::off_t) -> isize,
) -> io::Result<()> {
    let mut batch = [iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; BATCH];
    loop {
        let mut filled = 0;
        // In this order zip takes no piece that has no slot.
        for (slot, piece) in batch.iter_mut().zip(&mut pieces) {
            *slot = piece;
            filled += 1;
        }
        if filled == 0 {
            return Ok(());
        }
        let mut left = &mut batch[..filled];
        while !left.is_empty() {
            let count = libc::c_int::try_from(left.len()).map_err(io::Error::other)?;
            let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
            match usize::try_from(call(left.as_ptr(), count, at)) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(done) => {
                    offset += u64::try_from(done).map_err(io::Error::other)?;
                    left = advance(left, done);
                }
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// What is left of `pieces` behind their first `done` bytes.
fn advance(pieces: &mut [iovec], mut done: usize) -> &mut [iovec] {
    let mut whole = 0;
    while let Some(piece) = pieces.get_mut(whole) {
        if done < piece.iov_len {
            piece.iov_base = piece.iov_base.wrapping_byte_add(done);
            piece.iov_len -= done;
            break;
        }
        done -= piece.iov_len;
        whole += 1;
    }
    &mut pieces[whole..]
}

#[cfg(test)]
mod tests;
