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
    // relocated data are behind the code. So what is read again is the same. madvise(2) does not fail half way.
    let result =
        unsafe { libc::madvise(start.cast_mut().cast(), end.addr() - start.addr(), libc::MADV_DONTNEED) };
    if result != 0 {
        log::debug!("could not give code back: {}", std::io::Error::last_os_error());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of the program's code that are mapped in.
    fn resident_code() -> u64 {
        let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut lines = maps.lines().skip_while(|line| !line.contains(" r-xp "));
        let rss = lines.find_map(|line| line.strip_prefix("Rss:")).unwrap();
        rss.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn code_is_given_back_and_goes_on_to_run() {
        let (start, end) = (&raw const __executable_start, &raw const etext);
        for offset in (0..end.addr() - start.addr()).step_by(4096) {
            // SAFETY: the byte is of our executable's mapping, see above.
            unsafe { start.wrapping_add(offset).read_volatile() };
        }
        let before = resident_code();
        forget_code();
        let after = resident_code();
        assert!(after < before, "{before} KiB before, {after} KiB after");
    }
}
