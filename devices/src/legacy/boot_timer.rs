//! The register by which a guest says that it has booted, as Firecracker has it with `--boot-timer`.

use std::time::Duration;

use crate::bus::BusDevice;

/// A point in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timestamp {
    /// Microseconds of CLOCK_MONOTONIC.
    pub wall_us: u64,
    /// Microseconds of CPU time that all threads of this process have used.
    pub cpu_us: u64,
}

impl Timestamp {
    /// This moment.
    pub fn now() -> Self {
        Self {
            wall_us: microseconds(libc::CLOCK_MONOTONIC),
            cpu_us: microseconds(libc::CLOCK_PROCESS_CPUTIME_ID),
        }
    }
}

/// The time on a clock; 0 for one that the host does not have.
fn microseconds(clock: libc::clockid_t) -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes a timespec to a valid, exclusive reference to one, or nothing.
    unsafe { libc::clock_gettime(clock, &raw mut time) };
    let seconds = Duration::from_secs(u64::try_from(time.tv_sec).unwrap_or(0));
    let time = seconds + Duration::from_nanos(u64::try_from(time.tv_nsec).unwrap_or(0));
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// A register of one byte. When the guest first writes [`Self::BOOTED`] to it, the time since the start is
/// logged, in the words that Firecracker's users look for. It reads as 0.
pub struct BootTimer {
    /// `None` once it was logged.
    start: Option<Timestamp>,
}

impl BootTimer {
    /// What a guest writes when it has booted.
    pub const BOOTED: u8 = 123;

    /// A timer that counts from `start` on.
    pub fn new(start: Timestamp) -> Self {
        Self { start: Some(start) }
    }

    /// The start, if this write is the first to say that the guest has booted.
    fn booted(&mut self, offset: u64, data: &[u8]) -> Option<Timestamp> {
        if matches!((offset, data), (0, [Self::BOOTED])) { self.start.take() } else { None }
    }
}

/// Firecracker's log line.
fn line(start: Timestamp, now: Timestamp) -> String {
    // Neither clock goes back, but the start may have been told from outside.
    let wall = now.wall_us.saturating_sub(start.wall_us);
    let cpu = now.cpu_us.saturating_sub(start.cpu_us);
    format!("Guest-boot-time = {wall:>6} us {} ms, {cpu:>6} CPU us {} CPU ms", wall / 1000, cpu / 1000)
}

impl BusDevice for BootTimer {
    fn read(&mut self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let Some(start) = self.booted(offset, data) {
            log::info!("{}", line(start, Timestamp::now()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_right_write_counts() {
        let start = Timestamp { wall_us: 1, cpu_us: 2 };
        let mut timer = BootTimer::new(start);
        for (offset, data) in [(0, &[122][..]), (1, &[123]), (0, &[123, 0]), (0, &[0, 123]), (0, &[])] {
            assert_eq!(timer.booted(offset, data), None, "{offset} {data:?}");
        }
        timer.write(0, &[0]);
        assert_eq!(timer.booted(0, &[123]), Some(start));
        assert_eq!(timer.booted(0, &[123]), None, "once");

        let mut timer = BootTimer::new(start);
        timer.write(0, &[123]);
        assert_eq!(timer.start, None);
        let mut data = [0x55; 4];
        timer.read(0, &mut data);
        assert_eq!(data, [0; 4]);
    }

    #[test]
    fn the_line_is_firecrackers() {
        let start = Timestamp { wall_us: 1_000_000, cpu_us: 500 };
        assert_eq!(
            line(start, Timestamp { wall_us: 1_123_456, cpu_us: 5_499 }),
            "Guest-boot-time = 123456 us 123 ms,   4999 CPU us 4 CPU ms"
        );
        assert_eq!(
            line(start, Timestamp { wall_us: 0, cpu_us: 0 }),
            "Guest-boot-time =      0 us 0 ms,      0 CPU us 0 CPU ms"
        );
    }

    #[test]
    fn clocks_go_on() {
        let before = Timestamp::now();
        assert!(before.wall_us > 0 && before.cpu_us > 0);
        let after = Timestamp::now();
        assert!(after.wall_us >= before.wall_us && after.cpu_us >= before.cpu_us);
    }
}
