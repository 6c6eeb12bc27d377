//! The disk of the small guest: what `tests/guest/small.rs` writes to it, and says of it.

use crate::case::Failure;
use crate::check;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// What each sector that was written starts with; its own number follows.
const MARK: &[u8; 8] = b"PINFOLD!";
const SECTOR: usize = 512;
const SECTORS_A_ROUND: u64 = 4;

/// What a small guest has said about its disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sectors {
    /// Those that it has flushed.
    pub flushed: u64,
    /// Rounds that met an I/O error.
    pub failed: u64,
}

impl Sectors {
    /// Reads the guest's `console`. An unfinished last line does not count.
    pub fn told(console: &str) -> Self {
        let finished = console.rfind('\n').map_or("", |end| &console[..end]);
        let rounds = |what: &str| {
            let numbers =
                finished.lines().filter_map(|line| line.strip_prefix("small: ")?.strip_prefix(what));
            numbers.filter_map(|number| number.trim().parse::<u64>().ok()).collect::<Vec<_>>()
        };
        let last = rounds("flushed ").last().map_or(0, |round| round + 1);
        Self { flushed: last * SECTORS_A_ROUND, failed: rounds("failed ").len() as u64 }
    }

    /// An empty disk for `rounds` rounds at `path`, in place of what is there.
    pub fn make_disk(path: &Path, rounds: u64) -> Result<(), Failure> {
        Ok(File::create(path)?.set_len(rounds * SECTORS_A_ROUND * SECTOR as u64)?)
    }

    /// Every flushed sector is on the disk at `path`, and every other one is as it was written or as it was before.
    pub fn check(self, path: &Path) -> Result<(), Failure> {
        let mut found = Vec::new();
        File::open(path)?.read_to_end(&mut found)?;
        check!(found.len() as u64 >= self.flushed * SECTOR as u64, "{} is too short", path.display());
        for (number, sector) in (0_u64..).zip(found.chunks(SECTOR)) {
            let written = [&MARK[..], &number.to_le_bytes()].concat();
            let whole = sector.chunks(written.len()).all(|part| part == written);
            let untouched = number >= self.flushed && sector.iter().all(|byte| *byte == 0);
            check!(
                whole || untouched,
                "sector {number} of {} is wrong, of {} flushed ones: {:?}...",
                path.display(),
                self.flushed,
                &sector[..32.min(sector.len())]
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lost_and_torn_sectors_are_found() {
        let told = Sectors::told("small: ready\nsmall: flushed 0\nsmall: failed 1\nsmall: flushed 1");
        assert_eq!(told, Sectors { flushed: 4, failed: 1 });
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let sector = |number: u64| [&MARK[..], &number.to_le_bytes()].concat().repeat(32);
        let whole: Vec<u8> = (0..5).flat_map(sector).chain([0; 512]).collect();
        std::fs::write(&path, &whole).unwrap();
        told.check(&path).unwrap();
        for (at, byte) in [(3 * 512 + 100, 0), (4 * 512 + 9, 7), (5 * 512, 1)] {
            let mut wrong = whole.clone();
            wrong[at] = byte;
            std::fs::write(&path, wrong).unwrap();
            told.check(&path).unwrap_err();
        }
    }
}
