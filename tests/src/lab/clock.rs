//! The host's clock, for cases that need one which may be set.

use crate::case::Failure;

/// Puts the clock back when dropped.
#[derive(Debug)]
pub struct Clock {
    offset: i128,
}

impl Clock {
    /// Notes how far the clock is from the one that cannot be set.
    pub fn remember() -> Result<Self, Failure> {
        Ok(Self { offset: nanoseconds(libc::CLOCK_REALTIME)? - nanoseconds(libc::CLOCK_MONOTONIC)? })
    }

    /// Sets the clock forth, or back.
    pub fn move_by(seconds: i64) -> Result<(), Failure> {
        set_clock(nanoseconds(libc::CLOCK_REALTIME)? + i128::from(seconds) * 1_000_000_000)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let restored = nanoseconds(libc::CLOCK_MONOTONIC).and_then(|now| set_clock(now + self.offset));
        if let Err(failure) = restored {
            eprintln!("{failure}");
        }
    }
}

fn nanoseconds(clock: libc::clockid_t) -> Result<i128, Failure> {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the structure outlives the call.
    match unsafe { libc::clock_gettime(clock, &raw mut time) } {
        0 => Ok(i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

fn set_clock(nanoseconds: i128) -> Result<(), Failure> {
    let time = libc::timespec {
        tv_sec: i64::try_from(nanoseconds / 1_000_000_000)?,
        tv_nsec: i64::try_from(nanoseconds % 1_000_000_000)?,
    };
    // SAFETY: the structure outlives the call.
    match unsafe { libc::clock_settime(libc::CLOCK_REALTIME, &raw const time) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}
