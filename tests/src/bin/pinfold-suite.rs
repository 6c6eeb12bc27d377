//! Runs cases: `agent PORT` serves the harness inside the emulated host, `run NAME` is one case's process.

use std::path::Path;
use std::process::ExitCode;
use tests::case::Failure;
use tests::{agent, cases};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let ended = match arguments[..] {
        ["agent", port] => agent::serve(Path::new(port)),
        ["run", name] => run(name),
        ["list"] => {
            cases::all().iter().for_each(|case| println!("{}", case.name));
            Ok(())
        }
        _ => Err(Failure::new("usage: pinfold-suite agent PORT | run CASE | list")),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.0.is_empty() {
                eprintln!("{failure}");
            }
            ExitCode::FAILURE
        }
    }
}

fn run(name: &str) -> Result<(), Failure> {
    let case = cases::find(name).ok_or_else(|| Failure(format!("there is no case {name}")))?;
    (case.run)(&agent::context()?)
}
