//! A launched VM whose guest runs `tests/guest/bench-init`.

use super::clock::Moment;
use crate::case::Failure;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// How long a guest may take for one thing. On a counting host these are 60e9 instructions.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long a VMM may take to end when it is asked to.
const END: Duration = Duration::from_secs(5);

/// The VM. Dropping it kills it.
pub struct Guest {
    child: Child,
    lines: Receiver<(Moment, String)>,
    errors: PathBuf,
    /// Just before the VMM was launched.
    pub launched: Moment,
}

impl Guest {
    /// Launches `command`, whose standard output is the guest's console.
    pub fn launch(mut command: Command, scratch: &Path) -> Result<Self, Failure> {
        let errors = scratch.join("errors");
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(File::create(&errors)?);
        let launched = Moment::now()?;
        let mut child =
            command.spawn().map_err(|error| Failure(format!("cannot launch {command:?}: {error}")))?;
        let (sender, lines) = mpsc::channel();
        if let Some(console) = child.stdout.take() {
            std::thread::spawn(move || {
                // What SeaBIOS prints need not be text.
                for line in BufReader::new(console).split(b'\n').map_while(Result::ok) {
                    let Ok(moment) = Moment::now() else { return };
                    if sender.send((moment, String::from_utf8_lossy(&line).trim().to_owned())).is_err() {
                        return;
                    }
                }
            });
        }
        Ok(Self { child, lines, errors, launched })
    }

    /// The VMM's process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a line of the guest's that holds `text`: when it came, and what follows the text.
    pub fn wait_for(&mut self, text: &str) -> Result<(Moment, String), Failure> {
        let deadline = Instant::now() + PATIENCE;
        let mut seen = Vec::new();
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok((moment, line)) => {
                    if let Some((_, rest)) = line.split_once(text) {
                        return Ok((moment, rest.trim().to_owned()));
                    }
                    seen.push(line);
                }
                Err(_) => return Err(self.silent(text, &seen)),
            }
        }
    }

    /// Has the guest's shell run `order`: what it prints, as one line.
    pub fn ask(&mut self, order: &str) -> Result<String, Failure> {
        let Some(stdin) = &mut self.child.stdin else { return Err(Failure::new("no standard input")) };
        stdin.write_all(format!("{order}\n").as_bytes())?;
        stdin.flush()?;
        Ok(self.wait_for("bench: answer ")?.1)
    }

    /// Ends the VMM in the way that lets it clean up, and waits for it.
    pub fn stop(mut self) -> Result<(), Failure> {
        let pid = libc::pid_t::try_from(self.pid())?;
        // SAFETY: kill touches no memory; the process is a child that we have not waited for.
        unsafe { libc::kill(pid, libc::SIGTERM) };
        let deadline = Instant::now() + END;
        while self.child.try_wait()?.is_none() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Why nothing comes any more: the VMM's own words where there are any.
    fn silent(&mut self, text: &str, seen: &[String]) -> Failure {
        let errors = fs::read_to_string(&self.errors).unwrap_or_default();
        let said = last_words(errors.lines());
        let console = last_words(seen.iter().map(String::as_str));
        match self.child.try_wait() {
            Ok(Some(status)) => {
                let words = if said.is_empty() { console } else { said };
                Failure(format!("it ended with {status}: {words}"))
            }
            _ => Failure(format!("the guest did not say `{text}`; last words: `{console}`, VMM: `{said}`")),
        }
    }
}

fn last_words<'a>(mut lines: impl DoubleEndedIterator<Item = &'a str>) -> String {
    lines.rfind(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned()
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It may be gone already, and then both fail.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
