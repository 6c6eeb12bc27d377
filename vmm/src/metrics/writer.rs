//! Where metrics are written, and when.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Mutex, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use event_manager::{EventOps, Events, MutEventSubscriber};
use serde::Serialize;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::timerfd::TimerFd;

use super::{METRICS, Metrics};
use crate::sink::{Sink, SinkError};

/// How often metrics are written unasked.
const INTERVAL: Duration = Duration::from_secs(60);

/// Where metrics go, and what each line holds besides the figures.
#[derive(Clone, Debug)]
pub struct MetricsConfig {
    /// The file or FIFO.
    pub path: PathBuf,
    /// The microVM's name, if lines are to hold it.
    pub id: Option<String>,
    /// Pairs that each line is to hold.
    pub properties: Option<BTreeMap<String, String>>,
}

/// Why metrics cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The second call of [`init`].
    #[error(
        "Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed."
    )]
    AlreadyInitialized,
    /// There is nowhere to write to.
    #[error("Cannot initialize the metrics system due to bad user input")]
    Open(#[from] SinkError),
    /// The reader has no room for a line, or the disk is full.
    #[error("cannot write metrics; read the FIFO, or make room for the file")]
    Write(#[source] io::Error),
    /// There is no timer.
    #[error("cannot set up the timer for metrics")]
    Timer(#[source] io::Error),
}

static WRITER: OnceLock<Writer> = OnceLock::new();

/// Has metrics written to where `config` says, once in the life of the process. From now on a panic is counted,
/// and what there is to tell is written then.
///
/// # Errors
///
/// It was done before, or the file or FIFO cannot be opened; it may be tried again then.
pub fn init(config: MetricsConfig) -> Result<(), MetricsError> {
    if WRITER.get().is_some() {
        return Err(MetricsError::AlreadyInitialized);
    }
    let writer = Writer::new(&METRICS, config)?;
    WRITER.set(writer).map_err(|_| MetricsError::AlreadyInitialized)?;
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        METRICS.vmm.panic_count.store(1);
        if let Some(writer) = WRITER.get() {
            writer.flush_unless_busy();
        }
        next(info);
    }));
    Ok(())
}

/// Writes a line of metrics; `false` if nobody asked for any.
///
/// # Errors
///
/// The line could not be written. What it held will be in the next one.
pub fn flush() -> Result<bool, MetricsError> {
    WRITER.get().map_or(Ok(false), |writer| writer.flush().map(|()| true))
}

/// Where metrics are written to, for a signal handler.
pub fn raw_fd() -> Option<RawFd> {
    WRITER.get().map(|writer| writer.sink.as_raw_fd())
}

/// A line of metrics.
#[derive(Serialize)]
struct Line<'a> {
    utc_timestamp_ms: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    properties: Option<&'a BTreeMap<String, String>>,
    #[serde(flatten)]
    metrics: &'a Metrics,
}

/// Writes the figures of one set of metrics.
#[derive(Debug)]
pub(super) struct Writer {
    metrics: &'static Metrics,
    sink: Sink,
    id: Option<String>,
    properties: Option<BTreeMap<String, String>>,
    /// Held while a line is made and written.
    line: Mutex<Vec<u8>>,
}

impl Writer {
    pub(super) fn new(metrics: &'static Metrics, config: MetricsConfig) -> Result<Self, MetricsError> {
        let MetricsConfig { path, id, properties } = config;
        Ok(Self { metrics, sink: Sink::open(&path)?, id, properties, line: Mutex::default() })
    }

    pub(super) fn flush(&self) -> Result<(), MetricsError> {
        self.write(&mut self.line.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// For a thread that panicked, perhaps in the middle of a flush.
    fn flush_unless_busy(&self) {
        let line = match self.line.try_lock() {
            Ok(line) => Some(line),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        if let Some(mut line) = line {
            // A miss is counted; more cannot be done.
            let _ = self.write(&mut line);
        }
    }

    fn write(&self, line: &mut Vec<u8>) -> Result<(), MetricsError> {
        self.metrics.vcpu.collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let content = Line {
            utc_timestamp_ms: u64::try_from(now.as_millis()).unwrap_or(u64::MAX),
            id: self.id.as_deref(),
            properties: self.properties.as_ref(),
            metrics: self.metrics,
        };
        line.clear();
        let written = serde_json::to_writer(&mut *line, &content).map_err(io::Error::from).and_then(|()| {
            line.push(b'\n');
            self.sink.write_line(line)
        });
        match written {
            Ok(()) => {
                self.metrics.settle();
                Ok(())
            }
            Err(error) => {
                self.metrics.logger.missed_metrics_count.inc();
                Err(MetricsError::Write(error))
            }
        }
    }
}

/// Writes metrics at once, then every minute, and when it is dropped, on the event loop that it is added to. Until
/// [`init`] has been called it writes nothing.
pub struct FlushTimer(TimerFd);

impl FlushTimer {
    /// A timer that runs.
    pub fn new() -> Result<Self, MetricsError> {
        Self::every(INTERVAL)
    }

    pub(super) fn every(interval: Duration) -> Result<Self, MetricsError> {
        let failed = |error: vmm_sys_util::errno::Error| MetricsError::Timer(error.into());
        let mut timer = TimerFd::new().map_err(failed)?;
        timer.reset(interval, Some(interval)).map_err(failed)?;
        Ok(Self(timer))
    }

    fn flush() {
        if let Err(error) = flush() {
            log::error!("{}", crate::exit::chain(&error));
        }
    }
}

impl Drop for FlushTimer {
    fn drop(&mut self) {
        Self::flush();
    }
}

impl MutEventSubscriber for FlushTimer {
    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = ops.add(Events::new_raw(self.0.as_raw_fd(), EventSet::IN)) {
            log::error!("metrics will only be written on demand: {error:?}");
        }
        Self::flush();
    }

    fn process(&mut self, _: Events, _: &mut EventOps<'_>) {
        // It does not wait, as the timer is readable; how often it expired does not matter.
        let _ = self.0.wait();
        Self::flush();
    }
}
