use std::os::unix::fs::{PermissionsExt, symlink};

use super::*;

#[test]
fn what_is_no_disk_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = |path: &Path| DiskFile::open("root", path, true).unwrap_err().to_string();

    let missing = dir.path().join("missing.img");
    let text = open(&missing);
    assert!(text.contains("drive root") && text.contains("missing.img does not exist"), "{text}");

    let dangling = dir.path().join("dangling");
    symlink(&missing, &dangling).unwrap();
    assert!(open(&dangling).contains("does not exist"));

    assert!(open(dir.path()).contains("is a directory"));
    assert!(open(Path::new("/dev/null")).contains("is a character device"));

    let fifo = dir.path().join("fifo");
    let name = std::ffi::CString::new(fifo.to_str().unwrap()).unwrap();
    // SAFETY: the argument is a string that ends with a zero.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    assert!(open(&fifo).contains("is a FIFO"));

    let _listener = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    assert!(open(&dir.path().join("socket")).contains("is a socket"));
}

#[test]
fn permission_is_asked_for_by_its_purpose() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.img");
    std::fs::write(&path, [0; 512]).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o000)).unwrap();
    // Root may do anything; then there is nothing to see here.
    if let Err(error) = DiskFile::open("data", &path, false) {
        assert!(error.to_string().contains("may not be opened for reading and writing"), "{error}");
    }
}

#[test]
fn capacity_is_whole_sectors_and_may_be_zero() {
    let file = tempfile::NamedTempFile::new().unwrap();
    for (bytes, sectors) in [(0, 0), (511, 0), (512, 1), (1023, 1), (1 << 41, 1 << 32)] {
        file.as_file().set_len(bytes).unwrap();
        assert_eq!(DiskFile::open("a", file.path(), true).unwrap().sectors(), sectors);
    }
}

#[test]
fn what_a_file_can_do_is_found_out_without_changing_it() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), [7; 1000]).unwrap();
    let writable = DiskFile::open("a", file.path(), false).unwrap();
    // As with every file system that knows holes.
    assert_eq!(writable.abilities(), Abilities { discard: true, zero: true });
    assert_eq!(std::fs::read(file.path()).unwrap(), [7; 1000]);
    let read_only = DiskFile::open("a", file.path(), true).unwrap();
    assert_eq!(read_only.abilities(), Abilities::default());
}
