use std::fs::File;
use std::io::Read;
use std::os::fd::FromRawFd;
use std::path::Path;
use std::time::Duration;

use super::*;
use crate::metrics::Metrics;
use crate::sink::tests::{fifo, read_available, reader};

/// A logger with figures of its own.
fn logger() -> Logger {
    let logger = Logger::new(&Box::leak(Box::new(Metrics::new())).logger);
    logger.update(|settings| settings.id = "vm-1".to_owned());
    logger
}

fn to(path: &Path) -> LoggerConfig {
    LoggerConfig { path: Some(path.to_owned()), ..LoggerConfig::default() }
}

fn log_at(logger: &Logger, level: Level, text: &str, now: Instant) {
    let mut record = Record::builder();
    record.level(level).file(Some("src/x.rs")).line(Some(7)).module_path(Some("vmm::x"));
    logger.log_at(&record.args(format_args!("{text}")).build(), now);
}

fn log(logger: &Logger, level: Level, text: &str) {
    log_at(logger, level, text, Instant::now());
}

/// The lines of a file, each without its time.
fn lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    assert!(text.is_empty() || text.ends_with('\n'), "{text}");
    text.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
}

fn thread() -> String {
    std::thread::current().name().unwrap().to_owned()
}

#[test]
fn times_have_the_form_that_clients_parse() {
    let time = timestamp(UNIX_EPOCH + Duration::new(86_400, 5));
    let shape: String = time.chars().map(|c| if c.is_ascii_digit() { '0' } else { c }).collect();
    assert_eq!(shape, "0000-00-00T00:00:00.000000000");
    // In whatever zone this runs.
    assert!(time.starts_with("1970-01-0") && time.ends_with(".000000005"), "{time}");
}

#[test]
fn a_line_says_who_and_on_demand_how_bad_and_where() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let logger = logger();
    logger.configure(to(&path)).unwrap();
    log(&logger, Level::Warn, "plain");
    logger.configure(LoggerConfig { show_level: Some(true), ..LoggerConfig::default() }).unwrap();
    log(&logger, Level::Error, "level");
    logger.configure(LoggerConfig { show_log_origin: Some(true), ..LoggerConfig::default() }).unwrap();
    log(&logger, Level::Info, "both");
    let thread = thread();
    let expected = [
        format!("[vm-1:{thread}] plain"),
        format!("[vm-1:{thread}:ERROR] level"),
        format!("[vm-1:{thread}:INFO:src/x.rs:7] both"),
    ];
    assert_eq!(lines(&path), expected);
}

#[test]
fn lines_on_standard_error_name_their_level_unless_told_otherwise() {
    let mut settings = Settings::default();
    let record = Record::builder().level(Level::Warn).args(format_args!("x")).build();
    assert!(settings.line(&record).ends_with(":WARN] x"));
    settings.show_level = Some(false);
    assert!(!settings.line(&record).contains("WARN"));
}

#[test]
fn standard_error_that_nobody_reads_is_not_waited_for() {
    let (mut reader, mut writer) = io::pipe().unwrap();
    let line = "x".repeat(999);
    let mut taken = 0;
    while write_if_ready(&mut writer, line.clone()).is_ok() {
        taken += 1;
    }
    drop(writer);
    let mut text = String::new();
    reader.read_to_string(&mut text).unwrap();
    assert!(taken > 0);
    assert_eq!(text, format!("{line}\n").repeat(taken));
}

#[test]
fn a_line_on_a_terminal_begins_at_its_left_in_either_mode() {
    let (mut ours, mut terminal) = (-1, -1);
    let unset = std::ptr::null_mut();
    // SAFETY: two descriptors are written; neither a name, settings nor a size is asked for.
    let opened =
        unsafe { libc::openpty(&raw mut ours, &raw mut terminal, unset, unset.cast(), unset.cast()) };
    assert_eq!(opened, 0, "{}", io::Error::last_os_error());
    // SAFETY: both are new, and nobody else owns them.
    let [mut ours, mut terminal] = [ours, terminal].map(|fd| unsafe { File::from_raw_fd(fd) });
    let mut settings = console::terminal_settings(terminal.as_fd()).unwrap();
    for flags in [settings.c_oflag | libc::OPOST | libc::ONLCR, settings.c_oflag & !libc::OPOST] {
        settings.c_oflag = flags;
        console::set_terminal(terminal.as_fd(), &settings).unwrap();
        write_if_ready(&mut terminal, "x".to_owned()).unwrap();
        let mut bytes = [0; 3];
        ours.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"x\r\n");
    }
}

