//! What is asked for, and the lines that the measuring side prints.

use super::figures::{FigureId, Group};
use serde::{Deserialize, Serialize};

/// The file of the job that holds the [`Options`].
pub const OPTIONS_FILE: &str = "bench.json";
/// What a line of the measuring side for the other begins with.
pub const MARK: &str = "bench-message: ";

/// What to measure.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Options {
    /// Groups of figures.
    pub groups: Vec<Group>,
    /// Names of VMMs; empty: all.
    pub only: Vec<String>,
    /// How often each is measured.
    pub runs: u32,
    /// Whether the clock counts instructions.
    pub counting: bool,
}

/// A line from the measuring side.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// A step begins: how many are done, of how many, and what it is.
    Step {
        /// Steps done.
        done: usize,
        /// Of this many.
        of: usize,
        /// What comes now.
        what: String,
    },
    /// A figure of one run.
    Sample(Sample),
    /// A VMM that cannot be measured, or one of its figures.
    Unavailable {
        /// Its name.
        vmm: String,
        /// Of what, if not of all.
        group: Option<Group>,
        /// Why.
        reason: String,
    },
}

/// One measurement.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sample {
    /// The VMM's name.
    pub vmm: String,
    /// What was measured.
    pub figure: FigureId,
    /// In the figure's unit.
    pub value: f64,
    /// The share of the measured interval in which no CPU was busy, 0 to 1, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle: Option<f64>,
}
