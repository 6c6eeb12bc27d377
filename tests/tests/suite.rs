//! All cases as tests of cargo: each runs on this machine or in an emulated host (see `tests::route`), in as many lanes
//! as there is room for or `--test-threads` says. With `--nocapture` what a case prints is shown as it comes, in one lane.

use libtest_mimic::{Arguments, Failed, Trial};
use std::cmp::Reverse;
use std::process::ExitCode;
use tests::host::{host_image, progress, room};
use tests::registry::Registry;
use tests::route::Place;
use tests::schedule::Schedule;
use tests::{cases, times};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    let registry = match Registry::new() {
        Ok(registry) => registry,
        Err(failure) => {
            eprintln!("{failure}");
            return ExitCode::FAILURE;
        }
    };
    let mut all = cases::all();
    // Native ones first, then host by host, so that one lane boots each host once; in a host those first that may take
    // long, so that no lane ends long after the others.
    all.sort_by_key(|case| {
        let place = match registry.place(case) {
            Place::Native => (0, None),
            Place::Emulated(kind, _) => (1, Some(kind)),
            Place::Nowhere(_) => (2, None),
        };
        (place, Reverse(case.timeout))
    });
    let schedule = Schedule::new(&registry);
    let mut count = 0;
    let mut trials = Vec::new();
    for case in all {
        let mut trial = Trial::test(case.name, || Ok(()));
        if !arguments.list && !arguments.is_filtered_out(&trial) && !arguments.is_ignored(&trial) {
            let ended = schedule.add(case);
            count += 1;
            trial = Trial::test(case.name, move || ended.recv()?.map_err(|failure| Failed::from(failure.0)));
        }
        trials.push(trial);
    }
    let shown = arguments.nocapture;
    let lanes = match arguments.test_threads {
        _ if shown => 1,
        Some(wanted) => wanted.max(1),
        None => room::lanes(),
    };
    let lanes = lanes.min(count);
    if lanes > 1 {
        progress::in_lines();
        // Trials only wait for what the lanes do, in whatever order.
        arguments.test_threads = Some(count);
    } else {
        arguments.test_threads = Some(1);
    }
    let conclusion = std::thread::scope(|scope| {
        let schedule = &schedule;
        if lanes > 1 {
            for kernel in schedule.kernels() {
                // While the first cases run. Whoever needs it and cannot have it says why.
                scope.spawn(move || drop(host_image(kernel)));
            }
        }
        for number in 0..lanes {
            scope.spawn(move || schedule.work(number, shown));
        }
        libtest_mimic::run(&arguments, trials)
    });
    if count > 0 {
        eprintln!("pinfold: where the time went, {lanes} at a time:\n{}", times::report(&schedule.took()));
    }
    conclusion.exit_code()
}
