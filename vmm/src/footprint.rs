//! What this process holds of the host's memory beside the guest's.

unsafe extern "C" {
    /// The first byte of the program as it is mapped, and the first one behind its code (by the linker; end(3)).
    static __executable_start: u8;
    static etext: u8;
}

/// Gives back the pages of our code. Most of it has done its work when the guest runs: the reading of configurations,
/// the loading of kernels, the making of tables. What is needed again is mapped again from the page cache, a few pages
/// at a time.
pub fn forget_code() {
    let (start, end) = (&raw const __executable_start, &raw const etext);
    // SAFETY: the range is our executable's headers, constants and code: mapped from the file, never written, since
    // relocated data are behind the code. So what is read again is the same. Where the linker leaves a page between
    // headers and code unmapped the kernel skips it, and says ENOMEM when it is done (madvise(2)).
    let result =
        unsafe { libc::madvise(start.cast_mut().cast(), end.addr() - start.addr(), libc::MADV_DONTNEED) };
    if result != 0 {
        log::debug!("could not give code back: {}", std::io::Error::last_os_error());
    }
}

/// Has all threads allocate from one heap, instead of one for each. They allocate little while the guest runs, and the
/// heaps of threads would need system calls (`mprotect`, opening a file in /proc) that no seccomp filter has to allow
/// then. To be called while there is one thread.
pub fn share_heap() {
    // SAFETY: it takes no pointer.
    if unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) } == 0 {
        log::debug!("the C library keeps a heap for each thread");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the program's code is mapped, and how many KiB of it are mapped in.
    fn code() -> (std::ops::Range<usize>, u64) {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.contains(" r-xp "));
        let (start, rest) = lines.next().unwrap().split_once('-').unwrap();
        let [start, end] = [start, rest.split_once(' ').unwrap().0];
        let range = usize::from_str_radix(start, 16).unwrap()..usize::from_str_radix(end, 16).unwrap();
        let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        (range, rss.trim().trim_end_matches(" kB").parse().unwrap())
    }

    #[test]
    fn code_is_given_back_and_goes_on_to_run() {
        for address in code().0.step_by(4096) {
            // SAFETY: the byte is of our executable's code, which is mapped for as long as it runs.
            unsafe { std::ptr::with_exposed_provenance::<u8>(address).read_volatile() };
        }
        let before = code().1;
        forget_code();
        let after = code().1;
        assert!(after < before, "{before} KiB before, {after} KiB after");
    }
}
