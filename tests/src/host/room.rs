//! For how many emulated hosts at a time this machine has room.

/// What must be available for each: twice what a host has been seen to use in the end, which is less than it is given.
const MEMORY_GIB: usize = 5;

/// How many hosts may run side by side: each has one CPU.
pub fn lanes() -> usize {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    fitting(cores, &meminfo)
}

fn fitting(cores: usize, meminfo: &str) -> usize {
    let available_kib: usize = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.split_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    cores.min(available_kib / (MEMORY_GIB << 20)).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_and_memory_limit_it_and_there_is_always_one() {
        let meminfo = |gib: usize| format!("MemFree: 1 kB\nMemAvailable:   {} kB\n", gib << 20);
        assert_eq!(fitting(2, &meminfo(64)), 2);
        assert_eq!(fitting(8, &meminfo(2 * MEMORY_GIB)), 2);
        assert_eq!(fitting(8, &meminfo(2 * MEMORY_GIB - 1)), 1);
        assert_eq!(fitting(8, &meminfo(1)), 1);
        assert_eq!(fitting(8, ""), 1);
    }
}
