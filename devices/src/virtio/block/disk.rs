//! The file or block device behind a drive, and the boundary that requests reach it through.

use std::fs::{File, Metadata, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use super::task::Pieces;
use crate::virtio::vhost_user::VhostUserError;

/// Bytes in a sector, the unit of capacity and of every transfer (virtio 1.2, section 5.2.4).
pub(super) const SECTOR: u64 = 512;

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
        /// What the host said.
        source: io::Error,
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
        /// What the host said.
        source: io::Error,
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
    /// No timer for its rate limiter, or nothing to wait for io_uring with.
    #[error("drive {id}: could not make {what}")]
    Descriptor {
        /// What was to be made.
        what: &'static str,
        /// The drive's name.
        id: String,
        /// What the host said.
        source: io::Error,
    },
    /// The server that it is of cannot be used.
    #[error(transparent)]
    Server(#[from] VhostUserError),
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

/// What is asked of the host in one go. Offsets and lengths in bytes.
#[derive(Debug)]
pub(super) enum Step<'a> {
    /// Fill the pieces from `offset` on.
    Read { offset: u64, pieces: Pieces<'a> },
    /// Write the pieces to `offset`.
    Write { offset: u64, pieces: Pieces<'a> },
    /// Bring everything written before to stable storage.
    Flush,
    /// Give the range back to the host.
    Discard { offset: u64, len: u64 },
    /// Make the range read as zeros, with its space given back if `unmap`.
    Zero { offset: u64, len: u64, unmap: bool },
}

/// What can be done with a drive's backing beyond reading and writing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Abilities {
    /// [`Step::Discard`].
    pub discard: bool,
    /// [`Step::Zero`], at least with `unmap`.
    pub zero: bool,
}

/// What carries out the steps of a drive's requests, by blocking calls.
pub(super) trait Disk: Send {
    /// Does one step, and returns how many bytes that were; fewer than asked for where the host ended early, 0 at
    /// the end of the file. Writes are complete as far as the page cache; only a flush makes them durable.
    fn carry_out(&mut self, step: &Step<'_>) -> io::Result<u64>;

    /// What it can do.
    fn abilities(&self) -> Abilities;

    /// The descriptor, for io_uring.
    fn fd(&self) -> RawFd;

    /// The fallocate(2) mode that does `step`, if one does.
    fn fallocate_mode(&self, step: &Step<'_>) -> Option<libc::c_int>;
}

/// A regular file or a block device of the host.
#[derive(Debug)]
pub(super) struct DiskFile {
    file: File,
    /// Whole sectors at the time of opening.
    sectors: u64,
    is_block_device: bool,
    abilities: Abilities,
}

impl DiskFile {
    /// Opens `path` for the drive named `id`.
    pub(super) fn open(id: &str, path: &Path, read_only: bool) -> Result<Self, BlockError> {
        let host = |doing, source| BlockError::Host { id: id.into(), path: path.into(), doing, source };
        let access = if read_only { "reading" } else { "reading and writing" };
        let refused = |doing, source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => BlockError::Missing { id: id.into(), path: path.into(), source },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                BlockError::Permission { id: id.into(), path: path.into(), access, source }
            }
            _ => host(doing, source),
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
        let mut disk = Self {
            file,
            sectors: bytes / SECTOR,
            is_block_device: metadata.file_type().is_block_device(),
            abilities: Abilities::default(),
        };
        if !read_only {
            disk.abilities = disk.find_abilities(bytes);
        }
        Ok(disk)
    }

    /// Capacity in sectors.
    pub(super) fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Asks the host without changing anything: a file of `size` bytes has nothing behind its end to take away, and
    /// a block device says that it discards nothing before it says that the range is not one of whole sectors.
    fn find_abilities(&self, size: u64) -> Abilities {
        if self.is_block_device {
            let refused = self.range_ioctl(BLKDISCARD, 1, 0).err().and_then(|error| error.raw_os_error());
            // The kernel writes zeros where the device has no better way.
            return Abilities { discard: refused == Some(libc::EINVAL), zero: true };
        }
        let punches = self.fallocate(PUNCH_HOLE, size, SECTOR).is_ok();
        Abilities { discard: punches, zero: punches }
    }

    fn fallocate(&self, mode: libc::c_int, offset: u64, len: u64) -> io::Result<u64> {
        let at = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        let size = libc::off_t::try_from(len).map_err(io::Error::other)?;
        // SAFETY: fallocate takes four integers.
        match unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at, size) } {
            0 => Ok(len),
            _ => Err(io::Error::last_os_error()),
        }
    }

    fn range_ioctl(&self, request: libc::Ioctl, offset: u64, len: u64) -> io::Result<u64> {
        let range = [offset, len];
        // SAFETY: both requests read an array of two u64, which lives through the call.
        match unsafe { libc::ioctl(self.file.as_raw_fd(), request, range.as_ptr()) } {
            0 => Ok(len),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// _IO(0x12, 119) and _IO(0x12, 127) of linux/fs.h.
const BLKDISCARD: libc::Ioctl = 0x1277;
const BLKZEROOUT: libc::Ioctl = 0x127f;

const PUNCH_HOLE: libc::c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO_RANGE: libc::c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

impl Disk for DiskFile {
    fn carry_out(&mut self, step: &Step<'_>) -> io::Result<u64> {
        let fd = self.file.as_raw_fd();
        match *step {
            Step::Read { offset, pieces } => {
                let at = position(offset)?;
                // SAFETY: the pieces are writable guest memory, kept mapped through the borrow in `step`; nobody
                // makes Rust references to it.
                moved(unsafe {
                    match pieces.as_slice() {
                        // As most requests are: the kernel need not copy and check a list.
                        [piece] => libc::pread(fd, piece.iov_base, piece.iov_len, at),
                        list => libc::preadv(fd, list.as_ptr(), count(list)?, at),
                    }
                })
            }
            Step::Write { offset, pieces } => {
                let at = position(offset)?;
                // SAFETY: the pieces are guest memory, kept mapped through the borrow in `step`; the kernel only
                // reads it.
                moved(unsafe {
                    match pieces.as_slice() {
                        [piece] => libc::pwrite(fd, piece.iov_base, piece.iov_len, at),
                        list => libc::pwritev(fd, list.as_ptr(), count(list)?, at),
                    }
                })
            }
            Step::Flush => self.file.sync_data().map(|()| 0),
            Step::Discard { offset, len } | Step::Zero { offset, len, .. } => match self.fallocate_mode(step)
            {
                Some(mode) => self.fallocate(mode, offset, len),
                None => {
                    let discard = matches!(step, Step::Discard { .. });
                    self.range_ioctl(if discard { BLKDISCARD } else { BLKZEROOUT }, offset, len)
                }
            },
        }
    }

    fn abilities(&self) -> Abilities {
        self.abilities
    }

    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn fallocate_mode(&self, step: &Step<'_>) -> Option<libc::c_int> {
        match step {
            _ if self.is_block_device => None,
            Step::Discard { .. } | Step::Zero { unmap: true, .. } => Some(PUNCH_HOLE),
            Step::Zero { unmap: false, .. } => Some(ZERO_RANGE),
            Step::Read { .. } | Step::Write { .. } | Step::Flush => None,
        }
    }
}

fn position(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(io::Error::other)
}

fn count(list: &[libc::iovec]) -> io::Result<libc::c_int> {
    libc::c_int::try_from(list.len()).map_err(io::Error::other)
}

fn moved(result: isize) -> io::Result<u64> {
    u64::try_from(result).map_err(|_| io::Error::last_os_error())
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

#[cfg(test)]
mod tests;