#[test]
fn a_log_can_be_moved_and_narrowed_at_any_time() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let logger = logger();
    logger.configure(to(&first)).unwrap();
    log(&logger, Level::Error, "one");
    logger.configure(LoggerConfig { module: Some("vmm::y".to_owned()), ..to(&second) }).unwrap();
    log(&logger, Level::Error, "unwanted");
    logger.configure(LoggerConfig::default()).unwrap();
    log(&logger, Level::Error, "unwanted still");
    logger.configure(LoggerConfig { module: Some("vmm".to_owned()), ..LoggerConfig::default() }).unwrap();
    log(&logger, Level::Error, "two");
    logger.configure(to(&dir.path().join("no/log"))).unwrap_err();
    log(&logger, Level::Error, "three");
    let thread = thread();
    assert_eq!(lines(&first), [format!("[vm-1:{thread}] one")]);
    assert_eq!(lines(&second), [format!("[vm-1:{thread}] two"), format!("[vm-1:{thread}] three")]);
}

#[test]
fn a_full_fifo_loses_lines_and_counts_them() {
    let dir = tempfile::tempdir().unwrap();
    let path = fifo(dir.path());
    let logger = logger();
    logger.configure(to(&path)).unwrap();
    let mut logged = 0;
    while logger.metrics.missed_log_count.count() < 3 {
        log(&logger, Level::Error, &"x".repeat(500));
        logged += 1;
    }
    let text = String::from_utf8(read_available(&mut reader(&path))).unwrap();
    assert!(text.ends_with('\n'));
    assert_eq!(text.lines().count(), logged - 3);
}

#[test]
fn a_line_is_one_line_that_a_pipe_takes_whole() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let logger = logger();
    logger.configure(to(&path)).unwrap();
    log(&logger, Level::Error, "a\r\n\x1b[2Jb");
    log(&logger, Level::Error, &"é".repeat(MAX_LINE));
    let lines = lines(&path);
    assert_eq!(lines.len(), 2);
    assert!(lines[0].ends_with("] a   [2Jb"), "{}", lines[0]);
    assert!(lines[1].ends_with('é'));
    assert!(std::fs::metadata(&path).unwrap().len() <= 2 * MAX_LINE as u64);
}

#[test]
fn a_flood_is_cut_but_for_errors() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("log");
    let logger = logger();
    logger.configure(to(&path)).unwrap();
    let start = Instant::now();
    for _ in 0..150 {
        log_at(&logger, Level::Warn, "flood", start);
    }
    assert_eq!(lines(&path).len(), 100);
    assert_eq!(logger.metrics.rate_limited_log_count.count(), 50);
    for _ in 0..20 {
        log_at(&logger, Level::Error, "error", start);
    }
    assert_eq!(lines(&path).len(), 120);
    log_at(&logger, Level::Info, "later", start + Duration::from_secs(1));
    let lines = lines(&path);
    assert!(lines[120].ends_with("] 50 messages were suppressed due to rate limiting"), "{}", lines[120]);
    assert!(lines[121].ends_with("] later"));
    assert_eq!(lines.len(), 122);
}

#[test]
fn threads_may_log_while_the_log_is_moved() {
    let dir = tempfile::tempdir().unwrap();
    let paths = [0, 1].map(|index| dir.path().join(index.to_string()));
    let logger = logger();
    logger.configure(to(&paths[0])).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..200).for_each(|_| log(&logger, Level::Error, "x")));
        }
        for path in paths.iter().cycle().take(50) {
            logger.configure(to(path)).unwrap();
        }
    });
    let total: usize = paths.iter().map(|path| lines(path).len()).sum();
    assert_eq!(total, 800);
}
