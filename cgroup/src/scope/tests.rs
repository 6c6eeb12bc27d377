use std::collections::VecDeque;

use super::*;

/// A systemd that answers requests to start as it was told to, and notes what it is asked.
#[derive(Default)]
struct Fake {
    starts: VecDeque<Result<Started, ScopeError>>,
    populated: bool,
    asked: Vec<&'static str>,
}

impl Units for Fake {
    fn start(&mut self, _: &ScopeName) -> Result<Started, ScopeError> {
        self.asked.push("start");
        self.starts.pop_front().unwrap_or(Ok(Started::Exists))
    }

    fn populated(&mut self, _: &str) -> Result<bool, ScopeError> {
        self.asked.push("populated");
        Ok(self.populated)
    }

    fn reset_failed(&mut self, _: &str) -> Result<(), ScopeError> {
        self.asked.push("reset");
        Ok(())
    }

    fn stop(&mut self, _: &str) -> Result<(), ScopeError> {
        self.asked.push("stop");
        Ok(())
    }
}

fn name() -> ScopeName {
    "a.slice:p:n".parse().unwrap()
}

#[test]
fn a_free_name_is_started_and_no_more() {
    let mut systemd = Fake { starts: [Ok(Started::Done)].into(), ..Fake::default() };
    bring_up(&mut systemd, &name()).unwrap();
    assert_eq!(systemd.asked, ["start"]);
}

#[test]
fn a_stale_unit_is_cleared_away() {
    let mut systemd = Fake { starts: [Ok(Started::Exists), Ok(Started::Done)].into(), ..Fake::default() };
    bring_up(&mut systemd, &name()).unwrap();
    assert_eq!(systemd.asked, ["start", "populated", "reset", "stop", "start"]);
}

#[test]
fn a_unit_with_processes_is_left_alone() {
    let mut systemd = Fake { populated: true, ..Fake::default() };
    let error = bring_up(&mut systemd, &name()).unwrap_err();
    assert!(matches!(&error, ScopeError::Populated(unit) if unit == "p-n.scope"), "{error}");
    assert_eq!(systemd.asked, ["start", "populated"]);
}

#[test]
fn a_unit_that_comes_back_is_given_up() {
    let mut systemd = Fake::default();
    assert!(matches!(bring_up(&mut systemd, &name()), Err(ScopeError::Taken(_))));
    assert_eq!(systemd.asked.iter().filter(|asked| **asked == "start").count(), 3);
}

#[test]
fn a_job_that_fails_ends_it() {
    let failed =
        || ScopeError::Job { doing: "start", unit: "p-n.scope".to_owned(), result: "failed".to_owned() };
    let mut systemd = Fake { starts: [Err(failed())].into(), ..Fake::default() };
    let error = bring_up(&mut systemd, &name()).unwrap_err();
    assert_eq!(error.to_string(), failed().to_string());
    assert_eq!(systemd.asked, ["start"]);
}
