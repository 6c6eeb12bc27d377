//! The kernel's texts of figures, read strictly: what does not follow the format is an error, never a guess.

use std::path::Path;

use serde::Serialize;

use crate::file::{FileError, Files};

/// Why figures could not be read.
#[derive(Debug, thiserror::Error)]
pub enum StatsError {
    /// A file refused.
    #[error(transparent)]
    File(#[from] FileError),
    /// A file says what the kernel does not say.
    #[error("{path} does not follow the kernel's format at `{at}`: check what is mounted there")]
    Text {
        /// The file.
        path: String,
        /// What could not be read.
        at: String,
    },
}

/// Longest piece of a text in an error, in characters.
const SHOWN: usize = 60;

/// Reads a file by `parse`, whose error is the piece that it cannot read. `None` when the file is not there, or says
/// that the kernel does not have it.
pub(crate) fn read<T>(
    files: &dyn Files,
    path: &Path,
    parse: impl FnOnce(&str) -> Result<T, &str>,
) -> Result<Option<T>, StatsError> {
    let text = match files.read(path) {
        Ok(text) => text,
        Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::EOPNOTSUPP | libc::ENODEV)) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    parse(&text).map(Some).map_err(|at| foreign(path, at))
}

fn foreign(path: &Path, at: &str) -> StatsError {
    StatsError::Text { path: path.display().to_string(), at: at.escape_debug().take(SHOWN).collect() }
}

/// One number.
pub(crate) fn number(text: &str) -> Result<u64, &str> {
    let text = text.trim();
    // Rust's own parser takes `+1`, too.
    match text.parse() {
        Ok(number) if text.bytes().all(|byte| byte.is_ascii_digit()) => Ok(number),
        _ => Err(text),
    }
}

/// One number, or `None` for `max`.
pub(crate) fn limit(text: &str) -> Result<Option<u64>, &str> {
    if text.trim() == "max" { Ok(None) } else { number(text).map(Some) }
}

/// The values of some keys in lines of `key number`; `None` for a key that is not there.
pub(crate) fn keyed<'a, const N: usize>(text: &'a str, keys: [&str; N]) -> Result<[Option<u64>; N], &'a str> {
    let mut values = [None; N];
    for line in text.lines() {
        let (key, value) = line.split_once(' ').ok_or(line)?;
        let value = number(value).map_err(|_| line)?;
        if let Some(place) = keys.iter().position(|wanted| *wanted == key) {
            values[place] = Some(value);
        }
    }
    Ok(values)
}

/// What went to and from block devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Transfers {
    /// Bytes read.
    pub read_bytes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Reads.
    pub read_operations: u64,
    /// Writes.
    pub write_operations: u64,
}

impl Transfers {
    pub(crate) fn add(&mut self, other: &Self) {
        for (sum, more) in [
            (&mut self.read_bytes, other.read_bytes),
            (&mut self.write_bytes, other.write_bytes),
            (&mut self.read_operations, other.read_operations),
            (&mut self.write_operations, other.write_operations),
        ] {
            *sum = sum.saturating_add(more);
        }
    }
}

/// What went to and from one block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct DeviceTransfers {
    /// Its major and minor number, such as `8:0`.
    pub device: String,
    /// How much.
    #[serde(flatten)]
    pub transfers: Transfers,
}

fn is_device(text: &str) -> bool {
    text.split_once(':').is_some_and(|(major, minor)| number(major).is_ok() && number(minor).is_ok())
}

/// v2's `io.stat`: lines of `MAJ:MIN key=number ...`, with keys that come and go with kernels.
pub(crate) fn io_stat(text: &str) -> Result<Vec<DeviceTransfers>, &str> {
    let mut devices = Vec::new();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        let device = words.next().filter(|word| is_device(word)).ok_or(line)?;
        let mut transfers = Transfers::default();
        for word in words {
            let (key, value) = word.split_once('=').ok_or(line)?;
            let place = match key {
                "rbytes" => &mut transfers.read_bytes,
                "wbytes" => &mut transfers.write_bytes,
                "rios" => &mut transfers.read_operations,
                "wios" => &mut transfers.write_operations,
                _ => continue,
            };
            *place = number(value).map_err(|_| line)?;
        }
        devices.push(DeviceTransfers { device: device.to_owned(), transfers });
    }
    Ok(devices)
}

