use super::*;

#[test]
fn transfers_are_whole_sectors_within_the_drive() {
    assert_eq!(offset(0, 512, 1), Some(0));
    assert_eq!(offset(7, 1024, 9), Some(7 * 512));
    // Nothing to transfer, up to the very end.
    assert_eq!(offset(9, 0, 9), Some(9 * 512));
    assert_eq!(offset(0, 0, 0), Some(0));
    for (sector, len, sectors) in [
        (0, 511, 9),
        (0, 513, 9),
        (8, 1024, 9),
        (9, 512, 9),
        (10, 0, 9),
        (0, 512, 0),
        (u64::MAX, 512, 9),
        (u64::MAX, 512, u64::MAX),
        (1 << 55, 512, 9),
    ] {
        assert_eq!(offset(sector, len, sectors), None, "{sector} {len} {sectors}");
    }
    // The sector is within bounds, its byte offset is not.
    assert_eq!(offset(u64::MAX / 2, 512, u64::MAX), None);
}

#[test]
fn status_bytes_are_those_of_the_specification() {
    use virtio_bindings::virtio_blk::{VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP};
    let bytes = [Status::Ok, Status::IoErr, Status::Unsupported].map(|status| u32::from(status as u8));
    assert_eq!(bytes, [VIRTIO_BLK_S_OK, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP]);
}
