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
fn advancing_skips_whole_pieces_and_cuts_one() {
    let mut bytes = [0u8; 10];
    let base = bytes.as_mut_ptr();
    let piece = |at: usize, len| iovec { iov_base: base.wrapping_add(at).cast(), iov_len: len };
    for (done, expected) in [(0, vec![(0, 4), (4, 6)]), (4, vec![(4, 6)]), (7, vec![(7, 3)]), (10, vec![])] {
        let mut pieces = [piece(0, 4), piece(4, 6)];
        let left: Vec<_> = advance(&mut pieces, done)
            .iter()
            .map(|piece| (piece.iov_base.addr() - base.addr(), piece.iov_len))
            .collect();
        assert_eq!(left, expected, "{done}");
    }
}

/// Calls `transfer` on pieces of these lengths with a host that does `step` bytes at a time, and returns what
/// the calls were: bytes offered, pieces, offset.
fn transfer_by(lens: &[usize], step: usize) -> (io::Result<()>, Vec<(usize, libc::c_int, i64)>) {
    let pieces = lens.iter().map(|&iov_len| iovec { iov_base: std::ptr::null_mut(), iov_len });
    let mut calls = Vec::new();
    let result = transfer(1000, pieces, |pieces, count, offset| {
        // SAFETY: `transfer` passes an array of `count` pieces.
        let pieces = unsafe { std::slice::from_raw_parts(pieces, count.try_into().unwrap()) };
        let offered: usize = pieces.iter().map(|piece| piece.iov_len).sum();
        calls.push((offered, count, offset));
        offered.min(step).try_into().unwrap()
    });
    (result, calls)
}

#[test]
fn short_transfers_go_on_where_they_stopped() {
    let (result, calls) = transfer_by(&[512, 512], 600);
    result.unwrap();
    assert_eq!(calls, [(1024, 2, 1000), (424, 1, 1600)]);
}

#[test]
fn a_transfer_that_makes_no_progress_fails() {
    let (result, calls) = transfer_by(&[512], 0);
    assert_eq!(result.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(calls.len(), 1);
}

#[test]
fn more_pieces_than_a_batch_take_several_calls() {
    let (result, calls) = transfer_by(&[8; BATCH + 1], usize::MAX);
    result.unwrap();
    assert_eq!(calls.iter().map(|call| (call.0, call.2)).collect::<Vec<_>>(), [(8 * BATCH, 1000), (8, 3048)]);
    let (result, calls) = transfer_by(&[], 1);
    result.unwrap();
    assert!(calls.is_empty());
}
