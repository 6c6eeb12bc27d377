//! Saying what takes long while it takes long.

use indicatif::{ProgressBar, ProgressStyle};
use std::io::IsTerminal;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Without a terminal: how often a step that is still running says so.
const REMINDER: Duration = Duration::from_secs(10);

/// Whether there may be several steps at a time.
static IN_LINES: AtomicBool = AtomicBool::new(false);

/// Has steps show themselves by lines, also on a terminal: there may be several at a time, and other output.
pub fn in_lines() {
    IN_LINES.store(true, Ordering::Relaxed);
}

/// Prints a line about our own work, in one piece: what others print at the same time must not get into it.
pub fn say(text: &str) {
    let line = format!("pinfold: {text}\n");
    eprint!("{line}");
}

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
        let shown = if std::io::stderr().is_terminal() && !IN_LINES.load(Ordering::Relaxed) {
            let bar = ProgressBar::new_spinner().with_message(label.clone());
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
                bar.set_style(style);
            }
            bar.enable_steady_tick(Duration::from_millis(120));
            Shown::Spinner(bar)
        } else {
            say(&format!("{label} ..."));
            let (stop, stopped) = mpsc::channel();
            let text = label.clone();
            let ticker = std::thread::spawn(move || {
                while stopped.recv_timeout(REMINDER) == Err(RecvTimeoutError::Timeout) {
                    say(&format!("{text} ... {} s", started.elapsed().as_secs()));
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
                say(&format!("{} ({seconds:.1} s)", self.label));
            }
            Shown::Lines { stop, ticker } => {
                drop(stop.take());
                if let Some(ticker) = ticker.take() {
                    // A ticker that panicked has nothing to tell us.
                    drop(ticker.join());
                }
                say(&format!("{}: {seconds:.1} s", self.label));
            }
        }
    }
}
