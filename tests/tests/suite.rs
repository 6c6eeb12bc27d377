//! All cases as tests of cargo: each runs on this machine or in the emulated host (see `tests::route`). With
//! `--nocapture` what a case prints is shown as it comes.

use libtest_mimic::{Arguments, Failed, Trial};
use std::process::ExitCode;
use std::sync::{Arc, Mutex};
use tests::cases;
use tests::registry::Registry;
use tests::route::Place;

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // One after another: they share a host, and a host that waits for its turn costs more than it brings.
    arguments.test_threads = Some(1);
    let registry = match Registry::new() {
        Ok(registry) => registry,
        Err(failure) => {
            eprintln!("{failure}");
            return ExitCode::FAILURE;
        }
    };
    let mut all = cases::all();
    // Native ones first, then host by host, so that each host is booted once.
    all.sort_by_key(|case| match registry.place(case) {
        Place::Native => (0, None),
        Place::Emulated(kind, _) => (1, Some(kind)),
        Place::Nowhere(_) => (2, None),
    });
    let registry = Arc::new(Mutex::new(registry));
    let shown = arguments.nocapture;
    let trials = all
        .into_iter()
        .map(|case| {
            let registry = Arc::clone(&registry);
            Trial::test(case.name, move || {
                let mut registry = registry.lock().map_err(|_| Failed::from("an earlier case panicked"))?;
                let ended = if shown {
                    registry.run(case, &mut |text| print!("{text}"))
                } else {
                    registry.run_quietly(case)
                };
                ended.map_err(|failure| Failed::from(failure.0))
            })
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Ends the last host before the process ends.
    drop(registry);
    conclusion.exit_code()
}
