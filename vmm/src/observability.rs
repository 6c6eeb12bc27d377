//! Log and metrics as declared.

use log::LevelFilter;
use resources::{InstanceId, LogLevel, Logger, Metrics};

use crate::args::Args;
use crate::logger::{self, LoggerConfig};
use crate::metrics::{self, MetricsConfig, MetricsError};
use crate::sink::SinkError;

/// Has the log follow the section `logger`.
pub fn configure_log(section: &Logger) -> Result<(), SinkError> {
    // Firecracker's default once somebody declares a log.
    let level = section.level.unwrap_or(LogLevel::Info);
    logger::configure(LoggerConfig {
        path: section.log_path.clone(),
        level: Some(filter(level)),
        show_level: section.show_level,
        show_log_origin: section.show_log_origin,
        module: section.module.clone(),
    })
}

/// Has metrics written as the section `metrics` says.
pub fn configure_metrics(section: &Metrics, id: &InstanceId) -> Result<(), MetricsError> {
    metrics::init(MetricsConfig {
        path: section.metrics_path.clone(),
        id: section.emit_id.then(|| id.to_string()),
        properties: section.properties.clone(),
    })
}

/// Has the log follow the command line.
pub fn configure_log_by(args: &Args) -> Result<(), SinkError> {
    let level = match &args.log_path {
        Some(_) => Some(args.level.unwrap_or(LevelFilter::Info)),
        None => args.level,
    };
    logger::configure(LoggerConfig {
        path: args.log_path.clone(),
        level,
        show_level: args.show_level.then_some(true),
        show_log_origin: args.show_log_origin.then_some(true),
        module: args.module.clone(),
    })
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Trace => LevelFilter::Trace,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Warn => LevelFilter::Warn,
        LogLevel::Error => LevelFilter::Error,
    }
}
