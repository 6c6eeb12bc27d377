//! What a VMM costs beside the guest's memory.

use crate::case::Failure;
use std::fs;
use std::path::{Path, PathBuf};

/// Memory in KiB.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Resident.
    pub rss: u64,
    /// Resident, what is shared divided by those who share it.
    pub pss: u64,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Mapping {
    start: u64,
    end: u64,
    cost: Footprint,
}

/// The memory of the process `pid` and of all others that run the same program, without the guest's memory of
/// `guest_mib`: that is the run of adjacent mappings of exactly this size.
pub fn overhead(pid: u32, guest_mib: u64) -> Result<Footprint, Failure> {
    let program = fs::read_link(format!("/proc/{pid}/exe"))?;
    let mut sum = Footprint::default();
    for other in same_program(&program)? {
        let mappings = parse(&fs::read_to_string(format!("/proc/{other}/smaps"))?);
        let guest = guest_memory(&mappings, guest_mib << 20);
        if other == pid && guest.is_empty() {
            return Err(Failure(format!("{} shows no guest memory of {guest_mib} MiB", program.display())));
        }
        for (index, mapping) in mappings.iter().enumerate() {
            if other != pid || !guest.contains(&index) {
                sum.rss += mapping.cost.rss;
                sum.pss += mapping.cost.pss;
            }
        }
    }
    Ok(sum)
}

fn same_program(program: &Path) -> Result<Vec<u32>, Failure> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        if fs::read_link(entry.path().join("exe")).ok() == Some(PathBuf::from(program)) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// The indices of the shortest run of adjacent mappings that together have `size` bytes.
fn guest_memory(mappings: &[Mapping], size: u64) -> std::ops::Range<usize> {
    let mut best = 0..0;
    for first in 0..mappings.len() {
        let mut last = first;
        while mappings[last].end - mappings[first].start < size
            && mappings.get(last + 1).is_some_and(|next| next.start == mappings[last].end)
        {
            last += 1;
        }
        let run = first..last + 1;
        let fits = mappings[last].end - mappings[first].start == size;
        if fits && (best.is_empty() || run.len() < best.len()) {
            best = run;
        }
    }
    best
}

/// Reads `/proc/PID/smaps` (proc(5)).
fn parse(smaps: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (first, second) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if let Some(last) = mappings.last_mut()
            && let Some(name) = first.strip_suffix(':')
        {
            let kib = second.parse().unwrap_or(0);
            match name {
                "Rss" => last.cost.rss = kib,
                "Pss" => last.cost.pss = kib,
                _ => {}
            }
        } else if let Some((start, end)) = first.split_once('-')
            && let (Ok(start), Ok(end)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16))
        {
            mappings.push(Mapping { start, end, cost: Footprint::default() });
        }
    }
    mappings
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
        1000-2000 r-xp 00000000 fe:00 1 /bin/vmm\nSize: 4 kB\nRss: 4 kB\nPss: 2 kB\nPss_Dirty: 1 kB\n\
        10000-18000 rw-p 00000000 00:00 0\nRss: 32 kB\nPss: 32 kB\n\
        18000-1c000 rw-p 00001000 fe:00 7 /boot/vmlinux\nRss: 16 kB\nPss: 8 kB\n\
        1c000-20000 rw-p 00000000 00:00 0\nRss: 0 kB\nPss: 0 kB\n\
        20000-22000 rw-p 00000000 00:00 0 [stack]\nRss: 8 kB\nPss: 8 kB\nVmFlags: rd wr\n";

    #[test]
    fn guest_memory_is_found_in_pieces_and_whole() {
        let mappings = parse(SMAPS);
        assert_eq!(mappings.len(), 5);
        assert_eq!(guest_memory(&mappings, 0x10000), 1..4);
        assert_eq!(guest_memory(&mappings, 0x8000), 1..2);
        assert!(guest_memory(&mappings, 0x40000).is_empty());
        assert_eq!(mappings[0].cost, Footprint { rss: 4, pss: 2 });
    }
}