/// v1's `blkio.throttle.*`: lines of `MAJ:MIN Operation number`, and a total. Adds to `devices`, by way of `place`.
pub(crate) fn blkio<'a>(
    text: &'a str,
    devices: &mut Vec<DeviceTransfers>,
    place: fn(&mut Transfers, bool) -> &mut u64,
) -> Result<(), &'a str> {
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (device, operation, value) = match words[..] {
            ["Total", total] if number(total).is_ok() => continue,
            [device, operation, value] if is_device(device) => (device, operation, value),
            _ => return Err(line),
        };
        let value = number(value).map_err(|_| line)?;
        let write = match operation {
            "Read" => false,
            "Write" => true,
            _ => continue,
        };
        let at = devices.iter().position(|known| known.device == device).unwrap_or_else(|| {
            devices.push(DeviceTransfers { device: device.to_owned(), transfers: Transfers::default() });
            devices.len() - 1
        });
        *place(&mut devices[at].transfers, write) = value;
    }
    Ok(())
}

/// How much of the time something was waited for (Documentation/accounting/psi.rst).
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Pressure {
    /// Some tasks waited.
    pub some: Share,
    /// All tasks waited.
    pub full: Option<Share>,
}

/// A share of time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Share {
    /// Percent of the last 10 seconds.
    pub avg10: f64,
    /// Percent of the last minute.
    pub avg60: f64,
    /// Percent of the last 5 minutes.
    pub avg300: f64,
    /// Microseconds in all.
    pub total_usec: u64,
}

/// `*.pressure`: a line `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`, and mostly one that starts with `full`.
pub(crate) fn pressure(text: &str) -> Result<Pressure, &str> {
    let (mut some, mut full) = (None, None);
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kind, rest @ ..] = &words[..] else { return Err(line) };
        let value =
            |key: &str| rest.iter().find_map(|word| word.strip_prefix(key)?.strip_prefix('=')).ok_or(line);
        let percent = |key: &str| {
            let parsed = value(key)?.parse::<f64>().ok();
            parsed.filter(|percent| (0.0..=100.0).contains(percent)).ok_or(line)
        };
        let share = Share {
            avg10: percent("avg10")?,
            avg60: percent("avg60")?,
            avg300: percent("avg300")?,
            total_usec: number(value("total")?).map_err(|_| line)?,
        };
        match *kind {
            "some" => some = Some(share),
            "full" => full = Some(share),
            _ => return Err(line),
        }
    }
    Ok(Pressure { some: some.ok_or(text)?, full })
}

/// A thread's `schedstat` (Documentation/scheduler/sched-stats.rst).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct SchedStat {
    /// Microseconds on a CPU.
    pub run_usec: u64,
    /// Microseconds on a run queue, ready to run and waiting for a CPU, throttled time included.
    pub wait_usec: u64,
    /// Times it was put on a CPU.
    pub timeslices: u64,
}

impl SchedStat {
    /// From the text of `file`, which is that of a thread.
    ///
    /// # Errors
    /// When it says what the kernel does not say.
    pub fn parse(text: &str, file: &Path) -> Result<Self, StatsError> {
        schedstat(text).map_err(|at| foreign(file, at))
    }
}

fn schedstat(text: &str) -> Result<SchedStat, &str> {
    let words: Vec<&str> = text.split_whitespace().collect();
    let [run, wait, timeslices] = words[..] else { return Err(text) };
    Ok(SchedStat {
        run_usec: number(run)? / 1000,
        wait_usec: number(wait)? / 1000,
        timeslices: number(timeslices)?,
    })
}

/// What all CPUs of the host did since it booted, in ticks of a length of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HostTime {
    /// Ran something.
    pub busy: u64,
    /// Had something to run while the host's own host ran others.
    pub stolen: u64,
}

/// The line `cpu` of `/proc/stat` (proc_stat(5)): user, nice, system, idle, iowait, irq, softirq, steal. Guest time is
/// in user.
pub(crate) fn host_time(text: &str) -> Result<HostTime, &str> {
    let line = text.lines().next().unwrap_or_default();
    let numbers: Vec<u64> =
        line.split_whitespace().skip(1).map(number).collect::<Result<_, _>>().map_err(|_| line)?;
    let [user, nice, system, _idle, _iowait, irq, softirq, stolen, ..] = numbers[..] else {
        return Err(line);
    };
    let busy = [nice, system, irq, softirq].into_iter().fold(user, u64::saturating_add);
    Ok(HostTime { busy, stolen })
}

/// v2's `cpu.max`: the quota, which may be `max`, and the period.
pub(crate) fn cpu_max(text: &str) -> Result<(Option<u64>, u64), &str> {
    let (quota, period) = text.trim().split_once(' ').ok_or(text)?;
    Ok((limit(quota)?, number(period)?))
}

#[cfg(test)]
mod tests;
