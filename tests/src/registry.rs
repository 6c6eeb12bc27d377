//! Runs cases where they belong: several lanes, each with at most one emulated host alive at a time.

use crate::agent;
use crate::artifacts::{Binaries, binaries};
use crate::case::{Case, Failure};
use crate::host::boot::link_job;
use crate::host::progress::say;
use crate::host::{EmulatedHost, HostError, guest_files};
use crate::route::{Forced, Kind, Machine, Place, place};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// How much of a case's output is kept for the report of its failure, in bytes.
const KEPT_OUTPUT: usize = 256 << 10;

/// What all lanes share: the decision where a case runs, and what is built or said once.
pub struct Registry {
    machine: Machine,
    forced: Forced,
    binaries: Mutex<Option<Binaries>>,
    announced: Mutex<BTreeSet<String>>,
}

impl Registry {
    /// Looks at the machine and the environment; builds nothing yet.
    pub fn new() -> Result<Self, Failure> {
        Ok(Self {
            machine: Machine::detect(),
            forced: Forced::from_environment().map_err(Failure)?,
            binaries: Mutex::default(),
            announced: Mutex::default(),
        })
    }

    /// Where `case` is going to run.
    pub fn place(&self, case: &Case) -> Place {
        place(&case.needs, &self.machine, self.forced)
    }

    /// A lane that has booted nothing yet. Only one at a time may run cases on this machine.
    pub fn lane(&self) -> Lane<'_> {
        Lane { registry: self, host: None, native_job: None, prepared: Duration::ZERO }
    }

    /// The binaries, built by the first lane that asks, while others wait.
    fn binaries(&self) -> Result<Binaries, HostError> {
        let mut built = self.binaries.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(built) = &*built {
            return Ok(built.clone());
        }
        Ok(built.insert(binaries()?).clone())
    }

    /// Says once where a kind of cases runs, and why.
    fn announce(&self, text: String) {
        if self.announced.lock().unwrap_or_else(PoisonError::into_inner).insert(text.clone()) {
            say(&text);
        }
    }
}

/// Runs one case after another. To be kept by one thread: with the thread that booted it a host ends.
pub struct Lane<'a> {
    registry: &'a Registry,
    host: Option<EmulatedHost>,
    native_job: Option<TempDir>,
    prepared: Duration,
}

impl Lane<'_> {
    /// How long it took to build and to boot since this was asked last.
    pub fn prepared(&mut self) -> Duration {
        std::mem::take(&mut self.prepared)
    }

    /// Runs `case` and keeps its output for the failure's text.
    pub fn run_quietly(&mut self, case: &Case) -> Result<(), Failure> {
        let mut output = String::new();
        let ended = self.run(case, &mut |text| {
            output.push_str(text);
            if output.len() > KEPT_OUTPUT {
                let cut = output.floor_char_boundary(output.len() - KEPT_OUTPUT / 2);
                output.replace_range(..cut, "(the beginning is left out)\n");
            }
        });
        ended.map_err(|failure| {
            let kernel = match &self.host {
                Some(host) => format!("--- end of the host's console\n{}\n", host.console_tail(15)),
                None => String::new(),
            };
            Failure(format!("{failure}\n--- output of {}\n{output}{kernel}", case.name))
        })
    }

    /// Runs `case`, handing its output to `out` as it comes.
    pub fn run(&mut self, case: &Case, out: &mut dyn FnMut(&str)) -> Result<(), Failure> {
        match self.registry.place(case) {
            Place::Nowhere(reason) => Err(Failure(reason)),
            Place::Native => {
                self.registry.announce("on this machine".to_owned());
                self.run_natively(case, out)
            }
            Place::Emulated(kind, reason) => {
                self.registry.announce(format!("{kind}: emulated host, because {reason}"));
                self.run_emulated(kind, case, out)
            }
        }
    }

    fn run_natively(&mut self, case: &Case, out: &mut dyn FnMut(&str)) -> Result<(), Failure> {
        if self.native_job.is_none() {
            let job = tempfile::Builder::new().prefix("pinfold-job-").tempdir()?;
            link_job(job.path(), &guest_files()?, &self.registry.binaries()?)?;
            self.native_job = Some(job);
        }
        let Some(job) = &self.native_job else { return Err(Failure::new("the job folder is gone")) };
        agent::run_case(case.name, job.path(), None, case.timeout, out)
    }

    fn run_emulated(&mut self, kind: Kind, case: &Case, out: &mut dyn FnMut(&str)) -> Result<(), Failure> {
        twice(case.name, || {
            let ended = self.host(kind).and_then(|host| host.run(case, out));
            if ended.is_err() {
                self.host = None;
            }
            ended
        })?
    }

    /// The host of this kind, booted if it is not there.
    fn host(&mut self, kind: Kind) -> Result<&mut EmulatedHost, HostError> {
        let host = match self.host.take() {
            Some(host) if host.kind() == kind => host,
            old => {
                // The old one first: two would share the lane's core and memory.
                drop(old);
                let begun = Instant::now();
                let binaries = self.registry.binaries()?;
                let booted = EmulatedHost::boot(kind, &binaries);
                self.prepared += begun.elapsed();
                booted?
            }
        };
        Ok(self.host.insert(host))
    }
}

/// Lets `attempt` run the case `name` in a host, and once more if that host was lost: the emulation is not perfect, and
/// what ends a whole host, or makes it stand still, is first of all suspected of being its fault. A case that ended,
/// however it did, is not repeated.
fn twice<T>(name: &str, mut attempt: impl FnMut() -> Result<T, HostError>) -> Result<T, Failure> {
    match attempt() {
        Err(HostError::Dead { what, console }) => {
            say(&format!(
                "the emulated host {what}; {name} runs once more in a fresh one\n\
                 --- end of the lost host's console\n{console}\n---"
            ));
        }
        ended => return Ok(ended?),
    }
    Ok(attempt()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What came of attempts that end so, and how many there were.
    fn attempts(ends: Vec<Result<Result<(), Failure>, HostError>>) -> (Result<(), String>, usize) {
        let mut left = ends.into_iter();
        let mut count = 0;
        let ended = twice("a_case", || {
            count += 1;
            left.next().unwrap()
        });
        (ended.and_then(|ended| ended).map_err(|failure| failure.0), count)
    }

    fn lost() -> Result<Result<(), Failure>, HostError> {
        Err(HostError::Dead { what: "stands still".to_owned(), console: String::new() })
    }

    #[test]
    fn a_lost_host_costs_another_attempt_and_not_a_third() {
        assert_eq!(attempts(vec![lost(), Ok(Ok(()))]), (Ok(()), 2));
        assert_eq!(attempts(vec![lost(), Ok(Err(Failure::new("x")))]), (Err("x".to_owned()), 2));
        let (ended, count) = attempts(vec![lost(), lost()]);
        assert!(ended.unwrap_err().contains("stands still"));
        assert_eq!(count, 2);
    }

    #[test]
    fn a_case_that_ended_is_not_repeated() {
        assert_eq!(attempts(vec![Ok(Ok(()))]), (Ok(()), 1));
        assert_eq!(attempts(vec![Ok(Err(Failure::new("x")))]), (Err("x".to_owned()), 1));
        assert_eq!(attempts(vec![Err(HostError::NoMirror)]).1, 1);
    }
}
