//! Log lines: on standard error until told otherwise, then in a file or FIFO, as Firecracker writes them:
//!
//! ```text
//! 2026-11-25T08:00:00.123456789 [ID:THREAD] text
//! 2026-11-25T08:00:00.123456789 [ID:THREAD:LEVEL:FILE:LINE] text
//! ```
//!
//! A reader that does not keep up loses lines, which are counted, and keeps nobody waiting. Guests can cause
//! lines; so warnings and information are limited in number (see [`limit`]), errors are not.

mod limit;

use std::fmt::Write as _;
use std::io::{self, ErrorKind, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, LazyLock, PoisonError, RwLock};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use log::{Level, LevelFilter, Log, Metadata, Record};

use crate::console;
use crate::metrics::{self, METRICS};
use crate::sink::{Sink, SinkError};
use limit::Limit;

/// What is to change about the log; `None` leaves a thing as it is.
#[derive(Clone, Debug, Default)]
pub struct LoggerConfig {
    /// The file or FIFO that lines go to.
    pub path: Option<PathBuf>,
    /// The least severity that is logged.
    pub level: Option<LevelFilter>,
    /// Whether lines name their severity. Until it is set, those on standard error do.
    pub show_level: Option<bool>,
    /// Whether lines name the place in the source that they come from.
    pub show_log_origin: Option<bool>,
    /// Only modules whose path begins so are logged.
    pub module: Option<String>,
}

/// The longest line in bytes. A pipe takes that much whole or not at all.
const MAX_LINE: usize = libc::PIPE_BUF;

static LOGGER: LazyLock<Logger> = LazyLock::new(|| Logger::new(&METRICS.logger));

/// The descriptor of the file or FIFO that lines go to; negative if there is none.
static SINK: AtomicI32 = AtomicI32::new(-1);

/// The file or FIFO that lines go to, for a signal handler. `None` if they go to standard error.
pub fn raw_fd() -> Option<RawFd> {
    Some(SINK.load(Ordering::Relaxed)).filter(|fd| *fd >= 0)
}

/// Logs from `level` up, naming the microVM. Only the first call has an effect.
pub fn init(id: &str, level: LevelFilter) {
    if log::set_logger(&*LOGGER).is_ok() {
        LOGGER.update(|settings| id.clone_into(&mut settings.id));
        log::set_max_level(level);
        // Reads the time zone, which a chroot or a seccomp filter may put out of reach.
        timestamp(SystemTime::now());
    }
}

/// Changes the log, as often as wanted and from any thread.
///
/// # Errors
///
/// The file or FIFO could not be opened. Nothing has changed then.
pub fn configure(config: LoggerConfig) -> Result<(), SinkError> {
    let level = config.level;
    LOGGER.configure(config)?;
    let fd = LOGGER.settings().sink.as_ref().map_or(-1, |sink| sink.as_raw_fd());
    SINK.store(fd, Ordering::Relaxed);
    if let Some(level) = level {
        log::set_max_level(level);
    }
    Ok(())
}

#[derive(Clone, Debug, Default)]
struct Settings {
    id: String,
    /// Standard error if there is none.
    sink: Option<Arc<Sink>>,
    show_level: Option<bool>,
    show_log_origin: bool,
    module: Option<String>,
}

impl Settings {
    fn wants(&self, module: Option<&str>) -> bool {
        let wanted = self.module.as_deref().unwrap_or_default();
        module.unwrap_or_default().starts_with(wanted)
    }

    /// A line without its end.
    fn line(&self, record: &Record<'_>) -> String {
        let thread = std::thread::current();
        let mut line =
            format!("{} [{}:{}", timestamp(SystemTime::now()), self.id, thread.name().unwrap_or("-"));
        // Writing to a string does not fail.
        if self.show_level.unwrap_or(self.sink.is_none()) {
            let _ = write!(line, ":{}", record.level());
        }
        if self.show_log_origin {
            let file = record.file().unwrap_or("?");
            let _ = write!(line, ":{file}:{}", record.line().unwrap_or_default());
        }
        let _ = write!(line, "] {}", record.args());
        // What others say in an error must not look like a line of ours, nor steer a terminal.
        if line.contains(char::is_control) {
            line = line.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        }
        line.truncate(line.floor_char_boundary(MAX_LINE - "\r\n".len()));
        line
    }

