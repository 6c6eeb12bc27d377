//! `cargo bench -p tests`, or `cargo pinfold-bench`: Pinfold and its peers at the same work (see `tests::bench`).

use clap::Parser;
use std::process::ExitCode;
use tests::bench::figures::Group;
use tests::bench::options::Options;
use tests::bench::outside;

/// Measures Pinfold and the other VMMs that are there, and writes tables and plots to target/bench.
#[derive(Parser)]
#[command(name = "cargo bench -p tests --", after_help = outside::ENVIRONMENT)]
struct Arguments {
    /// What to measure: everything, unless some are named
    #[arg(value_enum)]
    groups: Vec<Group>,
    /// VMMs to measure, such as pinfold,qemu-q35
    #[arg(long, value_delimiter = ',', value_name = "NAMES")]
    only: Vec<String>,
    /// How often each is measured, interleaved
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Measure time in the emulated host too, instead of counting instructions
    #[arg(long)]
    time: bool,
    /// Given by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let mut groups = if arguments.groups.is_empty() { Group::ALL.to_vec() } else { arguments.groups };
    // Starts first: then nothing else runs.
    groups.sort_unstable();
    groups.dedup();
    let options = Options { groups, only: arguments.only, runs: arguments.runs, counting: !arguments.time };
    match outside::run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("pinfold: {failure}");
            ExitCode::FAILURE
        }
    }
}
