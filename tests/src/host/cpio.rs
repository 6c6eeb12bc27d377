//! Archives in cpio's `newc` format, as the kernel unpacks them (Documentation/driver-api/early-userspace).

use std::fmt::Write as _;

/// An archive under construction.
#[derive(Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

const DIRECTORY: u32 = 0o040_755;
const FILE: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_600;

impl Archive {
    /// Adds an empty folder.
    pub fn directory(&mut self, name: &str) {
        self.entry(name, DIRECTORY, (0, 0), &[]);
    }

    /// Adds a file with the permission bits `mode`.
    pub fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, FILE | mode, (0, 0), content);
    }

    /// Adds a character device. The kernel opens `dev/console` for init before anything is mounted.
    pub fn character_device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, CHARACTER_DEVICE, (major, minor), &[]);
    }

    /// The archive with its end mark.
    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let mut header = String::from("070701");
        let fields = [
            u64::from(self.entries), // inode
            u64::from(mode),
            0, // uid
            0, // gid
            1, // links
            0, // mtime: the same input gives the same bytes
            content.len() as u64,
            0, // major of the device that the file came from
            0,
            u64::from(device.0),
            u64::from(device.1),
            name.len() as u64 + 1,
            0, // checksum, unused
        ];
        for field in fields {
            // Writing to a String cannot fail.
            let _ = write!(header, "{field:08x}");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_closed() {
        let mut archive = Archive::default();
        archive.directory("bin");
        archive.file("bin/a", 0o755, b"hello");
        archive.character_device("dev/console", 5, 1);
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.starts_with(b"070701"));
        let text = String::from_utf8_lossy(&bytes);
        assert!(text.contains("hello\x00\x00\x00070701"), "content is padded to four bytes");
        assert!(text.contains("TRAILER!!!"));
        // Second header: mode 0100755 and size 5.
        let second = &bytes[116..];
        assert_eq!(&second[14..22], b"000081ed");
        assert_eq!(&second[54..62], b"00000005");
    }
}
