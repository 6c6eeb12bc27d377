//! A drive as requests see it: which of them it takes, and what became of them.

use std::io;

use virtio_bindings::virtio_blk::{VIRTIO_BLK_ID_BYTES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP};

use super::CacheType;
use super::disk::{Abilities, Disk, SECTOR};
use super::request::{self, Request, Segment, Status};
use crate::virtio::iovec::ChainBuffers;

/// The most sectors that a discard or write-zeroes request may name; the driver is told. 1 GiB.
pub(super) const MAX_CLEARED_SECTORS: u32 = 1 << 21;

/// How many failures of the host's are worth a line in the log: the guest may repeat them at will.
const LOGGED_FAILURES: u32 = 8;

/// What a request asks of the disk; offsets and lengths in bytes, within the drive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    Read { offset: u64, len: u32 },
    Write { offset: u64, len: u32 },
    Flush,
    Discard { offset: u64, len: u64 },
    Zero { offset: u64, len: u64, unmap: bool },
}

impl Work {
    /// How many bytes it concerns.
    pub(super) fn len(&self) -> u64 {
        match *self {
            Self::Read { len, .. } | Self::Write { len, .. } => len.into(),
            Self::Flush => 0,
            Self::Discard { len, .. } | Self::Zero { len, .. } => len,
        }
    }

    /// Whether it changes what is read, so that a driver without flushes takes it for durable afterwards.
    pub(super) fn writes(&self) -> bool {
        matches!(self, Self::Write { .. } | Self::Zero { .. })
    }

    /// Whether it is within a drive of `sectors` sectors.
    pub(super) fn fits(&self, sectors: u64) -> bool {
        match *self {
            Self::Flush => true,
            Self::Read { offset, .. }
            | Self::Write { offset, .. }
            | Self::Discard { offset, .. }
            | Self::Zero { offset, .. } => request::offset(offset / SECTOR, self.len(), sectors).is_some(),
        }
    }
}

/// What is to be done about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is answered with this status, after so many bytes of data.
    Answer(Status, u32),
    /// The disk has work to do.
    Work(Work),
}

/// What requests are carried out on.
pub(super) struct Drive {
    pub disk: Box<dyn Disk>,
    pub sectors: u64,
    pub id: String,
    pub read_only: bool,
    pub cache: CacheType,
    /// The driver did not take flushes, and may take each write for durable (virtio 1.2, section 5.2.5.1).
    pub flush_each_write: bool,
    /// Which requests beyond reads and writes the driver has negotiated.
    pub negotiated: Abilities,
    /// After a failed flush the kernel takes the lost pages for clean, and the next flush would succeed
    /// without them. So none does any more.
    flush_failed: bool,
    failures: u32,
}

impl Drive {
    pub(super) fn new(
        id: String,
        disk: Box<dyn Disk>,
        sectors: u64,
        read_only: bool,
        cache: CacheType,
    ) -> Self {
        Self {
            disk,
            sectors,
            id,
            read_only,
            cache,
            flush_each_write: false,
            negotiated: Abilities::default(),
            flush_failed: false,
            failures: 0,
        }
    }

    /// Goes on with another disk. Nothing is under way on the old one.
    pub(super) fn replace_disk(&mut self, disk: Box<dyn Disk>, sectors: u64) {
        // No flush reaches the old file any more, and the driver may still ask for one of what it wrote.
        if self.cache == CacheType::Writeback
            && !self.read_only
            && let Err(error) = self.disk.carry_out(&super::disk::Step::Flush)
        {
            log::warn!("drive {}: writes to the file that was replaced may be lost: {error}", self.id);
        }
        self.disk = disk;
        self.sectors = sectors;
        self.flush_failed = false;
        self.failures = 0;
    }

    /// Looks at `request`, parsed from `buffers`.
    pub(super) fn judge(&self, request: Request, buffers: &ChainBuffers<'_>) -> Verdict {
        let refused = Verdict::Answer(Status::IoErr, 0);
        let work = match request {
            Request::In { sector, len } => {
                self.offset(sector, len.into()).map(|offset| Work::Read { offset, len })
            }
            Request::Out { .. } if self.read_only => None,
            Request::Out { sector, len } => {
                self.offset(sector, len.into()).map(|offset| Work::Write { offset, len })
            }
            Request::Flush => match self.cache {
                CacheType::Unsafe => return Verdict::Answer(Status::Ok, 0),
                CacheType::Writeback => Some(Work::Flush),
            },
            Request::GetId { len } => return self.tell_id(buffers, len),
            Request::Discard(segment) => return self.judge_clearing(segment, false),
            Request::WriteZeroes(segment) => return self.judge_clearing(segment, true),
            Request::Unsupported(_) => return Verdict::Answer(Status::Unsupported, 0),
        };
        work.map_or(refused, Verdict::Work)
    }

    /// Discard and write-zeroes, by virtio 1.2, section 5.2.6.2.
    fn judge_clearing(&self, segment: Option<Segment>, zero: bool) -> Verdict {
        let answer = |status| Verdict::Answer(status, 0);
        if self.read_only {
            return answer(Status::IoErr);
        }
        let known = if zero { VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP } else { 0 };
        let offered = if zero { self.negotiated.zero } else { self.negotiated.discard };
        if !offered || segment.is_some_and(|segment| segment.flags & !known != 0) {
            return answer(Status::Unsupported);
        }
        let Some(Segment { sector, sectors, flags }) = segment else { return answer(Status::IoErr) };
        let len = u64::from(sectors) * SECTOR;
        match self.offset(sector, len) {
            Some(offset) if sectors <= MAX_CLEARED_SECTORS => Verdict::Work(match zero {
                true => Work::Zero { offset, len, unmap: flags != 0 },
                false => Work::Discard { offset, len },
            }),
            _ => answer(Status::IoErr),
        }
    }

    fn offset(&self, sector: u64, len: u64) -> Option<u64> {
        request::offset(sector, len, self.sectors)
    }

    /// Answers a request for the name: 20 bytes, filled up with zeros (virtio 1.2, section 5.2.6.2).
    fn tell_id(&self, buffers: &ChainBuffers<'_>, len: u32) -> Verdict {
        let mut id = [0; VIRTIO_BLK_ID_BYTES as usize];
        for (to, from) in id.iter_mut().zip(self.id.bytes()) {
            *to = from;
        }
        if len < VIRTIO_BLK_ID_BYTES || buffers.write_at(0, &id).is_err() {
            return Verdict::Answer(Status::IoErr, 0);
        }
        Verdict::Answer(Status::Ok, VIRTIO_BLK_ID_BYTES)
    }

    /// The status of `work`, which ended with `result` on the host.
    pub(super) fn status(&mut self, work: Work, result: &io::Result<()>) -> Status {
        let Err(error) = result else { return Status::Ok };
        let clears = matches!(work, Work::Discard { .. } | Work::Zero { .. });
        if clears && matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS)) {
            log::debug!("drive {}: {work:?}: {error}", self.id);
            return Status::Unsupported;
        }
        self.failures = self.failures.saturating_add(1);
        let level = if self.failures <= LOGGED_FAILURES { log::Level::Warn } else { log::Level::Debug };
        log::log!(level, "drive {}: {work:?}: {error}", self.id);
        Status::IoErr
    }

    /// What a flush that ended with `result` on the host is worth.
    pub(super) fn flushed(&mut self, result: io::Result<()>) -> io::Result<()> {
        if self.flush_failed {
            return Err(io::Error::other("an earlier flush failed, and with it writes were lost"));
        }
        self.flush_failed = result.is_err();
        result
    }
}
