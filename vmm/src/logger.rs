//! Log lines on standard error.

use std::io::Write;
use std::sync::OnceLock;

use log::{LevelFilter, Log, Metadata, Record};

/// Writes `[id:thread] LEVEL text` lines.
struct Stderr {
    id: String,
}

impl Log for Stderr {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("pinfold");
        let line = format!("[{}:{name}] {} {}\r\n", self.id, record.level(), record.args());
        // Nothing can be done about a standard error that cannot be written.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Logs from `level` up, naming the microVM. Only the first call has an effect.
pub fn init(id: &str, level: LevelFilter) {
    static LOGGER: OnceLock<Stderr> = OnceLock::new();
    if log::set_logger(LOGGER.get_or_init(|| Stderr { id: id.to_owned() })).is_ok() {
        log::set_max_level(level);
    }
}