    fn write(&self, mut line: String) -> io::Result<()> {
        match &self.sink {
            Some(sink) => {
                line.push('\n');
                sink.write_line(line.as_bytes())
            }
            None => write_if_ready(io::stderr().lock(), line),
        }
    }
}

/// Writes a line to `stream` if that does not have to be waited for.
fn write_if_ready(mut stream: impl Write + AsFd, mut line: String) -> io::Result<()> {
    let fd = stream.as_fd();
    let mut poll = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLOUT, revents: 0 };
    // SAFETY: one pollfd, which lives through the call.
    if unsafe { libc::poll(&raw mut poll, 1, 0) } != 1 {
        return Err(ErrorKind::WouldBlock.into());
    }
    // On the terminal that is the guest's console nobody turns a line feed into the start of a new line.
    let raw = console::terminal_settings(fd).is_some_and(|settings| settings.c_oflag & libc::OPOST == 0);
    line.push_str(if raw { "\r\n" } else { "\n" });
    stream.write_all(line.as_bytes())
}

/// Local time to the nanosecond, without its zone.
fn timestamp(now: SystemTime) -> String {
    let now = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = libc::time_t::try_from(now.as_secs()).unwrap_or_default();
    let mut local = MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are valid; all zeros, which is what a failure leaves, is a valid `tm`.
    let local = unsafe {
        libc::localtime_r(&raw const seconds, local.as_mut_ptr());
        local.assume_init()
    };
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}.{:09}",
        local.tm_year + 1900,
        local.tm_mon + 1,
        local.tm_mday,
        local.tm_hour,
        local.tm_min,
        local.tm_sec,
        now.subsec_nanos()
    )
}

/// Writes log lines.
#[derive(Debug)]
struct Logger {
    /// Held only to copy it or to put another one in place.
    settings: RwLock<Arc<Settings>>,
    limit: Limit,
    metrics: &'static metrics::Logger,
}

impl Logger {
    fn new(metrics: &'static metrics::Logger) -> Self {
        Self { settings: RwLock::default(), limit: Limit::new(), metrics }
    }

    fn settings(&self) -> Arc<Settings> {
        Arc::clone(&self.settings.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn update(&self, change: impl FnOnce(&mut Settings)) {
        let mut current = self.settings.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Settings::clone(&current);
        change(&mut next);
        let previous = std::mem::replace(&mut *current, Arc::new(next));
        drop(current);
        // Without the lock, as it may close a file.
        drop(previous);
    }

    fn configure(&self, config: LoggerConfig) -> Result<(), SinkError> {
        let sink = config.path.as_deref().map(Sink::open).transpose()?.map(Arc::new);
        self.update(|settings| {
            settings.sink = sink.or(settings.sink.take());
            settings.show_level = config.show_level.or(settings.show_level);
            settings.show_log_origin = config.show_log_origin.unwrap_or(settings.show_log_origin);
            settings.module = config.module.or(settings.module.take());
        });
        Ok(())
    }

    fn write(&self, settings: &Settings, record: &Record<'_>) {
        if settings.write(settings.line(record)).is_err() {
            self.metrics.missed_log_count.inc();
        }
    }

    /// Logs `record` if at `now` there is room for it.
    fn log_at(&self, record: &Record<'_>, now: Instant) {
        let settings = self.settings();
        if !settings.wants(record.module_path()) {
            return;
        }
        if matches!(record.level(), Level::Warn | Level::Info) {
            match self.limit.admit(now) {
                Some(0) => {}
                Some(suppressed) => {
                    let text = format_args!("{suppressed} messages were suppressed due to rate limiting");
                    let mut notice = Record::builder();
                    notice.level(Level::Warn).file(Some(file!())).line(Some(line!()));
                    self.write(&settings, &notice.args(text).build());
                }
                None => return self.metrics.rate_limited_log_count.inc(),
            }
        }
        self.write(&settings, record);
    }
}

impl Log for Logger {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        self.log_at(record, Instant::now());
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests;
