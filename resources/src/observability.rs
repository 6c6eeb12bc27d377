//! `logger`, `metrics` and `serial`: where what Pinfold and the guest have to say goes.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Deserializer, Serialize};

use crate::TokenBucket;

/// From which severity on log lines are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum LogLevel {
    /// Nothing is.
    Off,
    /// Everything is.
    Trace,
    /// What helps to find a fault.
    Debug,
    /// What happens.
    Info,
    /// What may be wrong.
    Warn,
    /// What went wrong.
    Error,
}

impl<'de> Deserialize<'de> for LogLevel {
    /// In any case, as Firecracker takes it.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Ok(match text.to_ascii_lowercase().as_str() {
            "off" => Self::Off,
            "trace" => Self::Trace,
            "debug" => Self::Debug,
            "info" => Self::Info,
            "warn" | "warning" => Self::Warn,
            "error" => Self::Error,
            _ => {
                return Err(serde::de::Error::custom(format!(
                    "unknown level {text:?}, expected Off, Trace, Debug, Info, Warn or Error"
                )));
            }
        })
    }
}

/// The log.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or FIFO; standard error when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// The least severity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether lines name their severity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether lines name the place in the source that they come from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines whose module path starts so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// The metrics.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or FIFO, which gets a line of JSON every minute.
    pub metrics_path: PathBuf,
    /// Whether each line names the microVM.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub emit_id: bool,
    /// Pairs that each line holds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

/// The guest's serial console.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or FIFO that gets what the guest writes; standard output when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_path: Option<PathBuf>,
    /// A limit on the bytes that the guest writes; what is beyond it is lost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_taken_in_any_case() {
        for (text, level) in [("Info", LogLevel::Info), ("WARNING", LogLevel::Warn), ("off", LogLevel::Off)] {
            assert_eq!(serde_json::from_value::<LogLevel>(text.into()).unwrap(), level);
        }
        assert!(serde_json::from_value::<LogLevel>("loud".into()).is_err());
    }
}
