//! Opening what users name, without waiting for anybody.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// What a name may stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    File,
    /// A regular file or a block device.
    Disk,
}

/// A file that was named cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{field}: cannot open {path}", path = path.display())]
pub struct OpenError {
    field: &'static str,
    path: PathBuf,
    source: io::Error,
}

/// Opens `path`, which `field` names, to read it. What is of another kind is refused: a FIFO, for one, would have us
/// wait for its writer.
pub fn open(field: &'static str, path: &Path, kind: Kind) -> Result<File, OpenError> {
    open_kind(path, kind).map_err(|source| OpenError { field, path: path.to_owned(), source })
}

fn open_kind(path: &Path, kind: Kind) -> io::Result<File> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let found = file.metadata()?.file_type();
    match kind {
        _ if found.is_file() => Ok(file),
        Kind::Disk if found.is_block_device() => Ok(file),
        Kind::Disk => Err(io::Error::new(ErrorKind::InvalidInput, "it is no file and no block device")),
        Kind::File => Err(io::Error::new(ErrorKind::InvalidInput, "it is no regular file")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_files_are_opened_and_nobody_waits() {
        let folder = tempfile::tempdir().unwrap();
        let (file, fifo) = (folder.path().join("file"), folder.path().join("fifo"));
        std::fs::write(&file, "x").unwrap();
        let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
        // SAFETY: the path is a NUL-terminated string.
        assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
        for kind in [Kind::File, Kind::Disk] {
            open("f", &file, kind).unwrap();
            for other in [&fifo, folder.path()] {
                assert_eq!(open("f", other, kind).unwrap_err().source.kind(), ErrorKind::InvalidInput);
            }
        }
    }
}
