//! Saying what takes long while it takes long.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Without a terminal: how often a step that is still running says so.
const REMINDER: Duration = Duration::from_secs(10);

/// A step under way: a spinner on a terminal, lines with elapsed seconds elsewhere. Ends on drop.
pub struct Step {
    label: String,
    started: Instant,
    shown: Shown,
}

enum Shown {
    Spinner(ProgressBar),
    Lines { stop: Option<Sender<()>>, ticker: Option<JoinHandle<()>> },
}

impl Step {
    /// Begins to show `label`.
    pub fn new(label: impl Into<String>) -> Self {
        let label = label.into();
        let started = Instant::now();
        let shown = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner().with_message(label.clone());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            Shown::Spinner(bar)
        } else {
            eprintln!("pinfold: {label} ...");
            let (stop, stopped) = mpsc::channel();
            let text = label.clone();
            let ticker = std::thread::spawn(move || {
                while stopped.recv_timeout(REMINDER) == Err(RecvTimeoutError::Timeout) {
                    eprintln!("pinfold: {text} ... {} s", started.elapsed().as_secs());
                }
            });
            Shown::Lines { stop: Some(stop), ticker: Some(ticker) }
        };
        Self { label, started, shown }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let seconds = self.started.elapsed().as_secs_f32();
        match &mut self.shown {
            Shown::Spinner(bar) => {
                bar.finish_and_clear();
                eprintln!("pinfold: {} ({seconds:.1} s)", self.label);
            }
            Shown::Lines { stop, ticker } => {
                drop(stop.take());
                if let Some(ticker) = ticker.take() {
                    // A ticker that panicked has nothing to tell us.
                    drop(ticker.join());
                }
                eprintln!("pinfold: {}: {seconds:.1} s", self.label);
            }
        }
    }
}
